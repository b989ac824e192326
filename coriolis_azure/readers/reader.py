"""The seam where chunks come from: what a transfer knows of whatever reads a disk.

A new way to read is a new `Reader`; nothing else has to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from ..errors import CorruptChunk
from ..replica.manifest import Manifest

Piece = tuple[int, int, memoryview]  # start within the chunk, length, bytes: none where they are zeros
Answer = tuple[int, list[int], bytes]  # chunk, its grains that differ, digests of the leaves there


@dataclass(frozen=True, slots=True)
class Same:
    """A run of chunks that are as the destination holds them."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Zeros:
    """A run of chunks that are zeros now."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Data:
    """The content of one chunk, whose digest it has to have.

    `pieces` unpacks it, in any thread; CorruptChunk where that cannot be. What is in no piece is zeros if the chunk
    is `whole`, else it is as the destination has it. `done` is called when the pieces are no longer needed.
    """

    index: int
    digest: bytes
    whole: bool
    pieces: Callable[[], list[Piece]]
    done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Question:
    """Asks what the destination holds of a run of changed chunks, so that only what differs has to come.

    `grains`: the digests of all grains of these chunks, one after the other. The answer, given in any thread, names
    for each chunk the grains that have another digest at the destination, with the digests of their leaves of `leaf`
    bytes there (none where a leaf is a whole grain). Data of each chunk follows, later than that of its successors.
    """

    index: int
    count: int
    grains: bytes
    leaf: int
    answer: Callable[[list[Answer]], None]


Chunk = Same | Zeros | Data


class Reader(Protocol):
    """One disk at one moment, compared chunk by chunk with what a destination holds.

    One thread calls `begin`, then takes all of `scan`, then looks at `root`. Chunks are told in disk order, except
    that the data of those that were asked about comes later. A chunk that was told counts as settled: a reader that
    has to begin again does not tell it twice. Whatever ends the reading early is an error of `errors`.
    """

    def begin(self, base: Manifest, *, answers: bool) -> Manifest:
        """Open the disk: `base`, with the hash that its digests are made with from now on.

        `base`: what the destination holds. `answers`: whether questions will be answered.
        """

    def scan(self) -> Generator[Chunk | Question, None, None]:
        """Each chunk of the disk once."""

    @property
    def root(self) -> tuple[int, str]:
        """Once `scan` has ended: the root of all digests from a chunk on, as the disk's side has computed it."""

    def bottleneck(self) -> str:
        """What the last second or more was mostly spent on: see `events.Copied`."""

    def close(self) -> None:
        """End the reading, from any thread and as often as wanted: what waits in `begin` or `scan` ends soon."""


def corrupt(disk: str, offset: int, what: str) -> CorruptChunk:
    """The error for a chunk of which `what` is true."""
    return CorruptChunk(f"{disk}: the chunk at offset {offset} {what}", disk=disk, offset=offset)
