"""The conversation with one agent: each message must be one that is allowed at that moment.

The agent handles a disk whose content is untrusted, so none of its messages is trusted either: every length is checked
against its bound before anything is received or unpacked.
"""

from __future__ import annotations

import json
import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from ..agent import root, wire
from ..agent.tls import Stripes
from ..agent.wire import DIGEST, GRAIN, HEAD, MAX_JSON, PIECE, RAW, RUNS, ZERO
from ..errors import AgentFailed, ConnectionLost, CorruptChunk, StreamEnded, cleaned_output
from ..events import counted
from ..replica.manifest import HASHES, Manifest, grain_count
from ..threads import Lock, within
from .channel import SILENCE_SECONDS, Direct
from .flow import Flow
from .payload import Damaged, Rooms, pieces, unpacked
from .plan import Known, Plan, Run
from .reader import Answer, Chunk, Data, Piece, Question, Same, Zeros, corrupt

DEVICE_SECONDS = 60.0  # a hot-attached disk takes seconds to appear
_TAKEN = 64 << 10  # bytes taken from a stream at a time
_BULK = 64 << 10  # bytes of messages that are written at once
_SOURCE = "data from the worker: its disk or the network stalls"


class Stream(Protocol):
    """A byte stream to and from a running agent. One thread reads, others write in turn, any may close it.

    `read` and `write` raise StreamEnded or AgentFailed if the agent has ended or is silent for too long, and
    ConnectionLost if perhaps only the connection was lost.
    """

    def read(self, size: int, /) -> bytes | memoryview:
        """Read what is available: at least one byte, at most `size`."""

    def write(self, data: bytes, /) -> None:
        """Write all of `data`."""

    def close(self) -> None:
        """End the agent; reads and writes under way raise StreamEnded."""


@dataclass(frozen=True)
class Job:
    """What an agent has to read.

    `devices`: paths on the worker; the first that exists is the disk. `leaf`: the unit, in bytes, in which the changed
    parts of a known chunk are sent; 0 for whole chunks. `compress`: "none", "auto" (as long as it is faster) or
    "always" (if it makes the data smaller). `wait`: seconds for the disk to appear. `slot`: the disk's number on the
    worker, which selects its port. `threads`: how many of its threads read and hash, each with chunks in memory.
    """

    devices: tuple[str, ...]
    size: int
    compress: str = "none"
    leaf: int = 4096
    wait: float = DEVICE_SECONDS
    slot: int = 0
    threads: int = 2


@dataclass(frozen=True, slots=True)
class _Frame:
    """A message from the agent. `room`: the reusable pages that hold its payload, if any."""

    kind: int
    packing: int
    index: int
    count: int
    digest: bytes
    payload: bytes | memoryview
    room: mmap.mmap | None = None


