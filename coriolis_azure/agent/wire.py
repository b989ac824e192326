"""The protocol between the agent and the host: messages of one HEAD and a payload, big-endian.

    host -> agent, over stdin
    JOB     payload: JSON, see `main`
    GO      index: how many connections of the direct channel carry what follows READY; 0 for stdout
    BASE    index: first chunk; payload: the digests that the destination holds of a run of chunks to read; an empty
            payload: no chunks follow
    PART    index, digest: a chunk to read and its digest at the destination; count: its grains that may have changed;
            payload: their numbers, then the digests of all its grains at the destination
    LEAVES  index: chunk; count: its grains that differ at the destination; payload: their numbers and, if leaves
            are smaller than grains, the digests of their leaves at the destination; in any order
    agent -> host, READY over stdout, the others as GO says
    READY   payload: JSON {"device", "size", "hash", "port": of the direct channel or 0, "why": it is 0, "python"}
    SAME    index, count: a run of chunks whose digests are as at the destination
    ZEROS   index, count: a run of chunks that are zeros now
    DATA    index, digest, count: pieces; payload: pieces; bytes in no piece are zeros
    ASK     index, count; payload: the digests of the grains of a run of changed chunks; answer with LEAVES
    PATCH   index, digest, count: pieces; payload: pieces; bytes in no piece are as at the destination
    END     payload: JSON {"root": of the chunks that were to be read}
    ERROR   payload: JSON {"error", "message", "offset"}; the agent exits

SAME, ZEROS, DATA and ASK together cover every chunk of BASE and PART once, in disk order; other chunks are not read,
and no run reaches across one. PATCHes are sent in the order of ASK, any time after their LEAVES; at most
`window(chunk)` chunks wait for one. BASE and PART messages are in disk order, with at most BASE_CHUNKS chunks each;
the host stays at least BASE_AHEAD chunks to be read ahead of the last chunk that the agent reported. A payload of
pieces is a table of PIECE, then the bytes of the pieces that are not zeros; `packing` says how the whole is compressed.
"""

import json
import os
import queue
import struct
import threading
import time
from typing import Any, Callable, Iterator, List, Tuple

DIGEST = 14  # bytes of a digest: with 16, the state of a disk of 1 TiB would exceed 20 MiB
HEAD = struct.Struct(">BBQII{}s".format(DIGEST))  # kind, packing, index, count, payload length, digest
PIECE = struct.Struct(">II?")  # start within the chunk, length, whether it is zeros (and has no bytes)
NUMBER = struct.Struct(">H")  # the number of a grain within its chunk
JOB, GO, BASE, LEAVES, PART = 1, 2, 3, 4, 5
READY, SAME, ZEROS, DATA, ASK, PATCH, END, ERROR = range(16, 24)
RAW, ZLIB, ZSTD = 0, 1, 2

ZERO = bytes(DIGEST)  # the digest of zeros, for any key and length
UNKNOWN = b"\xff" * DIGEST  # what the destination holds is unknown: never equal to a digest
MAX_CHUNK = 4 << 20
MAX_JSON = 64 << 10
GRAIN = 64 << 10  # bytes: the unit of hashing inside a chunk, and of zero detection
RUNS = {SAME: 64, ZEROS: 64, ASK: 16}  # most chunks in one message: short runs keep progress moving
BASE_CHUNKS = 4096  # digests in one BASE message
BASE_AHEAD = 8192
HELD = 64 << 10  # most bytes of short messages that are held back

Payload = Tuple[int, List[Any]]  # how it is compressed, and its buffers
# A chunk to read and its digest at the destination; unless all of it is to be read, the numbers of the grains to read
# and the digests that all its grains have at the destination.
Wanted = Tuple[int, bytes, List[int], List[bytes]]

Queue = getattr(queue, "SimpleQueue", queue.Queue)  # type: Any


class Failure(Exception):
    """An error to report to the host before exiting; `offset` if it concerns a place on the disk."""

    def __init__(self, message: str, offset: Any = None) -> None:
        super().__init__(message)
        self.offset = offset


