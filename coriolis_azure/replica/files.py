"""Raw images on this host: sparse files, one a disk, or block devices, with what is kept beside them.

    os.raw            the image, or a link to a block device
    os.raw.manifest   what it holds, with the size, mtime, ctime and inode the file had then, and the boot of the host
    os.raw.partial    a whole image to be, or
    os.raw.redo       the log of what is to change in the image
    os.raw.index      what the one or the other has
    os.raw.draft      what it is of
    os.raw.grains     a hint that saves reading, see `grains`
    points/<point>/   the disk at an earlier point in time: os.raw.manifest, and
        os.raw            a clone of the image that shares its blocks, where the file system can do that (reflink), or
        os.raw.undo       what it had where it was changed since, with its os.raw.index

An image is as we left it while size, mtime, ctime and inode are the same, and the host has not been started since: the
times of a file may be lost in a crash when its content is not. Our mtime is taken after fsync; a stranger's write
within the same tick of the file system's clock, a few milliseconds, is not seen. Nothing tells of writes to a block
device, so it is read at each run.

Nobody else may be at work on an image: see `exclusive`. An image without a manifest is somebody else's unless nothing
is in it; it is refused, or, where that was asked for, adopted: read as a whole.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from .. import formats
from ..errors import DestinationFailed, InvalidInput
from . import devices, exclusive, room, statefiles
from .file_past import FilePast
from .file_store import ZEROS, FileStore, Translated, open_document
from .grains import Grains
from .medium import Document, Part, Stamp, holds
from .runmark import RunMark, kernel

FOREIGN_REMEDY = (
    "Give another folder, or move it away. If it may be overwritten, run with --adopt: it is read, and what "
    "differs is sent."
)
POINTS = "points"
_SLACK = 4096  # bytes by which a manifest may be larger than its draft


class FileMedium:
    """One raw image and what is beside it. See Medium.

    `path` is a file, made when it is missing, or a block device of at least the disk's size, or a link to one. An
    image that is somebody else's is refused unless `adopt`. `mark`: of the run that writes.
    """

    far = False
    foreign_remedy = FOREIGN_REMEDY

    def __init__(self, path: Path, *, adopt: bool = False, mark: RunMark | None = None) -> None:
        self.path, self.name, self.where = path, path.name.removesuffix(".raw"), str(path)
        self._grains = Grains(self._beside("grains"))
        self._adopt, self._mark = adopt, mark
        self._stores: dict[Part, FileStore] = {}
        self._writes = False
        self._stopped = self._disturbed = False
        self._prepared: int | None = None  # the manifest to be, with the room that it needs
        self._enlarged = False  # whether the image has room that nothing is in

    def _beside(self, what: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{what}")

    @property
    def renames(self) -> bool:
        """See Medium."""
        return not self.is_device

    @property
    def watched(self) -> bool:
        """See Medium."""
        return not self.is_device

    @property
    def contested(self) -> bool:
        """See Medium."""
        return self._mark is not None and self._mark.contested

    @property
    def interrupted(self) -> bool:
        """See Medium."""
        return os.path.lexists(self._beside("dirty"))

    @property
    def is_device(self) -> bool:
        """Whether the image is a block device. Not known before it was opened."""
        image = self._stores.get("image")
        return image is not None and image.is_device

    @property
    def grains(self) -> Grains | None:
        """See Medium."""
        return self._grains

    # Its parts

    def take(self) -> None:
        """See Medium."""
        if self._writes:
            return
        self.close()
        try:
            with self._translated("cannot be opened"):
                if os.path.lexists(self.path):
                    self._stores["image"] = self._store(self._opened(), self.path)
                else:
                    self.path.parent.stat()  # it will be made there
        except BaseException:
            self.close()
            raise
        self._writes = True

    def share(self) -> None:
        """See Medium."""
        if self._stores:
            return
        with self._translated("cannot be read"):
            if not os.path.lexists(self.path):
                return
            path = self._followed()
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        store = self._stores["image"] = self._store(fd, self.path)
        store.drop_cache()

    def open(self, part: Part) -> FileStore | None:
        """See Medium."""
        if part in self._stores:
            return self._stores[part]
        if part == "image":
            return None
        path = self._beside(part)
        with self._translated("cannot be opened", path):
            try:
                fd = exclusive.open_file(path)
            except FileNotFoundError:
                return None
        store = self._stores[part] = self._store(fd, path)
        return store

    def make(self, part: Part, size: int) -> FileStore:
        """See Medium."""
        if part == "image" and (image := self._stores.get("image")) is not None:
            with self._translated("cannot be prepared"):
                if not image.is_device:
                    os.ftruncate(image.fd, 0)
                    os.ftruncate(image.fd, size)
            return image
        path = self.path if part == "image" else self._beside(part)
        self.remove(part)
        with self._translated("cannot be made", path):
            fd = exclusive.create(path)
            store = self._stores[part] = self._store(fd, path)
            os.ftruncate(fd, size)
            statefiles.sync_folder(path.parent)
        return store

    def remove(self, part: Part) -> None:
        """See Medium."""
        self._close(part)
        with self._translated("cannot be removed", self._beside(part)):
            statefiles.remove(self._beside(part), durable=False)

    def promote(self) -> None:
        """See Medium."""
        with self._translated("cannot be put in place"):
            os.replace(self._beside("partial"), self.path)  # noqa: PTH105
            statefiles.sync_folder(self.path.parent)
        self._close("image")
        store = self._stores["image"] = self._stores.pop("partial")
        store.path = self.path

    def _store(self, fd: int, path: Path) -> FileStore:
        try:
            return FileStore(fd, path, self.name, lambda: self._stopped)
        except BaseException:
            os.close(fd)
            raise

    def _close(self, part: Part) -> None:
        store = self._stores.pop(part, None)
        if store is not None:
            os.close(store.fd)

    # Whose it is

    def _opened(self) -> int:
        """The image, open for this run alone."""
        path = self._followed()
        return exclusive.open_device(path) if path.is_block_device() else self._open_file(path)

    def _open_file(self, path: Path) -> int:
        """Open the file for writing, if it is ours and nobody else uses it."""
        fd = statefiles.open_existing(path, os.O_RDONLY)
        try:
            exclusive.refuse_writers(fd, path)
            exclusive.refuse_loops(fd, path)
            if os.fstat(fd).st_nlink > 1:
                raise InvalidInput(
                    f"{path} has other names (hard links), whose content would change with it",
                    remedy="Make it a file of its own: copy it, remove it, and rename the copy.",
                )
        finally:
            os.close(fd)
        return exclusive.open_file(path)

    def _followed(self) -> Path:
        """The path, or the block device that it leads to. InvalidInput for other links, and those of other users."""
        link = os.lstat(self.path)
        path = self.path.resolve() if stat.S_ISLNK(link.st_mode) else self.path
        if path != self.path and not (link.st_uid in (0, os.geteuid()) and path.is_block_device()):
            raise InvalidInput(
                f"{self.path} is a link",
                remedy="Remove it and run again: only links of your own to a block device are followed.",
            )
        if not (path.is_block_device() or path.is_file()):
            raise InvalidInput(f"{self.path} is neither a file nor a block device")
        return path

    def refuse_foreign(self, kept: Stamp | None) -> None:
        """See Medium."""
        image = self._stores.get("image")
        if image is None:
            return
        if os.path.lexists(self._beside("manifest")):
            same = (
                not image.is_device
                or kept is None
                or kept.get("device", "") == (self.stamp() or {}).get("device")
            )
            if same or self._adopt:
                return
            what = f"{self.path} is another device than at the last run"
        else:
            what = f"{self.path} holds data, and no run of ours has made it"
        if not self._adopt and self.is_blank():
            return
        form = formats.wrapped(*self._ends(image))
        if form:
            raise InvalidInput(
                f"{self.path} is a {form} image, and a raw one is meant", remedy=formats.remedy(form)
            )
        if not self._adopt:
            raise InvalidInput(what, remedy=self.foreign_remedy)

    def _ends(self, image: FileStore) -> tuple[bytes, bytes]:
        """What formats are told by. Only a file ends where its image does."""
        size = image.size
        head = image.read(0, min(size, formats.HEAD))
        if image.is_device:
            return head, b""
        return head, image.read(max(0, size - formats.TAIL), min(size, formats.TAIL))

    def is_blank(self) -> bool:
        """See Medium."""
        image = self._stores["image"]
        size = image.size
        if image.is_device:
            length = min(size, len(ZEROS))
            return not self._adopt and all(_is_zeros(image.read(at, length)) for at in (0, size - length))
        pieces = (
            (at, min(len(ZEROS), offset + length - at))
            for offset, length in image.extents(0, size)
            for at in range(offset, offset + length, len(ZEROS))
        )
        return all(_is_zeros(image.read(at, length)) for at, length in pieces)

    # How it is

    def unseal(self) -> None:
        """See Medium. A raw image has nothing that says so."""

    def seal(self, seen: Stamp) -> Stamp:
        """See Medium. Another program that has the file open may have mapped it."""
        image = self._stores["image"]
        if image.is_device:
            return seen
        with exclusive.alone(image.fd) as alone:
            return seen if alone() and not self._disturbed else seen | {"ctime_ns": 0}

    def stamp(self, part: Part = "image") -> Stamp | None:
        """See Medium. Of a file: the one that the path leads to."""
        store = self._stores.get(part)
        if store is not None and store.is_device:
            device = devices.identity(os.fstat(store.fd).st_rdev)
            return {"size": store.size, "mtime_ns": 0, "ctime_ns": 0, "inode": 0, "device": device}
        path = self.path if part == "image" else self._beside(part)
        with self._translated("cannot be looked at", path):
            try:
                now = os.lstat(path)
            except FileNotFoundError:
                return None
            if part != "image" and (store is None or not os.path.samestat(now, os.fstat(store.fd))):
                return None
        return {
            "size": now.st_size,
            "mtime_ns": now.st_mtime_ns,
            "ctime_ns": now.st_ctime_ns,
            "inode": now.st_ino,
            "boot": kernel(),
        }

    @contextlib.contextmanager
    def held(self, part: Part = "image") -> Iterator[None]:
        """See Medium. Who has it open already, and may only read, is left alone."""
        store = self._stores[part]
        with exclusive.alone(store.fd) as alone:
            before = alone()
            yield
            if before and not alone():
                raise DestinationFailed(
                    f"{store.path} was opened for writing by somebody else while it was brought up to date",
                    remedy="End what writes to it, then run again: that goes on with it, and reads it as a whole.",
                    disk=self.name,
                )
            self._disturbed = not before

    def doubt(self, stamp: Stamp) -> str:
        """See Medium."""
        now = self.stamp()
        if now != stamp:
            if now is not None and now | {"boot": stamp.get("boot", "")} == stamp:
                return "the host was started since the last run"
            return f"{self.path} was changed since the last run"
        with self._translated("cannot be looked at"):
            if statefiles.ctime_can_be_set(self.path.parent):
                return "its file system does not show whether a file was changed"
        return ""

    def guard(self, *, now: bool = False) -> None:
        """See Medium."""
        if self._mark is not None:
            self._mark.check(now=now)
        if now and not self._is_as_opened():
            raise DestinationFailed(
                f"{self.path} was made, removed or replaced by somebody else while this run was at work",
                remedy="Let nobody else change it while a run is at work, then run again.",
                disk=self.name,
            )

    def _is_as_opened(self) -> bool:
        """Whether the path is still that of the image that is open, or there is none."""
        image = self._stores.get("image")
        if image is None:
            return not os.path.lexists(self.path)
        try:
            there, ours = self.path.stat(), os.fstat(image.fd)
        except OSError:
            return False
        same_device = stat.S_ISBLK(there.st_mode) and there.st_rdev == ours.st_rdev
        return same_device or os.path.samestat(there, ours)

    # Room for what is to come

    def reserve(self, extents: Iterable[tuple[int, int]]) -> None:
        """See Medium. Where its file system can do that, see `room`."""
        path = self._beside("manifest")
        with self._translated("cannot be written", path):
            draft = self._beside("draft")
            like = draft if draft.exists() else path
            self._prepared = statefiles.prepare(path, like.stat().st_size + _SLACK)
        image = self._stores.get("image")
        if image is None or image.is_device or image.is_copied_on_write:
            return
        log = self.open("redo")
        if log is None:
            return
        with self._translated("would not have the room for what was fetched"):
            self._enlarged = True
            self._enlarged = room.take(image.fd, extents, lambda *extent: holds(log, *extent))

    def give_back(self, extents: Iterable[tuple[int, int]]) -> None:
        """See Medium."""
        with self._translated("cannot be left as it was"):
            self._give_prepared_up()
            if self._enlarged:
                room.give_back(self._stores["image"].fd, extents)
                self._enlarged = False

    def _give_prepared_up(self) -> None:
        fd, self._prepared = self._prepared, None
        if fd is not None:
            statefiles.give_up(fd, self._beside("manifest"))

    # Its documents

    def load(self, document: Document, *, ours: bool = True) -> IO[bytes] | None:
        """See Medium."""
        return open_document(self._beside(document), self.name, ours=ours)

    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        """See Medium."""
        path, fd = self._beside(document), None
        if document == "manifest":
            fd, self._prepared = self._prepared, None
        with self._translated("cannot be written", path):
            statefiles.put(statefiles.prepare(path) if fd is None else fd, path, pieces)
            if document == "manifest":
                statefiles.remove(self._beside("dirty"))

    def forget(self, document: Document) -> None:
        """See Medium."""
        path = self._beside(document)
        with self._translated("cannot be removed", path):
            for each in (self._beside("manifest"), path):  # a run may have died over replacing one of them
                statefiles.remove(each.with_name(f"{each.name}.new"))
            statefiles.remove(path)

    def past(self, point: str) -> FilePast:
        """See Medium."""
        return FilePast(
            self._stores.get("image"), self.path.parent / POINTS / point / self.path.name, self.name
        )

    def stop(self) -> None:
        """See Medium."""
        self._stopped = True

    def close(self) -> None:
        """See Medium."""
        with contextlib.suppress(OSError):
            self._give_prepared_up()
        for part in list(self._stores):
            self._close(part)
        self._writes = self._enlarged = False

    def _translated(self, what: str, path: Path | None = None) -> Translated:
        return Translated(path or self.path, what, self.name)


def _is_zeros(data: bytes) -> bool:
    return data == ZEROS[: len(data)]
