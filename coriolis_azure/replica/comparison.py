"""Compares what a destination holds with what its manifest says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing

from ..threads import ordered
from .destinations import Destination
from .manifest import Manifest

THREADS = 4
_AHEAD_BYTES = 6 << 20  # of chunks that have arrived and are not done with, of all disks together
# Where each write waits for another host, a link with a delay is filled by writes under way, not by threads at work.
_FAR_THREADS, _FAR_BYTES = 16, 16 << 20


def differing(
    destination: Destination, manifest: Manifest, indexes: Iterable[int], concurrent: int = 1
) -> Iterator[int]:
    """The chunks of `indexes` whose content is not what `manifest` says, in order. UNKNOWN always differs.

    `concurrent`: disks that this is done with at a time.
    """
    digest = manifest.digester()

    def differs(index: int) -> tuple[int, bool]:
        return index, digest(destination.read(*manifest.span(index))) != manifest.digest(index)

    threads, ahead = in_hand(destination, manifest.chunk, concurrent)
    with closing(ordered(differs, indexes, threads=threads, ahead=ahead)) as results:
        yield from (index for index, wrong in results if wrong)


def in_hand(destination: Destination, chunk: int, concurrent: int, most: int = THREADS) -> tuple[int, int]:
    """How many threads work for a disk, and how many chunks they may have in hand, `concurrent` disks at a time."""
    threads = max(1, min(most, _AHEAD_BYTES // chunk) // concurrent)
    if destination.far:
        threads = max(threads, min(_FAR_THREADS, _FAR_BYTES // chunk) // concurrent)
    room = max(_AHEAD_BYTES // concurrent, threads * min(chunk, 1 << 20))
    return threads, max(3, min(threads + 2, room // chunk))
