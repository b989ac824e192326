"""Stores in open files and block devices; translates OSError into DestinationFailed."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from ..errors import DestinationFailed, exhausted_remedy
from ..threads import Local
from . import space, statefiles
from .medium import Content, Store

ZEROS = bytes(1 << 20)
_ALIGNMENT = 4096  # of reads past the page cache
_SMALL = 1 << 16  # up to this size, such a read goes through a buffer that its thread reuses
REMEDIES = {
    errno.ENOSPC: "Free space at the destination, then run again: what had arrived is kept.",
    errno.EDQUOT: "Raise the quota at the destination, then run again: what had arrived is kept.",
    errno.EFBIG: "Use a file system and a file size limit that allow files as large as the disk.",
    errno.EROFS: "Make the destination writable, then run again.",
    errno.EACCES: "Give this user the right to read and write the destination, then run again.",
    errno.EPERM: "Give this user the right to read and write the destination, then run again.",
    errno.EIO: "Check the health of the medium under the destination, then run again.",
    errno.EUCLEAN: "Unmount the file system of the destination, repair it (fsck), then run again.",
}


class Translated:
    """Raises an OSError of its block as DestinationFailed. A class, because one is created for each read and write."""

    __slots__ = ("_disk", "_offset", "_path", "_what")

    def __init__(self, path: Path, what: str, disk: str, offset: int | None = None) -> None:
        self._path, self._what, self._disk, self._offset = path, what, disk, offset

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            at = f" at offset {self._offset}" if self._offset is not None else ""
            raise DestinationFailed(
                f"{self._path} {self._what}{at}: {error.strerror}",
                remedy=REMEDIES.get(error.errno or 0) or exhausted_remedy(error),
                disk=self._disk,
                offset=self._offset,
            ) from error


class FileStore:
    """An open file or block device. See Store. `stopped`: whether reads and writes must fail from now on."""

    far = False

    def __init__(self, fd: int, path: Path, disk: str, stopped: Callable[[], bool]) -> None:
        self.fd, self.path, self._disk, self._stopped = fd, path, disk, stopped
        with self._translated("cannot be examined"):
            self.is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self._holes = True
        self.is_copied_on_write = space.is_copied_on_write(fd)

    @property
    def size(self) -> int:
        """See Store."""
        with self._translated("cannot be examined"):
            return os.lseek(self.fd, 0, os.SEEK_END) if self.is_device else os.fstat(self.fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        """See Store."""
        parts = []
        self._go_on(offset)
        with self._translated("cannot be read", offset):
            while length:
                part = os.pread(self.fd, length, offset)
                if not part:
                    raise DestinationFailed(
                        f"{self.path} ends at offset {offset}", disk=self._disk, offset=offset
                    )
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: Content) -> None:
        """See Store."""
        view = memoryview(data)
        self._go_on(offset)
        with self._translated("cannot be written", offset):
            while view:
                done = os.pwrite(self.fd, view, offset)
                offset, view = offset + done, view[done:]

    def zero(self, offset: int, length: int) -> None:
        """Make the range a hole or, if the file system has no holes, write zeros. See Store."""
        self._go_on(offset)
        with self._translated("cannot be cleared", offset):
            if self._holes:
                try:
                    space.punch(self.fd, offset, length)
                except OSError as error:
                    if error.errno not in space.NOT_SUPPORTED:
                        raise
                    self._holes = False
                else:
                    return
        for start in range(offset, offset + length, len(ZEROS)):
            self.write(start, memoryview(ZEROS)[: offset + length - start])

    def reflink(self, source: Store, offset: int, length: int) -> bool:
        """See Store."""
        if not (self.is_copied_on_write and isinstance(source, FileStore)):
            return False
        with self._translated("cannot be written", offset):
            return space.reflink(self.fd, source.fd, offset, length)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield all that is not a hole of the file. See Store."""
        end = offset + length
        while offset < end:
            start, until = self._next_data(offset, end)
            if start < until:
                yield start, until - start
            offset = until

    def _next_data(self, offset: int, end: int) -> tuple[int, int]:
        """The start and end of the first data from `offset` up to `end`; (end, end) if there is none."""
        if self.is_device:
            return offset, end
        try:
            start = min(os.lseek(self.fd, offset, os.SEEK_DATA), end)
            return start, end if start == end else min(os.lseek(self.fd, start, os.SEEK_HOLE), end)
        except OSError as error:
            # ENXIO: there is no more data in the file.
            return (end, end) if error.errno == errno.ENXIO and self.size >= end else (offset, end)

    def resize(self, size: int) -> None:
        """See Store."""
        if not self.is_device:
            with self._translated("cannot be resized"):
                os.ftruncate(self.fd, size)

    def flush(self) -> None:
        """See Store. Also empties the page cache of it, so that reading back reads the medium."""
        with self._translated("cannot be flushed"):
            os.fsync(self.fd)
        self.drop_cache()

    def drop_cache(self) -> None:
        """Drop the page cache of the file, except for pages that are not on the medium yet."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @contextlib.contextmanager
    def uncached(self) -> Iterator[Callable[[int, int], Content]]:
        """See Store. After a failed write, the cache holds pages that look clean but are on no medium."""
        with self._translated("cannot be flushed"):
            try:
                os.fsync(self.fd)
            except OSError:
                # The first error may be of a dead run's writes. Reading shows what became of those.
                os.fsync(self.fd)
        self.drop_cache()
        try:
            direct = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            yield self.read
            return

        reused = Local()

        def read(offset: int, length: int) -> Content:
            self._go_on(offset)
            begin = offset // _ALIGNMENT * _ALIGNMENT
            size = -(-(offset - begin + length) // _ALIGNMENT) * _ALIGNMENT
            if size <= _SMALL and not hasattr(reused, "buffer"):
                reused.buffer = memoryview(mmap.mmap(-1, _SMALL))
            buffer = reused.buffer[:size] if size <= _SMALL else memoryview(mmap.mmap(-1, size))
            with self._translated("cannot be read", offset):
                try:
                    done = os.preadv(direct, [buffer], begin)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    done = 0
            if done < offset - begin + length:
                return self.read(offset, length)
            content = buffer[offset - begin :][:length]
            return bytes(content) if size <= _SMALL else content

        try:
            yield read
        finally:
            statefiles.close(direct)

    def _go_on(self, offset: int) -> None:
        if self._stopped():
            raise DestinationFailed(f"work on {self.path} was stopped", disk=self._disk, offset=offset)

    def _translated(self, what: str, offset: int | None = None) -> Translated:
        return Translated(self.path, what, self._disk, offset)


def open_document(path: Path, disk: str, *, ours: bool) -> IO[bytes] | None:
    """Open a document for reading; None if it does not exist."""
    with Translated(path, "cannot be read", disk):
        try:
            return os.fdopen(statefiles.open_existing(path, os.O_RDONLY, ours=ours), "rb")
        except FileNotFoundError:
            return None
