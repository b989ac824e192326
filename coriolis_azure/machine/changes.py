"""Checks that a VM still has the disks that a run was prepared for, since the worker takes minutes to boot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..azure import names
from ..errors import DisksChanged
from ..model import Disk, Machine


def refuse(before: Machine, disks: Sequence[Disk], now: Iterable[Disk]) -> None:
    """Raise DisksChanged unless the VM's disks `now` match those `before`.

    `disks` are about to be copied. Other disks may change in size or be detached.
    """
    changes = list(_changes(before, disks, {disk.name: disk for disk in now}))
    if changes:
        summary = "; ".join(text for _, text in changes)
        raise DisksChanged(
            f"the disks of {before.name} were changed while its replication was prepared: {summary}",
            disks=[name for name, _ in changes],
        )


def _changes(before: Machine, disks: Sequence[Disk], now: dict[str, Disk]) -> Iterator[tuple[str, str]]:
    """Yield the name of each changed disk and a description of the change."""
    previous = {disk.name: disk for disk in before.disks}
    copied = {disk.name for disk in disks}
    for name in sorted(copied - now.keys()):
        yield name, f"{name} ({names.name_of(previous[name].id)}) was detached"
    for name, disk in now.items():
        old, azure_name = previous.get(name), names.name_of(disk.id)
        if old is None:
            yield name, f"{name} ({azure_name}) was attached"
        elif not names.same(disk.id, old.id):
            yield name, f"{name} is now {azure_name}; it was {names.name_of(old.id)}"
        elif name not in copied:
            continue
        elif disk.unique_id != old.unique_id:
            yield name, f"{name} ({azure_name}) was deleted and created again"
        elif disk.size_bytes != old.size_bytes:
            yield name, f"{name} ({azure_name}) now has {disk.size_bytes} bytes; it had {old.size_bytes}"
