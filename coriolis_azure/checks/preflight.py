"""Checks everything that can be known before a run creates or shuts down anything, and reports all findings at once.

Nothing is written in Azure. One failed check does not stop the others; only if the sign-in fails are the requests to
Azure skipped, as all of them would fail in the same way. If something that only the check needs (permissions, locks,
quota, API versions) cannot be read, that is a warning: a run may work all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator

from ..azure.context import Context
from ..azure.permissions import POOL, SHUTDOWN
from ..model import Disk, Machine
from ..settings import AUTO, SNAPSHOTS, WORKER
from . import (
    connection,
    consistency,
    exports,
    leftovers,
    locks,
    machine,
    network,
    permissions,
    policy,
    storage,
    worker,
)
from .finding import Checked, Finding
from .subject import Subject


def check(
    context: Context,
    vm: str | None,
    *,
    strict: bool = False,
    uses: Collection[str] = (),
    may_use: Collection[str] = (SHUTDOWN, POOL),
) -> Checked:
    """Check connection and environment, and the VM `vm` (a name or an ARM id) if one is named.

    A missing permission that runs can do without is a warning; if the check is `strict`, it is an error: then every
    permission in `permissions.role` is required.

    `uses` and `may_use` are features of `azure.permissions` that the caller chooses, or may choose later.
    """
    findings: list[Finding] = []
    checks = _checks(Subject(context, uses=uses, may_use=may_use, strict=strict), vm)
    while True:
        try:
            findings.append(next(checks))
        except StopIteration as end:
            return Checked(tuple(dict.fromkeys(findings)), end.value)


def refuse(
    context: Context, machine: Machine, disks: tuple[Disk, ...], *, shares_worker: bool = False
) -> None:
    """Raise InvalidInput if a run of `machine` would certainly fail after it has created something.

    `shares_worker`: nothing is checked of a worker, because it may be there already.

    What inspection and the launch of a worker reject in time is not checked again. Permissions and policies are left
    to `check`: a role may be assigned on a single resource, and Azure Policy is asked about incomplete resources.
    """
    subject = Subject(context, machine, disks)
    Checked(tuple(dict.fromkeys(_certain(subject, shares_worker=shares_worker)))).require()


def _checks(subject: Subject, vm: str | None) -> Generator[Finding, None, Machine | None]:
    """Run all checks in the order of a run's steps; return the machine."""
    if (yield from connection.signed_in(subject)):
        yield from connection.subscription(subject)
        yield from connection.group(subject)
        yield from connection.location(subject)
        yield from storage.container(subject)
        if vm is not None:
            subject = yield from machine.named(subject, vm)
        yield from permissions.permitted(subject)
        yield from locks.locks(subject)
        yield from policy.policy(subject)
        yield from _mechanism(subject, certain=False)
        yield from leftovers.leftovers(subject)
        yield from connection.api_versions(subject)
    if subject.uses_worker:
        yield from network.exposure(subject)
    return subject.machine


def _mechanism(subject: Subject, *, certain: bool, shares_worker: bool = False) -> Iterator[Finding]:
    """Check what the way to read disks needs; if `certain`, only what would certainly end a run."""
    yield from consistency.restorable(subject, certain=certain)
    mechanism = subject.context.environment.replica_export_mechanism
    if mechanism == SNAPSHOTS:
        yield from exports.exportable(subject)
        if certain:  # otherwise the check of all permissions has told
            yield from exports.permitted(subject)
        return
    if shares_worker or (certain and mechanism == AUTO and not exports.need_worker(subject)):
        return
    if not certain:
        told = {WORKER: exports.baselines, AUTO: exports.chosen}.get(mechanism, exports.listed)
        yield from told(subject)
    size = yield from worker.size(subject)
    if size is not None:
        yield from worker.capacity(subject, size)
    if not certain:
        yield from worker.image(subject)
        yield from worker.encryption(subject)
    yield from network.subnet(subject)
    yield from network.quota(subject)


def _certain(subject: Subject, *, shares_worker: bool) -> Iterator[Finding]:
    """Run the checks whose errors would certainly end a run."""
    yield from connection.subscription(subject)
    yield from locks.locks(subject)
    yield from _mechanism(subject, certain=True, shares_worker=shares_worker)
