"""The bytes of disks and snapshots: sparse raw files that several resources may share.

A content is a file that is never changed while more than one resource names it: a snapshot, or a disk made
from it, costs nothing and is frozen from that moment. Who is about to write (a guest that gets the disk
attached, a resize) takes a private copy first. Copies are reflinks where the filesystem offers them; else
only the extents that hold data are copied, so that holes stay holes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

_FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h
_NOT_OFFERED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}
_PIECE = 64 << 20


class Contents:
    """The folder of disk contents; names are handed out by it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where a content lies."""
        return self._directory / name

    def size(self, name: str) -> int:
        """Its size in bytes."""
        return self.path(name).stat().st_size

    def zeros(self, size: int) -> str:
        """A new content of zeros that occupies no space."""
        name = _new_name()
        with self.path(name).open("xb") as file:
            file.truncate(size)
        return name

    def copied(self, source: Path) -> str:
        """A new content with what `source` holds now; nothing is left when copying fails."""
        name = _new_name()
        try:
            copy_sparse(source, self.path(name))
        except BaseException:
            self.remove(name)
            raise
        return name

    def grow(self, name: str, size: int) -> None:
        """Add zeros at the end; for contents that are not shared."""
        os.truncate(self.path(name), size)

    def remove(self, name: str) -> None:
        """Delete a content that nothing names any more."""
        self.path(name).unlink(missing_ok=True)

    def keep_only(self, names: set[str]) -> None:
        """Delete every content that is not among `names`: what a killed process had left."""
        for path in self._directory.iterdir():
            if path.name not in names:
                path.unlink()


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file to a new one: by reflink, or extent by extent with holes kept. OSError when that fails."""
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
        if error.errno not in _NOT_OFFERED:
            raise
        return False
    return True


def extents(source: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data: start and end of each extent."""
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
            if error.errno not in _NOT_OFFERED:
                raise
            done = os.pwrite(target, os.pread(source, min(length, 4 << 20), start), start)
        if done == 0:  # the source became shorter while it was read
            return
        start += done


def _new_name() -> str:
    return f"{uuid.uuid4().hex}.raw"
