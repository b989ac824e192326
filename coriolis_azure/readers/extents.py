"""Which parts of a disk have to be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Extents(Protocol):
    """The ranges of a disk that may hold data; the rest is known to be zeros and need not be read."""

    def within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range that have to be read, in order, as (offset, length)."""


class Everything:
    """The whole disk."""

    def within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """See Extents."""
        yield offset, length
