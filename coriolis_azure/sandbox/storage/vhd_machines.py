"""Legacy VMs whose disks are VHD blobs. Azure has deallocated them permanently, but their blobs remain."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from coriolis_azure import vhd
from coriolis_azure.sandbox.catalog import VmSpec
from coriolis_azure.sandbox.content import copy_sparse, extents
from coriolis_azure.sandbox.relations import MACHINES, STORAGE
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.storage.accounts import named, new_account
from coriolis_azure.sandbox.storage.store import Account, Blob, Container, Lease, new_id
from coriolis_azure.sandbox.wire import Json
from coriolis_azure.sandbox.world import World, now

CONTAINER = "vhds"


def new_machine(
    world: World, machine_id: str, location: str, spec: VmSpec, files: Sequence[Path]
) -> Resource:
    """Add a deallocated VM without NICs whose disks are VHD blobs with the content of `files`."""
    account = spec.unmanaged
    name = machine_id.rpartition("/")[2]
    if named(world, account) is None:
        provider = machine_id.rpartition(f"/{MACHINES}/")[0]
        new_account(world, f"{provider}/{STORAGE}/{account}", location)
    entries: list[Json] = []
    for index, file in enumerate(files):
        role = "os" if index == 0 else f"data-{index - 1}"
        kind = "OSDisk" if index == 0 else "DataDisk"
        owner = {"microsoftazurecompute_vmname": name, "microsoftazurecompute_disktype": kind}
        uri = f"{account}/{CONTAINER}/{name}-{role}.vhd"
        put_image(world, uri, file, owner, leased=True)
        entry: Json = {
            "name": f"{name}-{role}",
            "createOption": "Attach",
            "vhd": {"uri": uri},
            "caching": "ReadWrite" if index == 0 else "None",
        }
        entries.append(
            entry | ({"osType": spec.system} if index == 0 else {"lun": index - 1, "toBeDetached": False})
        )
    document: Json = {
        "name": name,
        "id": machine_id,
        "type": MACHINES,
        "location": location,
        "tags": spec.tags,
        "etag": '"1"',
        "properties": {
            "vmId": str(uuid.uuid4()),
            "hardwareProfile": {"vmSize": spec.size},
            "storageProfile": {"osDisk": entries[0], "dataDisks": entries[1:]},
            "networkProfile": {"networkInterfaces": []},
            "provisioningState": "Succeeded",
            "timeCreated": now(),
        },
    }
    return world.state.add(Resource(document, {"power": "deallocated"}))


def put_image(
    world: World, uri: str, file: Path, metadata: dict[str, str] | None = None, *, leased: bool = False
) -> Blob:
    """Make a page blob with the fixed VHD of a raw file, replacing any blob there. `uri`: see `image`."""
    account, container, name = uri.split("/", 2)
    store = world.blobs
    with store.lock:
        containers = store.accounts.setdefault(account, Account()).containers
        if container not in containers:
            containers[container] = Container(container, "", "")
            store.changed(containers[container])
        size = vhd.rounded(file.stat().st_size)
        blob = store.new_blob(containers[container], name, "PageBlob", 0)
        target = store.contents.path(blob.file)
        target.unlink()
        copy_sparse(file, target)
        os.truncate(target, size)
        with target.open("rb") as content:
            for start, end in extents(content.fileno(), size):
                blob.note(start - start % 512, min(size, end + -end % 512), written=True)
        os.truncate(target, size + vhd.FOOTER)
        blob.size = size + vhd.FOOTER
        store.write(blob, size, vhd.footer(size, uuid.uuid4(), datetime.now(timezone.utc)))
        blob.metadata = metadata or {}
        if leased:
            blob.lease = Lease(new_id(), -1, None)
        store.changed(blob)
        store.save()
    return blob


def image(world: World, uri: str) -> Blob:
    """The blob of a VM's disk, by its path in the VM's document: account/container/name."""
    account, container, name = uri.split("/", 2)
    blob = world.blobs.accounts[account].containers[container].find(name)
    if blob is None:
        raise KeyError(uri)
    return blob
