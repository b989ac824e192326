"""Subscriptions, resource groups, locks, and lists of all resources."""

from __future__ import annotations

import re

from coriolis_azure.sandbox import profiles
from coriolis_azure.sandbox.catalog import LOCATIONS
from coriolis_azure.sandbox.relations import (
    DISK_POINTS,
    DISKS,
    GROUPS,
    LOCKS,
    MACHINES,
    POINTS,
    SNAPSHOTS,
    STORAGE,
    same,
)
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.storage.accounts import removed as removed_account
from coriolis_azure.sandbox.wire import ArmError, Json, Response
from coriolis_azure.sandbox.world import Call, Polling, World, checked_tags, group_not_found, paged

_CLAUSE = re.compile(
    r"(tagname|tagvalue|resourcetype|name|location|resourcegroup)\s+eq\s+'((?:[^']|'')*)'", re.IGNORECASE
)
_CAPITALISED = {DISKS, SNAPSHOTS, MACHINES}
_NAMESPACES = {
    "Microsoft.Compute": (
        "virtualMachines",
        "disks",
        "snapshots",
        "diskAccesses",
        "restorePointCollections",
        "locations",
        "locations/operations",
        "locations/DiskOperations",
        "locations/usages",
        "locations/vmSizes",
        "locations/publishers",
        "skus",
    ),
    "Microsoft.Network": (
        "virtualNetworks",
        "networkInterfaces",
        "networkSecurityGroups",
        "publicIPAddresses",
        "locations/usages",
    ),
    "Microsoft.Storage": ("storageAccounts",),
    "Microsoft.Resources": ("resourceGroups", "subscriptions"),
    "Microsoft.Authorization": ("locks",),
}
# Older versions are for clients that do not use the newest one.
_VERSIONS = {
    name: versions
    for versions, names in (
        (["2026-03-02", "2024-03-02"], ("disks", "snapshots")),
        (
            ["2026-03-01", "2024-01-01"],
            ("virtualNetworks", "networkInterfaces", "networkSecurityGroups", "publicIPAddresses"),
        ),
    )
    for name in names
}

# ---------------------------------------------------------------- the subscription


def subscription_document(world: World) -> Json:
    """The document of the only subscription."""
    identity = world.state.identity
    return {
        "id": f"/subscriptions/{identity.subscription}",
        "authorizationSource": "RoleBased",
        "subscriptionId": identity.subscription,
        "tenantId": identity.tenant,
        "displayName": "Sandbox",
        "state": "Enabled",
        "subscriptionPolicies": {"quotaId": "PayAsYouGo_2014-09-01", "spendingLimit": "Off"},
    }


def list_subscriptions(world: World, call: Call) -> Response:
    """All subscriptions, of which there is one."""
    del call
    return Response.of(200, {"value": [subscription_document(world)]})


def get_subscription(world: World, call: Call) -> Response:
    """The subscription."""
    del call
    return Response.of(200, subscription_document(world))


def list_locations(world: World, call: Call) -> Response:
    """The sandbox's regions."""
    del world
    rows = []
    for name, (display, zones) in LOCATIONS.items():
        row: Json = {
            "id": f"/subscriptions/{call.subscription}/locations/{name}",
            "type": "Region",
            "name": name,
            "displayName": display,
            "regionalDisplayName": display,
            "metadata": {"regionType": "Physical", "regionCategory": "Recommended"},
        }
        if zones:
            mappings = [{"logicalZone": zone, "physicalZone": f"{name}-az{zone}"} for zone in zones]
            row["availabilityZoneMappings"] = mappings
        rows.append(row)
    return Response.of(200, {"value": rows})


def get_provider(world: World, call: Call) -> Response:
    """A resource provider, which is always registered."""
    names = {name.lower(): name for name in _NAMESPACES}
    namespace = names.get(call.part["namespace"].lower())
    if namespace is None:
        raise ArmError(
            404, "InvalidResourceNamespace", f"The resource namespace '{call.part['namespace']}' is invalid."
        )
    display = [name for name, _ in LOCATIONS.values()]
    types = [
        {"resourceType": name, "locations": display, "apiVersions": _VERSIONS.get(name, ["2026-04-01"])}
        for name in _NAMESPACES[namespace]
    ]
    document = {
        "id": f"/subscriptions/{call.subscription}/providers/{namespace}",
        "namespace": namespace,
        "registrationPolicy": "RegistrationRequired",
        "resourceTypes": types,
        "registrationState": "Registered",
    }
    return Response.of(200, profiles.provider(world.api_profile, document))


# ---------------------------------------------------------------- resource groups


