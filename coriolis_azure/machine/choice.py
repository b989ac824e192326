"""Chooses how each disk is read: replica_export_mechanism, and what is best where that is auto."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..azure.context import Context
from ..model import Disk
from ..settings import AUTO, HYBRID, SNAPSHOTS, WORKER
from . import exports


@dataclass(frozen=True)
class Choice:
    """How a disk is read: worker, snapshots or hybrid; and why, if that was for us to choose."""

    mechanism: str
    reason: str = ""

    @property
    def needs_worker(self) -> bool:
        """Whether a worker reads the disk."""
        return self.mechanism != SNAPSHOTS


def choose(
    context: Context, disks: Sequence[Disk], proved: Callable[[Disk], bool] = lambda _: True
) -> dict[str, Choice]:
    """How each disk is read, by its name. `proved`: whether what a run of the disk has to read is likely to be little.

    With auto, a disk is read from its snapshot if Azure permits that, unless this host is outside the disk's location
    and would have to fetch all of the disk: then a worker reads it there, and sends what changed.
    """
    mechanism = context.environment.replica_export_mechanism
    if mechanism != AUTO:
        return {disk.name: Choice(mechanism) for disk in disks}
    obstacles, here = exports.obstacles(context, disks), context.environment.location
    is_near = not all(obstacles.values()) and context.azure.host_location == here

    def chosen(disk: Disk) -> Choice:
        if disk.unmanaged:
            return Choice(SNAPSHOTS, "its VHD can be read without making anything but a snapshot")
        if why := obstacles[disk.name]:
            return Choice(WORKER, why)
        if is_near:
            return Choice(SNAPSHOTS, f"this host is in {here}, too")
        if proved(disk):
            return Choice(SNAPSHOTS, "only what Azure lists as changed has to be read")
        return Choice(HYBRID, f"this host is not in {here}, and much of the disk has to be read")

    return {disk.name: chosen(disk) for disk in disks}
