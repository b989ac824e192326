"""The destination of several VMs: a folder, a prefix in a container, or an NBD server, with a place for each VM."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InvalidInput
from . import nbd_url, places, statefiles
from .folder import OWNER, flock, unusable


@contextmanager
def held(url: str) -> Iterator[Callable[[str], str]]:
    """Hold the destination `url` for one run over several VMs; yield what tells the URL of a VM's place, by its name.

    A folder is created if it is missing, and locked: a second run on it is refused, whichever VMs it is for. In Blob
    storage, only the places of the VMs are in use by one run each. Raises InvalidInput if the destination is in use,
    or is itself the place of one VM.
    """
    if places.is_in_azure(url):
        yield lambda name: places.below(url, name)
        return
    if nbd_url.is_nbd(url):
        places.below(url, "vm")  # refused before anything is made
    path = places.folder(url)
    try:
        fd = _locked(path)
    except BlockingIOError as error:
        raise InvalidInput(
            f"another run is using {path}", remedy="Wait until it ends, or give another folder."
        ) from error
    except OSError as error:
        raise unusable(path, error) from error
    try:
        if nbd_url.is_nbd(url):
            yield lambda name: places.below(url, _existing(path, name))
        else:
            yield lambda name: str(path / _existing(path, name))
    finally:
        os.close(fd)


def _locked(path: Path) -> int:
    """Create the folder if it is missing, and lock it: the lock is the one that a replica in it would take."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    fd = statefiles.open_or_create(path / ".lock", os.O_RDWR)
    try:
        flock(fd, fcntl.LOCK_EX)
        if (path / OWNER).exists():
            raise InvalidInput(
                f"{path} is the place of one VM, not of several",
                remedy="Give the folder above it, or another folder.",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _existing(path: Path, name: str) -> str:
    """The name of a VM's folder: as it is there, because Azure may give the name of a VM in another case later."""
    if (path / name).exists():
        return name
    alike = sorted(entry for entry in os.listdir(path) if entry.lower() == name.lower())  # noqa: PTH208
    return alike[0] if alike else name