def put_group(world: World, call: Call) -> Response:
    """Create (201) or update (200) a resource group."""
    existing = world.state.find(call.group_id)
    location = str(call.body.get("location") or "").replace(" ", "").lower()
    if location not in LOCATIONS:
        raise ArmError(
            400,
            "LocationNotAvailableForResourceGroup",
            f"The provided location '{location}' is not available for resource group. List of available "
            f"regions is '{','.join(LOCATIONS)}'.",
        )
    if existing is not None and existing.location != location:
        raise ArmError(
            409,
            "InvalidResourceGroupLocation",
            f"Invalid resource group location '{location}'. The Resource group already exists in location "
            f"'{existing.location}'.",
        )
    world.unlocked(call.group_id, "write")
    if existing is not None:
        existing.document["tags"] = checked_tags(call.body)
        return Response.of(200, existing.document)
    group = new_group(world, call.group_id, location, checked_tags(call.body))
    return Response.of(201, group.document)


def new_group(world: World, group_id: str, location: str, tags: Json) -> Resource:
    """Add a resource group."""
    document = {
        "id": group_id,
        "name": group_id.rpartition("/")[2],
        "type": GROUPS,
        "location": location,
        "tags": tags,
        "properties": {"provisioningState": "Succeeded"},
    }
    return world.state.add(Resource(document))


def get_group(world: World, call: Call) -> Response:
    """The resource group."""
    return Response.of(200, world.group(call).document)


def head_group(world: World, call: Call) -> Response:
    """204 if the group exists, otherwise 404 without a body."""
    return Response(204 if world.state.find(call.group_id) else 404)


def patch_group(world: World, call: Call) -> Response:
    """Change a group's tags."""
    group = world.group(call)
    world.unlocked(group.id, "write")
    group.document["tags"] = checked_tags(call.body)
    return Response.of(200, group.document)


def delete_group(world: World, call: Call) -> Response:
    """Delete a group and everything in it: 202 with only a Location."""
    group = world.state.find(call.group_id)
    if group is None:
        raise group_not_found(call.part["group"])
    for resource in (group, *_inside(world, group.id)):
        world.unlocked(resource.id, "delete")
    group.properties["provisioningState"] = "Deleting"
    for machine in world.state.of_type(MACHINES):
        if machine.id.lower().startswith(group.id.lower() + "/"):
            world.guests.stop(machine.id)
    headers = world.begin(call, "group", group.location, "group-removed", group.id, Polling(1, ("Location",)))
    return Response(202, headers)


def list_groups(world: World, call: Call) -> Response:
    """The resource groups; can be filtered by tag."""
    clauses = _filter(call.query.get("$filter"))
    groups = [group for group in world.state.of_type(GROUPS) if _matches(group, clauses)]
    return Response.of(200, {"value": [group.document for group in groups]})


def _inside(world: World, group_id: str) -> list[Resource]:
    inner = f"{group_id.lower()}/providers/"
    return [resource for resource in world.state.resources.values() if resource.id.lower().startswith(inner)]


def _removed(world: World, group_id: str) -> None:
    group = world.state.find(group_id)
    if group is None:
        return
    for resource in _inside(world, group_id):
        if resource.type == MACHINES:
            world.guests.forget(resource.id)
        if resource.type == STORAGE:
            removed_account(world, resource)
        world.drop(resource)
    world.state.remove(group)


# ---------------------------------------------------------------- lists of resources


def list_resources(world: World, call: Call) -> Response:
    """The resources of the group or subscription; supports `$filter` and `$expand=createdTime`."""
    text = call.query.get("$filter")
    clauses = _filter(text)
    scope = f"/subscriptions/{call.subscription}/"
    if "group" in call.part:
        scope = world.group(call).id + "/providers/"
    # Azure omits the tags from a list that is filtered by a tag's name and value.
    without_tags = "tagname" in clauses and "tagvalue" in clauses
    rows: list[Json] = []
    for resource in tracked(world):
        if resource.id.lower().startswith(scope.lower()) and _matches(resource, clauses):
            row: Json = {
                key: resource.document[key]
                for key in ("id", "name", "type", "location")
                if key in resource.document
            }
            row |= {
                key: resource.document[key] for key in ("sku", "zones", "kind") if key in resource.document
            }
            if not without_tags and resource.document.get("tags"):
                row["tags"] = resource.document["tags"]
            if resource.type in _CAPITALISED:
                row["id"] = capitalised(resource.id)
            if (
                "createdtime" in call.query.get("$expand", "").lower()
                and "timeCreated" in resource.properties
            ):
                row["createdTime"] = resource.properties["timeCreated"]
            rows.append(row)
    return paged(world, call, rows)


