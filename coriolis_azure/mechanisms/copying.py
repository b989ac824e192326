"""The ways in which bytes get out of Azure: replica_export_mechanism.

All disks of a VM are snapshotted together. With `worker`, managed disks are cloned from their snapshots, and a worker
reads the clones; VHD blobs are imported as managed disks if Azure allows it. With `hybrid`, the worker reads only what
Azure lists as allocated or changed. With `snapshots`, this process reads the snapshots, also those of VHD blobs, and
nothing else is created. With `auto`, that is chosen for each disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from ..azure.context import Context
from ..events import Notice, Step
from ..machine import changes, exports, inspection, unmanaged
from ..machine.choice import choose
from ..model import Disk, Machine, Worker
from ..replica.destinations import Based, Folder
from ..run.baselines import Baseline
from ..run.resources import Resources
from ..settings import AUTO, HYBRID, SNAPSHOTS
from ..transfer import Outcome
from ..worker import launch as launching
from ..worker import sizes
from . import auto, hybrid, snapshots, vhds
from . import worker as by_worker
from .target import Launch, Target, listed

# What gives the worker of a run, or None: it boots it, or it has booted before.
Boot = Callable[[], Worker | None]


def launch_worker(
    context: Context,
    resources: Resources,
    machine: Machine,
    disks: Sequence[Disk],
    folder: Folder | None = None,
    launch: Launch | None = None,
) -> Worker | None:
    """Launch a worker for `disks`; return None if it would have nothing to read.

    `folder`: where the disks are going to be copied to, if that is known. `launch` gives the worker; None for one of
    the run's own.
    """
    location = context.environment.location
    choices = choose(context, disks, partial(is_proved, folder) if folder else _yes)
    needing = [disk for disk in disks if choices[disk.name].needs_worker]
    if not needing:
        return None
    if all(disk.unmanaged and unmanaged.must_be_direct(context.storage, disk, location) for disk in needing):
        # A security group costs nothing, and its tags show that the run is alive.
        resources.create("nsg", "nsg", {"properties": {}})
        return None
    return (launch or own(context))(resources, machine, needing)


def own(context: Context) -> Launch:
    """What boots a worker of the run's own."""

    def launch(resources: Resources, machine: Machine, disks: Sequence[Disk]) -> Worker:
        needed = sizes.needs(machine, disks, context.environment)
        return launching.launch(resources, needed, context.environment, context.report)

    return launch


def copy(
    target: Target,
    resources: Resources,
    boot: Boot,
    machine: Machine,
    disks: Sequence[Disk],
) -> list[Outcome]:
    """Snapshot `disks` of a VM and copy them to the target; return the outcomes in the order of `disks`.

    `boot` gives what `launch_worker` gives, and is called only if it is needed. Raises DisksChanged, before any
    snapshot is taken, if the VM no longer has the disks of `machine`.
    """
    context, mechanism = target.context, target.context.environment.replica_export_mechanism
    is_blob = any(disk.unmanaged for disk in disks)
    if mechanism == SNAPSHOTS:
        exports.refuse(disks, modern=context.azure.is_modern)
    worker = boot() if mechanism == AUTO or (is_blob and mechanism != SNAPSHOTS) else None
    if worker is not None and not is_blob:
        by_worker.try_agent(context, worker)
    now = _unchanged(context, machine, disks)
    context.report(Step("snapshot", listed(disks)))
    if mechanism == AUTO:
        return _copy_as_chosen(target, resources, worker, now, disks)
    if mechanism == SNAPSHOTS:
        if is_blob:
            return vhds.copy_directly(target, resources, disks)
        return snapshots.copy(target, resources, now, disks)
    if is_blob:
        return vhds.copy(target, resources, worker, disks)

    def booted() -> Worker:
        if (worker := boot()) is None:
            raise ValueError("managed disks need a worker")
        return worker

    return (hybrid.copy if mechanism == HYBRID else by_worker.copy)(target, resources, booted, now, disks)


def _copy_as_chosen(
    target: Target, resources: Resources, worker: Worker | None, machine: Machine, disks: Sequence[Disk]
) -> list[Outcome]:
    """Copy disks with `auto`, and note why each was read as it was."""
    context = target.context
    # Without a worker, which only the disks need that cannot do without, all others are read from here.
    choices = choose(context, disks, partial(is_proved, target.folder) if worker else _yes)
    for name, choice in choices.items():
        context.report(Notice(f"{name}: mechanism {choice.mechanism}: {choice.reason}"))

    if any(disk.unmanaged for disk in disks):
        outcomes = vhds.copy_directly(target, resources, disks)
    else:
        launched = partial(_launched, target, resources, worker, machine)
        outcomes = auto.copy(target, resources, machine, disks, choices, launched)
    for name, choice in choices.items():
        if (read := target.read[name]).reason != choice.reason:
            reasons = [choice.reason, read.reason] if read.reason else [choice.reason]
            target.read[name] = replace(read, reason="; ".join(reasons))
    return outcomes


def _launched(
    target: Target, resources: Resources, worker: Worker | None, machine: Machine, disks: Sequence[Disk]
) -> Worker:
    """The worker of a run, launched for `disks` if there is none yet."""
    if worker is not None:
        return worker
    new = (target.launch or own(target.context))(resources, machine, disks)
    by_worker.try_agent(target.context, new)
    return new


def _yes(disk: Disk) -> bool:
    del disk
    return True


def is_proved(folder: Folder, disk: Disk) -> bool:
    """Whether the replica of a disk has a baseline whose lists of changes can be relied on."""
    destination = folder.disk(disk.name)
    baseline = Baseline.recorded(destination.left()) if isinstance(destination, Based) else None
    return baseline is not None and baseline.proved


def _unchanged(context: Context, machine: Machine, disks: Sequence[Disk]) -> Machine:
    """The VM as it is now. Raises DisksChanged if it no longer has these disks, or has others that would be missed."""
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
    return now
