"""Chunk payloads from the agent: validated before use, and never unpacked beyond their size limit."""

from __future__ import annotations

import mmap
import sys
import zlib
from collections import deque
from typing import Any

from ..agent.wire import PIECE, RAW, ZLIB, ZSTD
from .reader import Piece

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_PART = 64 << 10  # bytes unpacked at a time
_ZSTD_WINDOW = 23  # log2 of the memory that unpacking may use: a chunk has at most 4 MiB


class Damaged(Exception):
    """A payload is invalid; the message completes the sentence "the chunk ..."."""


class Rooms:
    """Reusable buffers of `size` bytes for chunks in flight; with malloc, each thread's arena would retain some.

    Thread-safe: a deque's append and popleft are atomic.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: deque[mmap.mmap] = deque()

    def take(self) -> mmap.mmap:
        """A buffer, with whatever it held before."""
        try:
            return self._free.popleft()
        except IndexError:
            return mmap.mmap(-1, self._size)

    def give_back(self, room: mmap.mmap) -> None:
        """Make a buffer available again; its content is no longer needed."""
        self._free.append(room)


def pieces(body: memoryview, count: int, length: int) -> list[Piece]:
    """The `count` pieces of an unpacked payload.

    They must be in order, lie within `length` and use up every byte of `body`; otherwise Damaged is raised.
    """
    at = PIECE.size * count
    if at > len(body):
        raise Damaged("arrived with fewer pieces than announced")
    parsed: list[Piece] = []
    previous_end = 0
    for start, size, zero in PIECE.iter_unpack(body[:at]):
        stop = at if zero else at + size
        if start < previous_end or not 0 < size <= length - start or stop > len(body):
            raise Damaged("arrived in pieces that do not fit")
        parsed.append((start, size, body[at:stop]))
        at, previous_end = stop, start + size
    if at != len(body):
        raise Damaged("arrived with bytes that belong to no piece")
    return parsed


def unpacked(packing: int, packed: memoryview, most: int) -> memoryview:
    """A payload, decompressed to at most `most` bytes; Damaged if it is larger or invalid."""
    if packing == RAW:
        return packed
    inflate: Any
    if packing == ZLIB:
        inflate = zlib.decompressobj()
    elif packing == ZSTD:
        inflate = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW})
    else:
        raise Damaged("arrived damaged")
    try:
        return _inflated(inflate, packed, most)
    except (zlib.error, zstd.ZstdError) as error:
        raise Damaged("arrived damaged") from error


def _inflated(inflate: Any, packed: memoryview, most: int) -> memoryview:
    # Unpack into pages of our own, in small parts on both sides: memory from malloc would stay in each thread's
    # arena, and a ZstdDecompressor copies the input that it has not unpacked yet.
    body, size = memoryview(mmap.mmap(-1, most)), 0
    for at in range(0, len(packed), _PART):
        if inflate.eof:
            raise Damaged("arrived with bytes after its end")
        rest: Any = packed[at : at + _PART]
        while not inflate.eof and size < most:
            room = min(_PART, most - size)
            part = inflate.decompress(rest, room)
            body[size : size + len(part)] = part
            size += len(part)
            rest = getattr(inflate, "unconsumed_tail", b"")  # only zlib has it
            if len(part) < room:
                break
    if not inflate.eof or inflate.unused_data:
        raise Damaged("arrived damaged")
    return body[:size]
