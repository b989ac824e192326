"""The door to Blob storage: accounts, containers, and page and block blobs in them.

An account is reached at its own `primaryEndpoints`, so sovereign clouds, custom clouds and private endpoints need
nothing special. The identity of the connection is used, an account key only where the settings ask for it. Azure's
errors are translated by `translation.translated`, as everywhere; retries are the library's.
"""

from __future__ import annotations

import uuid
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from io import BytesIO
from typing import IO, Any
from urllib.parse import parse_qs, unquote, urlsplit

from azure.core import MatchConditions
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import (
    BlobClient,
    BlobLeaseClient,
    BlobProperties,
    BlobSasPermissions,
    BlobServiceClient,
    ContainerClient,
    ExponentialRetry,
    generate_blob_sas,
)

from .. import __version__
from ..clock import Clock
from ..errors import Conflict, CoriolisAzureError, DeadlinePassed, InvalidInput, NotFound, OperationFailed
from ..events import Report, Wait, silent
from ..model import Json, canonical_location
from . import names
from .client import Azure
from .patience import whole
from .translation import translated

PAGE = 512
MOST = 4 << 20  # bytes that one request may write
_WINDOW = 128 << 30  # bytes whose pages are listed at a time: of a large blob Azure may not find out in time
_TYPE = "Microsoft.Storage/storageAccounts"
_COPY_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Properties:
    """What the service says of a blob."""

    kind: str
    size: int
    etag: str
    made: str
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Listed:
    """A blob in a listing; `snapshot` names the moment where it is one, `version` the one of what it was before."""

    name: str
    snapshot: str
    version: str
    metadata: Mapping[str, str]


class Storage:
    """The storage accounts that the identity of `azure` sees. `group` is where the settings' own account is.

    `place` is the account and container of the settings: for what must be in Blob storage for a while.
    """

    def __init__(
        self,
        azure: Azure,
        group: str,
        clock: Clock,
        *,
        place: tuple[str, str] = ("", ""),
        by_key: bool = False,
    ) -> None:
        self.clock, self._place = clock, place
        self._azure, self._group, self._by_key = azure, group, by_key
        self._opened: dict[str, Account] = {}

    def account(self, name: str) -> Account:
        """The account `name` of the resource group. InvalidInput, which says where it is, when it is not there."""
        path = (
            f"/subscriptions/{self._azure.subscription}/resourceGroups/{self._group}/providers/{_TYPE}/{name}"
        )
        try:
            return self._open(self._azure.storage_account(path))
        except NotFound as error:
            elsewhere = [each for each in self._listed() if names.name_of(each["id"]).lower() == name.lower()]
            if elsewhere:
                group = names.group_of(elsewhere[0]["id"])
                raise InvalidInput(
                    f"the storage account {name} is in resource group {group}, not in {self._group}",
                    remedy=f"Choose a storage account in {self._group}, or set resource_group to {group}.",
                ) from error
            raise InvalidInput(
                f"there is no storage account {name} in resource group {self._group}",
                remedy="Correct the name, or make the account first: it is not made by this program.",
            ) from error

    def interim(self) -> Container | None:
        """The container of the settings, made or not; None where they name none."""
        account, container = self._place
        return self.account(account).container(container) if account else None

    def at(self, url: str) -> Blob | None:
        """The blob at `url`, whichever account of the subscription it is in; None where it is in none of them."""
        for document in self._listed():
            endpoint = _endpoint(document)
            if endpoint and url.lower().startswith(endpoint.lower()):
                place = urlsplit(url[len(endpoint) :])
                container, _, name = unquote(place.path).partition("/")
                snapshot = parse_qs(place.query).get("snapshot", [""])[0]
                return self._open(document).container(container).blob(name, snapshot)
        return None

    def _listed(self) -> list[Json]:
        return self._accounts

    @cached_property
    def _accounts(self) -> list[Json]:
        return self._azure.storage_accounts()

    def _open(self, document: Json) -> Account:
        id = str(document["id"]).lower()
        if id not in self._opened:
            self._opened[id] = Account(self._azure, document, by_key=self._by_key)
        return self._opened[id]


