"""Access to Blob storage: accounts, containers, page blobs and block blobs.

An account is reached at its own `primaryEndpoints`, so sovereign clouds, custom clouds and private endpoints need no
special case. Requests are authorized by the connection's identity, or by an account key if the settings ask for it.
Azure's errors are translated by `translation.translated`, as everywhere; the storage library does the retries.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from azure.core import MatchConditions
from azure.core.credentials import AzureNamedKeyCredential

from .. import __version__
from ..clock import Clock
from ..errors import Conflict, CoriolisAzureError, DeadlinePassed, InvalidInput, NotFound, OperationFailed
from ..events import Report, Wait, silent
from ..model import Json, canonical_location
from . import names
from .client import Azure
from .page_lists import WINDOW
from .pages import Pages
from .patience import whole
from .translation import translated

# The library takes a while to import, and most commands need no blobs.
if TYPE_CHECKING:
    from azure.storage.blob import BlobClient, BlobLeaseClient, BlobProperties, ContainerClient

PAGE = 512
MOST = 4 << 20  # the most bytes that one request may write
_TYPE = "Microsoft.Storage/storageAccounts"
_COPY_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Properties:
    """The properties of a blob."""

    kind: str
    size: int
    etag: str
    made: str
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Listed:
    """A blob in a listing. `snapshot` is set for a snapshot, `version` for a previous version; both are else ""."""

    name: str
    snapshot: str
    version: str
    metadata: Mapping[str, str]
    size: int = 0
    leased: bool = False


class Storage:
    """The storage accounts that the identity of `azure` can see. `group` is the resource group of the settings.

    `place` is the account and container of the settings, used for temporary blobs.
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
        """The account `name` in the resource group. Raises InvalidInput if it is not there, saying where it is."""
        path = (
            f"/subscriptions/{self._azure.subscription}/resourceGroups/{self._group}/providers/{_TYPE}/{name}"
        )
        try:
            return self._open(self._azure.storage_account(path))
        except NotFound as error:
            elsewhere = [
                account for account in self._accounts if names.name_of(account["id"]).lower() == name.lower()
            ]
            if elsewhere:
                group = names.group_of(elsewhere[0]["id"])
                raise InvalidInput(
                    f"the storage account {name} is in resource group {group}, not in {self._group}",
                    remedy=f"Choose a storage account in {self._group}, or set resource_group to {group}.",
                ) from error
            raise InvalidInput(
                f"there is no storage account {name} in resource group {self._group}",
                remedy="Correct the name, or create the account first: this program does not create accounts.",
            ) from error

    def interim(self) -> Container | None:
        """The container of the settings, which may not exist yet; None if the settings name none."""
        account, container = self._place
        return self.account(account).container(container) if account else None

    def at(self, url: str) -> Blob | None:
        """The blob at `url` in any account of the subscription; None if no account has that endpoint."""
        for document in self._accounts:
            endpoint = _endpoint(document)
            if endpoint and url.lower().startswith(endpoint.lower()):
                place = urlsplit(url[len(endpoint) :])
                container, _, name = unquote(place.path).partition("/")
                snapshot = parse_qs(place.query).get("snapshot", [""])[0]
                return self._open(document).container(container).blob(name, snapshot)
        return None

    @cached_property
    def _accounts(self) -> list[Json]:
        return self._azure.storage_accounts()

    def _open(self, document: Json) -> Account:
        id = str(document["id"]).lower()
        if id not in self._opened:
            self._opened[id] = Account(self._azure, document, by_key=self._by_key)
        return self._opened[id]


