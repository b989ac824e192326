"""The interface between a transfer and whatever reads the disk.

A new way of reading is a new `Reader`; nothing else needs to change.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, Protocol

from ..errors import CorruptChunk
from ..replica.manifest import Manifest

Piece = tuple[int, int, memoryview]  # start within the chunk, length, bytes (empty if they are zeros)
Answer = tuple[
    int, list[int], bytes
]  # chunk, its grains that differ, digests of their leaves at the destination


@dataclass(frozen=True, slots=True)
class Same:
    """A run of chunks that the destination already holds.

    `how`: how that is known. "read": they were read, or are known to be zeros. "relied": Azure says that they have not
    changed since the baseline. "checked": Azure says so, and they were read all the same.
    """

    index: int
    count: int
    how: Literal["read", "relied", "checked"] = "read"


@dataclass(frozen=True, slots=True)
class Zeros:
    """A run of chunks that now contain only zeros."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Data:
    """The content of one chunk, and the digest it must have.

    `pieces` unpacks the content, in any thread, and raises CorruptChunk if it cannot. Bytes that no piece covers are
    zeros if the chunk is `whole`; otherwise the destination already holds them. The consumer calls `done` when it no
    longer needs the pieces.
    """

    index: int
    digest: bytes
    whole: bool
    pieces: Callable[[], list[Piece]]
    done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Question:
    """Asks what the destination holds of a run of changed chunks, so that only the differences have to be sent.

    `grains`: the digests of all grains of these chunks, concatenated. The answer, given in any thread, names for each
    chunk the grains whose digests differ at the destination, with the digests that their leaves of `leaf` bytes have
    there (none if a leaf is a whole grain). A Data item for each chunk follows, after items for later chunks.
    """

    index: int
    count: int
    grains: bytes
    leaf: int
    answer: Callable[[list[Answer]], None]


Chunk = Same | Zeros | Data


class Reader(Protocol):
    """One disk at one moment, compared chunk by chunk with what a destination holds.

    One thread calls `begin`, then exhausts `scan`, then reads `root`. Chunks are reported in disk order, except that
    the data of chunks in a Question comes later. A reported chunk counts as settled: a reader that has to reconnect
    does not report it twice. Reading that ends early raises an error from `errors`.
    """

    def begin(self, base: Manifest, *, unit: int) -> Manifest:
        """Open the disk and return `base` with the hash that all digests use from now on.

        `base`: what the destination holds. `unit`: the smallest leaf, in bytes, about which the caller will answer
        questions; 0 if it will not answer any.
        """

    def scan(self) -> Generator[Chunk | Question, None, None]:
        """Yield each chunk of the disk once."""

    @property
    def root(self) -> tuple[int, str]:
        """A chunk and the root of all digests from it on, as the reading side computed it. Valid once `scan` ends."""

    @property
    def read_bytes(self) -> int:
        """How many bytes of the disk have been read. What is known to be zeros, or not to have changed, need not be."""

    def bottleneck(self) -> str:
        """What most of the last second or more was spent on: see `events.Copied`."""

    def close(self) -> None:
        """End the reading. Callable from any thread, repeatedly; a blocked `begin` or `scan` soon ends."""


def corrupt(disk: str, offset: int, problem: str) -> CorruptChunk:
    """The error for a bad chunk; `problem` completes the sentence "the chunk ..."."""
    return CorruptChunk(f"{disk}: the chunk at offset {offset} {problem}", disk=disk, offset=offset)
