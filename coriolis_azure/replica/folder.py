"""A folder of raw images: the place of one VM's replica on this host."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

from ..errors import DestinationFailed, InvalidInput, NoReplica, exhausted_remedy
from ..events import Notice, Report, silent
from ..model import Image
from . import devices, history, points, publishing, sets, statefiles
from .file_store import REMEDIES, Translated
from .files import POINTS, FileMedium
from .medium import Medium
from .replica import Replica
from .runmark import RunMark

OWNER = ".vm"  # the file with the id of the VM
EXPORTS = ".nbd"  # the file that says that the images are exports of an NBD server, with the name of the VM
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
_DISK = re.compile(r"os|data-[0-9]{1,3}")
_DRAFT = re.compile(rf"({_DISK.pattern})\.raw\.(?:draft|partial|redo|index)")


class ImageFolder:
    """The folder of the images `os.raw` and `data-<lun>.raw`, exclusively for one run. See Place.

    A missing folder is created, unless it must be `existing`: then it is only read. `adopt`: take over images that no
    run of ours made. Raises InvalidInput if the folder cannot be used, or another run uses it.
    """

    def __init__(
        self, path: Path, report: Report = silent, *, existing: bool = False, adopt: bool = False
    ) -> None:
        self.path = path
        self._report, self._adopt = report, adopt
        self._replicas: dict[str, Replica] = {}
        self._lock_fd = -1
        self._mark: RunMark | None = None
        try:
            if existing:
                self._share()
            else:
                self._take()
                publishing.recover(self, self._drafts())
        except BlockingIOError as error:
            self.close()
            raise InvalidInput(
                f"another run is using {path}", remedy="Wait until it ends, or give another folder."
            ) from error
        except OSError as error:
            self.close()
            raise unusable(path, error) from error
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        """Create the folder if it is missing, and keep other runs out."""
        self._refuse_points()
        if not self.path.is_dir():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700)
            self.path.chmod(0o700)
        self._refuse_other_kind()
        self._refuse_several()
        self._lock_fd = statefiles.open_or_create(self.path / ".lock", os.O_RDWR)
        flock(self._lock_fd, fcntl.LOCK_EX)
        mark = RunMark(self.path / ".run", self._lock_fd)
        mark.take()
        self._mark = mark

    def _share(self) -> None:
        """Keep writers out, if that is possible without the right to write."""
        if not self.path.is_dir():
            if self.path.exists():
                raise NotADirectoryError(errno.ENOTDIR, "it is not a folder")
            raise FileNotFoundError(errno.ENOENT, "there is no such folder")
        self._refuse_other_kind()
        try:
            self._lock_fd = statefiles.open_existing(self.path / ".lock", os.O_RDONLY, ours=False)
        except (FileNotFoundError, PermissionError):
            return
        flock(self._lock_fd, fcntl.LOCK_SH)

    def _refuse_points(self) -> None:
        """Raise InvalidInput if the folder lies among the earlier points of a replica."""
        whole = Path(os.path.realpath(self.path))
        for folder in (whole, *whole.parents):
            replica = folder.parent
            if folder.name.lower() == POINTS and _has_state(replica):
                raise points.inside(str(self.path), str(replica))

    def _refuse_several(self) -> None:
        """Raise InvalidInput if the folder is that of several VMs, whose replicas it would hide."""
        if _has_state(self.path):
            return
        with os.scandir(self.path) as found:
            folders = sorted(entry.name for entry in found if entry.is_dir(follow_symlinks=False))
        for name in folders:
            if (self.path / name / OWNER).exists():
                raise of_several(str(self.path), str(self.path / name), "folder")

    def _refuse_other_kind(self) -> None:
        """Raise InvalidInput if the folder holds the state of a replica whose images are elsewhere."""
        if os.path.lexists(self.path / EXPORTS):
            raise InvalidInput(
                f"{self.path} holds the state of a replica on an NBD server",
                remedy=f"Give the server's URL with --state {self.path}, or another folder.",
            )

    def disk(self, name: str) -> Replica:
        """The replica of the disk `name`: "os" or "data-<lun>"."""
        if not _DISK.fullmatch(name):
            raise InvalidInput(f"{name!r} is not the name of a disk", remedy="Use os, or data-<lun>.")
        if name not in self._replicas:
            self._replicas[name] = Replica(self._medium(name), self._report)
        return self._replicas[name]

    def _medium(self, name: str) -> Medium:
        return FileMedium(self.path / f"{name}.raw", adopt=self._adopt, mark=self._mark)

    def reserve(self, disks: Collection[str]) -> None:
        """Open the existing images exclusively for this run. See Folder."""
        for name in disks:
            self.disk(name).take()

    def refuse_small(self, sizes: Mapping[str, int]) -> None:
        """See Measured."""
        for name, size in sizes.items():
            self.disk(name).refuse_small(size)

    def claim(self, vm: str) -> None:
        """See Folder. The VM's id is kept in the file `.vm`."""
        owner = self.path / OWNER
        try:
            found = self._owner(owner)
            if not found:
                statefiles.replace(owner, [f"{vm}\n".encode()])
                return
        except OSError as error:
            raise InvalidInput(
                f"{owner} cannot be used: {error.strerror}",
                remedy=exhausted_remedy(error) or "Give a folder in which this user may read and write.",
            ) from error
        if found.lower() != vm.lower():
            raise InvalidInput(
                f"{self.path} holds the replica of another VM: {found[:500]}",
                remedy=f"Give each VM a folder of its own. If this is the folder of this VM, remove {owner}.",
            )

    def record(self) -> bytes | None:
        """See Place."""
        path = self.path / sets.NAME
        with Translated(path, "cannot be read", ""):
            try:
                return statefiles.read(path, ours=self._mark is not None)
            except FileNotFoundError:
                return None

    def publish(self, record: bytes) -> None:
        """See Place."""
        publishing.publish(self, self._replicas.values(), record)
        publishing.sweep(self._drafts(), record)

    @property
    def points(self) -> FolderPoints:
        """See Place."""
        return FolderPoints(self.path / POINTS, self._mark)

    def unpublished(self) -> list[str]:
        """See Place."""
        return [replica.name for replica in publishing.unpublished(self, self._drafts())]

    def _drafts(self) -> list[Replica]:
        """The disks that have a draft, or any part of one."""
        with Translated(self.path, "cannot be read", ""):
            found = filter(None, (_DRAFT.fullmatch(path.name) for path in self.path.glob("*.raw.*")))
            names = sorted({part[1] for part in found})
        return [self.disk(name) for name in names]

    def keep_record(self, text: bytes) -> None:
        """See Place."""
        path = self.path / sets.NAME
        if self._mark is not None:
            self._mark.check(now=True)
        try:
            statefiles.replace(path, [text])
        except OSError as error:
            raise DestinationFailed(
                f"{path} cannot be written: {error.strerror}", remedy=REMEDIES.get(error.errno or 0)
            ) from error

    def history(self) -> bytes | None:
        """See Chronicle."""
        return self.document(history.NAME)

    def keep_history(self, text: bytes) -> None:
        """See Chronicle."""
        self.keep_document(history.NAME, text)

    @property
    def where(self) -> str:
        """See HandedOff."""
        return str(self.path.absolute())

    def image(self, disk: str) -> Image | None:
        """See HandedOff. A device is given by the name that the user's link has for it."""
        path = self.path.absolute() / f"{disk}.raw"
        with Translated(path, "cannot be examined", ""):
            is_device = path.is_block_device()
            while (
                is_device
                and path.is_symlink()
                and not devices.is_name(path)
                and path.readlink().is_absolute()
            ):
                path = path.readlink()
        return Image(str(path), is_device=is_device)

    def document(self, name: str) -> bytes | None:
        """See HandedOff."""
        path = self.path / name
        with Translated(path, "cannot be read", ""):
            try:
                return statefiles.read(path, ours=self._mark is not None, limit=history.LIMIT + 1)
            except FileNotFoundError:
                return None

    def keep_document(self, name: str, text: bytes) -> None:
        """See HandedOff."""
        path = self.path / name
        if self._mark is not None:
            self._mark.check(now=True)
        with Translated(path, "cannot be written", ""):
            statefiles.replace(path, [text])

    def _owner(self, path: Path) -> str:
        try:
            return statefiles.read(path).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def stop(self) -> None:
        """See Folder."""
        for replica in self._replicas.values():
            replica.stop()

    def names(self) -> list[str]:
        """The names of the disks that have an image."""
        return self._names(".raw")

    def _names(self, ending: str) -> list[str]:
        """The names of the disks that have a file with this ending."""
        with Translated(self.path, "cannot be read", ""):
            return disk_names(self.path, ending)

    def tell_removed(self, disks: Collection[str]) -> None:
        """See Folder."""
        for name in self.names():
            if name not in disks:
                where = self.disk(name).where
                self._report(Notice(f"{where} is kept as it is: the VM no longer has the disk {name}"))

    def close(self) -> None:
        """Close the images, and let other runs in. May be repeated."""
        for replica in self._replicas.values():
            replica.close()
        self._replicas = {}
        if self._mark is not None:
            self._mark.end()
            self._mark = None
        if self._lock_fd >= 0:
            statefiles.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> ImageFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def of_several(where: str, found: str, kind: str) -> InvalidInput:
    """The error for a place of one VM that would hide the replicas below it, of which `found` is one."""
    return InvalidInput(
        f"{where} is the place of several VMs: there is a replica in {found}",
        remedy=f"Give the {kind} of the one VM, {where.rstrip('/')}/NAME, or another {kind}.",
    )


