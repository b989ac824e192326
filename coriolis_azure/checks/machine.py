"""The VM and its disks: what a person should know before moving them."""

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
    """The VM `vm`; the subject with the VM and those of its disks that are copied, as far as they can be read."""
    context = subject.context
    context.report(Step("inspect", vm))
    group, here = context.environment.resource_group, context.environment.location
    excluded = context.environment.exclude_disks
    machine = yield from ask(
        "inspect", lambda: inspection.read(context.azure, group, here, vm, context.storage, excluded)
    )
    if machine is None:
        return subject
    for caveat in machine.caveats:
        yield warning("inspect", caveat)
    chosen = yield from ask("inspect", lambda: inspection.chosen(machine, excluded))
    if chosen is not None:
        total = sum(disk.size_bytes for disk in chosen)
        out = f", {len(machine.disks) - len(chosen)} left out" if len(chosen) < len(machine.disks) else ""
        yield fine(
            "inspect", f"VM {machine.name}: {counted(len(chosen), 'disk')}, {amount(total)} in all{out}"
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
    """What a disk's state and access settings mean for its snapshot and its clone."""
    state = at(document, "properties.diskState", "")
    told = f"{disk.name} ({names.name_of(disk.id)})"
    if state in _UPLOADING:
        yield error(
            "snapshot",
            f"{told} is waiting for an upload ({state}): it cannot be snapshotted",
            "End the upload, or leave the disk out with exclude_disks.",
        )
    if state in _HIBERNATED:
        yield warning(
            "snapshot",
            f"{told} belongs to a hibernated VM: the guest's memory is not copied",
            "Start the VM and shut it down, for a replica that boots cleanly.",
        )
    if state in _EXPORTING:
        yield warning(
            "snapshot",
            f"{told} is being exported by somebody (it has an active shared access signature)",
            "Wait until that has ended or revoke the access; until then the VM cannot be started.",
        )
    if cloning.copied_in_background(disk):
        yield warning(
            "snapshot",
            f"{told} is of the type {disk.sku}: in each run Azure copies its snapshot in the background before it "
            f"can be used, about {duration(cloning.background_seconds(disk))} if the disk is full and Azure "
            f"copies {amount(cloning.BACKGROUND_RATE)}/s (an estimate: it promises no rate)",
            "Plan the run with that time, or leave the disk out with exclude_disks.",
        )
    if cloning.clone_sku(disk) == "PremiumV2_LRS" and subject.machine and not subject.machine.zones:
        yield warning(
            "clone",
            f"{told} has sectors of 4096 bytes, and no zone: its copy is a Premium SSD v2 disk, which in most "
            "locations can be attached within a zone only",
            "Leave the disk out with exclude_disks if the run fails when it attaches the copy.",
        )
    access = at(document, "properties.networkAccessPolicy", "AllowAll")
    if access != "AllowAll" or at(document, "properties.dataAccessAuthMode", "None") != "None":
        yield fine("snapshot", f"{told} may not be exported ({access}); the worker reads it all the same")
