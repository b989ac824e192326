"""What Azure Policy would refuse of what a run makes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial

from ..azure import names
from ..model import Json, at
from .finding import Finding, ask, error
from .subject import Subject

# Azure Policy wants to know the version that a resource is written in; what is asked here is the same in all.
_ANY_VERSION = "2024-07-01"


def policy(subject: Subject) -> Iterator[Finding]:
    """What Azure Policy would refuse of what a run makes; an older Azure has no such question."""
    if not subject.context.azure.is_modern:
        return
    kinds = {"snapshot": "snapshot-os", "disk": "clone-os", "nsg": "nsg", "nic": "nic", "vm": "worker"}
    if subject.context.environment.export_worker_use_fip:
        kinds["ip"] = "ip"
    if not subject.context.environment.export_network:
        kinds["vnet"] = "vnet"
    refused: dict[str, list[str]] = {}
    fields: set[str] = set()
    for kind, role in kinds.items():
        told = yield from ask("worker", partial(_restrictions, subject, kind, role), optional=True)
        if told is None:
            return
        for policy in _refusing(told):
            refused.setdefault(policy, []).append(names.TYPES[kind])
        fields |= {
            str(at(each, "field", "")) for each in at(told, "fieldRestrictions", []) if _demanded(each)
        }
    tags = sorted(field.partition(".")[2] for field in fields if field.startswith("tags."))
    for policy, types in refused.items():
        yield error(
            "worker",
            f"Azure Policy refuses {', '.join(types)} as they would be made: {policy}",
            f"Give the tags {', '.join(tags)} in the tags of the source environment."
            if tags
            else "Set tags, network or size as the policy demands, or have the resource group exempted from it.",
        )


def _restrictions(subject: Subject, kind: str, role: str) -> Json:
    run = "0" * 8
    content = {
        "type": names.TYPES[kind],
        "name": names.resource(run, role),
        "location": subject.context.environment.location,
        "tags": names.tags(run, role, "", datetime.now(timezone.utc), subject.context.environment.tags),
    }
    if kind == "vm" and subject.context.environment.export_worker_encryption_at_host:
        content["properties"] = {"securityProfile": {"encryptionAtHost": True}}
    version = subject.context.azure.api_versions.get(names.TYPES[kind].lower(), _ANY_VERSION)
    return subject.context.azure.policy_restrictions(
        subject.context.environment.resource_group, content, version
    )


def _refusing(told: Json) -> list[str]:
    """The policies that would refuse a resource, by Azure's answer; those that only audit or change are none."""
    found = []
    for each in at(told, "contentEvaluationResult.policyEvaluations", []):
        effect = str(at(each, "effectDetails.policyEffect", "deny")).lower()
        if at(each, "evaluationResult") == "NonCompliant" and effect == "deny":
            found.append(
                names.name_of(str(at(each, "policyInfo.policyAssignmentId", "a policy without a name")))
            )
    return found


def _demanded(field: Json) -> bool:
    """Whether a policy demands that a resource has this field."""
    return any(at(each, "result") == "Required" for each in at(field, "restrictions", []))
