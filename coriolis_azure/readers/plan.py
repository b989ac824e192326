"""Which chunks of a disk have to be read, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal

from ..agent import Digester
from ..replica.manifest import ZERO, Manifest, grain_count
from .changed import Changed
from .extents import Everything, Extents
from .reader import Same, Zeros

_LONGEST = 64  # chunks in a run that need not be read: short runs keep progress moving
_EVERYTHING = Everything()
Fate = Literal["read", "same", "zeros"]
Proved = Callable[[int, int, bytes, Digester], list[bytes] | None]


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent chunks with the same fate. `relied`: it follows from Azure's list of changes."""

    fate: Fate
    chunks: range
    relied: bool = False

    def as_chunks(self) -> Same | Zeros:
        """What is reported of chunks that are not read."""
        first, count = self.chunks.start, len(self.chunks)
        if self.fate == "zeros":
            return Zeros(first, count)
        return Same(first, count, "relied" if self.relied else "read")


@dataclass(frozen=True)
class Known:
    """What is known of a disk before it is read: the allocated extents, and what has changed since a baseline.

    `grains` gives the digests of the grains that the destination has of a chunk, as `Grains.proved` does.
    """

    extents: Extents = _EVERYTHING
    changed: Changed | None = None
    grains: Proved | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether all of the disk has to be read."""
        return self.extents is _EVERYTHING and self.changed is None


class Plan:
    """What to read of a disk, of which the destination holds `base`. For threads."""

    def __init__(self, base: Manifest, known: Known) -> None:
        self._base, self._known = base, known
        self._digester = base.digester()

    def runs(self, first: int, longest: int) -> Iterator[Run]:
        """All chunks from `first` on in disk order; at most `longest` chunks to be read are one run."""
        if self._known.is_nothing:
            for start in range(first, self._base.count, longest):
                yield Run("read", range(start, min(start + longest, self._base.count)))
            return
        fates = groupby(range(first, self._base.count), self._fate)
        for (fate, relied), indexes in fates:
            while run := list(islice(indexes, longest if fate == "read" else _LONGEST)):
                yield Run(fate, range(run[0], run[-1] + 1), relied)

    def _fate(self, index: int) -> tuple[Fate, bool]:
        """What becomes of a chunk, and whether a list of changes says so."""
        extents, changed = self._known.extents, self._known.changed
        if next(extents.within(*self._base.span(index)), None) is None:
            return ("same" if self._base.digest(index) == ZERO else "zeros"), False
        unread = changed.unread(self._base, index) if changed is not None else ""
        return (unread, True) if unread else ("read", False)

    @property
    def has_parts(self) -> bool:
        """Whether of some chunks only a part has to be read."""
        return self._known.changed is not None and self._known.grains is not None

    def touched(self, index: int) -> list[int] | None:
        """The grains of a chunk that may have changed; None if all of it has to be read."""
        changed = self._known.changed
        return changed.touched(self._base, index) if changed is not None else None

    def part(self, index: int) -> tuple[list[int], list[bytes]] | None:
        """The grains of a chunk that may have changed, and the digests of all its grains at the destination.

        None if all of the chunk has to be read.
        """
        touched = self.touched(index)
        grains = self.stored(index) if touched is not None else None
        return (touched, grains) if touched is not None and grains is not None else None

    def stored(self, index: int) -> list[bytes] | None:
        """The digests of all grains that the destination has of a chunk; None if nothing that is stored proves them."""
        if self._known.grains is None:
            return None
        count = grain_count(self._base.span(index)[1])
        return self._known.grains(index, count, self._base.digest(index), self._digester)

    def rely(self, run: Run) -> None:
        """Count the bytes of a run that is not read."""
        if run.relied and self._known.changed is not None:
            self._known.changed.relied_bytes += sum(self._base.span(index)[1] for index in run.chunks)

    def compare(self, index: int, digest: bytes) -> bool:
        """Check a chunk that was read as a whole; whether a list of changes said that it has not changed.

        Raises ChangeListWrong if it has, and the list is relied on.
        """
        changed = self._known.changed
        return changed is not None and changed.compare(self._base, index, digest)
