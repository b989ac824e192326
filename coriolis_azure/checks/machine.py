"""Checks the VM and its disks for what users should know before they move them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial

from ..azure import names
from ..events import Step, amount, counted, duration
from ..machine import cloning, inspection
from ..model import Disk, Json, at
from .finding import Finding, ask, error, fine, warning
from .subject import Subject

_UPLOADING = {"ReadyToUpload", "ActiveUpload"}
_HIBERNATED = {"Frozen", "ActiveSASFrozen"}
_EXPORTING = {"ActiveSAS", "ActiveSASFrozen"}


def named(subject: Subject, vm: str) -> Generator[Finding, None, Subject]:
    """Check the VM `vm`; return the subject with the VM and its disks to copy, as far as they can be read."""
    context = subject.context
    context.report(Step("inspect", vm.rpartition("/")[2]))
    group, location = context.environment.resource_group, context.environment.location
    excluded = context.environment.exclude_disks
    machine = yield from ask(
        "inspect", lambda: inspection.read(context.azure, group, location, vm, context.storage, excluded)
    )
    if machine is None:
        return subject
    for caveat in machine.caveats:
        yield warning("inspect", caveat)
    chosen = yield from ask("inspect", lambda: inspection.chosen(machine, excluded))
    if chosen is not None:
        total = sum(disk.size_bytes for disk in chosen)
        rest = f", {len(machine.disks) - len(chosen)} left out" if len(chosen) < len(machine.disks) else ""
        yield fine(
            "inspect", f"VM {machine.name}: {counted(len(chosen), 'disk')}, {amount(total)} in total{rest}"
        )
    subject = replace(subject, machine=machine, disks=machine.disks if chosen is None else chosen)
    yield from _disks(subject)
    return subject


def _disks(subject: Subject) -> Iterator[Finding]:
    for disk in subject.disks:
        if disk.unmanaged:
            yield fine("snapshot", f"{disk.name} is a VHD blob: {disk.id}")
            continue
        document = yield from ask("snapshot", partial(subject.context.azure.get, disk.id))
        if document is not None:
            yield from _disk(subject, disk, document)
    for id in sorted({disk.encryption_set for disk in subject.disks if disk.encryption_set}):
        if (yield from ask("clone", partial(subject.context.azure.encryption_set, id))):
            yield fine("clone", f"disk encryption set {names.name_of(id)} can be read")


def _disk(subject: Subject, disk: Disk, document: Json) -> Iterator[Finding]:
    """Report what a disk's state and access settings mean for its snapshot and its clone."""
    state = at(document, "properties.diskState", "")
    title = f"{disk.name} ({names.name_of(disk.id)})"
    if state in _UPLOADING:
        yield error(
            "snapshot",
            f"{title} is waiting for an upload ({state}): it cannot be snapshotted",
            "End the upload, or leave the disk out with exclude_disks.",
        )
    if state in _HIBERNATED:
        yield warning(
            "snapshot",
            f"{title} belongs to a hibernated VM: the guest's memory is not copied",
            "Start the VM and shut it down so that the replica boots cleanly.",
        )
    if state in _EXPORTING:
        yield warning(
            "snapshot",
            f"{title} is being exported by somebody (it has an active shared access signature)",
            "Wait until the export has ended, or revoke the access; until then the VM cannot be started.",
        )
    if cloning.copied_in_background(disk):
        yield warning(
            "snapshot",
            f"{title} is of type {disk.sku}: in each run Azure copies its snapshot in the background before it can be "
            f"used. This takes about {duration(cloning.background_seconds(disk))} if the disk is full and Azure copies "
            f"{amount(cloning.BACKGROUND_RATE)}/s (an estimate: Azure guarantees no rate)",
            "Plan for that time, or leave the disk out with exclude_disks.",
        )
    if cloning.clone_sku(disk) == "PremiumV2_LRS" and subject.machine and not subject.machine.zones:
        yield warning(
            "clone",
            f"{title} has 4096-byte sectors and no zone: its copy is a Premium SSD v2 disk, which in most locations "
            "can only be attached within a zone",
            "If the run fails to attach the copy, leave the disk out with exclude_disks.",
        )
    access = at(document, "properties.networkAccessPolicy", "AllowAll")
    if access != "AllowAll" or at(document, "properties.dataAccessAuthMode", "None") != "None":
        yield fine("snapshot", f"{title} may not be exported ({access}); the worker can still read it")
