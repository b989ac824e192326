"""Disk, snapshot, disk: a copy of each disk as it was at one moment.

All snapshots are taken side by side, before anything is copied, so that the disks of a machine are as close to
one moment as Azure allows without stopping it. Clones get the worker's zone, not the source's: Azure attaches
only within one zone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .clock import Clock
from .errors import DeadlinePassed, OperationFailed
from .model import Disk, Json
from .pipeline import ordered
from .resources import Resources

_INCREMENTAL_ONLY = {"UltraSSD_LRS", "PremiumV2_LRS"}
_COMPLETE_SECONDS = 6 * 3600.0


def snapshot_all(resources: Resources, disks: Sequence[Disk], clock: Clock) -> dict[str, str]:
    """A snapshot of every disk, taken side by side; snapshot ids by disk name.

    Raises an AzureError; what had been taken is then deleted again.
    """
    ended: list[bool] = []
    with resources.undone_on_error():
        taken = ordered(
            lambda disk: _snapshot(resources, disk, clock, ended),
            disks,
            threads=len(disks) or 1,
            ahead=len(disks) or 1,
            abort=lambda: ended.append(True),
        )
        return {disk.name: snapshot for disk, snapshot in zip(disks, taken, strict=True)}


def clone_all(
    resources: Resources, disks: Iterable[Disk], snapshots: dict[str, str], before: int = 0
) -> list[str]:
    """A new disk from the snapshot of each disk, in their order; the clones' ids.

    `before`: how often these disks were cloned in this run. Each time they have other names.
    """
    suffix = f"-{before + 1}" if before else ""

    def clone(disk: Disk) -> str:
        return _clone(resources, disk, snapshots[disk.name], f"clone-{disk.name}{suffix}")

    with resources.undone_on_error():
        return list(ordered(clone, disks, threads=8, ahead=16))


def clone_sku(disk: Disk) -> str:
    """The SKU of a disk's clone: its own, except where that has restrictions which it need not have: it is read once.

    A snapshot of sectors of 4096 bytes becomes an Ultra or Premium SSD v2 disk only. An Ultra disk would need a worker
    that is made for it.
    """
    if disk.sku not in _INCREMENTAL_ONLY:
        return disk.sku
    return "Premium_LRS" if disk.sector_bytes == 512 else "PremiumV2_LRS"


def _snapshot(resources: Resources, disk: Disk, clock: Clock, ended: list[bool]) -> str:
    made = resources.create(
        "snapshot",
        f"snapshot-{disk.name}",
        {
            "sku": {"name": "Standard_LRS"},
            "properties": {
                "creationData": {"createOption": "Copy", "sourceResourceId": disk.id},
                "incremental": disk.sku in _INCREMENTAL_ONLY,
                **_access(resources, disk),
            },
        },
    )
    return _completed(resources, made, clock, ended)


def _completed(resources: Resources, snapshot: Json, clock: Clock, ended: list[bool]) -> str:
    """Wait until a snapshot can be used, or the run has `ended`.

    Azure leaves `completionPercent` out where that is at once.
    """
    id, until = str(snapshot["id"]), clock.monotonic() + _COMPLETE_SECONDS
    while (done := snapshot["properties"].get("completionPercent")) is not None and done < 100:
        fault = snapshot["properties"].get("copyCompletionError")
        if fault:
            raise OperationFailed(f"the background copy of {id} failed: {fault}", resource=id)
        if ended:
            raise OperationFailed(f"the wait for {id} was ended", resource=id)
        if clock.monotonic() > until:
            raise DeadlinePassed(f"{id} was {done:.0f} % copied after {_COMPLETE_SECONDS / 3600:.0f} hours")
        clock.sleep(10)
        snapshot = resources.azure.get(id)
    return id


def _clone(resources: Resources, disk: Disk, snapshot: str, role: str) -> str:
    body: Json = {
        "sku": {"name": clone_sku(disk)},
        "properties": {
            "creationData": {"createOption": "Copy", "sourceResourceId": snapshot},
            **_access(resources, disk),
        },
    }
    if resources.run.zone and not disk.sku.endswith("_ZRS"):
        body["zones"] = [resources.run.zone]
    return str(resources.create("disk", role, body)["id"])


def _access(resources: Resources, disk: Disk) -> Json:
    """Who may reach a copy, and by which key it is encrypted: no wider than its source."""
    access: Json = {}
    if resources.azure.is_modern:
        access = {"networkAccessPolicy": "DenyAll", "publicNetworkAccess": "Disabled"}
    if disk.encryption_set:
        access["encryption"] = {
            "type": disk.encryption_type or "EncryptionAtRestWithCustomerKey",
            "diskEncryptionSetId": disk.encryption_set,
        }
    return access
