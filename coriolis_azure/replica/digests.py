"""Stores the digests of a disk's chunks: so many that most are in a file without a name, not in memory.

Those of 4 TiB in chunks of 1 MiB take 56 MiB. They are stored in pages of 4096 digests. Copies share the pages that
neither changes, and all pages of nothing but ZERO, of which a sparse disk has many, are one object.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tempfile
from collections.abc import Iterator

from ..agent import DIGEST, ZERO
from ..errors import DestinationFailed

PAGE = 4096  # digests
_ZEROS = ZERO * PAGE
_INVERTED = bytes(range(255, -1, -1))
_IN_MEMORY = 16  # so many first pages stay in memory; disks with no more need no file
_OPEN = 2  # so many later pages are changed in memory at a time: work at a boundary needs two


class Digests:
    """The digests of many chunks, in order. One thread may change or copy them while others read.

    The file is in the system's folder for temporary files (TMPDIR). It takes 14 MiB per TiB in chunks of 1 MiB, and
    twice as much again if all of them change, for the copies of the reader and of the transfer. Nobody else can read
    it, and it is gone with the process. If there is no space for it, memory is used instead. Raises DestinationFailed
    if it cannot be read.
    """

    def __init__(self, digests: bytes = b"") -> None:
        if len(digests) % DIGEST:
            raise ValueError(f"{len(digests)} bytes are not a multiple of {DIGEST}")
        # A page is bytes if other objects may share it, a bytearray if only this one has it, or its place in the file.
        self._pages: list[bytes | bytearray | int] = []
        self._count = 0
        self._open: list[int] = []  # pages in memory that will go into the file
        self._file = _File()
        for at in range(0, len(digests), DIGEST * PAGE):
            self.append(digests[at : at + DIGEST * PAGE])

    @classmethod
    def filled(cls, fill: bytes, count: int) -> Digests:
        """`count` digests that are all `fill`."""
        new, (whole, rest) = cls(), divmod(count, PAGE)
        new._pages += [_ZEROS if fill == ZERO else fill * PAGE] * whole
        if rest:
            new._pages.append(fill * rest)
        new._count = count
        return new

    def append(self, digests: bytes) -> None:
        """Append a page of 4096 digests; only the last page may be shorter."""
        if self._count % PAGE or not 0 < len(digests) <= DIGEST * PAGE or len(digests) % DIGEST:
            raise ValueError(f"{len(digests)} bytes are not a page, or follow an incomplete one")
        self._pages.append(self._put_away(len(self._pages), digests))
        self._count += len(digests) // DIGEST

    def __len__(self) -> int:
        """The number of digests."""
        return self._count

    def __getitem__(self, index: int) -> bytes:
        """The digest of one chunk."""
        if not 0 <= index < self._count:
            raise IndexError(f"there is no digest {index} of {self._count}")
        number, at = divmod(index, PAGE)
        return self._part(number, at, at + 1)

    def span(self, first: int, last: int) -> bytes:
        """The digests of the chunks from `first` up to, but not including, `last`, concatenated."""
        return b"".join(self.pages(first, last))

    def pages(self, first: int = 0, last: int | None = None) -> Iterator[bytes]:
        """The same as `span`, in pieces."""
        last = self._count if last is None else min(last, self._count)
        while first < last:
            number, at = divmod(first, PAGE)
            count = min(PAGE - at, last - first)
            yield self._part(number, at, at + count)
            first += count

    def put(self, index: int, digests: bytes) -> None:
        """Replace the digests from chunk `index` on."""
        if not 0 <= index <= self._count - len(digests) // DIGEST:
            raise IndexError(
                f"there are no {len(digests) // DIGEST} digests from {index} on, only {self._count} in all"
            )
        rest = memoryview(digests)
        while rest:
            number, at = divmod(index, PAGE)
            page = self._changeable(number)
            part = rest[: len(page) - DIGEST * at]
            page[DIGEST * at : DIGEST * at + len(part)] = part
            index, rest = index + len(part) // DIGEST, rest[len(part) :]

    def copy(self) -> Digests:
        """A copy that can be changed independently."""
        for number, page in enumerate(self._pages):
            if isinstance(page, bytearray):
                self._pages[number] = self._put_away(number, page)
        self._open = []
        new = Digests()
        new._pages, new._count, new._file = self._pages.copy(), self._count, self._file
        return new

    def resized(self, count: int, fill: bytes) -> Digests:
        """A copy with `count` digests: cut off, or extended with `fill`."""
        kept = min(count, self._count)
        whole = kept // PAGE
        new = Digests.filled(fill, count)
        shared = self.copy()
        new._pages[:whole], new._file = shared._pages[:whole], shared._file
        new.put(whole * PAGE, self.span(whole * PAGE, kept))
        return new

    def differing(self, other: Digests) -> Iterator[int]:
        """Yield the indexes whose digests differ; both must have the same length."""
        for number, (mine, theirs) in enumerate(zip(self._pages, other._pages, strict=True)):
            if self._file is other._file and mine == theirs:  # the same page: no need to read it
                continue
            one, two = self._page(number), other._page(number)
            starts = range(0, len(one) if one != two else 0, DIGEST)
            yield from (
                PAGE * number + at // DIGEST
                for at in starts
                if one[at : at + DIGEST] != two[at : at + DIGEST]
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Digests) or self._count != other._count:
            return False
        return next(self.differing(other), None) is None

    __hash__ = None  # type: ignore[assignment]

    def _part(self, number: int, first: int, last: int) -> bytes:
        """The digests of a page from `first` up to, but not including, `last`."""
        page = self._pages[number]
        if isinstance(page, int):
            return self._file.read(page + DIGEST * first, DIGEST * (last - first))
        return bytes(page[DIGEST * first : DIGEST * last])

    def _page(self, number: int) -> bytes:
        """A whole page."""
        return self._part(number, 0, min(PAGE, self._count - PAGE * number))

    def _changeable(self, number: int) -> bytearray:
        """The page in memory, as a copy that only this object has."""
        page = self._pages[number]
        if isinstance(page, bytearray):
            return page
        changed = bytearray(self._page(number))
        self._pages[number] = changed
        if number >= _IN_MEMORY:
            self._open.append(number)
            if len(self._open) > _OPEN:
                eldest = self._open.pop(0)
                self._pages[eldest] = self._put_away(eldest, self._page(eldest))
        return changed

    def _put_away(self, number: int, page: bytes | bytearray) -> bytes | int:
        """Store a page that will not be changed; return what `_pages` has for it."""
        if page == _ZEROS:
            return _ZEROS
        if number >= _IN_MEMORY:
            with contextlib.suppress(OSError):
                return self._file.append(page)
        return bytes(page)


class _File:
    """Pages in a file without a name, each written once. The file is gone when nothing refers to this object any more.

    Data that a medium loses reads as zeros, and a digest of zeros means that a chunk is known to be empty. So the bits
    are stored inverted: then lost data means that nothing is known.
    """

    def __init__(self) -> None:
        self._fd = -1
        self._places = itertools.count(0, DIGEST * PAGE)

    def append(self, page: bytes | bytearray) -> int:
        """Write a page and return its place. Raises OSError if that fails."""
        if self._fd < 0:
            with tempfile.TemporaryFile() as file:
                self._fd = os.dup(file.fileno())
        place = next(self._places)
        if os.pwrite(self._fd, page.translate(_INVERTED), place) != len(page):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return place

    def read(self, place: int, size: int) -> bytes:
        """The `size` bytes at `place`."""
        try:
            data = os.pread(self._fd, size, place)
            if len(data) != size:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:
            raise DestinationFailed(
                f"a temporary file in {tempfile.gettempdir()} cannot be read: {error.strerror}",
                remedy="Check the health of the medium, or set TMPDIR to another folder, then run again.",
            ) from error
        return data.translate(_INVERTED)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
