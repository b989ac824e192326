"""A disk in a page blob, read and hashed by this process."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from mmap import mmap

from ..agent.digest import root
from ..agent.pack import content
from ..azure.blobs import Blob
from ..errors import StreamEnded
from ..replica.manifest import ZERO, Manifest
from ..threads import ordered
from .extents import Extents
from .flow import Flow
from .payload import Rooms
from .reader import Chunk, Data, Same, Zeros

_READERS = 8
_RUN = 64  # chunks in a run that need not be read, at most: short runs keep progress moving
_SOURCE = "data from Azure: Blob storage or the link stalls"


class PageReader:
    """A Reader whose chunks are read from a page blob, eight at a time.

    `extents`: what has to be read of it; by default the pages that are allocated. The rest is zeros.
    """

    def __init__(self, blob: Blob, flow: Flow, extents: Extents | None = None) -> None:
        self._blob, self._flow = blob, flow
        self._extents = extents
        self._closed = False  # set by any thread, once
        self._base: Manifest  # from `begin` on, like what is made of it
        self.root = (0, "")

    def begin(self, base: Manifest, *, answers: bool) -> Manifest:
        """See Reader. Nothing will be asked: a chunk that was read to be hashed is here as a whole."""
        del answers
        self._base, self._digester, self._rooms = base, base.digester(), Rooms(base.chunk)
        self._within = (self._extents or self._blob.pages(base.size)).within
        return base

    def scan(self) -> Generator[Chunk, None, None]:
        """See Reader."""
        base, flow = self._base, self._flow
        whole = root(base.size, base.chunk, base.hash)
        with (
            flow.watched(_SOURCE),
            closing(ordered(self._chunks, self._runs(), threads=_READERS, ahead=_READERS + 1)) as results,
        ):
            begun = flow.clock.monotonic()
            for chunks, received in results:
                flow.received(begun, received)
                for chunk in chunks:
                    whole.update(self._digests(chunk))
                    with flow.passing():
                        yield chunk
                begun = flow.clock.monotonic()
        self.root = (0, whole.hexdigest())

    def bottleneck(self) -> str:
        """See Reader."""
        return self._flow.bottleneck()

    def close(self) -> None:
        """See Reader. What is being read just now is waited for."""
        self._closed = True

    def _runs(self) -> Iterator[range]:
        """The chunks in order: each that has to be read alone, the others in runs."""
        first = 0
        for index in range(self._base.count):
            if next(self._within(*self._base.span(index)), None) is not None:
                if first < index:
                    yield range(first, index)
                yield range(index, index + 1)
                first = index + 1
            elif index + 1 - first == _RUN:
                yield range(first, index + 1)
                first = index + 1
        if first < self._base.count:
            yield range(first, self._base.count)

    def _digests(self, chunk: Chunk) -> bytes:
        """The digests of what a chunk or a run is now."""
        if isinstance(chunk, Data):
            return chunk.digest
        if isinstance(chunk, Zeros):
            return ZERO * chunk.count
        return self._base.digests.span(chunk.index, chunk.index + chunk.count)

    # In threads

    def _chunks(self, run: range) -> tuple[list[Chunk], int]:
        """What a run is, and how many bytes were read for it."""
        if self._closed:
            raise StreamEnded(f"the reading of {self._blob.url} was ended")
        offset, length = self._base.span(run.start)
        parts = list(self._within(offset, length))
        if not parts:
            return self._empty(run), 0
        room = self._rooms.take()
        data = memoryview(room)[:length]
        data[:] = bytes(length)
        for start, size in parts:
            data[start - offset : start - offset + size] = self._blob.read(start, size)
        return [self._compared(run.start, data, room)], sum(size for _, size in parts)

    def _empty(self, run: range) -> list[Chunk]:
        """What chunks are that hold nothing."""
        alike = groupby(run, lambda index: self._base.digest(index) == ZERO)
        runs = ((was_zero, list(indexes)) for was_zero, indexes in alike)
        return [(Same if was_zero else Zeros)(indexes[0], len(indexes)) for was_zero, indexes in runs]

    def _compared(self, index: int, data: memoryview, room: mmap) -> Chunk:
        """What a chunk is whose content is `data`, in `room`."""
        grains = self._digester.grains(data)
        digest = self._digester.of(grains)
        done = partial(self._rooms.give_back, room)
        if digest not in (ZERO, self._base.digest(index)):
            found = [
                (start, size, data[start : start + size]) for start, size, _ in content(grains, len(data))
            ]
            return Data(index, digest, True, lambda: found, done)
        done()
        return Zeros(index, 1) if digest != self._base.digest(index) else Same(index, 1)
