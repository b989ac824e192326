"""Copies one disk: pool threads apply what a reader yields to a destination; results are recorded in disk order.

Nothing is trusted: every chunk's digest is checked before the chunk is written, and the digest over all chunks is
compared at the end. A copy that fails at any point is not committed.

Memory is bounded by the bytes in flight, whatever the size of the disk.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, groupby

from .change_map import ChangeMap, Kind, Tally
from .clock import refuse_cancelled
from .errors import CoriolisAzureError, CorruptChunk
from .events import Progress, Step
from .readers.reader import Answer, Chunk, Data, Piece, Question, Reader, Same, Zeros, corrupt
from .replica.comparison import THREADS, ReadBack, in_flight
from .replica.destinations import Destination, Joined
from .replica.manifest import DIGEST, GRAIN, UNKNOWN, ZERO, Manifest, grain_count
from .threads import ordered


@dataclass(frozen=True)
class Outcome:
    """The result of copying a disk. Each byte was sent, found to be zero, or skipped because it had not changed.

    `read_bytes`: disk bytes that had to be read to know this. `sent_bytes`: disk bytes passed to the destination,
    before compression. `verified`: True if what was written was read back and is correct, None if it was not read back.
    `full`: nothing was known of the destination before. `map`: what was found where. `ended`: when it was committed, by
    the monotonic clock of the progress.
    """

    manifest: Manifest
    read_bytes: int
    sent_bytes: int
    zero_bytes: int
    skipped_bytes: int
    verified: bool | None
    full: bool
    map: ChangeMap
    ended: float


def copy(
    reader: Reader,
    base: Manifest,
    destination: Destination,
    progress: Progress,
    *,
    verify: bool,
    concurrent: int = 1,
) -> Outcome:
    """Copy the disk that `reader` reads to `destination`, which holds `base`; commit, and close the reader.

    `concurrent`: how many disks are copied at a time; they share threads and memory. Raises the reader's errors,
    CorruptChunk or DestinationFailed, with disk and offset; then nothing is committed.
    """
    with closing(reader):
        return _Copy(reader, base, destination, progress, concurrent).run(verify=verify)


@dataclass(frozen=True, slots=True)
class _Done:
    """What a thread has done: `count` chunks from `index` on now have this digest; None: that of the base.

    `kinds`: the chunks that are settled, for the map of the disk. `grains`: those of the chunk that were written, by
    number; None: all of them.
    """

    index: int
    count: int
    digest: bytes | None = None
    sent: int = 0
    zero: int = 0
    skipped: int = 0
    kinds: Sequence[tuple[Kind, int, int]] = ()
    grains: Collection[int] | None = None


class _Copy:
    """The state of one copy. Only `_apply` and what it calls run in several threads.

    `_base` is what the destination holds; its digests are updated as chunks are settled. `_before` are its digests at
    the start. For chunks that the reader has asked about, `_asked` are the digests of its grains; those of which every
    grain is sent are in `_replaced` instead.
    """

    def __init__(
        self, reader: Reader, base: Manifest, destination: Destination, progress: Progress, concurrent: int
    ) -> None:
        self._reader, self._progress, self._concurrent = reader, progress, concurrent
        self._destination, self._grain_store = destination, destination.grains
        self._before, self._base, self._full = base.digests, base, base.fresh
        self._digester = base.digester()
        # Without a lock: each chunk is in the hands of one thread at a time, and a dict's operations are atomic.
        self._asked: dict[int, list[bytes]] = {}
        self._replaced = set[int]()
        self._sent = self._zero = self._skipped = 0
        self._tally = Tally(base.size, base.chunk)
        self._failure: Exception | None = None
        self._read_back: ReadBack | None = None

    def run(self, *, verify: bool) -> Outcome:
        """Copy the disk, from opening it to the commit."""
        if not (verify and self._destination.readable):
            return self._run(verify=verify)
        with closing(ReadBack(self._destination, self._before, self._concurrent)) as self._read_back:
            return self._run(verify=True)

    def _run(self, *, verify: bool) -> Outcome:
        try:
            self._settle()
        except CoriolisAzureError:
            # A thread that fails closes the reader to wake it up; its error is the reason for the reader's.
            if self._failure is not None:
                raise self._failure from None
            raise
        self._progress.last(self._sent)
        manifest = replace(self._base, fresh=False)
        first, root = self._reader.root
        if root != manifest.root(first):
            disk = self._progress.disk
            raise CorruptChunk(f"{disk}: the digest of the whole disk differs from the reader's", disk=disk)
        self._destination.flush()
        verified = self._verified(manifest) if verify else None
        refuse_cancelled("the copy")  # nothing may have waited since
        self._destination.commit(manifest)
        return Outcome(
            manifest=manifest,
            read_bytes=self._reader.read_bytes,
            sent_bytes=self._sent,
            zero_bytes=self._zero,
            skipped_bytes=self._skipped,
            verified=verified,
            full=self._full,
            map=self._tally.map(),
            ended=self._progress.clock.monotonic(),
        )

    def _settle(self) -> None:
        """Apply what the reader yields, and record it in order."""
        base = self._reader.begin(self._base, unit=self._unit)
        self._base, self._digester = replace(base, digests=base.digests.copy()), base.digester()
        # One core is for the reader. More threads than cores would only slow each other down.
        most = max(1, min(THREADS, len(os.sched_getaffinity(0)) - 1))
        threads, ahead = in_flight(self._destination, base.chunk, self._concurrent, most)
        self._progress.show(0, 0)
        with closing(self._reader.scan()) as chunks:
            joined = self._destination.joined_bytes if isinstance(self._destination, Joined) else 0
            work = ordered(
                self._apply,
                _batches(map(self._completed, chunks), joined // base.chunk),
                threads=threads,
                ahead=ahead,
                weigh=len,
                abort=self._reader.close,
            )
            with closing(work) as results:
                for done in chain.from_iterable(results):
                    self._note(done)

    @property
    def _unit(self) -> int:
        """The unit in which the destination can tell what it holds, in bytes; 0 if it cannot.

        Reading from a far destination would take longer than sending whole grains.
        """
        if self._full or not self._destination.readable:
            return 0
        if self._destination.far:
            return GRAIN if self._grain_store is not None else 0
        return 1

    def _completed(self, item: Chunk | Question) -> Chunk | Question:
        """The item; but a patch that replaces all grains of a chunk is one of the whole chunk."""
        if isinstance(item, Data) and item.index in self._replaced:
            self._replaced.discard(item.index)
            return replace(item, whole=True)
        return item

    def _note(self, done: _Done) -> None:
        """Record what a thread has done, and report progress."""
        if done.digest is not None:
            self._base.digests.put(done.index, done.digest * done.count)
            self._destination.settle(self._base, done.index, done.count)
            if self._read_back is not None:
                self._refuse(self._read_back.add(self._base, done.index, done.count, done.grains))
        self._sent, self._zero = self._sent + done.sent, self._zero + done.zero
        self._skipped += done.skipped
        for kind, first, count in done.kinds:
            self._tally.add(kind, first, count)
        settled = self._sent + self._zero + self._skipped
        self._progress.show(settled, self._sent, self._reader.bottleneck())

    def _verified(self, manifest: Manifest) -> bool | None:
        """Read back the chunks whose digests have changed, or ask the destination to confirm them."""

        def tell() -> None:
            self._progress.report(Step("verify", self._progress.disk))

        if self._read_back is not None:
            self._refuse(self._read_back.finish(manifest, tell))
            return True
        if not self._destination.checkable:
            return None
        tell()
        return self._destination.check()

    def _refuse(self, index: int | None) -> None:
        """Raise CorruptChunk if a chunk was found to be wrong when it was read back."""
        if index is not None:
            raise self._corrupt(index, "has other content when it is read back from the destination")

    # In pool threads

    def _apply(self, batch: Sequence[Chunk | Question]) -> list[_Done]:
        """Apply one item of the reader to the destination, or whole chunks that are neighbours."""
        try:
            if isinstance(batch[0], Data) and batch[0].whole:
                return self._data([item for item in batch if isinstance(item, Data)])
            return [self._one(item) for item in batch]
        except Exception as error:
            # The reader may be waiting for something that waits for this thread: wake it up.
            if self._failure is None:  # without a lock: of two threads that fail at once, either has a reason
                self._failure = error
            self._reader.close()
            raise

    def _one(self, item: Chunk | Question) -> _Done:
        """Apply an item that is not a whole chunk."""
        if isinstance(item, Same):
            return self._same(item)
        if isinstance(item, Zeros):
            return self._zeros(item)
        if isinstance(item, Question):
            return self._answer(item)
        return self._patch(item)

    def _same(self, run: Same) -> _Done:
        """Count unchanged chunks; in a full run these are zeros that the destination already holds."""
        base = self._base
        zero = skipped = 0
        chunks = range(run.index, run.index + run.count)
        for index in chunks:
            digest, length = base.digest(index), base.span(index)[1]
            if digest == UNKNOWN:
                raise self._corrupt(index, "is reported as unchanged, but nothing is known about it")
            if base.fresh and digest == ZERO:
                zero += length
            else:
                skipped += length
        kind: Kind = "same" if run.how == "read" else run.how
        kinds = _grouped(("zero" if base.digest(index) == ZERO else kind, index) for index in chunks)
        return _Done(run.index, run.count, zero=zero, skipped=skipped, kinds=list(kinds))

    def _zeros(self, run: Zeros) -> _Done:
        base, last = self._base, run.index + run.count - 1
        offset = base.span(run.index)[0]
        length = sum(base.span(last)) - offset
        self._destination.intend(offset, length)
        self._destination.zero(offset, length)
        kinds: list[tuple[Kind, int, int]] = [("changed", run.index, run.count)]
        return _Done(run.index, run.count, ZERO, zero=length, kinds=kinds)

    def _answer(self, question: Question) -> _Done:
        """Compare the grains of chunks with the destination's; answer with its leaves for those that differ."""
        answers, grains_there = list[Answer](), question.grains
        theirs = (grains_there[at : at + DIGEST] for at in range(0, len(grains_there), DIGEST))
        for index in range(question.index, question.index + question.count):
            offset, length = self._base.span(index)
            mine = self._stored(index)
            if mine is None and self._destination.far:
                mine = [UNKNOWN] * grain_count(length)
            elif mine is None:
                mine = self._read_grains(index)
            grains = [number for number, digest in enumerate(mine) if digest != next(theirs)]
            leaves: list[bytes] = []
            if question.leaf < GRAIN:
                for start in (number * GRAIN for number in grains):
                    content = self._destination.read(offset + start, min(GRAIN, length - start))
                    leaves += self._digester.leaves(content, question.leaf)
            # After a reconnect, a chunk is asked about again, and then the stored digests may no longer be readable.
            if len(grains) == len(mine) and question.leaf >= GRAIN:
                self._asked.pop(index, None)
                self._replaced.add(index)
            else:
                self._replaced.discard(index)
                self._asked[index] = mine
            answers.append((index, grains, b"".join(leaves)))
        question.answer(answers)
        return _Done(question.index, question.count)

    def _stored(self, index: int) -> list[bytes] | None:
        """The digests of a chunk's grains at the destination; None if nothing that is stored proves them."""
        digest, count = self._base.digest(index), grain_count(self._base.span(index)[1])
        if digest == ZERO:
            return [ZERO] * count
        if digest == UNKNOWN or self._grain_store is None:
            return None
        return self._grain_store.proved(index, count, digest, self._digester)

    def _read_grains(self, index: int) -> list[bytes]:
        """The same, of the content that the destination has."""
        return self._digester.grains(memoryview(self._destination.read(*self._base.span(index))))

    def _data(self, chunks: Sequence[Data]) -> list[_Done]:
        """Write whole chunks that are neighbours: complete grains, and zeros between them."""
        found = [(chunk, *self._laid(chunk)) for chunk in chunks]
        begin, end = self._base.span(chunks[0].index)[0], sum(self._base.span(chunks[-1].index))
        self._destination.intend(begin, end - begin)
        self._put(
            _adjoined(
                (self._base.span(chunk.index)[0] + start, size, data)
                for chunk, pieces, _ in found
                for start, size, data in pieces
            )
        )
        results = list[_Done]()
        for chunk, pieces, grains in found:
            offset, length = self._base.span(chunk.index)
            if self._base.digest(chunk.index) != ZERO:
                for start, size in _gaps(pieces, length):
                    self._destination.zero(offset + start, size)
            sent = self._finish(chunk, grains, pieces)
            kinds: list[tuple[Kind, int, int]] = [("changed", chunk.index, 1)]
            results.append(_Done(chunk.index, 1, chunk.digest, sent=sent, zero=length - sent, kinds=kinds))
        return results

    def _laid(self, chunk: Data) -> tuple[list[Piece], list[bytes]]:
        """The pieces of a whole chunk, and the digests of its grains, which have been checked."""
        length = self._base.span(chunk.index)[1]
        pieces, grains = chunk.pieces(), [ZERO] * grain_count(length)
        for start, size, data in pieces:
            if start % GRAIN or (size % GRAIN and start + size != length):
                raise self._corrupt(chunk.index, "arrived in pieces that are not whole grains")
            if data:
                found = self._digester.grains(data)
                grains[start // GRAIN : start // GRAIN + len(found)] = found
        self._check(chunk, grains)
        return pieces, grains

    def _patch(self, chunk: Data) -> _Done:
        """Patch a chunk: write the leaves that changed over the destination's content."""
        offset, length = self._base.span(chunk.index)
        pieces, grains = chunk.pieces(), self._asked.pop(chunk.index, None)
        if grains is None:  # the reader did not wait for the answer
            grains = self._stored(chunk.index) or self._read_grains(chunk.index)
        written = _by_grain(pieces)
        for number, parts in written.items():
            start, size = number * GRAIN, min(GRAIN, length - number * GRAIN)
            if len(parts) == 1 and len(parts[0][1]) == size:  # nothing of it stays
                grains[number] = self._digester.leaf(parts[0][1])
                continue
            content = bytearray(self._destination.read(offset + start, size))
            for at, data in parts:
                content[at : at + len(data)] = data
            grains[number] = self._digester.leaf(content)
        self._check(chunk, grains)
        if pieces:
            self._destination.intend(offset, length)
        self._put((offset + start, size, data) for start, size, data in pieces)
        sent = self._finish(chunk, grains, pieces)
        zero = sum(size for _, size, data in pieces if not data)
        kinds: list[tuple[Kind, int, int]] = [("changed", chunk.index, 1)]
        skipped = length - sent - zero
        return _Done(
            chunk.index, 1, chunk.digest, sent, zero=zero, skipped=skipped, kinds=kinds, grains=tuple(written)
        )

    def _put(self, pieces: Iterable[tuple[int, int, memoryview | bytes]]) -> None:
        """Write pieces, whose places are those on the disk."""
        for start, size, data in pieces:
            if data:
                self._destination.write(start, data)
            else:
                self._destination.zero(start, size)

    def _finish(self, chunk: Data, grains: list[bytes], pieces: list[Piece]) -> int:
        """Store the digests of a chunk's grains and release its pieces; return how many bytes were written."""
        if self._grain_store is not None:
            self._grain_store.put(chunk.index, grains)
        sent = sum(len(data) for _, _, data in pieces)
        chunk.done()
        return sent

    def _check(self, chunk: Data, grains: list[bytes]) -> None:
        """Verify a chunk while its data is still in memory."""
        if self._digester.of(grains) != chunk.digest:
            raise self._corrupt(chunk.index, "arrived with a digest other than that of what was read")

    def _corrupt(self, index: int, what: str) -> CorruptChunk:
        return corrupt(self._progress.disk, self._base.span(index)[0], what)


def _batches(
    items: Iterable[Chunk | Question], most: int
) -> Generator[Sequence[Chunk | Question], None, None]:
    """Each item by itself; but up to `most` whole chunks that are neighbours together."""
    batch = list[Data]()
    for item in items:
        joins = most > 1 and isinstance(item, Data) and item.whole
        if batch and not (joins and len(batch) < most and item.index == batch[-1].index + 1):
            yield batch
            batch = []
        if isinstance(item, Data) and joins:
            batch.append(item)
        else:
            yield [item]
    if batch:
        yield batch


def _adjoined(
    pieces: Iterable[tuple[int, int, memoryview]],
) -> Iterator[tuple[int, int, memoryview | bytes]]:
    """The same pieces, with data that adjoins in one."""
    begin, parts = 0, list[memoryview]()
    for start, size, data in pieces:
        if parts and not (data and start == begin + sum(map(len, parts))):
            yield _together(begin, parts)
            parts = []
        if not data:
            yield start, size, data
            continue
        begin = begin if parts else start
        parts.append(data)
    if parts:
        yield _together(begin, parts)


def _together(begin: int, parts: list[memoryview]) -> tuple[int, int, memoryview | bytes]:
    """Parts that adjoin as one piece."""
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    return begin, len(data), data


def _by_grain(pieces: list[Piece]) -> dict[int, list[tuple[int, memoryview | bytes]]]:
    """The patches by number of the grain: start within it, bytes."""
    laid: dict[int, list[tuple[int, memoryview | bytes]]] = {}
    for start, size, data in pieces:
        at = start
        while at < start + size:
            number, within = divmod(at, GRAIN)
            length = min(GRAIN - within, start + size - at)
            part = data[at - start : at - start + length] if data else bytes(length)
            laid.setdefault(number, []).append((within, part))
            at += length
    return laid


def _grouped(chunks: Iterable[tuple[Kind, int]]) -> Iterator[tuple[Kind, int, int]]:
    """Neighbouring chunks of one kind, together: kind, first chunk, count."""
    for kind, group in groupby(chunks, key=lambda chunk: chunk[0]):
        indexes = [index for _, index in group]
        yield kind, indexes[0], len(indexes)


def _gaps(pieces: list[Piece], length: int) -> list[tuple[int, int]]:
    """The ranges that no piece covers: start, length."""
    ends = [0, *(start + size for start, size, _ in pieces)]
    starts = [*(start for start, _, _ in pieces), length]
    return [(end, start - end) for end, start in zip(ends, starts, strict=True) if start > end]
