"""What one disk of a replica is kept on: stores of bytes, and two documents beside them. Nothing here knows digests.

A medium is all that a new kind of destination has to bring; the rules that keep replicas right are `replica`'s. Its
parts are

* the *image*: the disk as of its last good point in time;
* a *partial* image, or a *redo* log over the image: what a run has fetched and not published;
* the *index* of either.

Its documents are the *manifest*, of the image, and the *draft*, of what has been fetched. What it keeps of earlier
points in time is a `Past` each. `testing.check_medium` runs one suite over any medium.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import IO, Literal, Protocol

from .grains import Grains

Content = bytes | bytearray | memoryview
Stamp = dict[str, int | str]
Part = Literal["image", "partial", "redo", "index"]
PastPart = Literal["image", "undo", "index"]
Document = Literal["manifest", "draft"]


class Readable(Protocol):
    """Bytes that several threads read anywhere."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def read(self, offset: int, length: int) -> bytes:
        """These bytes, all of them. DestinationFailed where they end before."""


class Store(Readable, Protocol):
    """Bytes that are read and written anywhere, by several threads. What goes wrong is DestinationFailed."""

    def write(self, offset: int, data: Content) -> None:
        """Put `data` there."""

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, without taking room for it where that is possible."""

    def share(self, source: Store, offset: int, length: int) -> bool:
        """Let the range be that of another store of this medium, where a write would take room that this does not.

        False where it was not done.
        """

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts of the range that may hold something else than zeros, in order: offset and length of each."""

    def resize(self, size: int) -> None:
        """Cut it off, or make it longer; what is added reads as zeros, but on a device, which stays as it is."""

    def flush(self) -> None:
        """On return all that was written survives a power loss."""

    def uncached(self) -> AbstractContextManager[Callable[[int, int], Content]]:
        """A function that reads as `read` does, from the medium itself: flushed, and past what a host has cached."""


def holds(store: Store, offset: int, length: int) -> bool:
    """Whether the range may hold something else than zeros, as far as that shows without reading it."""
    return next(store.extents(offset, length), None) is not None


def read_padded(store: Readable, offset: int, length: int, read: Callable[[int, int], Content]) -> Content:
    """These bytes, by `read`; zeros where the store has ended."""
    there = max(0, min(length, store.size - offset))
    data = read(offset, there) if there else b""
    return data if there == length else bytes(data) + bytes(length - there)


class Past(Protocol):
    """One disk as it was at an earlier point in time: a clone of its image, or an undo log over what came after it.

    DestinationFailed where something goes wrong.
    """

    def clone(self) -> bool:
        """Keep the image as it is now without copying it; False where the medium cannot do that."""

    def open(self, part: PastPart) -> Store | None:
        """A part of it, to be read; None where it is not there."""

    def make(self, part: PastPart, size: int) -> Store:
        """A new part of that many zeros."""

    def load(self) -> IO[bytes] | None:
        """The manifest of that time; None where there is none."""

    def save(self, pieces: Iterable[bytes]) -> None:
        """Keep that manifest."""

    def close(self) -> None:
        """Let go of all parts. Harmless when repeated."""


class Medium(Protocol):
    """Where one disk is kept. One thread calls it; what goes wrong is DestinationFailed or InvalidInput.

    What is made is made durably, and documents are replaced as a whole: whoever dies over that leaves the older one.
    """

    @property
    def name(self) -> str:
        """The disk: "os" or "data-<lun>"."""

    @property
    def where(self) -> str:
        """Path or URL of the image, for messages."""

    @property
    def far(self) -> bool:
        """Whether each call waits for another host."""

    @property
    def renames(self) -> bool:
        """Whether a partial image can take the image's place at once."""

    @property
    def watched(self) -> bool:
        """Whether a change that somebody else makes to the image shows; where it does not it is read at each run."""

    @property
    def contested(self) -> bool:
        """Whether another run may still be writing here, so that nothing of what is kept may be believed."""

    @property
    def interrupted(self) -> bool:
        """Whether an older version of this program has left its mark of a run that did not end well."""

    @property
    def grains(self) -> Grains | None:
        """Where digests of grains may be kept from run to run."""

    def take(self) -> None:
        """Open the image, if it is there, for this run alone. InvalidInput where somebody else uses it."""

    def refuse_foreign(self, kept: Stamp | None) -> None:
        """InvalidInput where the image is somebody else's, or another one than that of the stamp that was kept."""

    def share(self) -> None:
        """Open the image, if it is there, to be read."""

    def open(self, part: Part) -> Store | None:
        """A part of it; None where it is not there."""

    def make(self, part: Part, size: int) -> Store:
        """A new part of that many zeros, in place of what there was; a device stays as it is."""

    def remove(self, part: Part) -> None:
        """Delete a part; one that is not there is no error. A power loss may bring it back: nothing relies on that."""

    def promote(self) -> None:
        """Let the partial image take the image's place. Only where it `renames`."""

    def is_blank(self) -> bool:
        """Whether nothing is in the image, so that it may be anybody's; of a device, at its beginning and its end."""

    def unseal(self) -> None:
        """The image is about to change: nothing may take it for a whole one."""

    def seal(self, seen: Stamp) -> Stamp:
        """The image, which had the stamp `seen` when it became so, is whole; the stamp by which it is known again.

        One that never fits again where somebody else has it open, and may change it without a trace.
        """

    def stamp(self, part: Part = "image") -> Stamp | None:
        """How a part is now, and that it is the one we opened; None where none is there.

        Nobody has changed it as long as that stays the same, where it is `watched`.
        """

    def held(self, part: Part = "image") -> AbstractContextManager[None]:
        """Nobody else changes this part while the block runs; DestinationFailed at its end where somebody may have."""

    def doubt(self, stamp: Stamp) -> str:
        """Why an image that was left with this stamp may hold something else today; "" where it cannot."""

    def guard(self, *, now: bool = False) -> None:
        """DestinationFailed when another run has taken the place, or the image is no longer what we opened.

        `now`: whenever it was last asked.
        """

    def reserve(self, extents: Iterable[tuple[int, int]]) -> None:
        """Take the room for writing these extents of the redo log to the image, in order, and for a manifest.

        DestinationFailed where there is not enough; afterwards that must not happen, as far as the medium can promise
        it. What the image holds stays as it is; its stamp need not.
        """

    def give_back(self, extents: Iterable[tuple[int, int]]) -> None:
        """Undo that; harmless when repeated, and where nothing was reserved."""

    def load(self, document: Document, *, ours: bool = True) -> IO[bytes] | None:
        """A document; None where there is none. `ours`: InvalidInput where somebody else may have written it."""

    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        """Replace a document."""

    def forget(self, document: Document) -> None:
        """Delete a document; one that is not there is no error."""

    def past(self, point: str) -> Past:
        """The disk at the earlier point of this name, which makes itself room. Its place deletes it."""

    def stop(self) -> None:
        """Reads and writes under way are the last ones; from any thread."""

    def close(self) -> None:
        """Let go of all parts. Harmless when repeated."""
