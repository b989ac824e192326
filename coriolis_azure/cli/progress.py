"""What a watcher sees: live bars on a terminal, a line now and then elsewhere, or JSON lines."""

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
from .logs import steps_are_logged
from .output import err, show

_BOTTLENECKS = {"": "", "source": "worker/line", "destination": "destination", "limit": "limit"}
_MARKS = {Step: "→ ", Waiting: "  ", Notice: "! "}
_LONG_SECONDS = 10.0  # a step that takes longer says how long
_DISK_SECONDS = 5.0  # between two lines about the copying
_TOTAL = "total"


@contextmanager
def watching(as_json: bool) -> Iterator[Report]:
    """A sink for events: JSON lines, a live display on a terminal, a line now and then elsewhere."""
    if as_json:
        yield json_lines(sys.stderr)
    elif steps_are_logged():
        lines = Lines(Clock())
        yield lambda event: lines.report(event) if isinstance(event, Copied) else logged(event)
    elif _is_lively():
        screen = Screen(Clock(), err())
        with screen.live:
            yield screen.report
    else:
        lines = Lines(Clock())
        with every(1.0, lines.tick, optional=True):
            yield lines.report


def _is_lively() -> bool:
    """Whether stderr is a terminal on which lines may be written over, and nobody asks for plain text."""
    plain = os.environ.get("TERM") in {"dumb", "unknown"} or "NO_COLOR" in os.environ or "CI" in os.environ
    return sys.stderr.isatty() and not plain


@dataclass
class _Disk:
    """How far a disk is, and when its first bytes came."""

    last: Copied
    began: float | None = None


class _Course:
    """Where the run is: its step, what is waited for, and how far each disk of the present copy is."""

    def __init__(self, clock: Clock) -> None:
        self.now = clock.monotonic
        self._step, self._since = Step(""), self.now()
        self._waiting: tuple[Waiting, float] | None = None
        self._waits: set[str] = set()
        self.disks: dict[str, _Disk] = {}

    def begin(self, step: Step) -> str:
        """Note a step; what the one before took, if that was long. What is done with one disk meanwhile is no step."""
        if any(disk.began is not None for disk in self.disks.values()):
            return ""
        took, name = self.now() - self._since, self._step.name
        self._step, self._since, self._waiting, self._waits = step, self.now(), None, set()
        return f"  {cleaned(name)} took {span(took)}" if name and took >= _LONG_SECONDS else ""

    def wait(self, waiting: Waiting) -> bool:
        """Note a wait; whether it is told of for the first time in this step."""
        self._waiting = waiting, self.now()
        is_new = waiting.what not in self._waits
        self._waits.add(waiting.what)
        return is_new

    def copied(self, event: Copied) -> None:
        """Note how far a disk is."""
        self._waiting = None
        disk = self.disks.setdefault(event.disk, _Disk(event))
        disk.last = event
        if event.done and disk.began is None:
            disk.began = self.now()

    def status(self) -> str:
        """What is being done or waited for, and for how long."""
        if self._waiting:
            waiting, told = self._waiting
            waited = waiting.waited + self.now() - told
            return line(Waiting(waiting.what, waiting.seconds, waited, waiting.percent))
        return f"{cleaned(self._step.name) or 'start'}: {span(self.now() - self._since)} so far"

    def total(self) -> _Disk:
        """All disks of the copy as one."""
        last = [disk.last for disk in self.disks.values()]
        sums = (
            sum(event.done for event in last),
            sum(event.total for event in last),
            sum(e.sent for e in last),
        )
        return _Disk(
            Copied(_TOTAL, *sums),
            min((d.began for d in self.disks.values() if d.began is not None), default=None),
        )

    def finished(self) -> bool:
        """Whether every disk of the copy is done."""
        return all(disk.last.done == disk.last.total for disk in self.disks.values())


class _Watcher(ABC):
    """A sink that keeps the course of the run, one event at a time; how it is shown is up to its kind."""

    def __init__(self, clock: Clock) -> None:
        self._course = _Course(clock)
        self._lock = Lock()

    def report(self, event: Event) -> None:
        """Show an event."""
        with self._lock:
            match event:
                case Copied():
                    self._course.copied(event)
                    self._show_copied(event)
                case Waiting():
                    if self._course.wait(event):
                        self._show_wait(event)
                case _:
                    took = self._course.begin(event) if isinstance(event, Step) else ""
                    self._print(took, _MARKS[type(event)] + line(event))

    @abstractmethod
    def _show_copied(self, event: Copied) -> None:
        """How far a disk is, which the course has noted."""

    @abstractmethod
    def _show_wait(self, waiting: Waiting) -> None:
        """Something that is waited for, told of for the first time in this step."""

    @abstractmethod
    def _print(self, *lines: str) -> None:
        """Lines that stay; an empty one is none."""