class Dialogue:
    """The conversation with one agent about the chunks of a disk from `first` on. A context manager.

    One thread calls `begin`, then iterates over `chunks`; meanwhile others may answer questions and `close`.
    """

    def __init__(
        self, stream: Stream, job: Job, base: Manifest, first: int, flow: Flow, direct: Direct | None
    ) -> None:
        self._stream, self._job, self._base, self._first = stream, job, base, first
        self._flow, self._direct = flow, direct
        self._channel: Stripes | None = None
        self._writing = Lock()
        self._window = wire.window(base.chunk)
        smallest = min(GRAIN, job.leaf or GRAIN)
        self._most = base.chunk + PIECE.size * (base.chunk // smallest + 1)  # most bytes of a chunk in pieces
        self._longest = {  # most bytes of payload by kind of message; others have none
            **dict.fromkeys((wire.DATA, wire.PATCH), self._most),
            **dict.fromkeys((wire.READY, wire.END, wire.ERROR), MAX_JSON),
            wire.ASK: RUNS[wire.ASK] * DIGEST * grain_count(base.chunk),
        }
        self._rooms = Rooms(self._most)
        self.plan: Plan  # set by `begin`
        self._rest: Iterator[Run] = iter(())  # what has not been taken from the plan
        self._runs = deque[Run]()  # those that have been taken from the plan, and not been reported
        self._ahead = 0  # how many of their chunks the agent has to read
        self._complete = False  # whether the agent has been told of all of them
        self._done = list[range]()  # what the agent has read
        self._partly = dict[int, int]()  # how many bytes it reads of chunks that it does not read as a whole
        self._due = first  # the next chunk that has to be reported
        self._asked = deque[int]()  # chunks that the agent asked about and has not sent yet
        self._direct_works = False  # whether a message has arrived over the direct channel
        self.root = (first, "")  # complete after END

    # Messages to the agent

    def begin(self, hashes: Sequence[str], known: Known, *, choose: bool) -> Manifest:
        """Send the job, wait until the agent has opened the disk, and return the base with the hash it chose.

        `choose`: it takes the fastest of `hashes`, otherwise the first one that it can compute.
        `known`: what is known of the disk, which decides what the agent has to read.
        """
        offer = self._direct.offer(self._job.slot) if self._direct else None
        try:
            self._send(wire.JOB, 0, json.dumps(self._document(hashes, offer, choose=choose)).encode())
        except StreamEnded:
            # The agent ended while the job was being sent; its last message says why.
            self._receive()
            raise
        with within(self._job.wait + SILENCE_SECONDS, self._stream.close):  # however slowly it speaks
            frame = self._receive()
        if frame.kind != wire.READY:
            raise self._foreign(f"message {frame.kind} instead of READY")
        ready = _document(frame.payload)
        if ready.get("size") != self._job.size or ready.get("hash") not in HASHES:
            raise self._foreign("READY for another job")
        self._base = self._base.rehashed(ready["hash"])
        if offer and self._direct:
            if ready.get("port") == offer["port"]:
                self._channel = self._direct.connect(offer["port"])
            else:
                self._direct.give_up(f"the agent {cleaned_output(ready.get('why'))}")
        self._send(wire.GO, len(self._channel) if self._channel is not None else 0, b"")
        self.plan = Plan(self._base, known)
        self._rest = self.plan.runs(self._first, wire.BASE_CHUNKS)
        self._go_ahead()
        return self._base

    def _document(
        self, hashes: Sequence[str], offer: dict[str, Any] | None, *, choose: bool
    ) -> dict[str, Any]:
        base, job = self._base, self._job
        return {
            "device_candidates": job.devices,
            "size": job.size,
            "chunk": base.chunk,
            "leaf": job.leaf,
            "hashes": list(hashes),
            "choose": choose,
            "key": base.key.hex(),
            "compress": job.compress,
            "packings": ["zstd"],
            "wait": job.wait,
            "threads": job.threads,
            "direct": offer,
        }

    def _go_ahead(self) -> None:
        """Keep the agent supplied with chunks to read. It always listens, so only the network can delay this."""
        messages = bytearray()
        while self._ahead < wire.BASE_AHEAD and not self._complete:
            run = next(self._rest, None)
            if run is None:
                messages += _message(wire.BASE, self._base.count, b"")
                self._complete = True
                break
            self._await(run)
            if run.fate == "read":
                messages += b"".join(self._wanted(run.chunks))
            if len(messages) > _BULK:
                self._write(bytes(messages))
                messages.clear()
        if messages:
            self._write(bytes(messages))

    def _await(self, run: Run) -> None:
        """Append a run to those that will be reported; those to be read that are adjacent are one."""
        last = self._runs[-1] if self._runs else run
        if run.fate == "read":
            self._ahead += len(run.chunks)
        if last is not run and last.fate == run.fate == "read":
            self._runs[-1] = replace(last, chunks=range(last.chunks.start, run.chunks.stop))
        else:
            self._runs.append(run)

    def _wanted(self, chunks: range) -> Iterator[bytes]:
        """The messages that name chunks to read."""
        base, start = self._base, chunks.start
        for index in chunks if self._job.leaf and self.plan.has_parts else ():
            if (part := self.plan.part(index)) is not None:
                if start < index:
                    yield _message(wire.BASE, start, base.digests.span(start, index))
                self._partly[index] = sum(
                    min(GRAIN, base.span(index)[1] - number * GRAIN) for number in part[0]
                )
                yield _part(index, base.digest(index), *part)
                start = index + 1
        if start < chunks.stop:
            yield _message(wire.BASE, start, base.digests.span(start, chunks.stop))

    def _answer(self, answers: list[Answer]) -> None:
        """Send the answers to a question. Each names its chunk, so they may be sent in any order.

        The thread that computed them sends them. If the reading thread had to, the agent could wait for the answer
        while that thread waits for the agent.
        """
        messages = b"".join(
            _message(wire.LEAVES, index, b"".join(map(wire.NUMBER.pack, grains)) + leaves, len(grains))
            for index, grains, leaves in answers
        )
        with suppress(
            StreamEnded
        ):  # the agent has ended; the reading thread notices too and gets its last message
            self._write(messages)

    def _send(self, kind: int, index: int, payload: bytes) -> None:
        self._write(_message(kind, index, payload))

    def _write(self, messages: bytes) -> None:
        with self._writing:
            self._stream.write(messages)

    def read_of(self, index: int) -> int:
        """How many bytes of a chunk the agent has read; asked for once."""
        return self._partly.pop(index, self._base.span(index)[1])

    # Messages from the agent

    def chunks(self) -> Iterator[Chunk | Question | Run]:
        """Yield what the agent reports, in its order, and the runs that it has not read, until END."""
        with self._flow.watched(_SOURCE):
            while True:
                self._go_ahead()
                while self._runs and self._runs[0].fate != "read":
                    run = self._runs.popleft()
                    self._due = run.chunks.stop
                    with self._flow.passing():
                        yield run
                    self._go_ahead()
                frame = self._receive()
                if frame.kind == wire.END:
                    break
                self._expect(frame)
                with self._flow.passing():
                    yield self._chunk(frame)
        self._end(_document(frame.payload).get("root"))

    def _end(self, said: object) -> None:
        """Check what the agent says at the end."""
        base = self._base
        if self._due != base.count or self._asked:
            raise self._foreign(
                f"END after {self._due} of {counted(base.count, 'chunk')}, {len(self._asked)} of them not sent"
            )
        if not isinstance(said, str):
            raise self._foreign("END without a root")
        whole = root(base.size, base.chunk, base.hash)
        for chunks in self._done:
            whole.update(base.digests.span(chunks.start, chunks.stop))
        if said != whole.hexdigest():
            disk = self._flow.disk
            raise CorruptChunk(f"{disk}: the digest of all that was read differs from the agent's", disk=disk)
        self.root = (self._first, base.root(self._first))

    def _expect(self, frame: _Frame) -> None:
        """Raise StreamEnded unless the frame is allowed at this moment."""
        kind, due = frame.kind, self._due
        end = self._runs[0].chunks.stop if self._runs else due
        if kind == wire.PATCH:
            if not self._asked or self._asked.popleft() != frame.index:
                raise self._foreign(f"PATCH of chunk {frame.index}, which is not due")
            return
        if kind not in (wire.SAME, wire.ZEROS, wire.DATA, wire.ASK):
            raise self._foreign(f"message {kind} in the middle of a scan")
        count, most = (1, 1) if kind == wire.DATA else (frame.count, RUNS[kind])
        if frame.index != due or not 1 <= count <= min(most, end - due):
            raise self._foreign(f"{counted(count, 'chunk')} from {frame.index} on where chunk {due} is due")
        self._note_read(range(due, due + count))
        if kind == wire.ASK:
            self._asked.extend(range(due, self._due))
            if not self._job.leaf or len(self._asked) > self._window:
                raise self._foreign(f"ASK for chunk {self._due - 1}, which is one too many")
            grains = sum(grain_count(self._base.span(index)[1]) for index in range(due, self._due))
            if len(frame.payload) != DIGEST * grains:
                raise self._foreign(
                    f"ASK for {counted(count, 'chunk')}, {len(frame.payload)} bytes of digests"
                )

    def _note_read(self, chunks: range) -> None:
        """The agent has read these chunks, the next ones of the first run."""
        self._due = chunks.stop
        self._ahead -= len(chunks)
        if self._runs[0].chunks.stop == self._due:
            self._done.append(self._runs.popleft().chunks)

    def _chunk(self, frame: _Frame) -> Chunk | Question:
        """The frame as an item of the Reader interface."""
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
        """The next message with its payload. AgentFailed with the agent's own message if it gave up."""
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
        self._direct_works = self._channel is not None
        if kind == wire.ERROR:
            raise self._given_up(_document(frame.payload))
        return frame

    def _read(self, size: int) -> bytes:
        buffer = bytearray(size)
        self._fill(memoryview(buffer))
        return bytes(buffer)

    def _fill(self, view: memoryview) -> None:
        """Fill `view` with the agent's next bytes, within the rate limit."""
        flow = self._flow
        while view:
            begun = flow.clock.monotonic()
            done = self._read_into(view[: flow.slice])
            flow.received(begun, done)
            view = view[done:]

    def _read_into(self, view: memoryview) -> int:
        """Read available bytes into `view` and return how many, at least one."""
        if self._channel is None:
            part = self._stream.read(min(len(view), _TAKEN))
            view[: len(part)] = part
            return len(part)
        try:
            return self._channel.read_into(view)
        except (OSError, EOFError) as error:
            # An agent that gives up sends ERROR first, so there is no reason to look for one on SSH, where an agent
            # that still waits for us would keep us waiting.
            reason = f"the direct channel to the worker was lost: {str(error) or 'it ended'}"
            if self._direct is not None and not self._direct_works:
                self._direct.give_up(reason)
            raise ConnectionLost(reason) from error

    @property
    def is_direct(self) -> bool:
        """Whether the agent's messages come over the direct channel."""
        return self._channel is not None

    def close(self) -> None:
        """End the agent; whatever waits for it raises StreamEnded."""
        self._stream.close()
        if self._channel is not None:
            self._channel.close()

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _given_up(self, failure: dict[str, Any]) -> AgentFailed:
        disk, offset = self._flow.disk, failure.get("offset")
        return AgentFailed(
            f"{disk}: the agent on the worker gave up: {cleaned_output(failure.get('message'))}",
            disk=disk,
            offset=offset if isinstance(offset, int) else None,
        )

    def _foreign(self, problem: str) -> StreamEnded:
        """The error for a message that breaks the protocol."""
        disk = self._flow.disk
        return StreamEnded(f"{disk}: the worker's stream breaks the protocol: {problem}", disk=disk)


def _nothing() -> None:
    """Do nothing: the frame has no pages to give back."""


def _message(kind: int, index: int, payload: bytes, count: int = 0, digest: bytes = ZERO) -> bytes:
    return HEAD.pack(kind, RAW, index, count, len(payload), digest) + payload


def _part(index: int, digest: bytes, numbers: Sequence[int], grains: Sequence[bytes]) -> bytes:
    """The message that names a chunk of which some grains are to be read."""
    payload = b"".join((*map(wire.NUMBER.pack, numbers), *grains))
    return _message(wire.PART, index, payload, len(numbers), digest)


def _document(payload: bytes | memoryview) -> dict[str, Any]:
    """The JSON object in a payload."""
    try:
        document = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise StreamEnded("the worker's stream contains invalid JSON") from error
    if not isinstance(document, dict):
        raise StreamEnded("the worker's stream contains JSON that is not an object")
    return document
