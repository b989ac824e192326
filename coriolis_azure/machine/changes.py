"""Whether a VM still has the disks that a run was prepared for: the worker takes minutes to boot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..azure import names
from ..errors import DisksChanged
from ..model import Disk, Machine


def refuse(before: Machine, disks: Sequence[Disk], now: Iterable[Disk]) -> None:
    """DisksChanged unless those of the VM's disks that matter `now` are as they were `before`.

    `disks` are those that are about to be copied. The others may change in size, and go.
    """
    changes = list(_changes(before, disks, {disk.name: disk for disk in now}))
    if changes:
        told = "; ".join(text for _, text in changes)
        raise DisksChanged(
            f"the disks of {before.name} were changed while its replication was prepared: {told}",
            disks=[name for name, _ in changes],
        )


def _changes(before: Machine, disks: Sequence[Disk], now: dict[str, Disk]) -> Iterator[tuple[str, str]]:
    """Each disk with what has become of it."""
    had = {disk.name: disk for disk in before.disks}
    copied = {disk.name for disk in disks}
    for name in sorted(copied - now.keys()):
        yield name, f"{name} ({names.name_of(had[name].id)}) was detached"
    for name, disk in now.items():
        old, called = had.get(name), names.name_of(disk.id)
        if old is None:
            yield name, f"{name} ({called}) was attached"
        elif not names.same(disk.id, old.id):
            yield name, f"{name} is {called} now, and was {names.name_of(old.id)}"
        elif name not in copied:
            continue
        elif disk.unique_id != old.unique_id:
            yield name, f"{name} ({called}) was deleted and made anew"
        elif disk.size_bytes != old.size_bytes:
            yield name, f"{name} ({called}) has {disk.size_bytes} bytes now, and had {old.size_bytes}"
