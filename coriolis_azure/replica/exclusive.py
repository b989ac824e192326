"""Detects whether other programs use an image or a device, and keeps them out while we write.

* A block device is opened with O_EXCL: refused while it or a partition of it is mounted, is swap, or belongs to LVM,
  RAID or another mapping.
* The kernel grants no read lease on a file that any program has open for writing, and no write lease on one that any
  other program has open at all.
* QEMU locks bytes 100 to 263 of its images (`block/file-posix.c`). We lock them too, so we are refused while QEMU has
  the image open, and QEMU or another run is refused while we have. A disk and its partitions are checked together.
* A loop device names the file or device below it in /sys; it does not open a device with O_EXCL.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InvalidInput
from . import devices, statefiles

_QEMU_FIRST, _QEMU_LENGTH = 100, 200
_BUSY = (errno.EAGAIN, errno.EACCES)
_LOOPS = Path("/sys/block")
_BLKROGET = 0x125E  # asks the kernel whether a block device is read-only


def open_device(path: Path) -> int:
    """Open a block device exclusively, for reading and writing.

    Raises InvalidInput if something else uses it, or if it cannot be written.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise InvalidInput(
            f"{path} is in use: mounted, swap, part of LVM, RAID or another mapping, or written by another run",
            remedy=f"Release it (lsblk {path} shows what uses it), or choose another device.",
        ) from error
    return _checked(fd, path, _refuse_read_only, _lock, refuse_loops, _refuse_relatives, _refuse_below)


def open_file(path: Path) -> int:
    """Open our file exclusively, for reading and writing. Raises InvalidInput if QEMU or another run has it open."""
    return _checked(statefiles.open_existing(path, os.O_RDWR), path, _lock)


def create(path: Path) -> int:
    """Create a file and open it exclusively. Raises FileExistsError if the path exists."""
    return _checked(statefiles.create(path), path, _lock)


def refuse_writers(fd: int, path: Path) -> None:
    """Raise InvalidInput if another program has the file open for writing. `fd` must be open for reading only."""
    try:
        # If a program opens the file for writing in these microseconds, we get a signal; it must not kill us.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise _in_use(path) from error
    else:
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


@contextmanager
def alone(fd: int, *, otherwise: bool = True) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether no other program has the file open or has tried to open it.

    While the block runs, other programs cannot open it, or only after a wait (`/proc/sys/fs/lease-break-time`). This
    matters because a program that has mapped the file can change a page repeatedly while the file's times change only
    once. The function returns `otherwise` if nothing can tell, as on a file system without leases. This process, too,
    must not open the file again in the block: it would wait as long as others.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # see `refuse_writers`
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        answer = error.errno != errno.EAGAIN and otherwise
        yield lambda: answer
        return
    try:
        yield lambda: fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_UNLCK
    finally:
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _checked(fd: int, path: Path, *checks: Callable[[int, Path], None]) -> int:
    """Return `fd` after all checks; close it if one raises."""
    try:
        for check in checks:
            check(fd, path)
    except BaseException:
        statefiles.close(fd)
        raise
    return fd


def _refuse_read_only(fd: int, path: Path) -> None:
    """Raise InvalidInput if the device is read-only: the kernel opens it for writing, and then refuses each write."""
    try:
        is_read_only = any(fcntl.ioctl(fd, _BLKROGET, bytes(4)))
    except OSError:
        return
    if is_read_only:
        raise InvalidInput(
            f"{path} is read-only",
            remedy=f"Attach it for writing, or run `blockdev --setrw {path}`, then run again.",
        )


def _lock(fd: int, path: Path) -> None:
    """Keep QEMU and other runs out until `fd` is closed. Raises InvalidInput if one of them has the image open."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _qemu_bytes())
    except OSError as error:
        if error.errno in _BUSY:
            raise _in_use(path) from error
        # Any other error means a file system without locks; there, RunMark takes their place.


def keeps_out(fd: int) -> bool:
    """Whether a lock on the open file keeps others out, tested as another program on this host would meet it.

    Some file systems refuse locks, and some grant them without effect.
    """
    try:
        with _reading(Path(f"/proc/self/fd/{fd}")) as other:
            return _is_flocked(other) or _is_locked(other)
    except OSError:
        return False


def _is_flocked(other: int) -> bool:
    try:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)  # over NFS, an exclusive lock needs write access
    except OSError as error:
        return error.errno in _BUSY
    return False


def _is_locked(other: int) -> bool:
    """Whether another program holds the bytes that QEMU locks."""
    try:
        answer = fcntl.fcntl(other, fcntl.F_OFD_GETLK, _qemu_bytes())
    except OSError:
        return False
    return bool(struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK)


def _refuse_relatives(fd: int, path: Path) -> None:
    """Raise InvalidInput if QEMU has a partition of the device open or, for a partition, its disk."""
    for number in devices.relatives(os.fstat(fd).st_rdev):
        with suppress(OSError):  # it is gone, or has no name
            node = devices.node(number)
            with _reading(node) as other:
                _refuse_locked(other, path, node)


def _refuse_below(fd: int, path: Path) -> None:
    """Raise InvalidInput if something else uses a file or device below this device."""
    made_of = list(devices.below(os.fstat(fd).st_rdev))
    ours = {name for name, _ in made_of}
    for _, node in made_of:
        with suppress(OSError), _reading(node) as other:  # it is gone
            refuse_loops(other, node, ours)
            _refuse_locked(other, path, node)


@contextmanager
def _reading(node: Path) -> Iterator[int]:
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        statefiles.close(fd)


def _refuse_locked(fd: int, path: Path, node: Path) -> None:
    if _is_locked(fd):
        raise _in_use(path, node)


def _qemu_bytes() -> bytes:
    return struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, _QEMU_FIRST, _QEMU_LENGTH, 0)


def refuse_loops(fd: int, path: Path, ours: Collection[str] = ()) -> None:
    """Raise InvalidInput if a loop device other than `ours` uses the file or device, whether mounted or not."""
    mine = os.fstat(fd)
    for backing in _LOOPS.glob("loop*/loop/backing_file"):
        with suppress(OSError):
            behind = Path(backing.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n"))
            if backing.parts[-3] not in ours and _same_bytes(os.stat(behind), mine):  # noqa: PTH116
                device = f"/dev/{backing.parts[-3]}"
                raise InvalidInput(
                    f"{path} is in use: the loop device {device} uses it",
                    remedy=f"Unmount it, then detach it: `losetup -d {device}`.",
                )


def _same_bytes(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether both are the same file or device, or a disk and a partition of it."""
    if not (stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode)):
        return os.path.samestat(one, other)
    return one.st_rdev in (other.st_rdev, *devices.relatives(other.st_rdev))


def _in_use(path: Path, node: Path | None = None) -> InvalidInput:
    """The error; `node` is what is open if that is not the path itself."""
    return InvalidInput(
        f"{path} is in use: another program, such as QEMU or another run, has {node or 'it'} open",
        remedy=f"End that program (lsof {node or path} names it), then run again.",
    )
