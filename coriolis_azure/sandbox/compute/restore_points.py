"""Restore points: the disks of a VM at one moment. They carry no tags, and change no more once they are made."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

from coriolis_azure.sandbox.budgets import refusal
from coriolis_azure.sandbox.catalog import FILLED_LATER
from coriolis_azure.sandbox.compute import disk_points, disks, exports
from coriolis_azure.sandbox.relations import COLLECTIONS, MACHINES, POINTS, disk_entries, same
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import ArmError, Json, Response, invalid, not_allowed
from coriolis_azure.sandbox.world import Call, Polling, World, no_content, not_found, now

_MODES = ("CrashConsistent", "FileSystemConsistent", "ApplicationConsistent")
_PERIOD = 3600
_PROFILES = ("hardwareProfile", "osProfile", "licenseType", "vmId", "securityProfile")


def put(world: World, call: Call) -> Response:
    """Create a restore point: 201 and an operation, or 429 if too many were made."""
    collection = world.existing(call, COLLECTIONS)
    world.unlocked(collection.id, "write")
    requested = call.body.get("properties") or {}
    existing = world.state.find(_id(collection, call))
    if existing is not None:
        if requested != existing.hidden["requested"]:
            raise not_allowed(f"Changing the restore point {existing.name} is not supported.")
        return Response.of(200, view(world, existing))
    machine, mode = _machine(world, collection), _mode(requested)
    _check_alone(world, machine)
    entries = _included(world, machine, requested, mode)
    if (wait := _wait(world, machine, mode)) > 0:
        return refusal("CreateRestorePoints", world.exporting.restore_point_rate, math.ceil(wait))
    point = _new_point(world, _id(collection, call), machine, mode, requested)
    point.hidden["disks"] = {
        str(entry["name"]): disk_points.add(world, point, str(entry["name"]), disk).id
        for entry, disk in entries
    }
    polling = Polling(1, ("Azure-AsyncOperation",))
    headers = world.begin(call, "compute", machine.location, "restore-point-settled", point.id, polling)
    return Response.of(201, view(world, point), headers)


def get(world: World, call: Call) -> Response:
    """Show a restore point."""
    return Response.of(200, view(world, existing(world, call)))


def delete(world: World, call: Call) -> Response:
    """Delete a restore point: 202, or 204 if there is none."""
    collection = world.existing(call, COLLECTIONS)
    world.unlocked(collection.id, "delete")
    point = world.state.find(_id(collection, call))
    if point is None:
        return no_content()
    not_exported(world, point)
    headers = world.begin(call, "compute", collection.location, "restore-point-removed", point.id)
    return Response(202, headers)


def existing(world: World, call: Call) -> Resource:
    """The restore point that the path names."""
    point = world.state.find(_id(world.existing(call, COLLECTIONS), call))
    if point is None:
        raise not_found(POINTS, f"{call.part['name']}/{call.part['point']}", call.part["group"])
    return point


def of_collection(world: World, collection: Resource) -> Iterator[Resource]:
    """The restore points of a collection, oldest first."""
    for point in world.state.of_type(POINTS):
        if point.id.lower().startswith(f"{collection.id.lower()}/"):
            yield point


def view(world: World, point: Resource) -> Json:
    """The document; it names the disks once they are all there."""
    del world
    document: Json = {"name": point.name, "id": point.id, "properties": copy.deepcopy(point.properties)}
    storage = document["properties"]["sourceMetadata"]["storageProfile"]
    included = [
        entry
        for entry in (storage["osDisk"], *storage["dataDisks"])
        if entry["name"] in point.hidden["disks"]
    ]
    for entry in included if point.properties["provisioningState"] == "Succeeded" else ():
        entry["diskRestorePoint"] = {"id": point.hidden["disks"][entry["name"]]}
    return document


def not_exported(world: World, point: Resource) -> None:
    """Refuse to delete a restore point of which a disk has access granted."""
    if any(exports.active(world, disk) for disk in disk_points.of_point(world, point)):
        raise ArmError(
            409,
            "DiskRestorePointUsedByCustomer",
            "There is an active shared access signature outstanding for disk restore point. Call EndGetAccess before "
            "deleting the restore point.",
        )


def remove(world: World, point: Resource) -> None:
    """Remove a restore point with its disks."""
    for disk in disk_points.of_point(world, point):
        world.drop(disk)
    world.state.remove(point)


def _id(collection: Resource, call: Call) -> str:
    return f"{collection.id}/restorePoints/{call.part['point']}"


def _machine(world: World, collection: Resource) -> Resource:
    source = str(collection.properties["source"]["id"])
    machine = world.state.find(source)
    if machine is None or machine.type != MACHINES:
        raise ArmError(404, "NotFound", f"Resource {source.rpartition('/')[2]} is not found.")
    return machine


def _mode(requested: Json) -> str:
    mode = str(requested.get("consistencyMode") or "ApplicationConsistent")
    if mode not in _MODES:
        raise invalid(f"The value '{mode}' of parameter consistencyMode is invalid.", "consistencyMode")
    return mode


def _check_alone(world: World, machine: Resource) -> None:
    """Refuse a second restore point of a VM while one is being made."""
    for point in world.state.of_type(POINTS):
        if point.hidden["machine"] == machine.id and point.properties["provisioningState"] == "Creating":
            raise not_allowed(f"The restore point {point.name} of VM {machine.name} is being created.")


def _included(world: World, machine: Resource, requested: Json, mode: str) -> list[tuple[Json, Resource]]:
    """The entries of the disks that are not excluded, with their disks; refused if the mode excludes one."""
    excluded = [str(each.get("id")) for each in requested.get("excludeDisks") or ()]
    found: list[tuple[Json, Resource]] = []
    for entry in disk_entries(machine):
        disk = world.state.find(str((entry.get("managedDisk") or {}).get("id")))
        if disk is None:
            raise not_allowed(f"VM {machine.name} has an unmanaged disk, so it has no restore points.")
        if any(same(disk.id, one) for one in excluded):
            continue
        unfit = disk.document["sku"]["name"] in FILLED_LATER or disk.properties.get("maxShares", 1) > 1
        if unfit and mode == "CrashConsistent":
            raise not_allowed(f"Disk {disk.name} does not support restore points of mode {mode}. Exclude it.")
        found.append((entry, disk))
    return found


def _wait(world: World, machine: Resource, mode: str) -> float:
    """How long until another restore point may be made, in Azure's time; counts one that may be made now."""
    what, moment, rules = f"{machine.id.lower()}/{mode}", world.seconds(), world.exporting
    if rules.count(what, moment, _PERIOD) >= rules.restore_point_rate:
        return rules.taken[what][0] + _PERIOD - moment
    rules.taken[what].append(moment)
    return 0


