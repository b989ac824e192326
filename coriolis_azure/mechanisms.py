"""Gets the bytes out of Azure: a worker reads clones of the disks, or this process reads the pages of VHD blobs.

All disks of a VM are snapshotted together. Managed disks are cloned from their snapshots and read by the worker, in
waves of as many as it can attach. VHD blobs are imported as managed disks for the worker if Azure allows it; this
process reads the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from . import transfer
from .azure.blobs import Blob
from .azure.context import Context
from .clock import Scope, scope
from .errors import AzureError, DeadlinePassed, OperationFailed, Unreachable, WorkerGone
from .events import Progress, Step
from .machine import changes, cloning, inspection, unmanaged
from .model import Disk, Machine, Worker
from .readers import ssh
from .readers.agents import AgentReader
from .readers.channel import Direct
from .readers.conversation import Job, Stream
from .readers.flow import Flow
from .readers.pages import PageReader
from .readers.rate_limiter import RateLimiter
from .readers.reader import Reader
from .replica.destinations import Folder
from .run.resources import Resources
from .threads import ordered
from .transfer import Outcome
from .worker import launch, sizes
from .worker.attachment import Attachment

_MIN_WINDOW = 64 << 10


def launch_worker(
    context: Context, resources: Resources, machine: Machine, disks: Sequence[Disk]
) -> Worker | None:
    """Launch a worker for `disks`; return None if it would have nothing to read."""
    location = context.environment.location
    if all(disk.unmanaged and unmanaged.must_be_direct(context.storage, disk, location) for disk in disks):
        # A security group costs nothing, and its tags show that the run is alive.
        resources.create("nsg", "nsg", {"properties": {}})
        return None
    return launch.launch(resources, sizes.needs(machine, disks), context.environment, context.report)


def copy(
    target: Target, resources: Resources, worker: Worker | None, machine: Machine, disks: Sequence[Disk]
) -> list[Outcome]:
    """Snapshot `disks` of a VM and copy them to the target; return the outcomes in the order of `disks`.

    Raises DisksChanged, before any snapshot is taken, if the VM no longer has the disks of `machine`.
    """
    context = target.context
    if any(disk.unmanaged for disk in disks):
        return _copy_vhds(target, resources, worker, machine, disks)
    if worker is None:
        raise ValueError("managed disks need a worker")
    _try_agent(context, worker)
    _refuse_changes(context, machine, disks)
    context.report(Step("snapshot", _listed(disks)))
    snapshots = cloning.snapshot_all(resources, disks, context.report, context.clock)

    def clones(wave: Sequence[Disk], before: int) -> list[str]:
        context.report(Step("clone", _listed(wave)))
        return cloning.clone_all(resources, wave, snapshots, before)

    return _ByWorker(target, resources, worker).copy(disks, clones)


def _refuse_changes(context: Context, machine: Machine, disks: Sequence[Disk]) -> None:
    """Raise DisksChanged if the VM no longer has these disks, or has others that would be missed."""
    settings = context.environment
    now = inspection.read(
        context.azure,
        machine.group,
        settings.location,
        machine.id,
        context.storage,
        settings.exclude_disks,
    )
    changes.refuse(machine, disks, inspection.not_excluded(now, settings.exclude_disks))


def _copy_vhds(
    target: Target, resources: Resources, worker: Worker | None, machine: Machine, disks: Sequence[Disk]
) -> list[Outcome]:
    """Copy disks that are VHD blobs: the worker reads those that Azure imports, this process the others."""
    context = target.context
    report, storage = context.report, context.storage
    _refuse_changes(context, machine, disks)
    report(Step("snapshot", _listed(disks)))
    frozen = unmanaged.freeze_all(resources, storage, disks)
    report(Step("import", _listed(disks)))
    imported = unmanaged.import_all(resources, storage, disks, frozen, report)

    def clones(wave: Sequence[Disk], before: int) -> list[str]:
        if before:
            reimported = unmanaged.import_all(resources, storage, wave, frozen, report, before)
            imported.update(reimported)
            if missing := [disk.name for disk in wave if disk.name not in reimported]:
                raise OperationFailed(f"Azure does not import the VHD of {', '.join(missing)} again")
        return [imported[disk.name] for disk in wave]

    outcomes: dict[str, Outcome] = {}
    by_worker = [disk for disk in disks if disk.name in imported]
    if by_worker and worker is not None:
        _try_agent(context, worker)
        copied = _ByWorker(target, resources, worker).copy(by_worker, clones)
        outcomes = {disk.name: outcome for disk, outcome in zip(by_worker, copied, strict=True)}
    rest = [disk for disk in disks if disk.name not in outcomes]
    outcomes |= _copy_pages(target, rest, frozen)
    return [outcomes[disk.name] for disk in disks]


def _copy_pages(target: Target, disks: Sequence[Disk], frozen: dict[str, Blob]) -> dict[str, Outcome]:
    """Copy VHD blobs by reading their allocated pages in this process; return the outcomes by disk name."""
    if not disks:
        return {}
    target.context.report(Step("copy", _listed(disks)))
    blobs = [frozen[disk.name] for disk in disks]
    readers = [
        PageReader(blob, target.flow(disk), blob.pages) for disk, blob in zip(disks, blobs, strict=True)
    ]
    outcomes = target.copied(disks, readers, stop=lambda: None)
    return {disk.name: outcome for disk, outcome in zip(disks, outcomes, strict=True)}


class Target:
    """The destination and settings for all disks of a run, which share the bandwidth limit.

    With `full`, every chunk is sent, whatever the folder already holds.
    """

    def __init__(self, context: Context, folder: Folder, *, full: bool = False) -> None:
        limit = context.environment.bandwidth_limit
        self.context, self.folder, self._full = context, folder, full
        self._limiter = RateLimiter(limit, context.clock) if limit else None

    def concurrent(self, disks: int) -> int:
        """How many of `disks` disks are copied concurrently."""
        return min(transfer.at_once(self.context.environment.chunk_size_kib << 10), max(1, disks))

    def flow(self, disk: Disk) -> Flow:
        """The rate limit and bottleneck statistics for the data of `disk`."""
        return Flow(disk.name, self.context.report, self.context.clock, self._limiter)

    def copied(
        self, disks: Sequence[Disk], readers: Sequence[Reader], stop: Callable[[], None]
    ) -> list[Outcome]:
        """Copy disks from their readers, some of them concurrently. `stop` ends whatever else the readers wait for."""
        concurrent = self.concurrent(len(disks))

        def copy(number: int) -> Outcome:
            return self._copied(disks[number], readers[number], concurrent)

        def abort() -> None:
            self.folder.stop()
            stop()
            for reader in readers:
                reader.close()

        work = ordered(copy, range(len(disks)), threads=concurrent, ahead=2 * concurrent, abort=abort)
        return list(work)

    def _copied(self, disk: Disk, reader: Reader, concurrent: int) -> Outcome:
        context, settings = self.context, self.context.environment
        with Scope(scope(), disk=disk.name).entered(), self.folder.disk(disk.name) as destination:
            chunk = settings.chunk_size_kib << 10
            return transfer.copy(
                reader,
                destination.known(disk.unique_id, disk.size_bytes, chunk, full=self._full),
                destination,
                Progress(disk.name, disk.size_bytes, context.report, context.clock),
                verify=settings.verify_disk_integrity,
                concurrent=concurrent,
            )


class _ByWorker:
    """Copies disks through a worker, in waves of as many clones as it can attach."""

    def __init__(self, target: Target, resources: Resources, worker: Worker) -> None:
        self._context, self._resources, self._worker, self._target = (
            target.context,
            resources,
            worker,
            target,
        )

    def copy(self, disks: Sequence[Disk], clone: Callable[[Sequence[Disk], int], list[str]]) -> list[Outcome]:
        """Clone, attach and copy disks, wave by wave. `clone` creates clones as Attachment's `make` does."""
        context, outcomes = self._context, list[Outcome]()
        for first in range(0, len(disks), self._worker.slots):
            wave = disks[first : first + self._worker.slots]
            attachment = Attachment(
                context.azure,
                self._worker,
                partial(clone, wave),
                self._resources.delete,
                context.clock,
                context.report,
            )
            with attachment:
                context.report(Step("copy", _listed(wave)))
                outcomes += self._target.copied(wave, self._readers(attachment, wave), attachment.stop)
            self._resources.delete(attachment.clones)
        return outcomes

    def _readers(self, attachment: Attachment, wave: Sequence[Disk]) -> list[Reader]:
        """The readers for the clones of a wave."""
        settings = self._context.environment
        direct = None
        if settings.export_worker_data_port:
            direct = Direct(self._worker.address, settings.export_worker_data_port, self._context.report)
        window = self._window(self._target.concurrent(len(wave)))
        return [self._reader(attachment, slot, disk, window, direct) for slot, disk in enumerate(wave)]

    def _reader(
        self, attachment: Attachment, slot: int, disk: Disk, window: int, direct: Direct | None
    ) -> Reader:
        context, settings = self._context, self._context.environment
        line = ssh.Line(self._worker, context.clock, context.report, window, self._gone)
        job = Job(
            attachment.devices[slot],
            disk.size_bytes,
            compress=settings.enable_transfer_compression,
            leaf=settings.leaf_size_kib << 10,
            slot=slot,
        )

        def start() -> Stream:
            try:
                return attachment.agent(line)
            except Unreachable as error:
                if self._gone():
                    vm = self._worker.vm
                    raise WorkerGone(f"{vm} was deleted while {disk.name} was being copied") from error
                raise

        return AgentReader(start, job, self._target.flow(disk), direct, line.close)

    def _window(self, concurrent: int) -> int:
        """The SSH window, in bytes, for each connection."""
        window, limit = ssh.WINDOW // concurrent, self._context.environment.bandwidth_limit
        # A whole window is sent at full speed, however slowly it is read: so a limit needs a small window.
        return max(_MIN_WINDOW, min(window, limit // 8)) if limit else window

    def _gone(self) -> bool:
        """Whether the worker no longer exists, according to Azure."""
        try:
            return self._context.azure.find(self._worker.vm) is None
        except (AzureError, DeadlinePassed):
            return False


def _try_agent(context: Context, worker: Worker) -> None:
    """Fail before any snapshot is taken if the agent cannot run on the worker."""
    with ssh.connect(worker, context.clock, context.report) as connection:
        connection.try_agent()


def _listed(disks: Sequence[Disk]) -> str:
    return ", ".join(disk.name for disk in disks)
