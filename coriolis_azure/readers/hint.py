"""What Azure's list of changes says of a disk, as bitmaps: which grains have changed, and which are zeros now."""

from __future__ import annotations

from collections.abc import Iterable

from ..replica.manifest import GRAIN


class Hint:
    """What has changed on a disk of `size` bytes since a baseline; 4 MiB of memory for a disk of 1 TiB.

    `written` and `cleared`: offset and length of ranges, each in order; adjacent ones are one. A range that was
    written again with equal content may be among them: it costs a read.
    """

    def __init__(
        self, size: int, written: Iterable[tuple[int, int]], cleared: Iterable[tuple[int, int]]
    ) -> None:
        self._size = size
        grains = -(-size // GRAIN)
        self._touched, self._zero = _Bits(grains), _Bits(grains)
        for offset, length in cleared:
            self._touched.fill(offset // GRAIN, -(-(offset + length) // GRAIN), set=True)
            self._zero.fill(-(-offset // GRAIN), self._whole(offset + length), set=True)
        for offset, length in written:
            self._touched.fill(offset // GRAIN, -(-(offset + length) // GRAIN), set=True)
            self._zero.fill(offset // GRAIN, -(-(offset + length) // GRAIN), set=False)

    def _whole(self, end: int) -> int:
        """The grain up to which all are whole before `end`; the disk's last one ends with it."""
        return -(-end // GRAIN) if end >= self._size else end // GRAIN

    def touched(self, offset: int, length: int) -> bool:
        """Whether anything in the range may have changed."""
        return self._touched.any(offset // GRAIN, -(-(offset + length) // GRAIN))

    def zero(self, offset: int, length: int) -> bool:
        """Whether the whole range is known to be zeros now."""
        return self._zero.all(offset // GRAIN, -(-(offset + length) // GRAIN))


class _Bits:
    """A fixed number of bits, all unset at first."""

    def __init__(self, count: int) -> None:
        self._bytes = bytearray(-(-count // 8))

    def fill(self, first: int, end: int, *, set: bool) -> None:
        """Set or unset the bits from `first` to before `end`."""
        if first >= end:
            return
        low, high = first // 8, -(-end // 8)
        mask = ((1 << (end - first)) - 1) << first % 8
        bits = int.from_bytes(self._bytes[low:high], "little")
        bits = bits | mask if set else bits & ~mask
        self._bytes[low:high] = bits.to_bytes(high - low, "little")

    def any(self, first: int, end: int) -> bool:
        """Whether one of the bits is set."""
        return self._slice(first, end) != 0

    def all(self, first: int, end: int) -> bool:
        """Whether all of the bits are set."""
        return self._slice(first, end) == (1 << (end - first)) - 1

    def _slice(self, first: int, end: int) -> int:
        bits = int.from_bytes(self._bytes[first // 8 : -(-end // 8)], "little") >> first % 8
        return bits & ((1 << (end - first)) - 1)
