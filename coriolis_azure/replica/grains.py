"""Stores the digests of grains beside an image, so that a changed chunk can be compared without reading all of it.

There is one entry per chunk, at a place computed from its number: in `os.raw.grains`, 224 bytes for a chunk of 1 MiB.
Entries are a hint and never trusted: a chunk's digest is computed from those of its grains, so an entry either matches
the manifest or is ignored, and then the chunk is read, or sent as a whole. So nothing here is made durable, repaired,
or an error: an entry that is torn by a crash, made with another key, or missing because the disk was full only costs
time.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ..agent import Digester
from ..errors import CoriolisAzureError
from . import statefiles
from .manifest import DIGEST, Manifest, grain_count

_FAILURES = (OSError, CoriolisAzureError)


class Entries(Protocol):
    """The bytes of all entries. Once they are open, several threads may read and write them.

    Whatever fails raises OSError or CoriolisAzureError.
    """

    def discard(self) -> None:
        """Delete the entries that are there, because their content no longer exists."""

    def open(self, size: int) -> None:
        """Prepare for `size` bytes. Entries that are there remain."""

    def read(self, offset: int, length: int) -> bytes:
        """These bytes, or fewer if they are not there."""

    def write(self, offset: int, data: bytes) -> None:
        """Store these bytes."""

    def close(self) -> None:
        """Close them. May be repeated."""


class Grains:
    """The digests of the grains of one image. Thread-safe once it is open. After a failure it stores nothing more."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self._works = False
        self._entry = 0

    def open(self, shape: Manifest) -> None:
        """Open it for the chunks of `shape`; if that is fresh, earlier entries are deleted.

        A single grain has its chunk's digest, so nothing is stored.
        """
        self.close()
        grains = grain_count(shape.chunk)
        self._entry = DIGEST * grains
        with suppress(*_FAILURES):
            if shape.fresh:
                self._entries.discard()
            if grains > 1:
                self._entries.open(shape.count * self._entry)
                self._works = True

    def put(self, index: int, digests: list[bytes]) -> None:
        """Store the digests of the grains of chunk `index`."""
        if self._works:
            try:
                self._entries.write(index * self._entry, b"".join(digests))
            except _FAILURES:
                self._works = False

    def get(self, index: int, count: int) -> list[bytes]:
        """The `count` digests last stored for chunk `index`; if there were none, others or fewer."""
        entry = b""
        if self._works:
            try:
                entry = self._entries.read(index * self._entry, DIGEST * count)
            except _FAILURES:
                self._works = False
        return [entry[at : at + DIGEST] for at in range(0, len(entry), DIGEST)]

    def proved(self, index: int, count: int, digest: bytes, digester: Digester) -> list[bytes] | None:
        """The digests stored for chunk `index`, if they are those of a chunk with this digest; otherwise None."""
        grains = self.get(index, count)
        return grains if len(grains) == count and digester.of(grains) == digest else None

    def close(self) -> None:
        """Close it. May be repeated."""
        self._works = False
        with suppress(*_FAILURES):
            self._entries.close()


class EntryFile:
    """Entries in a file of this host. See Entries."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def discard(self) -> None:
        """See Entries."""
        self._path.unlink(missing_ok=True)

    def open(self, size: int) -> None:
        """See Entries."""
        del size
        self._fd = statefiles.open_or_create(self._path, os.O_RDWR)

    def read(self, offset: int, length: int) -> bytes:
        """See Entries."""
        return os.pread(self._fd, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        """See Entries."""
        os.pwrite(self._fd, data, offset)

    def close(self) -> None:
        """See Entries."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            statefiles.close(fd)
