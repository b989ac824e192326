"""What the network provider's types share: the beginning and end of a PUT, references, tags, usage.

The routing of packets is not imitated.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from coriolis_azure.sandbox.relations import ADDRESSES, FIREWALLS, INTERFACES, NETWORKS, same
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import ArmError, Json, Response
from coriolis_azure.sandbox.world import Call, Polling, World, checked_tags, placed

STATE_ONLY = Polling(headers=("Azure-AsyncOperation",))


def begin_put(world: World, call: Call, kind: str) -> tuple[str, str, Resource | None]:
    """Id, location and present state of the resource in a PUT; refused for a wrong location, a lock or an old etag."""
    resource_id = world.canonical_id(call, kind)
    for operation in world.pending(resource_id):
        world.finish(operation)
    existing = world.state.find(resource_id)
    location = placed(world, call, kind, existing)
    match = call.request.header("If-Match")
    if match and match != "*" and (existing is None or existing.document["etag"] != match):
        raise ArmError(
            412, "PreconditionFailed", f"Precondition failed for resource {resource_id}: etag differs."
        )
    return resource_id, location, existing


def keep(
    world: World, call: Call, type_: str, resource_id: str, location: str, properties: Json, **top: object
) -> Resource:
    """Create or replace a resource; `top` are outer fields."""
    existing = world.state.find(resource_id)
    guid = existing.properties["resourceGuid"] if existing else str(uuid.uuid4())
    document = {
        "name": existing.name if existing else call.part["name"],
        "id": existing.id if existing else resource_id,
        "etag": etag(),
        "type": type_,
        "location": location,
        "tags": checked_tags(call.body),
        **top,
        "properties": {"provisioningState": "Updating", "resourceGuid": guid, **properties},
    }
    return world.state.add(Resource(document, existing.hidden if existing else {}))


def etag() -> str:
    """A new etag."""
    return f'W/"{uuid.uuid4()}"'


def accepted(world: World, call: Call, resource: Resource, *, existed: bool) -> Response:
    """The answer to a PUT: 201 or 200 with an operation."""
    headers = world.begin(call, "network", resource.location, "network-settled", resource.id, STATE_ONLY)
    return Response.of(200 if existed else 201, world.view(resource), headers)


def patched(world: World, call: Call, kind: str) -> Response:
    """Answer a PATCH, which for these types changes only tags: 200 at once."""
    resource = world.existing(call, kind)
    world.unlocked(resource.id, "write")
    resource.document["tags"] = checked_tags(call.body)
    resource.document["etag"] = etag()
    return Response.of(200, world.view(resource))


def deleting(world: World, call: Call, resource: Resource) -> Response:
    """The answer to a DELETE: 202 with an operation."""
    resource.properties["provisioningState"] = "Deleting"
    headers = world.begin(
        call, "network", resource.location, "network-removed", resource.id, Polling(polls=1)
    )
    return Response(202, headers)


def given_properties(call: Call) -> Json:
    """The `properties` in the body of a request."""
    properties: Json = call.body.get("properties") or {}
    return properties


def capitalised(resource_id: str) -> str:
    """An id as the network provider's messages show it, with names in capitals."""
    words = resource_id.split("/")
    lowercase = {"subscriptions", "resourcegroups", "providers", "microsoft.network", "networkinterfaces"}
    lowercase |= {"ipconfigurations", "virtualnetworks", "subnets"}
    return "/".join(
        word if word.lower() in lowercase or index == 2 else word.upper() for index, word in enumerate(words)
    )


def referenced(
    world: World, target_id: str, kind: str, referrer: str, location: str | None = None
) -> Resource:
    """The resource that `referrer` refers to; InvalidResourceReference if it is missing or not in `location`."""
    target = world.state.find(target_id)
    if target is None or target.type != kind or (location and not same(target.location, location)):
        raise reference_missing(target_id, referrer)
    return target


def reference_missing(target_id: str, referrer: str) -> ArmError:
    """400 InvalidResourceReference."""
    return ArmError(
        400,
        "InvalidResourceReference",
        f"Resource {target_id} referenced by resource {referrer} was not found. Please make sure that the "
        "referenced resource exists, and that both resources are in the same region.",
    )


def patch(kind: str) -> Callable[[World, Call], Response]:
    """The PATCH handler of a type."""
    return lambda world, call: patched(world, call, kind)


def _settled(world: World, resource_id: str) -> None:
    resource = world.state.find(resource_id)
    if resource is None:
        return
    resource.properties["provisioningState"] = "Succeeded"
    for subnet in resource.properties.get("subnets", []):
        subnet["properties"]["provisioningState"] = "Succeeded"


def _removed(world: World, resource_id: str) -> None:
    resource = world.state.find(resource_id)
    if resource is not None:
        world.drop(resource)


def usages(world: World, call: Call) -> Response:
    """The network usage of a location, with its quotas."""
    location = call.part["location"].lower()
    rows = []
    for kind, name, limit in (
        (NETWORKS, "VirtualNetworks", 1000),
        (INTERFACES, "NetworkInterfaces", 65536),
        (FIREWALLS, "NetworkSecurityGroups", 5000),
        (ADDRESSES, "PublicIPAddresses", 1000),
        (ADDRESSES, "StandardSkuPublicIpAddresses", 20),
    ):
        used = sum(resource.location.lower() == location for resource in world.state.of_type(kind))
        used, limit = world.quotas.get(name, (used, limit))
        rows.append(
            {
                "id": f"{call.request.path.rstrip('/')}/{name}",
                "currentValue": used,
                "limit": limit,
                "unit": "Count",
                "name": {"value": name, "localizedValue": name},
            }
        )
    return Response.of(200, {"value": rows})


EFFECTS = {"network-settled": _settled, "network-removed": _removed}