class Account:
    """A storage account. `document` is its ARM resource."""

    def __init__(self, azure: Azure, document: Json, *, by_key: bool) -> None:
        from azure.storage.blob import BlobServiceClient

        from .blob_retries import ClientRetries

        self.id, self.name = str(document["id"]), names.name_of(document["id"])
        self.location = canonical_location(document["location"])
        self._azure, self._by_key = azure, by_key
        self.has_versions = not azure.blob_version  # older services reject include=versions
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
            retry_policy=ClientRetries(),
            max_single_get_size=MOST,
            max_single_put_size=MOST,
            max_block_size=MOST,
            user_agent=f"coriolis-azure/{__version__}",
            api_version=azure.blob_version or None,
        )

    def container(self, name: str) -> Container:
        """The container `name`, which need not exist."""
        return Container(self, self._service.get_container_client(name))

    @cached_property
    def _key(self) -> str:
        return self._azure.storage_key(self.id)

    def readable_url(self, blob: Blob, clock: Clock) -> str:
        """A SAS URL with which Azure can read a blob for as long as a copy may take. It is a secret."""
        from azure.storage.blob import BlobSasPermissions, generate_blob_sas

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
    """A container in a storage account."""

    def __init__(self, account: Account, client: ContainerClient) -> None:
        self.account, self._client = account, client
        self.name: str = client.container_name

    @property
    def url(self) -> str:
        """The URL of the container."""
        return str(self._client.url)

    def exists(self) -> bool:
        """Whether the container exists."""
        with translated("read the container", self.url):
            return bool(self._client.exists())

    def ensure(self) -> None:
        """Create the container if it does not exist."""
        if self.exists():
            return
        try:
            with translated("create the container", self.url):
                self._client.create_container()
        except Conflict as error:
            if error.code != "ContainerAlreadyExists":
                raise

    def blob(self, name: str, snapshot: str = "", version: str = "") -> Blob:
        """The blob `name`, or one of its snapshots or versions. It need not exist."""
        client = self._client.get_blob_client(name, snapshot=snapshot or None, version_id=version or None)
        return Blob(self, client)

    def blobs(self, prefix: str = "", *, past: bool = False) -> Iterator[Listed]:
        """Yield the blobs whose names start with `prefix`; with `past`, their snapshots and versions too.

        Soft-deleted blobs are left out.
        """
        include = ["metadata"]
        if past:
            include += ["snapshots", "versions"] if self.account.has_versions else ["snapshots"]
        with translated("list the blobs of", self.url):
            for blob in whole(self._client.list_blobs(name_starts_with=prefix or None, include=include)):
                version = "" if blob.is_current_version else blob.version_id
                yield Listed(
                    blob.name,
                    blob.snapshot or "",
                    version or "",
                    blob.metadata or {},
                    blob.size or 0,
                    blob.lease.state == "leased",
                )


