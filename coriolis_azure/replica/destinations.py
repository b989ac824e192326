"""The interfaces of destinations, which are all that a transfer and a verification know of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, runtime_checkable

from ..model import Json
from .grains import Grains
from .manifest import Manifest
from .medium import Readable

Content = bytes | bytearray | memoryview


class Destination(Protocol):
    """A disk that is written. A context manager, which calls `close` at its end. All offsets and sizes are bytes.

    First one thread calls `known`. Then several threads may call `intend`, `write`, `zero` and `read`, in any order of
    offsets; no byte is written twice in a run, and each write lies within a range that was passed to `intend` before.
    When they are done, one thread calls `flush`, then `commit`, then `close`. A run that fails calls `close` without
    `commit`. Failures are raised as DestinationFailed, with disk and offset.
    """

    @property
    def readable(self) -> bool:
        """Whether `read` works. Without it, whole chunks are sent, and nothing is read back."""

    @property
    def checkable(self) -> bool:
        """Whether `check` can confirm anything; only asked if the destination is not readable."""

    @property
    def far(self) -> bool:
        """Whether each call waits for another host. Then many are in flight, and nothing is read just to send less."""

    @property
    def grains(self) -> Grains | None:
        """The store of grain digests that outlives runs, available after `known`; None if there is none."""

    def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        """What is known of the content, as a manifest for the disk with the unique id `disk` and `size` bytes.

        A fresh manifest if nothing is known, if the content is of another disk, or if `full` is true.
        """

    def intend(self, offset: int, length: int) -> None:
        """Announce that this range will change. Durable on return: after a crash it is unknown, never wrong."""

    def write(self, offset: int, data: Content) -> None:
        """Write `data` at `offset`."""

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""

    def settle(self, manifest: Manifest, first: int, count: int) -> None:
        """Note that `count` chunks from `first` on are written and match `manifest`. Called by one thread."""

    def read(self, offset: int, length: int) -> bytes:
        """The current content, whether or not this run wrote it."""

    def flush(self) -> None:
        """Make everything written durable: on return it survives a power loss."""

    def check(self) -> bool | None:
        """Have the other side confirm what this run wrote, after `flush`; for destinations that are not readable.

        True if it confirms, None if it cannot tell or nothing was written. Raises CorruptChunk if the content differs.
        """

    def commit(self, manifest: Manifest) -> None:
        """Record that the destination holds exactly what `manifest` says, so that the next run can start from it.

        At a Place, this becomes visible only through `publish`.
        """

    def close(self) -> None:
        """Close it. May be repeated."""

    def __enter__(self) -> Destination: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Synced(Destination, Protocol):
    """A disk that can be read back while it is written."""

    def sync(self) -> None:
        """Make what was written up to now durable, while other threads go on writing."""

    @property
    def undisturbed(self) -> bool:
        """Whether nobody else can have changed what was read back before `flush`, which has been called."""


@runtime_checkable
class Joined(Destination, Protocol):
    """A disk to which chunks that are neighbours may be written together."""

    @property
    def joined_bytes(self) -> int:
        """The most bytes that pay off in one write; 0 if each chunk is written by itself."""


class Folder(Protocol):
    """A place for the disks of a VM, exclusively for one run. A context manager, which calls `close` at its end."""

    def disk(self, name: str) -> Destination:
        """The destination for the disk `name`: "os" or "data-<lun>"."""

    def names(self) -> list[str]:
        """The names of the disks that it has content of."""

    def claim(self, vm: str) -> None:
        """Reserve this place for the VM with the ARM id `vm`. Raises InvalidInput if it belongs to another VM."""

    def reserve(self, disks: Collection[str]) -> None:
        """Lock the content of `disks` for this run. Raises InvalidInput if it must not be written."""

    def stop(self) -> None:
        """Make everything in progress on its disks fail soon, with DestinationFailed. Any thread may call this."""

    def tell_removed(self, disks: Collection[str]) -> None:
        """Report each disk with content here that is not one of `disks`, because the VM no longer has it."""

    def close(self) -> None:
        """Close the place and its disks. May be repeated."""

    def __enter__(self) -> Folder: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Measured(Folder, Protocol):
    """A place whose disks may be of a fixed size."""

    def refuse_small(self, sizes: Mapping[str, int]) -> None:
        """Raise InvalidInput if one of the disks, by its name, does not fit. Called after `reserve`."""

    def __enter__(self) -> Measured: ...


@runtime_checkable
class Based(Destination, Protocol):
    """A disk with whose manifest a baseline is stored: the snapshot that has the same content."""

    @property
    def baseline(self) -> tuple[Manifest, Json] | None:
        """What was committed with the image that is there, and the baseline that was left with it; None for none.

        Valid once `known` was called.
        """

    def left(self) -> Json | None:
        """The baseline that is recorded here, before `known` says whether it is of use; None for none."""

    def leave(self, baseline: Callable[[], Json | None]) -> None:
        """Ask for the baseline that goes with what `commit` commits, and keep it with that."""


@runtime_checkable
class Persistent(Based, Protocol):
    """A disk that outlives runs: its manifest is stored with it."""

    def stored(self) -> Manifest:
        """The manifest of the last successful run; afterwards `read` may be called. Changes nothing.

        Chunks are UNKNOWN if a run that wrote in place has died since. Raises InvalidInput without a usable manifest.
        """

    def at(self, points: Sequence[str]) -> AbstractContextManager[tuple[Manifest, Readable]]:
        """The manifest and the content at the first of `points`, which are that point and all newer ones.

        Without points, those of the disk as it is now. The caller must compare what it reads with the manifest. Raises
        InvalidInput if there is nothing of that point.
        """


class Points(Protocol):
    """The earlier points in time of a place, by labels."""

    def records(self) -> dict[str, bytes | None]:
        """The record of each point; None if the point is incomplete."""

    def complete(self, label: str, record: bytes) -> None:
        """Mark a point as complete; durable on return."""

    def remove(self, label: str) -> None:
        """Delete a point, its record first. A missing one is no error."""


@runtime_checkable
class Place(Folder, Protocol):
    """A folder that outlives runs."""

    def disk(self, name: str) -> Persistent:
        """See Folder."""

    def record(self) -> bytes | None:
        """The document that says which disks belong together; None if there is none. See `sets`."""

    def keep_record(self, text: bytes) -> None:
        """Replace that document atomically and durably."""

    def publish(self, record: bytes) -> None:
        """Replace that document and, with it, the images of all committed disks: all or none, even after a crash."""

    @property
    def points(self) -> Points:
        """The earlier points in time."""

    def unpublished(self) -> list[str]:
        """The disks whose images do not match the document yet, because a run died while it published."""

    def __enter__(self) -> Place: ...
