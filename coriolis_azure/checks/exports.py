"""Checks that the snapshots of the disks can be read through URLs that Azure signs."""

from __future__ import annotations

from collections.abc import Iterator

from ..machine.exports import REMEDY, obstacle
from .finding import Finding, error, fine
from .subject import Subject


def exportable(subject: Subject) -> Iterator[Finding]:
    """Check each disk; without a VM there is nothing to check."""
    modern = subject.context.azure.is_modern
    found = [(disk, obstacle(disk, modern=modern)) for disk in subject.disks]
    for disk, why in found:
        if why:
            yield error("read", f"{disk.name} cannot be read from its snapshot: {why}", REMEDY)
    if found and not any(why for _, why in found):
        yield fine("read", "all disks can be read from their snapshots")
