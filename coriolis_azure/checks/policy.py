"""Checks whether Azure Policy would deny the resources that a run creates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from functools import partial

from ..azure import names
from ..machine.cloning import OPEN
from ..model import Json, at
from ..settings import AUTO, DISK, HYBRID, SNAPSHOTS
from .finding import Finding, ask, error, warning
from .subject import Subject

# Azure Policy requires an API version with a resource; the properties sent here are the same in all versions.
_ANY_VERSION = "2024-07-01"


def policy(subject: Subject) -> Iterator[Finding]:
    """Ask Azure Policy about each kind of resource that a run creates; an older Azure cannot answer that."""
    if not subject.context.azure.is_modern:
        return
    kinds = {"snapshot": "snapshot-os"}
    if subject.context.environment.consistency != DISK:
        kinds["collection"] = "points"
    if subject.uses_worker:
        kinds |= {"disk": "clone-os", "nsg": "nsg", "nic": "nic", "vm": "worker"}
        if subject.context.environment.export_worker_use_fip:
            kinds["ip"] = "ip"
        if not subject.context.environment.export_network:
            kinds["vnet"] = "vnet"
    if subject.context.environment.replica_export_mechanism in (HYBRID, AUTO):
        yield from _readable(subject)
    denied: dict[str, list[str]] = {}
    fields: set[str] = set()
    for kind, role in kinds.items():
        answer = yield from ask("worker", partial(_restrictions, subject, kind, role), optional=True)
        if answer is None:
            return
        for policy in _denying(answer):
            denied.setdefault(policy, []).append(names.TYPES[kind])
        fields |= {
            str(at(field, "field", ""))
            for field in at(answer, "fieldRestrictions", [])
            if _is_required(field)
        }
    tags = sorted(field.partition(".")[2] for field in fields if field.startswith("tags."))
    for policy, types in denied.items():
        yield error(
            "worker",
            f"Azure Policy would deny creating {', '.join(types)}: {policy}",
            f"Give the tags {', '.join(tags)} in the tags of the source environment."
            if tags
            else "Set tags, network or size as the policy requires, or have the resource group exempted from it.",
        )


def _readable(subject: Subject) -> Iterator[Finding]:
    """Ask about snapshots that can be read through URLs; without them, a worker reads whole disks."""
    question = partial(_restrictions, subject, "snapshot", "snapshot-os", OPEN)
    answer = yield from ask("read", question, optional=True)
    for policy in _denying(answer) if answer is not None else ():
        yield warning(
            "read",
            f"Azure Policy would deny snapshots that can be read through URLs ({policy}): a worker reads whole disks",
        )


def _restrictions(
    subject: Subject, kind: str, role: str, properties: Mapping[str, str] | None = None
) -> Json:
    run = "0" * 8
    if kind == "snapshot" and subject.context.environment.replica_export_mechanism == SNAPSHOTS:
        properties = OPEN
    content = {
        "type": names.TYPES[kind],
        "name": names.resource(run, role),
        "location": subject.context.environment.location,
        "tags": names.tags(run, role, "", datetime.now(timezone.utc), subject.context.environment.tags),
    }
    if properties:
        content["properties"] = dict(properties)
    if kind == "vm" and subject.context.environment.export_worker_encryption_at_host:
        content["properties"] = {"securityProfile": {"encryptionAtHost": True}}
    version = subject.context.azure.api_versions.get(names.TYPES[kind].lower(), _ANY_VERSION)
    return subject.context.azure.policy_restrictions(
        subject.context.environment.resource_group, content, version
    )


def _denying(answer: Json) -> list[str]:
    """The policies that would deny a resource, from Azure's answer; not those that only audit or modify."""
    policies = []
    for evaluation in at(answer, "contentEvaluationResult.policyEvaluations", []):
        effect = str(at(evaluation, "effectDetails.policyEffect", "deny")).lower()
        if at(evaluation, "evaluationResult") == "NonCompliant" and effect == "deny":
            policies.append(
                names.name_of(str(at(evaluation, "policyInfo.policyAssignmentId", "a policy without a name")))
            )
    return policies


def _is_required(field: Json) -> bool:
    """Whether a policy requires a resource to have this field."""
    return any(at(restriction, "result") == "Required" for restriction in at(field, "restrictions", []))
