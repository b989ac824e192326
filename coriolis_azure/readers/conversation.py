"""The conversation with one agent, message by message: each has to be one that may come then.

The agent runs beside a disk that strangers have written, so nothing it says is believed: every length is within its
bounds before anything is received or unpacked.
"""

from __future__ import annotations

import json
import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ..agent import wire
from ..agent.tls import Tls
from ..agent.wire import DIGEST, GRAIN, HEAD, MAX_JSON, PIECE, RAW, RUNS, ZERO
from ..errors import AgentFailed, ConnectionLost, StreamEnded, told_by_others
from ..events import counted
from ..replica.manifest import HASHES, Manifest, grain_count
from ..threads import Lock
from .channel import Direct
from .flow import Flow
from .payload import Damaged, Rooms, pieces, unpacked
from .reader import Answer, Chunk, Data, Piece, Question, Same, Zeros, corrupt

DEVICE_SECONDS = 60.0  # a disk that is attached while the worker runs takes seconds to appear
_PART = 64 << 10  # bytes that are taken from a stream at a time
_SOURCE = "data from the worker: its disk or the link stalls"


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
    """What an agent is to read. `devices`: paths on the worker, the first that exists is the disk.

    `leaf`: where a known chunk has changed, only pieces of this many bytes are sent; 0 for whole chunks.
    `compress`: "none", "auto" (while that is faster) or "always" (where it makes the data smaller). `slot`:
    which of a worker's disks it is, so that no two want the same port.
    """

    devices: tuple[str, ...]
    size: int
    compress: str = "none"
    leaf: int = 4096
    wait: float = DEVICE_SECONDS
    slot: int = 0


@dataclass(frozen=True, slots=True)
class _Frame:
    """A message of the agent. `room`: the pages that its payload is in."""

    kind: int
    packing: int
    index: int
    count: int
    digest: bytes
    payload: bytes | memoryview
    room: mmap.mmap | None = None


