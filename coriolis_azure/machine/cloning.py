"""Disk, snapshot, disk: a copy of each disk as it was at one moment.

All snapshots are taken side by side, before anything is copied, so that the disks of a machine are as close to
one moment as Azure allows without stopping it. Clones get the worker's zone, not the source's: Azure attaches
only within one zone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..clock import Clock
from ..errors import DeadlinePassed, OperationFailed
from ..events import Report, Waiting
from ..model import Disk, Json
from ..run.resources import Resources
from ..threads import ordered

_INCREMENTAL_ONLY = {"UltraSSD_LRS", "PremiumV2_LRS"}
# Bytes a second that a background copy is taken to move, for estimates only.
BACKGROUND_RATE = 100_000_000
# A background copy may take a day. One that does not move for so long is given up.
_STALLED_SECONDS = 6 * 3600.0
# How often a wait for one is told, and the longest time between two looks.
_TELL_SECONDS, _LONGEST_PAUSE = 900.0, 120.0


def snapshot_all(resources: Resources, disks: Sequence[Disk], report: Report, clock: Clock) -> dict[str, str]:
    """A snapshot of every disk, taken side by side; snapshot ids by disk name.

    Raises an AzureError; what had been taken is then deleted again.
    """
    ended: list[bool] = []
    with resources.undone_on_error():
        taken = ordered(
            lambda disk: _snapshot(resources, disk, report, clock, ended),
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


def _snapshot(resources: Resources, disk: Disk, report: Report, clock: Clock, ended: list[bool]) -> str:
    made = resources.create(
        "snapshot",
        f"snapshot-{disk.name}",
        {
            "sku": {"name": "Standard_LRS"},
            "properties": {
                "creationData": {"createOption": "Copy", "sourceResourceId": disk.id},
                "incremental": copied_in_background(disk),
                **_access(resources, disk),
            },
        },
    )
    return _completed(resources, disk, made, report, clock, ended)


def _completed(
    resources: Resources, disk: Disk, snapshot: Json, report: Report, clock: Clock, ended: list[bool]
) -> str:
    """Wait until a snapshot can be used, or the run has `ended`, or its background copy stands still.

    Azure leaves `completionPercent` out where a snapshot can be used at once.
    """
    id, begun, told = str(snapshot["id"]), clock.monotonic(), -_TELL_SECONDS
    best, moved = -1.0, begun
    while (done := snapshot["properties"].get("completionPercent")) is not None and done < 100:
        fault = snapshot["properties"].get("copyCompletionError")
        if fault:
            raise OperationFailed(f"the background copy of {id} failed: {fault}", resource=id)
        if ended:
            raise OperationFailed(f"the wait for {id} was ended", resource=id)
        now = clock.monotonic()
        if done > best:
            best, moved = done, now
        if now - moved > _STALLED_SECONDS:
            raise DeadlinePassed(
                f"the background copy of {id} has stood at {done:.0f} % for {_STALLED_SECONDS / 3600:.0f} hours",
                resource=id,
            )
        if now - begun - told >= _TELL_SECONDS:
            told = now - begun
            left = (
                told * (100 - done) / done if done and told else background_seconds(disk) * (1 - done / 100)
            )
            what = f"the background copy of the snapshot of {disk.name}"
            report(Waiting(what, left + told, waited=told, percent=int(done)))
        clock.sleep(min(_LONGEST_PAUSE, max(10.0, (now - begun) / 20)))
        snapshot = resources.read(id)
    return id


def copied_in_background(disk: Disk) -> bool:
    """Whether a snapshot of the disk can be used only when Azure has copied it in the background: in each run."""
    return disk.sku in _INCREMENTAL_ONLY


def background_seconds(disk: Disk) -> float:
    """An estimate of how long that takes for a full disk. Azure promises no rate."""
    return disk.size_bytes / BACKGROUND_RATE


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
