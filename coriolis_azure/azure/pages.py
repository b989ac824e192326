"""Ranges of the pages of a blob, in order: millions of them in a few MiB, five bytes for most."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from heapq import merge

from ..errors import Unreadable

PAGE = 512
_BLOCK = 16  # ranges
_NO_MORE = (1 << 63, 1)  # a range behind every blob
_LONG = 0xFFFF  # stands before a number that needs eight bytes


class Pages:
    """Disjoint ranges in order of their offsets, from pairs of start and exclusive end. Adjacent ones become one.

    Raises Unreadable if the pairs are not whole pages, overlap, or are out of order: then the list is not Azure's.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        # All ranges but the last, as pages from the end of the one before and pages of its own: four bytes for most.
        self._numbers = array("H")
        # Of each block of ranges: where the one before its first ends, and where its numbers begin.
        self._bases, self._places = array("Q"), array("Q")
        self._count = self._packed = 0  # of the packed ranges: how many, and where the last one ends
        self._start = self._end = 0  # the last range, which may still grow
        for start, end in ranges:
            self.append(start, end)

    def append(self, start: int, end: int) -> None:
        """Add a range behind the others. Raises Unreadable if it does not fit there."""
        if not self._end <= start < end or start % PAGE or end % PAGE:
            raise Unreadable(f"the pages from {start} to {end} do not fit behind those up to {self._end}")
        if start == self._end and self:
            self._end = end
            return
        if self:
            self._pack()
        self._start, self._end = start, end

    def _pack(self) -> None:
        if self._count % _BLOCK == 0:
            self._bases.append(self._packed)
            self._places.append(len(self._numbers))
        for number in ((self._start - self._packed) // PAGE, (self._end - self._start) // PAGE):
            if number < _LONG:
                self._numbers.append(number)
            else:
                self._numbers.append(_LONG)
                self._numbers.frombytes(number.to_bytes(8, sys.byteorder))
        self._count, self._packed = self._count + 1, self._end

    def _from(self, block: int) -> Iterator[tuple[int, int]]:
        """Yield start and end of the ranges of a block, and of all behind it."""
        numbers = self._numbers
        place, end = (self._places[block], self._bases[block]) if self._places else (0, 0)
        while place < len(numbers):
            gap, length = numbers[place], numbers[place + 1]
            place += 2
            if gap == _LONG:
                gap = int.from_bytes(numbers[place - 1 : place + 3].tobytes(), sys.byteorder)
                length, place = numbers[place + 3], place + 4
            if length == _LONG:
                length = int.from_bytes(numbers[place : place + 4].tobytes(), sys.byteorder)
                place += 4
            start = end + gap * PAGE
            end = start + length * PAGE
            yield start, end
        if self:
            yield self._start, self._end

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the offset and length of each range."""
        return ((start, end - start) for start, end in self._from(0))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self._end > 0

    def span(self) -> tuple[int, int]:
        """Where the first range starts and the last one ends; (0, 0) if there is none."""
        return next(self._from(0), (0, 0))[0], self._end

    @property
    def total(self) -> int:
        """The number of bytes in all ranges."""
        return sum(length for _, length in self)

    def within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the offset and length of each part of a range that is listed."""
        for start, end in self._from(max(0, bisect_right(self._bases, offset) - 1)):
            if start >= offset + length:
                return
            start, end = max(start, offset), min(end, offset + length)
            if start < end:
                yield start, end - start

    def is_empty(self, offset: int, length: int) -> bool:
        """Whether no part of a range is listed."""
        return next(self.within(offset, length), None) is None

    def meets(self, other: Pages) -> int | None:
        """The offset of the first page that `other` lists too; None if there is none."""
        for start, length in self:
            for offset, _ in other.within(start, length):
                return offset
        return None


def uncovered(pages: Iterable[tuple[int, int]], *covers: Iterable[tuple[int, int]]) -> int | None:
    """The offset of the first page that none of `covers` lists; None if they list all. All are in order.

    Each is gone through once: millions of ranges are a matter of seconds.
    """
    listed = merge(*covers)
    offset, size = next(listed, _NO_MORE)
    for start, length in pages:
        at = start
        while at < start + length:
            while offset + size <= at:
                offset, size = next(listed, _NO_MORE)
            if offset > at:
                return at
            at = offset + size
    return None
