"""Locks that others have set over what a run makes or uses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..azure import names
from ..model import Json, at
from .finding import Finding, ask, error, warning
from .subject import Subject


def locks(subject: Subject) -> Iterator[Finding]:
    """Locks that would stop a run, or its cleanup."""
    found: dict[str, Json] = {}
    for scope in (subject.group, subject.subscription):
        listed = yield from ask("clean up", partial(subject.context.azure.locks, scope), optional=True)
        found |= {lock["id"].lower(): lock for lock in listed or ()}
    for lock in found.values():
        yield from _lock(subject, lock)


def _lock(subject: Subject, lock: Json) -> Iterator[Finding]:
    """A finding for a lock over what a run makes, or over what it uses."""
    scope = lock["id"].partition("/providers/Microsoft.Authorization/locks")[0]
    level, name = at(lock, "properties.level", "?"), lock.get("name", "?")
    told = f"the lock {name} ({level}) on {scope}"
    remedy = "Ask its owner to remove the lock for the time of the runs. It is never removed by us."
    if names.same(scope, subject.group) or names.same(scope, subject.subscription):
        if level == "ReadOnly":
            yield error("worker", f"{told} forbids to make anything", remedy)
        else:
            yield error("clean up", f"{told} forbids to delete what a run makes", remedy)
        return
    used = [subject.machine.id, *(disk.id for disk in subject.disks)] if subject.machine else []
    if subject.context.environment.export_network:
        used.append((subject.subnet or "-").partition("/subnets/")[0])
    if level == "ReadOnly" and any(names.same(scope, id) for id in used):
        yield warning("snapshot", f"{told} may forbid to use it: to read a disk, shut down or join", remedy)
