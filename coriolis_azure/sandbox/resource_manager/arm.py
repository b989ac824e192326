"""The routing of the resource manager: which function answers which path.

`answer` is all of ARM as one function of a world and a request. It handles paths, api-versions, bodies, lists and
operations; each resource type is implemented in its own module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from azure.mgmt.compute import models as compute
from azure.mgmt.network import models as networking

from coriolis_azure.azure.documents import understood
from coriolis_azure.errors import Unreadable
from coriolis_azure.sandbox.compute import (
    disk_accesses,
    disk_points,
    disks,
    exports,
    machines,
    offers,
    restore_point_collections,
    restore_points,
)
from coriolis_azure.sandbox.identity import permissions
from coriolis_azure.sandbox.network import common, firewalls, interfaces, subnets
from coriolis_azure.sandbox.relations import (
    ADDRESSES,
    COLLECTIONS,
    DISK_ACCESSES,
    DISK_POINTS,
    DISKS,
    FIREWALLS,
    INTERFACES,
    MACHINES,
    NETWORKS,
    POINTS,
    SNAPSHOTS,
    STORAGE,
)
from coriolis_azure.sandbox.resource_manager import groups, policies
from coriolis_azure.sandbox.state import Operation, Resource
from coriolis_azure.sandbox.storage import accounts
from coriolis_azure.sandbox.wire import ArmError, Json, Request, Response
from coriolis_azure.sandbox.world import Call, Effect, View, World, group_not_found, paged

Handler = Callable[[World, Call], Response]

_PROVIDERS = (
    disks,
    disk_accesses,
    restore_point_collections,
    machines,
    subnets,
    firewalls,
    interfaces,
    accounts,
)
VIEWS: dict[str, View] = {name: view for module in _PROVIDERS for name, view in module.VIEWS.items()}
EFFECTS: dict[str, Effect] = {
    name: effect
    for module in (
        disks,
        disk_accesses,
        restore_point_collections,
        restore_points,
        exports,
        machines,
        common,
        groups,
    )
    for name, effect in module.EFFECTS.items()
}
# What the result of an operation is, by its effect, where it is not the resource.
_RESULTS: dict[str, View] = {"access-granted": exports.granted}
_KINDS: dict[str, dict[str, Handler]] = {
    kind: handlers for module in _PROVIDERS for kind, handlers in module.HANDLERS.items()
}
# The models that request bodies must match, by provider and types in the path: the same that Azure's answers follow.
_MODELS: dict[str, type] = {
    name.lower(): model
    for name, model in {
        MACHINES: compute.VirtualMachine,
        f"{MACHINES}/attachDetachDataDisks": compute.AttachDetachDataDisksRequest,
        DISKS: compute.Disk,
        SNAPSHOTS: compute.Snapshot,
        DISK_ACCESSES: compute.DiskAccess,
        COLLECTIONS: compute.RestorePointCollection,
        POINTS: compute.RestorePoint,
        f"{DISK_POINTS}/beginGetAccess": compute.GrantAccessData,
        **{f"{kind}/beginGetAccess": compute.GrantAccessData for kind in (DISKS, SNAPSHOTS)},
        INTERFACES: networking.NetworkInterface,
        ADDRESSES: networking.PublicIPAddress,
        FIREWALLS: networking.NetworkSecurityGroup,
        NETWORKS: networking.VirtualNetwork,
        f"{NETWORKS}/subnets": networking.Subnet,
    }.items()
}
_API_VERSION = re.compile(r"\d{4}-\d{2}-\d{2}(-preview)?")


@dataclass(frozen=True)
class _Route:
    method: str
    path: re.Pattern[str]
    handler: Handler


def _route(method: str, template: str, handler: Handler) -> _Route:
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template))
    return _Route(method, re.compile(pattern + "/?", re.IGNORECASE), handler)


def _get(kind: str) -> Handler:
    return lambda world, call: Response.of(200, world.view(world.existing(call, kind)))


def _exists(kind: str) -> Handler:
    return lambda world, call: Response(204 if world.state.find(call.id_of(kind)) else 404)


def _list(kind: str) -> Handler:
    """List a type in the group or the subscription. The compute provider writes the group's name in capitals."""
    compute = kind.startswith("Microsoft.Compute/")

    def handler(world: World, call: Call) -> Response:
        scope = f"/subscriptions/{call.subscription}/"
        if "group" in call.part:
            scope = world.group(call).id + "/"
        rows = []
        for resource in world.state.of_type(kind):
            if resource.id.lower().startswith(scope.lower()):
                row = world.view(resource)
                rows.append({**row, "id": groups.capitalised(resource.id)} if compute else row)
        return paged(world, call, rows)

    return handler


