"""One disk of a replica: a destination that never spoils the last good point in time. The rules, for every medium.

*An image is replaced by a newer one as a whole, or not at all.* A run writes a draft beside it, whole where there is
no image yet, else a log of what changed. `commit` makes the draft durable, and once the drafts of all disks are, one
record makes them the replica (see `sets`): `publish` brings the image to what the draft has. Whoever dies before the
record leaves the image as it was, and the next run goes on with the draft. Whoever dies after it leaves a committed
draft that the record names, and whoever opens the place next publishes it.

*The manifest describes what the image holds, and is never trusted beyond that.* Content that is not proved to be as it
says is read, from the medium: all of an image that is not as the last run left it, all of a device at each run, all
that a dead run had in hand.

Where nothing can be published, the image is written in place: a volume of the orchestrator's, and the first content of
a device or a blob. Then the manifest is replaced by one that knows nothing before the first byte changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import IO, Any

from ..errors import CoriolisAzureError, CorruptChunk, DestinationFailed, InvalidInput, exhausted_remedy
from ..events import Notice, Report, Step, silent
from ..model import Json
from ..threads import Lock, ordered
from . import undo
from .digests import Digests
from .draft import Draft, index_size, pieces
from .grains import Grains
from .manifest import UNKNOWN, ZERO, Manifest, grain_count
from .medium import Content, Document, Medium, Past, Readable, Stamp, Store, holds, read_padded


@dataclass(frozen=True)
class Kept:
    """What the document beside an image says: the manifest, and how the image was then."""

    manifest: Manifest
    stamp: Stamp
    baseline: Json | None = None

    @property
    def begun(self) -> bool:
        """Whether the image was being written in place, and that did not end well."""
        return self.manifest.digests == Digests.filled(UNKNOWN, self.manifest.count)


class _Gone:
    """An image that is not there: no bytes."""

    size = 0

    def read(self, offset: int, length: int) -> bytes:
        """None of them."""
        raise DestinationFailed(f"the image is gone: no {length} bytes at offset {offset}", offset=offset)


class Replica:
    """One disk on a medium: a Destination. Nothing is made before it is used. `in_place`: nothing is published."""

    readable = True
    checkable = False

    def __init__(self, medium: Medium, report: Report = silent, *, in_place: bool = False) -> None:
        self._medium, self._report, self._only_in_place = medium, report, in_place
        self._lock = Lock()
        self._reset()

    def _reset(self) -> None:
        self._in_place = False
        self._shape: Manifest | None = None  # of the draft: chunks, size, key
        self._base: Manifest | None = None  # what `known` has given
        self._kept: Kept | None = None
        # How the image was before this run read it, or as this run has made it.
        self._seen: Stamp | None = None
        self._doubted = False  # whether what is kept of the image was not believed
        self._lost = False  # whether the image is no longer as it was at its last good point
        self._partial = False
        self._target: Store | None = None  # what is written to, once something is
        self._draft: Draft | None = None
        self._flushed: list[Stamp | None] = []  # how the files of the draft were when they were flushed
        self._committed: Manifest | None = None
        self._agreed = False  # whether this run has said what is to be published, if it is nothing new
        self._next_baseline: Callable[[], Json | None] = lambda: None
        self._baseline: Json | None = None  # what goes with the image that is committed

    @property
    def name(self) -> str:
        """The disk: "os" or "data-<lun>"."""
        return self._medium.name

    @property
    def where(self) -> str:
        """Path or URL of the image."""
        return self._medium.where

    @property
    def far(self) -> bool:
        """See Destination."""
        return self._medium.far

    @property
    def grains(self) -> Grains | None:
        """See Destination."""
        return self._medium.grains

    @property
    def committed(self) -> Manifest | None:
        """What is committed and not published; None where nothing is."""
        return self._committed

    # What it holds

    def take(self) -> None:
        """Open it for this run alone, if it is there. InvalidInput where it may not be written, and why."""
        medium = self._medium
        medium.take()
        try:
            kept = self._load() if not medium.watched else None
            medium.refuse_foreign(kept.stamp if kept is not None else None)
        except BaseException:
            medium.close()
            raise

    def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        """What is held of the disk, in the image or a draft that a dead run has left. See Destination."""
        self.take()
        self._reset()
        self._medium.guard(now=True)
        self._seen = self._medium.stamp()
        kept = self._kept = self._load()
        if kept is not None and disk and kept.manifest.disk and kept.manifest.disk != disk:
            self._report(Notice(f"{self._medium.where} held another disk of that name; it is written anew"))
            full = True
        image = self._image_for(size)
        if image is not None and (image.size == 0 or (kept is None and self._medium.is_blank())):
            image, self._lost = None, kept is not None
        good = image is not None and not (kept is not None and kept.begun)
        self._in_place = self._only_in_place or not (good or self._medium.renames)
        self._partial = not self._in_place and self._medium.renames and (full or image is None)
        if self._partial:
            base = self._new(disk, size, chunk)
        elif full or image is None:
            base = self._anew(disk, size, chunk)
        else:
            base = self._as_found(image, kept, disk, size, chunk)
        if self.grains is not None:
            if base.fresh:
                self.grains.forget()
            self.grains.open(grain_count(chunk))
        if not self._in_place:
            base = self._resumed(base)
        self._base = base
        return base

    def _image_for(self, size: int) -> Store | None:
        """The image, if it is there. InvalidInput for a device that the disk does not fit on."""
        image = self._medium.open("image")
        if image is not None and not self._medium.watched and image.size < size:
            raise InvalidInput(
                f"{self._medium.where} has {image.size} bytes, the disk has {size}",
                remedy="Give a device that is large enough.",
            )
        return image

    def stored(self) -> Manifest:
        """What the last good run said the image holds. Nothing is changed. InvalidInput where there is none.

        UNKNOWN where a run that wrote in place has died since.
        """
        self._medium.share()
        kept, image = self._load(ours=False), self._medium.open("image")
        if kept is None or image is None:
            raise InvalidInput(
                f"there is no usable manifest of {self._medium.where}",
                remedy="Replicate to this destination first.",
            )
        manifest = kept.manifest
        if self._medium.interrupted:
            return replace(manifest, digests=Digests.filled(UNKNOWN, manifest.count))
        if not kept.begun and (
            image.size != manifest.size if self._medium.watched else image.size < manifest.size
        ):
            raise DestinationFailed(
                f"{self._medium.where} has {image.size} bytes, its manifest is of {manifest.size}",
                disk=self.name,
                offset=min(image.size, manifest.size),
            )
        return manifest

    def _new(self, disk: str, size: int, chunk: int) -> Manifest:
        """The base of a partial image: zeros, under the key that a draft of the same disk has."""
        draft, noted = self._load_draft()
        if draft is None or noted.get("partial") is not True or (draft.chunk, draft.size) != (chunk, size):
            return Manifest.new(size, chunk, disk, ZERO)
        if disk and draft.disk and draft.disk != disk:
            return Manifest.new(size, chunk, disk, ZERO)
        return replace(draft, digests=Digests.filled(ZERO, draft.count), disk=disk, fresh=True)

    def _anew(self, disk: str, size: int, chunk: int) -> Manifest:
        """The base of what is written anew without a partial image."""
        if not self._in_place:  # over the last good image, of which nothing is used
            return Manifest.new(size, chunk, disk, UNKNOWN)
        self._keep(Manifest.new(size, chunk, disk, UNKNOWN), self._seen)
        self._medium.make("image", size)
        self._seen = self._medium.stamp()
        return Manifest.new(size, chunk, disk, ZERO if self._medium.watched else UNKNOWN)

    def _as_found(self, image: Store, kept: Kept | None, disk: str, size: int, chunk: int) -> Manifest:
        """The content there is, read where it is not proved."""
        doubt = self._doubt(kept, chunk)
        self._doubted = bool(doubt)
        if doubt:
            self._report(Notice(f"{doubt}; {self._medium.where} is read as a whole"))
        there = image.size
        if kept is None or kept.manifest.chunk != chunk:
            base = Manifest.new(min(size, there), chunk, disk, UNKNOWN)
        else:
            base = kept.manifest.resized(
                there if self._medium.watched else min(there, kept.manifest.size), UNKNOWN
            )
        if doubt or not self._medium.watched:
            again = self._reread(image, base, range(base.count))
            changed = again != base
            self._lost = changed and kept is not None and kept.manifest.chunk == chunk
            if not doubt and changed:
                where = self._medium.where
                self._report(Notice(f"{where} was changed since the last run; what differs is sent again"))
            base = again
        base = replace(base, disk=disk or base.disk, fresh=False)
        return self._resized(image, base, size)

    def _resized(self, image: Store, base: Manifest, size: int) -> Manifest:
        """As a disk of that size; the image gets it when it is published, or at once where it is written in place."""
        if self._in_place and image.size != size:
            self._refuse_changed()
            self._begin_in_place(base)
            self._medium.unseal()
            image.resize(size)
            self._seen = self._medium.stamp()
        return base.resized(size, ZERO if self._medium.watched else UNKNOWN)

    def _doubt(self, kept: Kept | None, chunk: int) -> str:
        """Why the image may not hold what is kept of it; "" where it does, or is read at each run."""
        if kept is None:
            return f"{self._medium.where} has no usable state beside it"
        if self._medium.contested:
            return f"another run may still have been writing to {self._medium.where}"
        if kept.manifest.chunk != chunk:
            return "the chunk size has changed"
        if kept.begun or self._medium.interrupted:
            return f"the last run to {self._medium.where} did not end well"
        return self._medium.doubt(kept.stamp) if self._medium.watched else ""

    def _reread(self, image: Store, base: Manifest, indexes: Iterable[int]) -> Manifest:
        """The manifest with these chunks as they are on the medium."""
        digests, digest = base.digests.copy(), base.digester()
        self._report(Step("read back", self.name))
        with image.uncached() as content:

            def read(index: int) -> tuple[int, bytes]:
                self._go_on()
                offset, length = base.span(index)
                return index, digest(content(offset, length)) if holds(image, offset, length) else ZERO

            with contextlib.closing(ordered(read, indexes, threads=2, ahead=6)) as results:
                for index, found in results:
                    digests.put(index, found)
        return replace(base, digests=digests)

    @property
    def baseline(self) -> tuple[Manifest, Json] | None:
        """See Kept."""
        kept = self._kept
        if kept is None or kept.baseline is None or kept.begun or self._in_place:
            return None
        return kept.manifest, kept.baseline

    def left(self) -> Json | None:
        """See Kept."""
        kept = self._load()
        return kept.baseline if kept is not None else None

    def leave(self, baseline: Callable[[], Json | None]) -> None:
        """See Kept."""
        self._next_baseline = baseline

    # The draft

    def _resumed(self, base: Manifest) -> Manifest:
        """`base` with what a draft has of this very disk; any other draft is deleted."""
        draft, noted = self._load_draft()
        fits = (
            draft is not None
            and not self._medium.contested
            and noted.get("partial") is self._partial
            and (draft.key, draft.chunk, draft.size) == (base.key, base.chunk, base.size)
        )
        content = self._medium.open("partial" if self._partial else "redo") if fits else None
        index = self._medium.open("index") if content is not None and content.size == base.size else None
        if draft is None or content is None or index is None or index.size != index_size(base):
            self._drop_draft()
            return base
        self._report(Notice(f"what the last run had fetched of {self._medium.where} is used"))
        base = base.rehashed(draft.hash)
        self._draft = Draft(content, index, self._below, base, known=True)
        resumed = replace(self._draft.resume(base, self._below), fresh=False)
        self._note_draft(resumed)  # it is no committed one any more
        self._target = content
        return resumed

    @property
    def _below(self) -> Store | None:
        """The image that a draft lies over."""
        return None if self._partial else self._medium.open("image")

    def _load_draft(self, *, ours: bool = True) -> tuple[Manifest | None, dict[str, Any]]:
        found = self._read("draft", ours=ours)
        return found if found is not None else (None, {})

    def _drop_draft(self) -> None:
        """Delete the draft; its document last, which says whose the rest is."""
        for part in ("partial", "redo", "index"):
            self._medium.remove(part)
        self._medium.forget("draft")

    def sweep(self, *, left_out: bool) -> None:
        """Delete the draft of a disk that the replica no longer has, or tell why it stays. Nothing is raised.

        `left_out`: the VM still has the disk, so that a run may go on with the draft.
        """
        what = f"what an earlier run had fetched of {self._medium.where} and not published"
        try:
            document = self._medium.load("draft")
            if document is None:
                self._report(
                    Notice(
                        f"{what} is left as it is: nothing says that it is ours; remove it if nobody needs it"
                    )
                )
                return
            document.close()
            if left_out:
                self._report(Notice(f"{what} is kept for a run that does not leave {self.name} out"))
                return
            self._drop_draft()
            self._report(Notice(f"{what} is deleted: {self.name} is no longer a disk of the VM"))
        except CoriolisAzureError as error:
            self._report(Notice(f"{what} stays: {error.message}"))

    def _begin(self) -> None:
        """Before the first byte changes: know durably that it does, or have a draft to write to."""
        with self._lock:
            if self._target is not None:
                return
            base = self._base
            if base is None:
                raise ValueError("`known` comes first")
            self._medium.guard(now=True)
            if self._in_place:
                self._refuse_changed()
                self._begin_in_place(base)
                self._medium.unseal()
                self._target = self._medium.open("image")
                return
            self._note_draft(base)
            content = self._medium.make("partial" if self._partial else "redo", base.size)
            index = self._medium.make("index", index_size(base))
            self._draft = Draft(content, index, self._below, base, known=False)
            self._target = content

    def _note_draft(self, shape: Manifest) -> None:
        """Keep what the draft is of; what it has of the chunks is in its index."""
        self._shape = shape
        empty = replace(shape, digests=Digests.filled(UNKNOWN, shape.count))
        self._medium.save("draft", empty.text({"partial": self._partial}))

    def _begin_in_place(self, base: Manifest) -> None:
        """Know nothing of the image any more."""
        self._keep(replace(base, digests=Digests.filled(UNKNOWN, base.count)), self._seen)

    # Content

    def intend(self, offset: int, length: int) -> None:
        """These bytes are about to change. See Destination."""
        del offset, length
        if self._target is None:
            self._begin()

    def write(self, offset: int, data: Content) -> None:
        """Put `data` there. See Destination."""
        self._go_on()
        if self._draft is not None:
            self._draft.cover(offset, len(data))
        self._store().write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros. See Destination."""
        self._go_on()
        if self._draft is not None:
            self._draft.cover(offset, length)
        self._store().zero(offset, length)

    def _store(self) -> Store:
        if self._target is None:
            raise ValueError("`intend` comes first")
        return self._target

    def settle(self, manifest: Manifest, first: int, count: int) -> None:
        """These chunks are there as `manifest` says. See Destination."""
        if self._draft is None:
            return
        if self._shape is None or self._shape.hash != manifest.hash:
            self._note_draft(manifest)
        self._draft.settle(manifest, first, count)

    def read(self, offset: int, length: int) -> bytes:
        """What is there. See Destination."""
        self._go_on()
        if self._draft is not None:
            return self._draft.read(offset, length)
        image = self._medium.open("image")
        if image is None or self._partial:
            return bytes(length)
        return bytes(read_padded(image, offset, length, image.read))

    def flush(self) -> None:
        """What was written is on its medium, and read from there. See Destination."""
        if self._draft is not None:
            self._draft.flush()
            self._flushed = self._flushed or self._of_draft()
        elif self._target is not None:
            self._target.flush()

    def check(self) -> bool | None:
        """None: it is read back. See Destination."""
        return None

    def stop(self) -> None:
        """Reads and writes under way are the last ones; from any thread."""
        self._medium.stop()

    def _go_on(self) -> None:
        self._medium.guard()

    # Commit and publish

    def commit(self, manifest: Manifest) -> None:
        """Ready to be published as `manifest` says; in place, it is published. See Destination."""
        self._medium.guard(now=True)
        if self._in_place:
            self._commit_in_place(manifest)
            return
        self._refuse_changed()
        self._agreed = True
        self._baseline = self._next_baseline()
        if self._target is None and self._is_kept(manifest):
            if self._medium.contested:
                self._check_all(self._image(), manifest)
            if self._doubted:  # it was read, and is as it should be
                self._keep_sealed(manifest)
            return
        if self._partial and self._draft is None:  # a disk of zeros
            self._begin()
        self.flush()
        self._refuse_spoilt()  # it may have been verified since it was flushed first
        self._medium.save(
            "draft", manifest.text({"partial": self._partial, "committed": True, "baseline": self._baseline})
        )
        self._committed = manifest

    def _is_kept(self, manifest: Manifest) -> bool:
        """Whether the image is already all that `manifest` says, its size included."""
        image = self._medium.open("image")
        fits = image is not None and (image.size == manifest.size or not self._medium.watched)
        return fits and self._kept is not None and self._kept.manifest == manifest

    def _commit_in_place(self, manifest: Manifest) -> None:
        if self._target is None:
            self._refuse_changed()
        image = self._medium.open("image")
        if image is None:
            raise ValueError("`known` comes first")
        image.flush()
        if self._medium.contested:
            self._check_all(image, manifest)
        self._seen = self._medium.stamp()
        self._keep_sealed(manifest)

    def _refuse_changed(self) -> None:
        if self._medium.stamp() != self._seen:
            raise DestinationFailed(
                f"{self._medium.where} was changed by somebody else while this run was at work",
                remedy="End what writes to it, then run again: it is read as a whole.",
                disk=self.name,
            )

    def _of_draft(self) -> list[Stamp | None]:
        """How the files of the draft are."""
        return [self._medium.stamp(part) for part in ("partial" if self._partial else "redo", "index")]

    def _refuse_spoilt(self) -> None:
        """DestinationFailed where the draft was changed since it was flushed, and so since it was verified."""
        if self._draft is None:
            return
        found = self._of_draft()
        if found != self._flushed or None in found:
            raise DestinationFailed(
                f"what was fetched of {self._medium.where} was changed by somebody else before it was published",
                remedy="End what writes to the files beside the image, then run again: what differs is fetched again.",
                disk=self.name,
            )

    def ready(self) -> None:
        """DestinationFailed where what was committed cannot be published any more. Nothing is changed."""
        if self._agreed:
            self._refuse_disturbed()
            self._refuse_spoilt()

    def _refuse_disturbed(self) -> None:
        """DestinationFailed where the image is another one, or another content, than this run has seen."""
        self._medium.guard(now=True)
        self._refuse_changed()

    def reserve(self) -> None:
        """Take the room that `publish` will need. DestinationFailed where there is not enough; no content changes."""
        if self._committed is None and not self._has_new_baseline():
            return
        if self._committed is None or self._partial:  # what it holds is written already
            self._medium.reserve(())
            return
        with self._medium.held():
            self._refuse_disturbed()
            try:
                self._medium.reserve(self._filling())
            finally:
                self._seen = self._medium.stamp()

    def give_back(self) -> None:
        """Undo `reserve`, as nothing is going to be published: the image is known again as what it is."""
        if self._committed is None or self._partial:
            self._medium.give_back(())
            return
        with self._medium.held():
            self._refuse_disturbed()
            self._medium.give_back(self._filling())
            self._seen = self._medium.stamp()
        kept = self._kept
        if kept is not None and not (kept.begun or self._doubted or self._lost) and kept.stamp != self._seen:
            self._baseline = kept.baseline
            self._keep_sealed(kept.manifest)

    def _filling(self) -> Iterator[tuple[int, int]]:
        """The extents of the image that `publish` writes to, in pieces, in disk order."""
        return self._draft.extents() if self._draft is not None else iter(())

    def preserve(self, point: str) -> bool:
        """Keep what the image is now, before `publish` changes it, as the disk at this point. See `points`.

        False where it is not what it was at its last good point, so that this cannot be given back.
        """
        if self._committed is None:
            return True  # nothing changes
        kept, image = self._kept, self._medium.open("image")
        if self._lost or kept is None or kept.begun or image is None:
            where = self._medium.where
            self._report(
                Notice(f"{where} is no longer what the last run had left, so that point is not kept")
            )
        if kept is None or kept.begun or image is None:
            return False
        with contextlib.closing(self._medium.past(point)) as past:
            if not past.clone():
                undo.keep(past, image, kept.manifest, self._changing(image), self._go_on)
            past.save(kept.manifest.text({}))
        return not self._lost

    def _changing(self, image: Store) -> Iterator[tuple[int, int]]:
        """The extents of the image that `publish` changes, in pieces, in disk order."""
        if self._partial:
            yield from pieces(0, image.size)
            return
        if self._draft is not None:
            yield from self._draft.extents()
        if self._committed is not None and self._committed.size < image.size and self._medium.watched:
            yield from pieces(self._committed.size, image.size)

    @contextlib.contextmanager
    def at(self, points: Sequence[str]) -> Iterator[tuple[Manifest, Readable]]:
        """The disk as it was at the first of these points, and the manifest of that; they reach to the newest kept.

        Of no points: the disk as it is. What is read has to be compared with the manifest. InvalidInput where there is
        nothing of it.
        """
        manifest: Manifest | None = None
        disk: Readable | None = None
        logs: list[tuple[Past, Manifest]] = []
        with contextlib.ExitStack() as opened:
            for point in points:
                past = opened.enter_context(contextlib.closing(self._medium.past(point)))
                file = past.load()
                if file is None:
                    continue  # it was not changed before the next newer point
                then = self._kept_at(point, file)
                manifest = manifest or then
                disk = past.open("image")
                if disk is not None:
                    break  # a clone: nothing newer is needed
                logs.append((past, then))
            if manifest is None:
                manifest = self.stored()
            if disk is None:
                self._medium.share()
                disk = self._medium.open("image") or _Gone()
            for past, then in reversed(logs):
                disk = undo.over(past, disk, then)
            yield manifest, disk

    def _kept_at(self, point: str, file: IO[bytes]) -> Manifest:
        """The manifest of an earlier point."""
        try:
            with file:
                return Manifest.read(file)[0]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(
                f"the manifest of {self._medium.where} that was kept at the point {point} was cut off or damaged",
                remedy="Choose another point: `coriolis-azure status` lists them.",
            ) from error
        except OSError as error:
            raise self._unread(
                f"the manifest of {self._medium.where} that was kept at {point}", error
            ) from error

    def _unread(self, what: str, error: OSError) -> DestinationFailed:
        return DestinationFailed(
            f"{what} cannot be read: {error.strerror}", remedy=exhausted_remedy(error), disk=self.name
        )

    def publish(self) -> None:
        """Bring the image to what was committed; nothing where nothing was."""
        manifest = self._committed
        if manifest is None:
            self._keep_baseline()
            return
        image = self._bring(manifest)
        if self._medium.contested:
            self._check_all(image, manifest)
        self._end(manifest)

    def _keep_baseline(self) -> None:
        """The image stays as it is, and has another baseline from now on."""
        if self._kept is not None and self._has_new_baseline():
            self._keep_sealed(self._kept.manifest)

    def _has_new_baseline(self) -> bool:
        kept = self._kept
        return self._agreed and kept is not None and self._baseline not in (None, kept.baseline)

    def is_unpublished(self, root: str) -> bool:
        """Whether there is a committed draft with this root: that of the replica, by its record."""
        draft, noted = self._load_draft(ours=False)
        return draft is not None and noted.get("committed") is True and draft.root() == root

    def recover(self) -> None:
        """Publish what a run that died had committed, and what the record says is the replica.

        What is damaged or gone by now is left to the next run to fetch.
        """
        self._medium.take()
        self._reset()
        manifest, noted = self._load_draft()
        if manifest is None:
            return
        if self._is_published(manifest):
            self._drop_draft()
            return
        where = self._medium.where
        self._report(Notice(f"{where}: publishing what the last run had fetched"))
        self._partial = noted.get("partial") is True
        self._baseline = _baseline_in(noted)
        promoted = self._partial and self._medium.open("partial") is None
        if self._medium.open("image") is None and (promoted or not self._partial):
            self._report(Notice(f"{where} is gone; it is sent again as a whole"))
            self._drop_draft()
            return
        if self._partial and not promoted and not self._is_whole(manifest):
            self._report(
                Notice(f"what the last run had fetched of {where} is damaged; what differs is sent again")
            )
            self._note_draft(manifest)  # so the next run takes what is right of it
            return
        if not promoted:
            self.take()  # what is there is not what that run has put there
        if not self._partial:
            self._draft = self._logged(manifest)
        self._seen = self._medium.stamp()
        image = self._bring(manifest)
        # Since that run died somebody may have changed the image, or the log of its changes may be damaged.
        if self._medium.watched and image.size != manifest.size:
            image.resize(manifest.size)
            self._seen = self._medium.stamp()
        found = self._reread(image, manifest, range(manifest.count))
        if found != manifest:
            self._report(
                Notice(f"{where} is not all that the last run had fetched; what differs is sent again")
            )
            self._baseline = None
        self._end(found)

    def _is_published(self, manifest: Manifest) -> bool:
        """Whether all that was left to do is to delete the draft."""
        kept = self._load()
        if kept is None or kept.manifest != manifest or not self._medium.watched:
            return False
        return self._medium.open("image") is not None and not self._doubt(kept, manifest.chunk)

    def _is_whole(self, manifest: Manifest) -> bool:
        """Whether the partial image is what it was when it was committed."""
        partial = self._medium.open("partial")
        if partial is None or partial.size != manifest.size:
            return False
        return self._reread(partial, manifest, range(manifest.count)) == manifest

    def _logged(self, manifest: Manifest) -> Draft | None:
        """The log of a committed draft, with what is right in it; None where there is none."""
        content, index = self._medium.open("redo"), self._medium.open("index")
        if content is None or index is None:
            return None
        if (content.size, index.size) != (manifest.size, index_size(manifest)):
            return None
        draft = Draft(content, index, self._below, manifest, known=True)
        draft.resume(manifest, self._below)
        self._flushed = self._of_draft()
        return draft

    def _bring(self, manifest: Manifest) -> Store:
        """The image as it is committed, on its medium. DestinationFailed where somebody has changed it meanwhile."""
        if self._partial:
            if self._medium.open("partial") is None:
                self._seen = self._medium.stamp()
                return self._image()
            with self._medium.held("partial"):
                self._refuse_disturbed()
                self._refuse_spoilt()
                self._medium.promote()
                self._seen = self._medium.stamp()
            return self._image()
        image = self._image()
        with self._medium.held():
            self._refuse_disturbed()
            if image.size != manifest.size or self._draft is not None:
                self._medium.unseal()
            if image.size != manifest.size:
                image.resize(manifest.size)
            if self._draft is not None:
                self._draft.publish(image, self._go_on)
            image.flush()
            self._refuse_spoilt()
            self._seen = self._medium.stamp()
        if self._draft is not None and (offset := self._draft.first_difference(image)) is not None:
            raise CorruptChunk(
                f"{self.name}: offset {offset} reads back from the destination as something else",
                disk=self.name,
                offset=offset,
            )
        return image

    def _image(self) -> Store:
        image = self._medium.open("image")
        if image is None:
            raise DestinationFailed(f"{self._medium.where} is gone", disk=self.name)
        return image

    def _end(self, manifest: Manifest) -> None:
        """The image is published: keep its manifest, and let go of the draft."""
        self._refuse_changed()
        self._keep_sealed(manifest)
        self._draft = self._target = self._committed = None
        self._drop_draft()

    def _check_all(self, image: Store, manifest: Manifest) -> None:
        """CorruptChunk where the image is not as the manifest says."""
        found = self._reread(image, manifest, range(manifest.count))
        for index in found.digests.differing(manifest.digests):
            offset = manifest.span(index)[0]
            text = f"{self.name}: the chunk at offset {offset} was changed by another run"
            raise CorruptChunk(text, disk=self.name, offset=offset)

    # Documents

    def _keep_sealed(self, manifest: Manifest) -> None:
        """The image is whole, and what `manifest` says: keep that, with how it was when this run last saw it."""
        sealed = self._medium.seal(self._seen or Stamp())
        self._keep(manifest, sealed)
        if not self._medium.renames:  # a page blob is changed as it is sealed
            self._seen = sealed

    def _keep(self, manifest: Manifest, stamp: Stamp | None) -> None:
        """Make `manifest` what is kept of the image, which had that stamp."""
        beside = {"image": stamp or Stamp(), **({"baseline": self._baseline} if self._baseline else {})}
        self._medium.save("manifest", manifest.text(beside))

    def _load(self, *, ours: bool = True) -> Kept | None:
        """What is kept of the image; None where there is nothing of use."""
        found = self._read("manifest", ours=ours)
        if found is None:
            return None
        manifest, beside = found
        stamp = beside.get("image")
        if isinstance(stamp, str):  # as older versions have it in Blob storage
            stamp = {"image": stamp}
        if not isinstance(stamp, dict):
            self._report(Notice(f"{self._medium.where}.manifest is damaged and not used"))
            return None
        return Kept(manifest, stamp, _baseline_in(beside))

    def _read(self, document: Document, *, ours: bool = True) -> tuple[Manifest, dict[str, Any]] | None:
        """A document, and what stands beside the manifest in it; None where there is nothing of use."""
        file = self._medium.load(document, ours=ours)
        if file is None:
            return None
        try:
            with file:
                return Manifest.read(file)
        except InvalidInput as error:
            why = f"is not used: {error.message}"
        except (ValueError, KeyError, TypeError, RecursionError):
            why = "was cut off or damaged, and is not used"
        except OSError as error:
            raise self._unread(f"{self._medium.where}.{document}", error) from error
        self._report(Notice(f"{self._medium.where}.{document} {why}"))
        return None

    def close(self) -> None:
        """Let go of it, with what is not published. See Destination."""
        self._medium.close()
        if self.grains is not None:
            self.grains.close()
        self._reset()

    def __enter__(self) -> Replica:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of it, but of what is committed only when the place is closed: all are published together."""
        if not self._agreed:
            self.close()


def _baseline_in(beside: Json) -> Json | None:
    """The baseline in what stands beside a manifest."""
    baseline = beside.get("baseline")
    return baseline if isinstance(baseline, dict) else None
