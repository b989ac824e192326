"""The interface of a medium, which stores one disk of a replica: bytes, and two documents beside them.

A medium is all that a new kind of destination has to bring. It knows nothing of digests: the rules that keep a replica
right are in `replica`. It stores these parts:

* the *image*: the disk as of its last good point in time;
* the content of a draft, which a run has fetched and not published yet: a *partial* image, or a *redo* log over the
  image;
* the *index*: which chunks the draft holds.

The document *manifest* describes the image, the document *draft* the draft. What a medium keeps of an earlier point in
time is a `Past`. `testing.check_medium` tests any medium.
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
    """Bytes that can be read at any offset, by several threads."""

    @property
    def size(self) -> int:
        """The number of bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on. Raises DestinationFailed if there are fewer."""


class Store(Readable, Protocol):
    """Bytes that can be read and written at any offset, by several threads. Failures raise DestinationFailed."""

    @property
    def far(self) -> bool:
        """Whether each call waits for another host."""

    def write(self, offset: int, data: Content) -> None:
        """Write `data` at `offset`."""

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, if possible without occupying space."""

    def reflink(self, source: Store, offset: int, length: int) -> bool:
        """Make the range share the blocks of the same range of `source`, another store of this medium.

        Only where a write would need free space, as on btrfs. Returns False if nothing was done: then write it.
        """

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield, in order, the offset and length of each part of the range that may hold anything but zeros."""

    def resize(self, size: int) -> None:
        """Truncate or extend to `size` bytes; what is added reads as zeros. A device keeps its size."""

    def flush(self) -> None:
        """Make everything written durable: on return it survives a power loss."""

    def uncached(self) -> AbstractContextManager[Callable[[int, int], Content]]:
        """Flush, and give a function like `read` that reads from the medium itself, past the caches of this host."""


def holds(store: Store, offset: int, length: int) -> bool:
    """Whether the range may hold anything but zeros, as far as that is known without reading it."""
    return next(store.extents(offset, length), None) is not None


def read_padded(store: Readable, offset: int, length: int, read: Callable[[int, int], Content]) -> Content:
    """`length` bytes from `offset` on, by `read`; zeros beyond the end of the store."""
    there = max(0, min(length, store.size - offset))
    data = read(offset, there) if there else b""
    return data if there == length else bytes(data) + bytes(length - there)


class Past(Protocol):
    """One disk at an earlier point in time: a snapshot of its image, or an undo log over the next newer point.

    Failures are raised as DestinationFailed.
    """

    def snapshot(self) -> bool:
        """Keep the image as it is now, without copying its bytes. Returns False if the medium cannot do that."""

    def open(self, part: PastPart) -> Store | None:
        """Open a part for reading; None if it does not exist."""

    def make(self, part: PastPart, size: int) -> Store:
        """Create a part of `size` zeros."""

    def load(self) -> IO[bytes] | None:
        """The manifest of that point; None if there is none."""

    def save(self, pieces: Iterable[bytes]) -> None:
        """Save the manifest of that point."""

    def close(self) -> None:
        """Close all parts. May be repeated."""


class Medium(Protocol):
    """The storage of one disk. Only one thread calls it. Failures are raised as DestinationFailed or InvalidInput.

    Whatever it creates is durable on return. A document is replaced atomically: after a crash, the old one or the new
    one is there.
    """

    @property
    def name(self) -> str:
        """The disk: "os" or "data-<lun>"."""

    @property
    def where(self) -> str:
        """The path or URL of the image, for messages."""

    @property
    def far(self) -> bool:
        """Whether each call waits for another host."""

    @property
    def joined_bytes(self) -> int:
        """The most bytes of neighbouring chunks that pay off in one write; 0 if each is written by itself."""

    @property
    def renames(self) -> bool:
        """Whether `promote` can replace the image by a partial image atomically."""

    @property
    def watched(self) -> bool:
        """Whether the stamp shows that somebody else changed the image. If not, every run reads the whole image."""

    @property
    def contested(self) -> bool:
        """Whether another run may still be writing here. Then nothing that is stored is trusted."""

    @property
    def interrupted(self) -> bool:
        """Whether a run that wrote in place, of an older version of this program, did not succeed."""

    @property
    def grains(self) -> Grains | None:
        """The store of grain digests that outlives runs; None if there is none."""

    def take(self) -> None:
        """Open the image, if it exists, exclusively for this run. Raises InvalidInput if something else uses it."""

    def refuse_foreign(self, stamp: Stamp | None) -> None:
        """Raise InvalidInput if no run of ours made the image, or it is not the one that `stamp` is of."""

    def share(self) -> None:
        """Open the image, if it exists, for reading only."""

    def open(self, part: Part) -> Store | None:
        """Open a part; None if it does not exist."""

    def make(self, part: Part, size: int) -> Store:
        """Create a part of `size` zeros, replacing any older one. A device keeps its content."""

    def remove(self, part: Part) -> None:
        """Delete a part; a missing one is no error. It may exist again after a power loss."""

    def promote(self) -> None:
        """Replace the image by the partial image. Only called if `renames`."""

    def is_blank(self) -> bool:
        """Whether the image holds only zeros, so that it may be taken over. Of a device, only both ends are read."""

    def unseal(self) -> None:
        """Mark the image as incomplete, because its content is about to change."""

    def seal(self, seen: Stamp) -> Stamp:
        """Mark the image as complete; return the stamp that it must have in the next run to be trusted.

        `seen`: its stamp when it became complete. If another program has the image open and could change it without a
        trace, the returned stamp never matches.
        """

    def stamp(self, part: Part = "image") -> Stamp | None:
        """What identifies a part and changes whenever it is written, if it is `watched`; None if there is no such part.

        Also None if another file has taken the place of the part that was opened, except for the image.
        """

    def protected(self, part: Part = "image") -> AbstractContextManager[None]:
        """Keep others from changing the part in this block. Raises DestinationFailed at its end if one may have."""

    def unshared(self, part: Part) -> AbstractContextManager[Callable[[], bool]]:
        """Give a function that tells whether nobody else can have changed the part since the block began.

        It returns false if nothing can tell. The part is not opened again in the block, and only this run writes it.
        """

    def doubt(self, stamp: Stamp) -> str:
        """Why an image that had `stamp` after the last run may have changed since; "" if it has not."""

    def guard(self, *, now: bool = False) -> None:
        """Raise DestinationFailed if another run has taken the place, or the image is not the one that was opened.

        `now`: check even if the last check was a moment ago.
        """

    def reserve_space(self, extents: Iterable[tuple[int, int]]) -> None:
        """Reserve the space for writing these extents of the redo log to the image, and for a manifest.

        Raises DestinationFailed if there is not enough. Afterwards publishing must not run out of space, as far as the
        medium can ensure that. The content of the image stays the same, but its stamp may change.
        """

    def release_space(self, extents: Iterable[tuple[int, int]]) -> None:
        """Undo `reserve_space`. May be repeated, and called if nothing was reserved."""

    def load(self, document: Document, *, ours: bool = True) -> IO[bytes] | None:
        """Open a document for reading; None if it does not exist. `ours`: raise InvalidInput if others may write it."""

    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        """Replace a document."""

    def forget(self, document: Document) -> None:
        """Delete a document; a missing one is no error."""

    def past(self, point: str) -> Past:
        """The disk at the earlier point with this label. The `Points` of its place delete it."""

    def stop(self) -> None:
        """Make all further reads and writes fail. Any thread may call this."""

    def close(self) -> None:
        """Close all parts. May be repeated."""
