"""Identifies block devices. Names in `/dev` are assigned at each boot, so they identify nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NUMBERS = Path("/sys/dev/block")
# The first that exists counts; of a LUN, an NVMe namespace, a SCSI or virtio disk, a mapping such as an LV, a RAID.
_IDENTITIES = ("device/wwid", "wwid", "serial", "device/serial", "dm/uuid", "md/uuid")


def identity(number: int) -> str:
    """A lasting identity of the device with this number; "" if the kernel knows none."""
    place = _NUMBERS / f"{os.major(number)}:{os.minor(number)}"
    start = _text(place / "start")
    if _text(place / "partition"):  # its folder is inside that of the disk
        whole = _of_disk(place.resolve().parent)
        return f"{whole}, partition at {start}" if whole else ""
    return _of_disk(place)


def is_name(path: Path) -> bool:
    """Whether an absolute path is among the names of devices; /dev/shm is for everybody's files."""
    return path.parts[1:2] == ("dev",) and path.parts[2:3] != ("shm",)


def relatives(number: int) -> list[int]:
    """The numbers of the device's partitions or, for a partition, of its disk."""
    place = _NUMBERS / f"{os.major(number)}:{os.minor(number)}"
    if _text(place / "partition"):
        return [_number(place.resolve().parent)]
    return [_number(partition.parent) for partition in place.glob("*/partition")]


def node(number: int) -> Path:
    """The device's path in /dev. Raises OSError if the kernel knows no such device."""
    place = _NUMBERS / f"{os.major(number)}:{os.minor(number)}"
    return Path("/dev") / place.resolve(strict=True).name.replace("!", "/")


def below(number: int) -> Iterator[tuple[str, Path]]:
    """Yield what the device consists of, recursively: the name of a device, and a file or device below it.

    That is the backing file of a loop device, and the parts of a mapping or RAID. For a partition, its disk counts.
    """
    place = (_NUMBERS / f"{os.major(number)}:{os.minor(number)}").resolve()
    if _text(place / "partition"):
        place = place.parent
    backing = _text(place / "loop/backing_file")
    parts = [Path("/dev") / part.name.replace("!", "/") for part in place.glob("slaves/*")]
    for part in [*([Path(backing)] if backing else []), *parts]:
        yield place.name, part
        with suppress(OSError):
            found = os.stat(part)  # noqa: PTH116
            if stat.S_ISBLK(found.st_mode):
                yield from below(found.st_rdev)


def _number(place: Path) -> int:
    major, _, minor = _text(place / "dev").partition(":")
    return os.makedev(int(major or 0), int(minor or 0))


def _of_disk(place: Path) -> str:
    for name in _IDENTITIES:
        found = _text(place / name)
        if found:
            return f"{name.rpartition('/')[0] or 'disk'} {found}"
    backing = _text(place / "loop/backing_file")
    if backing:
        with suppress(OSError):
            file = os.stat(backing)  # noqa: PTH116
            return f"loop over {file.st_dev}:{file.st_ino}"
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
