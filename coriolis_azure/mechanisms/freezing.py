"""Freezes the disks of a VM at one moment: side by side, or as a restore point if the settings ask for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..azure.context import Context
from ..events import Notice
from ..machine import cloning, restore_points
from ..model import Disk, Json, Machine
from ..run.resources import Resources
from ..settings import DISK


def freeze(
    context: Context,
    resources: Resources,
    machine: Machine,
    disks: Sequence[Disk],
    *,
    exported: Callable[[Disk], cloning.Exported] = lambda _: "no",
) -> dict[str, Json]:
    """Freeze managed disks of a VM; return Azure's documents of the snapshots, or of the disks of a restore point.

    They are by disk name. `machine`: as it is now. `exported`: see `cloning.snapshot_all`.
    """
    asked, report = context.environment.consistency, context.report
    is_off = machine.power_state == "deallocated"
    if asked != DISK and not is_off:
        return restore_points.take(context, resources, machine, disks, exported=exported)
    if asked != DISK:
        report(Notice("the VM is deallocated: snapshots of its disks need no restore point to be consistent"))
    return cloning.snapshot_all(resources, disks, report, context.clock, exported=exported)
