"""Reads one disk on the worker, once, and tells the host what differs from what the destination holds.

This file is a module of the package and, as it stands, the whole program that is sent to the worker:
standard library only, Python 3.5 syntax, nothing of ours imported. The host imports the wire format and the
digests from here, so both sides have one definition. Its argument is the address to listen on, if any.

Wire: messages of one HEAD and a payload, big endian.

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
    ASK     index, count; payload: the digests of the grains of a run of chunks, which changed; answer with LEAVES
    PATCH   index, digest, count: pieces; payload: pieces; what is in none is as the destination has it
    END     payload: JSON {"root": of the chunks from `first` on}
    ERROR   payload: JSON {"error", "message", "offset"}; the agent ends

SAME, ZEROS, DATA and ASK together name every chunk from the job's `first` on once, in disk order; those before
are as in BASE. PATCH comes in the order of ASK, any time after its LEAVES; at most `window(chunk)` chunks wait
for one. BASE comes in pieces of BASE_CHUNKS, in order; the host stays at least BASE_AHEAD chunks ahead of what
it has heard of. A payload of pieces is a table of PIECE, then the bytes of those that are not zeros; the whole is
packed as `packing` says.

The direct channel is TLS, in which each side takes the other's one certificate and no other; both were made for
this run and came with the job. Only the agent writes to it.

The digest of a chunk is that of the digests of its grains, of GRAIN bytes each; that of a chunk of one grain is
the grain's. Zeros have the digest ZERO on every level.

The disk is opened read-only. When stdin ends the host is gone, and so is the agent, whatever it was doing.
"""
# ruff: noqa: UP006, UP032, UP035, RUF005

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import importlib
import itertools
import json
import mmap
import os
import queue
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from collections import deque
from typing import Any, Callable, Iterable, Iterator, List, Tuple

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
GRAIN = 64 << 10  # what a digest is made of, and what zeros inside a chunk are left out in
RUNS = {SAME: 64, ZEROS: 64, ASK: 16}  # chunks of one message, at most: progress is to move
BASE_CHUNKS = 4096  # digests of one BASE message
BASE_AHEAD = 8192
HANDSHAKE_SECONDS = 5.0
TLS_PIECE = 256 << 10  # bytes that are encrypted at a time
HELD = 64 << 10  # bytes of short messages that are held back
SHORT = 16 << 10  # bytes that are hashed without letting another thread in
CIPHERS = "ECDHE-ECDSA-AES128-GCM-SHA256"

_NOTHING = bytes(MAX_CHUNK)
_Queue = getattr(queue, "SimpleQueue", queue.Queue)  # type: Any
_ABSENT = (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOTDIR)


class Failure(Exception):
    """What the host is told before the agent ends; `offset` where a place on the disk is the reason."""

    def __init__(self, message: str, offset: Any = None) -> None:
        super().__init__(message)
        self.offset = offset


# Digests

Mac = Callable[[Any, int], List[bytes]]  # keyed digests, DIGEST bytes, of a buffer's pieces of that size


def is_zero(data: Any) -> bool:
    """Whether `data`, MAX_CHUNK bytes at most, is zeros. One memcmp, no copy, for any kind of buffer."""
    return _NOTHING.startswith(data)


def each(digest: Callable[[memoryview], bytes]) -> Mac:
    """Make a Mac of what digests one piece."""

    def mac(data: Any, size: int) -> List[bytes]:
        view = memoryview(data)
        return [digest(view[at : at + size]) for at in range(0, len(view), size)]

    return mac


def _blake2b(key: bytes) -> Mac:
    keyed = functools.partial(hashlib.blake2b, digest_size=DIGEST, key=key)
    return each(lambda data: keyed(data).digest())


def _blake3(key: bytes) -> Mac:
    blake3 = importlib.import_module("blake3").blake3  # type: Any
    return each(lambda data: blake3(data, key=key).digest(DIGEST))


