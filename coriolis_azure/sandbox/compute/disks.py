"""Managed disks and snapshots: created empty, as copies or by import; updated, grown, deleted.

`diskSizeBytes` is the exact size of the content, and `diskSizeGB` is that size in GiB, rounded up. (Disks in Azure have
whole GiB; here a disk may be a copy of any raw file.)
"""

from __future__ import annotations

import copy
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from coriolis_azure import vhd
from coriolis_azure.sandbox.catalog import DISK_SKUS, FILLED_LATER, SNAPSHOT_SKUS
from coriolis_azure.sandbox.compute import exports, network_access, snapshot_limits
from coriolis_azure.sandbox.relations import DISK_POINTS, DISKS, SNAPSHOTS, STORAGE, machine_of_disk, same
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.storage import imports
from coriolis_azure.sandbox.wire import ArmError, Json, Response, bad_request, invalid, not_allowed
from coriolis_azure.sandbox.world import (
    Call,
    Polling,
    World,
    checked_tags,
    checked_zones,
    deleted,
    no_content,
    now,
    placed,
)

GIB = 1 << 30
_MAX_GIB = 32767
_FILLED_PER_READ = 40.0  # the percentage by which each GET advances the copy of a snapshot
_FAMILY = uuid.UUID("2f0f4b3e-2f5f-4c3b-9f0e-6f1f0c7d1a11")
# What a copy inherits from its source unless the request sets it.
_INHERITED = (
    "osType",
    "hyperVGeneration",
    "supportedCapabilities",
    "purchasePlan",
    "securityProfile",
    "encryption",
)
_SETTABLE = (
    *_INHERITED,
    "networkAccessPolicy",
    "publicNetworkAccess",
    "diskAccessId",
    "dataAccessAuthMode",
    "maxShares",
    "burstingEnabled",
)


@dataclass(frozen=True)
class _Kind:
    type: str
    skus: dict[str, str]
    default_sku: str

    @property
    def snapshot(self) -> bool:
        return self.type == SNAPSHOTS


_DISK = _Kind(DISKS, DISK_SKUS, "Standard_LRS")
_SNAPSHOT = _Kind(SNAPSHOTS, SNAPSHOT_SKUS, "Standard_LRS")


def new_disk(
    world: World, disk_id: str, location: str, content: str, properties: Json, **top: object
) -> Resource:
    """Add a finished disk with an existing content; `top` are outer fields (sku, tags, zones)."""
    document = _document(DISKS, disk_id, location, properties, top)
    document["properties"]["provisioningState"] = "Succeeded"
    return world.state.add(Resource(document, {"content": content}))


def put(world: World, call: Call, kind: _Kind) -> Response:
    """Create or update a disk or snapshot: 202."""
    disk_id = world.canonical_id(call, kind.type)
    for operation in world.pending(disk_id):
        world.finish(operation)
    existing = world.state.find(disk_id)
    location = placed(world, call, kind.type, existing)
    if len(call.part["name"]) > 80:
        raise invalid(f"The name of the resource '{call.part['name']}' is longer than 80 characters.", "name")
    if existing is None:
        _create(world, call, kind, disk_id, location)
        return _accepted(world, call, disk_id, location, _echo(call, kind, disk_id, location), "disk-settled")
    return _update(world, call, kind, existing)


def patch(world: World, call: Call, kind: _Kind) -> Response:
    """Update a disk or snapshot: 202."""
    disk = world.existing(call, kind.type)
    world.unlocked(disk.id, "write")
    return _update(world, call, kind, disk)


def delete(world: World, call: Call, kind: _Kind) -> Response:
    """Delete a disk or snapshot: 202, or 204 if there is none; 409 while it is attached to a VM."""
    disk = deleted(world, call, kind.type)
    if disk is None:
        return no_content()
    owner = machine_of_disk(world.state, disk.id)
    if owner is not None:
        raise not_allowed(f"Disk {disk.name} is attached to VM {owner.id}.")
    exports.not_exported(world, disk)
    headers = world.begin(call, "disk", disk.location, "disk-removed", disk.id)
    return Response(202, headers)


