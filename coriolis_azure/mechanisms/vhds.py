"""Disks that are VHD blobs: a worker reads those that Azure imports as disks, this process reads the others."""

from __future__ import annotations

from collections.abc import Sequence

from ..azure.blobs import Blob
from ..errors import OperationFailed
from ..events import Step
from ..machine import unmanaged
from ..model import Disk, Worker
from ..readers.pages import PageReader
from ..readers.reader import Reader
from ..replica.destinations import Destination
from ..run.resources import Resources
from ..transfer import Outcome
from .target import Target, listed
from .worker import ByWorker, try_agent


def copy(target: Target, resources: Resources, worker: Worker | None, disks: Sequence[Disk]) -> list[Outcome]:
    """Copy disks that are VHD blobs: the worker reads those that Azure imports, this process the others."""
    context = target.context
    report, storage = context.report, context.storage
    frozen = unmanaged.freeze_all(resources, storage, disks)
    report(Step("import", listed(disks)))
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
        try_agent(context, worker)
        copied = ByWorker(target, resources, worker).copy(by_worker, clones)
        outcomes = {disk.name: outcome for disk, outcome in zip(by_worker, copied, strict=True)}
    rest = [disk for disk in disks if disk.name not in outcomes]
    outcomes |= _copy_pages(target, rest, frozen)
    return [outcomes[disk.name] for disk in disks]


def _copy_pages(target: Target, disks: Sequence[Disk], frozen: dict[str, Blob]) -> dict[str, Outcome]:
    """Copy VHD blobs by reading their allocated pages in this process; return the outcomes by disk name."""
    if not disks:
        return {}
    target.context.report(Step("copy", listed(disks)))

    def reader(disk: Disk, _: Destination) -> Reader:
        blob = frozen[disk.name]
        return PageReader(blob, target.flow(disk), blob.pages)

    outcomes = target.copied(disks, reader)
    return {disk.name: outcome for disk, outcome in zip(disks, outcomes, strict=True)}
