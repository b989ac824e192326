"""The disks of restore points: shown, listed, and exported as incremental snapshots are."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterator

from coriolis_azure.sandbox.catalog import FILLED_LATER
from coriolis_azure.sandbox.compute import disks, exports
from coriolis_azure.sandbox.relations import COLLECTIONS, DISK_POINTS
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import Json, Response
from coriolis_azure.sandbox.world import Call, World, not_found, now, paged

_TAKEN_OVER = (
    "osType",
    "hyperVGeneration",
    "supportedCapabilities",
    "purchasePlan",
    "securityProfile",
    "encryption",
    "networkAccessPolicy",
    "publicNetworkAccess",
    "diskAccessId",
)


def add(world: World, point: Resource, name: str, disk: Resource) -> Resource:
    """Add the present content of a disk to a restore point. Its family is not that of the disk's snapshots."""
    unique = disk.properties["uniqueId"]
    properties: Json = {
        "timeCreated": now(),
        "sourceResourceId": disk.id,
        "sourceResourceLocation": disk.location,
        "sourceUniqueId": unique,
        "familyId": disks.family(f"restore points of {unique}"),
        **{key: copy.deepcopy(disk.properties[key]) for key in _TAKEN_OVER if key in disk.properties},
    }
    if disk.document["sku"]["name"] in FILLED_LATER:
        properties["completionPercent"] = 100.0
    own = f"{name}_{uuid.uuid4()}"
    document: Json = {"name": own, "id": f"{point.id}/diskRestorePoints/{own}", "type": DISK_POINTS}
    content = disks.copied(world, disk)
    hidden: Json = {"content": content, "location": disk.location}
    hidden["generation"] = world.contents.end_generation(content)
    return world.state.add(Resource({**document, "properties": properties}, hidden))


def of_point(world: World, point: Resource) -> Iterator[Resource]:
    """The disks of a restore point."""
    for disk in world.state.of_type(DISK_POINTS):
        if disk.id.lower().startswith(f"{point.id.lower()}/"):
            yield disk


def get(world: World, call: Call) -> Response:
    """Show a disk of a restore point."""
    return Response.of(200, _existing(world, call).document)


def list_all(world: World, call: Call) -> Response:
    """List the disks of a restore point."""
    start = f"{_point_id(call).lower()}/"
    found = [disk for disk in world.state.of_type(DISK_POINTS) if disk.id.lower().startswith(start)]
    return paged(world, call, [disk.document for disk in found])


def _point_id(call: Call) -> str:
    return f"{call.id_of(COLLECTIONS)}/restorePoints/{call.part['point']}"


def _existing(world: World, call: Call) -> Resource:
    world.existing(call, COLLECTIONS)
    disk = world.state.find(f"{_point_id(call)}/diskRestorePoints/{call.part['disk']}")
    if disk is None:
        names = (call.part[name] for name in ("name", "point", "disk"))
        raise not_found(DISK_POINTS, "/".join(names), call.part["group"])
    return disk


def _action(act: Callable[[World, Resource, Call], Response]) -> Callable[[World, Call], Response]:
    return lambda world, call: act(world, _existing(world, call), call)


_ALL = f"{COLLECTIONS}/{{name}}/restorePoints/{{point}}/diskRestorePoints"
ROUTES = {
    ("GET", _ALL): list_all,
    ("GET", f"{_ALL}/{{disk}}"): get,
    ("POST", f"{_ALL}/{{disk}}/beginGetAccess"): _action(exports.begin),
    ("POST", f"{_ALL}/{{disk}}/endGetAccess"): _action(exports.end),
}