class Dialogue:
    """The conversation with one agent about the chunks of a disk from `first` on. A context manager.

    One thread calls `begin`, then takes `chunks`; others may answer questions and `close` meanwhile.
    """

    def __init__(
        self, stream: Stream, job: Job, base: Manifest, first: int, flow: Flow, direct: Direct | None
    ) -> None:
        self._stream, self._job, self._base, self._first = stream, job, base, first
        self._flow, self._direct = flow, direct
        self._tls: Tls | None = None
        self._writing = Lock()
        self._window = wire.window(base.chunk)
        smallest = min(GRAIN, job.leaf or GRAIN)
        self._most = base.chunk + PIECE.size * (base.chunk // smallest + 1)  # bytes of a chunk in pieces
        self._longest = {  # bytes of a message's payload; none where it is not named
            **dict.fromkeys((wire.DATA, wire.PATCH), self._most),
            **dict.fromkeys((wire.READY, wire.END, wire.ERROR), MAX_JSON),
            wire.ASK: RUNS[wire.ASK] * DIGEST * grain_count(base.chunk),
        }
        self._rooms = Rooms(self._most)
        self._told = self._due = first  # chunks whose digests the agent knows; that it has spoken of
        self._asked = deque[int]()
        self._direct_came = False  # whether a message has come over the direct channel
        self.root = (first, "")  # the agent's, at the end

    # What is said

    def begin(self, hashes: Sequence[str], choose: bool) -> Manifest:
        """Tell the agent what to do and wait until it has the disk open: the base, with the hash it takes of `hashes`.

        `choose`: whichever is its fastest, else the first that it can compute.
        """
        offer = self._direct.offer(self._job.slot) if self._direct else None
        try:
            self._send(wire.JOB, 0, json.dumps(self._document(hashes, choose, offer)).encode())
        except StreamEnded:
            # It ended before it had heard everything; what it said last is the reason.
            self._receive()
            raise
        frame = self._receive()
        if frame.kind != wire.READY:
            raise self._foreign(f"message {frame.kind} where READY is due")
        ready = _document(frame.payload)
        if ready.get("size") != self._job.size or ready.get("hash") not in HASHES:
            raise self._foreign("READY for another job")
        self._base = self._base.rehashed(ready["hash"])
        if offer and self._direct:
            if ready.get("port") == offer["port"]:
                self._tls = self._direct.connect(offer["port"])
            else:
                self._direct.give_up(f"the agent {told_by_others(ready.get('why'))}")
        self._send(wire.GO, 1 if self._tls else 0, b"")
        self._tell_base()
        return self._base

    def _document(self, hashes: Sequence[str], choose: bool, offer: dict[str, Any] | None) -> dict[str, Any]:
        base, job = self._base, self._job
        return {
            "device_candidates": job.devices,
            "size": job.size,
            "chunk": base.chunk,
            "first": self._first,
            "leaf": job.leaf,
            "hashes": list(hashes),
            "choose": choose,
            "key": base.key.hex(),
            "compress": job.compress,
            "packings": ["zstd"],
            "wait": job.wait,
            "direct": offer,
        }

    def _tell_base(self) -> None:
        """Keep ahead of the agent with the digests. It always listens, so this waits for nothing but the line."""
        while self._told < min(self._base.count, self._due + wire.BASE_AHEAD):
            start, self._told = self._told, min(self._base.count, self._told + wire.BASE_CHUNKS)
            self._send(wire.BASE, start, self._base.digests.span(start, self._told))

    def _answer(self, answers: list[Answer]) -> None:
        """Write the answers to a question. They carry their chunk, so they may go out in any order.

        Whoever has computed them writes them: were it the reader's task, the agent might wait for the answer while
        the reader waits for the agent.
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

    def chunks(self) -> Iterator[Chunk | Question]:
        """What the agent says up to END, in its order."""
        with self._flow.watched(_SOURCE):
            while True:
                self._tell_base()
                frame = self._receive()
                if frame.kind == wire.END:
                    break
                self._expect(frame)
                with self._flow.passing():
                    yield self._chunk(frame)
        if self._due != self._base.count or self._asked:
            raise self._foreign(
                f"END after {self._due} of {counted(self._base.count, 'chunk')}, {len(self._asked)} still asked for"
            )
        root = _document(frame.payload).get("root")
        if not isinstance(root, str):
            raise self._foreign("END of another disk")
        self.root = (self._first, root)

    def _expect(self, frame: _Frame) -> None:
        """StreamEnded unless the frame is one that may come now."""
        kind, due, last = frame.kind, self._due, self._base.count
        if kind == wire.PATCH:
            if not self._asked or self._asked.popleft() != frame.index:
                raise self._foreign(f"PATCH of chunk {frame.index}, which is not due")
            return
        if kind not in (wire.SAME, wire.ZEROS, wire.DATA, wire.ASK):
            raise self._foreign(f"message {kind} in the middle of a scan")
        count, most = (1, 1) if kind == wire.DATA else (frame.count, RUNS[kind])
        if frame.index != due or not 1 <= count <= min(most, last - due):
            raise self._foreign(f"{counted(count, 'chunk')} from {frame.index} on where chunk {due} is due")
        self._due += count
        if kind == wire.ASK:
            self._asked.extend(range(due, self._due))
            if not self._job.leaf or len(self._asked) > self._window:
                raise self._foreign(f"ASK for chunk {self._due - 1}, which is one too many")
            grains = sum(grain_count(self._base.span(index)[1]) for index in range(due, self._due))
            if len(frame.payload) != DIGEST * grains:
                raise self._foreign(
                    f"ASK for {counted(count, 'chunk')}, {len(frame.payload)} bytes of digests"
                )

    def _chunk(self, frame: _Frame) -> Chunk | Question:
        """What a frame says, in the words of every reader."""
        if frame.kind == wire.SAME:
            return Same(frame.index, frame.count)
        if frame.kind == wire.ZEROS:
            return Zeros(frame.index, frame.count)
        if frame.kind == wire.ASK:
            return Question(frame.index, frame.count, bytes(frame.payload), self._job.leaf, self._answer)
        done = partial(self._rooms.give_back, frame.room) if frame.room is not None else _nothing
        whole = frame.kind == wire.DATA
        return Data(frame.index, frame.digest, whole, partial(self._pieces, frame), done)

    def _pieces(self, frame: _Frame) -> list[Piece]:
        offset, length = self._base.span(frame.index)
        try:
            body = unpacked(frame.packing, memoryview(frame.payload), self._most)
            return pieces(body, frame.count, length)
        except Damaged as error:
            raise corrupt(self._flow.disk, offset, str(error)) from error

    def _receive(self) -> _Frame:
        """The next message with its payload. AgentFailed with the agent's own words where it gave up."""
        kind, packing, index, count, length, digest = HEAD.unpack(self._read(HEAD.size))
        if length > self._longest.get(kind, 0):
            raise self._foreign(f"message {kind} of {length} bytes")
        if kind in (wire.DATA, wire.PATCH):
            room = self._rooms.take()
            payload = memoryview(room)[:length]
            self._fill(payload)
            frame = _Frame(kind, packing, index, count, digest, payload, room)
        else:
            frame = _Frame(kind, packing, index, count, digest, self._read(length))
        self._direct_came = self._tls is not None
        if kind == wire.ERROR:
            raise self._given_up(_document(frame.payload))
        return frame

    def _read(self, size: int) -> bytes:
        room = bytearray(size)
        self._fill(memoryview(room))
        return bytes(room)

    def _fill(self, view: memoryview) -> None:
        """Fill `view` with what the agent says next, as fast as is allowed."""
        flow = self._flow
        while view:
            begun = flow.clock.monotonic()
            done = self._read_into(view[: flow.slice])
            flow.received(begun, done)
            view = view[done:]

    def _read_into(self, view: memoryview) -> int:
        """What has come into `view`: how many bytes, at least one."""
        if self._tls is None:
            part = self._stream.read(min(len(view), _PART))
            view[: len(part)] = part
            return len(part)
        try:
            return self._tls.read_into(view)
        except (OSError, EOFError) as error:
            # An agent that gives up has said so before. SSH is not asked: an agent that waits for us knows nothing yet.
            broke = f"the direct channel to the worker broke: {str(error) or 'it ended'}"
            if self._direct is not None and not self._direct_came:
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
        disk, offset = self._flow.disk, said.get("offset")
        return AgentFailed(
            f"{disk}: the agent on the worker gave up: {told_by_others(said.get('message'))}",
            disk=disk,
            offset=offset if isinstance(offset, int) else None,
        )

    def _foreign(self, what: str) -> StreamEnded:
        """The error for what may not be said."""
        disk = self._flow.disk
        return StreamEnded(f"{disk}: the worker's stream is not as agreed: {what}", disk=disk)


def _nothing() -> None:
    """Nothing has to be given back."""


def _message(kind: int, index: int, payload: bytes, count: int = 0) -> bytes:
    return HEAD.pack(kind, RAW, index, count, len(payload), ZERO) + payload


def _document(payload: bytes | memoryview) -> dict[str, Any]:
    """The JSON object in a payload."""
    try:
        said = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise StreamEnded("the worker's stream holds damaged JSON") from error
    if not isinstance(said, dict):
        raise StreamEnded("the worker's stream holds JSON of another shape")
    return said