_SUBSCRIPTION = "/subscriptions/{subscription}"
_GROUP = _SUBSCRIPTION + "/resourceGroups/{group}"
_COMPUTE = _SUBSCRIPTION + "/providers/Microsoft.Compute"
_LOCATION = _COMPUTE + "/locations/{location}"
_IMAGES = _LOCATION + "/publishers/{publisher}/artifacttypes/vmimage/offers"
_MACHINE = _GROUP + f"/providers/{MACHINES}/{{name}}"
_SUBNETS = _GROUP + f"/providers/{NETWORKS}/{{name}}/subnets"
_LOCKS = "/providers/Microsoft.Authorization/locks"


def _lock_routes() -> list[_Route]:
    routes = []
    resource = _GROUP + "/providers/{provider}/{kind}/{name}"
    for scope in (_SUBSCRIPTION, _GROUP, resource):
        routes += [
            _route("GET", scope + _LOCKS, groups.list_locks),
            _route("PUT", scope + _LOCKS + "/{lock}", groups.put_lock),
            _route("GET", scope + _LOCKS + "/{lock}", groups.get_lock),
            _route("DELETE", scope + _LOCKS + "/{lock}", groups.delete_lock),
        ]
    return routes


def _permission_routes() -> list[_Route]:
    resource = _GROUP + "/providers/{provider}/{kind}/{name}"
    inner = resource + "/{inner}/{inner_name}"
    scopes = (_SUBSCRIPTION, _GROUP, resource, inner, inner + "/{innermost}/{innermost_name}")
    path = "/providers/Microsoft.Authorization/permissions"
    return [_route("GET", scope + path, permissions.list_permissions) for scope in scopes]


_POLICY = "/providers/Microsoft.PolicyInsights/checkPolicyRestrictions"


def _kind_routes() -> list[_Route]:
    routes = []
    for kind, handlers in _KINDS.items():
        path = _GROUP + f"/providers/{kind}/{{name}}"
        for method, handler in {"GET": _get(kind), "HEAD": _exists(kind), **handlers}.items():
            routes.append(_route(method, path, handler))
        routes.append(_route("GET", _GROUP + f"/providers/{kind}", _list(kind)))
        routes.append(_route("GET", _SUBSCRIPTION + f"/providers/{kind}", _list(kind)))
    return routes


def _status(world: World, call: Call) -> Response:
    """Answer an Azure-AsyncOperation URL: always 200, with the state in the body."""
    operation, done = _polled(world, call)
    compute = operation.style in {"compute", "disk"}
    body: Json = {"startTime": operation.started, "name": operation.id} if compute else {}
    if not done:
        return Response.of(200, {**body, "status": "InProgress"}, world.pause(operation.style))
    if compute:
        body["endTime"] = operation.ended
    if operation.error:
        # An operation that another request has superseded is Canceled, without a code.
        state = "Failed" if operation.error["code"] else "Canceled"
        error = operation.error if compute else {"details": [], **operation.error}
        return Response.of(200, {**body, "status": state, "error": error})
    target = world.state.find(operation.target)
    if operation.result and target is not None:
        body["properties"] = {"output": _result(world, operation, target)}
    return Response.of(200, {**body, "status": "Succeeded"})


def _monitor(world: World, call: Call) -> Response:
    """Answer a Location URL: 202 while the operation runs, then the result."""
    operation, done = _polled(world, call)
    if not done:
        return Response(202, {**world.pause(operation.style), "Location": call.request.url})
    if operation.error:
        return Response.of(409, {"error": operation.error})
    target = world.state.find(operation.target)
    if operation.style == "network" and target is None:
        return Response(204)
    return Response.of(
        200, _result(world, operation, target) if operation.result and target is not None else None
    )


