"""Unmanaged disks, which are VHD blobs: finds them, takes snapshots and imports them for the worker.

Since 2026 Azure has deallocated all VMs with such disks for good, and it attaches no VHD blob to any VM. There are two
ways to read them. *Import*: a snapshot of the blob becomes a managed disk for the worker, so that unchanged data never
leaves Azure. *Direct*: this process reads and hashes the allocated pages of the snapshot, or those that have changed
since an earlier one; it needs neither import nor worker. With the mechanism `snapshots` all are read directly; else
import is tried first, and the choice is reported.

The VHD footer is not part of the disk. A leased blob can be snapshotted, and the snapshot's metadata is our own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .. import vhd
from ..azure import names
from ..azure.blobs import Blob, Storage
from ..errors import AzureError, CloudUnreachable, NotFound, Unsupported
from ..events import Notice, Report
from ..model import Disk, Json, at
from ..run.resources import Resources
from ..threads import ordered


def documents(storage: Storage, entries: Sequence[Json]) -> list[Json]:
    """The VHDs of a VM's disk entries, each described like a managed disk.

    Raises NotFound if a blob is missing or in no account of the subscription, Unsupported if it is not a fixed VHD.
    """
    uris = [str(at(entry, "vhd.uri")) for entry in entries if at(entry, "vhd.uri")]
    return list(ordered(lambda uri: _document(storage, uri), uris, threads=4, ahead=8))


def freeze_all(
    resources: Resources,
    storage: Storage,
    disks: Sequence[Disk],
    tags: Callable[[Disk], Mapping[str, str]] = lambda _: {},
) -> dict[str, Blob]:
    """Take snapshots of the blobs of all disks concurrently and return them by disk name. `tags`: see `freeze`."""

    def freeze(disk: Disk) -> Blob:
        return resources.freeze(_blob(storage, disk.id), f"snapshot-{disk.name}", tags(disk))

    with resources.undone_on_error():
        taken = ordered(
            freeze,
            disks,
            threads=len(disks) or 1,
            ahead=len(disks) or 1,
        )
        return {disk.name: snapshot for disk, snapshot in zip(disks, taken, strict=True)}


def must_be_direct(storage: Storage, disk: Disk, location: str) -> str:
    """The reason why a disk cannot be imported, if it is known in advance; "" otherwise."""
    account_location = _blob(storage, disk.id).account.location
    if account_location != location and storage.interim() is None:
        return (
            f"its storage account is in {account_location}, the VM is in {location}, and no storage container is "
            "configured"
        )
    return ""


def import_all(
    resources: Resources,
    storage: Storage,
    disks: Sequence[Disk],
    frozen: dict[str, Blob],
    report: Report,
    before: int = 0,
) -> dict[str, str]:
    """Import the snapshot of each disk as a managed disk for the worker; return the ids by disk name.

    Disks that cannot be imported are left out, and the reason is reported. `before` counts the previous imports of
    these disks in this run.
    """
    imported: dict[str, str] = {}
    for disk, result in zip(
        disks,
        ordered(
            lambda disk: _imported(resources, storage, disk, frozen[disk.name], before),
            disks,
            threads=8,
            ahead=16,
        ),
        strict=True,
    ):
        if result.id:
            imported[disk.name] = result.id
            report(Notice(f"{disk.name}: the VHD is imported and read by the worker"))
        else:
            report(Notice(f"{disk.name}: the VHD is read directly, by this host, because {result.why_not}"))
    return imported


@dataclass(frozen=True)
class _Import:
    """The id of the managed disk that a VHD was imported as, or the reason why it could not be."""

    id: str = ""
    why_not: str = ""


def _imported(resources: Resources, storage: Storage, disk: Disk, snapshot: Blob, before: int) -> _Import:
    """Import a snapshot as a managed disk, if need be from a copy of it."""
    reason = must_be_direct(storage, disk, resources.run.location)
    if reason:
        return _Import(why_not=reason)
    name = f"{disk.name}-{before + 1}" if before else disk.name
    try:
        if snapshot.account.location == resources.run.location:
            return _disk_from(resources, disk, snapshot, f"clone-{name}")
    except CloudUnreachable:
        raise
    except AzureError as error:
        reason = f"Azure does not import it: {error}"
    container = storage.interim()
    if container is None:
        return _Import(why_not=reason)
    try:
        container.ensure()
        copy = resources.copy_blob(snapshot, container, f"copy-{name}")
        return _disk_from(resources, disk, copy, f"import-{name}")
    except CloudUnreachable:
        raise
    except AzureError as error:
        return _Import(why_not=f"Azure imports neither it nor a copy in {container.url}: {error}")


def _disk_from(resources: Resources, disk: Disk, blob: Blob, role: str) -> _Import:
    body: Json = {
        "sku": {"name": disk.sku},
        "properties": {
            "creationData": {
                "createOption": "Import",
                "sourceUri": blob.url,
                "storageAccountId": blob.account.id,
            },
            "networkAccessPolicy": "DenyAll",
            "publicNetworkAccess": "Disabled",
        },
    }
    document = resources.create("disk", role, body)
    size = at(document, "properties.diskSizeBytes", 0)
    if size != disk.size_bytes:
        return _Import(why_not=f"the imported disk has {size} bytes instead of {disk.size_bytes}")
    return _Import(str(document["id"]))


def _blob(storage: Storage, uri: str) -> Blob:
    blob = storage.at(uri)
    if blob is None:
        raise NotFound(
            f"{uri} is in no storage account that the identity can see",
            remedy="Give the identity the role Reader on the storage account of the VHD.",
        )
    return blob


def _document(storage: Storage, uri: str) -> Json:
    blob = _blob(storage, uri)
    properties = blob.find()
    if properties is None:
        raise NotFound(
            f"{uri} does not exist, but the VM uses it as a disk",
            remedy="Restore the VHD, or leave the disk out with exclude_disks.",
        )
    if properties.kind != "PageBlob" or properties.size < vhd.FOOTER:
        raise Unsupported(
            f"{uri} cannot be read as a disk: it is a {properties.kind} of {properties.size} bytes",
            remedy="Restore the VHD, or leave the disk out with exclude_disks.",
        )
    size = vhd.content_size(blob.read(properties.size - vhd.FOOTER, vhd.FOOTER), properties.size, uri)
    identity = hashlib.blake2b(f"{uri.lower()} {properties.made}".encode(), digest_size=16).hexdigest()
    return {
        "id": uri,
        "name": names.name_of(uri),
        "sku": {"name": "Standard_LRS"},
        "properties": {"diskSizeBytes": size, "uniqueId": identity},
    }
