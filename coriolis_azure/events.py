"""What a watcher is told while something runs, and the plain sinks for it.

The core hands frozen events to a `Report`; it never formats for people. Sinks are functions of one event:
`silent`, `logged`, `json_lines(stream)`. Bars for a terminal are the command line's, percentage steps for the
orchestrator are the provider's. A sink that fails never stops what it watches: see `unfailing`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TextIO

from .clock import Clock, rfc3339
from .errors import cleaned

LOG = logging.getLogger(__name__)

_TELL_SECONDS = 10.0
_REPORTS_PER_SECOND = 5


@dataclass(frozen=True)
class Step:
    """A step of the run begins: `name` is what is done, `target` to what."""

    name: str
    target: str = ""


@dataclass(frozen=True)
class Copied:
    """How far one disk is. Bytes: `done` of `total` compared so far, `sent` passed to the destination.

    `bottleneck`: what most of the time goes to, as of late: "source" (the worker, its disk or the line to it),
    "destination" (or what this host does for it), or "limit" (of the bandwidth); "" where no one does.
    """

    disk: str
    done: int
    total: int
    sent: int
    bottleneck: str = ""


@dataclass(frozen=True)
class Waiting:
    """Nothing can be done but wait: for `what`, `seconds` at most where there is a limit; `waited` have passed.

    Told again every ten seconds while it lasts. `percent`: how much of it is done, where that is known.
    """

    what: str
    seconds: float | None
    waited: float = 0.0
    percent: int | None = None


@dataclass(frozen=True)
class Notice:
    """Something a person should know although the run goes on, for instance a setting that was replaced."""

    text: str


Event = Step | Copied | Waiting | Notice
Report = Callable[[Event], None]


class Wait:
    """One wait: for `what`, for `seconds` at most where that is given. It is told of at once and every ten seconds.

    waiting = Wait(report, clock, "the copy", 3600)
    while not copied():
        if waiting.left <= 0:
            raise DeadlinePassed(...)
        waiting.pause(5)
    """

    def __init__(self, report: Report, clock: Clock, what: str, seconds: float | None = None) -> None:
        self._report, self._clock = report, clock
        self._what, self._seconds = what, seconds
        self._began = clock.monotonic()
        self._next = 0.0

    @property
    def waited(self) -> float:
        """The seconds since it began."""
        return self._clock.monotonic() - self._began

    @property
    def left(self) -> float:
        """The seconds that are left of the limit, negative once it has passed; infinite where there is none."""
        return math.inf if self._seconds is None else self._seconds - self.waited

    def still(self, percent: float | None = None) -> None:
        """What is waited for is not there yet."""
        waited = self.waited
        if waited >= self._next:
            self._next = waited + _TELL_SECONDS
            done = None if percent is None else int(percent)
            self._report(Waiting(self._what, self._seconds, round(waited, 3), done))

    def pause(self, seconds: float, percent: float | None = None) -> None:
        """It is not there yet: look again after so many seconds. WaitEnded when the wait is called off."""
        self.still(percent)
        self._clock.sleep(seconds)


def amount(count: float) -> str:
    """Bytes as people read them: three digits are enough."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.3g} {units[power]}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """So many of something: 1 disk, 2 disks. `plural` where that is not an s more."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """A time span as an estimate: minutes, then hours."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def span(seconds: float) -> str:
    """A time span as a clock shows it: 0:05, 12:00, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def line(event: Event) -> str:
    """An event as one line for people, with what it holds of others' words cleaned."""
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
    """A sink around another."""

    def __init__(self, sink: Report) -> None:
        self._sink, self._failed = sink, False

    def __call__(self, event: Event) -> None:
        """Tell the event; log the first failure."""
        try:
            self._sink(event)
        except Exception as error:  # noqa: BLE001 - whatever a caller's sink raises: see `unfailing`
            if not self._failed:
                LOG.warning("events cannot be told, the work goes on: %s: %s", type(error).__name__, error)
            self._failed = True


def unfailing(sink: Report) -> Report:
    """`sink`, except that its errors go no further: the first one is logged.

    Its next events are still told, for what keeps a sink from one event may pass. What asks the process to end
    (KeyboardInterrupt, SystemExit) is no error.
    """
    return sink if isinstance(sink, _Unfailing) else _Unfailing(sink)


def silent(event: Event) -> None:
    """The sink of callers that do not watch."""
    del event


def logged(event: Event) -> None:
    """One log line an event; per-chunk progress only at DEBUG."""
    level = {Notice: logging.WARNING, Copied: logging.DEBUG}.get(type(event), logging.INFO)
    LOG.log(level, "%s", line(event))


def json_lines(stream: TextIO) -> Report:
    """A sink that writes each event to `stream` as one line of JSON: {"event": "copied", "time": ..., ...}."""
    clock = Clock()

    def report(event: Event) -> None:
        told = {"event": type(event).__name__.lower(), "time": rfc3339(clock.now()), **asdict(event)}
        stream.write(json.dumps(told) + "\n")
        stream.flush()

    return report


class Progress:
    """Tells how far a disk is, a few times a second at most."""

    def __init__(self, disk: str, total: int, report: Report, clock: Clock) -> None:
        self.disk, self._total, self.report, self._clock = disk, total, report, clock
        self._next = clock.monotonic()

    def show(self, done: int, sent: int, bottleneck: str = "") -> None:
        """`done` bytes are settled, `sent` of them sent; `bottleneck` as Copied has it."""
        now = self._clock.monotonic()
        if now >= self._next and done < self._total:
            self._next = now + 1 / _REPORTS_PER_SECOND
            self.report(Copied(self.disk, done, self._total, sent, bottleneck))

    def last(self, sent: int) -> None:
        """All bytes are settled."""
        self.report(Copied(self.disk, self._total, self._total, sent))
