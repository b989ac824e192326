"""Reads a disk in this process and hashes it: a page blob, or an earlier point of a replica."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby, islice
from mmap import mmap
from typing import Literal, Protocol

from ..agent.digest import root
from ..agent.pack import content
from ..errors import StreamEnded
from ..replica.manifest import GRAIN, ZERO, Manifest, grain_count
from ..threads import ordered
from .changed import Changed
from .extents import Extents
from .flow import Flow
from .payload import Rooms
from .reader import Chunk, Data, Piece, Same, Zeros

_READERS = 8
_RUN = 64  # most chunks in a run that need not be read: short runs keep progress moving
_Fate = Literal["read", "same", "zeros"]
_GAP = 64 << 10  # bytes that are read rather than asking once more
_SOURCE = "data from Azure: Blob storage or the network stalls"


class Readable(Protocol):
    """The content of a disk."""

    def read(self, offset: int, length: int) -> bytes:
        """Return these bytes. Several threads call it."""


class PageReader:
    """A Reader that reads the chunks in this process, eight at a time.

    `extents` gives the ranges to read of a disk of that size; the rest is zeros. `changed` gives what has changed on
    it since a baseline, if that is known; `grains` gives the digests of the grains that the destination has of a chunk,
    as `Grains.get` does. `waiting` is how a stall is reported.
    """

    def __init__(
        self,
        content: Readable,
        flow: Flow,
        extents: Callable[[int], Extents],
        changed: Callable[[Manifest], Changed | None] = lambda _: None,
        *,
        grains: Callable[[int, int], list[bytes]] | None = None,
        waiting: str = _SOURCE,
    ) -> None:
        self._content, self._flow = content, flow
        self._extents, self._changed_since, self._waiting = extents, changed, waiting
        self._grains = grains
        self._closed = False  # set by any thread, once
        self._base: Manifest  # set by `begin`, like what is derived from it
        self.root = (0, "")
        self.read_bytes = 0  # counted by the thread that scans

    def begin(self, base: Manifest, *, answers: bool) -> Manifest:
        """See Reader. It asks no questions: this process has each chunk in full once it is hashed."""
        del answers
        self._base, self._digester, self._rooms = base, base.digester(), Rooms(base.chunk)
        self._within, self._changed = self._extents(base.size).within, self._changed_since(base)
        return base

    def scan(self) -> Generator[Chunk, None, None]:
        """See Reader."""
        base, flow = self._base, self._flow
        whole = root(base.size, base.chunk, base.hash)
        with (
            flow.watched(self._waiting),
            closing(ordered(self._chunk, self._runs(), threads=_READERS, ahead=_READERS + 1)) as results,
        ):
            begun = flow.clock.monotonic()
            for chunk, received in results:
                flow.received(begun, received)
                self.read_bytes += received
                whole.update(self._digests(chunk))
                with flow.passing():
                    yield chunk
                begun = flow.clock.monotonic()
        self.root = (0, whole.hexdigest())

    def bottleneck(self) -> str:
        """See Reader."""
        return self._flow.bottleneck()

    def close(self) -> None:
        """See Reader. Reads under way are finished first."""
        self._closed = True

    def _runs(self) -> Iterator[tuple[_Fate, range]]:
        """All chunks in order: those to be read one by one, the others in runs."""
        for fate, indexes in groupby(range(self._base.count), self._fate):
            while run := list(islice(indexes, 1 if fate == "read" else _RUN)):
                yield fate, range(run[0], run[-1] + 1)

    def _fate(self, index: int) -> _Fate:
        """What becomes of a chunk."""
        if next(self._within(*self._base.span(index)), None) is None:
            return "same" if self._base.digest(index) == ZERO else "zeros"
        unread = self._changed.unread(self._base, index) if self._changed is not None else ""
        return unread or "read"

    def _digests(self, chunk: Chunk) -> bytes:
        """The digests of the present content of a chunk or a run."""
        if isinstance(chunk, Data):
            return chunk.digest
        if isinstance(chunk, Zeros):
            return ZERO * chunk.count
        return self._base.digests.span(chunk.index, chunk.index + chunk.count)

    # In threads

    def _chunk(self, task: tuple[_Fate, range]) -> tuple[Chunk, int]:
        """A chunk or a run, and how many bytes were read for it."""
        if self._closed:
            raise StreamEnded("the reading was cancelled")
        fate, run = task
        if fate != "read":
            return (Same if fate == "same" else Zeros)(run.start, len(run)), 0
        index = run.start
        touched = self._changed.touched(self._base, index) if self._changed is not None else None
        grains = self._known_grains(index) if touched is not None else None
        if touched is None or grains is None:
            return self._whole(index)
        return self._patched(index, grains, touched)

    def _whole(self, index: int) -> tuple[Chunk, int]:
        """A chunk of which all is read, and how many bytes that took."""
        offset, length = self._base.span(index)
        room = self._rooms.take()
        data = memoryview(room)[:length]
        received = self._fill(data, offset)
        return self._compared(index, data, room), received

    def _fill(self, data: memoryview, offset: int) -> int:
        """Read what is at `offset` on the disk; return how many bytes that took."""
        data[:] = bytes(len(data))
        parts = list(_joined(self._within(offset, len(data))))
        for start, size in parts:
            data[start - offset : start - offset + size] = self._content.read(start, size)
        return sum(size for _, size in parts)

    def _known_grains(self, index: int) -> list[bytes] | None:
        """The digests of the grains that the destination has of a chunk; None if they are not stored."""
        count = grain_count(self._base.span(index)[1])
        grains = self._grains(index, count) if self._grains is not None else []
        right = len(grains) == count and self._digester.of(grains) == self._base.digest(index)
        return grains if right else None

    def _patched(self, index: int, grains: list[bytes], touched: Sequence[int]) -> tuple[Chunk, int]:
        """A chunk of which only some grains are read, and how many bytes that took."""
        offset, length = self._base.span(index)
        room, received, pieces = self._rooms.take(), 0, list[Piece]()
        for number in touched:
            start = number * GRAIN
            data = memoryview(room)[start : min(start + GRAIN, length)]
            received += self._fill(data, offset + start)
            (digest,) = self._digester.grains(data)
            if digest != grains[number]:
                grains[number] = digest
                pieces.append((start, len(data), data if digest != ZERO else data[:0]))
        digest, done = self._digester.of(grains), partial(self._rooms.give_back, room)
        if pieces and digest != ZERO:
            return Data(index, digest, whole=False, pieces=lambda: pieces, done=done), received
        done()
        return (Zeros if pieces else Same)(index, 1), received

    def _compared(self, index: int, data: memoryview, room: mmap) -> Chunk:
        """Compare a chunk's content `data`, which lies in `room`, with what the destination holds."""
        grains = self._digester.grains(data)
        digest = self._digester.of(grains)
        if self._changed is not None:
            self._changed.compare(self._base, index, digest)
        done = partial(self._rooms.give_back, room)
        if digest not in (ZERO, self._base.digest(index)):
            pieces = [
                (start, size, data[start : start + size]) for start, size, _ in content(grains, len(data))
            ]
            return Data(index, digest, whole=True, pieces=lambda: pieces, done=done)
        done()
        return Zeros(index, 1) if digest != self._base.digest(index) else Same(index, 1)


def _joined(parts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of a range in fewer reads: what lies between two near ones is zeros, and read as well."""
    begun = end = 0
    for start, size in parts:
        if end and start - end > _GAP:
            yield begun, end - begun
            begun = start
        begun = begun if end else start
        end = start + size
    if end:
        yield begun, end - begun