def _has_state(path: Path) -> bool:
    """Whether the folder is that of a replica. In one of several VMs, the folder of a VM may have such a name."""
    found = (path / name for name in (OWNER, sets.NAME))
    return any(os.path.lexists(file) and not file.is_dir() for file in found)


def disk_names(path: Path, ending: str) -> list[str]:
    """The names of the disks that have a file with this ending in the folder. A VM's folder may have such a name."""
    found = (file.name.removesuffix(ending) for file in path.glob(f"*{ending}") if not file.is_dir())
    return sorted(filter(_DISK.fullmatch, found))


class FolderPoints:
    """The earlier points of a place, one folder each in the folder `path`. See Points.

    `mark`: the mark of the run that writes; None if the place is only read, and may be another user's.
    """

    def __init__(self, path: Path, mark: RunMark | None) -> None:
        self._path, self._mark = path, mark

    def records(self) -> dict[str, bytes | None]:
        """See Points. Only folders count, not links or files."""
        with self._translated("cannot be read"):
            if not os.path.lexists(self._path):
                return {}
            self._refuse_others()
            with os.scandir(self._path) as found:
                folders = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
            return {name: self._record(self._path / name) for name in folders if points.LABEL.fullmatch(name)}

    def _record(self, path: Path) -> bytes | None:
        try:
            return statefiles.read(path / sets.NAME, ours=self._mark is not None)
        except FileNotFoundError:
            return None

    def complete(self, label: str, record: bytes) -> None:
        """See Points."""
        with self._translated("cannot be written"):
            statefiles.make_folder(self._path / label)  # it is missing if no disk had to keep anything
            statefiles.replace(self._path / label / sets.NAME, [record])

    def remove(self, label: str) -> None:
        """See Points."""
        if self._mark is not None:
            self._mark.check(now=True)
        with self._translated("cannot be removed"):
            if not os.path.lexists(self._path / label):
                return
            self._empty(self._path / label)
            for folder in (self._path / label, self._path):
                try:
                    folder.rmdir()
                except OSError as error:
                    if error.errno not in _NOT_EMPTY:
                        raise
                    return  # it still holds other points, or files that are not ours

    def _empty(self, folder: Path) -> None:
        """Delete the files in a folder, the record first. Links are not followed, and folders in it are not ours."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with os.scandir(fd) as found:
                names = [entry.name for entry in found if not entry.is_dir(follow_symlinks=False)]
            for name in sorted(names, key=lambda name: name != sets.NAME):
                os.unlink(name, dir_fd=fd)
                if name == sets.NAME:
                    os.fsync(fd)
        finally:
            statefiles.close(fd)

    def _refuse_others(self) -> None:
        """Raise InvalidInput if the folder of the points is a link, or belongs to another user."""
        found = os.lstat(self._path)
        owner = os.lstat(self._path.parent).st_uid
        if not stat.S_ISDIR(found.st_mode) or (self._mark is not None and found.st_uid != owner):
            raise InvalidInput(
                f"{self._path} is not a folder, or belongs to another user",
                remedy="Move it away: the earlier points of the replica are kept under that name.",
            )

    def _translated(self, what: str) -> Translated:
        return Translated(self._path, what, "")


def unusable(path: Path, error: OSError) -> InvalidInput:
    """The error that says why a folder cannot be used."""
    remedies = {
        errno.ENOENT: "Give an existing folder.",
        errno.ENOTDIR: "Give the folder that the images are in: this is a file, or one above it is.",
        errno.EEXIST: "Give a folder: a file of that name is in the way.",
        errno.EACCES: f"Give this user the right to read and write {path}, or give another folder.",
        errno.EPERM: f"Give this user the right to read and write {path}, or give another folder.",
        errno.EROFS: "Give a folder on a file system that is not mounted read-only.",
        errno.ENOSPC: "Free space at the destination, or give another folder.",
        errno.EDQUOT: "Raise the quota at the destination, or give another folder.",
        **{code: REMEDIES[code] for code in (errno.EIO, errno.EUCLEAN)},
    }
    kind = NoReplica if error.errno == errno.ENOENT else InvalidInput
    return kind(
        f"{path} cannot be used as a destination: {error.strerror}",
        remedy=remedies.get(error.errno or 0, "Give another folder."),
    )


def flock(fd: int, kind: int) -> None:
    """Lock the file. Raises BlockingIOError if another run has; does nothing if the file system has no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