def window(chunk: int) -> int:
    """How many chunks may wait for LEAVES at a time: 64 MiB of them, and at least 16."""
    return max(16, (64 << 20) // chunk)


def read_exactly(fd: int, size: int) -> bytes:
    """Read `size` bytes from a pipe; EOFError if it ends before."""
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def pipe_writer(fd: int) -> Callable[[List[Any]], None]:
    """A function that writes a list of buffers (fewer than 1024, the kernel's limit) to a pipe."""

    def write(buffers: List[Any]) -> None:
        rest = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while rest:
            done = os.writev(fd, rest)
            while rest and done >= len(rest[0]):
                done -= len(rest.pop(0))
            if done:
                rest[0] = rest[0][done:]

    return write


class Rate:
    """A moving average of bytes a second. `guess` weighs as much as so many seconds."""

    def __init__(self, guess: float, seconds: float = 0.25) -> None:
        self._bytes, self._seconds = guess * seconds, seconds

    def add(self, size: int, seconds: float) -> None:
        """Record that `size` bytes took `seconds`; earlier records lose weight."""
        keep = max(0.0, 1 - seconds)
        self._bytes, self._seconds = keep * self._bytes + size, keep * self._seconds + seconds

    def now(self) -> float:
        """The present rate."""
        return self._bytes / self._seconds


class Output:
    """Sends messages to the host. Runs of SAME, ZEROS and ASK are held back until they end."""

    def __init__(self, write: Callable[[List[Any]], None]) -> None:
        self.write = write
        self.line = Rate(400e6, 0.05)  # a fast one, until it has been measured for a moment
        self._run = (0, 0, [])  # type: Tuple[int, int, List[bytes]]  # kind, first chunk, payload of each chunk
        self._held = bytearray()

    def send(
        self, kind: int, index: int, count: int, digest: bytes, payload: Payload, *, hold: bool = False
    ) -> None:
        """Write one message. `hold`: it may wait for others, as one write takes as long for many as for one."""
        packing, buffers = payload
        length = sum(len(buffer) for buffer in buffers)
        self._held += HEAD.pack(kind, packing, index, count, length, digest)
        if hold and len(self._held) + length <= HELD:
            self._held += b"".join(buffers)
        else:
            self.release(buffers)

    def release(self, buffers: Any = ()) -> None:
        """Write what is held back, followed by `buffers`."""
        held, self._held = self._held, bytearray()
        began = time.perf_counter()
        self.write([held] + list(buffers))
        self.line.add(len(held) + sum(len(buffer) for buffer in buffers), time.perf_counter() - began)

    def send_json(self, kind: int, document: Any) -> None:
        """Write one message with a JSON payload."""
        self.send(kind, 0, 0, ZERO, (RAW, [json.dumps(document).encode()]))

    def run(self, kind: int, index: int, payload: bytes = b"") -> None:
        """Add chunk `index` to a run of `kind`: SAME, ZEROS or ASK."""
        running, first, payloads = self._run
        if (running, first + len(payloads)) != (kind, index) or len(payloads) >= RUNS[kind]:
            self.flush()
            self._run = (kind, index, [])
        self._run[2].append(payload)

    def flush(self) -> None:
        """Send the run held back, if any."""
        kind, index, payloads = self._run
        self._run = (0, 0, [])
        if payloads:
            self.send(kind, index, len(payloads), ZERO, (RAW, [b"".join(payloads)]))


class Input:
    """Receives the host's messages after the job. The listening thread calls `gone` when the host is gone.

    That thread always reads what the host writes, so the two sides never deadlock.
    """

    def __init__(self, fd: int, gone: Callable[[], Any] = lambda: os._exit(0)) -> None:
        self._fd, self._gone = fd, gone
        self._chunks = Queue()  # what is to be read: kind, index, count, digest, payload
        self.others = Queue()  # other messages: kind, index, count, payload
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        try:
            while True:
                kind, _, index, count, length, digest = HEAD.unpack(read_exactly(self._fd, HEAD.size))
                if length > MAX_CHUNK:
                    raise EOFError
                payload = read_exactly(self._fd, length)
                if kind in (BASE, PART):
                    self._chunks.put((kind, index, count, digest, payload))
                else:
                    self.others.put((kind, index, count, payload))
        except (EOFError, OSError):
            self._chunks.put((0, 0, 0, b"", b""))
            self.others.put((0, 0, 0, b""))
            self._gone()

    def go(self) -> int:
        """Wait for GO: how many connections the direct channel has, 0 if it is not used."""
        kind, index, _, _ = self.others.get()
        if kind != GO:
            raise Failure("the host sent message {} instead of GO".format(kind))
        return int(index)

    def chunks(self) -> Iterator[Wanted]:
        """Yield the chunks to read in disk order, as the host names them, until it says that there are no more."""
        while True:
            kind, index, count, digest, payload = self._chunks.get()
            if kind == PART:
                end = NUMBER.size * count  # type: int
                numbers = [number for (number,) in NUMBER.iter_unpack(payload[:end])]
                yield index, digest, numbers, _digests(payload[end:])
            elif kind == BASE and payload:
                for at, known in enumerate(_digests(payload)):
                    yield index + at, known, [], []
            elif kind == BASE:
                return
            else:
                raise EOFError


def _digests(payload: bytes) -> List[bytes]:
    return [payload[at : at + DIGEST] for at in range(0, len(payload), DIGEST)]
