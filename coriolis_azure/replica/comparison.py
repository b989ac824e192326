"""Compares the content of a destination with its manifest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain

from ..clock import refuse_cancelled
from ..threads import Background, ordered
from .destinations import Destination, Synced
from .digests import Digests
from .manifest import GRAIN, UNKNOWN, Manifest, grain_count

THREADS = 4
_EARLY_BYTES = 64 << 20  # written, and then read back together: each time the destination is flushed
_MOST_PARTS = 1 << 14  # that wait to be read back, so that memory is bounded
_AHEAD_BYTES = 6 << 20  # the limit for chunks in flight, of all disks together
# At a remote destination each write waits for another host, so more writes must be in flight to fill the link.
_FAR_THREADS, _FAR_BYTES = 16, 16 << 20
# The numbers of those grains of a chunk that are compared; None: all of them.
_Numbers = Collection[int] | None


def differing(
    destination: Destination, manifest: Manifest, indexes: Iterable[int], concurrent: int = 1
) -> Iterator[int]:
    """Yield, in order, the chunks of `indexes` whose content does not match `manifest`. UNKNOWN never matches.

    `concurrent`: how many disks are compared at a time.
    """
    return _differing(destination, manifest, _chunks((indexes, None)), concurrent)


def _differing(
    destination: Destination,
    manifest: Manifest,
    chunks: Iterable[tuple[int, _Numbers]],
    concurrent: int,
) -> Iterator[int]:
    """The same for chunks that may be compared in part."""
    digest, store = manifest.digester(), destination.grains

    def differs(chunk: tuple[int, _Numbers]) -> tuple[int, bool]:
        index, numbers = chunk
        offset, length = manifest.span(index)
        grains = None
        if numbers is not None and store is not None:
            grains = store.proved(index, grain_count(length), manifest.digest(index), digest)
        if numbers is None or grains is None:
            return index, digest(destination.read(offset, length)) != manifest.digest(index)
        starts = ((number, number * GRAIN) for number in numbers)
        return index, any(
            digest.leaf(destination.read(offset + start, min(GRAIN, length - start))) != grains[number]
            for number, start in starts
        )

    threads, ahead = in_flight(destination, manifest.chunk, concurrent)
    with closing(ordered(differs, chunks, threads=threads, ahead=ahead)) as results:
        yield from (index for index, wrong in results if wrong)


class ReadBack:
    """Reads back what a run writes to `destination` while it goes on writing, and the rest at its end.

    For the thread that records what has been written. `before`: the digests that the destination had before. Close it.
    """

    def __init__(self, destination: Destination, before: Digests, concurrent: int) -> None:
        self._destination, self._before, self._concurrent = destination, before, concurrent
        self._early = destination if isinstance(destination, Synced) else None
        self._background = Background[int | None]()
        self._left: list[tuple[range, _Numbers]] = []  # chunks that were written and not read back yet
        self._bytes = 0  # of these
        self.close = self._background.close

    def add(self, manifest: Manifest, first: int, count: int, grains: _Numbers = None) -> int | None:
        """Note chunks that were written, or `grains` of one; return one that was found to be wrong, if any."""
        if self._early is None:
            return None
        for index in range(first, first + count):
            if manifest.digest(index) != self._before[index]:
                self._note(index, manifest.span(index)[1], grains)
        if self._bytes < _EARLY_BYTES or (self._background.busy and len(self._left) < _MOST_PARTS):
            return None
        wrong = self._background.result()
        self._background.begin(partial(self._compare, self._early, manifest, self._left))
        self._left, self._bytes = [], 0
        return wrong

    def _note(self, index: int, length: int, grains: _Numbers) -> None:
        """Note one chunk that was written, or a part of it. Nothing of a chunk that was UNKNOWN is proved yet."""
        if grains is not None and (len(grains) == grain_count(length) or self._before[index] == UNKNOWN):
            grains = None
        self._bytes += length if grains is None else len(grains) * GRAIN
        before, parts = self._left[-1] if self._left else (range(0), ())
        if grains is None and parts is None and before.stop == index:
            self._left[-1] = range(before.start, index + 1), None
        else:
            self._left.append((range(index, index + 1), grains))

    def _compare(
        self, destination: Synced, manifest: Manifest, left: list[tuple[range, _Numbers]]
    ) -> int | None:
        """The first chunk that differs. A part of the threads is enough: only `finish` is waited for."""
        destination.sync()
        chunks = _until_cancelled(_chunks(*left))
        return next(_differing(destination, manifest, chunks, THREADS * self._concurrent), None)

    def finish(self, manifest: Manifest, tell: Callable[[], object]) -> int | None:
        """Read back what has not been, after `flush`; return the first chunk that was found to be wrong, if any.

        `tell` is called if that may take a while.
        """
        wrong = self._background.result()
        if wrong is not None:
            return wrong
        counted = self._early is not None and self._early.undisturbed
        written = self._left if counted else [(self._before.differing(manifest.digests), None)]
        left = _chunks(*written)
        first = next(left, None)
        if first is None:
            return None
        tell()
        return next(_differing(self._destination, manifest, chain([first], left), self._concurrent), None)


def _chunks(*parts: tuple[Iterable[int], _Numbers]) -> Iterator[tuple[int, _Numbers]]:
    """Each of these chunks, with the grains of it that are compared."""
    return ((index, grains) for indexes, grains in parts for index in indexes)


def _until_cancelled(chunks: Iterable[tuple[int, _Numbers]]) -> Iterator[tuple[int, _Numbers]]:
    """The same; but WaitEnded once the work is cancelled, because what was not compared must not count as right."""
    for chunk in chunks:
        refuse_cancelled("reading back")
        yield chunk


def in_flight(destination: Destination, chunk: int, concurrent: int, most: int = THREADS) -> tuple[int, int]:
    """(threads, most chunks in flight) per disk if `concurrent` disks share the budget. `most`: limits the threads."""
    threads = max(1, min(most, _AHEAD_BYTES // chunk) // concurrent)
    if destination.far:
        threads = max(threads, min(_FAR_THREADS, _FAR_BYTES // chunk) // concurrent)
    most_bytes = max(_AHEAD_BYTES // concurrent, threads * min(chunk, 1 << 20))
    return threads, max(3, min(threads + 2, most_bytes // chunk))