class Account:
    """A storage account: `document` is ARM's."""

    def __init__(self, azure: Azure, document: Json, *, by_key: bool) -> None:
        self.id, self.name = str(document["id"]), names.name_of(document["id"])
        self.location = canonical_location(document["location"])
        self._azure, self._by_key = azure, by_key
        self.has_versions = not azure.blob_version  # older services do not know the word
        endpoint = _endpoint(document)
        if not endpoint:
            raise InvalidInput(
                f"the storage account {self.name} has no Blob endpoint",
                remedy="Choose an account of kind StorageV2.",
            )
        self._service = BlobServiceClient(
            endpoint,
            credential=AzureNamedKeyCredential(self.name, self._key) if by_key else azure.credential,
            transport=azure.transport,
            # The library's own first pause is 15 seconds, which a transfer by many threads cannot afford.
            retry_policy=ExponentialRetry(
                initial_backoff=1, increment_base=2, retry_total=5, random_jitter_range=1
            ),
            max_single_get_size=MOST,
            max_single_put_size=MOST,
            max_block_size=MOST,
            user_agent=f"coriolis-azure/{__version__}",
            api_version=azure.blob_version or None,
        )

    def container(self, name: str) -> Container:
        """The container `name`, there or not."""
        return Container(self, self._service.get_container_client(name))

    @cached_property
    def _key(self) -> str:
        return self._azure.storage_key(self.id)

    def readable_url(self, blob: Blob, clock: Clock) -> str:
        """The URL of a blob with leave to read it as long as a copy may take: for Azure itself. A secret."""
        start, end = (
            self._azure.now(clock) - timedelta(minutes=15),
            self._azure.now(clock) + timedelta(seconds=_COPY_SECONDS, hours=1),
        )
        with translated("sign a URL for", blob.url):
            key = None if self._by_key else self._service.get_user_delegation_key(start, end)
            sas = generate_blob_sas(
                self.name,
                blob.container,
                blob.name,
                snapshot=blob.snapshot or None,
                account_key=self._key if self._by_key else None,
                user_delegation_key=key,
                permission=BlobSasPermissions(read=True),
                expiry=end,
            )
        return f"{blob.url}{'&' if blob.snapshot else '?'}{sas}"


class Container:
    """A container of an account."""

    def __init__(self, account: Account, client: ContainerClient) -> None:
        self.account, self._client = account, client
        self.name: str = client.container_name

    @property
    def url(self) -> str:
        """Where it is."""
        return str(self._client.url)

    def exists(self) -> bool:
        """Whether it is there."""
        with translated("read the container", self.url):
            return bool(self._client.exists())

    def ensure(self) -> None:
        """Make it when it is missing."""
        if self.exists():
            return
        try:
            with translated("create the container", self.url):
                self._client.create_container()
        except Conflict as error:
            if error.code != "ContainerAlreadyExists":
                raise

    def blob(self, name: str, snapshot: str = "", version: str = "") -> Blob:
        """The blob `name`, there or not, or its snapshot of that moment, or that earlier version of it."""
        client = self._client.get_blob_client(name, snapshot=snapshot or None, version_id=version or None)
        return Blob(self, client)

    def blobs(self, prefix: str = "", *, past: bool = False) -> Iterator[Listed]:
        """The blobs whose names begin with `prefix`; with `past` their snapshots and what they were before, too.

        What is soft-deleted is not among them.
        """
        include = ["metadata"]
        if past:
            include += ["snapshots", "versions"] if self.account.has_versions else ["snapshots"]
        with translated("list the blobs of", self.url):
            for found in whole(self._client.list_blobs(name_starts_with=prefix or None, include=include)):
                version = "" if found.is_current_version else found.version_id
                yield Listed(found.name, found.snapshot or "", version or "", found.metadata or {})


