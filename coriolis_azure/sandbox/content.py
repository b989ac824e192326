"""The bytes of disks and snapshots: sparse raw files that several resources may share.

A content is a file that never changes while more than one resource uses it, so a snapshot, or a disk made from one,
takes no space and is frozen. Before a write (a guest that gets the disk attached, a resize) the content is copied.
Copies are reflinks if the filesystem supports them; otherwise only extents with data are copied, so holes stay holes.

Of each content its pages are known (`pages`): who writes through `write` and `clear` is recorded, page by page. A
content that is lent may be written to by others, so nothing is recorded of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from coriolis_azure.sandbox.pages import PAGE, Pages

_FICLONE = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}
_PIECE = 64 << 20


class Contents:
    """The folder of disk contents. It chooses their names. `generation`: see `pages`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.generation = 1
        self._lent: set[str] = set()
        self._record = directory.with_suffix(".pages")
        self._pages = _read_record(self._record)

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

    def duplicate(self, name: str) -> str:
        """Copy a content; return the copy's name. What is known of its pages is true of the copy, too."""
        copy = self.copied(self.path(name))
        if name in self._pages:
            self._pages[copy] = self._pages[name].copy()
        return copy

    def grow(self, name: str, size: int) -> None:
        """Append zeros to a content that is not shared."""
        os.truncate(self.path(name), size)

    def remove(self, name: str) -> None:
        """Delete a content that is no longer used."""
        self.path(name).unlink(missing_ok=True)
        self._pages.pop(name, None)
        self._lent.discard(name)

    # pages

    def pages(self, name: str) -> Pages:
        """The pages of a content; at first those of the file's extents."""
        known = self._pages.get(name)
        if known is None:
            known = Pages(self.generation)
            with self.path(name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                for start, end in extents(file.fileno(), size):
                    known.note(start - start % PAGE, min(size, end + -end % PAGE), 0)
            if name not in self._lent:
                self._pages[name] = known
        return known

    def end_generation(self, name: str) -> int:
        """End a generation with a snapshot of this content; return its number."""
        self.pages(name)  # from now on all changes are known
        self.generation += 1
        return self.generation - 1

    def lend(self, name: str) -> Path:
        """The file of a content that somebody may write to who does not say where."""
        self._lent.add(name)
        self._pages.pop(name, None)
        return self.path(name)

    def write(self, name: str, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Write pages of a content that is not shared: pieces, each an offset and its data."""
        pages = self.pages(name)
        with self.path(name).open("r+b", buffering=0) as file:
            for offset, data in pieces:
                pages.note(offset, offset + len(data), self.generation)
                os.pwrite(file.fileno(), data, offset)

    def clear(self, name: str, start: int, end: int) -> None:
        """Clear pages of a content that is not shared. Only written ones have to be overwritten with zeros."""
        pages = self.pages(name)
        with self.path(name).open("r+b", buffering=0) as file:
            for low, high, _ in pages.allocated(start, end):
                for piece in range(low, high, _PIECE):
                    os.pwrite(file.fileno(), bytes(min(_PIECE, high - piece)), piece)
        pages.note(start, end, self.generation, cleared=True)

    def save_pages(self) -> None:
        """Save what is known of the pages. Whoever opens the folder next uses that up: it is true only once."""
        self._record.write_text(json.dumps({name: pages.to_json() for name, pages in self._pages.items()}))

    def keep_only(self, names: set[str]) -> None:
        """Delete all contents except `names`: a killed process may have left others."""
        for path in self._directory.iterdir():
            if path.name not in names:
                path.unlink()


def _read_record(path: Path) -> dict[str, Pages]:
    """The pages that were saved, once: a process that is killed afterwards may have changed contents."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    path.unlink()
    return {name: Pages.from_json(known) for name, known in document.items()}


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
