"""Ranges of the pages of a blob, in order: millions of them in a few MiB."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from ..errors import Unreadable

PAGE = 512


class Pages:
    """Disjoint ranges in order of their offsets, from pairs of start and exclusive end. Adjacent ones become one.

    Raises Unreadable if the pairs are not whole pages, overlap, or are out of order: then the list is not Azure's.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts, self._ends = array("Q"), array("Q")
        for start, end in ranges:
            self.append(start, end)

    def append(self, start: int, end: int) -> None:
        """Add a range behind the others. Raises Unreadable if it does not fit there."""
        last = self._ends[-1] if self._ends else 0
        if not last <= start < end or start % PAGE or end % PAGE:
            raise Unreadable(f"the pages from {start} to {end} do not fit behind those up to {last}")
        if self._ends and start == last:
            self._ends[-1] = end
        else:
            self._starts.append(start)
            self._ends.append(end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the offset and length of each range."""
        return ((start, end - start) for start, end in zip(self._starts, self._ends, strict=True))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._starts)

    @property
    def total(self) -> int:
        """The number of bytes in all ranges."""
        return sum(self._ends) - sum(self._starts)

    def within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the offset and length of each part of a range that is listed."""
        at = max(0, bisect_right(self._starts, offset) - 1)
        while at < len(self._starts) and self._starts[at] < offset + length:
            start, end = max(self._starts[at], offset), min(self._ends[at], offset + length)
            if start < end:
                yield start, end - start
            at += 1

    def is_empty(self, offset: int, length: int) -> bool:
        """Whether no part of a range is listed."""
        return next(self.within(offset, length), None) is None

    def outside(self, other: Pages) -> int | None:
        """The offset of the first page that `other` does not list; None if it lists all of these."""
        for start, length in self:
            at = start
            for offset, size in other.within(start, length):
                if offset > at:
                    return at
                at = offset + size
            if at < start + length:
                return at
        return None

    def meets(self, other: Pages) -> int | None:
        """The offset of the first page that `other` lists too; None if there is none."""
        for start, length in self:
            for offset, _ in other.within(start, length):
                return offset
        return None
