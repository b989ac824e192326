"""Restore points: all disks of a running VM at one moment, as Azure takes them, in a collection that the run deletes.

Without them, the disks of a VM are snapshotted side by side. A restore point in crash mode has them as after a power
cut, in write order across the disks; in application mode Azure first asks the guest to bring its applications to rest,
through an extension that it installs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..azure.context import Context
from ..errors import Denied, Throttled, Unreadable
from ..events import Notice, Report
from ..model import Disk, Json, Machine, at
from ..run.resources import Resources
from ..settings import APPLICATION, CRASH
from ..threads import ordered
from .cloning import Exported, completed, copied_in_background, why_closed

_MODES = {CRASH: "CrashConsistent", APPLICATION: "ApplicationConsistent"}
REMEDY = "Leave the disk out (exclude_disks), or set consistency to disk."
CLOSED_REMEDY = "Use the mechanism auto or worker, or set consistency to disk."


def obstacle(disk: Disk, consistency: str) -> str:
    """Why Azure takes no restore point of a disk; "" if it does."""
    if disk.unmanaged:
        return "it is a VHD blob"
    if disk.shareable:
        return "it can be shared between VMs"
    if consistency == CRASH and copied_in_background(disk):
        return f"it is of type {disk.sku}, which only application mode supports"
    return ""


def take(
    context: Context,
    resources: Resources,
    machine: Machine,
    disks: Sequence[Disk],
    *,
    exported: Callable[[Disk], Exported] = lambda _: "no",
) -> dict[str, Json]:
    """Take a restore point of `disks` and return Azure's documents of its disks by disk name.

    `exported`: see `cloning.snapshot_all`. If anything fails, nothing is left.
    """
    consistency = context.environment.consistency
    with resources.undone_on_error():
        source = {"properties": {"source": {"id": machine.id}}}
        collection = str(resources.create("collection", "points", source)["id"])
        point = _point(resources, collection, machine, disks, consistency)
        _tell_weaker(point, consistency, context.report)
        by_source = _by_source(point)
        ended: list[bool] = []

        def usable(disk: Disk) -> Json:
            id = by_source.get(disk.id.lower())
            if id is None:
                raise Unreadable(f"the restore point of {machine.name} lacks {disk.name}")
            read = partial(context.azure.get, id)
            document = read()
            if exported(disk) == "yes" and (why := why_closed(document)):
                raise Denied(
                    f"the restore point of {disk.name} cannot be read: {why}, as its disk has",
                    remedy=CLOSED_REMEDY,
                    resource=id,
                )
            return completed(disk, document, read, context.report, context.clock, ended)

        found = ordered(usable, disks, threads=8, ahead=16, abort=lambda: ended.append(True))
        return {disk.name: document for disk, document in zip(disks, found, strict=True)}


def _point(
    resources: Resources, collection: str, machine: Machine, disks: Sequence[Disk], consistency: str
) -> Json:
    wanted = {disk.id.lower() for disk in disks}
    entries = _entries(resources.azure.get(machine.id))
    ids = [str(id) for entry in entries if (id := at(entry, "managedDisk.id"))]
    properties: Json = {"consistencyMode": _MODES[consistency]}
    if left_out := [{"id": id} for id in ids if id.lower() not in wanted]:
        properties["excludeDisks"] = left_out
    try:
        return resources.create_point(collection, {"properties": properties})
    except Throttled as error:
        raise error.reworded(
            f"Azure takes no more restore points of {machine.name} now: {error.message}",
            remedy="Azure allows three an hour for a VM and mode. Run again later, or set consistency to disk.",
        ) from error


def _entries(document: Json, profile: str = "properties.storageProfile") -> list[Json]:
    """The entries of the disks in the document of a VM, or of a restore point."""
    return [at(document, f"{profile}.osDisk", {}), *at(document, f"{profile}.dataDisks", [])]


def _by_source(point: Json) -> dict[str, str]:
    """The ids of the disks of a restore point, by the lower-case ids of the disks they are of."""
    return {
        str(at(entry, "managedDisk.id")).lower(): str(id)
        for entry in _entries(point, "properties.sourceMetadata.storageProfile")
        if (id := at(entry, "diskRestorePoint.id"))
    }


def _tell_weaker(point: Json, consistency: str, report: Report) -> None:
    """Report a restore point that is not as consistent as it was asked to be."""
    wanted, got = _MODES[consistency], at(point, "properties.consistencyMode")
    if got and got != wanted:
        report(Notice(f"the restore point is {got}, not {wanted}: the guest could not do more"))
