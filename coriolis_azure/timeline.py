"""What one run did, and when: a `RunReport`, made from its events and its result by a `Recorder`.

A report is a small value with limits: it is kept beside the replica (see `replica.history`) and shown as a page. Times
within a run are seconds since it began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, cast

from .change_map import ChangeMap
from .clock import Clock, rfc3339, scope
from .errors import Cancelled, CoriolisAzureError, WaitEnded
from .events import Copied, Event, Notice, Step, Waiting
from .model import Json
from .threads import Lock

Outcome = Literal["done", "failed", "interrupted"]
OUTCOMES = ("done", "failed", "interrupted")
# By letter, what most of an interval was spent on: see `events.Copied`.
BOTTLENECKS = {"-": "", "s": "source", "d": "destination", "l": "limit"}

_STEPS, _WAITS, _NOTICES, _LEFT, _DISKS = 120, 4, 40, 100, 80  # the most that a report holds
_TEXT = 400  # characters of a text
_INTERVALS = 60
_REPEATED_SECONDS = 10.0  # a wait is reported this often, so it ended this long after its last report at most
_LETTERS = {name: letter for letter, name in BOTTLENECKS.items()}


@dataclass(frozen=True)
class StepTaken:
    """A step, from `begin` to `end`. `disk`: the disk that it was about, "" for the whole run.

    `waits`: what it waited for, longest first, and for how many seconds.
    """

    name: str
    target: str
    disk: str
    begin: float
    end: float
    waits: tuple[tuple[str, float], ...] = ()

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclass(frozen=True)
class DiskFigures:
    """What was copied of a disk, in bytes. The names are those of `DiskReport`.

    Of a run that failed, only `size_bytes`, `done_bytes` (compared so far) and `sent_bytes` are known.
    """

    name: str
    size_bytes: int
    done_bytes: int
    sent_bytes: int
    read_bytes: int | None = None
    zero_bytes: int | None = None
    skipped_bytes: int | None = None
    relied_bytes: int | None = None
    checked_bytes: int | None = None
    full: bool | None = None
    verified: bool | None = None
    mechanism: str = ""
    tier: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Rates:
    """The progress of the copy, in equal intervals of `seconds` from `begin` on.

    `done` and `sent`: the bytes that were compared and sent in each; `bottlenecks`: a letter for each, see BOTTLENECKS.
    """

    begin: float = 0.0
    seconds: float = 1.0
    done: tuple[int, ...] = ()
    sent: tuple[int, ...] = ()
    bottlenecks: str = ""

    def shares(self) -> dict[str, float]:
        """By bottleneck, the part of the intervals in which something was copied."""
        letters = [letter for letter, done in zip(self.bottlenecks, self.done, strict=True) if done]
        return {BOTTLENECKS[letter]: count / len(letters) for letter, count in Counter(letters).most_common()}


@dataclass(frozen=True)
class RunReport:
    """What one run did. `vm`: the name of the VM. `started` and `point`: RFC 3339, in UTC.

    `error` and `remedy`: why it failed, and what to do, else "". `left_behind`: the ids of temporary resources that
    could not be deleted. `maps`: by disk, what was found where; empty if the run failed, and not in the JSON form.
    """

    vm: str
    started: str
    seconds: float
    outcome: Outcome
    error: str = ""
    remedy: str = ""
    mechanism: str = ""
    point: str = ""
    steps: tuple[StepTaken, ...] = ()
    disks: tuple[DiskFigures, ...] = ()
    rates: Rates = Rates()
    notices: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    maps: Mapping[str, ChangeMap] = field(default_factory=dict, compare=False, repr=False)

    @property
    def sent_bytes(self) -> int:
        """The bytes that were sent, of all disks."""
        return sum(disk.sent_bytes for disk in self.disks)

    def to_json(self) -> Json:
        """Plain JSON values."""
        document = asdict(replace(self, maps={}))
        del document["maps"]
        return document

    @classmethod
    def from_json(cls, document: Any) -> RunReport:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        if document["outcome"] not in OUTCOMES:
            raise ValueError(f"{document['outcome']!r} is not an outcome")
        steps = document["steps"][:_STEPS]
        return cls(
            vm=_text(document["vm"]),
            started=_text(document["started"]),
            seconds=_number(document["seconds"]),
            outcome=cast("Outcome", document["outcome"]),
            error=_text(document["error"]),
            remedy=_text(document["remedy"]),
            mechanism=_text(document["mechanism"]),
            point=_text(document["point"]),
            steps=tuple(_step(each) for each in steps),
            disks=tuple(_disk(each) for each in document["disks"][:_DISKS]),
            rates=_rates(document["rates"]),
            notices=tuple(map(_text, document["notices"][:_NOTICES])),
            left_behind=tuple(map(_text, document["left_behind"][:_LEFT])),
        )


class Recorder:
    """Makes the report of one run of `vm` from its events, which it gets as a sink. Thread-safe."""

    def __init__(self, vm: str, clock: Clock) -> None:
        self.vm, self._clock = vm, clock
        self._began, self._started = clock.monotonic(), rfc3339(clock.now())
        self._lock = Lock()
        self._taken: list[StepTaken] = []
        self._open: dict[str, _Step] = {}  # by disk
        self._copied: dict[str, Copied] = {}
        self._intervals = _Intervals()
        self._notices: dict[str, None] = {}
        self._result = RunReport(vm, self._started, 0.0, "done")

    def __call__(self, event: Event) -> None:
        """Note an event of this run; those of other VMs are ignored."""
        if event.vm not in ("", self.vm):
            return
        with self._lock:
            now = self._now()
            match event:
                case Step():
                    self._step(event, now)
                case Waiting():
                    step = self._open.get(event.disk) or self._open.get("")
                    if step is not None:
                        step.wait(event, now)
                case Copied():
                    self._progress(event, now)
                case Notice(text):
                    if len(self._notices) < _NOTICES:
                        self._notices[text[:_TEXT]] = None

    def _now(self) -> float:
        return round(self._clock.monotonic() - self._began, 3)

    def _step(self, event: Step, now: float) -> None:
        """A step ends the one before it: that of its disk or, if it is about the whole run, all of them."""
        for disk in [event.disk] if event.disk else list(self._open):
            self._close(disk, now)
        self._open[event.disk] = _Step(event, now)

    def _progress(self, event: Copied, now: float) -> None:
        before = self._copied.get(event.disk)
        self._copied[event.disk] = event
        if before is None or event.done < before.done:  # it begins, or begins anew
            return
        self._intervals.add(now, event.done - before.done, event.sent - before.sent, event.bottleneck)

    def _close(self, disk: str, now: float) -> None:
        step = self._open.pop(disk, None)
        if step is not None and len(self._taken) < _STEPS:
            self._taken.append(step.taken(now))

    def disk_ended(self, disk: str, moment: float) -> None:
        """Note that nothing more was done for a disk from `moment` of the clock on."""
        with self._lock:
            end = round(moment - self._began, 3)
            if disk in self._open:
                self._close(disk, end)
            self._taken = [
                replace(step, end=max(step.begin, end)) if step.disk == disk and step.end > end else step
                for step in self._taken
            ]

    def succeeded(self, result: Json, maps: Mapping[str, ChangeMap]) -> None:
        """Note the result: the JSON form of `Replicated`, and the map of each disk."""
        disks = tuple(
            DiskFigures(
                **{
                    **{name: disk[name] for name in _FIGURES if name in disk},
                    "done_bytes": disk["size_bytes"],
                }
            )
            for disk in result["disks"][:_DISKS]
        )
        self._result = replace(
            self._result,
            vm=result["vm"],
            mechanism=result["mechanism"],
            point=result["point"],
            disks=disks,
            left_behind=tuple(result["left_behind"][:_LEFT]),
            maps=maps,
        )

    def failed(self, error: BaseException) -> None:
        """Note why the run ended early."""
        ours = error if isinstance(error, CoriolisAzureError) else None
        work = scope()
        cancelled = (work is not None and work.cancelled) or not isinstance(error, Exception)
        cancelled = cancelled or isinstance(error, Cancelled | WaitEnded)
        self._result = replace(
            self._result,
            outcome="interrupted" if cancelled else "failed",
            error=(ours.message if ours else "interrupted" if cancelled else type(error).__name__)[:_TEXT],
            remedy=(ours.remedy if ours else "")[:_TEXT],
            left_behind=tuple(ours.left_behind[:_LEFT]) if ours else (),
        )

    def report(self) -> RunReport:
        """The report as of now."""
        with self._lock:
            now = self._now()
            still = [step.taken(now) for step in self._open.values()]
            steps = sorted([*self._taken, *still], key=lambda step: (step.begin, step.disk))
            copied = tuple(
                DiskFigures(event.disk, event.total, event.done, event.sent)
                for event in self._copied.values()
            )
            return replace(
                self._result,
                seconds=now,
                steps=tuple(steps[:_STEPS]),
                disks=self._result.disks or copied[:_DISKS],
                rates=self._intervals.rates(),
                notices=tuple(self._notices),
            )


class _Step:
    """A step that goes on."""

    def __init__(self, event: Step, begin: float) -> None:
        self._event, self._begin = event, begin
        self._waits: dict[
            str, tuple[float, float]
        ] = {}  # by what is waited for: since when, and the last report
        self._waited: dict[str, float] = {}  # seconds of waits that are over

    def wait(self, event: Waiting, now: float) -> None:
        """Note the report of a wait."""
        what = event.what[:_TEXT]
        since = max(self._begin, now - event.waited)
        before = self._waits.get(what)
        if before is not None and since > before[1]:  # another wait for the same thing
            self._waited[what] = self._waited.get(what, 0.0) + before[1] - before[0]
            before = None
        self._waits[what] = (before[0] if before is not None else since, now)

    def taken(self, end: float) -> StepTaken:
        """The step, if it ends now."""
        waited = self._waited.copy()
        for what, (since, last) in self._waits.items():
            waited[what] = waited.get(what, 0.0) + min(end, last + _REPEATED_SECONDS) - since
        longest = sorted(waited.items(), key=lambda each: -each[1])
        waits = tuple((what, round(seconds, 3)) for what, seconds in longest[:_WAITS])
        event = self._event
        return StepTaken(
            event.name[:_TEXT],
            event.target[:_TEXT],
            event.disk[:_TEXT],
            self._begin,
            max(self._begin, end),
            waits,
        )


class _Intervals:
    """The progress of all disks in at most so many intervals, which become longer as time passes."""

    def __init__(self) -> None:
        self._seconds, self._begin = 1.0, -1.0
        self._intervals: list[tuple[int, int, Counter[str]]] = []

    def add(self, now: float, done: int, sent: int, bottleneck: str) -> None:
        """Note what was done since the last call."""
        if self._begin < 0:
            self._begin = max(0.0, now - self._seconds)
        while (at := int((now - self._begin) / self._seconds)) >= _INTERVALS:
            self._intervals = [
                _joined(self._intervals[each : each + 2]) for each in range(0, len(self._intervals), 2)
            ]
            self._seconds *= 2
        while len(self._intervals) <= at:
            self._intervals.append((0, 0, Counter()))
        letter = _LETTERS.get(bottleneck, "-")
        self._intervals[at] = _joined([self._intervals[at], (done, sent, Counter({letter: 1}))])

    def rates(self) -> Rates:
        """The rates as of now."""
        done, sent, letters = [], [], []
        for compared, passed, counts in self._intervals:
            done.append(compared)
            sent.append(passed)
            letters.append(max(counts, key=counts.__getitem__, default="-"))
        return Rates(max(0.0, self._begin), self._seconds, tuple(done), tuple(sent), "".join(letters))


def _joined(intervals: Iterable[tuple[int, int, Counter[str]]]) -> tuple[int, int, Counter[str]]:
    done, sent, letters = zip(*intervals, strict=True)
    return sum(done), sum(sent), sum(letters, Counter())


_FIGURES = {each.name for each in fields(DiskFigures)}


def _step(document: Mapping[str, Any]) -> StepTaken:
    name, target, disk = (_text(document[key]) for key in ("name", "target", "disk"))
    begin, end = _number(document["begin"]), _number(document["end"])
    waits = tuple((_text(what), _number(seconds)) for what, seconds in document["waits"][:_WAITS])
    return StepTaken(name, target, disk, begin, max(begin, end), waits)


def _disk(document: Mapping[str, Any]) -> DiskFigures:
    for name, value in document.items():
        kinds = {"full": (bool,), "verified": (bool,)}.get(
            name, (int,) if name.endswith("_bytes") else (str,)
        )
        if value is not None and (
            type(value) not in kinds or (type(value) is int and not 0 <= value < 1 << 64)
        ):
            raise TypeError(name)
    return DiskFigures(**document)


def _rates(document: Mapping[str, Any]) -> Rates:
    done, sent = (_counts(document[name]) for name in ("done", "sent"))
    letters = _text(document["bottlenecks"])
    if not len(done) == len(sent) == len(letters) <= _INTERVALS or not set(letters) <= set(BOTTLENECKS):
        raise ValueError("rates")
    seconds = _number(document["seconds"])
    if not seconds:
        raise ValueError("seconds")
    return Rates(_number(document["begin"]), seconds, done, sent, letters)


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError
    return found[:_TEXT]


def _number(found: Any) -> float:
    """A number of seconds, not negative, and finite."""
    if type(found) not in (int, float) or not 0 <= found < 1e12:
        raise TypeError
    return float(found)


def _counts(found: Any) -> tuple[int, ...]:
    counts = tuple(found[: _INTERVALS + 1])
    if counts and (set(map(type, counts)) != {int} or min(counts) < 0 or max(counts) >= 1 << 64):
        raise TypeError
    return counts
