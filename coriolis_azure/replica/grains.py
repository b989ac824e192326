"""Stores the digests of grains beside an image, so that a changed chunk can be compared without reading all of it.

There is one entry per chunk, at a place computed from its number: in `os.raw.grains`, 224 bytes for a chunk of 1 MiB.
Entries are a hint and never trusted: a chunk's digest is computed from those of its grains, so an entry either matches
the manifest or is ignored, and then the chunk is read. So nothing here is made durable, repaired, or an error: an entry
that is torn by a crash, made with another key, or missing because the disk was full only costs a read.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..agent import Digester
from ..errors import InvalidInput
from . import statefiles
from .manifest import DIGEST


class Grains:
    """The entries beside one image. Thread-safe once it is open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._entry = 0

    def open(self, grains: int) -> None:
        """Open the file for chunks of `grains` grains. A single grain has its chunk's digest, so nothing is stored."""
        self.close()
        self._entry = DIGEST * grains
        if grains > 1:
            with suppress(OSError, InvalidInput):
                self._fd = statefiles.open_or_create(self._path, os.O_RDWR)

    def put(self, index: int, digests: list[bytes]) -> None:
        """Store the digests of the grains of chunk `index`."""
        if self._fd >= 0:
            with suppress(OSError):
                os.pwrite(self._fd, b"".join(digests), index * self._entry)

    def get(self, index: int, count: int) -> list[bytes]:
        """The `count` digests last stored for chunk `index`; if there were none, others or fewer."""
        entry = b""
        if self._fd >= 0:
            with suppress(OSError):
                entry = os.pread(self._fd, DIGEST * count, index * self._entry)
        return [entry[at : at + DIGEST] for at in range(0, len(entry), DIGEST)]

    def proved(self, index: int, count: int, digest: bytes, digester: Digester) -> list[bytes] | None:
        """The digests stored for chunk `index`, if they are those of a chunk with this digest; otherwise None."""
        grains = self.get(index, count)
        return grains if len(grains) == count and digester.of(grains) == digest else None

    def forget(self) -> None:
        """Delete the entries, because their content no longer exists."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file. May be repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