_UNLISTED = {GROUPS, LOCKS, POINTS, DISK_POINTS}


def tracked(world: World) -> list[Resource]:
    """All resources except groups, locks and what restore points consist of, which Azure's lists omit too."""
    return [resource for resource in world.state.resources.values() if resource.type not in _UNLISTED]


def capitalised(resource_id: str) -> str:
    """An id as in the compute provider's lists, with the resource group in capitals."""
    words = resource_id.split("/")
    words[4] = words[4].upper()
    return "/".join(words)


def _filter(text: str | None) -> dict[str, str]:
    """A filter's clauses by lower-case property; 400 unless they are `name eq 'value'`, joined by `and`."""
    if not text:
        return {}
    clauses = {}
    for clause in re.split(r"\s+and\s+", text.strip(), flags=re.IGNORECASE):
        match = _CLAUSE.fullmatch(clause.strip())
        if match is None:
            raise ArmError(
                400, "InvalidFilterInQueryString", f"Invalid $filter '{text}' specified in the query string."
            )
        clauses[match.group(1).lower()] = match.group(2).replace("''", "'")
    if "tagvalue" in clauses and "tagname" not in clauses:
        raise ArmError(
            400, "InvalidFilterInQueryString", f"Invalid $filter '{text}': tagValue needs tagName."
        )
    if "tagname" in clauses and len(clauses) > ("tagvalue" in clauses) + 1:
        raise ArmError(
            400,
            "InvalidFilterInQueryString",
            f"Invalid $filter '{text}': tags cannot be combined with other filters.",
        )
    return clauses


def _matches(resource: Resource, clauses: dict[str, str]) -> bool:
    tags = {name.lower(): value for name, value in (resource.document.get("tags") or {}).items()}
    name = clauses.get("tagname")
    if name is not None and (
        name.lower() not in tags or clauses.get("tagvalue", tags[name.lower()]) != tags[name.lower()]
    ):
        return False
    facts = {
        "resourcetype": resource.type,
        "name": resource.name,
        "location": resource.location,
        "resourcegroup": (resource.id.split("/") + [""] * 5)[4],
    }
    return all(same(facts[key], value) for key, value in clauses.items() if key in facts)


# ---------------------------------------------------------------- locks


def _scope(world: World, call: Call) -> str:
    scope = call.request.path.lower().partition("/providers/microsoft.authorization/locks")[0]
    resource = world.state.find(scope)
    if resource is not None:
        return resource.id
    if scope == f"/subscriptions/{call.subscription}".lower():
        return f"/subscriptions/{call.subscription}"
    if "/providers/" not in scope:
        raise group_not_found(scope.rpartition("/")[2])
    raise ArmError(404, "ResourceNotFound", f"The Resource '{scope}' was not found.")


def put_lock(world: World, call: Call) -> Response:
    """Create or change a lock."""
    scope = _scope(world, call)
    level = (call.body.get("properties") or {}).get("level")
    if level not in {"CanNotDelete", "ReadOnly"}:
        raise ArmError(
            400, "LockLevelInvalid", f"The lock level '{level}' is invalid: CanNotDelete or ReadOnly."
        )
    lock_id = f"{scope}/providers/{LOCKS}/{call.part['lock']}"
    existed = world.state.find(lock_id) is not None
    notes = (call.body.get("properties") or {}).get("notes")
    properties = {"level": level, **({"notes": notes} if notes else {})}
    document = {"id": lock_id, "name": call.part["lock"], "type": LOCKS, "properties": properties}
    lock = world.state.add(Resource(document, {"scope": scope}))
    return Response.of(200 if existed else 201, lock.document)


def get_lock(world: World, call: Call) -> Response:
    """Show one lock; 404 if there is none."""
    lock = world.state.find(f"{_scope(world, call)}/providers/{LOCKS}/{call.part['lock']}")
    if lock is None:
        raise ArmError(404, "LockNotFound", f"The lock '{call.part['lock']}' could not be found.")
    return Response.of(200, lock.document)


def delete_lock(world: World, call: Call) -> Response:
    """Remove a lock: 200 or 204."""
    lock = world.state.find(f"{_scope(world, call)}/providers/{LOCKS}/{call.part['lock']}")
    if lock is None:
        return Response(204)
    world.state.remove(lock)
    return Response(200)


def list_locks(world: World, call: Call) -> Response:
    """The locks at this scope and below."""
    scope = _scope(world, call).lower()
    locks = [lock for lock in world.state.of_type(LOCKS) if lock.id.lower().startswith(scope + "/")]
    return Response.of(200, {"value": [lock.document for lock in locks]})


EFFECTS = {"group-removed": _removed}