def get_snapshot(world: World, call: Call) -> Response:
    """Show a snapshot. One that is copied in the background advances with each GET."""
    snapshot = world.existing(call, SNAPSHOTS)
    percent = snapshot.properties.get("completionPercent")
    if percent is not None:
        snapshot.properties["completionPercent"] = min(100.0, percent + _FILLED_PER_READ)
    return Response.of(200, view(world, snapshot))


def view(world: World, disk: Resource) -> Json:
    """The document, completed with what follows from its content and its VM."""
    document = copy.deepcopy(disk.document)
    properties = document["properties"]
    size = world.contents.size(disk.hidden["content"])
    properties["diskSizeBytes"] = size
    properties["diskSizeGB"] = gib(size)
    properties["diskState"] = "Unattached"
    owner = machine_of_disk(world.state, disk.id)
    if owner is not None:
        document["managedBy"] = owner.id
        properties["diskState"] = "Reserved" if owner.hidden["power"] == "deallocated" else "Attached"
    if exports.active(world, disk):
        properties["diskState"] = "ActiveSAS"
    return document


def gib(size: int) -> int:
    """Bytes as GiB, rounded up."""
    return -(-size // GIB)


def _create(world: World, call: Call, kind: _Kind, disk_id: str, location: str) -> None:
    sku = _sku(call, kind) or kind.default_sku
    zones = checked_zones(call.body, location)
    tags = checked_tags(call.body)
    requested = call.body.get("properties") or {}
    network_access.check(world, requested, {})
    properties: Json = {"creationData": {**(requested.get("creationData") or {})}}
    properties |= {name: requested[name] for name in _SETTABLE if requested.get(name) is not None}
    content = _content(world, kind, location, requested, properties)
    try:
        if kind.snapshot:
            _complete_snapshot(world, disk_id, requested, properties)
    except ArmError:
        world.release_content(content)
        raise
    top: Json = {"sku": {"name": sku, "tier": kind.skus[sku]}, "tags": tags}
    if zones:
        top["zones"] = zones
    document = _document(kind.type, disk_id, location, properties, top)
    document["properties"]["provisioningState"] = "Updating"
    hidden: Json = {"content": content}
    if properties.get("incremental"):
        hidden["generation"] = world.contents.end_generation(content)
    world.state.add(Resource(document, hidden))


def _complete_snapshot(world: World, snapshot_id: str, requested: Json, properties: Json) -> None:
    """Add what snapshots have beside disks; refuse what is not imitated, or one too many."""
    source_sku = _sku_of(world, properties["creationData"])
    if source_sku in FILLED_LATER:
        if not requested.get("incremental"):
            raise bad_request(
                f"Only incremental snapshots of disks with account type {source_sku} are supported."
            )
        properties["completionPercent"] = 0.0
    properties["incremental"] = bool(requested.get("incremental", False))
    if properties["incremental"]:
        source = properties["creationData"].get("sourceUniqueId", snapshot_id)
        properties["incrementalSnapshotFamilyId"] = family(source)
        snapshot_limits.count(world, properties["incrementalSnapshotFamilyId"])


def family(source: str) -> str:
    """The id of the family of what is taken of a disk with this unique id."""
    return str(uuid.uuid5(_FAMILY, source))


def _content(world: World, kind: _Kind, location: str, requested: Json, properties: Json) -> str:
    creation = properties["creationData"]
    option = creation.get("createOption")
    requested_gib = _requested_gib(requested)
    if option == "Empty" and not kind.snapshot:
        if requested_gib is None:
            raise ArmError(
                400, "InvalidParameter", "Required parameter 'diskSizeGB' is missing (null).", "diskSizeGB"
            )
        return world.contents.zeros(requested_gib * GIB)
    if option == "Import":
        return _imported(world, location, creation, requested_gib)
    if option != "Copy" and (option != "Restore" or kind.snapshot):
        raise bad_request(
            f"The sandbox does not imitate createOption '{option}' of {kind.type}: it knows Empty and Restore (disks), "
            "Import and Copy."
        )
    source = _source(world, creation, location, {DISK_POINTS} if option == "Restore" else {DISKS, SNAPSHOTS})
    creation["sourceUniqueId"] = source.properties.get("uniqueId") or source.properties["sourceUniqueId"]
    for name in _INHERITED:
        if name in source.properties:
            properties.setdefault(name, copy.deepcopy(source.properties[name]))
    return copied(world, source, requested_gib)


def _imported(world: World, location: str, creation: Json, requested_gib: int | None) -> str:
    """The content of a fixed VHD in a page blob."""
    uri, account_id = str(creation.get("sourceUri") or ""), creation.get("storageAccountId")
    for name in ("sourceUri", "storageAccountId"):
        if not creation.get(name):
            raise invalid(f"Required parameter '{name}' is missing (null).", name)
    account = world.state.find(str(account_id))
    if account is None or account.type != STORAGE:
        raise ArmError(404, "NotFound", f"Resource {str(account_id).rpartition('/')[2]} is not found.")
    if not same(account.location, location):
        raise bad_request(
            f"The storage account {account.name} is in location '{account.location}', but the disk is in "
            f"'{location}'. Source and target must be in the same location."
        )
    if "snapshot=" in uri and not world.imports_snapshots:
        raise invalid(f"The source blob {uri} is a snapshot.", "sourceUri")
    with world.blobs.lock:
        blob = imports.source(world, account, uri)
        content = world.contents.copied(world.blobs.contents.path(blob.file))
    size = blob.size - vhd.FOOTER
    os.truncate(world.contents.path(content), size)
    if requested_gib is not None and requested_gib > gib(size):
        world.contents.grow(content, requested_gib * GIB)
    return content


def _sku_of(world: World, creation: Json) -> str:
    """The account type of the source of a copy; "" if there is none."""
    source = world.state.find(str(creation.get("sourceResourceId") or ""))
    return str(source.document["sku"]["name"]) if source is not None else ""


def _source(world: World, creation: Json, location: str, kinds: set[str]) -> Resource:
    source_id = str(creation.get("sourceResourceId") or "")
    if not source_id:
        raise invalid("Required parameter 'sourceResourceId' is missing (null).", "sourceResourceId")
    source = world.state.find(source_id)
    if source is None or source.type not in kinds:
        raise ArmError(404, "NotFound", f"Resource {source_id.rpartition('/')[2]} is not found.")
    if not same(exports.location(source), location):
        raise bad_request(
            f"The source resource {source.id} is in location '{exports.location(source)}', but the target is in "
            f"'{location}'. Source and target must be in the same location."
        )
    if source.properties.get("completionPercent", 100.0) < 100.0:
        raise not_allowed(
            f"The snapshot {source.name} is still being copied: its completionPercent is not 100."
        )
    return source


def copied(world: World, source: Resource, requested_gib: int | None = None) -> str:
    """The name of the present content of a source, perhaps grown."""
    name: str = source.hidden["content"]
    size = world.contents.size(name)
    if requested_gib is not None and requested_gib < gib(size):
        raise invalid("Disks or snapshot cannot be resized down.", "diskSizeGB")
    owner = machine_of_disk(world.state, source.id)
    grows = requested_gib is not None and requested_gib > gib(size)
    # A running guest writes to its open file, so that content is copied; any other content is shared.
    if grows or (owner is not None and world.guests.known(owner.id)):
        name = world.contents.duplicate(name)
    if grows and requested_gib is not None:
        world.contents.grow(name, requested_gib * GIB)
    return name


def _update(world: World, call: Call, kind: _Kind, disk: Resource) -> Response:
    requested = call.body.get("properties") or {}
    requested_gib = _requested_gib(requested)
    sku = _sku(call, kind)
    tags = checked_tags(call.body) if "tags" in call.body else None
    network_access.check(world, requested, disk.properties)
    if requested_gib is not None and requested_gib < gib(world.contents.size(disk.hidden["content"])):
        echo = _echo(call, kind, disk.id, disk.location)
        return _accepted(world, call, disk.id, disk.location, echo, "disk-shrunk")
    if sku is not None and sku != disk.document["sku"]["name"]:
        owner = machine_of_disk(world.state, disk.id)
        if owner is not None and owner.hidden["power"] != "deallocated":
            raise not_allowed(
                f"Cannot change the account type of disk {disk.name} while it is attached to running VM "
                f"{owner.id}."
            )
        disk.document["sku"] = {"name": sku, "tier": kind.skus[sku]}
    if tags is not None:
        disk.document["tags"] = tags
    disk.properties.update({name: requested[name] for name in _SETTABLE if requested.get(name) is not None})
    if not disk.properties.get("diskAccessId"):
        disk.properties.pop("diskAccessId", None)
    grow(world, disk, requested_gib)
    disk.properties["provisioningState"] = "Updating"
    return _accepted(world, call, disk.id, disk.location, view(world, disk), "disk-settled")


def grow(world: World, disk: Resource, requested_gib: int | None) -> None:
    """Grow the disk to this size in GiB, if that is larger than its present size rounded up."""
    if requested_gib is None or requested_gib <= gib(world.contents.size(disk.hidden["content"])):
        return
    world.contents.grow(world.own_content(disk), requested_gib * GIB)


def _requested_gib(requested: Json) -> int | None:
    size = requested.get("diskSizeGB")
    if size is None:
        return None
    if not isinstance(size, int) or not 1 <= size <= _MAX_GIB:
        raise invalid(
            f"The value '{size}' of parameter diskSizeGB is out of range: 1 to {_MAX_GIB}.", "diskSizeGB"
        )
    return size


def _sku(call: Call, kind: _Kind) -> str | None:
    name = (call.body.get("sku") or {}).get("name")
    if name is None:
        return None
    if name not in kind.skus:
        raise invalid(
            f"The value '{name}' of parameter sku.name is not supported here: {', '.join(kind.skus)}.", "sku"
        )
    return str(name)


def _document(kind: str, disk_id: str, location: str, properties: Json, top: Json) -> Json:
    defaults: Json = {
        "encryption": {"type": "EncryptionAtRestWithPlatformKey"},
        "networkAccessPolicy": "AllowAll",
        "publicNetworkAccess": "Enabled",
    }
    if kind == DISKS:
        defaults |= {"diskIOPSReadWrite": 500, "diskMBpsReadWrite": 60}
    own = {"timeCreated": now(), "uniqueId": str(uuid.uuid4())}
    return {
        "name": disk_id.rpartition("/")[2],
        "id": disk_id,
        "type": kind,
        "location": location,
        **top,
        "properties": {**defaults, **properties, **own},
    }


def _echo(call: Call, kind: _Kind, disk_id: str, location: str) -> Json:
    """The body of a 202: what was sent, with the state."""
    sent: Json = {name: call.body[name] for name in ("tags", "sku", "zones") if name in call.body}
    properties = {**(call.body.get("properties") or {}), "provisioningState": "Updating"}
    name = call.part["name"]
    return {
        "name": name,
        "id": disk_id,
        "type": kind.type,
        "location": location,
        **sent,
        "properties": properties,
    }


def _accepted(world: World, call: Call, disk_id: str, location: str, body: Json, effect: str) -> Response:
    headers = world.begin(call, "disk", location, effect, disk_id, Polling(result=True))
    return Response.of(202, body, headers)


def _settled(world: World, disk_id: str) -> None:
    disk = world.state.find(disk_id)
    if disk is not None:
        disk.properties["provisioningState"] = "Succeeded"


def _removed(world: World, disk_id: str) -> None:
    disk = world.state.find(disk_id)
    if disk is None:
        return
    owner = machine_of_disk(world.state, disk_id)
    if owner is not None:
        raise not_allowed(f"Disk {disk.name} is attached to VM {owner.id}.")
    world.drop(disk)


def _shrunk(world: World, disk_id: str) -> None:
    del world, disk_id
    raise invalid("Disks or snapshot cannot be resized down.", "diskSizeGB")


def _of(kind: _Kind, handler: Callable[[World, Call, _Kind], Response]) -> Callable[[World, Call], Response]:
    return lambda world, call: handler(world, call, kind)


HANDLERS = {
    DISKS: {"PUT": _of(_DISK, put), "PATCH": _of(_DISK, patch), "DELETE": _of(_DISK, delete)},
    SNAPSHOTS: {
        "GET": get_snapshot,
        "PUT": _of(_SNAPSHOT, put),
        "PATCH": _of(_SNAPSHOT, patch),
        "DELETE": _of(_SNAPSHOT, delete),
    },
}
VIEWS = {DISKS.lower(): view, SNAPSHOTS.lower(): view}
EFFECTS = {"disk-settled": _settled, "disk-removed": _removed, "disk-shrunk": _shrunk}
