"""What of a disk has to be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Extents(Protocol):
    """Ranges of a disk that may hold something; the rest reads as zeros and need not be read."""

    def within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that have to be read, in order: offset and length of each."""


class Everything:
    """All of the disk."""

    def within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """See Extents."""
        yield offset, length
