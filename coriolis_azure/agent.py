"""Reads one disk on the worker, once, and tells the host what differs from what the destination holds.

This file is a module of the package and, as it stands, the whole program that is pushed to the worker:
standard library only, Python 3.5 syntax, nothing of ours imported. The host imports the wire format and the
digests from here, so both sides have one definition.

Wire: messages of one HEAD and a payload, big endian.

    host -> agent
    JOB     payload: JSON, see `main`
    BASE    index: first chunk; payload: digests of what the destination holds from there on; repeated
    LEAVES  index: chunk; payload: digests of the leaves of it that the destination holds; in any order
    agent -> host
    READY   payload: JSON {"device", "size", "hash", "python"}
    SAME    index, count: a run of chunks that have the digest they had in BASE
    ZEROS   index, count: a run of chunks that are zeros now
    DATA    index, digest, count: pieces; payload: pieces; what is in none is zeros
    ASK     index, digest: this chunk changed; answer with LEAVES
    PATCH   index, digest, count: pieces; payload: pieces; what is in none is as the destination has it
    END     payload: JSON {"root"}
    ERROR   payload: JSON {"error", "message", "offset"}; the agent ends

SAME, ZEROS, DATA and ASK together name every chunk from the job's `first` on once, in disk order; those before
are as in BASE. PATCH comes in the order of ASK, any time after its LEAVES; at most `window(chunk)` chunks wait
for one. A payload of pieces is a table of PIECE, then the bytes of those that are not zeros; `packing` is of all.

The disk is opened read-only. When stdin ends the host is gone, and so is the agent, whatever it was doing.
"""
# ruff: noqa: UP006, UP032, UP035, PTH123, RUF005

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import queue
import struct
import sys
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterable, Iterator, List, Tuple

HEAD = struct.Struct(">BBQII16s")  # kind, packing, index, count, payload length, digest
PIECE = struct.Struct(">II?")  # start within the chunk, length, is it zeros (then no bytes follow)
JOB, BASE, LEAVES = 1, 2, 3
READY, SAME, ZEROS, DATA, ASK, PATCH, END, ERROR = range(16, 24)
RAW, ZLIB = 0, 1

DIGEST = 16  # bytes of a digest
ZERO = bytes(DIGEST)  # the digest of zeros, whatever the key and the length
UNKNOWN = b"\xff" * DIGEST  # not known what the destination holds; equals nothing
MAX_CHUNK = 4 << 20
MAX_JSON = 64 << 10
GRAIN = 64 << 10  # zeros inside a chunk are left out in units of this
RUN = 64  # chunks of one SAME or ZEROS message, at most: progress is to move
BASE_PIECE = 1 << 20  # bytes of one BASE message, at most

_NOTHING = bytes(MAX_CHUNK)
_ABSENT = (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOTDIR)


class Failure(Exception):
    """What the host is told before the agent ends; `offset` where a place on the disk is the reason."""

    def __init__(self, message: str, offset: Any = None) -> None:
        super().__init__(message)
        self.offset = offset


def is_zero(data: Any) -> bool:
    """Whether `data`, MAX_CHUNK bytes at most, is zeros. One memcmp, no copy, for any kind of buffer."""
    return _NOTHING.startswith(data)


def _blake2b(key: bytes) -> Callable[[Any], bytes]:
    keyed = functools.partial(hashlib.blake2b, digest_size=DIGEST, key=key)
    return lambda data: keyed(data).digest()


HASHES = {"blake2b": _blake2b}  # name -> function of the key that gives the function of the data


def digester(name: str, key: bytes) -> Callable[[Any], bytes]:
    """The digest function of hash `name`: 16 bytes for any buffer up to MAX_CHUNK, ZERO for zeros."""
    digest = HASHES[name](key)
    return lambda data: ZERO if is_zero(data) else digest(data)


def root(size: int, chunk: int, name: str) -> Any:
    """A hash object to be fed with the digests of all chunks in order; its hexdigest names the whole disk."""
    return hashlib.blake2b("{} {} {}\n".format(size, chunk, name).encode(), digest_size=DIGEST)


