"""Workers that the runs of several VMs share: booted once, with the disks of several VMs attached at a time.

Each worker is a run of its own, with a journal and signs of life; snapshots and clones belong to the runs of the VMs. A
worker lends slots for disks, as long as its throughput is not used up. One that fails is lent no more, and is deleted
as soon as nobody uses it; whoever used it is to be tried again, with another one.

A clone of any VM may be attached to a shared worker, so it is never rebooted or emptied for one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..azure import names
from ..azure.context import Context
from ..clock import scope
from ..errors import (
    AzureError,
    CoriolisAzureError,
    DeadlinePassed,
    StreamEnded,
    WaitEnded,
    WorkerError,
    WorkerGone,
)
from ..events import Notice, Step
from ..model import Disk, Machine, Run, Worker
from ..run import lifetime, resources
from ..run.journal import Journal
from ..run.resources import Resources
from ..threads import Condition
from . import launch, sizes

# The most slots to ask for: what the largest sizes have.
_MOST_SLOTS = 32
_LOOK_SECONDS = 0.2


# What gives a run the worker that is to read these disks of its machine.
Launch = Callable[[Resources, Machine, Sequence[Disk]], Worker]


@dataclass(eq=False)
class _Shared:
    """A shared worker, and how much of it is lent. `stack` deletes it."""

    worker: Worker
    zone: str
    rate: float
    stack: ExitStack
    left_behind: list[str]
    lent: int = 0
    booked: float = 0.0
    users: int = 0
    broken: bool = False

    def suits(self, disks: int) -> bool:
        """Whether it can take these disks now. A machine with more disks than it has slots gets all of them."""
        free = self.worker.slots - self.lent
        busy = self.users and self.booked >= self.rate
        return not self.broken and not busy and free >= min(disks, self.worker.slots)


class Workers:
    """The shared workers of one source environment.

    `expected`: for each zone, how many VMs are going to need one at most at a time, and their disks together. It only
    decides how large workers are. `journals`: see `Source`.
    """

    def __init__(
        self, context: Context, journals: Path | None, expected: Mapping[str, tuple[int, int]]
    ) -> None:
        self._context, self._journals, self._expected = context, journals, expected
        self._changed = Condition()
        self._workers: list[_Shared] = []
        self._launching: set[str] = set()
        self._left_behind: list[str] = []

    @contextmanager
    def borrowed(self) -> Iterator[Launch]:
        """What lends the run of the block a worker, until the block ends."""
        loans: list[tuple[_Shared, int, float]] = []

        def borrow(of_run: Resources, machine: Machine, disks: Sequence[Disk]) -> Worker:
            del of_run  # the worker is none of the run's own
            needed = sizes.needs(machine, disks, self._context.environment)
            shared, slots = self._lend(needed)
            loans.append((shared, slots, needed.rate))
            self._context.report(Step("share worker", names.name_of(shared.worker.vm)))
            return replace(shared.worker, slots=slots, shared=True)

        try:
            yield borrow
        except (AzureError, DeadlinePassed, WorkerError, StreamEnded) as error:
            for shared, _, _ in loans:
                self._blame(shared, error)
            raise
        finally:
            for shared, slots, rate in loans:
                self._give_back(shared, slots, rate)

    def _blame(self, shared: _Shared, error: CoriolisAzureError) -> None:
        """Lend a worker no more if the error is its; raise WorkerGone instead if somebody has deleted it."""
        if isinstance(error, WorkerError | StreamEnded):
            shared.broken = True
        if isinstance(error, WaitEnded | WorkerGone):
            return
        if not resources.may_exist(self._context.azure, shared.worker.vm):
            shared.broken = True
            gone = f"{shared.worker.vm} was deleted while it was in use: {error.message}"
            raise WorkerGone(gone, left_behind=error.left_behind or None) from error

    def close(self, zone: str | None = None) -> list[str]:
        """Delete the workers of a zone, or all; return the ids of what could not be deleted, also before."""
        with self._changed:
            ended = [each for each in self._workers if zone is None or each.zone == zone]
            self._workers = [each for each in self._workers if each not in ended]
        for each in ended:
            self._delete(each)
        return list(self._left_behind)

    def _lend(self, needed: sizes.Needs) -> tuple[_Shared, int]:
        """A worker for these needs, and how many slots of it: one that has room, or a new one."""
        current = scope()
        with self._changed:
            while True:
                shared = self._suiting(needed)
                if shared is not None:
                    return shared, self._book(shared, needed)
                if needed.zone not in self._launching:
                    self._launching.add(needed.zone)
                    break
                if current is not None and current.cancelled:
                    raise WaitEnded("the wait for a worker was cancelled")
                self._changed.wait(_LOOK_SECONDS)
        try:
            shared = self._launched(needed)
            with self._changed:
                self._workers.append(shared)
                return shared, self._book(shared, needed)
        finally:
            with self._changed:
                self._launching.discard(needed.zone)
                self._changed.notify_all()

    def _suiting(self, needed: sizes.Needs) -> _Shared | None:
        """The worker with room that does least."""
        suiting = [each for each in self._workers if each.zone == needed.zone and each.suits(needed.disks)]
        return min(suiting, key=lambda each: each.booked / each.rate, default=None)

    def _book(self, shared: _Shared, needed: sizes.Needs) -> int:
        slots = min(needed.disks, shared.worker.slots)
        shared.lent, shared.booked = shared.lent + slots, shared.booked + needed.rate
        shared.users += 1
        return slots

    def _give_back(self, shared: _Shared, slots: int, rate: float) -> None:
        with self._changed:
            shared.lent, shared.booked = shared.lent - slots, shared.booked - rate
            shared.users -= 1
            useless = shared.broken and not shared.users and shared in self._workers
            if useless:
                self._workers.remove(shared)
            self._changed.notify_all()
        if useless:
            self._context.report(Notice(f"the worker {names.name_of(shared.worker.vm)} is replaced"))
            self._delete(shared)

    def _launched(self, needed: sizes.Needs) -> _Shared:
        """Boot a worker for the VM that needs one, and for those that are expected beside it."""
        context = self._context
        vms, disks = self._expected.get(needed.zone, (1, needed.disks))
        wanted = replace(
            needed,
            disks=max(needed.disks, min(disks, _MOST_SLOTS)),
            premium=True,
            rate=needed.rate * max(1, vms),
        )
        run = Run(
            id=names.new_run(),
            subscription=context.azure.subscription,
            group=context.environment.resource_group,
            location=context.environment.location,
            zone=needed.zone,
            instance=names.SEVERAL,
        )
        with ExitStack() as stack:
            journal = stack.enter_context(Journal(run, self._journals))
            own = Resources(
                context.azure, run, journal, context.environment.tags, context.clock, context.storage
            )
            left_behind = stack.enter_context(lifetime.temporary(context, own, journal))
            worker = launch.launch(own, wanted, context.environment, context.report)
            # One that reads as fast as the network to the destination is, is never what the others wait for.
            rate = worker.rate if 0 < worker.rate < sizes.ENOUGH else math.inf
            return _Shared(worker, needed.zone, rate, stack.pop_all(), left_behind)

    def _delete(self, shared: _Shared) -> None:
        shared.stack.close()
        self._left_behind += shared.left_behind
