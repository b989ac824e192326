"""Restore point collections: the restore points of one VM, under one name and with its tags."""

from __future__ import annotations

import copy
import uuid

from coriolis_azure.sandbox.compute import restore_points
from coriolis_azure.sandbox.relations import COLLECTIONS, MACHINES, same
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import ArmError, Json, Response, invalid
from coriolis_azure.sandbox.world import Call, View, World, checked_tags, deleted, no_content, placed


def put(world: World, call: Call) -> Response:
    """Create a collection: 201; or change its tags: 200. There is no operation to wait for."""
    collection_id = world.canonical_id(call, COLLECTIONS)
    existing = world.state.find(collection_id)
    location = placed(world, call, COLLECTIONS, existing)
    tags = checked_tags(call.body)
    source = ((call.body.get("properties") or {}).get("source") or {}).get("id")
    if existing is None:
        machine = _machine(world, source)
        document: Json = {
            "name": call.part["name"],
            "id": collection_id,
            "type": COLLECTIONS,
            "location": location,
            "tags": tags,
            "properties": {
                "source": {"location": machine.location, "id": machine.id},
                "restorePointCollectionId": str(uuid.uuid4()),
                "provisioningState": "Succeeded",
            },
        }
        return Response.of(201, world.state.add(Resource(document)).document)
    if source and not same(source, existing.properties["source"]["id"]):
        raise invalid("The source of a restore point collection cannot be changed.", "source.id")
    existing.document["tags"] = tags
    return Response.of(200, existing.document)


def patch(world: World, call: Call) -> Response:
    """Change the tags: 200."""
    collection = world.existing(call, COLLECTIONS)
    world.unlocked(collection.id, "write")
    collection.document["tags"] = checked_tags(call.body)
    return Response.of(200, collection.document)


def get(world: World, call: Call) -> Response:
    """Show a collection; with `$expand=restorePoints` its points, too."""
    collection = world.existing(call, COLLECTIONS)
    document = copy.deepcopy(collection.document)
    if same(call.query.get("$expand"), "restorePoints"):
        points = restore_points.of_collection(world, collection)
        document["properties"]["restorePoints"] = [restore_points.view(world, point) for point in points]
    return Response.of(200, document)


def delete(world: World, call: Call) -> Response:
    """Delete a collection with its points: 202, or 204 if there is none."""
    collection = deleted(world, call, COLLECTIONS)
    if collection is None:
        return no_content()
    for point in restore_points.of_collection(world, collection):
        restore_points.not_exported(world, point)
    headers = world.begin(call, "compute", collection.location, "collection-removed", collection.id)
    return Response(202, headers)


def _machine(world: World, source: str | None) -> Resource:
    if not source:
        raise invalid("Required parameter 'source.id' is missing (null).", "source.id")
    machine = world.state.find(source)
    if machine is None or machine.type != MACHINES:
        raise ArmError(404, "NotFound", f"Resource {source.rpartition('/')[2]} is not found.")
    return machine


def _removed(world: World, collection_id: str) -> None:
    collection = world.state.find(collection_id)
    if collection is not None:
        for point in restore_points.of_collection(world, collection):
            restore_points.remove(world, point)
        world.state.remove(collection)


HANDLERS = {COLLECTIONS: {"PUT": put, "PATCH": patch, "GET": get, "DELETE": delete}}
VIEWS: dict[str, View] = {}
EFFECTS = {"collection-removed": _removed}
