"""Fixed VHDs in Blob storage, one page blob per disk, and the blobs beside them. Azure can import such a VHD as a disk.

    os.vhd            the image: the bytes of the disk, zeros up to a whole MiB, the footer
    os.vhd.manifest   what the image holds, and the ETag of the VHD
    os.vhd.redo       a draft as a redo log, a page blob
    os.vhd.index      the index of the draft, a page blob
    os.vhd.grains     digests of grains, see `grains`, a page blob
    os.vhd.draft      the disk that the draft is of and, once it is complete, its manifest
    points/<label>/   the disk at an earlier point in time: os.vhd.manifest, whose metadata names a snapshot of the VHD

The metadata of the VHD describes its current state, and changes with it:

    coriolis_image     an id created with the blob; a blob without it is not ours
    coriolis_size      the size of the disk, in bytes
    coriolis_state     `complete`, or `writing` while it is written; meanwhile it has no footer, so nobody can use it

* The VHD and the draft are leased while a run uses them, and each change carries the lease. So a run that is suspended
  until its lease expires and another run takes over cannot change them any more. The digests of grains need no lease,
  because they prove themselves. Nor do documents: one is replaced only while it has the ETag that this run knows, or
  while this run still holds the place.
* If the ETag is not the recorded one, somebody else has changed the VHD. No run overwrites that unless it is told to.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from .. import vhd
from ..azure.blobs import MOST, PAGE, Blob, Container, Properties, Storage
from ..clock import Clock
from ..errors import AzureError, Conflict, DestinationFailed, InvalidInput
from ..events import Report, Waiting
from .grains import Grains
from .medium import Document, Part, Stamp
from .page_store import EntryBlob, EntryStore, PageStore, downloaded, translated, unnamed
from .vhd_past import SIZE, VhdPast

IMAGE = "coriolis_image"
_STATE, _ETAG = "coriolis_state", "coriolis_etag"
_MADE = "coriolis_made_as"
_WRITING, _COMPLETE = "writing", "complete"
LEASE_SECONDS = 60
POINTS = "points"
_TAKEN = ("LeaseAlreadyPresent",)
_CHANGED = (409, 412)  # the statuses of a refusal because a blob is not in the expected state


class VhdMedium:
    """One fixed VHD in a page blob, and the blobs beside it. See Medium.

    `hold`: renews the lease that locks the place; raises AzureError if this run has lost it.
    """

    far = True
    joined_bytes = MOST
    renames = False
    watched = True
    contested = False

    def __init__(
        self, container: Container, path: str, storage: Storage, report: Report, hold: Callable[[], None]
    ) -> None:
        self.name = path.rpartition("/")[2].removesuffix(".vhd")
        self._container, self._path = container, path
        self._blob = container.blob(path)
        self.where = self._blob.url
        self._clock, self._report, self._hold = storage.clock, report, hold
        self._stores: dict[Part, PageStore] = {}
        self._leased: list[Blob] = []
        self._etags: dict[Document, str] = {}
        self._image = ""
        self._sealed = False
        self._taken = self._stopped = False
        self._entries = EntryBlob(
            self._beside("grains"), self.name, self._is_stopped, self._clock, lambda: {IMAGE: self._image}
        )
        self.grains = Grains(self._entries)

    @property
    def interrupted(self) -> bool:
        """See Medium. Also if a run died while it published."""
        return "image" in self._stores and not self._sealed

    # Parts

    def take(self) -> None:
        """See Medium."""
        if self._taken:
            return
        self.close()
        with self._translated("cannot be prepared"):
            found = self._blob.find()
            if found is not None:
                self._refuse_other(found)
                self._lease(self._blob)  # raises if this run lost the place while it waited
                self._remember(self._blob.find() or found)
        self._taken = True

    def share(self) -> None:
        """See Medium."""
        if self._stores:
            return
        with self._translated("cannot be read"):
            found = self._blob.find()
            if found is not None:
                self._remember(found)

    def refuse_foreign(self, stamp: Stamp | None) -> None:
        """Do nothing: `take` has checked that. See Medium."""

    def _refuse_other(self, found: Properties) -> None:
        """Raise InvalidInput if the blob is not a VHD of ours."""
        if found.kind != "PageBlob" or IMAGE not in found.metadata:
            what = "is not a page blob" if found.kind != "PageBlob" else "was not made by this program"
            raise InvalidInput(
                f"{self.where} {what}, so it is left as it is",
                remedy="Give another prefix, or remove the blob if nobody needs it.",
            )

    def _remember(self, found: Properties) -> None:
        self._image = found.metadata.get(IMAGE, "")
        self._sealed = found.metadata.get(_STATE) == _COMPLETE
        most = max(0, found.size - vhd.FOOTER)
        recorded = found.metadata.get(SIZE, "")
        size = min(int(recorded), most) if recorded.isdigit() else most
        self._stores["image"] = PageStore(self._blob, size, self.name, self._is_stopped)

    def _is_stopped(self) -> bool:
        return self._stopped

    def open(self, part: Part) -> PageStore | None:
        """See Medium."""
        if part in self._stores or part == "image":
            return self._stores.get(part)
        with self._translated("cannot be opened"):
            blob = self._beside(part)
            found = blob.find()
            if found is None:
                return None
            size = found.metadata.get(SIZE, "")
            if not size.isdigit():
                return None
            self._lease(blob)
        return self._opened(part, blob, int(size), blank=False)

    def make(self, part: Part, size: int) -> PageStore:
        """See Medium."""
        if part == "image":
            return self._create_image(size)
        self.remove(part)
        with self._translated("cannot be created"):
            blob = self._beside(part)
            self._create_part(blob, size)
            self._lease(blob)
        return self._opened(part, blob, size, blank=True)

    def _create_part(self, blob: Blob, size: int) -> None:
        """Create a page blob. One of a run that has lost the place may be in the way: it is deleted."""
        made_as = uuid.uuid4().hex
        for last in (False, False, True):
            try:
                blob.create_pages(
                    vhd.rounded(size), {IMAGE: self._image, SIZE: str(size), _MADE: made_as}, new=True
                )
            except AzureError as error:
                found = blob.find() if error.status in _CHANGED else None
                if found is not None and found.metadata.get(_MADE) == made_as:
                    return  # ours: the first answer was lost, and the request was repeated
                if last or found is None:
                    raise
                self._remove(blob)
            else:
                return

    def _lease(self, blob: Blob) -> None:
        """Lease a blob. Releases it again and raises AzureError if this run has lost the place."""
        lease(blob, blob.url, self._clock, self._report)
        try:
            self._hold()
        except BaseException:
            blob.release()
            raise
        self._leased.append(blob)

    def _create_image(self, size: int) -> PageStore:
        """Create the VHD: zeros, without a footer yet."""
        self._image, self._sealed = uuid.uuid4().hex, False
        with self._translated("cannot be created"):
            etag = self._create(size)
            if self._blob.lease_id:
                self._hold()
            else:
                self._lease(self._blob)
            found = self._blob.find()
            if found is None or found.etag != etag:
                raise DestinationFailed(
                    f"somebody else changed {self.where} while it was being created", disk=self.name
                )
        return self._opened("image", self._blob, size, blank=True)

    def _create(self, size: int) -> str:
        """Create the page blob of the VHD; return its ETag."""
        new = not self._blob.lease_id
        try:
            return self._blob.create_pages(vhd.rounded(size) + vhd.FOOTER, self._metadata(size), new=new)
        except AzureError as error:
            found = self._blob.find() if error.status in _CHANGED else None
            if found is None or found.metadata.get(IMAGE) != self._image:
                raise
            return found.etag  # ours: the first answer was lost, and the request was repeated

    def _opened(self, part: Part, blob: Blob, size: int, *, blank: bool) -> PageStore:
        if part == "index":
            store: PageStore = EntryStore(blob, size, self.name, self._is_stopped, self._clock, blank=blank)
        else:
            store = PageStore(blob, size, self.name, self._is_stopped)
        self._stores[part] = store
        return store

    def remove(self, part: Part) -> None:
        """See Medium."""
        store = self._stores.pop(part, None)
        with self._translated("cannot be deleted"):
            if store is None:
                self._remove(self._beside(part))
            else:
                self._delete(store.blob)

    def _remove(self, blob: Blob) -> None:
        if blob.find() is not None:
            self._lease(blob)
            self._delete(blob)

    def _delete(self, blob: Blob) -> None:
        """Delete a blob that is leased, and the lease with it. If that fails, `close` releases the lease."""
        blob.delete()
        self._leased = [each for each in self._leased if each is not blob]

    def promote(self) -> None:
        """Never called: blobs cannot be renamed. See Medium."""
        raise NotImplementedError

    def is_blank(self) -> bool:
        """See Medium. False, because only our own blobs are ever opened."""
        return False

    def delete(self) -> None:
        """Delete the VHD and the blobs beside it; missing ones are no error. Raises InvalidInput if it is not ours."""
        self.take()
        for part in ("redo", "index"):
            self.remove(part)
        with self._translated("cannot be deleted"):
            self._entries.delete()
        for document in ("draft", "manifest"):
            self.forget(document)
        if self._stores.pop("image", None) is not None:
            with self._translated("cannot be deleted"):
                self._delete(self._blob)

    def _beside(self, what: str) -> Blob:
        return self._container.blob(f"{self._path}.{what}")

    # State

    def unseal(self) -> None:
        """Remove the footer. See Medium."""
        image = self._stores["image"]
        if self._sealed:
            with self._translated("cannot be prepared"):
                self._sealed = False
                self._blob.set_metadata(self._metadata(image.size))
                self._blob.clear(vhd.rounded(image.size), vhd.FOOTER)

    def seal(self, seen: Stamp) -> Stamp:
        """Write the footer. See Medium. The lease keeps others out."""
        image = self._stores["image"]
        if self._sealed:
            return seen
        with self._translated("cannot be committed"):
            end = vhd.rounded(image.size)
            start = image.size + -image.size % PAGE
            if start < end:
                self._blob.clear(start, end - start)
            self._blob.write(end, vhd.footer(end, uuid.UUID(self._image), self._clock.now()))
            self._sealed = True
            etag = self._blob.set_metadata(self._metadata(image.size))
        return {"image": self._image, "etag": etag}

    def _metadata(self, size: int) -> dict[str, str]:
        return {
            IMAGE: self._image,
            _STATE: _COMPLETE if self._sealed else _WRITING,
            SIZE: str(size),
        }

    def stamp(self, part: Part = "image") -> Stamp | None:
        """See Medium."""
        store = self._stores.get(part)
        if store is None:
            return None
        with self._translated("cannot be read"):
            found = store.blob.find()
        return {"image": self._image, "etag": found.etag if found is not None else ""}

    @contextlib.contextmanager
    def protected(self, part: Part = "image") -> Iterator[None]:
        """Do nothing: the lease keeps others out. See Medium."""
        del part
        yield

    @contextlib.contextmanager
    def unshared(self, part: Part) -> Iterator[Callable[[], bool]]:
        """The lease keeps others out. See Medium."""
        del part
        yield lambda: True

    def doubt(self, stamp: Stamp) -> str:
        """See Medium. Raises InvalidInput if somebody else has changed the VHD."""
        now = self.stamp()
        if now == stamp or now is None:
            return ""
        if stamp.get("image") != self._image:
            return f"the manifest beside {self.where} is of another VHD"
        if "etag" not in stamp:  # older versions kept it in the metadata of the manifest's blob
            with self._translated("cannot be read"):
                found = self._beside("manifest").find()
            recorded = found.metadata.get(_ETAG) if found is not None else None
            if recorded is None:
                return f"the last run to {self.where} died at its end"
            if f'"{recorded}"' == now["etag"]:
                return ""
        raise InvalidInput(
            f"somebody else changed {self.where} since the last run",
            remedy="To keep the change, copy the blob or give another prefix. To discard it, run with --full, which "
            "writes the whole blob; in the orchestrator, delete the disks of the transfer first.",
        )

    def guard(self, *, now: bool = False) -> None:
        """See Medium. Between checks, the leases keep others out."""
        if now:
            with self._translated("is no longer ours"):
                self._hold()

    # Space

    def reserve_space(self, extents: Iterable[tuple[int, int]]) -> None:
        """Do nothing: Blob storage does not run out of space. See Medium."""

    def release_space(self, extents: Iterable[tuple[int, int]]) -> None:
        """Do nothing. See Medium."""

    # Documents

    def load(self, document: Document, *, ours: bool = True) -> IO[bytes] | None:
        """See Medium."""
        del ours  # the storage account decides who may write
        blob = self._beside(document)
        with self._translated("cannot be read"):
            found = blob.find()
            self._etags[document] = found.etag if found is not None else ""
            if found is None:
                return None
            return downloaded(blob)

    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        """See Medium."""
        with unnamed() as file, self._translated("cannot be written"):
            file.writelines(pieces)
            self._etags[document] = self._put(document, file)

    def _put(self, document: Document, file: IO[bytes]) -> str:
        """Replace the document; return its new ETag."""

        def put(blob: Blob, known: str) -> str:
            file.seek(0)
            return blob.put(file, new=not known, only=known)

        return self._changed(document, put)

    def _changed(self, document: Document, change: Callable[[Blob, str], str]) -> str:
        """Call `change` with the document's blob and known ETag; return the new ETag.

        If the document has another ETag by now, it is changed only if this run still holds the place.
        """
        blob = self._beside(document)
        if document not in self._etags:
            found = blob.find()
            self._etags[document] = found.etag if found is not None else ""
        known = self._etags[document]
        for last in (False, False, True):
            try:
                return change(blob, known)
            except AzureError as error:
                if last or error.status not in _CHANGED:
                    raise
                self._hold()
                found = blob.find()
                known = found.etag if found is not None else ""
        raise AssertionError("the last try returns or raises")

    def forget(self, document: Document) -> None:
        """See Medium."""

        def delete(blob: Blob, known: str) -> str:
            if known:
                blob.delete(only=known)
            return ""

        with self._translated("cannot be deleted"):
            self._hold()
            self._etags[document] = self._changed(document, delete)

    def past(self, point: str) -> VhdPast:
        """See Medium."""
        folder, _, name = self._path.rpartition("/")
        manifest = "/".join(filter(None, (folder, POINTS, point, f"{name}.manifest")))
        image = self._stores.get("image")
        return VhdPast(
            self._blob, image.size if image is not None else 0, self._container.blob(manifest), point
        )

    def renew(self) -> None:
        """Renew the leases of all parts."""
        for store in list(self._stores.values()):
            store.blob.renew()

    def stop(self) -> None:
        """See Medium."""
        self._stopped = True

    def close(self) -> None:
        """See Medium."""
        index = self._stores.get("index")
        if index is not None:
            with contextlib.suppress(DestinationFailed):  # entries that are lost are fetched again
                index.flush()
        for blob in self._leased:
            blob.release()
        self._leased, self._stores, self._etags, self._taken = [], {}, {}, False

    def _translated(self, what: str) -> contextlib.AbstractContextManager[None]:
        return translated(self.where, what, self.name)


def lease(blob: Blob, place: str, clock: Clock, report: Report) -> None:
    """Lease a blob; wait up to a minute for the lease of a run that died. Raises InvalidInput if another run has it.

    `place`: what the lease protects, for messages.
    """
    until = clock.monotonic() + LEASE_SECONDS + 5
    reported = False
    while True:
        try:
            blob.lease(LEASE_SECONDS)
        except Conflict as error:
            if error.code not in _TAKEN:
                raise
            if clock.monotonic() >= until:
                raise InvalidInput(
                    f"another run is using {place}",
                    remedy="Wait until it ends, or give another prefix. If no run holds the lease, break it.",
                ) from error
            if not reported:
                report(Waiting(f"another run of {place} to end, or its lease to expire", LEASE_SECONDS))
                reported = True
            clock.sleep(5)
        else:
            return
