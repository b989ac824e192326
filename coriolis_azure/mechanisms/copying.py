"""The two ways in which bytes get out of Azure: replica_export_mechanism.

All disks of a VM are snapshotted together. With `worker`, managed disks are cloned from their snapshots, and a worker
reads the clones; VHD blobs are imported as managed disks if Azure allows it. With `snapshots`, this process reads the
snapshots, and nothing else is created.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..azure.context import Context
from ..errors import InvalidInput
from ..events import Step
from ..machine import changes, exports, inspection, unmanaged
from ..model import Disk, Machine, Worker
from ..run.resources import Resources
from ..settings import AUTO, HYBRID, SNAPSHOTS
from ..transfer import Outcome
from ..worker import launch, sizes
from . import hybrid, snapshots, vhds
from . import worker as by_worker
from .target import Target, listed


def launch_worker(
    context: Context, resources: Resources, machine: Machine, disks: Sequence[Disk]
) -> Worker | None:
    """Launch a worker for `disks`; return None if it would have nothing to read."""
    location = context.environment.location
    if (mechanism := context.environment.replica_export_mechanism) == AUTO:
        raise InvalidInput(
            f"the mechanism {mechanism} is not available yet",
            remedy="Set replica_export_mechanism to worker, snapshots or hybrid.",
        )
    if _by_snapshots(context):
        return None
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
    context, direct = target.context, _by_snapshots(target.context)
    is_blob = any(disk.unmanaged for disk in disks)
    if direct:
        exports.refuse(disks, modern=context.azure.is_modern)
    elif worker is not None and not is_blob:
        by_worker.try_agent(context, worker)
    _refuse_changes(context, machine, disks)
    context.report(Step("snapshot", listed(disks)))
    if direct:
        return snapshots.copy(target, resources, disks)
    if is_blob:
        return vhds.copy(target, resources, worker, disks)
    if worker is None:
        raise ValueError("managed disks need a worker")
    if context.environment.replica_export_mechanism == HYBRID:
        return hybrid.copy(target, resources, worker, disks)
    return by_worker.copy(target, resources, worker, disks)


def _by_snapshots(context: Context) -> bool:
    return context.environment.replica_export_mechanism == SNAPSHOTS


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
