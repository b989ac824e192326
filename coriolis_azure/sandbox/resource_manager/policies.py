"""The sandbox's part of Azure Policy: tags that every resource must have.

A resource without them is refused on creation, and checkPolicyRestrictions says so in advance.
"""

from __future__ import annotations

import json
import re
from typing import Any

from coriolis_azure.sandbox.wire import ArmError, Json, Request, Response
from coriolis_azure.sandbox.world import Call, World

_GROUP = "/providers/Microsoft.Management/managementGroups/sandbox/providers/Microsoft.Authorization"
ASSIGNMENT = f"{_GROUP}/policyAssignments/required-tags"
_DEFINITION = f"{_GROUP}/policyDefinitions/required-tags"
_TAGGED = re.compile(r".*/providers/Microsoft\.(Compute|Network|Storage)/\w+/[^/]+/?", re.IGNORECASE)


def check(world: World, request: Request) -> None:
    """Raise RequestDisallowedByPolicy if a resource would lack a tag."""
    if request.method != "PUT" or not world.required_tags or not _TAGGED.fullmatch(request.path):
        return
    try:
        document = json.loads(request.body)
    except ValueError:
        return  # `arm` reports the invalid body
    missing = _missing(world, document)
    if missing:
        identifiers = json.dumps([{"policyAssignment": {"name": "required-tags", "id": ASSIGNMENT}}])
        raise ArmError(
            403,
            "RequestDisallowedByPolicy",
            f"Resource '{request.path.rpartition('/')[2]}' was disallowed by policy. Policy identifiers: "
            f"'{identifiers}'.",
        )


def restrictions(world: World, call: Call) -> Response:
    """POST checkPolicyRestrictions: whether a resource would be refused, and which fields it must have."""
    world.group(call)
    details = call.body.get("resourceDetails")
    content = details.get("resourceContent") if isinstance(details, dict) else None
    if not isinstance(content, dict):
        raise ArmError(
            400, "InvalidRequestContent", "The request content has no resourceDetails.resourceContent."
        )
    missing = _missing(world, content)
    policy = {"policyAssignmentId": ASSIGNMENT, "policyDefinitionId": _DEFINITION}
    evaluations: list[Json] = [
        {
            "policyInfo": policy,
            "evaluationResult": "NonCompliant",
            "evaluationDetails": {"evaluatedExpressions": []},
            "effectDetails": {"policyEffect": "Deny"},
        }
    ]
    fields = [
        {
            "field": f"tags.{name}",
            "restrictions": [{"result": "Required", "values": [], "policy": policy, "policyEffect": "Deny"}],
        }
        for name in missing
    ]
    result = {"policyEvaluations": evaluations if missing else []}
    return Response.of(200, {"fieldRestrictions": fields, "contentEvaluationResult": result})


def _missing(world: World, document: Any) -> list[str]:
    tags = document.get("tags") if isinstance(document, dict) else None
    present = {name.lower() for name in tags} if isinstance(tags, dict) else set()
    return [name for name in world.required_tags if name.lower() not in present]
