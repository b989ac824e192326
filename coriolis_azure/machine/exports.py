"""Opens the snapshots of disks, so that this process can read them through URLs that Azure signs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..azure import names, permissions
from ..azure.context import Context
from ..errors import AzureError, DeadlinePassed, Denied, InvalidInput
from ..model import Disk, Json
from ..run.resources import end_access
from ..threads import ordered
from . import cloning

if TYPE_CHECKING:
    from ..azure.exports import Export  # takes a while to import: not to judge which disks can be exported

LOG = logging.getLogger(__name__)
Exporter = Callable[[Context, Json, int], "Export"]
_PROBE = 512  # bytes
REMEDY = "Leave the disk out (exclude_disks), or set replica_export_mechanism to auto or worker."


def obstacle(disk: Disk, *, modern: bool) -> str:
    """Why the snapshots of a disk cannot be read through a URL; "" if they can.

    `modern`: whether this Azure is no Azure Stack Hub.
    """
    if disk.unmanaged:
        return "it is a VHD blob, which has no managed snapshots"
    if not modern:
        return "an Azure Stack Hub has no URLs for incremental snapshots"
    if disk.sector_bytes != 512:
        return f"it has sectors of {disk.sector_bytes} bytes, whose snapshots are no plain disk images"
    if cloning.copied_in_background(disk):
        return f"it is of type {disk.sku}, whose snapshots can be read only after a copy in the background"
    return ""


def unreadable(disk: Disk, *, modern: bool) -> str:
    """Why this process cannot read the snapshots of a disk at all; "" if it can. A VHD blob's need no URL."""
    return "" if disk.unmanaged else obstacle(disk, modern=modern)


def lacking(context: Context) -> str:
    """Why the identity cannot let snapshots be read, or end that; "" if it can or Azure does not tell.

    Without the permission to end it, Azure would keep the snapshots for as long as they can be read.
    """
    group = f"/subscriptions/{context.azure.subscription}/resourceGroups/{context.environment.resource_group}"
    try:
        entries = context.azure.permissions(group)
    except (AzureError, DeadlinePassed):
        return ""
    actions = [action for action in permissions.ACTIONS if action.feature == permissions.EXPORT]
    missing = [action.name for action in actions if not permissions.granted(entries, action)]
    return f"the identity lacks {' and '.join(missing)} on the resource group" if missing else ""


def obstacles(context: Context, disks: Sequence[Disk]) -> dict[str, str]:
    """Why the snapshots of disks cannot be read through URLs, by disk name; "" where nothing is known against it."""
    found = {disk.name: obstacle(disk, modern=context.azure.is_modern) for disk in disks}
    if all(found.values()):
        return found
    identity = lacking(context)
    return {name: why or identity for name, why in found.items()}


def refuse(disks: Sequence[Disk], *, modern: bool) -> None:
    """Raise InvalidInput if this process cannot read the snapshots of a disk."""
    found = [(disk, unreadable(disk, modern=modern)) for disk in disks]
    faults = [f"{disk.name} cannot be read from its snapshot: {why}" for disk, why in found if why]
    if faults:
        raise InvalidInput(faults, remedy=REMEDY)


def exported(context: Context, snapshot: Json, size: int) -> Export:
    """The content of the snapshot of a disk of `size` bytes, given by Azure's document of it."""
    from ..azure.exports import Export

    return Export(context.azure, snapshot, size, context.clock)


@contextmanager
def opened(
    context: Context, disks: Sequence[Disk], snapshots: Mapping[str, Json], export: Exporter = exported
) -> Iterator[dict[str, Export]]:
    """The content of the snapshots of disks, by disk name; the access ends with the block."""

    def opened_(disk: Disk) -> Export:
        return export(context, snapshots[disk.name], disk.size_bytes)

    try:
        exports = list(ordered(opened_, disks, threads=8, ahead=16))
        yield {disk.name: export for disk, export in zip(disks, exports, strict=True)}
    finally:
        for disk in disks:
            _end(context, snapshots[disk.name]["id"])


@contextmanager
def probed(context: Context, disk: Disk, snapshot: Json) -> Iterator[Export]:
    """The content of a snapshot, once something of it was read. Raises an AzureError if it cannot be read."""
    if why := cloning.why_closed(snapshot):
        raise Denied(f"{names.name_of(snapshot['id'])} cannot be read through a URL: {why}")
    with opened(context, [disk], {disk.name: snapshot}) as contents:
        contents[disk.name].fill(0, memoryview(bytearray(_PROBE)))
        yield contents[disk.name]


def _end(context: Context, snapshot: str) -> None:
    """End the access to a snapshot. If that fails, its deletion ends it: it is not kept as a baseline then."""
    try:
        end_access(context.azure, snapshot, context.clock)
    except (AzureError, DeadlinePassed) as error:
        LOG.warning("the access to %s could not be ended: %s", snapshot, error)
