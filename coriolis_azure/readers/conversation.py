"""What the agent says, message by message, each one that may come then; and what is said to it.

The agent runs beside a disk that strangers have written. Nothing it says is believed: every message must be
the one that is due, every length is within its bounds before anything is received or unpacked.
"""

from __future__ import annotations

import json
import mmap
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from ..agent import wire
from ..agent.tls import Tls
from ..agent.wire import DIGEST, HEAD, MAX_JSON, PIECE, RAW, RUNS, ZERO, ZLIB, ZSTD
from ..clock import Clock
from ..errors import AgentFailed, ConnectionLost, CorruptChunk, StreamEnded, cleaned
from ..events import Report, Waiting
from ..replica.manifest import HASHES, Manifest, grain_count
from ..threads import Lock, every
from .channel import SILENCE_SECONDS, Direct

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from .rate_limiter import RateLimiter

DEVICE_SECONDS = 60.0  # a disk that is attached while the worker runs takes seconds to appear
_LATE_SECONDS = 1.0
_QUIET_SECONDS = 10.0  # without anything happening, after which a watcher is told what is waited for
_PIECE = 64 << 10  # bytes that are taken from a stream, or unpacked, at a time
_ZSTD_WINDOW = 23  # log2 of the memory that unpacking may take: a chunk is 4 MiB at most


class Stream(Protocol):
    """A running agent: bytes in, bytes out. One thread reads, others write in turn, any may close it.

    An agent that is gone or says nothing for too long makes both raise StreamEnded or AgentFailed;
    ConnectionLost where it may be that only the connection to it has broken.
    """

    def read(self, size: int, /) -> bytes | memoryview:
        """What there is, at least one byte and `size` at most."""

    def write(self, data: bytes, /) -> None:
        """All of `data`."""

    def close(self) -> None:
        """End the agent; reads and writes under way end with StreamEnded."""


@dataclass(frozen=True)
class Job:
    """What is to be copied. `devices`: paths on the worker, the first that exists is the disk.

    `leaf`: where a known chunk has changed, only pieces of this many bytes are sent; 0 for whole chunks.
    `compress`: "none", "auto" (while that is faster) or "always" (where it makes the data smaller). `slot`:
    which of a worker's disks it is, so that no two want the same port.
    """

    disk: str
    devices: tuple[str, ...]
    size: int
    compress: str = "none"
    leaf: int = 4096
    wait: float = DEVICE_SECONDS
    slot: int = 0


@dataclass(frozen=True)
class Frame:
    """A message of the agent. `room`: what is to be given back, by `Dialogue.release`, once it is done with."""

    kind: int
    index: int
    count: int
    digest: bytes
    packing: int = RAW
    payload: bytes | memoryview = b""
    room: mmap.mmap | None = None


Answer = tuple[int, list[int], bytes]  # chunk, grains of it that differ, the leaves there are
Piece = tuple[int, int, memoryview]  # start within the chunk, length, bytes: none where they are zeros


