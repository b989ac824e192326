"""One disk of a replica: a destination that never spoils the last good point in time, on any medium.

*An image is replaced by a newer one as a whole, or not at all.* A run writes a draft beside the image: a partial image
if there is no image yet, otherwise a redo log. `commit` makes the draft durable. Once the drafts of all disks are
committed, one record switches the replica to them (see `publishing`), and `publish` brings the image up to date. A run
that dies before the switch leaves the image as it was, and the next run continues with the draft. A run that dies after
it leaves a committed draft that the record names, and the next run that opens the place publishes it (`recover`).

*The manifest describes what the image holds, and is never trusted beyond that.* Content that is not proved is read
from the medium: the whole image if it is not as the last run left it, a device in every run, and each chunk of a draft.

Where nothing can be published, the image is written in place: the orchestrator's volumes, and the first content of a
device or a blob. Then the manifest forgets all content before the first byte changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType

from ..errors import CoriolisAzureError, CorruptChunk, DestinationFailed, InvalidInput
from ..events import Notice, Report, Step, silent
from ..model import Json
from ..threads import Lock, ordered
from . import earlier, undo
from .digests import Digests
from .documents import Documents, Saved, SavedDraft
from .draft import Draft, chunks_at_once, index_size, pieces
from .grains import Grains
from .manifest import UNKNOWN, ZERO, Manifest
from .medium import Content, Medium, Part, Readable, Stamp, Store, holds, read_padded


class Replica:
    """One disk on a medium. See Destination and Persistent. Nothing is created before it is needed.

    `in_place`: write the image in place, and publish nothing.
    """

    readable = True
    checkable = False

    def __init__(self, medium: Medium, report: Report = silent, *, in_place: bool = False) -> None:
        self._medium, self._report, self._always_in_place = medium, report, in_place
        self._documents = Documents(medium, report)
        self._lock = Lock()
        self._watching = contextlib.ExitStack()
        self._reset()

    def _reset(self) -> None:
        self._in_place = False
        self._base: Manifest | None = None  # as returned by `known`
        self._saved: Saved | None = None  # as the last run left it
        self._stamp: Stamp | None = None  # of the image, as this run found it or has changed it
        self._doubted = False  # whether the whole image was read because it was not trusted
        self._altered = False  # whether the image no longer holds its last good point
        # of the draft:
        self._partial = False
        self._draft: Draft | None = None
        self._shape: Manifest | None = None  # as in its document
        self._draft_stamps: list[Stamp | None] = []  # of its parts, since they were flushed
        self._target: Store | None = None  # what is written to: content of the draft, or the image in place
        self._watching.close()
        self._unshared: Callable[[], bool] | None = None  # until `flush`: whether nobody else has changed it
        self._undisturbed = True
        # of the commit:
        self._ask_baseline: Callable[[], Json | None] = lambda: None
        self._baseline: Json | None = None
        self._is_committed = False  # also if nothing has to be published
        self._committed: Manifest | None = None

    @property
    def name(self) -> str:
        """The disk: "os" or "data-<lun>"."""
        return self._medium.name

    @property
    def where(self) -> str:
        """The path or URL of the image."""
        return self._medium.where

    @property
    def far(self) -> bool:
        """See Destination."""
        return self._medium.far

    @property
    def joined_bytes(self) -> int:
        """See Joined."""
        return self._medium.joined_bytes

    @property
    def grains(self) -> Grains | None:
        """See Destination."""
        return self._medium.grains

    @property
    def committed(self) -> Manifest | None:
        """What was committed and is not published yet; None if there is nothing to publish."""
        return self._committed

    # What is held

    def take(self) -> None:
        """Open the image, if it exists, exclusively for this run. Raises InvalidInput if it must not be written."""
        medium = self._medium
        medium.take()
        try:
            saved = self._load() if not medium.watched else None
            medium.refuse_foreign(saved.stamp if saved is not None else None)
        except BaseException:
            medium.close()
            raise

    def refuse_small(self, size: int) -> None:
        """Raise InvalidInput if the image is of a fixed size that is less than this. Call `take` first."""
        self._image_for(size)

    def known(self, disk: str, size: int, chunk: int, *, full: bool) -> Manifest:
        """What is held of the disk, in the image and in the draft of a run that failed. See Destination."""
        self.take()
        self._reset()
        self._medium.guard(now=True)
        self._stamp = self._medium.stamp()
        saved = self._saved = self._load()
        if saved is not None and disk and saved.manifest.disk and saved.manifest.disk != disk:
            self._report(
                Notice(f"{self._medium.where} holds another disk of that name; all of it is replaced")
            )
            full = True
        image = self._image_for(size)
        if image is not None and (image.size == 0 or (saved is None and self._medium.is_blank())):
            image, self._altered = None, saved is not None
        good = image is not None and not (saved is not None and saved.interrupted)
        self._in_place = self._always_in_place or not (good or self._medium.renames)
        self._partial = not self._in_place and self._medium.renames and (full or image is None)
        if self._partial:
            base = self._base_of_partial(disk, size, chunk)
        elif full or image is None:
            base = self._base_without_content(disk, size, chunk)
        else:
            base = self._base_of_image(image, saved, disk, size, chunk)
        if self.grains is not None:
            self.grains.open(base)
        if not self._in_place:
            base = self._resumed(base)
        self._base = base
        return base

    def _image_for(self, size: int) -> Store | None:
        """The image; None if it does not exist. Raises InvalidInput if it is a device that is too small."""
        image = self._medium.open("image")
        if image is not None and not self._medium.watched and image.size < size:
            raise InvalidInput(
                f"{self._medium.where} has {image.size} bytes, the disk has {size}",
                remedy="Give a device or an export that is at least as large as the disk.",
            )
        return image

    def stored(self) -> Manifest:
        """See Persistent."""
        self._medium.share()
        saved, image = self._load(ours=False), self._medium.open("image")
        if saved is None or image is None:
            raise InvalidInput(
                f"there is no usable manifest of {self._medium.where}",
                remedy="Replicate to this destination first.",
            )
        manifest = saved.manifest
        if self._medium.interrupted:
            return replace(manifest, digests=Digests.filled(UNKNOWN, manifest.count))
        fits = image.size == manifest.size if self._medium.watched else image.size >= manifest.size
        if not (fits or saved.interrupted):
            raise DestinationFailed(
                f"{self._medium.where} has {image.size} bytes, but its manifest describes {manifest.size}",
                disk=self.name,
                offset=min(image.size, manifest.size),
            )
        return manifest

    def _base_of_partial(self, disk: str, size: int, chunk: int) -> Manifest:
        """The manifest to start a partial image from: zeros, with the key of an existing draft of the same disk."""
        draft = self._documents.draft()
        old = draft.manifest if draft is not None and draft.partial else None
        if old is None or (old.chunk, old.size) != (chunk, size):
            return Manifest.new(size, chunk, disk, ZERO)
        if disk and old.disk and old.disk != disk:
            return Manifest.new(size, chunk, disk, ZERO)
        return replace(old, digests=Digests.filled(ZERO, old.count), disk=disk, fresh=True)

    def _base_without_content(self, disk: str, size: int, chunk: int) -> Manifest:
        """The manifest to start from if the content of the image is not used, and there is no partial image."""
        if not self._in_place:  # a redo log of everything
            return Manifest.new(size, chunk, disk, UNKNOWN)
        self._save_manifest(Manifest.new(size, chunk, disk, UNKNOWN), self._stamp)
        self._medium.make("image", size)
        self._stamp = self._medium.stamp()
        return Manifest.new(size, chunk, disk, ZERO if self._medium.watched else UNKNOWN)

    def _base_of_image(self, image: Store, saved: Saved | None, disk: str, size: int, chunk: int) -> Manifest:
        """The manifest of the image, which is read if that is not proved."""
        doubt = self._doubt(saved, chunk)
        self._doubted = bool(doubt)
        if doubt:
            self._report(Notice(f"{doubt}; {self._medium.where} is read as a whole"))
        if saved is None or saved.manifest.chunk != chunk:
            base = Manifest.new(min(size, image.size), chunk, disk, UNKNOWN)
        else:
            there = image.size if self._medium.watched else min(image.size, saved.manifest.size)
            base = saved.manifest.resized(there, UNKNOWN)
        if doubt or not self._medium.watched:
            found = self._reread(image, base)
            changed = found != base
            self._altered = changed and saved is not None and saved.manifest.chunk == chunk
            if not doubt and changed:
                where = self._medium.where
                self._report(Notice(f"{where} was changed since the last run; what differs is sent again"))
            base = found
        base = replace(base, disk=disk or base.disk, fresh=False)
        return self._resized(image, base, size)

    def _resized(self, image: Store, base: Manifest, size: int) -> Manifest:
        """The manifest with the disk's size. The image is resized when it is published, or now if written in place."""
        if self._in_place and image.size != size:
            self._refuse_changed()
            self._forget_content(base)
            self._medium.unseal()
            image.resize(size)
            self._stamp = self._medium.stamp()
        return base.resized(size, ZERO if self._medium.watched else UNKNOWN)

    def _doubt(self, saved: Saved | None, chunk: int) -> str:
        """Why the image may not match `saved`; "" if it does, or if it is read in every run anyway."""
        if saved is None:
            return f"{self._medium.where} has no usable manifest"
        if self._medium.contested:
            return f"another run may still have been writing to {self._medium.where}"
        if saved.manifest.chunk != chunk:
            return "the chunk size has changed"
        if saved.interrupted or self._medium.interrupted:
            return f"the last run to {self._medium.where} did not succeed"
        return self._medium.doubt(saved.stamp) if self._medium.watched else ""

    def _reread(self, image: Store, base: Manifest) -> Manifest:
        """The manifest of what the medium really holds, in the chunks of `base`."""
        digests, digest = base.digests.copy(), base.digester()
        self._report(Step("read back", self.name))
        with image.uncached() as content:

            def read(index: int) -> tuple[int, bytes]:
                self._medium.guard()
                offset, length = base.span(index)
                return index, digest(content(offset, length)) if holds(image, offset, length) else ZERO

            threads, ahead = chunks_at_once(image, base.chunk)
            work = ordered(read, range(base.count), threads=threads, ahead=ahead)
            with contextlib.closing(work) as results:
                for index, found in results:
                    digests.put(index, found)
        return replace(base, digests=digests)

    @property
    def baseline(self) -> tuple[Manifest, Json] | None:
        """See Based."""
        saved = self._saved
        if saved is None or saved.baseline is None or saved.interrupted or self._in_place:
            return None
        return saved.manifest, saved.baseline

    def left(self) -> Json | None:
        """See Based."""
        saved = self._load()
        return saved.baseline if saved is not None else None

    def leave(self, baseline: Callable[[], Json | None]) -> None:
        """See Based."""
        self._ask_baseline = baseline

    def at(self, points: Sequence[str]) -> contextlib.AbstractContextManager[tuple[Manifest, Readable]]:
        """See Persistent."""
        return earlier.disk_at(self._medium, self._documents, points, self.stored)

    # The draft

    def _resumed(self, base: Manifest) -> Manifest:
        """`base` with the content of an existing draft, if it is of this disk; any other draft is deleted."""
        saved = self._documents.draft()
        old = saved.manifest if saved is not None and saved.partial is self._partial else None
        fits = (
            old is not None
            and not self._medium.contested
            and (old.key, old.chunk, old.size) == (base.key, base.chunk, base.size)
        )
        content = self._medium.open("partial" if self._partial else "redo") if fits else None
        index = self._medium.open("index") if content is not None and content.size == base.size else None
        if old is None or content is None or index is None or index.size != index_size(base):
            self._drop_draft()
            return base
        self._report(Notice(f"using what the last run had fetched of {self._medium.where}"))
        base = base.rehashed(old.hash)
        self._draft = Draft(content, index, self._below, base, existing=True)
        resumed = replace(self._draft.resume(base, self._below), fresh=False)
        self._save_draft(resumed)  # it is no longer a committed one
        self._write_to(content, "partial" if self._partial else "redo")
        return resumed

    @property
    def _below(self) -> Store | None:
        """The image under a redo log; None for a partial image."""
        return None if self._partial else self._medium.open("image")

    def _drop_draft(self) -> None:
        """Delete the draft, its document last, because that shows that the parts are ours."""
        for part in ("partial", "redo", "index"):
            self._medium.remove(part)
        self._medium.forget("draft")

    def sweep(self, *, left_out: bool) -> None:
        """Delete the draft of a disk that is no longer part of the replica, or report why it stays. Raises nothing.

        `left_out`: the VM still has the disk, so a later run may use the draft.
        """
        what = f"what an earlier run had fetched of {self._medium.where} and not published"
        try:
            document = self._medium.load("draft")
            if document is None:
                self._report(
                    Notice(
                        f"{what} is left as it is: nothing shows that it is ours; remove it if nobody needs it"
                    )
                )
                return
            document.close()
            if left_out:
                self._report(Notice(f"{what} is kept for a run that does not exclude {self.name}"))
                return
            self._drop_draft()
            self._report(Notice(f"{what} is deleted: the VM no longer has the disk {self.name}"))
        except CoriolisAzureError as error:
            self._report(Notice(f"{what} stays: {error.message}"))

    def _begin(self) -> None:
        """Before the first byte changes: create the draft or, in place, forget the content of the image durably."""
        with self._lock:
            if self._target is not None:
                return
            base = self._base
            if base is None:
                raise ValueError("call `known` first")
            self._medium.guard(now=True)
            if self._in_place:
                self._refuse_changed()
                self._forget_content(base)
                self._medium.unseal()
                self._write_to(self._image(), "image")
                return
            self._save_draft(base)
            part: Part = "partial" if self._partial else "redo"
            content = self._medium.make(part, base.size)
            index = self._medium.make("index", index_size(base))
            self._draft = Draft(content, index, self._below, base, existing=False)
            self._write_to(content, part)

    def _write_to(self, target: Store, part: Part) -> None:
        """Write to this from now on, and watch until `flush` whether others use it."""
        self._unshared = self._watching.enter_context(self._medium.unshared(part))
        self._target = target

    def _save_draft(self, shape: Manifest) -> None:
        """Save which disk the draft is of. The digests of its chunks are in its index."""
        self._shape = shape
        empty = replace(shape, digests=Digests.filled(UNKNOWN, shape.count))
        self._documents.save_draft(SavedDraft(empty, self._partial))

    def _forget_content(self, base: Manifest) -> None:
        """Save a manifest of the image in which every chunk is UNKNOWN."""
        self._save_manifest(replace(base, digests=Digests.filled(UNKNOWN, base.count)), self._stamp)

    # Content

    def intend(self, offset: int, length: int) -> None:
        """See Destination. The first call creates the draft."""
        del offset, length
        if self._target is None:
            self._begin()

    def write(self, offset: int, data: Content) -> None:
        """See Destination."""
        self._medium.guard()
        if self._draft is not None:
            self._draft.cover(offset, len(data))
        self._store().write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """See Destination."""
        self._medium.guard()
        if self._draft is not None:
            self._draft.cover(offset, length)
        self._store().zero(offset, length)

    def _store(self) -> Store:
        if self._target is None:
            raise ValueError("call `intend` first")
        return self._target

    def settle(self, manifest: Manifest, first: int, count: int) -> None:
        """See Destination."""
        if self._draft is None:
            return
        if self._shape is None or self._shape.hash != manifest.hash:
            self._save_draft(manifest)
        self._draft.settle(manifest, first, count)

    def read(self, offset: int, length: int) -> bytes:
        """See Destination."""
        self._medium.guard()
        if self._draft is not None:
            return self._draft.read(offset, length)
        image = self._medium.open("image")
        if image is None or self._partial:
            return bytes(length)
        return bytes(read_padded(image, offset, length, image.read))

    def flush(self) -> None:
        """See Destination."""
        if self._draft is not None:
            self._draft.flush()
            self._draft_stamps = self._draft_stamps or self._stamps_of_draft()
        elif self._target is not None:
            self._target.flush()
        if self._unshared is not None:
            self._undisturbed, self._unshared = self._unshared(), None
            self._watching.close()

    def sync(self) -> None:
        """See Synced."""
        if self._target is not None:
            self._target.flush()

    @property
    def undisturbed(self) -> bool:
        """See Synced. What changes after `flush` shows in the stamps."""
        return self._undisturbed

    def check(self) -> bool | None:
        """None, because the content is read back instead. See Destination."""
        return None

    def stop(self) -> None:
        """Make all further reads and writes fail. Any thread may call this."""
        self._medium.stop()

    # Committing

    def commit(self, manifest: Manifest) -> None:
        """Make the draft durable, for `publish`; in place, seal the image. See Destination."""
        self._medium.guard(now=True)
        if self._in_place:
            self._commit_in_place(manifest)
            return
        self._refuse_changed()
        self._is_committed = True
        self._baseline = self._ask_baseline()
        if self._target is None and self._is_up_to_date(manifest):
            if self._medium.contested:
                self._check_all(self._image(), manifest)
            if self._doubted:  # it was read, and matches
                self._save_sealed(manifest)
            return
        if self._partial and self._draft is None:  # a disk of zeros
            self._begin()
        self.flush()
        self._refuse_changed_draft()  # it may have been verified after the first flush
        self._documents.save_draft(
            SavedDraft(manifest, self._partial, committed=True, baseline=self._baseline)
        )
        self._committed = manifest

    def _is_up_to_date(self, manifest: Manifest) -> bool:
        """Whether the image already holds what `manifest` describes, and has its size."""
        image = self._medium.open("image")
        fits = image is not None and (image.size == manifest.size or not self._medium.watched)
        return fits and self._saved is not None and self._saved.manifest == manifest

    def _commit_in_place(self, manifest: Manifest) -> None:
        if self._target is None:
            self._refuse_changed()
        image = self._medium.open("image")
        if image is None:
            raise ValueError("call `known` first")
        image.flush()
        if self._medium.contested:
            self._check_all(image, manifest)
        self._stamp = self._medium.stamp()
        self._baseline = self._ask_baseline()
        self._save_sealed(manifest)

    def _refuse_changed(self) -> None:
        """Raise DestinationFailed if another program has changed the image during this run."""
        if self._medium.stamp() != self._stamp:
            raise DestinationFailed(
                f"another program changed {self._medium.where} during this run",
                remedy="End that program, then run again: all of the image will be read.",
                disk=self.name,
            )

    def _stamps_of_draft(self) -> list[Stamp | None]:
        return [self._medium.stamp(part) for part in ("partial" if self._partial else "redo", "index")]

    def _refuse_changed_draft(self) -> None:
        """Raise DestinationFailed if another program has changed the draft since it was flushed and then verified."""
        if self._draft is None:
            return
        found = self._stamps_of_draft()
        if found != self._draft_stamps or None in found:
            raise DestinationFailed(
                f"another program changed what was fetched of {self._medium.where} before it was published",
                remedy="End what writes to the files beside the image, then run again: what differs is fetched again.",
                disk=self.name,
            )

    # Publishing

    def check_publishable(self) -> None:
        """Raise DestinationFailed if what was committed can no longer be published. Changes nothing."""
        if self._is_committed:
            self._refuse_replaced()
            self._refuse_changed_draft()

    def _refuse_replaced(self) -> None:
        """Raise DestinationFailed if this run has lost the place, or the image is another file or was changed."""
        self._medium.guard(now=True)
        self._refuse_changed()

    def reserve_space(self) -> None:
        """Reserve the space that `publish` needs. Raises DestinationFailed if there is not enough."""
        if self._committed is None and not self._has_new_baseline():
            return
        if self._committed is None or self._partial:  # only a manifest is written
            self._medium.reserve_space(())
            return
        with self._medium.protected():
            self._refuse_replaced()
            try:
                self._medium.reserve_space(self._drafted())
            finally:
                self._stamp = self._medium.stamp()

    def release_space(self) -> None:
        """Undo `reserve_space` after a failed switch, and save the image's new stamp so that it remains trusted."""
        if self._committed is None or self._partial:
            self._medium.release_space(())
            return
        with self._medium.protected():
            self._refuse_replaced()
            self._medium.release_space(self._drafted())
            self._stamp = self._medium.stamp()
        saved = self._saved
        trusted = saved is not None and not (saved.interrupted or self._doubted or self._altered)
        if saved is not None and trusted and saved.stamp != self._stamp:
            self._baseline = saved.baseline
            self._save_sealed(saved.manifest)

    def _drafted(self) -> Iterator[tuple[int, int]]:
        """The extents that the draft holds, in pieces, in disk order."""
        return self._draft.extents() if self._draft is not None else iter(())

    def preserve(self, point: str) -> bool:
        """Keep the disk as it is now under the label `point`, before `publish` changes the image. See `points`.

        Returns False if the point cannot be restored, because the image no longer holds its last good content.
        """
        if self._committed is None:
            return True  # nothing changes
        saved, image = self._saved, self._medium.open("image")
        if saved is not None and saved.interrupted:
            saved = None
        if saved is None or image is None or self._altered:
            where = self._medium.where
            self._report(
                Notice(f"{where} is no longer what the last run had left, so that point cannot be kept")
            )
        if saved is None or image is None:
            return False
        with contextlib.closing(self._medium.past(point)) as past:
            if not past.snapshot():
                undo.keep(past, image, saved.manifest, self._changing(image), self._medium.guard)
            past.save(saved.manifest.text({}))
        return not self._altered

    def _changing(self, image: Store) -> Iterator[tuple[int, int]]:
        """The extents of the image that `publish` will change, in pieces, in disk order."""
        if self._partial:
            yield from pieces(0, image.size)
            return
        yield from self._drafted()
        if self._committed is not None and self._committed.size < image.size and self._medium.watched:
            yield from pieces(self._committed.size, image.size)

    def publish(self) -> None:
        """Bring the image to what was committed. Does nothing if nothing was, except for a new baseline."""
        manifest = self._committed
        if manifest is None:
            if self._saved is not None and self._has_new_baseline():
                self._save_sealed(self._saved.manifest)
            return
        image = self._update_image(manifest)
        if self._medium.contested:
            self._check_all(image, manifest)
        self._end(manifest)

    def _has_new_baseline(self) -> bool:
        saved = self._saved
        return self._is_committed and saved is not None and self._baseline not in (None, saved.baseline)

    def _update_image(self, manifest: Manifest) -> Store:
        """Promote the partial image, or write the redo log into the image and compare what the medium then holds.

        Raises DestinationFailed if another program has changed the image or the draft.
        """
        if self._partial:
            if self._medium.open("partial") is None:  # it was promoted before the last run died
                self._stamp = self._medium.stamp()
                return self._image()
            with self._medium.protected("partial"):
                self._refuse_replaced()
                self._refuse_changed_draft()
                self._medium.promote()
                self._stamp = self._medium.stamp()
            return self._image()
        image = self._image()
        with self._medium.protected():
            self._refuse_replaced()
            if image.size != manifest.size or self._draft is not None:
                self._medium.unseal()
            if image.size != manifest.size:
                image.resize(manifest.size)
            if self._draft is not None:
                self._draft.apply(image, self._medium.guard)
            image.flush()
            self._refuse_changed_draft()
            self._stamp = self._medium.stamp()
        if self._draft is not None and (offset := self._draft.first_difference(image)) is not None:
            raise CorruptChunk(
                f"{self.name}: at offset {offset} the image reads back differently from what was written",
                disk=self.name,
                offset=offset,
            )
        return image

    def _image(self) -> Store:
        image = self._medium.open("image")
        if image is None:
            raise DestinationFailed(f"{self._medium.where} no longer exists", disk=self.name)
        return image

    def _end(self, manifest: Manifest) -> None:
        """Save the manifest of the published image, and delete the draft."""
        self._refuse_changed()
        self._save_sealed(manifest)
        self._draft = self._target = self._committed = None
        self._drop_draft()

    def _check_all(self, image: Store, manifest: Manifest) -> None:
        """Raise CorruptChunk if the image does not match the manifest."""
        found = self._reread(image, manifest)
        for index in found.digests.differing(manifest.digests):
            offset = manifest.span(index)[0]
            text = f"{self.name}: the chunk at offset {offset} was changed by another run"
            raise CorruptChunk(text, disk=self.name, offset=offset)

    # Recovering

    def is_unpublished(self, root: str) -> bool:
        """Whether there is a committed draft with this root, which is that of the disk in the record."""
        draft = self._documents.draft(ours=False)
        return draft is not None and draft.committed and draft.manifest.root() == root

    def recover(self) -> None:
        """Publish the committed draft of a run that died after the switch.

        If some of it is damaged or lost by now, the next run fetches that again.
        """
        self._medium.take()
        self._reset()
        draft = self._documents.draft()
        if draft is None:
            return
        manifest, where = draft.manifest, self._medium.where
        if self._is_published(manifest):
            self._drop_draft()
            return
        self._report(Notice(f"{where}: publishing what the last run had fetched"))
        self._partial, self._baseline = draft.partial, draft.baseline
        promoted = self._partial and self._medium.open("partial") is None
        if self._medium.open("image") is None and (promoted or not self._partial):
            self._report(Notice(f"{where} no longer exists; all of it is sent again"))
            self._drop_draft()
            return
        if self._partial and not promoted and not self._is_whole(manifest):
            self._report(
                Notice(f"what the last run had fetched of {where} is damaged; what differs is sent again")
            )
            self._save_draft(manifest)  # the next run uses those chunks of it that are intact
            return
        if not promoted:
            self.take()  # an image that this run did not make itself must be one of ours
        if not self._partial:
            self._draft = self._redo_log(manifest)
        self._stamp = self._medium.stamp()
        self._end(self._recovered(manifest))

    def _recovered(self, manifest: Manifest) -> Manifest:
        """Update the image as far as the draft allows; return the manifest of what it then holds.

        Since that run died, somebody may have changed the image, or the redo log may have been damaged.
        """
        image = self._update_image(manifest)
        if self._medium.watched and image.size != manifest.size:
            image.resize(manifest.size)
            self._stamp = self._medium.stamp()
        found = self._reread(image, manifest)
        if found != manifest:
            self._report(
                Notice(
                    f"part of {self._medium.where} is not what the last run had fetched; what differs is sent again"
                )
            )
            self._baseline = None
        return found

    def _is_published(self, manifest: Manifest) -> bool:
        """Whether the image is published already, and only the draft was not deleted yet."""
        saved = self._load()
        if saved is None or saved.manifest != manifest or not self._medium.watched:
            return False
        return self._medium.open("image") is not None and not self._doubt(saved, manifest.chunk)

    def _is_whole(self, manifest: Manifest) -> bool:
        """Whether the partial image still matches its manifest."""
        partial = self._medium.open("partial")
        if partial is None or partial.size != manifest.size:
            return False
        return self._reread(partial, manifest) == manifest

    def _redo_log(self, manifest: Manifest) -> Draft | None:
        """The redo log of a committed draft, with only the chunks that are intact; None if there is none."""
        content, index = self._medium.open("redo"), self._medium.open("index")
        if content is None or index is None:
            return None
        if (content.size, index.size) != (manifest.size, index_size(manifest)):
            return None
        draft = Draft(content, index, self._below, manifest, existing=True)
        draft.resume(manifest, self._below)
        self._draft_stamps = self._stamps_of_draft()
        return draft

    # The manifest

    def _load(self, *, ours: bool = True) -> Saved | None:
        """The document `manifest`; None if there is no usable one."""
        return self._documents.manifest(ours=ours)

    def _save_sealed(self, manifest: Manifest) -> None:
        """Seal the image, which matches `manifest`, and save both with the stamp that it must have in the next run."""
        sealed = self._medium.seal(self._stamp or Stamp())
        self._save_manifest(manifest, sealed)
        if not self._medium.renames:  # sealing changes a page blob
            self._stamp = sealed

    def _save_manifest(self, manifest: Manifest, stamp: Stamp | None) -> None:
        self._documents.save_manifest(Saved(manifest, stamp or Stamp(), self._baseline))

    def close(self) -> None:
        """See Destination. What was committed is no longer published by this object."""
        self._watching.close()
        self._medium.close()
        if self.grains is not None:
            self.grains.close()
        self._reset()

    def __enter__(self) -> Replica:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, unless it was committed: then its place closes it, after all disks were published together."""
        if not self._is_committed:
            self.close()
