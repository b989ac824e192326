"""Compares the content of a destination with its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain

from ..clock import scope
from ..errors import WaitEnded
from ..threads import Background, ordered
from .destinations import Destination, Synced
from .digests import Digests
from .manifest import Manifest

THREADS = 4
_EARLY_BYTES = 64 << 20  # written, and then read back together: each time the destination is flushed
_MOST_RANGES = 1 << 16  # of chunks that wait to be read back, so that memory is bounded
_AHEAD_BYTES = 6 << 20  # the limit for chunks in flight, of all disks together
# At a remote destination each write waits for another host, so more writes must be in flight to fill the link.
_FAR_THREADS, _FAR_BYTES = 16, 16 << 20


def differing(
    destination: Destination, manifest: Manifest, indexes: Iterable[int], concurrent: int = 1
) -> Iterator[int]:
    """Yield, in order, the chunks of `indexes` whose content does not match `manifest`. UNKNOWN never matches.

    `concurrent`: how many disks are compared at a time.
    """
    digest = manifest.digester()

    def differs(index: int) -> tuple[int, bool]:
        return index, digest(destination.read(*manifest.span(index))) != manifest.digest(index)

    threads, ahead = in_flight(destination, manifest.chunk, concurrent)
    with closing(ordered(differs, indexes, threads=threads, ahead=ahead)) as results:
        yield from (index for index, wrong in results if wrong)


class ReadBack:
    """Reads back what a run writes to `destination` while it goes on writing, and the rest at its end.

    For the thread that records what has been written. `before`: the digests that the destination had before. Close it.
    """

    def __init__(self, destination: Destination, before: Digests, concurrent: int) -> None:
        self._destination, self._before, self._concurrent = destination, before, concurrent
        self._early = destination if isinstance(destination, Synced) else None
        self._background = Background[int | None]()
        self._left: list[range] = []  # chunks that were written and not read back yet
        self._bytes = 0  # of these
        self.close = self._background.close

    def add(self, manifest: Manifest, first: int, count: int) -> int | None:
        """Note chunks that were written; return one that was found to be wrong, if any."""
        if self._early is None:
            return None
        for index in range(first, first + count):
            if manifest.digest(index) != self._before[index]:
                self._bytes += manifest.span(index)[1]
                if self._left and self._left[-1].stop == index:
                    self._left[-1] = range(self._left[-1].start, index + 1)
                else:
                    self._left.append(range(index, index + 1))
        if self._bytes < _EARLY_BYTES or (self._background.busy and len(self._left) < _MOST_RANGES):
            return None
        wrong = self._background.result()
        self._background.begin(partial(self._compare, self._early, manifest, self._left))
        self._left, self._bytes = [], 0
        return wrong

    def _compare(self, destination: Synced, manifest: Manifest, ranges: list[range]) -> int | None:
        """The first chunk that differs. A part of the threads is enough: only `finish` is waited for."""
        destination.sync()
        indexes = _until_cancelled(chain.from_iterable(ranges))
        return next(differing(destination, manifest, indexes, THREADS * self._concurrent), None)

    def finish(self, manifest: Manifest, tell: Callable[[], object]) -> int | None:
        """Read back what has not been, after `flush`; return the first chunk that was found to be wrong, if any.

        `tell` is called if that may take a while.
        """
        wrong = self._background.result()
        if wrong is not None:
            return wrong
        counted = self._early is not None and self._early.undisturbed
        left = chain.from_iterable(self._left) if counted else self._before.differing(manifest.digests)
        first = next(left, None)
        if first is None:
            return None
        tell()
        return next(differing(self._destination, manifest, chain([first], left), self._concurrent), None)


def _until_cancelled(indexes: Iterable[int]) -> Iterator[int]:
    """The same; but WaitEnded once the work is cancelled, because what was not compared must not count as right."""
    current = scope()
    for index in indexes:
        if current is not None and current.cancelled:
            raise WaitEnded("reading back was cancelled")
        yield index


def in_flight(destination: Destination, chunk: int, concurrent: int, most: int = THREADS) -> tuple[int, int]:
    """(threads, most chunks in flight) per disk if `concurrent` disks share the budget. `most`: limits the threads."""
    threads = max(1, min(most, _AHEAD_BYTES // chunk) // concurrent)
    if destination.far:
        threads = max(threads, min(_FAR_THREADS, _FAR_BYTES // chunk) // concurrent)
    most_bytes = max(_AHEAD_BYTES // concurrent, threads * min(chunk, 1 << 20))
    return threads, max(3, min(threads + 2, most_bytes // chunk))
