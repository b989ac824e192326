"""The content of a chunk as it comes from the agent: checked before it is believed, unpacked no further than it may."""

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

_PART = 64 << 10  # bytes that are unpacked at a time
_ZSTD_WINDOW = 23  # log2 of the memory that unpacking may take: a chunk is 4 MiB at most


class Damaged(Exception):
    """What is wrong with a payload."""


class Rooms:
    """Pages for the chunks in hand, `size` bytes each, which are used again: malloc would keep some for every thread.

    For threads: a deque is safe without a lock.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: deque[mmap.mmap] = deque()

    def take(self) -> mmap.mmap:
        """A room, with whatever was in it before."""
        try:
            return self._free.popleft()
        except IndexError:
            return mmap.mmap(-1, self._size)

    def give_back(self, room: mmap.mmap) -> None:
        """Nobody needs what is in it any more."""
        self._free.append(room)


def pieces(body: memoryview, count: int, length: int) -> list[Piece]:
    """The `count` pieces in an unpacked payload: in order, within `length`, every byte of it in one of them."""
    at = PIECE.size * count
    if at > len(body):
        raise Damaged("arrived with fewer pieces than announced")
    found: list[Piece] = []
    last = 0
    for start, size, zero in PIECE.iter_unpack(body[:at]):
        stop = at if zero else at + size
        if start < last or not 0 < size <= length - start or stop > len(body):
            raise Damaged("arrived in pieces that do not fit")
        found.append((start, size, body[at:stop]))
        at, last = stop, start + size
    if at != len(body):
        raise Damaged("arrived with bytes that belong to no piece")
    return found


def unpacked(packing: int, packed: memoryview, most: int) -> memoryview:
    """A payload without its compression: `most` bytes at most."""
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
    # Into pages of its own, and by small parts on both sides: what malloc takes stays behind in each thread's part
    # of the heap, and a ZstdDecompressor keeps a copy of what it has been given and not yet unpacked.
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
            rest = getattr(inflate, "unconsumed_tail", b"")  # zlib's
            if len(part) < room:
                break
    if not inflate.eof or inflate.unused_data:
        raise Damaged("arrived damaged")
    return body[:size]
