"""Disks that are VHD blobs: a worker reads those that Azure imports as disks, this process reads the others, or all."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from ..azure import names
from ..azure.blobs import Blob
from ..azure.context import Context
from ..azure.vhd_snapshots import VhdSnapshot
from ..errors import NotFound, OperationFailed
from ..events import Step
from ..machine import unmanaged
from ..model import Disk, Json, Worker
from ..replica.destinations import Place
from ..run.baselines import Baseline, Baselines
from ..run.resources import Resources
from ..transfer import Outcome
from .snapshots import read
from .target import Target, listed
from .worker import ByWorker, try_agent

# Nothing of a run that makes only snapshots of blobs can be tagged again, so it counts as alive for so long.
_LIFE = timedelta(days=1)


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


def copy_directly(target: Target, resources: Resources, disks: Sequence[Disk]) -> list[Outcome]:
    """Copy disks by reading snapshots of their VHD blobs in this process: what is allocated, or what has changed."""
    context = target.context
    tags = {disk.name: _tags(target, disk) for disk in disks}
    frozen = unmanaged.freeze_all(resources, context.storage, disks, lambda disk: tags[disk.name])
    outcomes = _copy_pages(target, disks, frozen, target.baselines)
    return [outcomes[disk.name] for disk in disks]


def _tags(target: Target, disk: Disk) -> dict[str, str]:
    """The tags for the snapshot of a disk's VHD: whether it is to be the baseline of the replica."""
    context, baselines, folder = target.context, target.baselines, target.folder
    if context.environment.keep_baseline:
        left = folder.disk(disk.name).left() if isinstance(folder, Place) else None
        stream = baselines.begin(disk.name, Baseline.recorded(left))
        return {**baselines.tags(disk.name, stream), names.DISK_TAG: disk.unique_id}
    return {names.ALIVE_TAG: names.stamp(context.azure.now(context.clock) + _LIFE)}


def _copy_pages(
    target: Target, disks: Sequence[Disk], frozen: dict[str, Blob], baselines: Baselines | None = None
) -> dict[str, Outcome]:
    """Copy VHD blobs by reading snapshots of them in this process; return the outcomes by disk name."""
    if not disks:
        return {}
    context = target.context
    context.report(Step("copy", listed(disks)))
    contents = {disk.name: VhdSnapshot(frozen[disk.name], disk.size_bytes) for disk in disks}
    outcomes = read(target, disks, contents, baselines, _snapshot)
    return {disk.name: outcome for disk, outcome in zip(disks, outcomes, strict=True)}


def _snapshot(context: Context, document: Json, size: int) -> VhdSnapshot:
    blob = context.storage.at(document["id"])
    if blob is None:
        raise NotFound(f"{document['id']} is in no storage account that the identity can see")
    return VhdSnapshot(blob, size)
