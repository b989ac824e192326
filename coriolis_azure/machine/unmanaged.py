"""Disks that are VHD blobs: found, frozen, and read by the worker or, where that cannot be, from here.

Since 2026 Azure has deallocated all VMs with such disks for good, and attaches no VHD blob to any VM. Two ways are
left. *Import*: a snapshot of the blob becomes a managed disk for the worker, so that what has not changed never
leaves Azure. *Direct*: the allocated pages of the snapshot are read by this process and hashed here; all of them
travel each time, but neither import nor worker is needed. Import is tried first, and who watches is told which it is.

The footer of the VHD is no part of the disk. A snapshot can be taken of a leased blob, and its metadata are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
    """The VHDs of a VM's disk entries, each as the document of a managed disk would tell it.

    NotFound where a blob is missing or in no account of the subscription, Unsupported where it is no fixed VHD.
    """
    uris = [str(at(entry, "vhd.uri")) for entry in entries if at(entry, "vhd.uri")]
    return list(ordered(lambda uri: _document(storage, uri), uris, threads=4, ahead=8))


def freeze_all(resources: Resources, storage: Storage, disks: Sequence[Disk]) -> dict[str, Blob]:
    """A snapshot of the blob of every disk, taken side by side; by disk name."""
    with resources.undone_on_error():
        taken = ordered(
            lambda disk: resources.freeze(_blob(storage, disk.id), f"snapshot-{disk.name}"),
            disks,
            threads=len(disks) or 1,
            ahead=len(disks) or 1,
        )
        return {disk.name: snapshot for disk, snapshot in zip(disks, taken, strict=True)}


def must_be_direct(storage: Storage, disk: Disk, location: str) -> str:
    """Why a disk cannot be imported, as far as it is known before anything is tried; empty when it may be."""
    found = _blob(storage, disk.id).account.location
    if found != location and storage.interim() is None:
        return (
            f"its storage account is in {found}, the VM in {location}, and no storage container is configured"
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
    """A managed disk from the snapshot of each disk, for the worker; ids by disk name.

    A disk that is missing there cannot be imported, and `report` was told why. `before`: how often these disks were
    imported in this run.
    """
    made: dict[str, str] = {}
    for disk, found in zip(
        disks,
        ordered(
            lambda disk: _imported(resources, storage, disk, frozen[disk.name], before),
            disks,
            threads=8,
            ahead=16,
        ),
        strict=True,
    ):
        if found.id:
            made[disk.name] = found.id
            report(Notice(f"{disk.name}: its VHD is imported and read by the worker"))
        else:
            report(Notice(f"{disk.name}: its VHD is read directly, by this host, because {found.why_not}"))
    return made


@dataclass(frozen=True)
class _Import:
    """The id of a managed disk that a VHD was imported as; else why there is none."""

    id: str = ""
    why_not: str = ""


def _imported(resources: Resources, storage: Storage, disk: Disk, snapshot: Blob, before: int) -> _Import:
    """A managed disk from a snapshot, or, if need be, from a copy of it."""
    why = must_be_direct(storage, disk, resources.run.location)
    if why:
        return _Import(why_not=why)
    name = f"{disk.name}-{before + 1}" if before else disk.name
    try:
        if snapshot.account.location == resources.run.location:
            return _disk_from(resources, disk, snapshot, f"clone-{name}")
    except CloudUnreachable:
        raise
    except AzureError as error:
        why = f"Azure does not import it: {error}"
    container = storage.interim()
    if container is None:
        return _Import(why_not=why)
    try:
        container.ensure()
        copy = resources.copy_blob(snapshot, container, f"copy-{name}")
        return _disk_from(resources, disk, copy, f"import-{name}")
    except CloudUnreachable:
        raise
    except AzureError as error:
        return _Import(why_not=f"Azure does not import it, nor a copy in {container.url}: {error}")


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
    made = resources.create("disk", role, body)
    size = at(made, "properties.diskSizeBytes", 0)
    if size != disk.size_bytes:
        return _Import(why_not=f"the imported disk has {size} bytes instead of {disk.size_bytes}")
    return _Import(str(made["id"]))


def _blob(storage: Storage, uri: str) -> Blob:
    found = storage.at(uri)
    if found is None:
        raise NotFound(
            f"{uri} is in no storage account that the identity sees",
            remedy="Give the identity the role Reader on the storage account of the VHD.",
        )
    return found


def _document(storage: Storage, uri: str) -> Json:
    blob = _blob(storage, uri)
    found = blob.find()
    if found is None:
        raise NotFound(
            f"{uri} does not exist, but a VM names it as a disk",
            remedy="Restore the VHD, or leave the disk out with exclude_disks.",
        )
    if found.kind != "PageBlob" or found.size < vhd.FOOTER:
        raise Unsupported(
            f"{uri} cannot be read as a disk: it is a {found.kind} of {found.size} bytes",
            remedy="Restore the VHD, or leave the disk out with exclude_disks.",
        )
    size = vhd.content_size(blob.read(found.size - vhd.FOOTER, vhd.FOOTER), found.size, uri)
    identity = hashlib.blake2b(f"{uri.lower()} {found.made}".encode(), digest_size=16).hexdigest()
    return {
        "id": uri,
        "name": names.name_of(uri),
        "sku": {"name": "Standard_LRS"},
        "properties": {"diskSizeBytes": size, "uniqueId": identity},
    }
