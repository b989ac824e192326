"""A worker reads clones of the disks, in waves of as many as it can attach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..azure.context import Context
from ..clock import hurried
from ..errors import AzureError, DeadlinePassed, Unreachable, WorkerGone
from ..events import Step
from ..machine import cloning
from ..model import Disk, Json, Machine, Worker
from ..readers import ssh
from ..readers.agents import AgentReader
from ..readers.channel import Direct
from ..readers.conversation import Job, Stream
from ..readers.plan import Known
from ..readers.reader import Reader
from ..replica.destinations import Destination
from ..replica.manifest import Manifest
from ..run.resources import Resources, may_exist
from ..threads import side_by_side
from ..transfer import Outcome
from ..worker.attachment import Attachment
from ..worker.sizes import at_a_time, threads_each
from .freezing import freeze
from .target import Target, listed

_MIN_WINDOW = 64 << 10


class ByWorker:
    """Copies disks through a worker, in waves of as many clones as it can attach.

    `known` gives what tells the reader of a disk what is known of it, once its destination knows what it holds.
    """

    def __init__(
        self,
        target: Target,
        resources: Resources,
        worker: Worker,
        known: Callable[[Disk, Destination], Callable[[Manifest], Known]] = lambda *_: lambda _: Known(),
    ) -> None:
        self._context, self._resources, self._worker, self._target = (
            target.context,
            resources,
            worker,
            target,
        )
        self._known = known

    def copy(self, disks: Sequence[Disk], clone: Callable[[Sequence[Disk], int], list[str]]) -> list[Outcome]:
        """Clone, attach and copy disks, wave by wave. `clone` creates clones as Attachment's `make` does."""
        context, outcomes = self._context, list[Outcome]()
        goes_along = self._target.deletes_worker and context.azure.is_modern
        for first in range(0, len(disks), self._worker.slots):
            wave, is_last = (
                disks[first : first + self._worker.slots],
                first + self._worker.slots >= len(disks),
            )
            attachment = Attachment(
                context.azure,
                self._worker,
                partial(clone, wave),
                None if is_last and goes_along else self._resources.delete,
                context.clock,
                context.report,
            )
            with attachment:
                context.report(Step("copy", listed(wave)))
                concurrent = at_a_time(
                    [disk.bytes_per_second for disk in wave], context.environment.chunk_size_kib << 10
                )
                reader = self._reading(attachment, wave, concurrent)
                outcomes += self._target.copied(wave, reader, attachment.stop, concurrent=concurrent)
        return outcomes

    def _reading(
        self, attachment: Attachment, wave: Sequence[Disk], concurrent: int
    ) -> Callable[[Disk, Destination], Reader]:
        """What gives the readers for the clones of a wave, of which `concurrent` are read at a time."""
        settings = self._context.environment
        direct = None
        if settings.export_worker_data_port:
            direct = Direct(self._worker.address, settings.export_worker_data_port, self._context.report)
        window = self._window(concurrent)
        slots = {disk.name: slot for slot, disk in enumerate(wave)}

        def reader(disk: Disk, destination: Destination) -> Reader:
            line = ssh.Line(self._worker, self._context.clock, self._context.report, window, self._gone)
            start, job = (
                self._start(attachment, disk, line),
                self._job(attachment, disk, slots[disk.name], concurrent),
            )
            known = self._known(disk, destination)
            return AgentReader(start, job, self._target.flow(disk), direct, line.close, known)

        return reader

    def _job(self, attachment: Attachment, disk: Disk, slot: int, concurrent: int) -> Job:
        settings = self._context.environment
        return Job(
            attachment.devices[slot],
            disk.size_bytes,
            compress=settings.enable_transfer_compression,
            leaf=settings.leaf_size_kib << 10,
            slot=attachment.luns[slot],  # runs that share a worker share its ports, too
            threads=threads_each(concurrent),
        )

    def _start(self, attachment: Attachment, disk: Disk, line: ssh.Line) -> Callable[[], Stream]:
        """What starts an agent for a disk."""

        def start() -> Stream:
            try:
                return attachment.agent(line)
            except Unreachable as error:
                if self._gone():
                    vm = self._worker.vm
                    raise WorkerGone(f"{vm} was deleted while {disk.name} was being copied") from error
                raise

        return start

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


def try_agent(context: Context, worker: Worker) -> None:
    """Fail before anything is copied if the agent cannot run on the worker."""

    def is_useless() -> bool:
        return hurried() or (worker.shared and not may_exist(context.azure, worker.vm))

    ssh.asked(ssh.Connection.try_agent, worker, context.clock, context.report, given_up=is_useless)


def copy(
    target: Target, resources: Resources, boot: Callable[[], Worker], machine: Machine, disks: Sequence[Disk]
) -> list[Outcome]:
    """Copy managed disks: freeze all while the worker boots, clone them, and read the clones."""
    context = target.context
    worker, snapshots = while_booting(target, boot, lambda: freeze(context, resources, machine, disks))
    by_worker = ByWorker(target, resources, worker)
    return by_worker.copy(disks, cloned(context, resources, snapshots))


def while_booting(
    target: Target, boot: Callable[[], Worker], freeze: Callable[[], dict[str, Json]]
) -> tuple[Worker, dict[str, Json]]:
    """The worker, which can run the agent, and the snapshots that were taken side by side with its boot."""
    context, ended = target.context, dict[str, float]()

    def booted() -> Worker:
        worker = boot()
        try_agent(context, worker)
        ended["boot"] = context.clock.monotonic()
        return worker

    def frozen() -> dict[str, Json]:
        snapshots = freeze()
        ended["freeze"] = context.clock.monotonic()
        return snapshots

    worker, snapshots = side_by_side(booted, frozen)
    target.idle_seconds = max(0.0, ended["boot"] - ended["freeze"])
    return worker, snapshots


def cloned(
    context: Context, resources: Resources, snapshots: Mapping[str, Json]
) -> Callable[[Sequence[Disk], int], list[str]]:
    """What clones the disks of a wave from their snapshots."""

    def clones(wave: Sequence[Disk], before: int) -> list[str]:
        context.report(Step("clone", listed(wave)))
        return cloning.clone_all(resources, wave, snapshots, before)

    return clones
