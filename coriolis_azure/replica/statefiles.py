"""Reads and writes the files beside images: never through a link, readable only by their owner, replaced atomically.

Other users may be able to create files in the folder of the images. A link that they put there must not redirect our
writes, and a file of theirs must not pass for our state.
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
from . import space

_UNKNOWN_TO_THE_FILE_SYSTEM = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
_LONG_AGO_NS = 10**18  # in 2001, which every file system knows
_LIMIT = 16 << 20  # bytes of a file that is read at once: a record of a hundred disks has 10 KiB
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def close(fd: int) -> None:
    """Close a file whose content is not at stake, or was flushed. That must not fail, whatever else has.

    The kernel frees the descriptor even if the file system is gone and refuses, as NFS, SMB and FUSE do.
    """
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:  # a fault of this program
            raise


def create(path: Path, flags: int = os.O_RDWR) -> int:
    """Create the file `path` with mode 0600, whatever the umask. Raises FileExistsError if the path exists."""
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with suppress(OSError):  # some file systems have no modes
        os.fchmod(fd, 0o600)
    return fd


def refuse_irregular(path: Path) -> None:
    """Raise InvalidInput if a folder, a pipe or the like is in the place of a file. Links are refused when opened."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise _irregular(path)


def _irregular(path: Path) -> InvalidInput:
    return InvalidInput(f"{path} is not a regular file", remedy="Remove it and run again.")


def open_existing(path: Path, flags: int, *, ours: bool = True) -> int:
    """Open the file `path`. Raises InvalidInput if it is not a regular file or, with `ours`, if others may write it."""
    try:
        # O_NONBLOCK: opening a pipe would wait for its other end.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InvalidInput(
                f"{path} is a link", remedy="Remove it and run again: links are not followed."
            ) from error
        if error.errno == errno.ENXIO:  # a socket
            raise _irregular(path) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _irregular(path)
        if ours:
            refuse_foreign(fd, path)
    except BaseException:
        close(fd)
        raise
    return fd


def open_or_create(path: Path, flags: int) -> int:
    """Open the file `path`, or create it. Raises InvalidInput like `open_existing`."""
    try:
        return open_existing(path, flags)
    except FileNotFoundError:
        with suppress(FileExistsError):
            return create(path, flags)
        return open_existing(path, flags)


def refuse_foreign(fd: int, path: Path) -> None:
    """Raise InvalidInput if the file belongs to another user, or others may write it.

    Owner and mode are compared with those of a new file of ours there: some file systems show others than were set.
    """
    found = os.fstat(fd)
    if found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE:
        return
    try:
        owner, mode = _of_new_file(path.parent)
    except OSError:
        return
    if found.st_uid != owner:
        raise InvalidInput(
            f"{path} belongs to another user (uid {found.st_uid})",
            remedy=f"Run as that user, or make the file yours: chown {owner} {path}",
        )
    if found.st_mode & _OTHERS_WRITE & ~mode:
        raise InvalidInput(f"other users may write {path}", remedy=f"Revoke that right: chmod go-w {path}")


def _of_new_file(folder: Path) -> tuple[int, int]:
    """The owner and mode that a new file of ours has in this folder."""
    with _probe(folder) as fd:
        found = os.fstat(fd)
    return found.st_uid, found.st_mode


def ctime_can_be_set(folder: Path) -> bool:
    """Whether setting a file's mtime in this folder also sets its ctime, so that a change can be hidden.

    File systems that store no ctime (FAT, exFAT) show the mtime instead.
    """
    with _probe(folder) as fd:
        os.utime(fd, ns=(_LONG_AGO_NS, _LONG_AGO_NS))
        return os.fstat(fd).st_ctime_ns <= _LONG_AGO_NS


@contextmanager
def _probe(folder: Path) -> Iterator[int]:
    """A temporary file in this folder, if possible without a name, so that a crash leaves nothing behind."""
    name = None
    try:
        fd = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        name = folder / f".probe-{secrets.token_hex(8)}"
        fd = create(name)
    try:
        yield fd
    finally:
        close(fd)
        if name is not None:
            os.unlink(name)  # noqa: PTH108


def read(path: Path, *, ours: bool = True, limit: int = _LIMIT) -> bytes:
    """The content of a small file, at most `limit` bytes. Raises FileNotFoundError, InvalidInput as `open_existing`."""
    with open(open_existing(path, os.O_RDONLY, ours=ours), "rb") as file:
        return file.read(limit)


def replace(path: Path, pieces: Iterable[bytes]) -> None:
    """Replace the content of `path` by `pieces`, atomically and durably."""
    complete(prepare(path), path, pieces)


def prepare(path: Path, size: int = 0) -> int:
    """Begin to `replace` the content of `path`; return the new file, open, with `size` bytes reserved if possible.

    Raises InvalidInput if a folder is in the place of the new file.
    """
    _unlink(_new(path))
    fd = create(_new(path), os.O_WRONLY)
    try:
        if size:
            space.reserve(fd, [(0, size)], lambda *_: True)
    except BaseException:
        abandon(fd, path)
        raise
    return fd


def complete(fd: int, path: Path, pieces: Iterable[bytes]) -> None:
    """Complete what `prepare` has begun, and close `fd`."""
    try:
        for piece in pieces:
            write(fd, piece)
        os.fsync(fd)
    finally:
        close(fd)
    os.replace(_new(path), path)  # noqa: PTH105  (beside os.fsync: the steps of this module)
    sync_folder(path.parent)


def abandon(fd: int, path: Path) -> None:
    """Undo what `prepare` has begun, and close `fd`."""
    new = _new(path)
    try:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(new), os.fstat(fd)):  # otherwise it is another run's
                os.unlink(new)  # noqa: PTH108
    finally:
        close(fd)


def _new(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def make_folder(path: Path) -> None:
    """Create the folder and its parent with mode 0700, durably. Existing ones are no error."""
    for folder in (path.parent, path):
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)  # noqa: PTH102
            sync_folder(folder.parent)


def remove(path: Path, *, durable: bool = True) -> None:
    """Remove the file; a missing one is no error. Unless `durable`, it may exist again after a power loss.

    Raises InvalidInput if a folder is in its place.
    """
    if _unlink(path) and durable:
        sync_folder(path.parent)


def _unlink(path: Path) -> bool:
    """Remove the file, and return whether there was one. Raises InvalidInput if a folder is in its place."""
    try:
        os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        return False
    except IsADirectoryError as error:
        raise _irregular(path) from error
    return True


def write(fd: int, data: bytes) -> None:
    """Write all of `data` at the file's current position."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """Make the names in the folder durable, if its file system can do that."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNKNOWN_TO_THE_FILE_SYSTEM:
            raise
    finally:
        close(fd)
