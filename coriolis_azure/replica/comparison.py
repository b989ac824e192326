"""Compares the content of a destination with its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing

from ..threads import ordered
from .destinations import Destination
from .manifest import Manifest

THREADS = 4
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


def in_flight(destination: Destination, chunk: int, concurrent: int, most: int = THREADS) -> tuple[int, int]:
    """(threads, most chunks in flight) per disk if `concurrent` disks share the budget. `most`: limits the threads."""
    threads = max(1, min(most, _AHEAD_BYTES // chunk) // concurrent)
    if destination.far:
        threads = max(threads, min(_FAR_THREADS, _FAR_BYTES // chunk) // concurrent)
    most_bytes = max(_AHEAD_BYTES // concurrent, threads * min(chunk, 1 << 20))
    return threads, max(3, min(threads + 2, most_bytes // chunk))
