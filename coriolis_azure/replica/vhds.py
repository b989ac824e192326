"""Fixed VHDs in Blob storage: page blobs, one a disk, from which Azure makes managed disks, with what is kept beside.

    os.vhd            the image: the disk's bytes, zeros up to a whole MiB, the footer
    os.vhd.manifest   what it holds, with the ETag that the VHD had then
    os.vhd.redo       the log of what is to change in the image, a page blob
    os.vhd.index      what the log has, a page blob
    os.vhd.draft      what the log is of
    points/<point>/   the disk at an earlier point in time: os.vhd.manifest, whose metadata names a snapshot of the VHD

The VHD's metadata says what it is at the moment, and changes together with it:

    coriolis_image     an id made with the blob; without it the blob is somebody else's
    coriolis_size      the bytes of the disk
    coriolis_state     `complete`, or `writing` while the VHD is written; then it has no footer, so nothing takes it for
                       whole

* While a run has the place, every page blob is leased, and each change carries the lease. A run that was suspended
  until its lease ran out, and another took over, can change nothing of them. Documents have no lease; they are replaced
  only while they are as this run knows them, or while the place is ours.
* An ETag other than the noted one is a stranger's change, which no run overwrites unasked.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from .. import vhd
from ..azure.blobs import PAGE, Blob, Container, Properties, Storage
from ..clock import Clock
from ..errors import AzureError, Conflict, DestinationFailed, InvalidInput
from ..events import Report, Waiting
from .medium import Document, Part, Stamp
from .page_store import IndexStore, PageStore, translated, unnamed
from .vhd_past import SIZE, VhdPast

IMAGE = "coriolis_image"
_STATE, _ETAG = "coriolis_state", "coriolis_etag"
_MADE = "coriolis_made_as"
_WRITING, _COMPLETE = "writing", "complete"
LEASE_SECONDS = 60
POINTS = "points"
_TAKEN = ("LeaseAlreadyPresent",)
_OTHERWISE = (409, 412)  # the statuses of a refusal because a blob is another one than it was


class VhdMedium:
    """One fixed VHD in a page blob and what is beside it. See Medium.

    `hold` renews the lock on the place that the VHD is in, or raises AzureError where it is lost.
    """

    far = True
    renames = False
    watched = True
    contested = False
    grains = None

    def __init__(
        self, container: Container, path: str, storage: Storage, report: Report, hold: Callable[[], None]
    ) -> None:
        self.name = path.rpartition("/")[2].removesuffix(".vhd")
        self._container, self._path = container, path
        self._blob = container.blob(path)
        self.where = self._blob.url
        self._clock, self._report, self._hold = storage.clock, report, hold
        self._stores: dict[Part, PageStore] = {}
        self._etags: dict[Document, str] = {}
        self._image = ""
        self._sealed = False
        self._taken = self._stopped = False

    @property
    def interrupted(self) -> bool:
        """See Medium. So a version that knew no drafts has left it, and one that died while it published."""
        return "image" in self._stores and not self._sealed

    # Its parts

    def take(self) -> None:
        """See Medium."""
        if self._taken:
            return
        self.close()
        with self._translated("cannot be prepared"):
            found = self._blob.find()
            if found is not None:
                self._refuse_other(found)
                self._lease(self._blob)  # whoever lost the place while it waited must not begin
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

    def refuse_foreign(self, kept: Stamp | None) -> None:
        """See Medium. Done before the lease is taken."""

    def _refuse_other(self, found: Properties) -> None:
        if found.kind != "PageBlob" or IMAGE not in found.metadata:
            what = "is no page blob" if found.kind != "PageBlob" else "was not made by this program"
            raise InvalidInput(
                f"{self.where} {what}, and is left as it is",
                remedy="Give another prefix, or remove the blob if nobody needs it.",
            )

    def _remember(self, found: Properties) -> None:
        self._image = found.metadata.get(IMAGE, "")
        self._sealed = found.metadata.get(_STATE) == _COMPLETE
        room = max(0, found.size - vhd.FOOTER)
        said = found.metadata.get(SIZE, "")
        size = min(int(said), room) if said.isdigit() else room
        self._stores["image"] = PageStore(self._blob, size, self.name, self._given_up)

    def _given_up(self) -> bool:
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
            self._lease(blob)
            said = found.metadata.get(SIZE, "")
        if not said.isdigit():
            return None
        return self._opened(part, blob, int(said))

    def make(self, part: Part, size: int) -> PageStore:
        """See Medium."""
        if part == "image":
            return self._made_image(size)
        self.remove(part)
        with self._translated("cannot be made"):
            blob = self._beside(part)
            self._create_part(blob, size)
            self._lease(blob)
        return self._opened(part, blob, size)

    def _create_part(self, blob: Blob, size: int) -> None:
        """Make a page blob where none is. A run that has lost the place may have made one, which is deleted."""
        made = uuid.uuid4().hex
        for last in (False, False, True):
            try:
                blob.create_pages(
                    vhd.rounded(size), {IMAGE: self._image, SIZE: str(size), _MADE: made}, new=True
                )
            except AzureError as error:
                found = blob.find() if error.status in _OTHERWISE else None
                if found is not None and found.metadata.get(_MADE) == made:
                    return  # the answer was lost, and the request made again
                if last or found is None:
                    raise
                self._remove(blob)
            else:
                return

    def _lease(self, blob: Blob) -> None:
        """Lease a blob; without the place it is not kept from the run that has that."""
        lease(blob, blob.url, self._clock, self._report)
        try:
            self._hold()
        except BaseException:
            blob.release()
            raise

    def _made_image(self, size: int) -> PageStore:
        """A page blob of zeros; it has no footer yet."""
        self._image, self._sealed = uuid.uuid4().hex, False
        with self._translated("cannot be made"):
            made = self._create(size)
            if self._blob.lease_id:
                self._hold()
            else:
                self._lease(self._blob)
            found = self._blob.find()
            if found is None or found.etag != made:
                raise DestinationFailed(
                    f"{self.where} was changed by somebody as it was made", disk=self.name
                )
        return self._opened("image", self._blob, size)

    def _create(self, size: int) -> str:
        """Make the page blob; its ETag."""
        new = not self._blob.lease_id
        try:
            return self._blob.create_pages(vhd.rounded(size) + vhd.FOOTER, self._metadata(size), new=new)
        except AzureError as error:
            found = self._blob.find() if error.status in _OTHERWISE else None
            if found is None or found.metadata.get(IMAGE) != self._image:
                raise
            return found.etag  # ours: the answer was lost, and the request made again

    def _opened(self, part: Part, blob: Blob, size: int) -> PageStore:
        if part == "index":
            store: PageStore = IndexStore(blob, size, self.name, self._given_up, self._clock)
        else:
            store = PageStore(blob, size, self.name, self._given_up)
        self._stores[part] = store
        return store

    def remove(self, part: Part) -> None:
        """See Medium."""
        store = self._stores.pop(part, None)
        with self._translated("cannot be deleted"):
            blob = store.blob if store is not None else self._beside(part)
            if store is None:
                self._remove(blob)
            else:
                blob.delete()

    def _remove(self, blob: Blob) -> None:
        if blob.find() is not None:
            self._lease(blob)
            blob.delete()

    def promote(self) -> None:
        """See Medium. Blobs have no second name."""
        raise NotImplementedError

    def is_blank(self) -> bool:
        """See Medium. What we have made is ours."""
        return False

    def delete(self) -> None:
        """Delete the VHD and all that is beside it; what is gone is no error. InvalidInput for a blob of others."""
        self.take()
        for part in ("redo", "index"):
            self.remove(part)
        for document in ("draft", "manifest"):
            self.forget(document)
        if self._stores.pop("image", None) is not None:
            with self._translated("cannot be deleted"):
                self._blob.delete()

    def _beside(self, what: str) -> Blob:
        return self._container.blob(f"{self._path}.{what}")

    # How it is

    def unseal(self) -> None:
        """See Medium: it has no footer from now on."""
        image = self._stores["image"]
        if self._sealed:
            with self._translated("cannot be prepared"):
                self._sealed = False
                self._blob.set_metadata(self._metadata(image.size))
                self._blob.clear(vhd.rounded(image.size), vhd.FOOTER)

    def seal(self, seen: Stamp) -> Stamp:
        """See Medium: it has its footer. The lease keeps others out."""
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
    def held(self, part: Part = "image") -> Iterator[None]:
        """See Medium. The lease does that."""
        del part
        yield

    def doubt(self, stamp: Stamp) -> str:
        """See Medium. InvalidInput where a stranger has changed it."""
        now = self.stamp()
        if now == stamp or now is None:
            return ""
        if stamp.get("image") != self._image:
            return f"{self.where} has another manifest's beside it"
        if "etag" not in stamp:  # as older versions noted it, beside the manifest
            with self._translated("cannot be read"):
                found = self._beside("manifest").find()
            noted = found.metadata.get(_ETAG) if found is not None else None
            if noted is None:
                return f"the last run to {self.where} died as it ended"
            if f'"{noted}"' == now["etag"]:
                return ""
        raise InvalidInput(
            f"{self.where} was changed by somebody since the last run",
            remedy="To keep the change, copy the blob or give another prefix. To let go of it, run with --full, "
            "which writes the blob anew; in the orchestrator, delete the disks of the transfer first.",
        )

    def guard(self, *, now: bool = False) -> None:
        """See Medium. Between two looks the leases keep others out."""
        if now:
            with self._translated("is no longer ours"):
                self._hold()

    # Room for what is to come

    def reserve(self, extents: Iterable[tuple[int, int]]) -> None:
        """See Medium. There always is."""

    def give_back(self, extents: Iterable[tuple[int, int]]) -> None:
        """See Medium."""

    # Its documents

    def load(self, document: Document, *, ours: bool = True) -> IO[bytes] | None:
        """See Medium."""
        del ours  # who may write here is up to the account
        blob = self._beside(document)
        with self._translated("cannot be read"):
            found = blob.find()
            self._etags[document] = found.etag if found is not None else ""
            if found is None:
                return None
            file = unnamed()
            if not blob.read_into(file):
                file.close()
                return None
        file.seek(0)
        return file

    def save(self, document: Document, pieces: Iterable[bytes]) -> None:
        """See Medium."""
        with unnamed() as file, self._translated("cannot be written"):
            file.writelines(pieces)
            self._etags[document] = self._put(document, file)

    def _put(self, document: Document, file: IO[bytes]) -> str:
        """Replace it; its ETag."""

        def put(blob: Blob, known: str) -> str:
            file.seek(0)
            return blob.put(file, new=not known, only=known)

        return self._changed(document, put)

    def _changed(self, document: Document, change: Callable[[Blob, str], str]) -> str:
        """Change it while it has the ETag that we know; another one is changed only while the place is ours."""
        blob = self._beside(document)
        if document not in self._etags:
            found = blob.find()
            self._etags[document] = found.etag if found is not None else ""
        known = self._etags[document]
        for last in (False, False, True):
            try:
                return change(blob, known)
            except AzureError as error:
                if last or error.status not in _OTHERWISE:
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
        """Keep others out for another minute."""
        for store in list(self._stores.values()):
            store.blob.renew()

    def stop(self) -> None:
        """See Medium."""
        self._stopped = True

    def close(self) -> None:
        """See Medium."""
        index = self._stores.get("index")
        if index is not None:
            with contextlib.suppress(DestinationFailed):  # what is lost of it is fetched again
                index.flush()
        for store in self._stores.values():
            store.blob.release()
        self._stores, self._etags, self._taken = {}, {}, False

    def _translated(self, what: str) -> contextlib.AbstractContextManager[None]:
        return translated(self.where, what, self.name)


def lease(blob: Blob, place: str, clock: Clock, report: Report) -> None:
    """Lease a blob, as soon as a run that died no longer has it; InvalidInput when one that lives does."""
    until = clock.monotonic() + LEASE_SECONDS + 5
    told = False
    while True:
        try:
            blob.lease(LEASE_SECONDS)
        except Conflict as error:
            if error.code not in _TAKEN:
                raise
            if clock.monotonic() >= until:
                raise InvalidInput(
                    f"another run is using {place}",
                    remedy="Wait for it to end, or give another prefix. Break the lease if it is not a run of ours.",
                ) from error
            if not told:
                report(Waiting(f"another run of {place} to end, or its lease to run out", LEASE_SECONDS))
                told = True
            clock.sleep(5)
        else:
            return