class Screen(_Watcher):
    """Events on a terminal: a line for each step and disk done; below them, live, what is under way."""

    def __init__(self, clock: Clock, console: Console) -> None:
        super().__init__(clock)
        self._bars = Progress(*_columns(console.width), console=console)
        self._status = Spinner("dots")
        self._tasks: dict[str, TaskID] = {}
        self.live = Live(get_renderable=self._rendered, console=console, transient=True)

    def _show_wait(self, waiting: Waiting) -> None:
        """Nothing: the live status shows it."""

    def _show_copied(self, event: Copied) -> None:
        disks = self._course.disks
        if disks[event.disk].began is None and event.done < event.total:
            return  # its turn will come
        self._show(event.disk, event)
        if event.done == event.total:
            self._bars.remove_task(self._tasks.pop(event.disk))
            self._print(_done(disks[event.disk], self._course.now()))
        if len(disks) > 1:
            self._show(_TOTAL, self._course.total().last)
        if self._course.finished():
            if _TOTAL in self._tasks:
                self._bars.remove_task(self._tasks.pop(_TOTAL))
            disks.clear()

    def _show(self, name: str, event: Copied) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(cleaned(name), total=event.total)
        task, sent, bottleneck = self._tasks[name], event.sent, event.bottleneck
        self._bars.update(task, completed=event.done, total=event.total, sent=sent, bottleneck=bottleneck)

    def _print(self, *lines: str) -> None:
        for each in filter(None, lines):
            show(self.live.console, each)

    def _rendered(self) -> RenderableType:
        self._status.update(text=Text(self._course.status()))
        if not self._tasks:
            return self._status
        total_last = sorted(self._bars.tasks, key=lambda task: task.id == self._tasks.get(_TOTAL))
        return Group(self._bars.make_tasks_table(total_last), self._status)


class _Words(ProgressColumn):
    """A column of plain words about a disk."""

    def __init__(self, words: Callable[[Task], str], *, dim: bool = False) -> None:
        super().__init__(Column(no_wrap=True))
        self._words, self._style = words, "dim" if dim else ""

    def render(self, task: Task) -> Text:
        """The words."""
        return Text(self._words(task), self._style)


def _columns(width: int) -> list[ProgressColumn]:
    """What a bar's line shows on a terminal of that width."""
    name = _Words(lambda task: task.description.rjust(7))
    percent = _Words(lambda task: f"{task.percentage:3.0f} %")
    copied = _Words(lambda task: f"{amount(task.completed)} of {amount(task.total or 0)}")
    rate = _Words(lambda task: f"{amount(task.speed or 0)}/s")
    eta = _Words(lambda task: "ETA " + ("-" if task.time_remaining is None else span(task.time_remaining)))
    sent = _Words(lambda task: f"sent {amount(task.fields.get('sent', 0))}")
    bottleneck = _Words(lambda task: _BOTTLENECKS[task.fields.get("bottleneck", "")], dim=True)
    if width < 72:
        return [name, percent, rate, eta]
    bar = BarColumn(max(8, min(30, width - 72)))
    return [name, bar, copied, rate, eta, *([sent] if width >= 100 else []), bottleneck]


class Lines(_Watcher):
    """Events where lines cannot be written over: one for each step, and now and then how far it is."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._told = self._course.now()

    def tick(self) -> None:
        """Show that something long is still under way."""
        with self._lock:
            if self._course.now() - self._told >= _LONG_SECONDS:
                self._print(_MARKS[Waiting] + self._course.status())

    def _show_wait(self, waiting: Waiting) -> None:
        self._print(_MARKS[Waiting] + line(waiting))

    def _show_copied(self, event: Copied) -> None:
        disks, now = self._course.disks, self._course.now()
        if event.done == event.total:
            self._print(_done(disks[event.disk], now))
        elif event.done and now - self._told >= _DISK_SECONDS:
            under_way = [disk for disk in disks.values() if 0 < disk.last.done < disk.last.total]
            total = [self._course.total()] if len(disks) > 1 else []
            self._print(*(_how_far(disk, now) for disk in (*under_way, *total)))
        if self._course.finished():
            disks.clear()

    def _print(self, *lines: str) -> None:
        for each in filter(None, lines):
            click.echo(each, err=True)
        self._told = self._course.now()


def _done(disk: _Disk, now: float) -> str:
    last = disk.last
    took = span(now - (now if disk.began is None else disk.began))
    return f"  {cleaned(last.disk)}: {amount(last.total)} done in {took}, {amount(last.sent)} sent"


def _how_far(disk: _Disk, now: float) -> str:
    last, seconds = disk.last, max(now - (now if disk.began is None else disk.began), 0.001)
    rate = last.done / seconds
    text = (
        f"  {cleaned(last.disk)}: {amount(last.done)} of {amount(last.total)}, {amount(last.sent)} sent, "
        f"{amount(rate)}/s, ETA {span((last.total - last.done) / rate)}"
    )
    return text + (f", held up by {_BOTTLENECKS[last.bottleneck]}" if last.bottleneck else "")
