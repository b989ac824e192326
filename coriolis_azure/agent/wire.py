"""How the agent and the host talk: messages of one HEAD and a payload, big endian.

    host -> agent, over stdin
    JOB     payload: JSON, see `main`
    GO      index: 1 when what comes after READY is to go over the direct channel, 0 for stdout
    BASE    index: first chunk; payload: digests of what the destination holds from there on
    LEAVES  index: chunk; count: grains of it in which the destination differs; payload: their numbers, and
            where leaves are smaller than grains the digests of the leaves that it holds there; in any order
    agent -> host, READY over stdout, the others as GO says
    READY   payload: JSON {"device", "size", "hash", "port": of the direct channel or 0, "why": not, "python"}
    SAME    index, count: a run of chunks that have the digest they had in BASE
    ZEROS   index, count: a run of chunks that are zeros now
    DATA    index, digest, count: pieces; payload: pieces; what is in none is zeros
    ASK     index, count; payload: the digests of the grains of a run of changed chunks; answer with LEAVES
    PATCH   index, digest, count: pieces; payload: pieces; what is in none is as the destination has it
    END     payload: JSON {"root": of the chunks from `first` on}
    ERROR   payload: JSON {"error", "message", "offset"}; the agent ends

SAME, ZEROS, DATA and ASK together name every chunk from the job's `first` on once, in disk order; those before
are as in BASE. PATCH comes in the order of ASK, any time after its LEAVES; at most `window(chunk)` chunks wait
for one. BASE comes in pieces of BASE_CHUNKS, in order; the host stays at least BASE_AHEAD chunks ahead of what
it has heard of. A payload of pieces is a table of PIECE, then the bytes of those that are not zeros; the whole is
packed as `packing` says.
"""

import json
import os
import queue
import struct
import threading
import time
from typing import Any, Callable, List, Tuple  # noqa: F401 - in a type comment

DIGEST = 14  # bytes of a digest: of 16, which would make the kept state of a TiB larger than 20 MiB
HEAD = struct.Struct(">BBQII{}s".format(DIGEST))  # kind, packing, index, count, payload length, digest
PIECE = struct.Struct(">II?")  # start within the chunk, length, is it zeros (then no bytes follow)
NUMBER = struct.Struct(">H")  # of a grain within its chunk
JOB, GO, BASE, LEAVES = 1, 2, 3, 4
READY, SAME, ZEROS, DATA, ASK, PATCH, END, ERROR = range(16, 24)
RAW, ZLIB, ZSTD = 0, 1, 2

ZERO = bytes(DIGEST)  # the digest of zeros, whatever the key and the length
UNKNOWN = b"\xff" * DIGEST  # not known what the destination holds; equals nothing
MAX_CHUNK = 4 << 20
MAX_JSON = 64 << 10
GRAIN = 64 << 10  # bytes: the unit of hashing inside a chunk, and of zero detection
RUNS = {SAME: 64, ZEROS: 64, ASK: 16}  # chunks in one message, at most: short runs keep progress moving
BASE_CHUNKS = 4096  # digests in one BASE message
BASE_AHEAD = 8192
HELD = 64 << 10  # bytes of short messages that are held back

Queue = getattr(queue, "SimpleQueue", queue.Queue)  # type: Any


class Failure(Exception):
    """What the host is told before the agent ends; `offset` where a place on the disk is the reason."""

    def __init__(self, message: str, offset: Any = None) -> None:
        super().__init__(message)
        self.offset = offset