def _result(world: World, operation: Operation, target: Resource) -> Json:
    show = _RESULTS.get(operation.effect)
    return show(world, target) if show else world.view(target)


def _either(world: World, call: Call) -> Response:
    return _monitor(world, call) if call.query.get("monitor") == "true" else _status(world, call)


def operation_of(world: World, path: str) -> Operation | None:
    """The operation that a path polls; None for any other path."""
    if "operation" not in path.lower():
        return None
    return world.state.operations.get(path.rstrip("/").rpartition("/")[2])


def _polled(world: World, call: Call) -> tuple[Operation, bool]:
    """Count a poll; return the operation and whether it has ended.

    The number of polls that an operation takes does not depend on time. A URL other than the one issued is refused.
    """
    operation = operation_of(world, call.request.path)
    if operation is None:
        raise ArmError(404, "NotFound", "The entity was not found in this Azure location.")
    expected = {**world.signature(operation), "p": operation.signature, "api-version": operation.version}
    if any(call.query.get(name) != value for name, value in expected.items()):
        raise ArmError(
            403,
            "InvalidOperationUrl",
            "The signature of the operation's URL is not valid: use the URL exactly as it was issued.",
        )
    if operation.polls:
        operation.polls -= 1
        return operation, False
    world.finish(operation)
    return operation, True


_ROUTES = [
    _route("GET", "/subscriptions", groups.list_subscriptions),
    _route("GET", _SUBSCRIPTION, groups.get_subscription),
    _route("GET", _SUBSCRIPTION + "/locations", groups.list_locations),
    _route("GET", _SUBSCRIPTION + "/resources", groups.list_resources),
    _route("GET", _GROUP + "/resources", groups.list_resources),
    _route("GET", _SUBSCRIPTION + "/resourceGroups", groups.list_groups),
    _route("PUT", _GROUP, groups.put_group),
    _route("GET", _GROUP, groups.get_group),
    _route("HEAD", _GROUP, groups.head_group),
    _route("PATCH", _GROUP, groups.patch_group),
    _route("DELETE", _GROUP, groups.delete_group),
    _route("GET", _SUBSCRIPTION + "/providers/{namespace}", groups.get_provider),
    _route("POST", _SUBSCRIPTION + "/providers/{namespace}/register", groups.get_provider),
    _route("POST", _GROUP + _POLICY, policies.restrictions),
    *_lock_routes(),
    *_permission_routes(),
    *_kind_routes(),
    _route("GET", _MACHINE + "/instanceView", machines.get_instance_view),
    *(_route("POST", f"{_MACHINE}/{verb}", handler) for verb, handler in machines.ACTIONS.items()),
    *(_route("POST", f"{_GROUP}/providers/{path}", handler) for path, handler in exports.ACTIONS.items()),
    *(
        _route(method, f"{_GROUP}/providers/{path}", handler)
        for module in (restore_points, disk_points)
        for (method, path), handler in module.ROUTES.items()
    ),
    _route("POST", _GROUP + f"/providers/{STORAGE}/{{name}}/listKeys", accounts.list_keys),
    _route(
        "GET",
        _GROUP + f"/providers/{STORAGE}/{{name}}/blobServices/default/containers",
        accounts.list_containers,
    ),
    _route("GET", _SUBNETS, subnets.list_subnets),
    _route("GET", _SUBNETS + "/{child}", subnets.get_subnet),
    _route("PUT", _SUBNETS + "/{child}", subnets.put_subnet),
    _route("DELETE", _SUBNETS + "/{child}", subnets.delete_subnet),
    _route("GET", _COMPUTE + "/skus", offers.list_skus),
    _route("GET", _LOCATION + "/vmSizes", offers.list_sizes),
    _route("GET", _LOCATION + "/usages", offers.list_usages),
    _route("GET", _LOCATION + "/publishers", offers.list_publishers),
    _route("GET", _IMAGES, offers.list_image_offers),
    _route("GET", _IMAGES + "/{offer}/skus", offers.list_image_skus),
    _route("GET", _IMAGES + "/{offer}/skus/{sku}/versions", offers.list_image_versions),
    _route("GET", _IMAGES + "/{offer}/skus/{sku}/versions/{version}", offers.get_image_version),
    _route("GET", _LOCATION + "/operations/{id}", _either),
    _route("GET", _LOCATION + "/DiskOperations/{id}", _either),
    _route("GET", _SUBSCRIPTION + "/providers/Microsoft.Network/locations/{location}/usages", common.usages),
    _route(
        "GET", _SUBSCRIPTION + "/providers/Microsoft.Network/locations/{location}/operations/{id}", _status
    ),
    _route(
        "GET",
        _SUBSCRIPTION + "/providers/Microsoft.Network/locations/{location}/operationResults/{id}",
        _monitor,
    ),
    _route("GET", _SUBSCRIPTION + "/operationresults/{id}", _monitor),
]


