"""Raw images on this host, one sparse file or block device per disk, and the files beside them.

    os.raw            the image, or a link to a block device
    os.raw.manifest   what the image holds; the file's size, mtime, ctime and inode, and the boot of the host
    os.raw.partial    a draft as a partial image, or
    os.raw.redo       a draft as a redo log
    os.raw.index      the index of the draft
    os.raw.draft      the disk that the draft is of and, once it is complete, its manifest
    os.raw.grains     digests of grains, see `grains`
    points/<label>/   the disk at an earlier point in time: os.raw.manifest, and
        os.raw            a copy of the image that shares its blocks (a reflink) or, where the file system has none,
        os.raw.undo       an undo log of what has changed since, with its os.raw.index

An image is trusted while its size, mtime, ctime and inode are as the last run left them and the host has not been
booted since, because a crash can lose the times of a file but not its content. The mtime is taken after an fsync; a
write by another program within the same tick of the file system's clock, a few milliseconds, goes unnoticed. Nothing
records writes to a block device, so every run reads all of it.

No other program may use an image (see `exclusive`). An image without a manifest is refused unless it is empty, or is to
be adopted: then all of it is read.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from .. import formats
from ..errors import DestinationFailed, InvalidInput
from . import devices, exclusive, space, statefiles
from .file_past import FilePast
from .file_store import ZEROS, FileStore, Translated, open_document
from .grains import EntryFile, Grains
from .medium import Document, Part, Stamp, holds
from .runmark import RunMark, kernel

FOREIGN_REMEDY = (
    "Give another folder, or move it away. If it may be overwritten, run with --adopt: it is read, and only what "
    "differs is sent."
)
POINTS = "points"
_BESIDE = (
    "partial",
    "redo",
    "index",
    "draft",
    "manifest",
    "dirty",
)  # files that a run opens, replaces or removes
_SLACK = 4096  # bytes by which a manifest may be larger than its draft


class FileMedium:
    """One raw image and the files beside it. See Medium.

    `path`: a file, which is created if it is missing; a block device, at least as large as the disk; or a link to one.
    `adopt`: take over an image that no run of ours made. `mark`: the mark of the run that writes.
    """

    far = False
    joined_bytes = 0
    foreign_remedy = FOREIGN_REMEDY

    def __init__(self, path: Path, *, adopt: bool = False, mark: RunMark | None = None) -> None:
        self.path, self.name, self.where = path, path.name.removesuffix(".raw"), str(path)
        self._grains = Grains(EntryFile(self._beside("grains")))
        self._adopt, self._mark = adopt, mark
        self._stores: dict[Part, FileStore] = {}
        self._writes = False
        self._stopped = self._disturbed = False
        self._new_manifest: int | None = None  # the open file of the next manifest, with its space reserved
        self._has_reserved = False  # whether space is reserved for the image

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
        """Whether the image is a block device; False before it is opened."""
        image = self._stores.get("image")
        return image is not None and image.is_device

    @property
    def grains(self) -> Grains | None:
        """See Medium."""
        return self._grains

    # Parts

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
                    self.path.parent.stat()  # must exist: the image will be created in it
                for what in _BESIDE:
                    statefiles.refuse_irregular(self._beside(what))
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
        with self._translated("cannot be created", path):
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
            statefiles.close(fd)
            raise

    def _close(self, part: Part) -> None:
        store = self._stores.pop(part, None)
        if store is not None:
            statefiles.close(store.fd)

    # Ownership

    def _opened(self) -> int:
        """The image, opened exclusively for this run."""
        path = self._followed()
        return exclusive.open_device(path) if path.is_block_device() else self._open_file(path)

    def _open_file(self, path: Path) -> int:
        """Open the file for writing. Raises InvalidInput if it is not ours, or another program uses it."""
        fd = statefiles.open_existing(path, os.O_RDONLY)
        try:
            exclusive.refuse_writers(fd, path)
            exclusive.refuse_loops(fd, path)
            if os.fstat(fd).st_nlink > 1:
                raise InvalidInput(
                    f"{path} has other names (hard links), whose content would change with it",
                    remedy="Make it an independent file: copy it, remove it, and rename the copy.",
                )
        finally:
            statefiles.close(fd)
        return exclusive.open_file(path)

    def _followed(self) -> Path:
        """The path, or the block device it links to. Raises InvalidInput for any other link, or one of another user."""
        link = os.lstat(self.path)
        is_link = stat.S_ISLNK(link.st_mode)
        path = Path(os.path.realpath(self.path)) if is_link else self.path
        if not os.path.lexists(path) and devices.is_name(path):
            raise InvalidInput(
                f"{self.path} leads to {path}, which does not exist",
                remedy="Attach or activate that device, or link to another one, then run again.",
            )
        if is_link and not (link.st_uid in (0, os.geteuid()) and path.is_block_device()):
            raise InvalidInput(
                f"{self.path} is a link",
                remedy="Remove it and run again: only links of your own to a block device are followed.",
            )
        if not (path.is_block_device() or path.is_file()):
            raise InvalidInput(f"{self.path} is neither a file nor a block device")
        return path

    def refuse_foreign(self, stamp: Stamp | None) -> None:
        """See Medium."""
        image = self._stores.get("image")
        if image is None:
            return
        if os.path.lexists(self._beside("manifest")):
            known = stamp is not None and stamp.get("device", "") == (self.stamp() or {}).get("device")
            if known or not image.is_device or self._adopt:
                return
            what = f"{self.path} is another device than in the last run"
            if stamp is None:
                manifest = self._beside("manifest")
                what = f"{manifest} cannot be used, so {self.path} may be another device than in the last run"
        else:
            what = f"{self.path} holds data, and no run of ours has made it"
        if not self._adopt and self.is_blank():
            return
        form = formats.wrapped(*self._ends(image))
        if form:
            raise InvalidInput(f"{self.path} is a {form} image, not a raw one", remedy=formats.remedy(form))
        if not self._adopt:
            raise InvalidInput(what, remedy=self.foreign_remedy)

    def _ends(self, image: FileStore) -> tuple[bytes, bytes]:
        """The first and last bytes, by which a format is recognised. A device may be larger than its image: no last."""
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

    # State

    def unseal(self) -> None:
        """Do nothing: a raw image cannot be marked. See Medium."""

    def seal(self, seen: Stamp) -> Stamp:
        """See Medium. A program that has the file open may have mapped it, and change it without a trace."""
        image = self._stores["image"]
        if image.is_device:
            return seen
        with exclusive.alone(image.fd) as alone:
            return seen if alone() and not self._disturbed else seen | {"ctime_ns": 0}

    def stamp(self, part: Part = "image") -> Stamp | None:
        """See Medium. For the image, that of the file at its path, whether or not it is the one that was opened."""
        store = self._stores.get(part)
        if store is not None and store.is_device:
            device = devices.identity(os.fstat(store.fd).st_rdev)
            return {"size": store.size, "mtime_ns": 0, "ctime_ns": 0, "inode": 0, "device": device}
        path = self.path if part == "image" else self._beside(part)
        with self._translated("cannot be examined", path):
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
    def protected(self, part: Part = "image") -> Iterator[None]:
        """See Medium. If a program already has the file open for reading, later ones go unnoticed."""
        store = self._stores[part]
        with exclusive.alone(store.fd) as alone:
            before = alone()
            yield
            if before and not alone():
                raise DestinationFailed(
                    f"another program opened {store.path} for writing while it was being updated",
                    remedy="End that program, then run again: the next run completes the update and reads all of it.",
                    disk=self.name,
                )
            self._disturbed = not before

    @contextlib.contextmanager
    def unshared(self, part: Part) -> Iterator[Callable[[], bool]]:
        """See Medium."""
        store = self._stores[part]
        if store.is_device:  # opened exclusively
            yield lambda: True
            return
        with exclusive.alone(store.fd, otherwise=False) as alone:
            yield alone

    def doubt(self, stamp: Stamp) -> str:
        """See Medium."""
        now = self.stamp()
        if now != stamp:
            if now is not None and now | {"boot": stamp.get("boot", "")} == stamp:
                return "the host was booted since the last run"
            return f"{self.path} was changed since the last run"
        with self._translated("cannot be examined"):
            if statefiles.ctime_can_be_set(self.path.parent):
                return "the file system does not reveal every change of a file"
        return ""

    def guard(self, *, now: bool = False) -> None:
        """See Medium."""
        if self._mark is not None:
            self._mark.check(now=now)
        if now and not self._is_as_opened():
            raise DestinationFailed(
                f"another program created, removed or replaced {self.path} during this run",
                remedy="Make sure that no other program changes it during a run, then run again.",
                disk=self.name,
            )

    def _is_as_opened(self) -> bool:
        """Whether the path still leads to the open image or, if there was no image, to nothing."""
        image = self._stores.get("image")
        if image is None:
            return not os.path.lexists(self.path)
        try:
            at_path, opened = self.path.stat(), os.fstat(image.fd)
        except OSError:
            return False
        same_device = stat.S_ISBLK(at_path.st_mode) and at_path.st_rdev == opened.st_rdev
        return same_device or os.path.samestat(at_path, opened)

    # Space

    def reserve_space(self, extents: Iterable[tuple[int, int]]) -> None:
        """See Medium, and `space` for what each file system can ensure."""
        path = self._beside("manifest")
        with self._translated("cannot be written", path):
            draft = self._beside("draft")
            like = draft if draft.exists() else path
            self._new_manifest = statefiles.prepare(path, like.stat().st_size + _SLACK)
        image = self._stores.get("image")
        if image is None or image.is_device or image.is_copied_on_write:
            return
        log = self.open("redo")
        if log is None:
            return
        with self._translated("lacks the space for what was fetched"):
            self._has_reserved = True  # some of it, even if this fails
            self._has_reserved = space.reserve(image.fd, extents, lambda *extent: holds(log, *extent))

    def release_space(self, extents: Iterable[tuple[int, int]]) -> None:
        """See Medium."""
        with self._translated("cannot release the space that was reserved for it"):
            self._abandon_new_manifest()
            if self._has_reserved:
                space.release(self._stores["image"].fd, extents)
                self._has_reserved = False

    def _abandon_new_manifest(self) -> None:
        fd, self._new_manifest = self._new_manifest, None
        if fd is not None:
            statefiles.abandon(fd, self._beside("manifest"))

    # Documents

    def load(self, document: Document, *, ours: bool = True) -> IO[bytes] | None:
        """See Medium."""
        return open_document(self._beside(document), self.name, ours=ours)

    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        """See Medium."""
        path, fd = self._beside(document), None
        if document == "manifest":
            fd, self._new_manifest = self._new_manifest, None
        with self._translated("cannot be written", path):
            statefiles.complete(statefiles.prepare(path) if fd is None else fd, path, pieces)
            if document == "manifest":
                statefiles.remove(self._beside("dirty"))

    def forget(self, document: Document) -> None:
        """See Medium."""
        path = self._beside(document)
        with self._translated("cannot be removed", path):
            for each in (self._beside("manifest"), path):  # a run may have died while it replaced one of them
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
            self._abandon_new_manifest()
        for part in list(self._stores):
            self._close(part)
        self._writes = self._has_reserved = False

    def _translated(self, what: str, path: Path | None = None) -> Translated:
        return Translated(path or self.path, what, self.name)


def _is_zeros(data: bytes) -> bool:
    return data == ZEROS[: len(data)]
