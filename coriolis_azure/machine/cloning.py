"""Clones disks by way of snapshots: disk, snapshot, new disk.

All snapshots are taken concurrently, before anything is copied, so that they are as close to one point in time as
Azure allows without stopping the VM. Clones are created in the worker's zone, not in the source's: Azure attaches
disks only within a zone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

from ..azure import names
from ..clock import Clock
from ..errors import DeadlinePassed, Denied, OperationFailed
from ..events import Report, Wait
from ..model import Disk, Json
from ..run.resources import Resources
from ..threads import ordered

# The access settings of a snapshot that can be read through a URL.
OPEN = {"networkAccessPolicy": "AllowAll", "publicNetworkAccess": "Enabled"}
Exported = Literal["yes", "perhaps", "no"]
_INCREMENTAL_ONLY = {"UltraSSD_LRS", "PremiumV2_LRS"}
# The assumed rate of a background copy in bytes per second; for estimates only.
BACKGROUND_RATE = 100_000_000
# A background copy may take a day. Without any progress for this long, it is given up.
_STALLED_SECONDS = 6 * 3600.0
# How often the wait for a background copy is reported: the orchestrator's database keeps every report.
_TELL_SECONDS = 900.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 10.0, 120.0  # the polling interval grows with the wait


def snapshot_all(
    resources: Resources,
    disks: Sequence[Disk],
    report: Report,
    clock: Clock,
    *,
    exported: Callable[[Disk], Exported] = lambda _: "no",
) -> dict[str, Json]:
    """Take snapshots of all disks concurrently and return Azure's documents of them by disk name.

    `exported`: whether the snapshot of a disk is going to be read through a URL; "perhaps", if Azure permits that. Such
    snapshots are incremental, because Azure lists the pages only of those. If one fails, the others are deleted and the
    AzureError is raised.
    """
    ended: list[bool] = []

    def snapshot(disk: Disk) -> Json:
        taken = _snapshot(resources, disk, exported(disk))
        read = partial(resources.read, str(taken["id"]))
        return completed(disk, taken, read, report, clock, ended)

    with resources.undone_on_error():
        taken = ordered(
            snapshot,
            disks,
            threads=len(disks) or 1,
            ahead=len(disks) or 1,
            abort=lambda: ended.append(True),
        )
        return {disk.name: snapshot for disk, snapshot in zip(disks, taken, strict=True)}


def clone_all(
    resources: Resources, disks: Iterable[Disk], snapshots: Mapping[str, Json], before: int = 0
) -> list[str]:
    """Create a new disk from the snapshot of each disk; return the clones' ids in the order of `disks`.

    `before` counts the previous clones of these disks in this run: each clone needs a name of its own.
    """
    suffix = f"-{before + 1}" if before else ""

    def clone(disk: Disk) -> str:
        return _clone(resources, disk, snapshots[disk.name]["id"], f"clone-{disk.name}{suffix}")

    with resources.undone_on_error():
        return list(ordered(clone, disks, threads=8, ahead=16))


def clone_sku(disk: Disk) -> str:
    """The SKU for the clone of a disk: the disk's own, unless that SKU restricts where a disk can be attached.

    A snapshot with 4096-byte sectors can only become an Ultra or Premium SSD v2 disk, and an Ultra disk would need a
    worker created for it.
    """
    if disk.sku not in _INCREMENTAL_ONLY:
        return disk.sku
    return "Premium_LRS" if disk.sector_bytes == 512 else "PremiumV2_LRS"


def _snapshot(resources: Resources, disk: Disk, exported: Exported) -> Json:
    """Take the snapshot of a disk. Raises Denied if it has to be readable and Azure Policy does not allow that."""
    if exported == "no":
        return _taken(resources, disk, incremental=copied_in_background(disk))
    try:
        snapshot = _taken(resources, disk, incremental=True, readable=True)
    except Denied as error:
        if exported == "yes" or error.code != "RequestDisallowedByPolicy":
            raise
        return _taken(resources, disk, incremental=True)
    if exported == "yes" and (why := why_closed(snapshot)):
        raise Denied(
            f"{disk.name} cannot be read from its snapshot: {why}",
            remedy="Exempt the resource group from the Azure Policy that sets it, or use the mechanism auto or worker.",
            resource=str(snapshot["id"]),
        )
    return snapshot


def why_closed(snapshot: Json) -> str:
    """Why a snapshot cannot be read through a URL, by Azure's document of it; "" if it can."""
    properties = snapshot["properties"]
    allowed, sign_in = properties.get("networkAccessPolicy", "AllowAll"), properties.get("dataAccessAuthMode")
    if allowed != "AllowAll":
        return f"it has the network access policy {allowed}"
    return f"it has the data access mode {sign_in}" if sign_in not in (None, "None") else ""


