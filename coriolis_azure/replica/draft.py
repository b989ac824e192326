"""A draft: what a run has fetched and not published, as content at its offsets on the disk, and an index of chunks.

A *partial* image is the draft of a whole disk. A *redo* log is a draft over an image: it holds only the blocks that
differ, and the image stays as it is.

The index has one entry per chunk, at a place computed from the chunk's number: the digest of the chunk's new content,
and one bit per block that says whether the draft holds it. Without any bit, the draft holds nothing of the chunk.
Entries are written in any order and not flushed, because each proves itself: it is valid if draft and image together
have its digest. What was torn by a crash or lost by the medium is fetched again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TypeVar

from ..agent import DIGEST, is_zero
from ..threads import Lock, ordered
from .manifest import Manifest
from .medium import Content, Readable, Store, holds, read_padded

BLOCK = 4096  # bytes per bit of an entry
_PIECE = 1 << 20  # most bytes that are copied at once
_BATCH = 64  # most extents in one task of a thread
_ENTRIES = 4096  # entries read at once
_FAR_THREADS, _FAR_BYTES = 32, 16 << 20
R = TypeVar("R")
Read = Callable[[int, int], Content]


def index_size(manifest: Manifest) -> int:
    """The size, in bytes, of the index for a disk with this manifest."""
    return manifest.count * _entry_size(manifest.chunk)


class Draft:
    """The draft of a disk that has the size and chunks of `shape`, over `image`; None for a partial image. Thread-safe.

    `existing`: whether the index may have entries already.
    """

    def __init__(
        self, content: Store, index: Store, image: Readable | None, shape: Manifest, *, existing: bool
    ) -> None:
        self.content, self._index, self._image = content, index, image
        self._chunk, self._size, self._count = shape.chunk, shape.size, shape.count
        self._entry = _entry_size(shape.chunk)
        self._full = (1 << -(-shape.chunk // BLOCK)) - 1
        self._unsettled: dict[
            int, int
        ] = {}  # the blocks held of each chunk that was written and not settled yet
        self._present = bytearray(-(-shape.count // 8))  # one bit per chunk: whether the index has its entry
        self._lock = Lock()
        if existing:
            for at, _, _ in self._entries():
                self._present[at // 8] |= 1 << at % 8

    def cover(self, offset: int, length: int) -> None:
        """Announce a write of `length` bytes at `offset` to `content`."""
        if self._image is None:
            return
        end = offset + length
        with self._lock:
            for at in range(offset // self._chunk, -(-end // self._chunk)):
                start = at * self._chunk
                first = (max(offset, start) - start) // BLOCK
                last = -(-(min(end, start + self._chunk) - start) // BLOCK)
                bits = (1 << last) - (1 << first)
                self._unsettled[at] = self._blocks(at) | bits

    def settle(self, manifest: Manifest, first: int, count: int) -> None:
        """Write the entries of `count` chunks from `first` on, whose content is complete and matches `manifest`."""
        entries = bytearray()
        for at in range(first, first + count):
            blocks = self._full if self._image is None else self._blocks(at)
            entries += manifest.digest(at) + blocks.to_bytes(self._entry - DIGEST, "little")
        self._index.write(first * self._entry, entries)
        with self._lock:
            for at in range(first, first + count):
                self._unsettled.pop(at, None)
                self._present[at // 8] |= 1 << at % 8

    @property
    def size(self) -> int:
        """The size of the disk, in bytes."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """The content of the disk: the draft's where it holds it, else the image's."""
        with self._lock:
            plan = list(self._plan(offset, length))
        if len(plan) == 1 and plan[0][2]:
            return self.content.read(offset, length)
        parts = (self._part(start, size, None, None, drafted=drafted) for start, size, drafted in plan)
        return b"".join(parts)

    def resume(self, base: Manifest, image: Store | None) -> Manifest:
        """Compare all chunks in the draft with their entries; return `base` with the digests of those that match.

        `base` describes the image. Entries that do not match are deleted.
        """
        digests, digest = base.digests.copy(), base.digester()
        with ExitStack() as reading:
            read_content = reading.enter_context(self.content.uncached())
            read_image = reading.enter_context(image.uncached()) if image is not None else None

            def compare(entry: tuple[int, bytes, int]) -> tuple[int, bytes, bool]:
                at, expected, _ = entry
                offset, length = base.span(at)
                parts = [
                    self._part(start, size, read_content, read_image, drafted=drafted)
                    for start, size, drafted in self._plan(offset, length)
                ]
                return at, expected, digest(parts[0] if len(parts) == 1 else b"".join(parts)) == expected

            threads, ahead = chunks_at_once(self.content, self._chunk)
            with closing(ordered(compare, self._entries(), threads=threads, ahead=ahead)) as results:
                for at, expected, matches in results:
                    if matches:
                        digests.put(at, expected)
                    else:
                        self._drop(at)
        if self._image is None:
            self._clear_unsettled(base)
        return replace(base, digests=digests)

    def apply(self, image: Store, guard: Callable[[], None]) -> None:
        """Write what the draft holds into `image`. May be repeated, even if it was interrupted at any moment.

        `guard` is called before each batch, and raises if the run must not go on.
        """

        def write(extents: list[tuple[int, int]]) -> None:
            guard()
            for offset, length in extents:
                if image.reflink(self.content, offset, length):
                    continue
                data = self.content.read(offset, length) if holds(self.content, offset, length) else b""
                if is_zero(data):
                    image.zero(offset, length)
                else:
                    image.write(offset, data)

        with closing(self._each(write, image)) as results:
            for _ in results:
                pass

    def first_difference(self, image: Store) -> int | None:
        """The offset of the first extent in which the image, read from its medium, differs from the draft, or None."""
        with image.uncached() as read:

            def same(offset: int, length: int) -> bool:
                if not (holds(self.content, offset, length) or holds(image, offset, length)):
                    return True
                # Of the same length: == goes through a memoryview byte by byte, this does not.
                return self.content.read(offset, length).startswith(read(offset, length))

            def difference(extents: list[tuple[int, int]]) -> int | None:
                return next((offset for offset, length in extents if not same(offset, length)), None)

            with closing(self._each(difference, image)) as results:
                return next((offset for offset in results if offset is not None), None)

    def _each(self, work: Callable[[list[tuple[int, int]]], R], image: Store) -> Generator[R, None, None]:
        """What `work` returns for what the draft holds, in disk order; several threads call it with some extents.

        If `image` is far, each extent has a thread of its own: it waits for the other host several times.
        """
        if not image.far:
            return ordered(work, batches(self.extents()), threads=4, ahead=12)
        alone = ([extent] for extent in self.extents())
        return ordered(
            work, alone, threads=_FAR_THREADS, ahead=_FAR_BYTES, weigh=lambda extents: extents[0][1]
        )

    def flush(self) -> None:
        """Make content and index durable: on return they survive a power loss."""
        self.content.flush()
        self._index.flush()

    def _blocks(self, at: int) -> int:
        """The bits of a chunk's blocks that the draft holds. Call it with the lock held, or from the only thread."""
        unsettled = self._unsettled.get(at)
        if unsettled is not None:
            return unsettled
        if not self._present[at // 8] >> at % 8 & 1:
            return 0
        entry = self._index.read(at * self._entry, self._entry)
        return int.from_bytes(entry[DIGEST:], "little")

    def _plan(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the parts of the range: offset, length, and whether the draft holds it (else the image does)."""
        if self._image is None:
            yield offset, length, True
            return
        end, pending, pending_drafted = offset + length, offset, False
        for at in range(offset // self._chunk, -(-end // self._chunk)):
            start = at * self._chunk
            for begin, last, drafted in self._runs(self._blocks(at), start):
                low, high = max(begin, offset), min(last, end)
                if low >= high:
                    continue
                if low > pending and drafted != pending_drafted:
                    yield pending, low - pending, pending_drafted
                    pending = low
                pending_drafted = drafted
        if pending < end:
            yield pending, end - pending, pending_drafted

    def _runs(self, blocks: int, start: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the runs of equal bits of the chunk at offset `start`: first byte, end, and whether they are set."""
        at, last = 0, self._full.bit_length()
        while at < last:
            rest = blocks >> at
            drafted = bool(rest & 1)
            others = ~rest if drafted else rest
            end = min(last, at + (others & -others).bit_length() - 1) if others else last
            yield start + at * BLOCK, start + end * BLOCK, drafted
            at = end

    def _part(
        self, offset: int, length: int, read_content: Read | None, read_image: Read | None, *, drafted: bool
    ) -> Content:
        """The content of one part that `_plan` yields."""
        if drafted or self._image is None:
            return (read_content or self.content.read)(offset, length)
        return read_padded(self._image, offset, length, read_image or self._image.read)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield, in disk order, the offset and length of what the draft holds, in pieces."""
        for at, _, blocks in self._entries():
            for begin, end, drafted in self._runs(blocks, at * self._chunk):
                if drafted:
                    yield from pieces(begin, min(end, self._size))

    def _entries(self) -> Iterator[tuple[int, bytes, int]]:
        """Yield the entries of the index: a chunk's number, its digest, and the bits of its blocks."""
        size = self._entry
        for first in range(0, self._count, _ENTRIES):
            last = min(first + _ENTRIES, self._count)
            for offset, length in self._index.extents(first * size, (last - first) * size):
                low, high = max(first, offset // size), min(last, -(-(offset + length) // size))
                first = high
                page = self._index.read(low * size, (high - low) * size)
                for at in range(low, high):
                    entry = page[(at - low) * size : (at - low + 1) * size]
                    if blocks := int.from_bytes(entry[DIGEST:], "little"):
                        yield at, entry[:DIGEST], blocks

    def _drop(self, at: int) -> None:
        """Delete a chunk's entry."""
        self._index.write(at * self._entry, bytes(self._entry))
        self._present[at // 8] &= ~(1 << at % 8)

    def _clear_unsettled(self, base: Manifest) -> None:
        """Zero the chunks without an entry: a run that died may have written parts of them."""
        for offset, length in list(self.content.extents(0, self._size)):
            for at in range(offset // self._chunk, -(-(offset + length) // self._chunk)):
                if not self._present[at // 8] >> at % 8 & 1:
                    self.content.zero(*base.span(at))


def chunks_at_once(store: Store, chunk: int) -> tuple[int, int]:
    """(threads, chunks in flight) for reading all chunks of a store back."""
    if not store.far:
        return 2, 6
    threads = max(2, min(_FAR_THREADS, _FAR_BYTES // chunk))
    return threads, threads + 2


def batches(extents: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Group extents into batches of up to 1 MiB, one task for a thread each: a small extent alone is not worth one."""
    batch: list[tuple[int, int]] = []
    left = _PIECE
    for offset, length in extents:
        if batch and (length > left or len(batch) == _BATCH):
            yield batch
            batch, left = [], _PIECE
        batch.append((offset, length))
        left -= length
    if batch:
        yield batch


def pieces(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The offset and length of each piece of the range from `begin` to `end`; a piece has up to 1 MiB."""
    return ((start, min(_PIECE, end - start)) for start in range(begin, end, _PIECE))


def _entry_size(chunk: int) -> int:
    return DIGEST + -(-chunk // (8 * BLOCK))
