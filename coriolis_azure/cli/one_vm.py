"""What the run of one VM does, as lines: one for each step, and from time to time one about its progress."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import click

from ..clock import Clock
from ..errors import cleaned
from ..events import Copied, Event, Notice, Step, Waiting, amount, line, span
from ..threads import Lock

BOTTLENECKS = {"": "", "source": "worker/network", "destination": "destination", "limit": "limit"}
_MARKS = {Step: "→ ", Waiting: "  ", Notice: "! "}
_LONG_SECONDS = 10.0  # the time of a step is shown if it takes longer than this
_DISK_SECONDS = 5.0  # between two lines about the copy
TOTAL = "total"


@dataclass
class _Disk:
    """The progress of a disk, and when its first bytes arrived."""

    last: Copied
    began: float | None = None


class _State:
    """The state of the run: its step, what it waits for, and the progress of each disk of the present copy."""

    def __init__(self, clock: Clock) -> None:
        self.now = clock.monotonic
        self._step, self._since = Step(""), self.now()
        self._waiting: tuple[Waiting, float] | None = None
        self._waits: set[str] = set()
        self.disks: dict[str, _Disk] = {}

    def begin(self, step: Step) -> str:
        """Record a step; return a line about the previous one if it took long.

        Steps during a copy concern a single disk and are not recorded.
        """
        if any(disk.began is not None for disk in self.disks.values()):
            return ""
        took, name = self.now() - self._since, self._step.name
        self._step, self._since, self._waiting, self._waits = step, self.now(), None, set()
        return f"  {cleaned(name)} took {span(took)}" if name and took >= _LONG_SECONDS else ""

    def wait(self, waiting: Waiting) -> bool:
        """Record a wait; return whether it is new in this step."""
        self._waiting = waiting, self.now()
        is_new = waiting.what not in self._waits
        self._waits.add(waiting.what)
        return is_new

    def copied(self, event: Copied) -> None:
        """Record the progress of a disk."""
        self._waiting = None
        disk = self.disks.setdefault(event.disk, _Disk(event))
        disk.last = event
        if event.done and disk.began is None:
            disk.began = self.now()

    def status(self) -> str:
        """What the run is doing or waiting for, and for how long."""
        if self._waiting:
            waiting, reported = self._waiting
            waited = waiting.waited + self.now() - reported
            return line(Waiting(waiting.what, waiting.seconds, waited, waiting.percent))
        return f"{cleaned(self._step.name) or 'start'}: {span(self.now() - self._since)} so far"

    def total(self) -> _Disk:
        """The sum of all disks of the copy."""
        events = [disk.last for disk in self.disks.values()]
        sums = (
            sum(event.done for event in events),
            sum(event.total for event in events),
            sum(event.sent for event in events),
        )
        begun = (disk.began for disk in self.disks.values() if disk.began is not None)
        return _Disk(Copied(TOTAL, *sums), min(begun, default=None))

    def finished(self) -> bool:
        """Whether every disk of the copy is done."""
        return all(disk.last.done == disk.last.total for disk in self.disks.values())


class Watcher(ABC):
    """A sink that tracks the state of the run, one event at a time; subclasses show it."""

    def __init__(self, clock: Clock) -> None:
        self._state = _State(clock)
        self._lock = Lock()

    def report(self, event: Event) -> None:
        """Show an event."""
        with self._lock:
            match event:
                case Copied():
                    self._state.copied(event)
                    self._show_copied(event)
                case Waiting():
                    if self._state.wait(event):
                        self._show_wait(event)
                case _:
                    took = self._state.begin(event) if isinstance(event, Step) else ""
                    self._print(took, _MARKS[type(event)] + line(event))

    @abstractmethod
    def _show_copied(self, event: Copied) -> None:
        """Show the progress of a disk, which is already recorded."""

    @abstractmethod
    def _show_wait(self, waiting: Waiting) -> None:
        """Show a wait that is new in this step."""

    @abstractmethod
    def _print(self, *lines: str) -> None:
        """Print permanent lines, except empty ones."""


class Lines(Watcher):
    """Events where lines cannot be rewritten: a line for each step, and from time to time one about its progress."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._printed = self._state.now()

    def tick(self) -> None:
        """Show that a long step is still active."""
        with self._lock:
            if self._state.now() - self._printed >= _LONG_SECONDS:
                self._print(_MARKS[Waiting] + self._state.status())

    def _show_wait(self, waiting: Waiting) -> None:
        self._print(_MARKS[Waiting] + line(waiting))

    def _show_copied(self, event: Copied) -> None:
        disks, now = self._state.disks, self._state.now()
        if event.done == event.total:
            self._print(done_line(disks[event.disk], now))
        elif event.done and now - self._printed >= _DISK_SECONDS:
            active = [disk for disk in disks.values() if 0 < disk.last.done < disk.last.total]
            total = [self._state.total()] if len(disks) > 1 else []
            self._print(*(_progress(disk, now) for disk in (*active, *total)))
        if self._state.finished():
            disks.clear()

    def _print(self, *lines: str) -> None:
        for text in filter(None, lines):
            click.echo(text, err=True)
        self._printed = self._state.now()


def done_line(disk: _Disk, now: float) -> str:
    """A line about a disk that is done."""
    last = disk.last
    took = span(now - (now if disk.began is None else disk.began))
    return f"  {cleaned(last.disk)}: {amount(last.total)} done in {took}, {amount(last.sent)} sent"


def _progress(disk: _Disk, now: float) -> str:
    last, seconds = disk.last, max(now - (now if disk.began is None else disk.began), 0.001)
    rate = last.done / seconds
    text = (
        f"  {cleaned(last.disk)}: {amount(last.done)} of {amount(last.total)}, {amount(last.sent)} sent, "
        f"{amount(rate)}/s, ETA {span((last.total - last.done) / rate)}"
    )
    return text + (f", bottleneck: {BOTTLENECKS[last.bottleneck]}" if last.bottleneck else "")