@functools.lru_cache(None)
def _libcrypto(loader: Any) -> Any:
    """The C library of OpenSSL, as `loader` calls it; OSError where there is none."""
    for name in ("libcrypto.so.3", "libcrypto.so.1.1", "libcrypto.so.10", "libcrypto.so.1.0.0"):
        try:
            library = loader(name)
            library.EVP_CIPHER_CTX_new.restype = library.EVP_aes_128_gcm.restype = ctypes.c_void_p
        except (OSError, AttributeError):
            continue
        return library
    raise OSError("there is no libcrypto")


def _gmac(key: bytes) -> Mac:
    """AES-128-GMAC with one nonce: a keyed universal hash. Fast, and strong while nobody sees key and tags."""
    # What takes a microsecond keeps the interpreter's lock: to give it away and get it back takes longer.
    library, letting_go = _libcrypto(ctypes.PyDLL), _libcrypto(ctypes.CDLL)
    init, short, long = library.EVP_EncryptInit_ex, library.EVP_EncryptUpdate, letting_go.EVP_EncryptUpdate
    final, control = library.EVP_EncryptFinal_ex, library.EVP_CIPHER_CTX_ctrl
    pointer, nonce, local = ctypes.c_void_p, ctypes.create_string_buffer(key[16:28], 12), threading.local()

    def parts() -> Any:
        # Pointers made once, and no types declared for what is called: to check them takes as long as to hash a leaf.
        context, cipher = pointer(library.EVP_CIPHER_CTX_new()), pointer(library.EVP_aes_128_gcm())
        if not context or init(context, cipher, None, key[:16], nonce) != 1:
            raise OSError("libcrypto has no AES-128-GCM")
        local.parts = context, pointer(), ctypes.create_string_buffer(DIGEST), ctypes.byref(ctypes.c_int())
        return local.parts

    def mac(data: Any, size: int) -> List[bytes]:
        context, piece, tag, done = getattr(local, "parts", None) or parts()
        view, digests = memoryview(data), []  # type: memoryview, List[bytes]
        if view.readonly:
            view = memoryview(bytearray(view))
        start, length = ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view)
        update = long if size > SHORT else short
        for at in range(0, length, size):
            piece.value = start + at
            if (
                init(context, None, None, None, nonce) != 1
                or update(context, None, done, piece, min(size, length - at)) != 1
                or final(context, tag, done) != 1
                or control(context, 16, DIGEST, tag) != 1  # EVP_CTRL_GCM_GET_TAG
            ):
                raise Failure("libcrypto failed")
            digests.append(tag.raw)
        return digests

    return mac


HASHES = {"gmac": _gmac, "blake3": _blake3, "blake2b": _blake2b}  # name -> function of a key of 32 bytes
_KNOWN = {"gmac": "21c2eb20cd2214dbdf34c9b82ecb"}  # the digest of 16 zeros under a key of zeros


@functools.lru_cache(None)
def usable(name: str) -> bool:
    """Whether there is this hash here, and it computes what it should."""
    try:
        found = HASHES[name](bytes(32))(bytes(16), 16)[0]
    except (KeyError, ImportError, OSError, AttributeError, TypeError, ValueError):
        return False
    return _KNOWN.get(name, found.hex()) == found.hex()


def fastest(names: List[str], seconds: float = 0.05) -> str:
    """The fastest of the usable hashes in `names`, tried for `seconds` in all; "" when there is none."""
    data = bytearray(os.urandom(GRAIN))
    speeds = [(0.0, "")]
    for name in filter(usable, names):
        mac, done, began = HASHES[name](bytes(32)), 0, time.perf_counter()
        mac(data, GRAIN)  # the first one pays for what comes with it
        began = time.perf_counter()
        while time.perf_counter() < began + seconds / len(names):
            mac(data, GRAIN)
            done += 1
        speeds.append((done / (time.perf_counter() - began), name))
    return max(speeds)[1]


