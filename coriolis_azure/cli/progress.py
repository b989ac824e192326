"""Shows a run's progress: live bars on a terminal, occasional lines elsewhere, or JSON lines."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.spinner import Spinner
from rich.table import Column
from rich.text import Text

from ..clock import Clock
from ..errors import cleaned
from ..events import Copied, Event, Notice, Report, Step, Waiting, amount, json_lines, line, logged, span
from ..threads import Lock, every
from . import several_vms
from .logs import steps_are_logged
from .output import err, show

_BOTTLENECKS = {"": "", "source": "worker/network", "destination": "destination", "limit": "limit"}
_MARKS = {Step: "→ ", Waiting: "  ", Notice: "! "}
_LONG_SECONDS = 10.0  # the time of a step is shown if it takes longer than this
_DISK_SECONDS = 5.0  # between two lines about the copy
_TOTAL = "total"


@contextmanager
def watching(*, as_json: bool, many: bool = False) -> Iterator[Report]:
    """A sink for events: JSON lines, a live display on a terminal, or occasional lines elsewhere.

    `many`: of several VMs, each is shown as a whole.
    """
    if as_json:
        yield json_lines(sys.stderr)
    elif steps_are_logged():
        lines = Lines(Clock())
        yield lambda event: lines.report(event) if isinstance(event, Copied) else logged(event)
    elif many:
        with several_vms.watching(lively=_is_lively()) as report:
            yield report
    elif _is_lively():
        screen = Screen(Clock(), err())
        with screen.live:
            yield screen.report
    else:
        lines = Lines(Clock())
        with every(1.0, lines.tick, optional=True):
            yield lines.report


def _is_lively() -> bool:
    """Whether stderr is a terminal that can rewrite lines, and the environment does not ask for plain text."""
    plain = os.environ.get("TERM") in {"dumb", "unknown"} or "NO_COLOR" in os.environ or "CI" in os.environ
    return sys.stderr.isatty() and not plain


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
        return _Disk(Copied(_TOTAL, *sums), min(begun, default=None))

    def finished(self) -> bool:
        """Whether every disk of the copy is done."""
        return all(disk.last.done == disk.last.total for disk in self.disks.values())


class _Watcher(ABC):
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


class Screen(_Watcher):
    """Events on a terminal: a line for each step and each finished disk, with live bars and a status below."""

    def __init__(self, clock: Clock, console: Console) -> None:
        super().__init__(clock)
        self._bars = Progress(*_columns(console.width), console=console)
        self._status = Spinner("dots")
        self._tasks: dict[str, TaskID] = {}
        self.live = Live(get_renderable=self._rendered, console=console, transient=True)

    def _show_wait(self, waiting: Waiting) -> None:
        """Do nothing: the live status shows the wait."""

    def _show_copied(self, event: Copied) -> None:
        disks = self._state.disks
        if disks[event.disk].began is None and event.done < event.total:
            return  # not started yet
        self._show(event.disk, event)
        if event.done == event.total:
            self._bars.remove_task(self._tasks.pop(event.disk))
            self._print(_done(disks[event.disk], self._state.now()))
        if len(disks) > 1:
            self._show(_TOTAL, self._state.total().last)
        if self._state.finished():
            if _TOTAL in self._tasks:
                self._bars.remove_task(self._tasks.pop(_TOTAL))
            disks.clear()

    def _show(self, name: str, event: Copied) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(cleaned(name), total=event.total)
        task, sent, bottleneck = self._tasks[name], event.sent, event.bottleneck
        self._bars.update(task, completed=event.done, total=event.total, sent=sent, bottleneck=bottleneck)

    def _print(self, *lines: str) -> None:
        for text in filter(None, lines):
            show(self.live.console, text)

    def _rendered(self) -> RenderableType:
        self._status.update(text=Text(self._state.status()))
        if not self._tasks:
            return self._status
        total_last = sorted(self._bars.tasks, key=lambda task: task.id == self._tasks.get(_TOTAL))
        return Group(self._bars.make_tasks_table(total_last), self._status)


class _PlainText(ProgressColumn):
    """A column of plain text about a disk."""

    def __init__(self, text: Callable[[Task], str], *, dim: bool = False) -> None:
        super().__init__(Column(no_wrap=True))
        self._text, self._style = text, "dim" if dim else ""

    def render(self, task: Task) -> Text:
        """The text for a task."""
        return Text(self._text(task), self._style)


def _columns(width: int) -> list[ProgressColumn]:
    """The columns of a progress bar that fit a terminal of this width."""
    name = _PlainText(lambda task: task.description.rjust(7))
    percent = _PlainText(lambda task: f"{task.percentage:3.0f} %")
    copied = _PlainText(lambda task: f"{amount(task.completed)} of {amount(task.total or 0)}")
    rate = _PlainText(lambda task: f"{amount(task.speed or 0)}/s")
    eta = _PlainText(
        lambda task: "ETA " + ("-" if task.time_remaining is None else span(task.time_remaining))
    )
    sent = _PlainText(lambda task: f"sent {amount(task.fields.get('sent', 0))}")
    bottleneck = _PlainText(lambda task: _BOTTLENECKS[task.fields.get("bottleneck", "")], dim=True)
    if width < 72:
        return [name, percent, rate, eta]
    bar = BarColumn(max(8, min(30, width - 72)))
    return [name, bar, copied, rate, eta, *([sent] if width >= 100 else []), bottleneck]


class Lines(_Watcher):
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
            self._print(_done(disks[event.disk], now))
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


def _done(disk: _Disk, now: float) -> str:
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
    return text + (f", bottleneck: {_BOTTLENECKS[last.bottleneck]}" if last.bottleneck else "")