def window(chunk: int) -> int:
    """How many chunks may wait for leaves at a time: 64 MiB of them, or 16."""
    return max(16, (64 << 20) // chunk)


def read_exactly(fd: int, size: int) -> bytes:
    """`size` bytes of a pipe; EOFError when it ends before."""
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def pipe_writer(fd: int) -> Callable[[List[Any]], None]:
    """A function that writes all of some buffers (fewer than 1024, the kernel's limit) to a pipe."""

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
    """Bytes a second, as of late. `guess` counts as much as the last quarter of a second."""

    def __init__(self, guess: float) -> None:
        self._bytes, self._seconds = guess / 4, 0.25

    def add(self, size: int, seconds: float) -> None:
        """It took `seconds` to do `size` bytes; what came before counts less and less."""
        keep = max(0.0, 1 - seconds)
        self._bytes, self._seconds = keep * self._bytes + size, keep * self._seconds + seconds

    def now(self) -> float:
        """The rate."""
        return self._bytes / self._seconds


class Output:
    """The messages to the host. Runs of SAME, ZEROS and ASK are held back until they end, and what else may be."""

    def __init__(self, write: Callable[[List[Any]], None]) -> None:
        self.write = write
        self.line = Rate(1e9)
        self._run = (0, 0, [])  # type: Tuple[int, int, List[bytes]]  # kind, first chunk, what is said of each
        self._held = bytearray()

    def send(
        self, kind: int, index: int, count: int, digest: bytes, packing: int, buffers: Any, hold: bool = False
    ) -> None:
        """Write one message; one that is to be on `hold` with others before long: each alone takes as long as all."""
        length = sum(len(buffer) for buffer in buffers)
        self._held += HEAD.pack(kind, packing, index, count, length, digest)
        if hold and len(self._held) + length <= HELD:
            self._held += b"".join(buffers)
        else:
            self.release(buffers)

    def release(self, buffers: Any = ()) -> None:
        """Write what is held back, and what comes after it."""
        held, self._held = self._held, bytearray()
        began = time.perf_counter()
        self.write([held] + list(buffers))
        self.line.add(len(held) + sum(len(buffer) for buffer in buffers), time.perf_counter() - began)

    def send_json(self, kind: int, document: Any) -> None:
        """Write one message with a JSON payload."""
        self.send(kind, 0, 0, ZERO, RAW, [json.dumps(document).encode()])

    def run(self, kind: int, index: int, said: bytes = b"") -> None:
        """Chunk `index`, the one after the last, is SAME, ZEROS or to be asked for."""
        if self._run[0] != kind or len(self._run[2]) >= RUNS[kind]:
            self.flush()
            self._run = (kind, index, [])
        self._run[2].append(said)

    def flush(self) -> None:
        """Write the run held back, if any."""
        kind, index, said = self._run
        self._run = (0, 0, [])
        if said:
            self.send(kind, index, len(said), ZERO, RAW, [b"".join(said)])


class Input:
    """What the host says after the job. When it is gone, `gone` is called, by the thread that listens.

    As a thread always takes what the host writes, the two sides never wait for each other.
    """

    def __init__(self, fd: int, first: int, gone: Callable[[], Any] = lambda: os._exit(0)) -> None:
        self._fd, self._due, self._gone, self._ended = fd, first, gone, False
        self._base = {}  # type: Any
        self._more = threading.Condition()
        self.others = Queue()  # of kind, index, count, payload
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        try:
            while True:
                kind, _, index, count, length, _ = HEAD.unpack(read_exactly(self._fd, HEAD.size))
                if length > MAX_CHUNK:
                    raise EOFError
                payload = read_exactly(self._fd, length)
                if kind == BASE and index == self._due:
                    with self._more:
                        self._base[index] = payload
                        self._due += len(payload) // DIGEST
                        self._more.notify_all()
                else:
                    self.others.put((kind, index, count, payload))
        except (EOFError, OSError):
            with self._more:
                self._ended = True
                self._more.notify_all()
            self.others.put((0, 0, 0, b""))
            self._gone()

    def go(self) -> int:
        """Wait for GO: 1 when the host is at the direct channel, 0 when not."""
        kind, index, _, _ = self.others.get()
        if kind != GO:
            raise Failure("the host sent message {} where GO is due".format(kind))
        return int(index)

    def base(self, index: int) -> bytes:
        """The digest that chunk `index` has at the destination, as soon as it is known."""
        with self._more:
            while index >= self._due:
                if self._ended:
                    raise EOFError
                self._more.wait()
            for start, digests in self._base.items():
                if start <= index < start + len(digests) // DIGEST:
                    at = DIGEST * (index - start)
                    return bytes(digests[at : at + DIGEST])
        raise Failure("the host told chunk {} out of order".format(index))

    def forget(self, index: int) -> None:
        """The chunks up to `index` will not be asked for again."""
        with self._more:
            for start in [at for at in self._base if at + len(self._base[at]) // DIGEST <= index + 1]:
                del self._base[start]
