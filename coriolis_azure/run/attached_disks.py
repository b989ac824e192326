"""The data disks of a worker, changed entry by entry: to replace the list would detach other runs' clones."""

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
    """The clones on the worker while the block runs; gives, for each, the device names it may have there.

    All are attached in one request: Azure allows a VM about twelve changes in a row. A pool's worker may hold clones of
    another run, which an execution that was given up goes on with: they stay as they are.
    """
    luns: list[int] = []

    def added(held: list[Json]) -> list[Json]:
        others = without(held, clones)  # an update that Azure has given up may have attached some
        used = {entry.get("lun") for entry in others}
        luns[:] = [lun for lun in range(len(others) + len(clones)) if lun not in used][: len(clones)]
        return [*others, *(_attached(azure, lun, clone) for lun, clone in zip(luns, clones, strict=True))]

    try:
        change(azure, worker.vm, added, clock)
        yield [_devices(lun) for lun in luns]
    except BaseException:
        try:
            detach(azure, worker.vm, clones, clock)
        except (
            AzureError,
            DeadlinePassed,
        ) as error:  # the first error is the one to tell; the worker's deletion detaches too
            LOG.warning("could not detach the clones: %s", error)
        raise
    detach(azure, worker.vm, clones, clock)


def emptied(azure: Azure, vm: str, report: Report, clock: Clock) -> bool:
    """Detach whatever data disks a worker of a pool has, after it was deallocated; whether it had any.

    They are clones of a run that died, and may be what the worker has booted from since.
    """
    disks = at(azure.get(vm), "properties.storageProfile.dataDisks", [])
    if not disks:
        return False
    name = names.name_of(vm)
    found = counted(len(disks), "disk")
    report(Notice(f"the worker {name} has {found} of another run attached: it is stopped and rid of them"))
    azure.deallocate(vm)
    change(azure, vm, lambda _: [], clock)
    return True


def detach(azure: Azure, vm: str, disks: Collection[str], clock: Clock) -> None:
    """Take these disks, and no others, from a VM."""
    change(azure, vm, lambda held: without(held, disks), clock)


def without(held: Sequence[Json], disks: Collection[str]) -> list[Json]:
    """The entries of a VM's data disks but those of `disks`."""
    leaving = {disk.lower() for disk in disks}
    return [entry for entry in held if str(at(entry, "managedDisk.id", "")).lower() not in leaving]


def free(azure: Azure, ids: Iterable[str], clock: Clock) -> None:
    """Take the disks among `ids`, which are to be deleted, from the workers of pools that hold them."""
    holders: dict[str, list[str]] = {}
    for id in ids:
        if not names.is_blob(id) and names.kind_of(id) == "disk":
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
    """Make of a VM's data disks what `change` says. What another operation on it holds up is waited out."""

    def once() -> None:
        document = azure.get(vm)
        held: list[Json] = at(document, "properties.storageProfile.dataDisks", [])
        entries = change(held)
        if entries != held:
            body = {"properties": {"storageProfile": {"dataDisks": entries}}}
            azure.patch_vm(vm, body, document.get("etag", ""))

    patiently(once, f"changing the disks of {vm}", clock, report=azure.report)


def deleted_along(azure: Azure) -> Json:
    """That a disk goes with its VM, where Azure knows of that."""
    return {"deleteOption": "Delete"} if azure.is_modern else {}


def _devices(lun: int) -> tuple[str, ...]:
    """The names that udev gives to the disk at `lun`: older images, newer ones."""
    return (f"/dev/disk/azure/scsi1/lun{lun}", f"/dev/disk/azure/data/by-lun/{lun}")
