"""What the identity may do: the permissions list, and AuthorizationFailed for the rest.

An action follows from method and path, as in Azure. Some references in a body need an action on what they name
(linked actions): a NIC joins its subnet, a snapshot's source gives access.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from coriolis_azure.sandbox.wire import ArmError, Json, Request, Response
from coriolis_azure.sandbox.world import Call, World

_VERBS = {"GET": "read", "HEAD": "read", "PUT": "write", "PATCH": "write", "DELETE": "delete"}
_PERMISSIONS = "Microsoft.Authorization/permissions/read"
_JOINED = {
    name.lower(): name
    for name in (
        "Microsoft.Network/networkInterfaces",
        "Microsoft.Network/networkSecurityGroups",
        "Microsoft.Network/publicIPAddresses",
        "Microsoft.Network/virtualNetworks/subnets",
    )
}


def list_permissions(world: World, call: Call) -> Response:
    """The identity's roles at a scope."""
    scope = call.request.path.rpartition("/providers/")[0]
    kinds = ("actions", "notActions", "dataActions", "notDataActions")
    roles = held(world.permissions, scope)
    return Response.of(200, {"value": [{kind: each.get(kind, []) for kind in kinds} for each in roles]})


def held(permissions: Iterable[Json], scope: str) -> list[Json]:
    """The roles that count at a scope: each at the scope it is assigned to and below; without one, everywhere."""
    inside = f"{scope.lower()}/"
    return [each for each in permissions if inside.startswith(f"{each.get('scope', '').lower()}/")]


def check(world: World, request: Request) -> None:
    """AuthorizationFailed for an action, LinkedAuthorizationFailed for a linked one, that no role allows."""
    action, scope = action_of(request.method, request.path), _scope(request.path)
    if not allowed(held(world.permissions, scope), action):
        raise ArmError(
            403,
            "AuthorizationFailed",
            f"The client '{world.state.identity.client_id}' with object id '{world.state.identity.client_id}' does "
            f"not have authorization to perform action '{action}' over scope '{scope}' or the scope is invalid. If "
            "access was recently granted, please refresh your credentials.",
        )
    if request.method not in {"PUT", "PATCH"}:
        return
    for linked, target in _linked(request):
        if not allowed(held(world.permissions, target), linked):
            raise ArmError(
                403,
                "LinkedAuthorizationFailed",
                f"The client has permission to perform action '{action}' on scope '{scope}', however the linked "
                f"subscription or resource is not authorized: it has no permission to perform action '{linked}' on "
                f"the linked scope '{target}'.",
            )


def action_of(method: str, path: str) -> str:
    """The action of a request: the provider, the types in the path, and a verb."""
    before, _, inner = path.strip("/").rpartition("/providers/")
    words = inner.split("/")
    if not before:
        kinds = "/".join(path.strip("/").split("/")[::2])
        return f"Microsoft.Resources/{kinds}/{_VERBS.get(method, 'action')}"
    if len(words) == 1:
        return "Microsoft.Resources/subscriptions/providers/read"
    kinds = "/".join([words[0], *words[1::2]])
    if words[1:] == ["checkPolicyRestrictions"]:  # a POST that only reads
        return "Microsoft.PolicyInsights/checkPolicyRestrictions/read"
    return f"{kinds}/{_VERBS.get(method, 'action')}"


def _scope(path: str) -> str:
    return path.rstrip("/")


def _linked(request: Request) -> Iterator[tuple[str, str]]:
    try:
        document = json.loads(request.body or b"{}")
    except ValueError:
        return  # the front desk says what is wrong with it
    for name, target in _references(document.get("properties") if isinstance(document, dict) else None):
        kind = action_of("GET", target).removesuffix("/read")
        if kind.lower() in _JOINED and not target.lower().startswith(request.path.lower()):
            yield f"{_JOINED[kind.lower()]}/join/action", target
        elif name == "sourceResourceId":
            yield f"{kind}/beginGetAccess/action", target
        elif name == "diskEncryptionSetId" or kind.lower() == "microsoft.compute/diskencryptionsets":
            yield f"{kind}/read", target


def _references(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """The ARM ids in a body, with the name of the property that holds each."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _references(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner, name)
    elif isinstance(value, str) and value.lower().startswith("/subscriptions/"):
        yield name, value


def allowed(permissions: Iterable[Json], action: str) -> bool:
    """Whether any of these roles allows an action."""
    return action == _PERMISSIONS or any(
        _any(each.get("actions", ()), action) and not _any(each.get("notActions", ()), action)
        for each in permissions
    )


def _any(patterns: Iterable[str], action: str) -> bool:
    return any(
        re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), action, re.IGNORECASE) for pattern in patterns
    )