class Dialogue:
    """The talk with one agent about the chunks of a disk from `first` on. A context manager; leaving it is `close`.

    `choose`: the agent may take whatever hash is its fastest; else the base's, as long as it can.
    One thread calls `begin`, then takes `frames`; others may `answer`, `release` and `close` meanwhile.
    """

    def __init__(
        self,
        stream: Stream,
        job: Job,
        base: Manifest,
        first: int,
        choose: bool,
        *,
        report: Report,
        clock: Clock,
        limiter: RateLimiter | None = None,
        direct: Direct | None = None,
    ) -> None:
        self._stream, self._job, self._base, self._first = stream, job, base, first
        self._choose = choose
        self._report, self._clock, self._limiter, self._direct = report, clock, limiter, direct
        self._tls: Tls | None = None
        self._window = wire.window(base.chunk)
        smallest = min(wire.GRAIN, job.leaf or wire.GRAIN)
        self._most = base.chunk + PIECE.size * (base.chunk // smallest + 1)  # bytes of a chunk in pieces
        self._grains = DIGEST * grain_count(base.chunk)
        self._told = first  # the chunks whose digests in the base the agent knows
        self._writing = Lock()
        self._free: deque[mmap.mmap] = deque()
        self._heard = clock.monotonic()
        self._listening = True
        self._spent = dict.fromkeys(("source", "destination", "limit"), 0.0)  # seconds as of late
        self._bottleneck = ""
        self._came = False  # whether a message has come over the direct channel
        self.root = ""  # the agent's, at the end

    # What is said

    def begin(self) -> Manifest:
        """Tell the agent what to do and wait until it has the disk open: the base, with the hash that it chose."""
        offer = self._direct.offer(self._job.slot) if self._direct else None
        try:
            self._send(wire.JOB, 0, json.dumps(self._document(offer)).encode())
        except StreamEnded:
            # It ended before it had heard everything; what it said last is the reason.
            self._head()
            raise
        frame = self._head()
        if frame.kind != wire.READY:
            raise self.foreign(f"message {frame.kind} where READY is due")
        ready = document(frame.payload)
        if ready.get("size") != self._job.size or ready.get("hash") not in HASHES:
            raise self.foreign("READY for another job")
        self._base = self._base.rehashed(ready["hash"])
        if offer and self._direct:
            if ready.get("port") == offer["port"]:
                self._tls = self._direct.connect(offer["port"])
            else:
                self._direct.give_up(f"the agent {_words(ready.get('why'))}")
        self._send(wire.GO, 1 if self._tls else 0, b"")
        self._tell_base(self._first)
        return self._base

    def _document(self, offer: dict[str, Any] | None) -> dict[str, Any]:
        base, job = self._base, self._job
        others = [name for name in HASHES if name != base.hash]
        return {
            "device_candidates": job.devices,
            "size": job.size,
            "chunk": base.chunk,
            "first": self._first,
            "leaf": job.leaf,
            "hashes": [base.hash, *others],
            "choose": self._choose,
            "key": base.key.hex(),
            "compress": job.compress,
            "packings": ["zstd"],
            "wait": job.wait,
            "direct": offer,
        }

    def _tell_base(self, due: int) -> None:
        """Keep ahead of the agent with the digests. It always listens, so this waits for nothing but the line."""
        while self._told < min(self._base.count, due + wire.BASE_AHEAD):
            start, self._told = self._told, min(self._base.count, self._told + wire.BASE_CHUNKS)
            self._send(wire.BASE, start, self._base.digests.span(start, self._told))

    def answer(self, answers: list[Answer]) -> None:
        """Tell the agent, of each of some chunks, in which grains the destination differs, and the leaves it has there.

        Who has computed it writes it: were it the reader's task, the agent might wait for the answer while the
        reader waits for the agent. The answers carry their chunk, so they may go out in any order.
        """
        said = b"".join(
            _message(wire.LEAVES, index, b"".join(map(wire.NUMBER.pack, grains)) + leaves, len(grains))
            for index, grains, leaves in answers
        )
        with suppress(StreamEnded):  # the agent is gone; the reader is told so too, and hears its last words
            self._write(said)

    def _send(self, kind: int, index: int, payload: bytes) -> None:
        self._write(_message(kind, index, payload))

    def _write(self, said: bytes) -> None:
        with self._writing:
            self._stream.write(said)

    # What is heard

    def frames(self) -> Iterator[Frame]:
        """What the agent says up to END, each frame the one that may come then."""
        due = self._first
        asked: deque[int] = deque()
        with every(_QUIET_SECONDS / 2, self._tell_quiet, optional=True):
            while True:
                self._tell_base(due)
                frame = self._head()
                if frame.kind == wire.END:
                    break
                if frame.kind == wire.PATCH:
                    if not asked or asked.popleft() != frame.index:
                        raise self.foreign(f"PATCH of chunk {frame.index}, which is not due")
                elif frame.kind in (wire.SAME, wire.ZEROS, wire.DATA, wire.ASK):
                    chunks, most = (1, 1) if frame.kind == wire.DATA else (frame.count, RUNS[frame.kind])
                    if frame.index != due or not 1 <= chunks <= min(most, self._base.count - due):
                        raise self.foreign(
                            f"{chunks} chunk(s) from {frame.index} on where chunk {due} is due"
                        )
                    due += chunks
                    if frame.kind == wire.ASK:
                        asked.extend(range(frame.index, due))
                        if not self._job.leaf or len(asked) > self._window:
                            raise self.foreign(f"ASK for chunk {due - 1}, which is one too many")
                else:
                    raise self.foreign(f"message {frame.kind} in the middle of a scan")
                self._listening, begun = False, self._clock.monotonic()
                yield frame
                self._heard, self._listening = self._clock.monotonic(), True
                self._spent["destination"] += self._heard - begun
        if due != self._base.count or asked:
            raise self.foreign(f"END after {due} of {self._base.count} chunks, {len(asked)} still asked for")
        root = document(frame.payload).get("root")
        if not isinstance(root, str):
            raise self.foreign("END of another disk")
        self.root = root

    def _tell_quiet(self) -> None:
        """Where nothing has moved for a while, say what is waited for. In a thread of its own."""
        quiet = self._clock.monotonic() - self._heard
        if quiet >= _QUIET_SECONDS:
            who = (
                "data from the worker: its disk or the link stalls" if self._listening else "the destination"
            )
            self._report(Waiting(f"{self._job.disk}: {who}, for {quiet:.0f} s now", SILENCE_SECONDS - quiet))

    def _head(self) -> Frame:
        """The next message with its payload. AgentFailed with the agent's own words where it gave up."""
        kind, packing, index, count, length, digest = HEAD.unpack(self._read(HEAD.size))
        if length > self._limit(kind):
            raise self.foreign(f"message {kind} of {length} bytes")
        if kind in (wire.DATA, wire.PATCH):
            # Pages of its own, which go back when they are done with: malloc would keep some for every thread.
            room = self._free.popleft() if self._free else mmap.mmap(-1, self._most)
            view = memoryview(room)[:length]
            self._fill(view)
            frame = Frame(kind, index, count, digest, packing, view, room)
        else:
            frame = Frame(kind, index, count, digest, packing, self._read(length))
        self._came = self._tls is not None
        if kind == wire.ERROR:
            raise self._given_up(document(frame.payload))
        return frame

    def release(self, frame: Frame) -> None:
        """The frame is done with; its memory may be used again."""
        if frame.room is not None:
            self._free.append(frame.room)

    def _limit(self, kind: int) -> int:
        """The longest payload of such a message."""
        if kind in (wire.DATA, wire.PATCH):
            return self._most
        if kind == wire.ASK:
            return self._grains * RUNS[kind]
        return MAX_JSON if kind in (wire.READY, wire.END, wire.ERROR) else 0

    def _read(self, size: int) -> bytes:
        room = bytearray(size)
        self._fill(memoryview(room))
        return bytes(room)

    def _fill(self, view: memoryview) -> None:
        """Fill `view` with what the agent says next, as fast as is allowed."""
        while view:
            begun = self._clock.monotonic()
            done = self._read_into(view if self._limiter is None else view[: self._limiter.slice])
            self._heard = self._clock.monotonic()
            self._spent["source"] += self._heard - begun
            if self._limiter is not None:
                self._limiter.spent(done)
                self._spent["limit"] += self._clock.monotonic() - self._heard
            view = view[done:]

    def bottleneck(self) -> str:
        """What most of the last second or more went to: see Copied."""
        whole = sum(self._spent.values())
        if whole >= _LATE_SECONDS:
            most = max(self._spent, key=lambda what: self._spent[what])
            self._bottleneck = most if self._spent[most] > whole / 2 else ""
            self._spent = dict.fromkeys(self._spent, 0.0)
        return self._bottleneck

    def _read_into(self, view: memoryview) -> int:
        """What has come into `view`: how many bytes, at least one."""
        if self._tls is None:
            piece = self._stream.read(min(len(view), _PIECE))
            view[: len(piece)] = piece
            return len(piece)
        try:
            return self._tls.read_into(view)
        except (OSError, EOFError) as error:
            # An agent that gives up has said so before. SSH is not asked: an agent that waits for us knows nothing yet.
            broke = f"the direct channel to the worker broke: {str(error) or 'it ended'}"
            if self._direct is not None and not self._came:
                self._direct.give_up(broke)
            raise ConnectionLost(broke) from error

    def close(self) -> None:
        """End the agent; whatever waits for it ends with StreamEnded."""
        self._stream.close()
        if self._tls is not None:
            self._tls.close()

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _given_up(self, said: dict[str, Any]) -> AgentFailed:
        offset = said.get("offset")
        return AgentFailed(
            f"{self._job.disk}: the agent on the worker gave up: {_words(said.get('message'))}",
            disk=self._job.disk,
            offset=offset if isinstance(offset, int) else None,
        )

    def foreign(self, what: str) -> StreamEnded:
        """The error for what may not be said."""
        return StreamEnded(
            f"{self._job.disk}: the worker's stream is not as agreed: {what}", disk=self._job.disk
        )

    # Payloads

    def corrupt(self, index: int, what: str) -> CorruptChunk:
        """The error for a chunk of which `what` is true."""
        offset = self._base.span(index)[0]
        text = f"{self._job.disk}: the chunk at offset {offset} {what}"
        return CorruptChunk(text, disk=self._job.disk, offset=offset)

    def pieces(self, frame: Frame) -> list[Piece]:
        """The pieces in a payload: within the chunk, in order, every byte of the payload in one of them."""
        length = self._base.span(frame.index)[1]
        body = self._unpacked(frame)
        at = PIECE.size * frame.count
        if at > len(body):
            raise self.corrupt(frame.index, "arrived with fewer pieces than announced")
        pieces: list[Piece] = []
        last = 0
        for start, size, zero in PIECE.iter_unpack(body[:at]):
            stop = at if zero else at + size
            if start < last or not 0 < size <= length - start or stop > len(body):
                raise self.corrupt(frame.index, "arrived in pieces that do not fit")
            pieces.append((start, size, body[at:stop]))
            at, last = stop, start + size
        if at != len(body):
            raise self.corrupt(frame.index, "arrived with bytes that belong to no piece")
        return pieces

    def _unpacked(self, frame: Frame) -> memoryview:
        if frame.packing == RAW:
            return memoryview(frame.payload)
        inflate: Any
        if frame.packing == ZLIB:
            inflate = zlib.decompressobj()
        elif frame.packing == ZSTD:
            inflate = zstd.ZstdDecompressor(
                options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
            )
        else:
            raise self.corrupt(frame.index, "arrived damaged")
        # Into pages of its own, and by small pieces on both sides: what malloc takes stays behind in each thread's part
        # of the heap, and a ZstdDecompressor keeps a copy of what it has been given and not yet unpacked.
        body, size, packed = memoryview(mmap.mmap(-1, self._most)), 0, memoryview(frame.payload)
        try:
            for at in range(0, len(packed), _PIECE):
                if inflate.eof:
                    raise self.corrupt(frame.index, "arrived with bytes after its end")
                given: Any = packed[at : at + _PIECE]
                while not inflate.eof and size < self._most:
                    room = min(_PIECE, self._most - size)
                    part = inflate.decompress(given, room)
                    body[size : size + len(part)] = part
                    size += len(part)
                    given = getattr(inflate, "unconsumed_tail", b"")  # zlib's
                    if len(part) < room:
                        break
        except (zlib.error, zstd.ZstdError) as error:
            raise self.corrupt(frame.index, "arrived damaged") from error
        if not inflate.eof or inflate.unused_data:
            raise self.corrupt(frame.index, "arrived damaged")
        return body[:size]


def _message(kind: int, index: int, payload: bytes, count: int = 0) -> bytes:
    return HEAD.pack(kind, RAW, index, count, len(payload), ZERO) + payload


def document(payload: bytes | memoryview) -> dict[str, Any]:
    """The JSON object in a payload."""
    try:
        said = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise StreamEnded("the worker's stream holds damaged JSON") from error
    if not isinstance(said, dict):
        raise StreamEnded("the worker's stream holds JSON of another shape")
    return said


def _words(said: Any) -> str:
    """A text of the agent's, as a person may see it."""
    return cleaned(said, 500)
