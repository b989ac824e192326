"""Everything that can be known before anything is created or shut down: all findings at once, each with its remedy.

Nothing is written in Azure. Every question is asked even where others fail; only without a sign-in are those to Azure
left out, as all would get the same answer. What is asked for the check's sake alone (permissions, locks, quota, API
versions) is a warning where it cannot be known: the work may be possible all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator

from ..azure.context import Context
from ..azure.permissions import POOL, SHUTDOWN
from ..model import Disk, Machine
from . import connection, leftovers, locks, machine, network, permissions, policy, storage, worker
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
    """Check connection and environment, and the VM `vm` (a name or an ARM id) where one is named.

    A missing permission without which runs do their work all the same is a warning, and an error where the check is
    `strict`: then nothing may be missing of what `permissions.role` holds.

    `uses` and `may_use`: features of `azure.permissions` that the caller chooses, or may choose later.
    """
    found: list[Finding] = []
    questions = _questions(Subject(context, uses=uses, may_use=may_use, strict=strict), vm)
    while True:
        try:
            found.append(next(questions))
        except StopIteration as end:
            return Checked(tuple(dict.fromkeys(found)), end.value)


def refuse(context: Context, machine: Machine, disks: tuple[Disk, ...]) -> None:
    """InvalidInput where it is certain that a run of `machine` would fail after it has made something.

    What inspection and the launch of a worker refuse in time is not asked again. Permissions and policies are for
    `check`: a role may be given on a single resource, and Azure Policy is asked about resources that are not complete.
    """
    Checked(tuple(dict.fromkeys(_certain(Subject(context, machine, disks))))).require()


def _questions(subject: Subject, vm: str | None) -> Generator[Finding, None, Machine | None]:
    """All questions, in the order of a run's steps; the machine."""
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
        size = yield from worker.size(subject)
        if size is not None:
            yield from worker.capacity(subject, size)
        yield from worker.image(subject)
        yield from worker.encryption(subject)
        yield from network.subnet(subject)
        yield from network.quota(subject)
        yield from leftovers.leftovers(subject)
        yield from connection.api_versions(subject)
    yield from network.exposure(subject)
    return subject.machine


def _certain(subject: Subject) -> Iterator[Finding]:
    """What would certainly end a run."""
    yield from connection.subscription(subject)
    yield from locks.locks(subject)
    size = yield from worker.size(subject)
    if size is not None:
        yield from worker.capacity(subject, size)
    yield from network.subnet(subject)
    yield from network.quota(subject)