class Blob:
    """One blob, there or not. Once leased, every change carries the lease: a stranger's lease or none stops it."""

    def __init__(self, container: Container, client: BlobClient) -> None:
        self.account, self._client = container.account, client
        self.container, self.name = container.name, str(client.blob_name)
        self.snapshot = str(client.snapshot or "")
        self._lease: BlobLeaseClient | None = None

    @property
    def url(self) -> str:
        """Where it is, without secrets."""
        return str(self._client.url)

    # As a whole

    def find(self) -> Properties | None:
        """What is said of it; None where it is not there."""
        try:
            with translated("read", self.url):
                return _properties(self._client.get_blob_properties())
        except NotFound as error:
            if error.code == "ContainerNotFound":
                raise
            return None

    def text(self) -> bytes | None:
        """The whole content; None where it is not there. For small blobs."""
        room = BytesIO()
        return room.getvalue() if self.read_into(room) else None

    def read_into(self, file: IO[bytes]) -> bool:
        """Write the whole content to `file`, some MiB at a time; False where it is not there."""
        try:
            with translated("read", self.url):
                self._client.download_blob().readinto(file)
        except NotFound:
            return False
        return True

    def put(self, data: bytes | IO[bytes], *, new: bool = False, only: str = "") -> str:
        """Replace it as a block blob; the ETag that it has then. Of a file some MiB at a time are read.

        With `new` only where there is none, with `only` only while it has this ETag; else AzureError with the
        status 409 or 412.
        """
        with translated("write", self.url):
            done = self._client.upload_blob(data, overwrite=not new, **self._leased(), **_while(only))
            return str(done["etag"])

    def delete(self) -> None:
        """Delete it; one that is gone is no error. Of its snapshots and earlier versions none is deleted along."""
        try:
            with translated("delete", self.url):
                self._client.delete_blob(**self._leased())
        except NotFound:
            return

    def set_metadata(self, metadata: Mapping[str, str], *, only: str = "") -> str:
        """Replace the metadata; the ETag that it has then. `only`: see `put`."""
        with translated("write the metadata of", self.url):
            done = self._client.set_blob_metadata(dict(metadata), **self._leased(), **_while(only))
            return str(done["etag"])

    def take_snapshot(self, metadata: Mapping[str, str]) -> Blob:
        """A snapshot of it as it is now, with metadata of its own."""
        with translated("snapshot", self.url):
            stamp = str(self._client.create_snapshot(metadata=dict(metadata))["snapshot"])
        return self.account.container(self.container).blob(self.name, stamp)

    def copy_from(
        self, source: Blob, metadata: Mapping[str, str], clock: Clock, report: Report = silent
    ) -> None:
        """Make it a copy of `source`; Azure moves the bytes. Waits until all are there."""
        waiting = Wait(report, clock, f"Azure to copy {source.url}", _COPY_SECONDS)
        own = source.account.id.lower() == self.account.id.lower()
        url = source.url if own else source.account.readable_url(source, clock)
        with translated(f"copy {source.url} to", self.url):
            self._client.start_copy_from_url(url, metadata=dict(metadata))
            while (state := self._client.get_blob_properties().copy).status == "pending":
                if waiting.left < 0:
                    raise DeadlinePassed(f"the copy of {source.url} took more than a day")
                waiting.pause(5, _percent(state.progress))
        if state.status != "success":
            raise OperationFailed(f"the copy of {source.url} ended as {state.status}", resource=self.url)

    # As pages

    def create_pages(self, size: int, metadata: Mapping[str, str], *, new: bool = False) -> str:
        """Make it a page blob of zeros, in place of what was there; its ETag. With `new`, Conflict when it is there."""
        condition = MatchConditions.IfMissing if new else None
        with translated("create", self.url):
            done = self._client.create_page_blob(
                size, metadata=dict(metadata), **self._leased(), match_condition=condition
            )
            return str(done["etag"])

    def resize(self, size: int) -> None:
        """Cut it, or make it longer with zeros."""
        with translated("resize", self.url):
            self._client.resize_blob(size, **self._leased())

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write whole pages, MOST bytes at most."""
        with translated("write", self.url):
            self._client.upload_page(bytes(data), offset, len(data), **self._leased())

    def clear(self, offset: int, length: int) -> None:
        """Clear whole pages, any number of them: they hold zeros and cost nothing."""
        with translated("clear", self.url):
            self._client.clear_page(offset, length, **self._leased())

    def read(self, offset: int, length: int) -> bytes:
        """These bytes."""
        with translated("read", self.url):
            stream = self._client.download_blob(offset, length, raw_response_hook=_not_of_pages)
            return bytes(stream.readall())

    def pages(self, size: int) -> Pages:
        """The pages that hold something among the first `size` bytes: listed once, however many answers it takes."""
        starts, ends = array("Q"), array("Q")
        with translated("list the pages of", self.url):
            for at in range(0, size, _WINDOW):
                length = min(_WINDOW, size - at)
                for found in whole(self._client.list_page_ranges(offset=at, length=length)):
                    if not found.cleared and found.start is not None and found.end is not None:
                        starts.append(found.start)
                        ends.append(found.end + 1)
        return Pages(starts, ends)

    # Leases

    def lease(self, seconds: int) -> None:
        """Take it for ourselves: who does not know the lease cannot change it. Conflict when somebody has it."""
        lease = BlobLeaseClient(self._client, lease_id=str(uuid.uuid4()))
        with translated("lease", self.url):
            lease.acquire(lease_duration=seconds)
        self._lease = lease

    @property
    def lease_id(self) -> str:
        """The id of our lease; "" without one."""
        return str(self._lease.id) if self._lease is not None else ""

    def inherit(self, lease_id: str) -> bool:
        """Go on with a lease of this id, which another process has had; False where that cannot be.

        True proves that nobody but that process can have changed the blob since it had the lease: Azure renews one
        that has run out only while nobody has changed or leased the blob. The lease has another id then, so that
        process can change nothing any more.
        """
        lease = BlobLeaseClient(self._client, lease_id=lease_id)
        try:
            with translated("take over the lease of", self.url):
                lease.renew()
                lease.change(str(uuid.uuid4()))
        except Conflict:
            return False
        self._lease = lease
        return True

    def renew(self) -> None:
        """Keep the lease for as long again; AzureError where it is lost."""
        if self._lease is not None:
            with translated("renew the lease of", self.url):
                self._lease.renew()

    def release(self) -> None:
        """Give the lease up; one that is lost is no error."""
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                with translated("release the lease of", self.url):
                    lease.release()
            except CoriolisAzureError:
                return  # it ends by itself

    def _leased(self) -> dict[str, Any]:
        return {"lease": self._lease} if self._lease is not None else {}


@dataclass(frozen=True)
class Pages:
    """Where a page blob holds something: ranges in order, ends excluded."""

    starts: array[int]
    ends: array[int]

    def within(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that hold something: offset and length of each."""
        at = max(0, bisect_right(self.starts, offset) - 1)
        while at < len(self.starts) and self.starts[at] < offset + length:
            start, end = max(self.starts[at], offset), min(self.ends[at], offset + length)
            if start < end:
                yield start, end - start
            at += 1

    def is_empty(self, offset: int, length: int) -> bool:
        """Whether nothing of a range holds anything: it reads as zeros."""
        return next(self.within(offset, length), None) is None


def _while(etag: str) -> dict[str, Any]:
    """The options by which a request is refused where the blob has another ETag; none for ""."""
    return {"etag": etag, "match_condition": MatchConditions.IfNotModified} if etag else {}


def _endpoint(document: Json) -> str:
    return str(((document.get("properties") or {}).get("primaryEndpoints") or {}).get("blob") or "")


def _properties(found: BlobProperties) -> Properties:
    kind = getattr(found.blob_type, "value", found.blob_type)
    made = str(found.creation_time or "")
    return Properties(str(kind), int(found.size), str(found.etag), made, found.metadata or {})


def _not_of_pages(response: Any) -> None:
    """Keep the library from listing all pages of a page blob each time that a part of it is read."""
    if response.http_response.status_code == 206:
        response.http_response.headers["x-ms-blob-type"] = "BlockBlob"


def _percent(progress: str | None) -> float | None:
    """How much of a copy is done, by Azure's `<copied>/<all>`; None where it does not say."""
    copied, _, all_ = (progress or "").partition("/")
    return 100 * int(copied) / int(all_) if copied.isdecimal() and all_.isdecimal() and int(all_) else None
