"""One disk: what the agent on the worker says of it, applied to a destination in pool threads, in disk order.

Nothing is believed: every chunk has the digest that was announced, before it is written, and the digest over all
of them is compared at the end. A run that fails at any point is not committed. A connection that breaks is taken
up where it was.

Memory is bounded by the bytes in flight, whatever the size of the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain

from .agent import wire
from .agent.wire import DIGEST, GRAIN, UNKNOWN, ZERO
from .clock import Clock
from .errors import AgentFailed, ConnectionLost, CorruptChunk, InvalidInput, StreamEnded
from .events import Notice, Progress, Report, Step
from .readers.channel import Direct
from .readers.conversation import Answer, Dialogue, Frame, Job, Piece, Stream
from .readers.rate_limiter import RateLimiter
from .replica.comparison import THREADS, differing, in_hand
from .replica.destinations import Destination
from .replica.manifest import Manifest, grain_count
from .threads import ordered

LEAVES_SIZES = (0, 4096, 16384, 65536)
COMPRESSION = ("none", "auto", "always")
_FRUITLESS = 3  # connections in a row that were lost before anything was settled


@dataclass(frozen=True)
class Outcome:
    """What became of a disk. Every byte read is sent, found zero, or skipped because it had not changed.

    `sent_bytes`: disk bytes given to the destination, before compression. `verified`: True when what was
    written was read back and found right, None when it was not read back. `full`: nothing was known before.
    """

    manifest: Manifest
    read_bytes: int
    sent_bytes: int
    zero_bytes: int
    skipped_bytes: int
    verified: bool | None
    full: bool


def copy(
    start: Callable[[], Stream],
    job: Job,
    base: Manifest,
    destination: Destination,
    report: Report,
    *,
    clock: Clock,
    verify: bool,
    limiter: RateLimiter | None = None,
    direct: Direct | None = None,
    concurrent: int = 1,
) -> Outcome:
    """Bring `destination`, which holds `base`, up to the disk that an agent reads; commit that.

    `start` gives a new agent; it is called again where the connection to the one before was lost. `limiter`: how
    fast its data may come. `direct`: the way past `start`'s stream, if there may be one. `concurrent`: disks that are
    copied at a time, which share threads and memory. AgentFailed, StreamEnded, CorruptChunk or DestinationFailed,
    naming the offset, or what `start` raises, and then nothing is committed.
    """
    if job.size != base.size:
        raise ValueError(f"the job is of {job.size} bytes, the manifest of {base.size}")
    if job.leaf not in LEAVES_SIZES:
        raise InvalidInput(f"a leaf of {job.leaf} bytes is none of {LEAVES_SIZES}")
    if job.compress not in COMPRESSION:
        raise InvalidInput(f"compression {job.compress!r} is none of {', '.join(COMPRESSION)}")
    # Leaves are of use where something is known, can be compared with, and is larger than they are.
    if not destination.readable or destination.far or base.fresh or job.leaf >= base.chunk:
        job = replace(job, leaf=0)

    def talk(known: Manifest, first: int, choose: bool) -> Dialogue:
        return Dialogue(
            start(), job, known, first, choose, report=report, clock=clock, limiter=limiter, direct=direct
        )

    return _Copy(talk, job, base, destination, report, clock, concurrent).run(verify)


def at_once(chunk: int) -> int:
    """How many disks are copied at a time: two fill a small worker's line, and chunks in hand take memory."""
    return 2 if chunk <= 1 << 20 else 1


@dataclass(frozen=True)
class _Done:
    """What applying a frame has settled: `count` chunks from `index` on; or that they are `asked` for."""

    index: int
    count: int
    digest: bytes | None = None  # None: as in the base
    sent: int = 0
    zero: int = 0
    skipped: int = 0
    asked: bool = False


