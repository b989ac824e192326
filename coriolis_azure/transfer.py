"""One disk: what the agent on the worker says of it, applied to a destination in pool threads, in disk order.

The agent runs beside a disk that strangers have written. Nothing it says is believed: every message must be
the one that is due, every length and offset lies within the disk, every chunk has the digest that was
announced, and the digest over all of them is compared at the end. A run that fails at any point is not
committed.

Where the connection breaks, or the worker reboots, the copy goes on with a new agent at the first chunk that is
not settled: nothing that had arrived is sent again, and nothing that was under way is taken for arrived.

Memory is bounded by the chunks in flight, whatever the size of the disk; only the digests, 16 bytes a chunk,
grow with it.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from . import agent
from .agent import DIGEST, HEAD, MAX_CHUNK, MAX_JSON, PIECE, RAW, RUN, UNKNOWN, ZERO, ZLIB
from .clock import Clock
from .destinations import Destination
from .errors import AgentFailed, ConnectionLost, CorruptChunk, InvalidInput, StreamEnded
from .events import Copied, Notice, Report, Step
from .hashing import Manifest
from .pipeline import Lock, ordered

LEAVES_SIZES = (0, 4096, 16384, 65536)
DEVICE_SECONDS = 60.0  # a disk that is attached while the worker runs takes seconds to appear
_THREADS = 4
# Where each write waits for another host, a link with a delay is filled by writes under way, not by threads at work.
_FAR_THREADS, _FAR_BYTES = 16, 16 << 20
_REPORTS_PER_SECOND = 5
_BURST_SECONDS = 0.25
# So many connections in a row may break without a chunk settled in between.
_FRUITLESS = 3


class Stream(Protocol):
    """A running agent: bytes in, bytes out. One thread reads, others write in turn, any may close it.

    Where the agent is gone or says nothing for too long both raise: ConnectionLost where another agent could
    go on, StreamEnded or AgentFailed where it could not.
    """

    def read(self, size: int, /) -> bytes:
        """Exactly `size` bytes."""

    def write(self, data: bytes, /) -> None:
        """All of `data`."""

    def close(self) -> None:
        """End the agent; reads and writes under way end with StreamEnded."""


@dataclass(frozen=True)
class Job:
    """What is to be copied. `devices`: paths on the worker, the first that exists is the disk.

    `leaf`: where a known chunk has changed, only pieces of this many bytes are sent; 0 for whole chunks.
    """

    disk: str
    devices: tuple[str, ...]
    size: int
    compress: bool = False
    leaf: int = 65536
    wait: float = DEVICE_SECONDS


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
    rate: int | None = None,
) -> Outcome:
    """Bring `destination`, which holds `base`, up to the disk that an agent reads; commit that.

    `start` gives a new agent; it is called again where the connection to the one before was lost. `rate`:
    bytes a second that may come from it. AgentFailed, StreamEnded, CorruptChunk or DestinationFailed, naming
    the offset, or what `start` raises, and then nothing is committed.
    """
    if job.size != base.size:
        raise ValueError(f"the job is of {job.size} bytes, the manifest of {base.size}")
    if job.leaf not in LEAVES_SIZES:
        raise InvalidInput(f"a leaf of {job.leaf} bytes is none of {LEAVES_SIZES}")
    if not destination.readable or destination.far or job.leaf >= base.chunk:
        job = replace(job, leaf=0)
    return _Copy(start, job, base, destination, report, clock, rate).run(verify)


def differing(destination: Destination, manifest: Manifest, indexes: Iterable[int]) -> Iterator[int]:
    """The chunks of `indexes` whose content is not what `manifest` says, in order. UNKNOWN always differs."""
    digest = manifest.digester()

    def differs(index: int) -> tuple[int, bool]:
        return index, digest(destination.read(*manifest.span(index))) != manifest.digest(index)

    threads = _threads(destination, manifest.chunk)
    ahead = max(threads, agent.window(manifest.chunk))
    with closing(ordered(differs, indexes, threads=threads, ahead=ahead)) as results:
        yield from (index for index, wrong in results if wrong)


@dataclass(frozen=True)
class _Frame:
    kind: int
    index: int
    count: int
    digest: bytes
    packing: int = RAW
    payload: bytes = b""


@dataclass(frozen=True)
class _Done:
    """What applying a frame has settled: `count` chunks from `index` on."""

    index: int = 0
    count: int = 0
    digest: bytes | None = None  # None: as in the base
    sent: int = 0
    zero: int = 0
    skipped: int = 0


class _Digests:
    """Digests of which some change. Only the pages that do are copied: those of a large disk take 64 MiB."""

    _PAGE = agent.BASE_PIECE

    def __init__(self, digests: bytes) -> None:
        view = memoryview(digests)
        self._pages: list[memoryview | bytearray] = [
            view[at : at + self._PAGE] for at in range(0, len(view), self._PAGE)
        ]

    def put(self, index: int, digests: bytes) -> None:
        """Replace those from chunk `index` on."""
        at, rest = DIGEST * index, memoryview(digests)
        while rest:
            number, start = divmod(at, self._PAGE)
            page = self._pages[number]
            if isinstance(page, memoryview):
                page = self._pages[number] = bytearray(page)
            part = rest[: self._PAGE - start]
            page[start : start + len(part)] = part
            at, rest = at + len(part), rest[len(part) :]

    def whole(self) -> bytes:
        """All of them."""
        return b"".join(self._pages)


_Piece = tuple[int, int, memoryview]  # start within the chunk, length, bytes: none where they are zeros


class _Copy:
    """The state that the steps of one copy share. Only `_apply` and what it calls run in several threads.

    `_base` is what the destination was known to hold when the agent of now began; `_holds` is what it holds
    now. `_settled` and `_written` have a byte for each chunk: whether its content is there, and whether it was
    this copy that put it there; `_earlier` is `_settled` as it was when the agent of now began.
    """

    def __init__(
        self,
        start: Callable[[], Stream],
        job: Job,
        base: Manifest,
        destination: Destination,
        report: Report,
        clock: Clock,
        rate: int | None,
    ) -> None:
        self._start, self._job, self._base = start, job, base
        self._destination, self._report, self._clock = destination, report, clock
        self._digest = base.digester()
        self._pace = _Pace(rate, clock) if rate else None
        self._window = agent.window(base.chunk)
        smallest = min(agent.GRAIN, job.leaf or agent.GRAIN)
        self._most = base.chunk + PIECE.size * (base.chunk // smallest + 1)  # bytes of a chunk in pieces
        self._replying = Lock()
        self._failure: Exception | None = None
        self._end: dict[str, Any] = {}
        self._holds, self._written = _Digests(base.digests), bytearray(base.count)
        self._settled, self._earlier = bytearray(base.count), bytes(base.count)
        self._first = 0
        self._sent = self._zero = self._skipped = 0
        self._progress = Progress(job.disk, base.size, report, clock)
        self._lost: ConnectionLost | None = None

    def run(self, verify: bool) -> Outcome:
        """The copy, from the job to the commit."""
        base = self._base
        try:
            self._settle_all()
        except (StreamEnded, AgentFailed):
            # A thread that fails closes the stream, to wake the reader. Then its error is the reason.
            if self._failure is not None:
                raise self._failure from None
            raise
        self._progress.last(self._sent)
        manifest = self._known(fresh=False)
        if self._end["root"] != manifest.root():
            disk = self._job.disk
            raise CorruptChunk(f"{disk}: the digest of the whole disk is not the agent's", disk=disk)
        self._destination.flush()
        verified = self._verified(manifest) if verify else None
        self._destination.commit(manifest)
        return Outcome(manifest, base.size, self._sent, self._zero, self._skipped, verified, base.fresh)

    def _settle_all(self) -> None:
        """Let agents work until one has come to the end of the disk."""
        fruitless = 0
        while True:
            before = self._settled.count(1)
            self._take_up()
            if self._lost is None:
                return
            fruitless = 0 if self._settled.count(1) > before else fruitless + 1
            if fruitless == _FRUITLESS:
                raise self._lost
            done = self._sent + self._zero + self._skipped
            told = f"{self._job.disk}: {self._lost}; going on after {done} of {self._base.size} bytes"
            self._report(Notice(told))

    def _take_up(self) -> None:
        """Settle what a new agent says, from the first chunk that is not; `_lost` says whether it broke off.

        All that had arrived is settled then: frames are applied whole or not at all, and what an agent has
        only asked about is as the destination had it.
        """
        if self._lost is not None:
            self._base, self._earlier = self._known(self._base.fresh), bytes(self._settled)
            self._lost = None
        self._first = self._settled.find(0) if 0 in self._settled else self._base.count
        try:
            self._stream = self._start()
        except ConnectionLost as error:
            self._lost = error
            return
        threads = _threads(self._destination, self._base.chunk)
        ahead = max(threads + 2, self._window)
        abort = self._stream.close
        with closing(self._stream):
            self._progress.show(self._sent + self._zero + self._skipped, self._sent)
            work = ordered(self._apply, self._frames(), threads=threads, ahead=ahead, abort=abort)
            with closing(work) as results:
                for done in results:
                    self._note(done)

    def _note(self, done: _Done) -> None:
        """Keep what has been settled."""
        last = done.index + done.count
        self._settled[done.index : last] = b"\1" * done.count
        if done.digest is not None:
            self._holds.put(done.index, done.digest * done.count)
            self._written[done.index : last] = b"\1" * done.count
        self._sent, self._zero = self._sent + done.sent, self._zero + done.zero
        self._skipped += done.skipped
        self._progress.show(self._sent + self._zero + self._skipped, self._sent)

    def _known(self, fresh: bool) -> Manifest:
        """What the destination holds by now."""
        return replace(self._base, digests=self._holds.whole(), fresh=fresh)

    def _verified(self, manifest: Manifest) -> bool | None:
        """Read back the chunks that were written, or have the destination confirm them."""
        self._report(Step("verify", self._job.disk))
        if not self._destination.readable:
            return self._destination.check()
        indexes = (index for index, changed in enumerate(self._written) if changed)
        for index in differing(self._destination, manifest, indexes):
            raise self._corrupt(index, "reads back from the destination as something else")
        return True

    # The agent's side of the talk

    def _begin(self) -> None:
        """Tell the agent what to do and wait until it has the disk open."""
        try:
            self._send_job()
        except StreamEnded:
            # It ended before it had heard everything; what it said last is the reason.
            self._head()
            raise
        frame = self._head()
        if frame.kind != agent.READY:
            raise self._foreign(f"message {frame.kind} where READY is due")
        ready = _document(frame.payload)
        if ready.get("size") != self._job.size or ready.get("hash") != self._base.hash:
            raise self._foreign("READY for another job")

    def _send_job(self) -> None:
        base, job = self._base, self._job
        document = {
            "device_candidates": job.devices,
            "size": job.size,
            "chunk": base.chunk,
            "first": self._first,
            "leaf": job.leaf,
            "hash": base.hash,
            "key": base.key.hex(),
            "compress": "zlib" if job.compress else "none",
            "wait": job.wait,
            "agent": agent.fingerprint(),
        }
        self._send(agent.JOB, 0, json.dumps(document).encode())
        for start in range(0, len(base.digests), agent.BASE_PIECE):
            self._send(agent.BASE, start // DIGEST, base.digests[start : start + agent.BASE_PIECE])

    def _send(self, kind: int, index: int, payload: bytes) -> None:
        self._stream.write(HEAD.pack(kind, RAW, index, 0, len(payload), ZERO) + payload)

    def _frames(self) -> Iterator[_Frame]:
        """What the agent says between READY and END, as far as the connection holds."""
        try:
            self._begin()
            yield from self._due_frames()
        except ConnectionLost as error:
            if self._failure is not None:
                raise
            self._lost = error

    def _due_frames(self) -> Iterator[_Frame]:
        """What the agent says up to END, each frame the one that may come then."""
        due = self._first
        asked: deque[int] = deque()
        while True:
            frame = self._head()
            if frame.kind == agent.END:
                break
            if frame.kind == agent.PATCH:
                if not asked or asked.popleft() != frame.index:
                    raise self._foreign(f"PATCH of chunk {frame.index}, which is not due")
            elif frame.kind in (agent.SAME, agent.ZEROS, agent.DATA, agent.ASK):
                chunks = frame.count if frame.kind in (agent.SAME, agent.ZEROS) else 1
                if frame.index != due or not 1 <= chunks <= min(RUN, self._base.count - due):
                    raise self._foreign(f"{chunks} chunk(s) from {frame.index} on where chunk {due} is due")
                due += chunks
                if frame.kind == agent.ASK:
                    asked.append(frame.index)
                    if not self._job.leaf or len(asked) > self._window:
                        raise self._foreign(f"ASK for chunk {frame.index}, which is one too many")
            else:
                raise self._foreign(f"message {frame.kind} in the middle of a scan")
            yield frame
        if due != self._base.count or asked:
            raise self._foreign(f"END after {due} of {self._base.count} chunks, {len(asked)} still asked for")
        self._end = _document(frame.payload)
        if not isinstance(self._end.get("root"), str):
            raise self._foreign("END of another disk")

    def _head(self) -> _Frame:
        """The next message with its payload. AgentFailed with the agent's own words where it gave up."""
        kind, packing, index, count, length, digest = HEAD.unpack(self._read(HEAD.size))
        if length > self._limit(kind):
            raise self._foreign(f"message {kind} of {length} bytes")
        frame = _Frame(kind, index, count, digest, packing, self._read(length))
        if kind == agent.ERROR:
            raise self._given_up(_document(frame.payload))
        return frame

    def _limit(self, kind: int) -> int:
        """The longest payload of such a message."""
        if kind in (agent.DATA, agent.PATCH):
            return self._most
        return MAX_JSON if kind in (agent.READY, agent.END, agent.ERROR) else 0

    def _read(self, size: int) -> bytes:
        if self._pace is None:
            return self._stream.read(size) if size else b""
        parts = []
        while size:
            parts.append(self._stream.read(min(size, self._pace.slice)))
            self._pace.spent(len(parts[-1]))
            size -= len(parts[-1])
        return b"".join(parts)

    def _given_up(self, said: dict[str, Any]) -> AgentFailed:
        message, offset = said.get("message"), said.get("offset")
        words = "".join(letter for letter in str(message)[:500] if letter.isprintable())
        return AgentFailed(
            f"{self._job.disk}: the agent on the worker gave up: {words}",
            disk=self._job.disk,
            offset=offset if isinstance(offset, int) else None,
        )

    def _foreign(self, what: str) -> StreamEnded:
        return StreamEnded(
            f"{self._job.disk}: the worker's stream is not as agreed: {what}", disk=self._job.disk
        )

    def _corrupt(self, index: int, what: str) -> CorruptChunk:
        offset = self._base.span(index)[0]
        text = f"{self._job.disk}: the chunk at offset {offset} {what}"
        return CorruptChunk(text, disk=self._job.disk, offset=offset)

    # In pool threads

    def _apply(self, frame: _Frame) -> _Done:
        """Do at the destination what the frame says."""
        try:
            if frame.kind == agent.SAME:
                return self._same(frame)
            if frame.kind == agent.ZEROS:
                return self._zeros(frame)
            if frame.kind == agent.ASK:
                return self._answer(frame)
            return self._data(frame) if frame.kind == agent.DATA else self._patch(frame)
        except Exception as error:
            # The reader may be waiting for an agent that waits for this thread: wake it.
            if self._failure is None:
                self._failure = error
            self._stream.close()
            raise

    def _same(self, frame: _Frame) -> _Done:
        """Chunks that are as they were; where nothing had been there, they are zeros that were found."""
        base = self._base
        zero = skipped = 0
        for index in range(frame.index, frame.index + frame.count):
            digest, length = base.digest(index), base.span(index)[1]
            if digest == UNKNOWN:
                raise self._corrupt(index, "is said to be unchanged, but nothing is known of it")
            if self._earlier[index]:  # counted when it was settled
                continue
            if base.fresh and digest == ZERO:
                zero += length
            else:
                skipped += length
        return _Done(frame.index, frame.count, None, zero=zero, skipped=skipped)

    def _zeros(self, frame: _Frame) -> _Done:
        offset, length = self._base.span(frame.index)[0], self._run_length(frame)
        self._destination.expect(offset, length)
        self._destination.zero(offset, length)
        return _Done(frame.index, frame.count, ZERO, zero=length)

    def _answer(self, frame: _Frame) -> _Done:
        """Tell the agent the leaves of a chunk.

        This thread writes the answer itself: were it the reader's task, the agent might wait for the answer
        while the reader waits for the agent. The answers carry their chunk, so they may go out in any order,
        and the agent takes what comes at any time, so this write waits for nothing but the line.
        """
        leaf = self._job.leaf
        content = self._destination.read(*self._base.span(frame.index))
        leaves = [self._digest(content[start : start + leaf]) for start in range(0, len(content), leaf)]
        try:
            with self._replying:
                self._send(agent.LEAVES, frame.index, b"".join(leaves))
        except StreamEnded:
            pass  # the agent is gone; the reader is told so too, and hears its last words
        return _Done()

    def _data(self, frame: _Frame) -> _Done:
        """A chunk as a whole: pieces, and zeros between them."""
        offset, length = self._base.span(frame.index)
        pieces = self._pieces(frame, length)
        whole = memoryview(pieces[0][2]) if len(pieces) == 1 and pieces[0][1] == length else None
        gaps = [] if whole is not None else _gaps(pieces, length)
        self._check(frame, whole if whole is not None else _laid(bytearray(length), pieces))
        self._destination.expect(offset, length)
        self._put(offset, pieces)
        if self._base.digest(frame.index) != ZERO:
            for start, size in gaps:
                self._destination.zero(offset + start, size)
        sent = sum(len(data) for _, _, data in pieces)
        return _Done(frame.index, 1, frame.digest, sent=sent, zero=length - sent)

    def _patch(self, frame: _Frame) -> _Done:
        """The leaves of a chunk that changed, laid over what the destination holds."""
        offset, length = self._base.span(frame.index)
        pieces = self._pieces(frame, length)
        self._check(frame, _laid(bytearray(self._destination.read(offset, length)), pieces))
        self._destination.expect(offset, length)
        self._put(offset, pieces)
        sent = sum(len(data) for _, _, data in pieces)
        zero = sum(size for _, size, data in pieces if not data)
        return _Done(frame.index, 1, frame.digest, sent=sent, zero=zero, skipped=length - sent - zero)

    def _put(self, offset: int, pieces: list[_Piece]) -> None:
        for start, size, data in pieces:
            if data:
                self._destination.write(offset + start, data)
            else:
                self._destination.zero(offset + start, size)

    def _check(self, frame: _Frame, content: bytearray | memoryview) -> None:
        """Verify where the data is still in hand."""
        if self._digest(content) != frame.digest:
            raise self._corrupt(frame.index, "did not arrive as the agent has read it")

    def _pieces(self, frame: _Frame, length: int) -> list[_Piece]:
        """The pieces in a payload: within the chunk, in order, every byte of the payload in one of them."""
        body = self._unpacked(frame)
        at = PIECE.size * frame.count
        if at > len(body):
            raise self._corrupt(frame.index, "arrived with fewer pieces than announced")
        pieces: list[_Piece] = []
        last = 0
        for start, size, zero in PIECE.iter_unpack(body[:at]):
            stop = at if zero else at + size
            if start < last or not 0 < size <= length - start or stop > len(body):
                raise self._corrupt(frame.index, "arrived in pieces that do not fit")
            pieces.append((start, size, body[at:stop]))
            at, last = stop, start + size
        if at != len(body):
            raise self._corrupt(frame.index, "arrived with bytes that belong to no piece")
        return pieces

    def _unpacked(self, frame: _Frame) -> memoryview:
        if frame.packing == RAW:
            return memoryview(frame.payload)
        inflate = zlib.decompressobj()
        try:
            body = inflate.decompress(frame.payload, self._most) if frame.packing == ZLIB else b""
        except zlib.error as error:
            raise self._corrupt(frame.index, "arrived damaged") from error
        if not inflate.eof or inflate.unused_data:
            raise self._corrupt(frame.index, "arrived damaged")
        return memoryview(body)

    def _run_length(self, frame: _Frame) -> int:
        """The bytes of a run of chunks."""
        return (
            min((frame.index + frame.count) * self._base.chunk, self._base.size)
            - frame.index * self._base.chunk
        )


