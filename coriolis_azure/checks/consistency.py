"""Checks that Azure takes restore points of the VM, if the settings ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..machine import cloning, restore_points
from ..model import Disk
from ..settings import APPLICATION, DISK, SNAPSHOTS
from .finding import Finding, ask, error, fine, warning
from .subject import Subject

_OTHER = "Set consistency to disk."


def restorable(subject: Subject, *, certain: bool) -> Iterator[Finding]:
    """Check the VM and each of its disks; if `certain`, only for what would certainly end a run."""
    consistency = subject.context.environment.consistency
    if consistency == DISK:
        return
    if not subject.context.azure.is_modern:
        yield error("snapshot", "an Azure Stack Hub has no restore points", _OTHER)
    if subject.machine is None:
        return
    if subject.machine.power_state == "deallocated":
        yield fine("snapshot", "the VM is deallocated: its disks need no restore point to be consistent")
        return
    found = [(disk, restore_points.obstacle(disk, consistency)) for disk in subject.disks]
    for disk, why in found:
        if why:
            yield error(
                "snapshot", f"Azure takes no restore point of {disk.name}: {why}", restore_points.REMEDY
            )
    if subject.context.environment.replica_export_mechanism == SNAPSHOTS:
        for disk, why in found:
            yield from _open(subject, disk) if not why else ()
    if not certain:
        yield from _caveats(subject)


def _open(subject: Subject, disk: Disk) -> Iterator[Finding]:
    """A disk of a restore point has the network access policy of its disk, which decides whether it can be read."""
    document = yield from ask("read", partial(subject.context.azure.get, disk.id))
    if document is not None and (why := cloning.why_closed(document)):
        text = f"the restore point of {disk.name} cannot be read: {why}, as its disk has"
        yield error("read", text, restore_points.CLOSED_REMEDY)


def _caveats(subject: Subject) -> Iterator[Finding]:
    """What users should know before they rely on restore points."""
    settings = subject.context.environment
    if settings.consistency == APPLICATION:
        yield warning(
            "snapshot",
            "for application consistency Azure installs the extension VMSnapshot in the VM, and needs its VM agent",
            "Set consistency to crash if nothing may be installed.",
        )
    cached = [disk.name for disk in subject.disks if disk.caching == "ReadWrite"]
    if len(subject.disks) > 1 and cached:
        yield warning(
            "snapshot",
            f"{', '.join(cached)} caches writes on the host: across disks, Azure does not guarantee consistency",
            "Set the caching to ReadOnly or None if the applications rely on it.",
        )
    if settings.keep_baseline:
        yield warning(
            "read",
            "no baseline is kept: the disks of restore points are not compared, so all allocated pages are read",
            "Set consistency to disk to read only what changed.",
        )
    yield fine("snapshot", "all disks are taken at one moment; Azure allows three restore points an hour")
