"""Changes the data disks of a worker entry by entry: replacing the whole list would detach clones of other runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from ..azure import names
from ..azure.client import Azure
from ..clock import Clock
from ..errors import AzureError, DeadlinePassed
from ..events import Notice, Report, counted
from ..model import Json, Worker, at
from .resources import patiently

LOG = logging.getLogger(__name__)


@contextmanager
def attached(
    azure: Azure, worker: Worker, clones: Sequence[str], clock: Clock
) -> Iterator[list[tuple[str, ...]]]:
    """Attach the clones to the worker for the duration of the block; yield each clone's possible device names.

    All are attached in one request: Azure allows about twelve changes to a VM in a row. Clones of another run are left
    alone: an execution that the orchestrator has given up may still be reading them from a pool's worker.
    """
    luns: list[int] = []

    def added(held: list[Json]) -> list[Json]:
        others = without(held, clones)  # an update that failed in Azure may have attached some
        used = {entry.get("lun") for entry in others}
        luns[:] = [lun for lun in range(len(others) + len(clones)) if lun not in used][: len(clones)]
        return [*others, *(_attached(azure, lun, clone) for lun, clone in zip(luns, clones, strict=True))]

    try:
        change(azure, worker.vm, added, clock)
        yield [_devices(lun) for lun in luns]
    except BaseException:
        try:
            detach(azure, worker.vm, clones, clock)
        except (AzureError, DeadlinePassed) as error:
            # The first error is the one to raise, and deleting the worker detaches the clones too.
            LOG.warning("could not detach the clones: %s", error)
        raise
    detach(azure, worker.vm, clones, clock)


def emptied(azure: Azure, vm: str, report: Report, clock: Clock) -> bool:
    """Deallocate a pool's worker and detach its data disks, if it has any; return whether it had.

    They are clones of a dead run, and the worker may have booted from one of them since.
    """
    disks = at(azure.get(vm), "properties.storageProfile.dataDisks", [])
    if not disks:
        return False
    name = names.name_of(vm)
    count = counted(len(disks), "disk")
    report(Notice(f"the worker {name} has {count} of another run attached: stopping it, then detaching them"))
    azure.deallocate(vm)
    change(azure, vm, lambda _: [], clock)
    return True


def detach(azure: Azure, vm: str, disks: Collection[str], clock: Clock) -> None:
    """Detach these disks, and no others, from a VM."""
    change(azure, vm, lambda held: without(held, disks), clock)


def without(held: Sequence[Json], disks: Collection[str]) -> list[Json]:
    """The entries of `held`, a VM's data disks, except those of `disks`."""
    excluded = {disk.lower() for disk in disks}
    return [entry for entry in held if str(at(entry, "managedDisk.id", "")).lower() not in excluded]


def free(azure: Azure, ids: Iterable[str], clock: Clock) -> None:
    """Detach the disks among `ids`, which are about to be deleted, from any pool workers that hold them."""
    holders: dict[str, list[str]] = {}
    for id in ids:
        if not isinstance(id, names.BlobsId) and names.kind_of(id) == "disk":
            holder = (azure.find(id) or {}).get("managedBy")
            holders.setdefault(holder or "", []).append(id)
    holders.pop("", None)
    for vm, disks in holders.items():
        document = azure.find(vm)
        if document is not None and names.POOL_TAG in names.tags_of(document):
            detach(azure, vm, disks, clock)


def _attached(azure: Azure, lun: int, clone: str) -> Json:
    return {
        "lun": lun,
        "createOption": "Attach",
        "caching": "None",
        "managedDisk": {"id": clone},
        **deleted_along(azure),
    }


def change(azure: Azure, vm: str, change: Callable[[list[Json]], list[Json]], clock: Clock) -> None:
    """Apply `change` to the list of a VM's data disks. Waits while another operation blocks the update."""

    def once() -> None:
        document = azure.get(vm)
        held: list[Json] = at(document, "properties.storageProfile.dataDisks", [])
        entries = change(held)
        if entries != held:
            body = {"properties": {"storageProfile": {"dataDisks": entries}}}
            azure.patch_vm(vm, body, document.get("etag", ""))

    patiently(once, f"changing the disks of {vm}", clock, report=azure.report)


def deleted_along(azure: Azure) -> Json:
    """The property that makes Azure delete a disk along with its VM; {} if this Azure does not support it."""
    return {"deleteOption": "Delete"} if azure.is_modern else {}


def _devices(lun: int) -> tuple[str, ...]:
    """The udev names of the disk at `lun`, on older and on newer images."""
    return (f"/dev/disk/azure/scsi1/lun{lun}", f"/dev/disk/azure/data/by-lun/{lun}")
