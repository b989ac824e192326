"""Payloads: the pieces of a chunk, and their compression."""

import contextlib
import ctypes
import functools
import threading
import time
import zlib
from typing import Any, Callable, List, Tuple

from .wire import GRAIN, PIECE, RAW, ZERO, ZLIB, ZSTD, Payload, Rate

Pieces = List[Tuple[int, int, bool]]  # start within the chunk, length, whether it is zeros
_SAMPLES, _SAMPLE = 4, 4096  # of a payload: how many, of how many bytes
_WORTH = 0.97  # what a sample must shrink to: a part of a chunk may be all that can be compressed


def add_piece(pieces: Pieces, start: int, length: int, *, zero: bool) -> None:
    """Append a piece; merge it into the last one if the two are adjacent and of the same kind."""
    if pieces and pieces[-1][2] == zero and pieces[-1][0] + pieces[-1][1] == start:
        start, length = pieces[-1][0], pieces[-1][1] + length
        pieces.pop()
    pieces.append((start, length, zero))


def content(grains: List[bytes], length: int) -> Pieces:
    """The pieces of a chunk that are not zeros."""
    pieces = []  # type: Pieces
    for number, digest in enumerate(grains):
        if digest != ZERO:
            add_piece(pieces, number * GRAIN, min(GRAIN, length - number * GRAIN), zero=False)
    return pieces


def layout(pieces: Pieces, data: Any) -> List[Any]:
    """The payload for `pieces` of `data`, uncompressed, as a list of buffers."""
    table = b"".join(PIECE.pack(*piece) for piece in pieces)
    return [table] + [data[start : start + length] for start, length, zero in pieces if not zero]


def _sample(buffers: List[Any]) -> bytes:
    """Some bytes of the content, from places all over it: the start of a chunk says little of its rest."""
    parts = []
    step = max(1, sum(len(buffer) for buffer in buffers) // _SAMPLES)
    at = 0  # of the next sample, in the present buffer
    for buffer in buffers:
        while at < len(buffer):
            parts.append(bytes(buffer[at : at + min(_SAMPLE, step)]))
            at += step
        at -= len(buffer)
    return b"".join(parts)


@functools.lru_cache(None)
def _libzstd() -> Any:
    """Zstandard's C library, which every Debian and Ubuntu has; OSError if it is missing."""
    library = ctypes.CDLL("libzstd.so.1")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.ZSTD_createCCtx.restype = pointer
    library.ZSTD_compressCCtx.restype = size
    library.ZSTD_compressCCtx.argtypes = (pointer, pointer, size, pointer, size, ctypes.c_int)
    library.ZSTD_compressBound.restype = size
    library.ZSTD_compressBound.argtypes = (size,)
    return library


def zstd() -> Callable[[bytes], bytes]:
    """A thread-safe function that compresses data to one Zstandard frame, level 1. OSError if it is missing."""
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


class Packer:
    """Compresses payloads: "none", "always", or "auto", that is, as long as it is faster than sending them raw.

    `line`: the measured rate of writes to the host. Compression pays if all threads together compress much faster
    than that; the margin is needed because writes may be slow only for lack of processor time.
    """

    def __init__(self, mode: str, methods: List[str], line: Rate, threads: int) -> None:
        self.mode, self.line, self.threads = mode, line, threads
        self.method, self.pack = ZLIB, lambda data: zlib.compress(data, 1)  # type: int, Callable[[bytes], bytes]
        self.speed = Rate(60e6)
        if "zstd" in methods:
            with contextlib.suppress(OSError, AttributeError):
                self.method, self.pack, self.speed = ZSTD, zstd(), Rate(400e6)

    def packed(self, buffers: List[Any]) -> Payload:
        """`buffers` as a payload, compressed or not."""
        if self.mode == "none" or len(buffers) < 2:
            return RAW, buffers
        if self.mode == "auto" and self.threads * self.speed.now() < 3 * self.line.now():
            return RAW, buffers
        # Compressing in vain costs more than everything else here, so a sample decides.
        sample = _sample(buffers[1:])
        if len(self.pack(sample)) < _WORTH * len(sample):
            began = time.perf_counter()
            whole = b"".join(buffers)
            smaller = self.pack(whole)
            self.speed.add(len(whole), time.perf_counter() - began)
            if len(smaller) < len(whole):
                return self.method, [smaller]
        return RAW, buffers
