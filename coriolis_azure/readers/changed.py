"""How far Azure's list of changes is relied on: which chunks need not be read, and what is checked all the same.

A chunk may be passed over only if its digest was committed together with the baseline that the list begins at
(*attested*): any other digest is true of the destination and says nothing about the baseline. Until a list of this
baseline's family has been proved, everything is read and compared with the list. From then on every run reads one
part in `WINDOW` of what the list leaves out, in turn, so that a lost change survives at most that many runs.
"""

from __future__ import annotations

from typing import Literal

from ..errors import ChangeListWrong
from ..replica.manifest import GRAIN, UNKNOWN, ZERO, Manifest, grain_count
from ..threads import Lock
from .hint import Hint

WINDOW = 32


class Changed:
    """What has changed on one disk since a baseline, for one run.

    `attested`: the manifest that was committed with the baseline. `proved`: whether the list is relied on; otherwise
    all is read, and `unlisted` tells whether a change was missing in it. `turn`: which part of what is not listed is
    read in this run, a number that grows by one with each run.
    """

    def __init__(self, disk: str, hint: Hint, attested: Manifest, *, proved: bool, turn: int) -> None:
        self._disk, self._hint, self._attested = disk, hint, attested
        self._proved, self._turn = proved, turn % WINDOW
        self.unlisted: int | None = None  # the offset of a change that the list does not have
        self.relied_bytes = self.checked_bytes = 0
        self._lock = Lock()  # several threads compare; one asks what need not be read

    def unread(self, base: Manifest, index: int) -> Literal["same", "zeros", ""]:
        """What becomes of a chunk without reading it; "" if it has to be read."""
        if not self._proved or not self._is_attested(base, index):
            return ""
        span = base.span(index)
        is_zero = self._hint.zero(*span)
        if not is_zero and (self._hint.touched(*span) or self._is_due(index, base.count)):
            return ""
        return "zeros" if is_zero and base.digest(index) != ZERO else "same"

    def touched(self, base: Manifest, index: int) -> list[int] | None:
        """The grains of a chunk that may have changed; None if all of the chunk has to be read."""
        offset, length = base.span(index)
        if not (self._proved and self._is_attested(base, index) and self._hint.touched(offset, length)):
            return None
        numbers = range(grain_count(length))
        return [number for number in numbers if self._hint.touched(offset + number * GRAIN, GRAIN)]

    def compare(self, base: Manifest, index: int, digest: bytes) -> bool:
        """Check a chunk that was read; whether the list says that it has not changed.

        Raises ChangeListWrong if it has, and the list is relied on.
        """
        if not self._is_attested(base, index):
            return False
        offset, length = base.span(index)
        if self._hint.touched(offset, length):
            return False
        with self._lock:
            self.checked_bytes += length
            if digest == base.digest(index):
                return True
            self.unlisted = offset if self.unlisted is None else min(offset, self.unlisted)
        if self._proved:
            raise ChangeListWrong(
                f"{self._disk}: Azure's list of changes leaves out a change at offset {offset}",
                disk=self._disk,
                offset=offset,
            )
        return True

    def _is_attested(self, base: Manifest, index: int) -> bool:
        """Whether the destination's digest of a chunk is the one that was committed with the baseline."""
        attested, digest = self._attested, base.digest(index)
        return (
            digest != UNKNOWN
            and index < attested.count
            and (attested.key, attested.hash, attested.chunk) == (base.key, base.hash, base.chunk)
            and attested.digest(index) == digest
            and attested.span(index) == base.span(index)
        )

    def _is_due(self, index: int, count: int) -> bool:
        """Whether it is a chunk's turn to be read although it is not listed: parts of a disk, in disk order."""
        return index * WINDOW // count == self._turn