def _threads(destination: Destination, chunk: int) -> int:
    """How many threads work at a destination."""
    return max(_THREADS, min(_FAR_THREADS, _FAR_BYTES // chunk)) if destination.far else _THREADS


def _laid(content: bytearray, pieces: list[_Piece]) -> bytearray:
    """`content` with the pieces in place."""
    for start, size, data in pieces:
        content[start : start + size] = data if data else bytes(size)
    return content


def _gaps(pieces: list[_Piece], length: int) -> list[tuple[int, int]]:
    """What no piece covers: start, length."""
    ends = [0, *(start + size for start, size, _ in pieces)]
    starts = [*(start for start, _, _ in pieces), length]
    return [(end, start - end) for end, start in zip(ends, starts, strict=True) if start > end]


def _document(payload: bytes) -> dict[str, Any]:
    """The JSON object in a payload."""
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise StreamEnded("the worker's stream holds damaged JSON") from error
    if not isinstance(document, dict):
        raise StreamEnded("the worker's stream holds JSON of another shape")
    return document


class _Pace:
    """Keeps to a rate of bytes a second, counting from what was not used in the last quarter of a second.

    Who reads waits here, so the line fills up and the agent waits too.
    """

    def __init__(self, rate: int, clock: Clock) -> None:
        self._rate, self._clock = rate, clock
        self._paid = clock.monotonic()
        self.slice = max(1, min(MAX_CHUNK, int(rate * _BURST_SECONDS)))

    def spent(self, size: int) -> None:
        """Wait until `size` more bytes are within the rate."""
        now = self._clock.monotonic()
        self._paid = max(self._paid, now - _BURST_SECONDS) + size / self._rate
        if self._paid > now:
            self._clock.sleep(self._paid - now)


class Progress:
    """Tells how far a disk is, a few times a second at most."""

    def __init__(self, disk: str, total: int, report: Report, clock: Clock) -> None:
        self._disk, self._total, self._report, self._clock = disk, total, report, clock
        self._next = clock.monotonic()

    def show(self, done: int, sent: int) -> None:
        """`done` bytes are settled, `sent` of them sent."""
        now = self._clock.monotonic()
        if now >= self._next and done < self._total:
            self._next = now + 1 / _REPORTS_PER_SECOND
            self._report(Copied(self._disk, done, self._total, sent))

    def last(self, sent: int) -> None:
        """All bytes are settled."""
        self._report(Copied(self._disk, self._total, self._total, sent))