class Blob:
    """A blob, which need not exist. Once it is leased here, every write carries the lease id.

    A write then fails if the lease is lost or somebody else holds one.
    """

    def __init__(self, container: Container, client: BlobClient) -> None:
        self.account, self._client = container.account, client
        self.container, self.name = container.name, str(client.blob_name)
        self.snapshot = str(client.snapshot or "")
        self._lease: BlobLeaseClient | None = None

    @property
    def url(self) -> str:
        """The URL of the blob, without any secret."""
        return str(self._client.url)

    # Whole blobs

    def find(self) -> Properties | None:
        """The properties of the blob; None if it does not exist."""
        try:
            with translated("read", self.url):
                return _properties(self._client.get_blob_properties())
        except NotFound as error:
            if error.code == "ContainerNotFound":
                raise
            return None

    def text(self) -> bytes | None:
        """The whole content; None if the blob does not exist. For small blobs."""
        buffer = BytesIO()
        return buffer.getvalue() if self.read_into(buffer) else None

    def read_into(self, file: IO[bytes]) -> bool:
        """Write the whole content to `file`, a few MiB at a time; return False if the blob does not exist."""
        try:
            with translated("read", self.url):
                self._client.download_blob().readinto(file)
        except NotFound:
            return False
        return True

    def put(self, data: bytes | IO[bytes], *, new: bool = False, only: str = "") -> str:
        """Write the blob as a block blob and return its new ETag. A file is read a few MiB at a time.

        With `new`, only if the blob does not exist; with `only`, only if it still has this ETag. Otherwise raises
        AzureError with status 409 or 412.
        """
        with translated("write", self.url):
            result = self._client.upload_blob(data, overwrite=not new, **self._leased(), **_if_etag(only))
            return str(result["etag"])

    def delete(self, *, only: str = "") -> None:
        """Delete the blob, but not its snapshots or versions. Does nothing if it does not exist. `only`: see `put`."""
        try:
            with translated("delete", self.url):
                self._client.delete_blob(**self._leased(), **_if_etag(only))
        except NotFound:
            return

    def set_metadata(self, metadata: Mapping[str, str], *, only: str = "") -> str:
        """Replace the metadata and return the new ETag. `only`: see `put`."""
        with translated("write the metadata of", self.url):
            result = self._client.set_blob_metadata(dict(metadata), **self._leased(), **_if_etag(only))
            return str(result["etag"])

    def take_snapshot(self, metadata: Mapping[str, str]) -> Blob:
        """Take a snapshot with metadata of its own, and return it."""
        with translated("snapshot", self.url):
            stamp = str(self._client.create_snapshot(metadata=dict(metadata))["snapshot"])
        return self.at(stamp)

    def at(self, snapshot: str) -> Blob:
        """The snapshot of this blob with this timestamp; whether it exists is not checked."""
        return self.account.container(self.container).blob(self.name, snapshot)

    def copy_from(
        self, source: Blob, metadata: Mapping[str, str], clock: Clock, report: Report = silent
    ) -> None:
        """Copy `source` to this blob inside Azure, and wait until the copy is complete."""
        waiting = Wait(report, clock, f"Azure to copy {source.url}", _COPY_SECONDS)
        same_account = source.account.id.lower() == self.account.id.lower()
        url = source.url if same_account else source.account.readable_url(source, clock)
        with translated(f"copy {source.url} to", self.url):
            self._client.start_copy_from_url(url, metadata=dict(metadata))
            while (state := self._client.get_blob_properties().copy).status == "pending":
                if waiting.left < 0:
                    raise DeadlinePassed(f"copying {source.url} took more than a day")
                waiting.pause(5, _percent(state.progress))
        if state.status != "success":
            raise OperationFailed(f"copying {source.url} ended as {state.status}", resource=self.url)

    # Page blobs

    def create_pages(self, size: int, metadata: Mapping[str, str], *, new: bool = False) -> str:
        """Create a page blob of zeros and return its ETag.

        Replaces an existing blob; with `new`, raises Conflict instead.
        """
        condition = MatchConditions.IfMissing if new else None
        with translated("create", self.url):
            result = self._client.create_page_blob(
                size, metadata=dict(metadata), **self._leased(), match_condition=condition
            )
            return str(result["etag"])

    def resize(self, size: int) -> None:
        """Truncate the blob, or extend it with zeros."""
        with translated("resize", self.url):
            self._client.resize_blob(size, **self._leased())

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write whole pages, at most MOST bytes."""
        with translated("write", self.url):
            self._client.upload_page(bytes(data), offset, len(data), **self._leased())

    def clear(self, offset: int, length: int) -> None:
        """Clear any number of whole pages: they then read as zeros and are not billed."""
        with translated("clear", self.url):
            self._client.clear_page(offset, length, **self._leased())

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range."""
        with translated("read", self.url):
            stream = self._client.download_blob(offset, length, raw_response_hook=_hide_blob_type)
            return bytes(stream.readall())

    def fill(self, offset: int, data: memoryview) -> None:
        """Fill `data` with what the page blob holds from `offset` on."""
        data[:] = self.read(offset, len(data))

    def pages(self, size: int) -> Pages:
        """List the allocated pages among the first `size` bytes, in as many requests as it takes."""
        with translated("list the pages of", self.url):
            return allocated(self._client, size)

    def listed(
        self, offset: int, length: int, *, since: str, hook: Callable[[Any], None]
    ) -> tuple[Pages, Pages]:
        """The pages of a range that hold something, and those that were cleared.

        `since`: a snapshot of this blob; only what changed after it is listed. `hook` sees every answer.
        """
        written, cleared = Pages(), Pages()
        with translated("list the pages of", self.url):
            listed = self._client.list_page_ranges(
                offset=offset, length=length, previous_snapshot=since or None, raw_response_hook=hook
            )
            for each in whole(listed):
                (cleared if each.cleared else written).append(each.start or 0, (each.end or 0) + 1)
        return written, cleared

    # Leases

    def lease(self, seconds: int) -> None:
        """Acquire a lease: only its holder can change the blob. Raises Conflict if somebody else holds one."""
        lease = self._lease_client(str(uuid.uuid4()))
        with translated("lease", self.url):
            lease.acquire(lease_duration=seconds)
        self._lease = lease

    def _lease_client(self, lease_id: str) -> BlobLeaseClient:
        from azure.storage.blob import BlobLeaseClient

        return BlobLeaseClient(self._client, lease_id=lease_id)

    @property
    def lease_id(self) -> str:
        """The id of our lease; "" if we hold none."""
        return str(self._lease.id) if self._lease is not None else ""

    def inherit(self, lease_id: str) -> bool:
        """Take over the lease with this id from another process; return False if that is not possible.

        True proves that only that process can have changed the blob since it acquired the lease: Azure renews an
        expired lease only if the blob has been neither changed nor leased since. The lease then gets a new id, so
        that the other process can no longer change the blob.
        """
        lease = self._lease_client(lease_id)
        try:
            with translated("take over the lease of", self.url):
                lease.renew()
                lease.change(str(uuid.uuid4()))
        except Conflict:
            return False
        self._lease = lease
        return True

    def renew(self) -> None:
        """Renew the lease for its full duration. Raises AzureError if it is lost."""
        if self._lease is not None:
            with translated("renew the lease of", self.url):
                self._lease.renew()

    def release(self) -> None:
        """Release the lease. Does nothing if it is lost or cannot be released."""
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                with translated("release the lease of", self.url):
                    lease.release()
            except CoriolisAzureError:
                return  # it expires by itself

    def _leased(self) -> dict[str, Any]:
        return {"lease": self._lease} if self._lease is not None else {}


