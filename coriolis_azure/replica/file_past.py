"""A disk at an earlier point in time, in the folder of that point: a reflink of the image, or an undo log."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from . import statefiles
from .file_store import REMEDIES, FileStore, Translated, open_document
from .medium import PastPart

_FICLONE = 0x40049409  # linux/fs.h


class FilePast:
    """See Past. `image`: the image as it is now; None if there is none. `path`: of the image in the point's folder."""

    def __init__(self, image: FileStore | None, path: Path, disk: str) -> None:
        self._image, self._path, self._disk = image, path, disk
        self._stores: list[FileStore] = []

    def snapshot(self) -> bool:
        """Reflink the image. See Past."""
        if self._image is None or self._image.is_device:
            return False
        with Translated(self._path, "cannot be created", self._disk):
            statefiles.make_folder(self._path.parent)
            store = self._store(self._path, statefiles.create)
            try:
                fcntl.ioctl(store.fd, _FICLONE, self._image.fd)
            except OSError as error:
                if error.errno in REMEDIES and error.errno != errno.EPERM:
                    raise
                statefiles.remove(self._path)
                return False
            os.fsync(store.fd)
            statefiles.sync_folder(self._path.parent)
        return True

    def open(self, part: PastPart) -> FileStore | None:
        """See Past."""
        path = self._of(part)
        with Translated(path, "cannot be opened", self._disk):
            try:
                return self._store(path, lambda path: statefiles.open_existing(path, os.O_RDONLY, ours=False))
            except FileNotFoundError:
                return None

    def make(self, part: PastPart, size: int) -> FileStore:
        """See Past."""
        path = self._of(part)
        with Translated(path, "cannot be created", self._disk):
            statefiles.make_folder(path.parent)
            store = self._store(path, statefiles.create)
            os.ftruncate(store.fd, size)
            statefiles.sync_folder(path.parent)
        return store

    def load(self) -> IO[bytes] | None:
        """See Past."""
        return open_document(self._beside("manifest"), self._disk, ours=False)

    def save(self, pieces: Iterable[bytes]) -> None:
        """See Past."""
        path = self._beside("manifest")
        with Translated(path, "cannot be written", self._disk):
            statefiles.make_folder(path.parent)
            statefiles.replace(path, pieces)

    def close(self) -> None:
        """See Past."""
        for store in self._stores:
            statefiles.close(store.fd)
        self._stores = []

    def _store(self, path: Path, opened: Callable[[Path], int]) -> FileStore:
        store = FileStore(opened(path), path, self._disk, lambda: False)
        self._stores.append(store)
        return store

    def _of(self, part: PastPart) -> Path:
        return self._path if part == "image" else self._beside(part)

    def _beside(self, what: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{what}")