def source() -> bytes:
    """This very file: what the host pushes to the worker."""
    with open(__file__, "rb") as file:
        return file.read()


def fingerprint() -> str:
    """SHA-256 of this very file: the host's and the worker's must be the same."""
    return hashlib.sha256(source()).hexdigest()


def window(chunk: int) -> int:
    """How many chunks may wait for something at a time: 16, or 16 MiB of them."""
    return max(2, min(16, (16 << 20) // chunk))


def ordered(work: Callable[[Any], Any], items: Iterable[Any], threads: int, ahead: int) -> Iterator[Any]:
    """Yield work(item) in the order of `items`, never more than `ahead` of them in memory."""
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()  # type: deque[Any]
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


Pieces = List[Tuple[int, int, bool]]  # start within the chunk, length, is it zeros


def add_piece(pieces: Pieces, start: int, length: int, zero: bool) -> None:
    """Append a piece, as part of the one before it where they touch and are of one kind."""
    if pieces and pieces[-1][2] == zero and pieces[-1][0] + pieces[-1][1] == start:
        start, length = pieces[-1][0], pieces[-1][1] + length
        pieces.pop()
    pieces.append((start, length, zero))


def content(data: bytes) -> Pieces:
    """The pieces of `data` that are not zeros."""
    pieces = []  # type: Pieces
    view = memoryview(data)
    for start in range(0, len(data), GRAIN):
        if not is_zero(view[start : start + GRAIN]):
            add_piece(pieces, start, min(GRAIN, len(data) - start), False)
    return pieces


def changed(data: bytes, mine: List[bytes], theirs: bytes, leaf: int) -> Pieces:
    """The pieces of `data` whose leaf digests `mine` are not those in `theirs`."""
    pieces = []  # type: Pieces
    for number, digest in enumerate(mine):
        if digest != theirs[DIGEST * number : DIGEST * (number + 1)]:
            start = number * leaf
            add_piece(pieces, start, min(leaf, len(data) - start), digest == ZERO)
    return pieces


def packed(pieces: Pieces, data: bytes, compress: bool) -> Tuple[int, int, List[Any]]:
    """The payload for `pieces` of `data`: packing, number of pieces, buffers."""
    view = memoryview(data)
    buffers = [b"".join(PIECE.pack(*piece) for piece in pieces)]  # type: List[Any]
    buffers += [view[start : start + length] for start, length, zero in pieces if not zero]
    if compress and len(buffers) > 1:
        sample = bytes(buffers[1][:16384])
        # Trying in vain costs more than everything else here, so a sample decides.
        if len(zlib.compress(sample, 1)) < 0.9 * len(sample):
            deflate = zlib.compressobj(1)
            smaller = b"".join([deflate.compress(part) for part in buffers] + [deflate.flush()])
            if len(smaller) < sum(len(part) for part in buffers):
                return ZLIB, len(pieces), [smaller]
    return RAW, len(pieces), buffers


def read_exactly(fd: int, size: int) -> bytes:
    """`size` bytes of a pipe; EOFError when it ends before."""
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def write_all(fd: int, buffers: List[Any]) -> None:
    """Write all of `buffers` (fewer than 1024 of them, the kernel's limit) to a pipe."""
    rest = [memoryview(buffer) for buffer in buffers if len(buffer)]
    while rest:
        done = os.writev(fd, rest)
        while rest and done >= len(rest[0]):
            done -= len(rest.pop(0))
        if done:
            rest[0] = rest[0][done:]


class Output:
    """The messages to the host. Runs of SAME and ZEROS are held back until they end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._run = (0, 0, 0)  # kind, first chunk, chunks

    def send(self, kind: int, index: int, count: int, digest: bytes, packing: int, buffers: Any) -> None:
        """Write one message."""
        length = sum(len(buffer) for buffer in buffers)
        write_all(self._fd, [HEAD.pack(kind, packing, index, count, length, digest)] + buffers)

    def send_json(self, kind: int, document: Any) -> None:
        """Write one message with a JSON payload."""
        self.send(kind, 0, 0, ZERO, RAW, [json.dumps(document).encode()])

    def run(self, kind: int, index: int) -> None:
        """Chunk `index`, the one after the last, is SAME or ZEROS."""
        if self._run[0] != kind or self._run[2] >= RUN:
            self.flush()
            self._run = (kind, index, 0)
        self._run = (kind, self._run[1], self._run[2] + 1)

    def flush(self) -> None:
        """Write the run held back, if any."""
        kind, index, count = self._run
        self._run = (0, 0, 0)
        if count:
            self.send(kind, index, count, ZERO, RAW, [])


def listen(fd: int, answers: Any) -> None:
    """Put every LEAVES of the host into `answers`, until the host is gone: then end the process.

    As this thread always takes what the host writes, the two sides never wait for each other.
    """
    try:
        while True:
            kind, _, index, _, length, _ = HEAD.unpack(read_exactly(fd, HEAD.size))
            answers.put((kind, index, read_exactly(fd, length)))
    except (EOFError, OSError):
        os._exit(0)


class Scan:
    """One disk, compared with the digests in `base`. `look` runs in several threads, all else in one."""

    threads = 2

    def __init__(self, job: Any, base: bytearray) -> None:
        self.size, self.chunk, self.leaf = job["size"], job["chunk"], job["leaf"]  # type: int, int, int
        self.compress = job["compress"] == "zlib"
        self.digest = digester(job["hash"], bytes.fromhex(job["key"]))
        self.base, self.first, self.fd, self.device = base, job["first"], -1, ""
        self.root = root(self.size, self.chunk, job["hash"])
        self.asked, self.answered = deque(), {}  # type: deque[Any], Any
        self.answers = queue.Queue()  # type: queue.Queue[Tuple[int, int, bytes]]

    def run(self, out: Output) -> None:
        """Look at every chunk from `first` on and write what is to be said of it, then END."""
        count, room = -(-self.size // self.chunk), window(self.chunk)
        ahead = max(self.threads + 1, room // 2)
        self.root.update(memoryview(self.base)[: DIGEST * self.first])
        for kind, index, digest, found in ordered(self.look, range(self.first, count), self.threads, ahead):
            self.root.update(digest)
            if kind in (SAME, ZEROS):
                out.run(kind, index)
            elif kind == DATA:
                out.flush()
                packing, pieces, buffers = found
                out.send(DATA, index, pieces, digest, packing, buffers)
            else:
                out.flush()
                out.send(ASK, index, 0, digest, RAW, [])
                self.asked.append((index, digest, found))
            self.patch(out, room - 1)
        out.flush()
        self.patch(out, 0)
        out.send_json(END, {"root": self.root.hexdigest()})

    def look(self, index: int) -> Tuple[int, int, bytes, Any]:
        """Read chunk `index`: what it is, its digest, and what else its message needs."""
        offset = index * self.chunk
        data = self.read(offset, min(self.chunk, self.size - offset))
        digest = self.digest(data)
        had = self.base[DIGEST * index : DIGEST * (index + 1)]
        if digest == had != UNKNOWN:
            return SAME, index, digest, None
        if digest == ZERO:
            return ZEROS, index, digest, None
        if self.leaf and had not in (ZERO, UNKNOWN):
            leaves = [self.digest(data[at : at + self.leaf]) for at in range(0, len(data), self.leaf)]
            return ASK, index, digest, (data, leaves)
        return DATA, index, digest, packed(content(data), data, self.compress)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes of the disk. Failure naming the place when it cannot be read."""
        parts = []
        while length:
            try:
                part = os.pread(self.fd, length, offset)
            except OSError as error:
                text = "cannot read {} at offset {}: {}".format(self.device, offset, error.strerror)
                raise Failure(text, offset) from error
            if not part:
                raise Failure("{} ends at offset {}".format(self.device, offset), offset)
            os.posix_fadvise(self.fd, offset, len(part), os.POSIX_FADV_DONTNEED)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def patch(self, out: Output, room: int) -> None:
        """PATCH the asked chunks whose answers have come; wait for some while more than `room` are asked."""
        while self.asked:
            index, digest, (data, mine) = self.asked[0]
            while index not in self.answered:
                if len(self.asked) <= room and self.answers.empty():
                    return
                kind, which, leaves = self.answers.get()
                if kind != LEAVES:
                    raise Failure("the host sent message {} where LEAVES are due".format(kind))
                self.answered[which] = leaves
            theirs = self.answered.pop(index)
            if len(theirs) != DIGEST * len(mine):
                raise Failure("the host sent {} bytes of leaves for chunk {}".format(len(theirs), index))
            packing, pieces, buffers = packed(changed(data, mine, theirs, self.leaf), data, self.compress)
            out.send(PATCH, index, pieces, digest, packing, buffers)
            self.asked.popleft()


def open_device(paths: List[str], size: int, wait: float) -> Tuple[int, str]:
    """The first of `paths` there is, read-only: fd, path. A disk just attached takes seconds to appear."""
    deadline = time.monotonic() + wait
    while True:
        for path in paths:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in _ABSENT:
                    continue
                raise Failure("cannot open {}: {}".format(path, error.strerror)) from error
            found = os.lseek(fd, 0, os.SEEK_END)
            if found == size:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                return fd, path
            os.close(fd)
            if found:  # a device may show no size while it is being attached
                raise Failure("{} has {} bytes, the disk to be read has {}".format(path, found, size))
        if time.monotonic() >= deadline:
            raise Failure("no device appeared within {} s: {}".format(wait, ", ".join(paths)))
        time.sleep(0.1)


def receive(fd: int) -> Tuple[Any, bytearray]:
    """The job of the host and the digests of all chunks."""
    kind, _, _, _, length, _ = HEAD.unpack(read_exactly(fd, HEAD.size))
    if kind != JOB or length > MAX_JSON:
        raise Failure("the host did not begin with a job")
    job = json.loads(read_exactly(fd, length).decode())
    base = bytearray()
    while len(base) < DIGEST * -(-job["size"] // job["chunk"]):
        kind, _, index, _, length, _ = HEAD.unpack(read_exactly(fd, HEAD.size))
        if kind != BASE or index * DIGEST != len(base) or not 0 < length <= BASE_PIECE:
            raise Failure("the host did not send the digests as agreed")
        base += read_exactly(fd, length)
    return job, base


def main() -> None:
    """Serve one disk over stdin and stdout, then end the process.

    The job: {"device_candidates": paths, "size", "chunk", "first": chunk, "leaf": bytes or 0, "hash": name, "key":
    hex, "compress": "none" or "zlib", "wait": seconds for a device to appear, "agent": `fingerprint()`}.
    """
    out = Output(1)
    try:
        with contextlib.suppress(OSError):  # only a wish; F_SETPIPE_SZ: fewer switches
            fcntl.fcntl(1, 1031, 1 << 20)
        job, base = receive(0)
        if job["agent"] != fingerprint():
            raise Failure("this file is not the agent the host has sent")
        if job["hash"] not in HASHES or not hasattr(hashlib, job["hash"]):
            raise Failure("no hash {} in Python {}".format(job["hash"], sys.version.split()[0]))
        scan = Scan(job, base)
        threading.Thread(target=listen, args=(0, scan.answers), daemon=True).start()
        scan.fd, scan.device = open_device(job["device_candidates"], job["size"], job["wait"])
        ready = {"device": scan.device, "size": scan.size, "hash": job["hash"]}
        out.send_json(READY, dict(ready, python=sys.version.split()[0]))
        scan.run(out)
    except (EOFError, BrokenPipeError):
        os._exit(0)
    except Exception as error:  # noqa: BLE001  (the end of the program: the host must hear of it)
        name = type(error).__name__
        # The text of a fault of ours stays here: it might hold content of the disk.
        message = str(error) if isinstance(error, Failure) else "fault of the agent: {}".format(name)
        told = {"error": name, "message": message, "offset": getattr(error, "offset", None)}
        with contextlib.suppress(OSError):
            out.send_json(ERROR, told)
        os._exit(1)
    os._exit(0)  # not `return`: a listener is still blocked on stdin


if __name__ == "__main__":
    main()
