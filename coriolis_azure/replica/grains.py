"""The digests of grains, kept beside an image, so that a chunk which has changed need not be read to be compared.

One record a chunk, at a place that its number gives: in `os.raw.grains`, 224 bytes for a chunk of 1 MiB. They are
a hint and never believed: the digest of a chunk is made of those of its grains, so whoever takes a record knows
whether it is of the content that the manifest names, and reads the chunk where it is not. That is why nothing here
is made durable, repaired or an error: what a crash has torn, another key has made or a full disk has kept out costs
a read.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..errors import InvalidInput
from . import statefiles
from .manifest import DIGEST


class Grains:
    """The records beside one image of chunks of `grains` grains each, once it is open. For threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._record = 0

    def open(self, grains: int) -> None:
        """Begin, with chunks of so many grains. One alone has the digest of its chunk, so it is not kept."""
        self.close()
        self._record = DIGEST * grains
        if grains > 1:
            with suppress(OSError, InvalidInput):
                self._fd = statefiles.open_or_create(self._path, os.O_RDWR)

    def put(self, index: int, digests: list[bytes]) -> None:
        """Keep those of chunk `index`."""
        if self._fd >= 0:
            with suppress(OSError):
                os.pwrite(self._fd, b"".join(digests), index * self._record)

    def get(self, index: int, count: int) -> list[bytes]:
        """The `count` digests that were last kept of chunk `index`; anything else, or fewer, where none were."""
        kept = b""
        if self._fd >= 0:
            with suppress(OSError):
                kept = os.pread(self._fd, DIGEST * count, index * self._record)
        return [kept[at : at + DIGEST] for at in range(0, len(kept), DIGEST)]

    def forget(self) -> None:
        """Remove the records: they are of content that is no more."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file. Harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