class Digester:
    """The digests of leaves, grains and chunks, all made with one keyed `mac`."""

    def __init__(self, mac: Mac) -> None:
        self._mac = mac
        # What the mac makes of so many zeros: to compare that is less than to look at each leaf beforehand.
        self._zeros = functools.lru_cache(None)(lambda size: mac(bytes(size), size)[0])

    def leaf(self, data: Any) -> bytes:
        """The digest of a leaf or a grain."""
        return ZERO if is_zero(data) else self._mac(data, len(data))[0]

    def leaves(self, data: Any, size: int) -> List[bytes]:
        """The digests of all leaves of `size` bytes of a grain."""
        zeros = {self._zeros(size), self._zeros(len(data) % size or size)}
        return [ZERO if digest in zeros else digest for digest in self._mac(data, size)]

    def grains(self, data: Any) -> List[bytes]:
        """The digests of the grains of a chunk."""
        view, digests = memoryview(data), []  # type: memoryview, List[bytes]
        starts = range(0, len(view), GRAIN)
        for zeros, run in itertools.groupby(starts, lambda start: is_zero(view[start : start + GRAIN])):
            alike = list(run)  # all that are not zeros in one call of the mac
            digests += [ZERO] * len(alike) if zeros else self._mac(view[alike[0] : alike[-1] + GRAIN], GRAIN)
        return digests

    def of(self, grains: List[bytes]) -> bytes:
        """The digest of a chunk with such grains."""
        return grains[0] if len(grains) == 1 else self.leaf(b"".join(grains))

    def __call__(self, data: Any) -> bytes:
        """The digest of a chunk."""
        return self.of(self.grains(data))


def root(size: int, chunk: int, name: str) -> Any:
    """A hash object to be fed with the digests of chunks in order; its hexdigest names them all."""
    return hashlib.blake2b("{} {} {}\n".format(size, chunk, name).encode(), digest_size=16)


