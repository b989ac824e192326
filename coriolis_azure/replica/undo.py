"""The undo log of an earlier point in time: the content at that point of each block that has changed since.

It is a draft in reverse, over the next newer point. A chunk read through it is correct if it has the digest that the
manifest of that point gives; nothing else proves the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import chain

from ..agent import is_zero
from ..errors import DestinationFailed
from ..threads import ordered
from .draft import Draft, batches, index_size
from .manifest import Manifest
from .medium import Past, Readable, Store


def keep(
    past: Past,
    image: Store,
    manifest: Manifest,
    changing: Iterable[tuple[int, int]],
    guard: Callable[[], None],
) -> None:
    """Log the content of `image`, which matches `manifest`, in the extents that will change. Durable on return.

    `changing`: the offset and length of each extent, in disk order. `guard` raises if the run must not go on.
    """
    log = Draft(
        past.make("undo", manifest.size),
        past.make("index", index_size(manifest)),
        image,
        manifest,
        existing=False,
    )

    def contents(extents: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
        guard()
        return [(offset, image.read(offset, length)) for offset, length in extents]

    begun = end = 0  # the range of chunks that are logged but not settled yet
    extents = batches(_within(changing, min(manifest.size, image.size)))
    with closing(ordered(contents, extents, threads=4, ahead=12)) as results:
        for offset, data in chain.from_iterable(results):
            first = offset // manifest.chunk
            if begun < first:
                log.settle(manifest, begun, min(first, end) - begun)
                begun = first
            end = -(-(offset + len(data)) // manifest.chunk)
            log.cover(offset, len(data))
            if not is_zero(data):
                log.content.write(offset, data)
    log.settle(manifest, begun, end - begun)
    log.flush()


def over(past: Past, below: Readable, manifest: Manifest) -> Readable:
    """The disk at that point, described by `manifest`; `below` is the disk at the next newer point."""
    content, index = past.open("undo"), past.open("index")
    if content is None or index is None:
        return below  # this disk was not changed
    if (content.size, index.size) != (manifest.size, index_size(manifest)):
        raise DestinationFailed("the undo log does not have the size of its disk")
    return Draft(content, index, below, manifest, existing=True)


def _within(extents: Iterable[tuple[int, int]], size: int) -> Iterable[tuple[int, int]]:
    """The parts of the extents within the first `size` bytes."""
    return ((offset, min(length, size - offset)) for offset, length in extents if offset < size)
