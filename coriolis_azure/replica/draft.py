"""What a run has fetched and not published: content at the offsets it has on the disk, and an index of its chunks.

A *partial* draft is a whole image to be. A *redo* draft lies over an image, which stays as it is: of each chunk it has
the blocks that changed.

The index has one record a chunk, at a place that its number gives: the digest that the chunk is to have, and which of
its blocks are the draft's, as bits. No bits: the draft has nothing of the chunk. The records need no order of writing
and no flush, since each proves itself: it counts where image and draft together have its digest. What a crash has torn,
or a disk has lost, is fetched again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

from ..agent import DIGEST, is_zero
from ..threads import Lock, ordered
from .manifest import Manifest
from .medium import Content, Readable, Store, holds, read_padded

BLOCK = 4096  # bytes that one bit stands for
_PIECE = 1 << 20  # bytes that are published at a time, or kept
_HANDFUL = 64  # extents that a thread takes at a time, at most
_RECORDS = 4096  # that are read at a time
Read = Callable[[int, int], Content]


def index_size(manifest: Manifest) -> int:
    """The bytes of the index for such a disk."""
    return manifest.count * _record_size(manifest.chunk)


class Draft:
    """A draft of a disk in such chunks as `shape` has; `image` is below it, None for a partial one. For threads.

    `known`: whether the index may have records already.
    """

    def __init__(
        self, content: Store, index: Store, image: Readable | None, shape: Manifest, *, known: bool
    ) -> None:
        self.content, self._index, self._image = content, index, image
        self._chunk, self._size, self._count = shape.chunk, shape.size, shape.count
        self._record = _record_size(shape.chunk)
        self._full = (1 << -(-shape.chunk // BLOCK)) - 1
        self._touched: dict[int, int] = {}  # blocks of chunks that are not settled
        self._present = bytearray(-(-shape.count // 8))
        self._lock = Lock()
        if known:
            for at, _, _ in self._records():
                self._present[at // 8] |= 1 << at % 8

    def cover(self, offset: int, length: int) -> None:
        """These bytes are about to be written to `content`."""
        if self._image is None:
            return
        end = offset + length
        with self._lock:
            for at in range(offset // self._chunk, -(-end // self._chunk)):
                start = at * self._chunk
                first = (max(offset, start) - start) // BLOCK
                last = -(-(min(end, start + self._chunk) - start) // BLOCK)
                bits = (1 << last) - (1 << first)
                self._touched[at] = self._blocks(at) | bits

    def settle(self, manifest: Manifest, first: int, count: int) -> None:
        """Of these chunks all blocks are there: they are as `manifest` says."""
        records = bytearray()
        for at in range(first, first + count):
            blocks = self._full if self._image is None else self._blocks(at)
            records += manifest.digest(at) + blocks.to_bytes(self._record - DIGEST, "little")
        self._index.write(first * self._record, records)
        with self._lock:
            for at in range(first, first + count):
                self._touched.pop(at, None)
                self._present[at // 8] |= 1 << at % 8

    @property
    def size(self) -> int:
        """The bytes of the disk."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """The disk with what the draft has of it."""
        with self._lock:
            plan = list(self._plan(offset, length))
        if len(plan) == 1 and plan[0][2]:
            return self.content.read(offset, length)
        parts = (self._part(start, size, None, None, drafted=drafted) for start, size, drafted in plan)
        return b"".join(parts)

    def resume(self, base: Manifest, image: Store | None) -> Manifest:
        """`base`, which is of the image, with the chunks that the draft really has; all others leave the draft."""
        digests, digest = base.digests.copy(), base.digester()
        with ExitStack() as reading:
            of_content = reading.enter_context(self.content.uncached())
            of_image = reading.enter_context(image.uncached()) if image is not None else None

            def look(record: tuple[int, bytes, int]) -> tuple[int, bytes, bool]:
                at, expected, _ = record
                offset, length = base.span(at)
                parts = [
                    self._part(start, size, of_content, of_image, drafted=drafted)
                    for start, size, drafted in self._plan(offset, length)
                ]
                return at, expected, digest(parts[0] if len(parts) == 1 else b"".join(parts)) == expected

            with closing(ordered(look, self._records(), threads=2, ahead=6)) as results:
                for at, expected, right in results:
                    if right:
                        digests.put(at, expected)
                    else:
                        self._drop(at)
        if self._image is None:
            self._clear_unknown(base)
        return replace(base, digests=digests)

    def publish(self, image: Store, go_on: Callable[[], None]) -> None:
        """Bring the image to what the draft has. It may be done again, from any point on."""

        def put(extents: list[tuple[int, int]]) -> None:
            go_on()
            for offset, length in extents:
                if image.share(self.content, offset, length):
                    continue
                data = self.content.read(offset, length) if holds(self.content, offset, length) else b""
                if is_zero(data):
                    image.zero(offset, length)
                else:
                    image.write(offset, data)

        with closing(ordered(put, handfuls(self.extents()), threads=4, ahead=12)) as results:
            for _ in results:
                pass

    def first_difference(self, image: Store) -> int | None:
        """The offset of the first piece that the image, read from its medium, does not have as the draft has it."""
        with image.uncached() as read:

            def same(offset: int, length: int) -> bool:
                if not (holds(self.content, offset, length) or holds(image, offset, length)):
                    return True
                # Of the same length: == goes through a memoryview byte by byte, this does not.
                return self.content.read(offset, length).startswith(read(offset, length))

            def difference(extents: list[tuple[int, int]]) -> int | None:
                return next((offset for offset, length in extents if not same(offset, length)), None)

            with closing(ordered(difference, handfuls(self.extents()), threads=4, ahead=12)) as results:
                return next((offset for offset in results if offset is not None), None)

    def flush(self) -> None:
        """On return all of it survives a power loss."""
        self.content.flush()
        self._index.flush()

    def _blocks(self, at: int) -> int:
        """The blocks of a chunk that are the draft's. With the lock held, or by one thread."""
        touched = self._touched.get(at)
        if touched is not None:
            return touched
        if not self._present[at // 8] >> at % 8 & 1:
            return 0
        record = self._index.read(at * self._record, self._record)
        return int.from_bytes(record[DIGEST:], "little")

    def _plan(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """The range in parts: offset, length, whether it is the draft's; else it is the image's."""
        if self._image is None:
            yield offset, length, True
            return
        end, begun, before = offset + length, offset, False
        for at in range(offset // self._chunk, -(-end // self._chunk)):
            start = at * self._chunk
            for begin, last, drafted in self._runs(self._blocks(at), start):
                low, high = max(begin, offset), min(last, end)
                if low >= high:
                    continue
                if low > begun and drafted != before:
                    yield begun, low - begun, before
                    begun = low
                before = drafted
        if begun < end:
            yield begun, end - begun, before

    def _runs(self, blocks: int, start: int) -> Iterator[tuple[int, int, bool]]:
        """The runs of equal bits of a chunk at `start`: first byte, end, whether they are set."""
        at, last = 0, self._full.bit_length()
        while at < last:
            rest = blocks >> at
            drafted = bool(rest & 1)
            others = ~rest if drafted else rest
            end = min(last, at + (others & -others).bit_length() - 1) if others else last
            yield start + at * BLOCK, start + end * BLOCK, drafted
            at = end

    def _part(
        self, offset: int, length: int, of_content: Read | None, of_image: Read | None, *, drafted: bool
    ) -> Content:
        """One part of a plan."""
        if drafted or self._image is None:
            return (of_content or self.content.read)(offset, length)
        return read_padded(self._image, offset, length, of_image or self._image.read)

    def extents(self) -> Iterator[tuple[int, int]]:
        """What of the disk is the draft's: offset and length, in pieces."""
        for at, _, blocks in self._records():
            for begin, end, drafted in self._runs(blocks, at * self._chunk):
                if drafted:
                    yield from pieces(begin, min(end, self._size))

    def _records(self) -> Iterator[tuple[int, bytes, int]]:
        """The chunks that the index speaks of: number, digest, blocks."""
        size = self._record
        for first in range(0, self._count, _RECORDS):
            last = min(first + _RECORDS, self._count)
            for offset, length in self._index.extents(first * size, (last - first) * size):
                low, high = max(first, offset // size), min(last, -(-(offset + length) // size))
                first = high
                page = self._index.read(low * size, (high - low) * size)
                for at in range(low, high):
                    record = page[(at - low) * size : (at - low + 1) * size]
                    if blocks := int.from_bytes(record[DIGEST:], "little"):
                        yield at, record[:DIGEST], blocks

    def _drop(self, at: int) -> None:
        """Take a chunk out of the index."""
        self._index.write(at * self._record, bytes(self._record))
        self._present[at // 8] &= ~(1 << at % 8)

    def _clear_unknown(self, base: Manifest) -> None:
        """Make zeros of what no record speaks of: a run that died may have begun to write it."""
        for offset, length in list(self.content.extents(0, self._size)):
            for at in range(offset // self._chunk, -(-(offset + length) // self._chunk)):
                if not self._present[at // 8] >> at % 8 & 1:
                    self.content.zero(*base.span(at))


def handfuls(extents: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The extents in lists, each of up to a piece's bytes: a task for a thread, which small ones are not."""
    handful: list[tuple[int, int]] = []
    room = _PIECE
    for offset, length in extents:
        if handful and (length > room or len(handful) == _HANDFUL):
            yield handful
            handful, room = [], _PIECE
        handful.append((offset, length))
        room -= length
    if handful:
        yield handful


def pieces(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The bytes from `begin` to `end` in pieces: offset and length of each."""
    return ((start, min(_PIECE, end - start)) for start in range(begin, end, _PIECE))


def _record_size(chunk: int) -> int:
    return DIGEST + -(-chunk // (8 * BLOCK))