def window(chunk: int) -> int:
    """How many chunks may wait for leaves at a time: 64 MiB of them, or 16."""
    return max(16, (64 << 20) // chunk)


def ordered(work: Callable[[Any], Any], items: Iterable[Any], threads: int, ahead: int) -> Iterator[Any]:
    """Yield work(item) in the order of `items`, never more than `ahead` of them in memory.

    The threads end by themselves. concurrent.futures would take longer to import than a small disk to read.
    """
    todo = _Queue()

    def serve() -> None:
        for item, done in iter(todo.get, None):
            try:
                done.put((work(item), None))
            except Exception as error:  # noqa: BLE001  (raised where the result is due)
                done.put((None, error))

    for _ in range(threads):
        threading.Thread(target=serve, daemon=True).start()
    pending = deque()  # type: deque[Any]

    def first() -> Any:
        result, error = pending.popleft().get()
        if error is not None:
            raise error
        return result

    try:
        for item in items:
            pending.append(_Queue())
            todo.put((item, pending[-1]))
            if len(pending) >= ahead:
                yield first()
        while pending:
            yield first()
    finally:
        for _ in range(threads):
            todo.put(None)


# Pieces

Pieces = List[Tuple[int, int, bool]]  # start within the chunk, length, is it zeros


def add_piece(pieces: Pieces, start: int, length: int, zero: bool) -> None:
    """Append a piece, as part of the one before it where they touch and are of one kind."""
    if pieces and pieces[-1][2] == zero and pieces[-1][0] + pieces[-1][1] == start:
        start, length = pieces[-1][0], pieces[-1][1] + length
        pieces.pop()
    pieces.append((start, length, zero))


def content(grains: List[bytes], length: int) -> Pieces:
    """The pieces of a chunk that are not zeros."""
    pieces = []  # type: Pieces
    for number, digest in enumerate(grains):
        if digest != ZERO:
            add_piece(pieces, number * GRAIN, min(GRAIN, length - number * GRAIN), False)
    return pieces


def layout(pieces: Pieces, data: Any) -> List[Any]:
    """The payload for `pieces` of `data`, not packed: buffers."""
    table = b"".join(PIECE.pack(*piece) for piece in pieces)
    return [table] + [data[start : start + length] for start, length, zero in pieces if not zero]


# Compression


@functools.lru_cache(None)
def _libzstd() -> Any:
    """The C library of Zstandard, which Debian and Ubuntu cannot do without; OSError where there is none."""
    library = ctypes.CDLL("libzstd.so.1")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.ZSTD_createCCtx.restype = pointer
    library.ZSTD_compressCCtx.restype = size
    library.ZSTD_compressCCtx.argtypes = (pointer, pointer, size, pointer, size, ctypes.c_int)
    library.ZSTD_compressBound.restype = size
    library.ZSTD_compressBound.argtypes = (size,)
    return library


def zstd() -> Callable[[bytes], bytes]:
    """A function that packs as one Zstandard frame, level 1, in any thread. OSError where there is none."""
    library, local = _libzstd(), threading.local()

    def pack(data: bytes) -> bytes:
        most = library.ZSTD_compressBound(len(data))
        if not hasattr(local, "context"):
            local.context, local.room = library.ZSTD_createCCtx(), b""
        if len(local.room) < most:
            local.room = ctypes.create_string_buffer(most)
        size = library.ZSTD_compressCCtx(local.context, local.room, most, data, len(data), 1)
        return ctypes.string_at(local.room, size) if size <= most else data  # error codes are huge numbers

    return pack


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


class Packer:
    """Packs payloads: never, always, or "auto": as long as that is faster than to send them as they are.

    `line` is how fast the line takes what is written. Packing pays where all threads together pack faster than
    the line takes it, with much room to spare: the line may be slow only because processors are busy already.
    """

    def __init__(self, mode: str, methods: List[str], line: Rate, threads: int) -> None:
        self.mode, self.line, self.threads = mode, line, threads
        self.method, self.pack = ZLIB, lambda data: zlib.compress(data, 1)  # type: int, Callable[[bytes], bytes]
        self.speed = Rate(60e6)
        if "zstd" in methods:
            with contextlib.suppress(OSError, AttributeError):
                self.method, self.pack, self.speed = ZSTD, zstd(), Rate(400e6)

    def packed(self, buffers: List[Any]) -> Tuple[int, List[Any]]:
        """How they are packed, and the buffers of that."""
        if self.mode == "none" or len(buffers) < 2:
            return RAW, buffers
        if self.mode == "auto" and self.threads * self.speed.now() < 3 * self.line.now():
            return RAW, buffers
        sample = bytes(buffers[1][:16384])
        # Trying in vain costs more than everything else here, so a sample decides.
        if len(self.pack(sample)) < 0.9 * len(sample):
            began = time.perf_counter()
            whole = b"".join(buffers)
            smaller = self.pack(whole)
            self.speed.add(len(whole), time.perf_counter() - began)
            if len(smaller) < len(whole):
                return self.method, [smaller]
        return RAW, buffers


# Ways to the host


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


def tls_context(server: bool, certificate: str, key: str, peer: str) -> ssl.SSLContext:
    """TLS that proves itself with `certificate` and `key` and takes `peer` and nobody else, all PEM.

    Python loads certificates from files only. Pipes are such, and never lie on a disk.
    """
    side = "PROTOCOL_TLS_SERVER" if server else "PROTOCOL_TLS_CLIENT"
    context = ssl.SSLContext(getattr(ssl, side, ssl.PROTOCOL_SSLv23))
    context.check_hostname = False  # there are no names: the certificate itself is compared
    context.verify_mode = ssl.CERT_REQUIRED
    # Up to 1.2 Python lets us choose AES-128, the fastest there is here.
    if hasattr(context, "maximum_version"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        context.options |= getattr(ssl, "OP_NO_TLSv1_3", 0) | ssl.OP_NO_TLSv1_1 | ssl.OP_NO_TLSv1
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    context.set_ciphers(CIPHERS)
    context.load_verify_locations(cadata=peer)
    ends = []
    try:
        for text in (certificate, key):
            read, write = os.pipe()
            ends.append(read)
            os.write(write, text.encode())
            os.close(write)
        context.load_cert_chain(*("/proc/self/fd/{}".format(end) for end in ends))
    finally:
        for end in ends:
            os.close(end)
    return context


class Tls:
    """One side of a TLS connection, which either only writes or only reads, after `shake_hands`.

    Many records are passed to and from the socket at a time: Python's own SSLSocket takes two system calls for each
    of 16 KiB.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, server: bool) -> None:
        self._socket = connection
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)
        self._room = memoryview(bytearray(TLS_PIECE))

    def shake_hands(self, peer: str) -> None:
        """Make sure that `peer` (PEM) is at the other end; OSError (as ssl.SSLError is) where it is not."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
        self._flush()
        if self._tls.getpeercert(True) != ssl.PEM_cert_to_DER_cert(peer):
            raise OSError("somebody else is at the other end")

    def write(self, buffers: List[Any]) -> None:
        """Write all of some buffers."""
        for buffer in buffers:
            view = memoryview(buffer)
            for at in range(0, len(view), TLS_PIECE):
                self._tls.write(view[at : at + TLS_PIECE])
                if self._out.pending >= TLS_PIECE:
                    self._flush()
        self._flush()

    def read_into(self, view: memoryview) -> int:
        """What has come, at least one byte, into `view`: how many. EOFError where the connection has ended."""
        read, at, size = self._tls.read, 0, len(view)
        while at < size:
            try:
                done = read(size - at, view[at:])  # type: Any
            except ssl.SSLWantReadError:
                if at:
                    break
                self._fill()
                continue
            if not done:
                raise EOFError
            at += done
        return at

    def close(self) -> None:
        """Break off, whatever is under way."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _flush(self) -> None:
        if self._out.pending:
            self._socket.sendall(self._out.read())

    def _fill(self) -> None:
        done = self._socket.recv_into(self._room)
        if not done:
            raise EOFError
        self._in.write(self._room[:done])


class Listener:
    """Waits at a port of this host for the host to come: who else comes is sent away."""

    def __init__(self, address: str, offer: Any) -> None:
        self._context = tls_context(True, offer["certificate"], offer["key"], offer["peer"])
        self._peer, self._come = offer["peer"], queue.Queue()  # type: str, queue.Queue[Tls]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, offer["port"]))
        self._socket.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(HANDSHAKE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = Tls(connection, self._context, True)
            tls.shake_hands(self._peer)
            connection.settimeout(None)
            self._come.put(tls)
        except (OSError, EOFError, ValueError):
            connection.close()

    def host(self) -> Tls:
        """The connection of the host, which says that it has come. Nobody else is let in any more."""
        try:
            tls = self._come.get(timeout=HANDSHAKE_SECONDS)
        except queue.Empty:
            raise Failure("the host did not come to the direct channel") from None
        self.close()
        return tls

    def close(self) -> None:
        """Listen no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


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
        self.others = _Queue()  # of kind, index, count, payload
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


class Scan:
    """One disk, compared with what the host says. `look` runs in several threads, all else in one."""

    threads = 2

    def __init__(self, job: Any, name: str, heard: Input, out: Output) -> None:
        self.size, self.chunk, self.leaf = job["size"], job["chunk"], job["leaf"]  # type: int, int, int
        self.digester = Digester(HASHES[name](bytes.fromhex(job["key"])))
        self.fresh = job["choose"]  # nothing is known of the destination, or only that it is empty
        self.heard, self.out, self.first, self.fd, self.device = heard, out, job["first"], -1, ""
        self.root = root(self.size, self.chunk, name)
        self.ahead = max(self.threads + 1, min(4, (4 << 20) // self.chunk))
        self.packer = Packer(job["compress"], job["packings"], out.line, self.threads)
        self.buffers = _Queue()
        for _ in range(self.ahead + 1):
            self.buffers.put(mmap.mmap(-1, self.chunk))  # pages, which take no memory before they are used
        self.spare = memoryview(mmap.mmap(-1, self.chunk))
        self.asked = deque()  # type: deque[Any]
        self.answered = {}  # type: Any

    def run(self) -> None:
        """Look at every chunk from `first` on and write what is to be said of it, then END."""
        out, room = self.out, window(self.chunk)
        chunks = range(self.first, -(-self.size // self.chunk))
        for kind, index, digest, found in ordered(self.look, chunks, self.threads, self.ahead):
            self.root.update(digest)
            if kind == DATA:
                out.flush()
                packing, pieces, buffers, lent = found
                out.send(DATA, index, pieces, digest, packing, buffers)
                if lent is not None:
                    self.buffers.put(lent)
            else:
                out.run(kind, index, found)
            if kind == ASK:
                self.asked.append((index, digest))
            if index % BASE_CHUNKS == 0:
                self.heard.forget(index)
            self.patch(room - 1)
        out.flush()
        self.patch(0)
        out.send_json(END, {"root": self.root.hexdigest()})

    def look(self, index: int) -> Tuple[int, int, bytes, Any]:
        """Read chunk `index`: what it is, its digest, and what else its message needs."""
        lent = self.buffers.get()
        offset = index * self.chunk
        data = memoryview(lent)[: min(self.chunk, self.size - offset)]
        self.read(offset, data)
        grains = self.digester.grains(data)
        digest = self.digester.of(grains)
        had = self.heard.base(index)
        found = b""  # type: Any
        if digest == had != UNKNOWN:
            kind = SAME
        elif digest == ZERO:
            kind = ZEROS
        elif self.leaf and (had != ZERO or self.sparse(grains, data)):
            kind, found = ASK, b"".join(grains)
        else:
            pieces = content(grains, len(data))
            packing, buffers = self.packer.packed(layout(pieces, data))
            kind, found = DATA, (packing, len(pieces), buffers, lent if packing == RAW else None)
        if kind != ASK:  # the kernel is to keep what will be asked for again
            self.drop(offset, len(data))
        if kind != DATA or found[3] is None:
            self.buffers.put(lent)
        return kind, index, digest, found

    def sparse(self, grains: List[bytes], data: Any) -> bool:
        """Whether leaves of a chunk where there were zeros are worth a question: DATA is of whole grains."""
        if self.fresh or self.leaf >= GRAIN:
            return False
        used = [data[at * GRAIN : (at + 1) * GRAIN] for at, digest in enumerate(grains) if digest != ZERO]
        leaves = [grain[at : at + self.leaf] for grain in used for at in range(0, len(grain), self.leaf)]
        return 2 * sum(map(is_zero, leaves)) > len(leaves)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` from the disk. Failure naming the place when it cannot be read."""
        while len(view):
            try:
                if hasattr(os, "preadv"):
                    done = os.preadv(self.fd, [view], offset)
                else:
                    part = os.pread(self.fd, len(view), offset)
                    done = len(part)
                    view[:done] = part
            except OSError as error:
                text = "cannot read {} at offset {}: {}".format(self.device, offset, error.strerror)
                raise Failure(text, offset) from error
            if not done:
                raise Failure("{} ends at offset {}: no longer attached".format(self.device, offset), offset)
            offset, view = offset + done, view[done:]

    def drop(self, offset: int, length: int) -> None:
        """Let the kernel forget what was read: a disk is larger than memory."""
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def patch(self, room: int) -> None:
        """Once more than `room` chunks are asked for, PATCH half of them: in bulk, each takes less."""
        if len(self.asked) <= room:
            return
        self.out.flush()
        while len(self.asked) > room // 2:
            index, digest = self.asked[0]
            while index not in self.answered:
                if self.heard.others.empty():
                    self.out.release()
                kind, which, count, payload = self.heard.others.get()
                if kind != LEAVES:
                    raise Failure("the host sent message {} where LEAVES are due".format(kind))
                self.answered[which] = count, payload
            pieces, data = self.differing(index, *self.answered.pop(index))
            packing, buffers = self.packer.packed(layout(pieces, data))
            self.out.send(PATCH, index, len(pieces), digest, packing, buffers, hold=True)
            self.asked.popleft()

    def differing(self, index: int, count: int, told: bytes) -> Tuple[Pieces, memoryview]:
        """The leaves of a chunk that are not as the host has told, and where they are."""
        offset = index * self.chunk
        data = self.spare[: min(self.chunk, self.size - offset)]
        at, pieces = NUMBER.size * count, []  # type: int, Pieces
        if at > len(told):
            raise Failure("the host sent {} bytes of leaves for chunk {}".format(len(told), index))
        for (number,) in NUMBER.iter_unpack(told[:at]):
            start = number * GRAIN
            stop = min(start + GRAIN, len(data))
            if not start < stop:
                raise Failure("the host asked for grain {} of chunk {}".format(number, index))
            self.read(offset + start, data[start:stop])
            mine = [UNKNOWN]  # a leaf that is as large as a grain, which differs
            if self.leaf < GRAIN:
                mine = self.digester.leaves(data[start:stop], self.leaf)
            for piece, digest in enumerate(mine):
                if self.leaf >= GRAIN or digest != told[at : at + DIGEST]:
                    first = start + piece * self.leaf
                    length = min(self.leaf, stop - first)
                    add_piece(pieces, first, length, is_zero(data[first : first + length]))
                if self.leaf < GRAIN:
                    at += DIGEST
        if at != len(told):
            raise Failure("the host sent {} bytes of leaves for chunk {}".format(len(told), index))
        self.drop(offset, len(data))
        return pieces, data


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


def receive(fd: int) -> Any:
    """The job of the host."""
    kind, _, _, _, length, _ = HEAD.unpack(read_exactly(fd, HEAD.size))
    if kind != JOB or length > MAX_JSON:
        raise Failure("the host did not begin with a job")
    return json.loads(read_exactly(fd, length).decode())


def chosen(job: Any) -> str:
    """The hash for a job. Failure where there is none."""
    names = list(filter(usable, job["hashes"]))
    if not names:
        raise Failure("no hash {} in Python {}".format(", ".join(job["hashes"]), sys.version.split()[0]))
    return fastest(names) if job["choose"] else names[0]


def listener(offer: Any) -> Tuple[Any, str]:
    """The listener for the direct channel that the job offers; or why there is none."""
    if not offer:
        return None, "not wanted"
    address = sys.argv[1] if len(sys.argv) > 1 else ""
    if not address:
        return None, "the SSH server did not tell the address of the connection"
    try:
        return Listener(address, offer), ""
    except (OSError, ValueError) as error:
        return None, "cannot listen at {} port {}: {}".format(address, offer["port"], error)


def main() -> None:
    """Serve one disk, then end the process.

    The job: {"device_candidates": paths, "size", "chunk", "first": chunk, "leaf": bytes or 0, "hashes": names, of
    which the first usable one is taken, or with "choose" the fastest, "key": hex, "compress": "none", "auto" or
    "always", "packings": names that the host knows besides zlib, "wait": seconds for a device to appear, "direct":
    null or {"port", "certificate", "key", "peer"}}.
    """
    out = Output(pipe_writer(1))
    try:
        with contextlib.suppress(OSError):  # only a wish; F_SETPIPE_SZ: fewer switches
            fcntl.fcntl(1, 1031, 1 << 20)
        job = receive(0)
        heard = Input(0, job["first"])
        name = chosen(job)
        scan = Scan(job, name, heard, out)
        direct, why = listener(job["direct"])
        scan.fd, scan.device = open_device(job["device_candidates"], job["size"], job["wait"])
        ready = {"device": scan.device, "size": scan.size, "hash": name, "why": why}
        port = job["direct"]["port"] if direct else 0
        out.send_json(READY, dict(ready, port=port, python=sys.version.split()[0]))
        if heard.go() and direct:
            out.write = direct.host().write
        elif direct:
            direct.close()
        scan.run()
    except (EOFError, BrokenPipeError, ConnectionError):
        os._exit(0)
    except Exception as error:  # noqa: BLE001  (the end of the program: the host must hear of it)
        name = type(error).__name__
        # The text of a fault of ours stays here: it might hold content of the disk.
        message = str(error) if isinstance(error, Failure) else "fault of the agent: {}".format(name)
        last = {"error": name, "message": message, "offset": getattr(error, "offset", None)}
        with contextlib.suppress(OSError):
            out.send_json(ERROR, last)
        os._exit(1)
    os._exit(0)  # not `return`: a listener is still blocked on stdin


if __name__ == "__main__":
    main()