def _taken(resources: Resources, disk: Disk, *, incremental: bool, readable: bool = False) -> Json:
    access = _access(resources, disk)
    if readable:
        access |= OPEN
    return resources.create(
        "snapshot",
        f"snapshot-{disk.name}",
        {
            "sku": {"name": "Standard_LRS"},
            "properties": {
                "creationData": {"createOption": "Copy", "sourceResourceId": disk.id},
                "incremental": incremental,
                **access,
            },
        },
    )


def completed(
    disk: Disk, snapshot: Json, read: Callable[[], Json], report: Report, clock: Clock, ended: list[bool]
) -> Json:
    """Wait until a snapshot, which `read` reads again, can be used; return its document.

    Raises OperationFailed if its background copy fails or the run has `ended`, DeadlinePassed if the copy stalls.
    Azure leaves `completionPercent` out of a snapshot that can be used at once.
    """
    id = str(snapshot["id"])
    what = f"the background copy of the snapshot of {disk.name}"
    waiting = Wait(report, clock, what, interval=_TELL_SECONDS)
    best, progressed = -1.0, 0.0
    while (done := snapshot["properties"].get("completionPercent")) is not None and done < 100:
        fault = snapshot["properties"].get("copyCompletionError")
        if fault:
            raise OperationFailed(f"the background copy of {id} failed: {fault}", resource=id)
        if ended:
            raise OperationFailed(f"the wait for {id} was cancelled", resource=id)
        if done > best:
            best, progressed = done, waiting.waited
        if waiting.waited - progressed > _STALLED_SECONDS:
            raise DeadlinePassed(
                f"the background copy of {id} has been at {done:.0f} % for {_STALLED_SECONDS / 3600:.0f} hours",
                resource=id,
            )
        waiting.seconds = _expected_seconds(disk, done, waiting.waited)
        waiting.pause(min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, waiting.waited / 20)), done)
        snapshot = read()
    return snapshot


def _expected_seconds(disk: Disk, percent: float, waited: float) -> float:
    """An estimate of how long the whole background copy takes, from its progress so far if there is any."""
    if percent and waited:
        return waited * 100 / percent
    return waited + background_seconds(disk) * (1 - percent / 100)


def copied_in_background(disk: Disk) -> bool:
    """Whether each snapshot of the disk can be used only after Azure has copied it in the background."""
    return disk.sku in _INCREMENTAL_ONLY


def background_seconds(disk: Disk) -> float:
    """An estimate of how long the background copy of a full disk takes. Azure guarantees no rate."""
    return disk.size_bytes / BACKGROUND_RATE


def _clone(resources: Resources, disk: Disk, snapshot: str, role: str) -> str:
    body: Json = {
        "sku": {"name": clone_sku(disk)},
        "properties": {
            "creationData": {
                "createOption": "Restore" if names.is_disk_point(snapshot) else "Copy",
                "sourceResourceId": snapshot,
            },
            **_access(resources, disk),
        },
    }
    if resources.run.zone and not disk.sku.endswith("_ZRS"):
        body["zones"] = [resources.run.zone]
    return str(resources.create("disk", role, body)["id"])


def _access(resources: Resources, disk: Disk) -> Json:
    """The access policy and encryption of a copy, never weaker than those of its source."""
    access: Json = {}
    if resources.azure.is_modern:
        access = {"networkAccessPolicy": "DenyAll", "publicNetworkAccess": "Disabled"}
    if disk.encryption_set:
        access["encryption"] = {
            "type": disk.encryption_type or "EncryptionAtRestWithCustomerKey",
            "diskEncryptionSetId": disk.encryption_set,
        }
    return access
