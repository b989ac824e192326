"""Shows the progress of many VMs: a permanent line when one ends, and what those in progress do, each in one line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ..clock import Clock
from ..errors import cleaned
from ..events import (
    BEGIN,
    DONE,
    FAILED,
    Copied,
    Event,
    Notice,
    Report,
    Step,
    amount,
    counted,
    line,
    span,
)
from ..threads import Lock, every
from .output import err, show

_STATUS_SECONDS = 10.0  # between two lines about all VMs, where lines cannot be rewritten
_NAME_WIDTH = 32


@contextmanager
def watching(*, lively: bool) -> Iterator[Report]:
    """A sink for the events of many VMs."""
    if lively:
        screen = Screen(Clock(), err())
        with screen.live:
            yield screen.report
    else:
        lines = Lines(Clock())
        with every(1.0, lines.tick, optional=True):
            yield lines.report


@dataclass
class _Vm:
    """A VM in progress: since when, what it does, and the progress of each of its disks."""

    since: float
    doing: str = "begin"
    disks: dict[str, Copied] = field(default_factory=dict)

    def sums(self) -> tuple[int, int]:
        """The bytes that are done, and all."""
        events = list(self.disks.values())  # it is shown while it changes
        return sum(event.done for event in events), sum(event.total for event in events)

    def text(self) -> str:
        """What it does."""
        done, total = self.sums()
        return f"copy: {amount(done)} of {amount(total)}" if done and done < total else self.doing


class _Watcher(ABC):
    """A sink that knows the VMs in progress, one event at a time; subclasses show them."""

    def __init__(self, clock: Clock) -> None:
        self._now, self._lock = clock.monotonic, Lock()
        self._vms: dict[str, _Vm] = {}
        self._done = self._failed = 0

    def report(self, event: Event) -> None:
        """Record an event, and print it if it is one to keep."""
        with self._lock:
            match event:
                case Step(name) if name == BEGIN:
                    self._vms[event.vm] = _Vm(self._now())
                case Step(name, target) if name in (DONE, FAILED):
                    self._vms.pop(event.vm, None)
                    self._done, self._failed = self._done + (name == DONE), self._failed + (name == FAILED)
                    self._print(("  " if name == DONE else "! failed: ") + cleaned(target))
                case Notice():
                    about = f"{cleaned(event.vm)}: " if event.vm else ""
                    self._print(f"! {about}{line(event)}")
                case _ if event.vm in self._vms:
                    self._record(self._vms[event.vm], event)
                case Step():
                    self._print(f"→ {line(event)}")
                case _:
                    pass

    def _record(self, vm: _Vm, event: Event) -> None:
        if isinstance(event, Copied):
            vm.disks[event.disk] = event
        else:
            vm.doing = line(event)
            if isinstance(event, Step) and not event.disk:
                done, total = vm.sums()
                vm.disks = {} if done == total else vm.disks

    def _status(self) -> str:
        counts = [
            f"{self._done} done",
            *([f"{self._failed} failed"] if self._failed else []),
            f"{counted(len(self._vms), 'VM')} in progress",
        ]
        done, total = (
            sum(sums) for sums in zip(*(vm.sums() for vm in list(self._vms.values())), (0, 0), strict=True)
        )
        copied = f": {amount(done)} of {amount(total)}" if total else ""
        return ", ".join(counts) + copied

    @abstractmethod
    def _print(self, text: str) -> None:
        """Print a permanent line."""


class Screen(_Watcher):
    """Many VMs on a terminal: a live line for each in progress, and one for all."""

    def __init__(self, clock: Clock, console: Console) -> None:
        super().__init__(clock)
        self._spinner = Spinner("dots")
        self.live = Live(get_renderable=self._rendered, console=console, transient=True)

    def _print(self, text: str) -> None:
        show(self.live.console, text)

    def _rendered(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, max_width=_NAME_WIDTH, overflow="ellipsis")
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis")
        for name, vm in list(self._vms.items()):
            table.add_row(Text(cleaned(name)), span(self._now() - vm.since), Text(vm.text()))
        self._spinner.update(text=Text(self._status()))
        return Group(table, self._spinner)


class Lines(_Watcher):
    """Many VMs where lines cannot be rewritten: a line for each that ends, and one about all from time to time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._printed = self._now()

    def tick(self) -> None:
        """Show that the VMs are still in progress."""
        with self._lock:
            if self._vms and self._now() - self._printed >= _STATUS_SECONDS:
                self._print(f"  {self._status()}")

    def _print(self, text: str) -> None:
        click.echo(text, err=True)
        self._printed = self._now()
