"""Reads a disk in this process and hashes it: a page blob, or an earlier point of a replica."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from mmap import mmap
from operator import eq
from typing import Protocol

from ..agent.digest import root
from ..agent.pack import add_piece
from ..errors import StreamEnded
from ..replica.manifest import GRAIN, ZERO, Manifest
from ..threads import ordered
from .changed import Changed
from .extents import Extents
from .flow import Flow
from .payload import Rooms
from .plan import Known, Plan, Proved, Run
from .reader import Chunk, Data, Piece, Same, Zeros

AHEAD = 6 << 20  # most bytes of chunks in memory, of all disks together
_THREADS = 32  # as many may wait for small reads; large ones are limited by the bytes in memory
_GAP = 64 << 10  # bytes that are read rather than asking once more
_STALL = "data to read: the storage or the network stalls"


class Content(Protocol):
    """The content of a disk."""

    def fill(self, offset: int, data: memoryview) -> None:
        """Fill `data` with what the disk holds from `offset` on. Several threads call it."""


class PageReader:
    """A Reader that reads the chunks in this process, some at a time.

    `sharers` tells how many disks share the AHEAD bytes at the moment. Each gets an equal part.

    `extents` gives the ranges to read of a disk of that size; the rest is zeros. `changed` gives what has changed on
    it since a baseline, if that is known; `grains` gives the digests of the grains that the destination has of a chunk,
    as `Grains.proved` does.
    """

    def __init__(
        self,
        content: Content,
        flow: Flow,
        extents: Callable[[int], Extents],
        changed: Callable[[Manifest], Changed | None] = lambda _: None,
        *,
        grains: Proved | None = None,
        sharers: Callable[[], int] = lambda: 1,
    ) -> None:
        self._content, self._flow = content, flow
        self._extents, self._changed_since = extents, changed
        self._grains, self._sharers = grains, sharers
        self._closed = False  # set by any thread, once
        self._base: Manifest  # set by `begin`, like what is derived from it
        self.root = (0, "")
        self.read_bytes = 0  # counted by the thread that scans

    def begin(self, base: Manifest, *, unit: int) -> Manifest:
        """See Reader. It asks no questions: this process has each chunk in full once it is hashed."""
        del unit
        self._base, self._digester, self._rooms = base, base.digester(), Rooms(base.chunk)
        known = Known(self._extents(base.size), self._changed_since(base), self._grains)
        self._within, self._plan = known.extents.within, Plan(base, known)
        return base

    def scan(self) -> Generator[Chunk, None, None]:
        """See Reader."""
        base, flow = self._base, self._flow
        whole = root(base.size, base.chunk, base.hash)
        work = ordered(self._chunk, self._runs(), threads=_THREADS, ahead=AHEAD, weigh=self._weight)
        with flow.watched(_STALL), closing(work) as results:
            begun = flow.clock.monotonic()
            for chunk, received in results:
                flow.received(begun, received)
                self.read_bytes += received
                whole.update(self._digests(chunk))
                with flow.passing():
                    yield chunk
                begun = flow.clock.monotonic()
        self.root = (0, whole.hexdigest())

    @property
    def ended(self) -> bool:
        """Whether all of the disk has been read."""
        return bool(self.root[1])

    def bottleneck(self) -> str:
        """See Reader."""
        return self._flow.bottleneck()

    def close(self) -> None:
        """See Reader. Reads under way are finished first."""
        self._closed = True

    def _runs(self) -> Iterator[Run]:
        """All chunks in order: those to be read one by one, the others in runs."""
        for run in self._plan.runs(0, 1):
            self._plan.rely(run)
            yield run

    def _weight(self, run: Run) -> int:
        """What a run takes of AHEAD: its bytes in memory, as often as disks share it.

        A run that is not read takes a little, too.
        """
        if run.fate != "read":
            return 1024
        touched = self._plan.touched(run.chunks.start)
        size = self._base.span(run.chunks.start)[1] if touched is None else len(touched) * GRAIN
        return size * self._sharers()

    def _digests(self, chunk: Chunk) -> bytes:
        """The digests of the present content of a chunk or a run."""
        if isinstance(chunk, Data):
            return chunk.digest
        if isinstance(chunk, Zeros):
            return ZERO * chunk.count
        return self._base.digests.span(chunk.index, chunk.index + chunk.count)

    # In threads

    def _chunk(self, run: Run) -> tuple[Chunk, int]:
        """A chunk or a run, and how many bytes were read for it."""
        if self._closed:
            raise StreamEnded("the reading was cancelled")
        if run.fate != "read":
            return run.as_chunks(), 0
        index = run.chunks.start
        part = self._plan.part(index)
        return self._whole(index) if part is None else self._patched(index, *part)

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
            self._content.fill(start, data[start - offset : start - offset + size])
        return sum(size for _, size in parts)

    def _patched(self, index: int, touched: Sequence[int], grains: list[bytes]) -> tuple[Chunk, int]:
        """A chunk of which only some grains are read, and how many bytes that took."""
        offset, length = self._base.span(index)
        received, pieces = 0, list[Piece]()
        for first, end in _neighbours(touched):
            start = first * GRAIN
            # Not from malloc: each thread's arena would retain some.
            data = memoryview(mmap(-1, min(end * GRAIN, length) - start))
            received += self._fill(data, offset + start)
            found = self._digester.grains(data)
            pieces += _differing(data, start, grains[first:end], found)
            grains[first:end] = found
        digest = self._digester.of(grains)
        if pieces and digest != ZERO:
            return Data(index, digest, whole=False, pieces=lambda: pieces, done=lambda: None), received
        return (Zeros if pieces else Same)(index, 1), received

    def _compared(self, index: int, data: memoryview, room: mmap) -> Chunk:
        """Compare a chunk's content `data`, which lies in `room`, with what the destination holds."""
        grains = self._digester.grains(data)
        digest = self._digester.of(grains)
        checked = self._plan.compare(index, digest)
        done = partial(self._rooms.give_back, room)
        if digest not in (ZERO, self._base.digest(index)):
            before = self._plan.stored(index) if self._base.digest(index) != ZERO else None
            whole = before is None or not any(map(eq, before, grains))
            if before is None or whole:
                before = [ZERO] * len(grains)
            pieces = list(_differing(data, 0, before, grains))
            return Data(index, digest, whole, pieces=lambda: pieces, done=done)
        done()
        if digest != self._base.digest(index):
            return Zeros(index, 1)
        return Same(index, 1, "checked" if checked else "read")


def _differing(
    data: memoryview, start: int, before: Sequence[bytes], after: Sequence[bytes]
) -> Iterator[Piece]:
    """The pieces of `data`, at `start` within its chunk, that turn grains `before` into those `after`."""
    found: list[tuple[int, int, bool]] = []
    for at, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new:
            add_piece(found, at * GRAIN, len(data[at * GRAIN : (at + 1) * GRAIN]), zero=new == ZERO)
    for at, size, is_zero in found:
        yield start + at, size, data[at : at if is_zero else at + size]


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


def _neighbours(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The runs of consecutive numbers: first, exclusive end."""
    first = end = -1
    for number in numbers:
        if number != end and end >= 0:
            yield first, end
        first, end = first if number == end else number, number + 1
    if end >= 0:
        yield first, end
