"""Room on a file system for what an image is going to hold: taken before it is needed, given back, or shared.

A file system that writes in place keeps the room that was taken. One that writes everything to another place (btrfs)
has none to take; there the blocks of one file become those of another. Any other one can only be asked how much is free
at the moment.
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


def take(fd: int, extents: Iterable[tuple[int, int]], written: Callable[[int, int], bool]) -> bool:
    """Take the room for writing these extents, given in order, some perhaps beyond the end. Whether any was taken.

    Of what is to become zeros none is: `written` tells of an offset and a length whether it is to hold anything else.
    What the file holds stays as it is. Blocks that it shares with another file become its own. OSError where there is
    not enough.
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
    taken, untaken = False, 0
    for hole in holes(fd, chain([first], left)):
        if not written(*hole):
            continue
        if _allocate(fd, 0, hole):
            taken = True
        else:
            untaken += hole[1]
    there = os.fstatvfs(fd) if untaken else None
    if there is not None and there.f_bavail * there.f_frsize < untaken:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return taken


def _allocate(fd: int, mode: int, extent: tuple[int, int]) -> bool:
    """False where the file system cannot do that."""
    try:
        _fallocate(fd, mode | _KEEP_SIZE, *extent)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True


def give_back(fd: int, extents: Iterable[tuple[int, int]]) -> None:
    """Give back the room that `take` has taken, and that was not written to. The file's size stays."""
    for hole in holes(fd, extents):
        punch(fd, *hole)
    os.ftruncate(fd, os.fstat(fd).st_size)  # what lies beyond the end


def holes(fd: int, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of the extents, given in order, that the file has no data in."""
    begin = end = 0  # of the data that was found last
    for offset, length in extents:
        last = offset + length
        while offset < last:
            if offset >= end:
                begin, end = _data(fd, offset)
            if offset < begin:
                yield offset, min(begin, last) - offset
            offset = min(max(offset, end), last) if begin < last else last


def _data(fd: int, offset: int) -> tuple[int, int]:
    """The first data at or after `offset`: its start and its end."""
    try:
        begin = os.lseek(fd, offset, os.SEEK_DATA)
        return begin, os.lseek(fd, begin, os.SEEK_HOLE)
    except OSError as error:
        # ENXIO: there is none. Else the file system tells of no holes.
        return (_NEVER, _NEVER) if error.errno == errno.ENXIO else (offset, _NEVER)


_NEVER = (1 << 63) - 1


def punch(fd: int, offset: int, length: int) -> None:
    """Make the range a hole. OSError when that cannot be."""
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def is_copied_on_write(fd: int) -> bool:
    """Whether the file system writes what is overwritten to another place, which takes room at each write."""
    found = (ctypes.c_long * 64)()
    fstatfs = _library("fstatfs")
    return fstatfs is not None and not fstatfs(fd, found) and found[0] & 0xFFFFFFFF == _BTRFS


def share(fd: int, source: int, offset: int, length: int) -> bool:
    """Let the range be that of the file `source`, in the same blocks; False where that cannot be."""
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
    """A function of the C library; None where it has none of that name."""
    try:
        function: Callable[..., Any] = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    return function
