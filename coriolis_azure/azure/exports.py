"""Reads the page blob behind an incremental snapshot, through a SAS.

Azure lets a snapshot be read at a host of its own for as long as access is granted. The blob is the disk and, in its
last page, the footer of a fixed VHD. All snapshots of a family are snapshots of one blob, so Azure can list the pages
that changed from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from azure.storage.blob import BlobClient

from .. import __version__
from ..clock import Clock
from ..errors import Denied
from ..model import Json
from ..threads import Lock
from . import patience
from .blob_retries import ClientRetries
from .client import Azure
from .pace import Pace
from .page_lists import TIMED_OUT, SnapshotBlob
from .pages import Pages
from .patience import whole
from .ranges import Ranges
from .sas import Sas
from .translation import translated

T = TypeVar("T")
# The grant's end is not in its URL. A URL that leaked is of use for an hour at most.
_SECONDS = 3600
# The newest version that a recorded exchange with these hosts has used.
_VERSION = "2021-04-10"
_MOST_READS = 32  # at a time


class Export(SnapshotBlob):
    """The content of the managed snapshot of a disk of `size` bytes, given by Azure's document of it.

    Whoever opens it ends the access.
    """

    def __init__(self, azure: Azure, document: Json, size: int, clock: Clock) -> None:
        super().__init__(document["id"], size)
        self._document = document
        self._azure, self._clock = azure, clock
        self._lock, self._pace = Lock(), Pace(clock, _MOST_READS)
        self._access = self._granted()

    def fill(self, offset: int, data: memoryview) -> None:
        """See SnapshotBlob."""
        self._ask("read", lambda access: access.content.fill(offset, data))

    def document(self) -> Json:
        """See SnapshotBlob."""
        return self._document

    def _listed(self, offset: int, length: int, older: SnapshotBlob | None) -> tuple[Pages, Pages]:
        if older is None:
            allocated = partial(self._allocated_in, offset, length)
            return self._ask("list the pages of", lambda access: (allocated(access.lists), Pages()))
        if not isinstance(older, Export):
            raise TypeError(f"a managed snapshot is not compared with {type(older).__name__}")

        def changed(access: _Access) -> tuple[Pages, Pages]:
            return self._changed_in(offset, length, older._current().sas.url, access.lists)

        return self._ask("list the pages of", changed, older)

    def _allocated_in(self, offset: int, length: int, client: BlobClient) -> Pages:
        listed = client.list_page_ranges(offset=offset, length=length, raw_response_hook=self._check)
        return Pages((pages.start or 0, (pages.end or 0) + 1) for pages in whole(listed))

    def _changed_in(self, offset: int, length: int, previous: str, client: BlobClient) -> tuple[Pages, Pages]:
        """The library's method gives back the first answer as the whole, so the markers are followed here."""
        written, cleared = Pages(), Pages()
        options: dict[str, Any] = {"offset": offset, "length": length, "raw_response_hook": self._check}
        answers = patience.Pages()
        while True:
            answer = _Answer()
            client.get_page_range_diff_for_managed_disk(previous, cls=answer, **options)
            for pages, listed in ((written, answer.body.page_range), (cleared, answer.body.clear_range)):
                for each in listed or ():
                    pages.append(each.start, each.end + 1)
            if not (marker := answer.body.next_marker):
                return written, cleared
            answers.turned(marker)
            options["marker"] = marker

    # Access

    def _ask(self, verb: str, request: Callable[[_Access], T], older: Export | None = None) -> T:
        """The answer to a request; if access has been denied, after it was granted once more, also to `older`."""
        access = self._current()
        before = older._current() if older is not None else None
        try:
            with translated(verb, self.snapshot):
                return request(access)
        except Denied:
            access = self._renewed(access)
            if older is not None and before is not None:
                older._renewed(before)
            with translated(verb, self.snapshot):
                return request(access)

    def _current(self) -> _Access:
        """An access that lasts for at least half an hour."""
        access = self._access
        return self._renewed(access) if self._clock.monotonic() - access.since > _SECONDS / 2 else access

    def _renewed(self, old: _Access) -> _Access:
        """A newer access than `old`, which several threads may ask for at once."""
        with self._lock:
            if self._access is old:
                self._access = self._granted()
            return self._access

    def _granted(self) -> _Access:
        since, azure = self._clock.monotonic(), self._azure
        sas = azure.grant_read(self.snapshot, _SECONDS)
        lists = BlobClient.from_blob_url(
            sas.url,
            transport=azure.transport,
            retry_policy=ClientRetries(final=TIMED_OUT),  # a smaller window is asked for instead
            user_agent=f"coriolis-azure/{__version__}",
            api_version=_VERSION,
        )
        return _Access(sas, since, lists, Ranges(azure.transport, sas, _VERSION, self._pace))


@dataclass(frozen=True)
class _Access:
    """What was granted at the moment `since`: the signed URL, the lists of pages, the content."""

    sas: Sas
    since: float
    lists: BlobClient
    content: Ranges


class _Answer:
    """Keeps the body of an answer, with its marker, as the library has parsed it: its `cls`."""

    body: Any = None

    def __call__(self, response: Any, body: Any, headers: Any) -> Any:
        del response, headers
        self.body = body
        return body