def _new_point(world: World, point_id: str, machine: Resource, mode: str, requested: Json) -> Resource:
    source = {name: machine.properties[name] for name in _PROFILES if name in machine.properties}
    storage = machine.properties["storageProfile"]
    data_disks = [{"lun": entry["lun"], **_entry(world, entry)} for entry in storage["dataDisks"]]
    os_disk = {"osType": storage["osDisk"].get("osType"), **_entry(world, storage["osDisk"])}
    metadata = {
        **source,
        "location": machine.location,
        "storageProfile": {"osDisk": os_disk, "dataDisks": data_disks},
    }
    properties: Json = {
        "sourceMetadata": copy.deepcopy(metadata),
        "provisioningState": "Creating",
        "consistencyMode": mode,
        "timeCreated": now(),
    }
    if requested.get("excludeDisks"):
        properties["excludeDisks"] = requested["excludeDisks"]
    document: Json = {
        "name": point_id.rpartition("/")[2],
        "id": point_id,
        "type": POINTS,
        "properties": properties,
    }
    hidden = {"requested": requested, "machine": machine.id, "location": machine.location}
    return world.state.add(Resource(document, hidden))


def _entry(world: World, entry: Json) -> Json:
    disk = world.state.find(entry["managedDisk"]["id"])
    size = disks.gib(world.contents.size(disk.hidden["content"])) if disk else 0
    kind = {"storageAccountType": disk.document["sku"]["name"]} if disk else {}
    return {
        "name": entry["name"],
        "caching": entry.get("caching", "None"),
        "diskSizeGB": size,
        "managedDisk": {**kind, "id": entry["managedDisk"]["id"]},
    }


def _settled(world: World, point_id: str) -> None:
    point = world.state.find(point_id)
    if point is not None:
        point.properties["provisioningState"] = "Succeeded"


def _removed(world: World, point_id: str) -> None:
    point = world.state.find(point_id)
    if point is not None:
        remove(world, point)


_POINT = f"{COLLECTIONS}/{{name}}/restorePoints/{{point}}"
ROUTES = {("PUT", _POINT): put, ("GET", _POINT): get, ("DELETE", _POINT): delete}
EFFECTS = {"restore-point-settled": _settled, "restore-point-removed": _removed}
