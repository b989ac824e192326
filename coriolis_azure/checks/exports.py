"""Checks that the snapshots of the disks can be read through URLs that Azure signs."""

from __future__ import annotations

from collections.abc import Iterator

from ..machine import exports
from ..machine.choice import choose
from ..settings import SNAPSHOTS
from .finding import Finding, error, fine, warning
from .subject import Subject


def exportable(subject: Subject) -> Iterator[Finding]:
    """Check each disk whose snapshot this process has to read; without a VM there is nothing to check."""
    modern = subject.context.azure.is_modern
    found = [(disk, exports.unreadable(disk, modern=modern)) for disk in subject.disks]
    for disk, why in found:
        if why:
            yield error("read", f"{disk.name} cannot be read from its snapshot: {why}", exports.REMEDY)
    if found and not any(why for _, why in found):
        yield fine("read", "all disks can be read from their snapshots")


def permitted(subject: Subject) -> Iterator[Finding]:
    """Check that the identity can let snapshots be read and end that. A snapshot that is not closed stays in Azure."""
    if any(not disk.unmanaged for disk in subject.disks) and (why := exports.lacking(subject.context)):
        yield error("read", why, f"Give the identity these permissions. {exports.REMEDY}")


def listed(subject: Subject) -> Iterator[Finding]:
    """Tell of which disks Azure gives no lists: a worker reads all of them."""
    for name, why in exports.obstacles(subject.context, subject.disks).items():
        if why:
            yield warning("read", f"the worker reads all of {name} in each run: {why}")


def baselines(subject: Subject) -> Iterator[Finding]:
    """Warn of a setting that the mechanism `worker` makes no use of."""
    if subject.context.environment.keep_baseline:
        yield warning(
            "read",
            "keep_baseline has no effect: the mechanism worker reads whole disks in each run",
            "Set replica_export_mechanism to hybrid, snapshots or auto, or leave keep_baseline out.",
        )


def chosen(subject: Subject) -> Iterator[Finding]:
    """Tell how each disk is going to be read, and why."""
    for name, choice in choose(subject.context, subject.disks, lambda _: False).items():
        by = "from its snapshot" if choice.mechanism == SNAPSHOTS else "by a worker"
        yield fine("read", f"{name} is read {by}: {choice.reason}")


def need_worker(subject: Subject) -> bool:
    """Whether a disk cannot do without a worker."""
    return any(choice.needs_worker for choice in choose(subject.context, subject.disks).values())
