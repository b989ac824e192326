"""Writes the files that a command is asked for: whole, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

from ..errors import InvalidInput

_REMEDIES = {
    errno.ENOENT: "Create its folder first, or give another file.",
    errno.ENOTDIR: "Give a file in a folder.",
    errno.EISDIR: "Give the name of a file: this is a folder.",
    errno.EACCES: "Give this user the right to write there, or give another file.",
    errno.EPERM: "Give this user the right to write there, or give another file.",
    errno.ENXIO: "Let a program read from it, or give another file.",
    errno.EROFS: "Give a file on a file system that is not mounted read-only.",
    errno.ENOSPC: "Free space there, or give another file.",
    errno.EDQUOT: "Raise the quota there, or give another file.",
}

# How pages and metrics begin, in lower case.
_BEGINNINGS = (b"<!doctype html>", b"# help coriolis_azure")
_LONGEST = max(map(len, _BEGINNINGS))


def refuse_unwritable(path: Path) -> None:
    """Raise InvalidInput if `path` could not be written, before anything is begun. Changes nothing."""
    try:
        _refuse_other(path)
        if not _is_special(path):
            fd, new = _new(_followed(path))
            os.close(fd)
            new.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def write(path: Path, text: str) -> None:
    """Replace the content of `path` atomically. Raises InvalidInput if that fails; then it is what it was."""
    try:
        _refuse_other(path)
        if _is_special(path):
            _pass(path, text.encode())
        else:
            _replace(_followed(path), text.encode())
    except OSError as error:
        raise _unwritable(path, error) from error


def _refuse_other(path: Path) -> None:
    """Raise an error if something is there that is not a file of ours to replace: an image, a device, a folder."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not path.is_file() and not path.is_block_device():
        return
    with suppress(PermissionError), path.open("rb") as file:
        beginning = file.read(_LONGEST).lower()
        if beginning and not beginning.startswith(_BEGINNINGS):
            raise InvalidInput(
                f"{path} holds something else than a page or metrics, and is not replaced",
                remedy="Give another file. If nobody needs this one, remove it, then run the command again.",
            )


def _followed(path: Path) -> Path:
    """The path without links. Raises OSError if they lead in a circle."""
    found = Path(os.path.realpath(path))
    if found.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return found


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, a terminal or the like, which cannot be replaced."""
    return path.exists() and not path.is_file()


def _pass(path: Path, data: bytes) -> None:
    """Write to a pipe or the like. A pipe that nobody reads is an error: it might never be read."""
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "wb") as file:
        os.set_blocking(fd, True)
        file.write(data)


def _replace(path: Path, data: bytes) -> None:
    fd, new = _new(path)
    try:
        with os.fdopen(fd, "wb") as file:
            with suppress(FileNotFoundError):
                os.fchmod(fd, path.stat().st_mode & 0o777)
            file.write(data)
            file.flush()
            os.fsync(fd)
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise


def _new(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, with the rights that the umask allows: those who watch may be other users.

    Its name ends so that no collector takes it for a finished one.
    """
    new = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.new")
    return os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), new


def _unwritable(path: Path, error: OSError) -> InvalidInput:
    return InvalidInput(
        f"{path} cannot be written: {error.strerror}",
        remedy=_REMEDIES.get(error.errno or 0, "Give another file."),
    )