class _Copy:
    """The state that the steps of one copy share. Only `_apply` and what it calls run in several threads.

    `_base` is what the destination holds; its digests change as chunks are settled. Settled, which means that its
    content is there, is each chunk before `_next` that is not one of `_asked`; `_earlier` are both as they were when
    the agent of now began. `_before` are the digests that the destination came with. `_held` are those of the
    grains that it has of the chunks that were asked for.
    """

    def __init__(
        self,
        talk: Callable[[Manifest, int, bool], Dialogue],
        job: Job,
        base: Manifest,
        destination: Destination,
        report: Report,
        clock: Clock,
        concurrent: int,
    ) -> None:
        self._talk, self._job, self._concurrent = talk, job, concurrent
        self._before, self._base = base.digests, replace(base, digests=base.digests.copy())
        self._destination, self._kept, self._report = destination, destination.grains, report
        self._digester = base.digester()
        self._failure: Exception | None = None
        self._root = ""
        self._next, self._asked = 0, set[int]()
        self._earlier = self._next, frozenset(self._asked)
        self._held: dict[int, list[bytes]] = {}
        self._first = 0
        self._sent = self._zero = self._skipped = 0
        self._progress = Progress(job.disk, base.size, report, clock)
        self._lost: ConnectionLost | None = None

    def run(self, verify: bool) -> Outcome:
        """The copy, from the job to the commit."""
        try:
            self._settle_all()
        except (StreamEnded, AgentFailed):
            # A thread that fails closes the stream, to wake the reader. Then its error is the reason.
            if self._failure is not None:
                raise self._failure from None
            raise
        self._progress.last(self._sent)
        manifest = replace(self._base, fresh=False)
        if self._root != manifest.root(self._first):
            disk = self._job.disk
            raise CorruptChunk(f"{disk}: the digest of the whole disk is not the agent's", disk=disk)
        self._destination.flush()
        verified = self._verified(manifest) if verify else None
        self._destination.commit(manifest)
        full = self._base.fresh
        return Outcome(manifest, manifest.size, self._sent, self._zero, self._skipped, verified, full)

    def _settle_all(self) -> None:
        """Let agents work until one has come to the end of the disk."""
        fruitless = 0
        while True:
            before = self._settled
            self._take_up()
            if self._lost is None:
                return
            fruitless = 0 if self._settled > before else fruitless + 1
            if fruitless == _FRUITLESS:
                raise self._lost
            told = f"{self._job.disk}: {self._lost}; going on after {self._done} of {self._base.size} bytes"
            self._report(Notice(told))

    def _take_up(self) -> None:
        """Settle what a new agent says, from the first chunk that is not; `_lost` says whether it broke off.

        All that had arrived is settled then: frames are applied whole or not at all, and what an agent has
        only asked about is as the destination had it.
        """
        if self._lost is not None:
            self._earlier, self._lost = (self._next, frozenset(self._asked)), None
        self._first = min(self._asked, default=self._next)
        self._held = {}
        # One core is the stream's reader's. A thread more than there are cores for is only in the way.
        most = max(1, min(THREADS, len(os.sched_getaffinity(0)) - 1))
        threads, ahead = in_hand(self._destination, self._base.chunk, self._concurrent, most)
        try:
            choose = self._base.fresh and not self._settled
            with self._talk(self._base, self._first, choose) as dialogue:
                self._progress.show(self._done, self._sent)
                self._begin(dialogue)

                def apply(frame: Frame) -> _Done:
                    return self._apply(dialogue, frame)

                with closing(self._frames(dialogue)) as frames:
                    work = ordered(apply, frames, threads=threads, ahead=ahead, abort=dialogue.close)
                    with closing(work) as results:
                        for done in results:
                            self._note(done)
                            self._progress.show(self._done, self._sent, dialogue.bottleneck())
        except ConnectionLost as error:
            if self._failure is not None:
                raise
            self._lost = error

    def _begin(self, dialogue: Dialogue) -> None:
        """Agree with the agent on a hash; one that is not the base's makes all that is known worthless."""
        hash = self._base.hash
        self._base = dialogue.begin()
        if self._base.hash != hash:
            self._digester = self._base.digester()
            if not self._base.fresh:
                self._report(
                    Notice(
                        f"{self._job.disk}: this worker cannot compute {hash}, so everything is compared anew, "
                        f"with {self._base.hash}"
                    )
                )

    def _frames(self, dialogue: Dialogue) -> Generator[Frame, None, None]:
        """What the agent says between READY and END, as far as the connection holds."""
        try:
            yield from dialogue.frames()
        except ConnectionLost as error:
            if self._failure is not None:
                raise
            self._lost = error
        else:
            self._root = dialogue.root

    def _note(self, done: _Done) -> None:
        """Keep what has been settled."""
        last = done.index + done.count
        change = self._asked.update if done.asked else self._asked.difference_update
        change(range(done.index, last))
        self._next = max(self._next, last)
        if done.digest is not None:
            self._base.digests.put(done.index, done.digest * done.count)
        self._sent, self._zero = self._sent + done.sent, self._zero + done.zero
        self._skipped += done.skipped

    @property
    def _done(self) -> int:
        """How many bytes are settled."""
        return self._sent + self._zero + self._skipped

    @property
    def _settled(self) -> int:
        """How many chunks are settled."""
        return self._next - len(self._asked)

    def _verified(self, manifest: Manifest) -> bool | None:
        """Read back the chunks whose digest is another than before, or have the destination confirm them."""
        if not self._destination.readable:
            if not self._destination.checkable:
                return None
            self._report(Step("verify", self._job.disk))
            return self._destination.check()
        changed = self._before.differing(manifest.digests)
        first = next(changed, None)
        if first is None:
            return True
        self._report(Step("verify", self._job.disk))
        for index in differing(self._destination, manifest, chain([first], changed), self._concurrent):
            offset, disk = manifest.span(index)[0], self._job.disk
            text = f"{disk}: the chunk at offset {offset} reads back from the destination as something else"
            raise CorruptChunk(text, disk=disk, offset=offset)
        return True

    # In pool threads

    def _apply(self, dialogue: Dialogue, frame: Frame) -> _Done:
        """Do at the destination what the frame says."""
        try:
            if frame.kind == wire.SAME:
                return self._same(dialogue, frame)
            if frame.kind == wire.ZEROS:
                return self._zeros(frame)
            if frame.kind == wire.ASK:
                return self._answer(dialogue, frame)
            return self._data(dialogue, frame) if frame.kind == wire.DATA else self._patch(dialogue, frame)
        except Exception as error:
            # The reader may be waiting for an agent that waits for this thread: wake it.
            if self._failure is None:
                self._failure = error
            dialogue.close()
            raise
        finally:
            dialogue.release(frame)

    def _same(self, dialogue: Dialogue, frame: Frame) -> _Done:
        """Chunks that are as they were; where nothing had been there, they are zeros that were found."""
        base = self._base
        zero = skipped = 0
        earlier, asked = self._earlier
        for index in range(frame.index, frame.index + frame.count):
            digest, length = base.digest(index), base.span(index)[1]
            if digest == UNKNOWN:
                raise dialogue.corrupt(index, "is said to be unchanged, but nothing is known of it")
            if index < earlier and index not in asked:  # counted when it was settled
                continue
            if base.fresh and digest == ZERO:
                zero += length
            else:
                skipped += length
        return _Done(frame.index, frame.count, None, zero=zero, skipped=skipped)

    def _zeros(self, frame: Frame) -> _Done:
        base, last = self._base, frame.index + frame.count - 1
        offset = base.span(frame.index)[0]
        length = sum(base.span(last)) - offset
        self._destination.intend(offset, length)
        self._destination.zero(offset, length)
        return _Done(frame.index, frame.count, ZERO, zero=length)

    def _answer(self, dialogue: Dialogue, frame: Frame) -> _Done:
        """Compare the grains of chunks with the destination's; of those that differ, tell the leaves there are."""
        answers, last = list[Answer](), frame.index + frame.count
        counts = [grain_count(self._base.span(index)[1]) for index in range(frame.index, last)]
        if len(frame.payload) != DIGEST * sum(counts):
            raise dialogue.foreign(
                f"ASK for {frame.count} chunk(s) with {len(frame.payload)} bytes of digests"
            )
        theirs = (bytes(frame.payload[at : at + DIGEST]) for at in range(0, len(frame.payload), DIGEST))
        for index in range(frame.index, last):
            offset, length = self._base.span(index)
            mine = self._grains(index)
            grains = [number for number, digest in enumerate(mine) if digest != next(theirs)]
            leaves: list[bytes] = []
            if self._job.leaf < GRAIN:
                for start in (number * GRAIN for number in grains):
                    content = self._destination.read(offset + start, min(GRAIN, length - start))
                    leaves += self._digester.leaves(content, self._job.leaf)
            self._held[index] = mine
            answers.append((index, grains, b"".join(leaves)))
        dialogue.answer(answers)
        return _Done(frame.index, frame.count, asked=True)

    def _grains(self, index: int) -> list[bytes]:
        """The digests of the grains that the destination has of a chunk, read only where they are not kept."""
        digest, (offset, length) = self._base.digest(index), self._base.span(index)
        count = grain_count(length)
        if digest == ZERO:
            return [ZERO] * count
        if digest != UNKNOWN and self._kept is not None:
            grains = self._kept.get(index, count)
            if len(grains) == count and self._digester.of(grains) == digest:
                return grains
        return self._digester.grains(memoryview(self._destination.read(offset, length)))

    def _data(self, dialogue: Dialogue, frame: Frame) -> _Done:
        """A chunk as a whole: whole grains, and zeros between them."""
        offset, length = self._base.span(frame.index)
        pieces = dialogue.pieces(frame)
        grains = [ZERO] * grain_count(length)
        for start, size, data in pieces:
            if start % GRAIN or (size % GRAIN and start + size != length):
                raise dialogue.corrupt(frame.index, "arrived in pieces that do not fit")
            if data:
                found = self._digester.grains(data)
                grains[start // GRAIN : start // GRAIN + len(found)] = found
        self._check(dialogue, frame, grains)
        self._destination.intend(offset, length)
        self._put(offset, pieces)
        if self._base.digest(frame.index) != ZERO:
            for start, size in _gaps(pieces, length):
                self._destination.zero(offset + start, size)
        self._keep(frame.index, grains)
        sent = sum(len(data) for _, _, data in pieces)
        return _Done(frame.index, 1, frame.digest, sent=sent, zero=length - sent)

    def _patch(self, dialogue: Dialogue, frame: Frame) -> _Done:
        """The leaves of a chunk that changed, laid over what the destination holds."""
        offset, length = self._base.span(frame.index)
        pieces, grains = dialogue.pieces(frame), self._held.pop(frame.index, None)
        if grains is None:  # an agent that did not wait for the answer
            grains = self._grains(frame.index)
        for number, parts in _by_grain(pieces).items():
            start = number * GRAIN
            content = bytearray(self._destination.read(offset + start, min(GRAIN, length - start)))
            for at, data in parts:
                content[at : at + len(data)] = data
            grains[number] = self._digester.leaf(content)
        self._check(dialogue, frame, grains)
        if pieces:
            self._destination.intend(offset, length)
        self._put(offset, pieces)
        self._keep(frame.index, grains)
        sent = sum(len(data) for _, _, data in pieces)
        zero = sum(size for _, size, data in pieces if not data)
        return _Done(frame.index, 1, frame.digest, sent=sent, zero=zero, skipped=length - sent - zero)

    def _put(self, offset: int, pieces: list[Piece]) -> None:
        for start, size, data in pieces:
            if data:
                self._destination.write(offset + start, data)
            else:
                self._destination.zero(offset + start, size)

    def _keep(self, index: int, grains: list[bytes]) -> None:
        if self._kept is not None:
            self._kept.put(index, grains)

    def _check(self, dialogue: Dialogue, frame: Frame, grains: list[bytes]) -> None:
        """Verify where the data is still in hand."""
        if self._digester.of(grains) != frame.digest:
            raise dialogue.corrupt(frame.index, "did not arrive as the agent has read it")


def _by_grain(pieces: list[Piece]) -> dict[int, list[tuple[int, memoryview | bytes]]]:
    """What is laid over each grain: start within it, bytes."""
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


def _gaps(pieces: list[Piece], length: int) -> list[tuple[int, int]]:
    """What no piece covers: start, length."""
    ends = [0, *(start + size for start, size, _ in pieces)]
    starts = [*(start for start, _, _ in pieces), length]
    return [(end, start - end) for end, start in zip(ends, starts, strict=True) if start > end]
