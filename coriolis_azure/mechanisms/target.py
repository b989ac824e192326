"""What all disks of a run share: the destination, the settings, the bandwidth limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .. import transfer
from ..azure.context import Context
from ..clock import Scope, scope
from ..errors import ChangeListWrong
from ..events import Notice, Progress
from ..model import Disk, Machine, Worker
from ..readers.flow import Flow
from ..readers.rate_limiter import RateLimiter
from ..readers.reader import Reader
from ..replica.destinations import Based, Destination, Folder
from ..run.baselines import Baseline, Baselines
from ..run.resources import Resources
from ..settings import WORKER
from ..threads import ordered
from ..transfer import Outcome

# What gives a run the worker that is to read these disks of its machine.
Launch = Callable[[Resources, Machine, Sequence[Disk]], Worker]


@dataclass(frozen=True)
class Read:
    """What was read of a disk, how, and why.

    `tier`: "changed" if Azure's list of changes was relied on, "allocated" if all allocated pages were read, "whole".
    `mechanism`: worker, hybrid or snapshots. `reason`: with `auto`, why it was that one; and why no list was relied on.
    `listed_bytes`: those that Azure says have changed. `relied_bytes`: those that
    were not read because Azure says that they have not changed. `checked_bytes`: those that were read all the same.
    """

    tier: str = "whole"
    reason: str = ""
    listed_bytes: int = 0
    relied_bytes: int = 0
    checked_bytes: int = 0
    mechanism: str = WORKER


@dataclass(frozen=True)
class Shared:
    """What the runs of a fleet in one source environment share, and need not do each for itself.

    `launch` gives a run its worker (None: it boots its own), and `limiter` limits the bandwidth of all. `runs` collects
    the ids of the runs: the fleet asks Azure once what it lists of all of them, as it deletes, once, what dead runs
    have left.
    """

    launch: Launch | None = None
    limiter: RateLimiter | None = None
    runs: list[str] = field(default_factory=list)


class Target:
    """The destination and settings for all disks of a run, which share the bandwidth limit.

    With `full`, every chunk is sent, whatever the folder already holds. `baselines`: those of the run. `shared`: what
    it shares with other runs, if any. `deletes_worker`: the run ends with the copy, and then deletes its worker.
    """

    def __init__(
        self,
        context: Context,
        folder: Folder,
        baselines: Baselines,
        *,
        full: bool = False,
        shared: Shared | None = None,
        deletes_worker: bool = False,
    ) -> None:
        limit = context.environment.bandwidth_limit
        self.context, self.folder, self._full = context, folder, full
        self.baselines, self.deletes_worker = baselines, deletes_worker
        self.launch = shared.launch if shared is not None else None
        # By disk name. Of disks that are not read from snapshots nothing is said.
        self.read: dict[str, Read] = {}
        self.idle_seconds = 0.0  # how long the disks were frozen and the worker was not there yet
        self._limiter = shared.limiter if shared is not None else None
        if self._limiter is None and limit:
            self._limiter = RateLimiter(limit, context.clock)

    def flow(self, disk: Disk) -> Flow:
        """The rate limit and bottleneck statistics for the data of `disk`."""
        return Flow(disk.name, self.context.report, self.context.clock, self._limiter)

    def copied(
        self,
        disks: Sequence[Disk],
        reader: Callable[[Disk, Destination], Reader],
        stop: Callable[[], None] = lambda: None,
        *,
        concurrent: int,
    ) -> list[Outcome]:
        """Copy disks from their readers, `concurrent` at a time. `stop` ends whatever else the readers wait for.

        The largest begin first, so that none of them is left for the end, when nothing else could be copied beside it.
        `reader` is asked for the reader of a disk once it is known what its destination holds.
        """
        readers = list[Reader]()

        def copy(disk: Disk) -> Outcome:
            def opened(destination: Destination) -> Reader:
                readers.append(reader(disk, destination))
                return readers[-1]

            return self._copied(disk, opened, concurrent)

        def abort() -> None:
            self.folder.stop()
            stop()
            for each in list(readers):
                each.close()

        by_size = sorted(disks, key=lambda disk: disk.size_bytes, reverse=True)
        outcomes = list(ordered(copy, by_size, threads=concurrent, ahead=len(disks), abort=abort))
        found = dict(zip((disk.name for disk in by_size), outcomes, strict=True))
        return [found[disk.name] for disk in disks]

    def _copied(self, disk: Disk, opened: Callable[[Destination], Reader], concurrent: int) -> Outcome:
        context, settings = self.context, self.context.environment
        chunk = settings.chunk_size_kib << 10
        with Scope(scope(), disk=disk.name).entered(), self.folder.disk(disk.name) as destination:
            while True:
                base = destination.known(disk.unique_id, disk.size_bytes, chunk, full=self._full)
                self._begin(disk, destination)
                try:
                    return transfer.copy(
                        opened(destination),
                        base,
                        destination,
                        Progress(disk.name, disk.size_bytes, context.report, context.clock),
                        verify=settings.verify_disk_integrity,
                        concurrent=concurrent,
                    )
                except ChangeListWrong as error:  # the next reader of this disk does without the list
                    context.report(Notice(f"{error.message}. The list is not used: all of the disk is read"))

    def _begin(self, disk: Disk, destination: Destination) -> None:
        """Note the baseline of a disk's replica, which is deleted once the run has replaced it."""
        if isinstance(destination, Based):
            _, document = destination.baseline or (None, None)
            if (baseline := Baseline.recorded(document)) is not None:
                self.baselines.begin(disk.name, baseline)


def listed(disks: Sequence[Disk]) -> str:
    """The names of disks, for people."""
    return ", ".join(disk.name for disk in disks)
