"""The export of an NBD server as a medium: the image is there, and all that belongs to it is in a folder of this host.

    os.raw.manifest   what the export holds, and which export it is: server and name
    os.raw.redo       a draft as a redo log, with its os.raw.index and os.raw.draft
    os.raw.grains     digests of grains, see `grains`
    points/<label>/   the disk at an earlier point in time, as an undo log

An export is treated as a block device: nothing tells whether somebody has written to it, so every run reads all of it.
What the server says is zero is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO

from .. import formats
from ..errors import InvalidInput
from .file_past import FilePast
from .file_store import ZEROS
from .files import FileMedium
from .grains import Grains
from .medium import Document, Part, Stamp, Store
from .nbd_store import NbdStore
from .nbd_url import Exports
from .runmark import RunMark


class NbdMedium:
    """One export, with its state in `folder`. See Medium.

    `adopt`: take over an export that holds data and no run of ours has written. `mark`: the mark of the run that
    writes. `several`: whether the same server has other disks of the VM.
    """

    renames = watched = False
    interrupted = False
    joined_bytes = 0

    def __init__(
        self,
        export: Exports,
        disk: str,
        folder: Path,
        *,
        adopt: bool = False,
        mark: RunMark | None = None,
        several: bool = False,
    ) -> None:
        self.export, self.name, self.where, self.far = export, disk, export.uri, export.is_far
        self.several = several
        self._files = FileMedium(folder / f"{disk}.raw", mark=mark)  # all parts but the image
        self._adopt = adopt
        self._image: NbdStore | None = None
        self._writes = self._stopped = False

    @property
    def contested(self) -> bool:
        """See Medium."""
        return self._files.contested

    @property
    def grains(self) -> Grains | None:
        """See Medium."""
        return self._files.grains

    # Parts

    def take(self) -> None:
        """See Medium. Others are kept out only by the server, and by the lock of the folder."""
        if self._writes:
            return
        self.close()
        try:
            self._files.take()
            self._image = self._opened(write=True)
        except BaseException:
            self.close()
            raise
        self._writes = True

    def share(self) -> None:
        """See Medium."""
        if self._image is None:
            self._image = self._opened(write=False)

    def _opened(self, *, write: bool) -> NbdStore:
        return NbdStore(self.export, self.name, lambda: self._stopped, write=write, several=self.several)

    def open(self, part: Part) -> Store | None:
        """See Medium."""
        return self._image if part == "image" else self._files.open(part)

    def make(self, part: Part, size: int) -> Store:
        """See Medium. An export must exist, and keeps its size and its content."""
        if part != "image":
            return self._files.make(part, size)
        if self._image is None or self._image.size < size:
            raise InvalidInput(
                f"{self.where} is too small", remedy="Serve an export that is at least as large."
            )
        return self._image

    def remove(self, part: Part) -> None:
        """See Medium."""
        self._files.remove(part)

    def promote(self) -> None:
        """Never called: an export cannot be replaced. See Medium."""
        raise NotImplementedError

    # Ownership

    def refuse_foreign(self, stamp: Stamp | None) -> None:
        """See Medium."""
        image = self._image
        if image is None or (stamp is not None and stamp.get("device") == self.export.identity):
            return
        known = self.load("manifest")
        if known is not None:
            known.close()
            if self._adopt:
                return
        if not self._adopt and self.is_blank():
            return
        form = formats.wrapped(image.read(0, min(image.size, formats.HEAD)), b"")
        if form:
            raise InvalidInput(
                f"{self.where} holds a {form} image as its content",
                remedy="Serve what is in that image, not the file: `qemu-nbd -f qcow2`, for one.",
            )
        if not self._adopt:
            if known is None:
                what = "holds data, and no run of ours has made it"
            elif stamp is None:
                what = "may be another export than in the last run, because its manifest cannot be used"
            else:
                what = "is another export than in the last run"
            raise InvalidInput(
                f"{self.where} {what}",
                remedy="Serve another export. If it may be overwritten, run with --adopt: it is read, and only what "
                "differs is sent.",
            )

    def is_blank(self) -> bool:
        """See Medium."""
        image = self._image
        if image is None or self._adopt:
            return False
        length = min(image.size, len(ZEROS))
        return not any(any(image.read(at, length)) for at in (0, image.size - length))

    # State

    def unseal(self) -> None:
        """Do nothing: an export cannot be marked. See Medium."""

    def seal(self, seen: Stamp) -> Stamp:
        """See Medium."""
        return seen

    def stamp(self, part: Part = "image") -> Stamp | None:
        """See Medium. For the image, which export it is."""
        if part != "image":
            return self._files.stamp(part)
        if self._image is None:
            return None
        zeros = {"mtime_ns": 0, "ctime_ns": 0, "inode": 0}
        return {"size": self._image.size, **zeros, "device": self.export.identity}

    def protected(self, part: Part = "image") -> AbstractContextManager[None]:
        """See Medium. Nothing can keep others from an export but its server."""
        return nullcontext() if part == "image" else self._files.protected(part)

    def unshared(self, part: Part) -> AbstractContextManager[Callable[[], bool]]:
        """See Medium."""
        return nullcontext(lambda: False) if part == "image" else self._files.unshared(part)

    def doubt(self, stamp: Stamp) -> str:
        """Never called: every run reads all of it. See Medium."""
        del stamp
        return f"nothing tells whether {self.where} was changed"

    def guard(self, *, now: bool = False) -> None:
        """See Medium."""
        self._files.guard(now=now)

    def reserve_space(self, extents: Iterable[tuple[int, int]]) -> None:
        """See Medium. Space behind an export can only be reserved by its server."""
        self._files.reserve_space(extents)

    def release_space(self, extents: Iterable[tuple[int, int]]) -> None:
        """See Medium."""
        self._files.release_space(extents)

    # Documents

    def load(self, document: Document, *, ours: bool = True) -> IO[bytes] | None:
        """See Medium."""
        return self._files.load(document, ours=ours)

    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        """See Medium."""
        self._files.save(document, pieces)

    def forget(self, document: Document) -> None:
        """See Medium."""
        self._files.forget(document)

    def past(self, point: str) -> FilePast:
        """See Medium. Always an undo log."""
        return self._files.past(point)

    def stop(self) -> None:
        """See Medium."""
        self._stopped = True
        self._files.stop()

    def close(self) -> None:
        """See Medium."""
        self._files.close()
        image, self._image = self._image, None
        if image is not None:
            image.close()
        self._writes = False
