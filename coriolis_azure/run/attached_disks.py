"""Changes the data disks of a worker entry by entry: replacing the whole list would detach clones of other runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from ..azure import names
from ..azure.client import Azure
from ..clock import Clock
from ..errors import AzureError, DeadlinePassed, HostExhausted
from ..events import Notice, Report, counted
from ..model import Json, Worker, at
from ..threads import Lock
from .resources import patiently

LOG = logging.getLogger(__name__)


@contextmanager
def attached(azure: Azure, worker: Worker, clones: Sequence[str], clock: Clock) -> Iterator[list[int]]:
    """Attach the clones to the worker for the duration of the block; yield each clone's LUN. See `attach`."""
    try:
        yield attach(azure, worker, clones, clock)
    except BaseException:
        try:
            detach(azure, worker.vm, clones, clock)
        except (AzureError, DeadlinePassed) as error:
            # The first error is the one to raise, and deleting the worker detaches the clones too.
            LOG.warning("could not detach the clones: %s", error)
        raise
    detach(azure, worker.vm, clones, clock)


def attach(azure: Azure, worker: Worker, clones: Sequence[str], clock: Clock) -> list[int]:
    """Attach the clones to the worker; return each clone's LUN. Deleting the worker deletes them, see `deleted_along`.

    All are attached in one request: Azure allows about twelve changes to a VM in a row. Clones of another run are left
    alone: an execution that the orchestrator has given up may still be reading them from a pool's worker.
    """
    luns: list[int] = []

    def added(held: list[Json]) -> list[Json]:
        others = without(held, clones)  # an update that failed in Azure may have attached some
        used = {entry.get("lun") for entry in others}
        luns[:] = [lun for lun in range(len(others) + len(clones)) if lun not in used][: len(clones)]
        return [*others, *(_attached(azure, lun, clone) for lun, clone in zip(luns, clones, strict=True))]

    change(azure, worker.vm, added, clock)
    return list(luns)


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


def free(azure: Azure, ids: Iterable[str], clock: Clock) -> list[str]:
    """Detach the disks among `ids`, which are about to be deleted, from workers of several runs that hold them.

    A worker that is about to be deleted, too, keeps them. Returns the ids of the workers that could not be changed: a
    locked one must not keep everything else alive.
    """
    ids, stuck = list(ids), list[str]()
    disks = [id for id in ids if not isinstance(id, names.BlobsId) and names.kind_of(id) == "disk"]
    for vm, held in _holders(azure, disks).items():
        try:
            document = azure.find(vm)
            if document is None or vm.lower() in (id.lower() for id in ids):
                continue
            tags = names.tags_of(document)
            if names.POOL_TAG in tags or tags.get(names.INSTANCE_TAG) == names.SEVERAL:
                detach(azure, vm, held, clock)
        except (AzureError, DeadlinePassed, HostExhausted) as error:
            LOG.error("could not detach %s: %s", ", ".join(held), error)
            stuck.append(vm)
    return stuck


def _holders(azure: Azure, disks: Iterable[str]) -> dict[str, list[str]]:
    """The VMs that hold these disks, with the disks of each. What cannot be read tells why when it is deleted."""
    holders: dict[str, list[str]] = {}
    for id in disks:
        with suppress(AzureError, DeadlinePassed, HostExhausted):
            if vm := (azure.find(id) or {}).get("managedBy"):
                holders.setdefault(vm, []).append(id)
    return holders


def _attached(azure: Azure, lun: int, clone: str) -> Json:
    return {
        "lun": lun,
        "createOption": "Attach",
        "caching": "None",
        "managedDisk": {"id": clone},
        **deleted_along(azure),
    }


# What turns a VM's data disks into what they are to be.
Change = Callable[[list[Json]], list[Json]]


@dataclass(eq=False)
class _Asked:
    """A change that a thread asks for, and what became of it. `alone`: it failed together with others."""

    change: Change
    alone: bool = False
    done: bool = False
    error: Exception | None = None


@dataclass(eq=False)
class _Queue:
    """The changes of one VM's disks that wait, and the turn of the thread that makes them."""

    turn: Lock = field(default_factory=Lock)
    waiting: list[_Asked] = field(default_factory=list)


_queues: WeakValueDictionary[str, _Queue] = WeakValueDictionary()
_guard = Lock()


def change(azure: Azure, vm: str, change: Change, clock: Clock) -> None:
    """Apply `change` to the list of a VM's data disks. Waits while another operation blocks the update.

    Changes of one VM that threads ask for meanwhile go into the next request together: Azure allows a VM few of them.
    If that fails, each is made alone, so that none fails because of another.
    """
    asked = _Asked(change)
    with _guard:
        queue = _queues.setdefault(vm.lower(), _Queue())
        queue.waiting.append(asked)
    while not asked.done:
        with queue.turn:
            if not asked.done:
                _take_turn(azure, vm, queue, asked, clock)
    if asked.error is not None:
        raise asked.error


def _take_turn(azure: Azure, vm: str, queue: _Queue, asked: _Asked, clock: Clock) -> None:
    """Make a change, and those that wait beside it."""
    with _guard:
        batch = [asked] if asked.alone else [each for each in queue.waiting if not each.alone]
        queue.waiting = [each for each in queue.waiting if each not in batch]
    try:
        _changed(azure, vm, [each.change for each in batch], clock)
    except Exception as error:  # noqa: BLE001 - raised in the thread that asked for the change
        if batch == [asked]:
            asked.done, asked.error = True, error
            return
        for each in batch:
            each.alone = True
        with _guard:
            queue.waiting += batch
    except BaseException:  # an interrupt of this thread is none of the others
        with _guard:
            queue.waiting += [each for each in batch if each is not asked]
        raise
    else:
        for each in batch:
            each.done = True


def _changed(azure: Azure, vm: str, changes: Sequence[Change], clock: Clock) -> None:
    """Apply changes to a VM's data disks in one request."""

    def once() -> None:
        document = azure.get(vm)
        held: list[Json] = at(document, "properties.storageProfile.dataDisks", [])
        entries = held
        for each in changes:
            entries = each(entries)
        if entries != held:
            body = {"properties": {"storageProfile": {"dataDisks": entries}}}
            azure.patch_vm(vm, body, document.get("etag", ""))

    patiently(once, f"changing the disks of {vm}", clock, report=azure.report)


def deleted_along(azure: Azure) -> Json:
    """The property that makes Azure delete a disk along with its VM; {} if this Azure does not support it."""
    return {"deleteOption": "Delete"} if azure.is_modern else {}


def devices(lun: int) -> tuple[str, ...]:
    """The udev names of the disk at `lun`, on older and on newer images."""
    return (f"/dev/disk/azure/scsi1/lun{lun}", f"/dev/disk/azure/data/by-lun/{lun}")
