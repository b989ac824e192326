"""Progress events, and simple sinks for them.

The core passes frozen events to a `Report`; it never formats them for people. Sinks are functions of one event:
`silent`, `logged`, `json_lines(stream)`. Progress bars for a terminal belong to the command line, percentages for the
orchestrator to the provider. A sink that fails never stops the work: see `unfailing`.

Example: a sink for `Source(..., report=report)`. All sizes are bytes, all times are seconds or datetimes in UTC.

    from coriolis_azure import events

    def report(event: events.Event) -> None:
        match event:
            case events.Copied(disk, done, total):
                print(f"{event.vm} {disk}: {100 * done // total}%")
            case events.Notice(text):
                print(f"note: {text}")
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import TextIO

from .clock import Clock, rfc3339, scope
from .errors import cleaned

LOG = logging.getLogger(__name__)

# Steps of a `Fleet`: the run of a VM begins, and is done or has failed.
BEGIN, DONE, FAILED = "begin", "done", "failed"
_TELL_SECONDS = 10.0
_REPORTS_PER_SECOND = 5


@dataclass(frozen=True, kw_only=True)
class _Event:
    """The VM and disk that an event is about ("" for none), and its time.

    A `Source` fills them in. They do not count when events are compared.
    """

    vm: str = field(default="", compare=False)
    disk: str = field(default="", compare=False)
    time: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Step(_Event):
    """A step of the run begins. `name` is the action, `target` its object."""

    name: str
    target: str = ""


@dataclass(frozen=True)
class Copied(_Event):
    """The progress of one disk in bytes: `done` of `total` compared so far, `sent` passed to the destination.

    `bottleneck` is where most of the recent time was spent: "source" (the worker, its disk or the connection to it),
    "destination" (or this host's work for it), "limit" (the bandwidth limit), or "" for none of them.
    """

    disk: str = field()
    done: int
    total: int
    sent: int
    bottleneck: str = ""


@dataclass(frozen=True)
class Waiting(_Event):
    """The run is waiting for `what`; `waited` seconds of at most `seconds` have passed (None: no limit).

    Repeated while the wait lasts, every ten seconds as a rule. `percent` is how much of it is done, if that is known.
    """

    what: str
    seconds: float | None
    waited: float = 0.0
    percent: int | None = None


@dataclass(frozen=True)
class Notice(_Event):
    """Something that users should know although the run continues, such as a setting that was replaced."""

    text: str


Event = Step | Copied | Waiting | Notice
Report = Callable[[Event], None]


class Wait:
    """A wait for `what`, limited to `seconds` if given. It is reported at once and every `interval` seconds.

    An estimate may replace the limit: set `seconds` again whenever it changes.

    waiting = Wait(report, clock, "the copy", 3600)
    while not copied():
        if waiting.left <= 0:
            raise DeadlinePassed(...)
        waiting.pause(5)
    """

    def __init__(
        self,
        report: Report,
        clock: Clock,
        what: str,
        seconds: float | None = None,
        *,
        interval: float = _TELL_SECONDS,
    ) -> None:
        self._report, self._clock, self._interval = report, clock, interval
        self._what, self.seconds = what, seconds
        self._began = clock.monotonic()
        self._next = 0.0

    @property
    def waited(self) -> float:
        """The seconds since the wait began."""
        return self._clock.monotonic() - self._began

    @property
    def left(self) -> float:
        """The seconds left until the limit, negative once it has passed; infinite if there is none."""
        return math.inf if self.seconds is None else self.seconds - self.waited

    def still(self, percent: float | None = None) -> None:
        """Report that the wait goes on, if the next report is due."""
        waited = self.waited
        if waited >= self._next:
            self._next = waited + self._interval
            done = None if percent is None else int(percent)
            self._report(Waiting(self._what, self.seconds, round(waited, 3), done))

    def pause(self, seconds: float, percent: float | None = None) -> None:
        """Report the wait and sleep for `seconds`. Raises WaitEnded if the wait is cancelled."""
        self.still(percent)
        self._clock.sleep(seconds)


def amount(count: float) -> str:
    """A number of bytes for people, with three significant digits."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.3g} {units[power]}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun: 1 disk, 2 disks. Give `plural` if it is irregular."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """A time span as an estimate, in minutes or hours."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def aged(seconds: float) -> str:
    """An age for people, in one unit: 45 s, 12 min, 5 h, 3 days."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} days"


def span(seconds: float) -> str:
    """A time span as a clock shows it: 0:05, 12:00, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def line(event: Event) -> str:
    """An event as one line for people; text from others in it is cleaned."""
    match event:
        case Step(name, target):
            text = f"{name}: {target}" if target else name
        case Waiting(what, seconds, waited, percent):
            done = "" if percent is None else f", {percent} % done"
            limit = "so far" if seconds is None else f"of up to {span(seconds)}"
            text = f"waiting for {what}{done} ({span(waited)} {limit})"
        case Notice(text):
            pass
        case Copied(disk, done, total, sent):
            text = f"{disk}: {amount(done)} of {amount(total)}, {amount(sent)} sent"
    return cleaned(text)


class _Unfailing:
    """A sink that wraps another one: see `unfailing`."""

    def __init__(self, sink: Report) -> None:
        self._sink, self._failed = sink, False

    def __call__(self, event: Event) -> None:
        """Pass the event on; log the first failure."""
        try:
            self._sink(event)
        except Exception as error:  # noqa: BLE001 - a caller's sink may raise anything: see `unfailing`
            if not self._failed:
                LOG.warning("cannot report events, the work goes on: %s: %s", type(error).__name__, error)
            self._failed = True


def unfailing(sink: Report) -> Report:
    """`sink`, wrapped so that its errors are not raised: the first one is logged.

    It still gets all later events, since its failure may be temporary. KeyboardInterrupt and SystemExit, which ask the
    process to end, are raised.
    """
    return sink if isinstance(sink, _Unfailing) else _Unfailing(sink)


def located(sink: Report, clock: Clock) -> Report:
    """A sink that adds the VM and disk of the current scope, and the time, to each event, and passes it to `sink`."""

    def report(event: Event) -> None:
        work = scope()
        vm, disk = (work.vm, work.disk) if work is not None else ("", "")
        sink(replace(event, vm=event.vm or vm, disk=event.disk or disk, time=event.time or clock.now()))

    return report


def silent(event: Event) -> None:
    """Ignore the event: the sink of callers that need none."""
    del event


def logged(event: Event) -> None:
    """Log one line per event; progress of a disk only at DEBUG."""
    level = {Notice: logging.WARNING, Copied: logging.DEBUG}.get(type(event), logging.INFO)
    LOG.log(level, "%s", line(event))


def json_lines(stream: TextIO) -> Report:
    """A sink that writes each event to `stream` as a line of JSON: {"event": "copied", "vm": ..., "time": ..., ...}."""
    clock = Clock()

    def report(event: Event) -> None:
        time = rfc3339(event.time or clock.now())
        document = {"event": type(event).__name__.lower(), **asdict(event), "time": time}
        stream.write(json.dumps(document) + "\n")
        stream.flush()

    return report


class Progress:
    """Reports the progress of a disk, a few times a second at most."""

    def __init__(self, disk: str, total: int, report: Report, clock: Clock) -> None:
        self.disk, self._total, self.report, self.clock = disk, total, report, clock
        self._next = clock.monotonic()

    def show(self, done: int, sent: int, bottleneck: str = "") -> None:
        """Report progress if it is due: `done` bytes are compared, `sent` of them sent; `bottleneck` as in Copied."""
        now = self.clock.monotonic()
        if now >= self._next and done < self._total:
            self._next = now + 1 / _REPORTS_PER_SECOND
            self.report(Copied(self.disk, done, self._total, sent, bottleneck))

    def last(self, sent: int) -> None:
        """Report that all bytes are compared."""
        self.report(Copied(self.disk, self._total, self._total, sent))
