"""Space on a file system for what a file is going to hold: reserved before it is needed, released, or shared.

A file system that writes in place keeps the space that was reserved. A copy-on-write file system (btrfs) writes
everything to new blocks, so nothing can be reserved there; instead, one file takes over the blocks of another
(`reflink`). On any other file system, `reserve` only checks how much space is free at the moment.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

_KEEP_SIZE, _PUNCH_HOLE, _UNSHARE = 1, 2, 0x40
_FICLONERANGE = 0x4020940D  # linux/fs.h
_BTRFS = 0x9123683E
NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NOT_SHARED = (*NOT_SUPPORTED, errno.EXDEV, errno.ENOTTY, errno.EPERM, errno.EACCES, errno.ETXTBSY)


def reserve(fd: int, extents: Iterable[tuple[int, int]], written: Callable[[int, int], bool]) -> bool:
    """Reserve the space for writing these extents, which are in order. Returns whether any was reserved.

    `written(offset, length)`: whether anything but zeros will be written there; if not, nothing is reserved. Extents
    may lie beyond the end of the file. Its content stays the same, and blocks that it shares with another file become
    its own. Raises OSError if there is not enough space.
    """
    left = iter(extents)
    first = next((extent for extent in left if written(*extent)), None)
    if first is None:
        return False
    if _allocate(fd, _UNSHARE, first):
        for extent in left:
            if written(*extent):
                _allocate(fd, _UNSHARE, extent)
        return True
    reserved, needed = False, 0
    for hole in holes(fd, chain([first], left)):
        if not written(*hole):
            continue
        if _allocate(fd, 0, hole):
            reserved = True
        else:
            needed += hole[1]
    free = os.fstatvfs(fd) if needed else None
    if free is not None and free.f_bavail * free.f_frsize < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return reserved


def _allocate(fd: int, mode: int, extent: tuple[int, int]) -> bool:
    """Allocate an extent; False if the file system cannot do that."""
    try:
        _fallocate(fd, mode | _KEEP_SIZE, *extent)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True


def release(fd: int, extents: Iterable[tuple[int, int]]) -> None:
    """Release the space that `reserve` has reserved and that was not written to. The file keeps its size."""
    for hole in holes(fd, extents):
        punch(fd, *hole)
    os.ftruncate(fd, os.fstat(fd).st_size)  # releases what was reserved beyond the end


def holes(fd: int, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the parts of the extents, which are in order, in which the file has no data."""
    begin = end = 0  # of the data found last
    for offset, length in extents:
        last = offset + length
        while offset < last:
            if offset >= end:
                begin, end = _data(fd, offset)
            if offset < begin:
                yield offset, min(begin, last) - offset
            offset = min(max(offset, end), last) if begin < last else last


def _data(fd: int, offset: int) -> tuple[int, int]:
    """The start and end of the first data at or after `offset`."""
    try:
        begin = os.lseek(fd, offset, os.SEEK_DATA)
        return begin, os.lseek(fd, begin, os.SEEK_HOLE)
    except OSError as error:
        # ENXIO: there is none. Any other error: the file system does not report holes.
        return (_NEVER, _NEVER) if error.errno == errno.ENXIO else (offset, _NEVER)


_NEVER = (1 << 63) - 1


def punch(fd: int, offset: int, length: int) -> None:
    """Make the range a hole. Raises OSError if that is impossible."""
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def is_copied_on_write(fd: int) -> bool:
    """Whether the file system writes to new blocks even when data is overwritten, so that each write needs space."""
    statfs = (ctypes.c_long * 64)()
    fstatfs = _library("fstatfs")
    return fstatfs is not None and not fstatfs(fd, statfs) and statfs[0] & 0xFFFFFFFF == _BTRFS


def reflink(fd: int, source: int, offset: int, length: int) -> bool:
    """Make the range share the blocks of the same range of the file `source`; False if that is impossible."""
    try:
        fcntl.ioctl(fd, _FICLONERANGE, struct.pack("qQQQ", source, offset, length, offset))
    except OSError as error:
        if error.errno not in _NOT_SHARED:
            raise
        return False
    return True


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    fallocate = _library("fallocate64")
    if fallocate is None:
        raise OSError(errno.ENOSYS, "no fallocate")
    if fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@functools.cache
def _library(name: str) -> Callable[..., Any] | None:
    """A function of the C library; None if it does not exist."""
    try:
        function: Callable[..., Any] = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    return function
