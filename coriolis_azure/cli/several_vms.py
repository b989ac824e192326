"""What the runs of many VMs do, as lines: one when a VM ends, and from time to time one about all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import click

from ..clock import Clock
from ..errors import cleaned
from ..events import (
    BEGIN,
    DONE,
    FAILED,
    Copied,
    Event,
    Notice,
    Step,
    amount,
    counted,
    line,
)
from ..threads import Lock

_STATUS_SECONDS = 10.0  # between two lines about all VMs, where lines cannot be rewritten


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


class Watcher(ABC):
    """A sink that knows the VMs in progress, one event at a time; subclasses show them."""

    def __init__(self, clock: Clock) -> None:
        self.now, self._lock = clock.monotonic, Lock()
        self.vms: dict[str, _Vm] = {}
        self._done = self._failed = 0

    def report(self, event: Event) -> None:
        """Record an event, and print it if it is one to keep."""
        with self._lock:
            match event:
                case Step(name) if name == BEGIN:
                    self.vms[event.vm] = _Vm(self.now())
                case Step(name, target) if name in (DONE, FAILED):
                    self.vms.pop(event.vm, None)
                    self._done, self._failed = self._done + (name == DONE), self._failed + (name == FAILED)
                    self._print(("  " if name == DONE else "! failed: ") + cleaned(target))
                case Notice():
                    about = f"{cleaned(event.vm)}: " if event.vm else ""
                    self._print(f"! {about}{line(event)}")
                case _ if event.vm in self.vms:
                    self._record(self.vms[event.vm], event)
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

    def status(self) -> str:
        """How many are done, and how far those in progress are."""
        counts = [
            f"{self._done} done",
            *([f"{self._failed} failed"] if self._failed else []),
            f"{counted(len(self.vms), 'VM')} in progress",
        ]
        done, total = (
            sum(sums) for sums in zip(*(vm.sums() for vm in list(self.vms.values())), (0, 0), strict=True)
        )
        copied = f": {amount(done)} of {amount(total)}" if total else ""
        return ", ".join(counts) + copied

    @abstractmethod
    def _print(self, text: str) -> None:
        """Print a permanent line."""


class Lines(Watcher):
    """Many VMs where lines cannot be rewritten: a line for each that ends, and one about all from time to time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._printed = self.now()

    def tick(self) -> None:
        """Show that the VMs are still in progress."""
        with self._lock:
            if self.vms and self.now() - self._printed >= _STATUS_SECONDS:
                self._print(f"  {self.status()}")

    def _print(self, text: str) -> None:
        click.echo(text, err=True)
        self._printed = self.now()
