"""The bytes of disks and snapshots: sparse raw files that several resources may share.

A content is a file that never changes while more than one resource uses it, so a snapshot, or a disk made from one,
takes no space and is frozen. Before a write (a guest that gets the disk attached, a resize) the content is copied.
Copies are reflinks if the filesystem supports them; otherwise only extents with data are copied, so holes stay holes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

_FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}
_PIECE = 64 << 20


class Contents:
    """The folder of disk contents. It chooses their names."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """The file of a content."""
        return self._directory / name

    def size(self, name: str) -> int:
        """The size of a content in bytes."""
        return self.path(name).stat().st_size

    def zeros(self, size: int) -> str:
        """Make a content of zeros that occupies no space; return its name."""
        name = _new_name()
        with self.path(name).open("xb") as file:
            file.truncate(size)
        return name

    def copied(self, source: Path) -> str:
        """Make a content with the present bytes of `source`; return its name. A failure leaves nothing behind."""
        name = _new_name()
        try:
            copy_sparse(source, self.path(name))
        except BaseException:
            self.remove(name)
            raise
        return name

    def grow(self, name: str, size: int) -> None:
        """Append zeros to a content that is not shared."""
        os.truncate(self.path(name), size)

    def remove(self, name: str) -> None:
        """Delete a content that is no longer used."""
        self.path(name).unlink(missing_ok=True)

    def keep_only(self, names: set[str]) -> None:
        """Delete all contents except `names`: a killed process may have left others."""
        for path in self._directory.iterdir():
            if path.name not in names:
                path.unlink()


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file to a new one, as a reflink or extent by extent, preserving holes. OSError if that fails."""
    with source.open("rb") as old, target.open("xb") as new:
        if _cloned(old.fileno(), new.fileno()):
            return
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        for start, end in extents(old.fileno(), size):
            _copy_range(old.fileno(), new.fileno(), start, end)


def _cloned(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def extents(source: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each extent of a file that has data."""
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        yield start, end


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        length = min(_PIECE, end - start)
        try:
            done = os.copy_file_range(source, target, length, start, start)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            done = os.pwrite(target, os.pread(source, min(length, 4 << 20), start), start)
        if done == 0:  # the source shrank during the copy
            return
        start += done


def _new_name() -> str:
    return f"{uuid.uuid4().hex}.raw"
