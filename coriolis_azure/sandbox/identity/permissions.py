"""The identity's permissions: their list, and AuthorizationFailed for everything else.

As in Azure, a request's action follows from its method and path. Some references in a body require an action on the
resource they name (linked actions): a NIC joins its subnet, a snapshot gets access to its source.
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
    return Response.of(200, {"value": [{kind: role.get(kind, []) for kind in kinds} for role in roles]})


def held(permissions: Iterable[Json], scope: str) -> list[Json]:
    """The roles that apply at a scope: at or below the scope of their assignment; without one, everywhere."""
    inside = f"{scope.lower()}/"
    return [role for role in permissions if inside.startswith(f"{role.get('scope', '').lower()}/")]


def check(world: World, request: Request) -> None:
    """Raise AuthorizationFailed, or LinkedAuthorizationFailed for a linked action, if no role allows it."""
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
    """The action of a request: provider, types in the path, and a verb."""
    before, _, inner = path.strip("/").rpartition("/providers/")
    words = inner.split("/")
    if not before:
        kinds = "/".join(path.strip("/").split("/")[::2])
        return f"Microsoft.Resources/{kinds}/{_VERBS.get(method, 'action')}"
    if len(words) == 1:
        return "Microsoft.Resources/subscriptions/providers/read"
    kinds = "/".join([words[0], *words[1::2]])
    if words[1:] == ["checkPolicyRestrictions"]:  # a POST, but read-only
        return "Microsoft.PolicyInsights/checkPolicyRestrictions/read"
    return f"{kinds}/{_VERBS.get(method, 'action')}"


def _scope(path: str) -> str:
    return path.rstrip("/")


def _linked(request: Request) -> Iterator[tuple[str, str]]:
    try:
        document = json.loads(request.body or b"{}")
    except ValueError:
        return  # `arm` reports the invalid body
    for name, target in _references(document.get("properties") if isinstance(document, dict) else None):
        kind = action_of("GET", target).removesuffix("/read")
        if kind.lower() in _JOINED and not target.lower().startswith(request.path.lower()):
            yield f"{_JOINED[kind.lower()]}/join/action", target
        elif name == "sourceResourceId":
            yield f"{kind}/beginGetAccess/action", target
        elif (
            name in {"diskEncryptionSetId", "diskAccessId"}
            or kind.lower() == "microsoft.compute/diskencryptionsets"
        ):
            yield f"{kind}/read", target


def _references(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """The ARM ids in a body, each with the name of its property."""
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
        _any(role.get("actions", ()), action) and not _any(role.get("notActions", ()), action)
        for role in permissions
    )


def _any(patterns: Iterable[str], action: str) -> bool:
    return any(
        re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), action, re.IGNORECASE) for pattern in patterns
    )
