"""The files we keep beside images: never reached through a link, for their owner only, replaced as a whole.

A folder of images may be one in which others can make files. A link laid there in advance must not lead our writes
elsewhere, and a file of somebody else's must not be taken for our state.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InvalidInput
from . import room

_UNKNOWN_TO_THE_FILE_SYSTEM = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
_LONG_AGO_NS = 10**18  # in 2001, which every file system knows
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def create(path: Path, flags: int = os.O_RDWR) -> int:
    """Make the file `path`, readable for its owner only whatever the umask; FileExistsError where something is."""
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with suppress(OSError):  # some file systems have no modes
        os.fchmod(fd, 0o600)
    return fd


def open_existing(path: Path, flags: int, *, ours: bool = True) -> int:
    """Open the file `path`. InvalidInput where it is a link or no file, or, if it must be `ours`, somebody else's."""
    try:
        # Opening a pipe would wait for its other end.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InvalidInput(
                f"{path} is a link", remedy="Remove it and run again: links are not followed."
            ) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInput(f"{path} is not a regular file", remedy="Remove it and run again.")
        if ours:
            refuse_foreign(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_or_create(path: Path, flags: int) -> int:
    """Open the file `path`, which is made when it is missing. InvalidInput as from `open_existing`."""
    try:
        return open_existing(path, flags)
    except FileNotFoundError:
        with suppress(FileExistsError):
            return create(path, flags)
        return open_existing(path, flags)


def refuse_foreign(fd: int, path: Path) -> None:
    """InvalidInput where the file belongs to another user, or may be written by others.

    A file that we make here is the measure: a file system may show another owner or mode than it was asked for.
    """
    found = os.fstat(fd)
    if found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE:
        return
    try:
        owner, mode = _as_made_here(path.parent)
    except OSError:
        return
    if found.st_uid != owner:
        raise InvalidInput(
            f"{path} belongs to another user (uid {found.st_uid})",
            remedy=f"Run as that user, or make the file yours: chown {owner} {path}",
        )
    if found.st_mode & _OTHERS_WRITE & ~mode:
        raise InvalidInput(
            f"{path} may be written by other users", remedy=f"Take that right away: chmod go-w {path}"
        )


def _as_made_here(folder: Path) -> tuple[int, int]:
    """Owner and mode that a file of ours has in this folder."""
    with _probe(folder) as fd:
        made = os.fstat(fd)
    return made.st_uid, made.st_mode


def ctime_can_be_set(folder: Path) -> bool:
    """Whether whoever sets a file's mtime here sets its ctime too, and so can hide a change.

    Drivers of file systems that store no ctime (FAT, exFAT) show the mtime in its place.
    """
    with _probe(folder) as fd:
        os.utime(fd, ns=(_LONG_AGO_NS, _LONG_AGO_NS))
        return os.fstat(fd).st_ctime_ns <= _LONG_AGO_NS


@contextmanager
def _probe(folder: Path) -> Iterator[int]:
    """A file of ours in this folder, gone at the end; without a name, so that no death leaves it, where that can be."""
    name = None
    try:
        fd = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        name = folder / f".probe-{secrets.token_hex(8)}"
        fd = create(name)
    try:
        yield fd
    finally:
        os.close(fd)
        if name is not None:
            os.unlink(name)  # noqa: PTH108


def read(path: Path, *, ours: bool = True) -> bytes:
    """The content of a small file. FileNotFoundError; InvalidInput as from `open_existing`."""
    with open(open_existing(path, os.O_RDONLY, ours=ours), "rb") as file:
        return file.read()


def replace(path: Path, pieces: Iterable[bytes]) -> None:
    """Make `pieces` the content of `path`, durably. Whoever dies over it leaves all of it, or what was there."""
    put(prepare(path), path, pieces)


def prepare(path: Path, size: int = 0) -> int:
    """Begin to `replace` the content of `path`: an open file, with room for `size` bytes where it can be had."""
    with suppress(FileNotFoundError):
        os.unlink(_new(path))  # noqa: PTH108
    fd = create(_new(path), os.O_WRONLY)
    try:
        if size:
            room.take(fd, [(0, size)], lambda *_: True)
    except BaseException:
        give_up(fd, path)
        raise
    return fd


def put(fd: int, path: Path, pieces: Iterable[bytes]) -> None:
    """End what `prepare` has begun. `fd` is closed."""
    try:
        for piece in pieces:
            write(fd, piece)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(_new(path), path)  # noqa: PTH105  (beside os.fsync: the steps of this module)
    sync_folder(path.parent)


def give_up(fd: int, path: Path) -> None:
    """Undo what `prepare` has begun. `fd` is closed."""
    new = _new(path)
    try:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(new), os.fstat(fd)):  # else it is another run's
                os.unlink(new)  # noqa: PTH108
    finally:
        os.close(fd)


def _new(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def make_folder(path: Path) -> None:
    """Make the folder, and the one that it is in, for their owner only and durably; harmless where they are there."""
    for folder in (path.parent, path):
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)  # noqa: PTH102
            sync_folder(folder.parent)


def remove(path: Path, *, durable: bool = True) -> None:
    """Remove the file; harmless when there is none. Not `durable`: after a power loss it may be there again."""
    with suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108
        if durable:
            sync_folder(path.parent)


def write(fd: int, data: bytes) -> None:
    """Write all of `data` where the file stands."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """Make the names in the folder durable, as far as its file system knows how to."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNKNOWN_TO_THE_FILE_SYSTEM:
            raise
    finally:
        os.close(fd)
