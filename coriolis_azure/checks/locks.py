"""Checks for management locks on what a run creates or uses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..azure import names
from ..model import Json, at
from .finding import Finding, ask, error, warning
from .subject import Subject


def locks(subject: Subject) -> Iterator[Finding]:
    """Check for locks that would stop a run or its clean-up."""
    by_id: dict[str, Json] = {}
    for scope in (subject.group, subject.subscription):
        listed = yield from ask("clean up", partial(subject.context.azure.locks, scope), optional=True)
        by_id |= {lock["id"].lower(): lock for lock in listed or ()}
    for lock in by_id.values():
        yield from _lock(subject, lock)


def _lock(subject: Subject, lock: Json) -> Iterator[Finding]:
    """The finding for a lock, if it is on what a run creates or uses."""
    scope = lock["id"].partition("/providers/Microsoft.Authorization/locks")[0]
    level, name = at(lock, "properties.level", "?"), lock.get("name", "?")
    text = f"the lock {name} ({level}) on {scope}"
    remedy = "Ask its owner to remove the lock while runs are active. This program never removes locks."
    if names.same(scope, subject.group) or names.same(scope, subject.subscription):
        if level == "ReadOnly":
            yield error("worker", f"{text} forbids creating anything", remedy)
        else:
            yield error("clean up", f"{text} forbids deleting what a run creates", remedy)
        return
    used = [subject.machine.id, *(disk.id for disk in subject.disks)] if subject.machine else []
    if subject.context.environment.export_network:
        used.append((subject.subnet or "-").partition("/subnets/")[0])
    if level == "ReadOnly" and any(names.same(scope, id) for id in used):
        yield warning("snapshot", f"{text} may forbid reading the disk, shutting down, or joining", remedy)
