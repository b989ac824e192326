"""Live displays on a terminal that can rewrite lines: of the run of one VM, and of those of many.

Only a run on a terminal imports this module: rich takes longer to import than everything else of the command line.
"""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from ..clock import Clock
from ..errors import cleaned
from ..events import Copied, Waiting, amount, span
from . import several_vms
from .one_vm import BOTTLENECKS, TOTAL, Watcher, done_line
from .output import show_on

_NAME_WIDTH = 32


class OneVm(Watcher):
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
            self._print(done_line(disks[event.disk], self._state.now()))
        if len(disks) > 1:
            self._show(TOTAL, self._state.total().last)
        if self._state.finished():
            if TOTAL in self._tasks:
                self._bars.remove_task(self._tasks.pop(TOTAL))
            disks.clear()

    def _show(self, name: str, event: Copied) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(cleaned(name), total=event.total)
        task, sent, bottleneck = self._tasks[name], event.sent, event.bottleneck
        self._bars.update(task, completed=event.done, total=event.total, sent=sent, bottleneck=bottleneck)

    def _print(self, *lines: str) -> None:
        for text in filter(None, lines):
            show_on(self.live.console, text)

    def _rendered(self) -> RenderableType:
        self._status.update(text=Text(self._state.status()))
        if not self._tasks:
            return self._status
        total_last = sorted(self._bars.tasks, key=lambda task: task.id == self._tasks.get(TOTAL))
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
    bottleneck = _PlainText(lambda task: BOTTLENECKS[task.fields.get("bottleneck", "")], dim=True)
    if width < 72:
        return [name, percent, rate, eta]
    bar = BarColumn(max(8, min(30, width - 72)))
    return [name, bar, copied, rate, eta, *([sent] if width >= 100 else []), bottleneck]


class ManyVms(several_vms.Watcher):
    """Many VMs on a terminal: a live line for each in progress, and one for all."""

    def __init__(self, clock: Clock, console: Console) -> None:
        super().__init__(clock)
        self._spinner = Spinner("dots")
        self.live = Live(get_renderable=self._rendered, console=console, transient=True)

    def _print(self, text: str) -> None:
        show_on(self.live.console, text)

    def _rendered(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, max_width=_NAME_WIDTH, overflow="ellipsis")
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name, vm in list(self.vms.items()):
            table.add_row(Text(cleaned(name)), span(self.now() - vm.since), Text(vm.text()))
        self._spinner.update(text=Text(self.status()))
        return Group(table, self._spinner)
