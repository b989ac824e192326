"""The destination of several VMs: a folder, a prefix in a container, or an NBD server, with a place for each VM."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AzureError, InvalidInput
from . import nbd_url, places, statefiles
from .folder import OWNER, flock, unusable

if TYPE_CHECKING:
    from ..azure.blobs import Storage


@contextmanager
def held(url: str, storage: Storage | None = None) -> Iterator[Callable[[str], str]]:
    """Hold the destination `url` for one run over several VMs; yield what tells the URL of a VM's place, by its name.

    A folder is created if it is missing, and locked: a second run on it is refused, whichever VMs it is for. In Blob
    storage, only the places of the VMs are in use by one run each. Raises InvalidInput if the destination is in use,
    or is itself the place of one VM.
    """
    if places.is_in_azure(url):
        if storage is not None:
            _refuse_one(url, storage)
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
        statefiles.close(fd)


def _locked(path: Path) -> int:
    """Create the folder if it is missing, and lock it: the lock is the one that a replica in it would take."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    fd = statefiles.open_or_create(path / ".lock", os.O_RDWR)
    try:
        flock(fd, fcntl.LOCK_EX)
        if (path / OWNER).exists():
            raise _of_one(str(path), "folder")
    except BaseException:
        statefiles.close(fd)
        raise
    return fd


def _refuse_one(url: str, storage: Storage) -> None:
    """Raise InvalidInput if the prefix is that of one VM. Whether it can be read at all is for the VMs' runs to say."""
    account, container, prefix = places.in_storage(url)
    owner = storage.account(account).container(container).blob(f"{prefix}/{OWNER}".lstrip("/"))
    with suppress(AzureError):
        if owner.find() is not None:
            raise _of_one(url, "prefix")


def _of_one(where: str, kind: str) -> InvalidInput:
    return InvalidInput(
        f"{where} is the place of one VM, not of several",
        remedy=f"Give the {kind} above it, or another {kind}.",
    )


def _existing(path: Path, name: str) -> str:
    """The name of a VM's folder: as it is there, because Azure may give the name of a VM in another case later."""
    if (path / name).exists():
        return name
    alike = sorted(entry for entry in os.listdir(path) if entry.lower() == name.lower())  # noqa: PTH208
    return alike[0] if alike else name
