"""Disk accesses: what disks and snapshots with the policy AllowPrivate are exported through."""

from __future__ import annotations

from coriolis_azure.sandbox.relations import DISK_ACCESSES, same
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import Json, Response, not_allowed
from coriolis_azure.sandbox.world import (
    Call,
    Polling,
    View,
    World,
    checked_tags,
    deleted,
    no_content,
    now,
    placed,
)


def put(world: World, call: Call) -> Response:
    """Create or change a disk access: 202."""
    access_id = world.canonical_id(call, DISK_ACCESSES)
    existing = world.state.find(access_id)
    location = placed(world, call, DISK_ACCESSES, existing)
    tags = checked_tags(call.body)
    if existing is None:
        document: Json = {
            "name": call.part["name"],
            "id": access_id,
            "type": DISK_ACCESSES,
            "location": location,
            "properties": {"provisioningState": "Succeeded", "timeCreated": now()},
        }
        existing = world.state.add(Resource(document))
    existing.document["tags"] = tags
    headers = world.begin(call, "disk", location, "disk-access-settled", access_id, Polling(result=True))
    return Response.of(202, existing.document, headers)


def patch(world: World, call: Call) -> Response:
    """Change the tags of a disk access: 202."""
    access = world.existing(call, DISK_ACCESSES)
    world.unlocked(access.id, "write")
    access.document["tags"] = checked_tags(call.body)
    headers = world.begin(
        call, "disk", access.location, "disk-access-settled", access.id, Polling(result=True)
    )
    return Response.of(202, access.document, headers)


def delete(world: World, call: Call) -> Response:
    """Delete a disk access: 202, or 204 if there is none; 409 while a disk or snapshot uses it."""
    access = deleted(world, call, DISK_ACCESSES)
    if access is None:
        return no_content()
    for resource in world.state.resources.values():
        if same(str(resource.document.get("properties", {}).get("diskAccessId")), access.id):
            raise not_allowed(f"Disk access {access.name} is used by {resource.id}.")
    world.state.remove(access)
    return Response(202, world.begin(call, "disk", access.location, "disk-access-settled", access.id))


def _settled(world: World, access_id: str) -> None:
    del world, access_id


HANDLERS = {DISK_ACCESSES: {"PUT": put, "PATCH": patch, "DELETE": delete}}
VIEWS: dict[str, View] = {}
EFFECTS = {"disk-access-settled": _settled}