def answer(world: World, request: Request) -> Response:
    """Answer an authenticated request; ArmError if it is refused."""
    path = request.path
    subscription = world.state.identity.subscription
    named = re.match(r"/subscriptions/([^/]+)", path, re.IGNORECASE)
    if named and named.group(1).lower() != subscription:
        raise ArmError(
            404, "SubscriptionNotFound", f"The subscription '{named.group(1)}' could not be found."
        )
    _check_version(request)
    matches = [(route, route.path.fullmatch(path)) for route in _ROUTES]
    candidates = [(route, match) for route, match in matches if match]
    for route, match in candidates:
        if route.method == request.method:
            return route.handler(world, Call(request, match.groupdict(), subscription, _body(request, path)))
    if candidates:
        raise ArmError(405, "MethodNotAllowed", f"The method {request.method} is not allowed on {path}.")
    raise _unknown(world, path, request.query["api-version"])


def _check_version(request: Request) -> None:
    version = request.query.get("api-version")
    if not version:
        raise ArmError(
            400,
            "MissingApiVersionParameter",
            "The api-version query parameter (?api-version=) is required for all requests.",
        )
    if not _API_VERSION.fullmatch(version):
        raise ArmError(400, "InvalidApiVersionParameter", f"The api-version '{version}' is invalid.")


def _body(request: Request, path: str) -> Json:
    if request.method not in {"PUT", "PATCH", "POST"} or not request.body:
        return {}
    try:
        document = json.loads(request.body)
    except ValueError as error:
        raise ArmError(
            400,
            "InvalidRequestContent",
            f"The request content was invalid and could not be deserialized: '{error}'.",
        ) from None
    if not isinstance(document, dict):
        raise ArmError(400, "InvalidRequestContent", "The request content was invalid: it is not an object.")
    try:
        words = path.lower().strip("/").split("/")[5:]  # provider, type, name, nested type, ...
        model = _MODELS.get("/".join([*words[:1], *words[1::2]]))
        return understood(document, model) if model else document
    except Unreadable as error:
        raise ArmError(
            400, "InvalidRequestContent", f"The request content was invalid: {error.message}."
        ) from None


def _unknown(world: World, path: str, version: str) -> ArmError:
    """The error for a path without a route, as close to Azure's as possible."""
    group = re.match(r"(/subscriptions/[^/]+/resourceGroups/([^/]+))/", path, re.IGNORECASE)
    if group and world.state.find(group.group(1)) is None:
        return group_not_found(group.group(2))
    provider = re.search(r"/providers/([^/]+)/([^/]+)", path, re.IGNORECASE)
    if provider is None:
        return ArmError(
            404, "NotFound", f"No HTTP resource was found that matches the request path '{path}'."
        )
    namespace, kind = provider.groups()
    if namespace.lower() not in {name.split("/")[0].lower() for name in _KINDS}:
        return ArmError(404, "InvalidResourceNamespace", f"The resource namespace '{namespace}' is invalid.")
    return ArmError(
        404,
        "InvalidResourceType",
        f"The resource type '{kind}' could not be found in the namespace '{namespace}' for api version "
        f"'{version}'. (The sandbox imitates a part of Azure.)",
    )