def allocated(client: BlobClient, size: int) -> Pages:
    """The allocated pages among the first `size` bytes of the page blob of `client`."""
    return Pages(
        (pages.start, pages.end + 1)
        for at in range(0, size, WINDOW)
        for pages in whole(client.list_page_ranges(offset=at, length=min(WINDOW, size - at)))
        if not pages.cleared and pages.start is not None and pages.end is not None
    )


def _if_etag(etag: str) -> dict[str, Any]:
    """The options that make a request conditional on this ETag; none for ""."""
    return {"etag": etag, "match_condition": MatchConditions.IfNotModified} if etag else {}


def _endpoint(document: Json) -> str:
    return str(((document.get("properties") or {}).get("primaryEndpoints") or {}).get("blob") or "")


def _properties(blob: BlobProperties) -> Properties:
    kind = getattr(blob.blob_type, "value", blob.blob_type)
    made = str(blob.creation_time or "")
    return Properties(str(kind), int(blob.size), str(blob.etag), made, blob.metadata or {})


def _hide_blob_type(response: Any) -> None:
    """Keep the library from listing all pages of a page blob for every range it reads."""
    if response.http_response.status_code == 206:
        response.http_response.headers["x-ms-blob-type"] = "BlockBlob"


def _percent(progress: str | None) -> float | None:
    """The progress of a copy in percent, from Azure's `<copied>/<total>`; None if Azure does not tell."""
    copied, _, total = (progress or "").partition("/")
    return 100 * int(copied) / int(total) if copied.isdecimal() and total.isdecimal() and int(total) else None
