"""A disk as its VM sees it, for tests to read and write: what is written or cleared is recorded page by page."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from coriolis_azure.errors import InvalidInput
from coriolis_azure.sandbox.compute import disks
from coriolis_azure.sandbox.pages import PAGE
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.world import World


class Inside:
    """The content of one disk. Thread-safe. Offsets and lengths are of whole pages of 512 bytes."""

    def __init__(self, world: World, lock: AbstractContextManager[object], disk: Resource) -> None:
        self._world, self._lock, self._disk = world, lock, disk
        self.id = disk.id

    @property
    def path(self) -> Path:
        """The file with the present bytes. Do not write to it."""
        return self._world.contents.path(self._disk.hidden["content"])

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self._world.contents.size(self._disk.hidden["content"])

    def read(self, offset: int, length: int) -> bytes:
        """The present bytes of a part of the disk."""
        with self._lock, self.path.open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Write pages, perhaps with the bytes they have."""
        self.write_all([(offset, data)])

    def write_all(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Write many pieces, each an offset and its data."""
        with self._lock:
            self._world.contents.write(self._own(), map(self._checked, pieces))

    def clear(self, offset: int, length: int) -> None:
        """Clear pages, as TRIM does: they read as zeros and are not allocated."""
        self._check(offset, length)
        with self._lock:
            self._world.contents.clear(self._own(), offset, offset + length)

    def grow(self, gib: int) -> None:
        """Grow the disk to this size in GiB."""
        with self._lock:
            disks.grow(self._world, self._disk, gib)
            self._world.state.save()

    def _checked(self, piece: tuple[int, bytes]) -> tuple[int, bytes]:
        self._check(piece[0], len(piece[1]))
        return piece

    def _own(self) -> str:
        before = self._disk.hidden["content"]
        content = self._world.own_content(self._disk)
        if content != before:
            self._world.state.save()
        return content

    def _check(self, offset: int, length: int) -> None:
        if offset % PAGE or length % PAGE or not 0 <= offset < offset + length <= self.size:
            raise InvalidInput(
                f"{length} bytes at {offset} are not pages of a disk of {self.size} bytes",
                remedy=f"Write multiples of {PAGE} bytes at multiples of {PAGE}.",
            )
