"""The blob endpoint of the sandbox's storage accounts, path-style: /account/container/blob.

It imitates a part of Azure's Blob service: containers; page, block and (by name only) append blobs; snapshots, leases,
paged page ranges, conditions, server-side copies, soft delete, versions, immutable containers. Errors have Azure's
codes in XML. Everything else is refused, so that nothing can depend on a feature that is missing.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timezone
from urllib.parse import urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from coriolis_azure.sandbox.identity.tokens import Tokens
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.storage.access import (
    CONTAINER_DELETE,
    CONTAINER_READ,
    CONTAINER_WRITE,
    DELEGATE,
    DELETE,
    DELETE_VERSION,
    LIST,
    READ,
    WRITE,
    BlobError,
    Need,
    check,
)
from coriolis_azure.sandbox.storage.accounts import endpoint, named
from coriolis_azure.sandbox.storage.store import PAGE, Account, Blob, BlobStore, Container, Lease, new_id
from coriolis_azure.sandbox.wire import Request, Response
from coriolis_azure.sandbox.world import World

_CONTAINER_NAME = re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_PAGE_MOST = 4 << 20
_LONGEST = 8 << 40
_LISTED = 5000


@dataclass
class _Call:
    """An authorized request."""

    world: World
    request: Request
    resource: Resource
    account: Account
    container: str
    blob: str

    @property
    def store(self) -> BlobStore:
        return self.world.blobs

    def header(self, name: str) -> str:
        return self.request.header(name) or ""

    def query(self, name: str) -> str:
        return self.request.query.get(name, "")

    def metadata(self) -> dict[str, str] | None:
        """The metadata in the headers; None if there is none."""
        metadata = {
            name[len("x-ms-meta-") :].lower(): value
            for name, value in self.request.headers.items()
            if name.lower().startswith("x-ms-meta-")
        }
        for name in metadata:
            if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
                raise _invalid_metadata()
        if sum(len(name) + len(value) for name, value in metadata.items()) > 8192:
            raise BlobError(
                400,
                "MetadataTooLarge",
                "The size of the specified metadata exceeds the maximum size permitted.",
            )
        return metadata or None

    def existing_container(self) -> Container:
        container = self.account.containers.get(self.container)
        if container is None:
            raise BlobError(404, "ContainerNotFound", "The specified container does not exist.")
        return container

    def existing_blob(self) -> Blob:
        """The blob, snapshot or earlier version that the path names."""
        blob = self.existing_container().find(self.blob, self.query("snapshot"), self.query("versionid"))
        if blob is None:
            raise BlobError(404, "BlobNotFound", "The specified blob does not exist.")
        return blob


Handler = Callable[[_Call], Response]


def answer(world: World, tokens: Tokens, request: Request) -> Response | None:
    """Answer a request to the blob endpoint; None if the path does not begin with the name of an account."""
    first, _, rest = request.path.lstrip("/").partition("/")
    resource = named(world, first)
    if resource is None:
        return None
    container, _, blob = rest.partition("/")
    try:
        need, handler = _route(request, container, blob)
        with world.blobs.lock:
            check(resource, request, need, tokens, world.permissions)
            account = world.blobs.accounts.setdefault(resource.name, Account())
            response = handler(_Call(world, request, resource, account, container, blob))
            if request.method != "GET" and handler is not _put_page:
                world.blobs.save()
    except BlobError as error:
        response = error.response()
    if request.method == "HEAD" and response.status >= 400:
        response = Response(response.status, response.headers)
    response.headers.setdefault("x-ms-version", request.header("x-ms-version") or "2021-12-02")
    return response


def _route(request: Request, container: str, blob: str) -> tuple[Need, Handler]:
    method, comp, kind = request.method, request.query.get("comp", ""), request.query.get("restype", "")
    if not container:
        key = (method, kind, comp)
        if key == ("POST", "service", "userdelegationkey"):
            return DELEGATE, _delegation_key
        if key == ("GET", "", "list"):
            return CONTAINER_READ, _list_containers
        raise _not_imitated(request)
    if not blob:
        route = _CONTAINER_ROUTES.get((method, comp)) if kind == "container" else None
    else:
        route = _BLOB_ROUTES.get((method, comp))
        if route is not None and method == "DELETE" and "versionid" in request.query:
            return DELETE_VERSION, route[1]
    if route is None:
        raise _not_imitated(request)
    return route


def _not_imitated(request: Request) -> BlobError:
    return BlobError(
        400,
        "UnsupportedHttpVerb",
        f"The sandbox does not imitate {request.method} {urlsplit(request.url).query}",
    )


# ---------------------------------------------------------------- service and containers


def _delegation_key(call: _Call) -> Response:
    """Issue a user delegation key, with which an identity signs a SAS."""
    requested = ElementTree.fromstring(call.request.body)  # noqa: S314  (from the SDK on this machine)
    start, end = (requested.findtext(name) or "" for name in ("Start", "Expiry"))
    identity = call.world.state.identity
    parts = {
        "SignedOid": identity.client_id,
        "SignedTid": identity.tenant,
        "SignedStart": start or datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "SignedExpiry": end,
        "SignedService": "b",
        "SignedVersion": call.header("x-ms-version"),
        "Value": call.resource.hidden["delegation"],
    }
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in parts.items())
    return _xml(f"<UserDelegationKey>{inner}</UserDelegationKey>")


def _list_containers(call: _Call) -> Response:
    rows = "".join(
        f"<Container><Name>{container.name}</Name><Properties><Last-Modified>{container.modified}</Last-Modified>"
        f"<Etag>{container.etag.strip(chr(34))}</Etag></Properties></Container>"
        for container in sorted(call.account.containers.values(), key=lambda container: container.name)
    )
    return _xml(
        f'<EnumerationResults ServiceEndpoint="{escape(endpoint(call.world, call.resource))}"><Containers>{rows}'
        "</Containers><NextMarker/></EnumerationResults>"
    )


def _create_container(call: _Call) -> Response:
    name = call.container
    if not 3 <= len(name) <= 63:
        raise BlobError(
            400, "OutOfRangeInput", "The specified resource name length is not within the permissible limits."
        )
    if not _CONTAINER_NAME.fullmatch(name):
        raise BlobError(400, "InvalidResourceName", "The specifed resource name contains invalid characters.")
    if name in call.account.containers:
        raise BlobError(409, "ContainerAlreadyExists", "The specified container already exists.")
    container = Container(name, "", "", call.metadata() or {})
    call.store.changed(container)
    call.account.containers[name] = container
    return Response(201, _stamps(container))


def _get_container(call: _Call) -> Response:
    container = call.existing_container()
    policy = {
        "x-ms-has-immutability-policy": str(container.immutable).lower(),
        "x-ms-has-legal-hold": "false",
    }
    return Response(200, {**_stamps(container), **_metadata(container.metadata), **policy})


def _delete_container(call: _Call) -> Response:
    container = call.existing_container()
    if container.immutable and container.blobs:
        raise BlobError(
            409,
            "ContainerImmutableStorageDeleteNotAllowed",
            "This operation is not permitted as the container has an immutability policy and blobs.",
        )
    del call.account.containers[container.name]
    for blob in container.all():
        call.store.release(blob)
    return Response(202)


def _list_blobs(call: _Call) -> Response:
    container, prefix = call.existing_container(), call.query("prefix")
    included = set(call.query("include").split(","))
    most = min(_LISTED, int(call.query("maxresults") or _LISTED))
    start = int(base64.b64decode(call.query("marker")).decode() or 0) if call.query("marker") else 0
    blobs = [blob for blob in container.listed(included) if blob.name.startswith(prefix)]
    rows = "".join(_row(container, blob, included) for blob in blobs[start : start + most])
    following = base64.b64encode(str(start + most).encode()).decode() if start + most < len(blobs) else ""
    return _xml(
        f'<EnumerationResults ServiceEndpoint="{escape(endpoint(call.world, call.resource))}" '
        f'ContainerName="{container.name}"><Prefix>{escape(prefix)}</Prefix><Blobs>{rows}</Blobs>'
        f"<NextMarker>{following}</NextMarker></EnumerationResults>"
    )


def _row(container: Container, blob: Blob, included: Collection[str]) -> str:
    parts = f"<Name>{escape(blob.name)}</Name>"
    parts += "<Deleted>true</Deleted>" if blob in container.deleted else ""
    parts += f"<Snapshot>{blob.snapshot}</Snapshot>" if blob.snapshot else ""
    if blob.version and "versions" in included:
        parts += f"<VersionId>{blob.version}</VersionId>"
        parts += "<IsCurrentVersion>true</IsCurrentVersion>" if blob is container.blobs.get(blob.name) else ""
    lease = blob.leased()
    properties = {
        "Creation-Time": blob.made,
        "Last-Modified": blob.modified,
        "Etag": blob.etag.strip('"'),
        "Content-Length": str(blob.size),
        "Content-Type": blob.content_type,
        "BlobType": blob.kind,
        "LeaseStatus": "locked" if lease else "unlocked",
        "LeaseState": "leased" if lease else "available",
    }
    inner = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in properties.items())
    parts += f"<Properties>{inner}</Properties>"
    if "metadata" in included:
        metadata = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in blob.metadata.items())
        parts += f"<Metadata>{metadata}</Metadata>"
    return f"<Blob>{parts}</Blob>"


# ---------------------------------------------------------------- reading


def _get(call: _Call) -> Response:
    blob = call.existing_blob()
    _conditions(call, blob)
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", call.header("x-ms-range") or call.header("Range"))
    head = _properties(blob)
    if span is None:
        return Response(200, head, call.store.read(blob, 0, blob.size))
    start, last = int(span[1]), min(int(span[2] or blob.size - 1), blob.size - 1)
    if start >= blob.size:
        raise BlobError(
            416,
            "InvalidRange",
            "The range specified is invalid for the current size of the resource.",
            {"Content-Range": f"bytes */{blob.size}"},
        )
    head["Content-Range"] = f"bytes {start}-{last}/{blob.size}"
    return Response(206, head, call.store.read(blob, start, last - start + 1))


def _head(call: _Call) -> Response:
    blob = call.existing_blob()
    _conditions(call, blob)
    return Response(200, {**_properties(blob), "Content-Length": str(blob.size)})


def _page_list(call: _Call) -> Response:
    blob = _page_blob(call)
    _conditions(call, blob)
    if call.header("x-ms-previous-snapshot-url"):
        raise BlobError(
            400,
            "UnsupportedHeaderForNonManagedDisksAccount",
            "One of the HTTP headers specified in the request is only supported for managed disks.",
            details={"HeaderName": "x-ms-previous-snapshot-url"},
        )
    older = _previous(call, blob)
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", call.header("x-ms-range") or call.header("Range"))
    first, last = (int(span[1]), int(span[2] or blob.size - 1)) if span else (0, blob.size - 1)
    end = min(last + 1, blob.size)
    ranges = list(blob.pages.allocated(first, end)) if older is None else blob.changed(older, first, end)
    most = min(call.world.page_ranges, int(call.query("maxresults") or 10000))
    start = int(call.query("marker") or 0)
    rows = "".join(
        f"<{kind}><Start>{low}</Start><End>{high - 1}</End></{kind}>"
        for low, high, cleared in ranges[start : start + most]
        for kind in ["ClearRange" if cleared else "PageRange"]
    )
    following = str(start + most) if start + most < len(ranges) else ""
    headers = {**_stamps(blob), "x-ms-blob-content-length": str(blob.size)}
    return _xml(f"<PageList>{rows}<NextMarker>{following}</NextMarker></PageList>", headers)


def _previous(call: _Call, blob: Blob) -> Blob | None:
    """The older snapshot to compare with; None if everything allocated is listed."""
    moment = call.query("prevsnapshot")
    if not moment:
        return None
    if blob.snapshot and moment >= blob.snapshot:
        raise BlobError(
            400,
            "PreviousSnapshotCannotBeNewer",
            "The prevsnapshot query parameter value cannot be newer than snapshot query parameter value.",
        )
    older = call.existing_container().find(blob.name, moment)
    if older is None:
        raise BlobError(409, "PreviousSnapshotNotFound", "The previous snapshot is not found.")
    if older.life != blob.life:
        raise BlobError(
            409, "BlobOverwritten", "The blob has been recreated since the previous snapshot was taken."
        )
    return older


# ---------------------------------------------------------------- writing


def _put(call: _Call) -> Response:
    """Put Blob, or Copy Blob."""
    container = call.existing_container()
    _checked_name(call.blob)
    old = container.blobs.get(call.blob)
    _writable(call, container, old)
    if call.header("x-ms-copy-source"):
        return _copy(call, container)
    kind = call.header("x-ms-blob-type")
    if kind not in {"PageBlob", "BlockBlob"}:
        raise BlobError(400, "InvalidHeaderValue", f"The sandbox does not imitate blobs of type '{kind}'.")
    if call.resource.document["kind"] == "BlockBlobStorage" and kind == "PageBlob":
        raise BlobError(400, "BlobTypeNotSupported", "Blob type is not supported for this account.")
    size = len(call.request.body)
    if kind == "PageBlob":
        size = int(call.header("x-ms-blob-content-length") or 0)
        _aligned(size, "x-ms-blob-content-length")
    call.store.keep_version(call.account, container, call.blob)
    blob = call.store.new_blob(container, call.blob, kind, size)
    call.store.written(call.account, blob)
    if kind == "BlockBlob":
        call.store.contents.path(blob.file).write_bytes(call.request.body)
    blob.metadata = call.metadata() or {}
    blob.content_type = call.header("x-ms-blob-content-type") or blob.content_type
    return Response(201, {**_stamps(blob), "x-ms-request-server-encrypted": "true"})


def _copy(call: _Call, container: Container) -> Response:
    """Copy Blob: from this account by URL, from another account with a SAS."""
    source = _copy_source(call)
    call.store.keep_version(call.account, container, call.blob)
    blob = call.store.new_blob(container, call.blob, source.kind, 0)
    call.store.written(call.account, blob)
    call.store.release(blob)
    call.store.contents.remove(blob.file)
    blob.file, blob.size = source.file, source.size
    blob.pages = source.pages.copy()
    metadata = call.metadata()
    blob.metadata = dict(source.metadata) if metadata is None else metadata
    blob.copied = {
        "x-ms-copy-id": new_id(),
        "x-ms-copy-status": "success",
        "x-ms-copy-source": call.header("x-ms-copy-source").partition("?")[0],
        "x-ms-copy-progress": f"{source.size}/{source.size}",
    }
    pending = {**blob.copied, "x-ms-copy-status": "pending"}
    return Response(202, {**_stamps(blob), **{n: pending[n] for n in ("x-ms-copy-id", "x-ms-copy-status")}})


def _copy_source(call: _Call) -> Blob:
    url = call.header("x-ms-copy-source")
    source = Request("GET", url)
    first, container, name = [*source.path.strip("/").split("/", 2), "", ""][:3]
    resource = named(call.world, first)
    failed = BlobError(404, "CannotVerifyCopySource", "The specified resource does not exist.")
    if resource is None:
        raise failed
    if resource is not call.resource or "sig" in source.query:
        if "sig" not in source.query:
            raise BlobError(401, "CannotVerifyCopySource", "Server failed to authenticate the request.")
        try:
            check(resource, source, READ, Tokens(call.world.state.identity), [])
        except BlobError as error:
            raise BlobError(403, "CannotVerifyCopySource", error.message) from None
    account = call.store.accounts.setdefault(resource.name, Account())
    source_container = account.containers.get(container)
    blob = source_container.find(name, source.query.get("snapshot", "")) if source_container else None
    if blob is None:
        raise failed
    return blob


def _put_page(call: _Call) -> Response:
    """Put Page: update or clear pages."""
    container, blob = call.existing_container(), _page_blob(call)
    _writable(call, container, blob)
    span = re.fullmatch(r"bytes=(\d+)-(\d+)", call.header("x-ms-range") or call.header("Range"))
    start, end = (int(span[1]), int(span[2]) + 1) if span else (0, 1)
    if start % PAGE or end % PAGE or not start < end <= blob.size:
        raise BlobError(416, "InvalidPageRange", "The page range specified is invalid.")
    if call.header("x-ms-page-write").lower() == "clear":
        call.store.clear(blob, start, end)
    elif len(call.request.body) != end - start or end - start > _PAGE_MOST:
        raise BlobError(
            413 if end - start > _PAGE_MOST else 400,
            "RequestBodyTooLarge" if end - start > _PAGE_MOST else "InvalidHeaderValue",
            "The request body and the page range do not fit.",
        )
    else:
        _checked_digest(call)
        call.store.write(blob, start, call.request.body)
    call.store.changed(blob)
    return Response(201, {**_stamps(blob), "x-ms-blob-sequence-number": "0"})


def _checked_digest(call: _Call) -> None:
    expected = call.header("Content-MD5")
    actual = base64.b64encode(hashlib.md5(call.request.body).digest()).decode()  # noqa: S324  (HTTP's own)
    if expected and expected != actual:
        raise BlobError(
            400,
            "Md5Mismatch",
            "The MD5 value specified in the request did not match with the MD5 value calculated.",
        )


def _put_block(call: _Call) -> Response:
    container = call.existing_container()
    _checked_name(call.blob)
    old = container.blobs.get(call.blob)
    _writable(call, container, old)
    if old is None:
        old = call.store.new_blob(container, call.blob, "BlockBlob", 0)
    content = call.store.contents.zeros(0)
    call.store.contents.path(content).write_bytes(call.request.body)
    old.blocks[call.query("blockid")] = content
    return Response(201)


def _put_block_list(call: _Call) -> Response:
    container = call.existing_container()
    blob = call.existing_blob()
    _writable(call, container, blob)
    listed = [
        element.text or ""
        for element in ElementTree.fromstring(call.request.body)  # noqa: S314
    ]
    if any(block not in blob.blocks for block in listed):
        raise BlobError(400, "InvalidBlockList", "The specified block list is invalid.")
    whole = b"".join(call.store.contents.path(blob.blocks[block]).read_bytes() for block in listed)
    if blob.size:  # before its first block list, the blob does not exist yet
        call.store.keep_version(call.account, container, blob.name)
    call.store.written(call.account, blob)
    path = call.store.own_file(blob)
    path.write_bytes(whole)
    blocks, blob.blocks = blob.blocks, {}
    for content in blocks.values():
        call.store.contents.remove(content)
    blob.size, blob.metadata = len(whole), call.metadata() or {}
    blob.content_type = call.header("x-ms-blob-content-type") or blob.content_type
    call.store.changed(blob)
    return Response(201, _stamps(blob))


def _resize(call: _Call) -> Response:
    """Set Blob Properties, of which only the size of a page blob is imitated."""
    container, blob = call.existing_container(), _page_blob(call)
    _writable(call, container, blob)
    size = int(call.header("x-ms-blob-content-length") or blob.size)
    _aligned(size, "x-ms-blob-content-length")
    call.store.resize(blob, size)
    call.store.changed(blob)
    return Response(200, {**_stamps(blob), "x-ms-blob-sequence-number": "0"})


def _set_metadata(call: _Call) -> Response:
    container, blob = call.existing_container(), call.existing_blob()
    _writable(call, container, blob)
    call.store.keep_version(call.account, container, blob.name)
    call.store.written(call.account, blob)
    blob.metadata = call.metadata() or {}
    call.store.changed(blob)
    return Response(200, _stamps(blob))


def _take_snapshot(call: _Call) -> Response:
    container, blob = call.existing_container(), call.existing_blob()
    _conditions(call, blob)
    snapshot = call.store.snapshot(container, blob, call.metadata())
    call.store.keep_version(call.account, container, blob.name)
    call.store.written(call.account, blob)
    return Response(201, {**_stamps(snapshot), "x-ms-snapshot": snapshot.snapshot})


def _delete(call: _Call) -> Response:
    container, blob = call.existing_container(), call.existing_blob()
    current = container.blobs.get(blob.name) is blob
    snapshots = [snapshot for snapshot in container.snapshots if snapshot.name == blob.name]
    choice = call.header("x-ms-delete-snapshots").lower()
    _writable(call, container, blob if current and choice != "only" else None)
    if not current:
        snapshots = []
    elif snapshots and not choice:
        raise BlobError(
            409, "SnapshotsPresent", "This operation is not permitted because the blob has snapshots."
        )
    for snapshot in snapshots:
        call.store.remove(call.account, container, snapshot)
    if choice != "only":
        call.store.remove(call.account, container, blob)
    return Response(202, {"x-ms-delete-type-permanent": str(not call.account.soft_delete).lower()})


# ---------------------------------------------------------------- leases


def _lease(call: _Call) -> Response:
    blob, action = call.existing_blob(), call.header("x-ms-lease-action").lower()
    _conditions(call, blob)
    lease_id, active = call.header("x-ms-lease-id"), blob.leased()
    if action == "acquire":
        proposed_id = call.header("x-ms-proposed-lease-id") or new_id()
        if active and active.id != proposed_id:
            raise BlobError(409, "LeaseAlreadyPresent", "There is already a lease present.")
        seconds = int(call.header("x-ms-lease-duration"))
        if seconds != -1 and not 15 <= seconds <= 60:
            raise BlobError(400, "InvalidHeaderValue", "The value for one of the HTTP headers is not valid.")
        blob.lease = Lease(proposed_id, seconds, _until(seconds))
        return Response(201, {**_stamps(blob), "x-ms-lease-id": proposed_id})
    if action == "break":
        if active is None:
            raise BlobError(
                409, "LeaseNotPresentWithLeaseOperation", "There is currently no lease on the blob."
            )
        blob.lease = None
        return Response(202, {**_stamps(blob), "x-ms-lease-time": "0"})
    if blob.lease is None:
        raise BlobError(409, "LeaseNotPresentWithLeaseOperation", "There is currently no lease on the blob.")
    if blob.lease.id != lease_id:
        raise BlobError(
            409,
            "LeaseIdMismatchWithLeaseOperation",
            "The lease ID specified did not match the lease ID for the blob.",
        )
    if action == "change":
        lease_id = call.header("x-ms-proposed-lease-id")
        if active is None:
            raise BlobError(
                409, "LeaseNotPresentWithLeaseOperation", "There is currently no lease on the blob."
            )
        blob.lease = Lease(lease_id, blob.lease.seconds, blob.lease.until)
    elif action == "renew":
        blob.lease = Lease(lease_id, blob.lease.seconds, _until(blob.lease.seconds))
    elif action == "release":
        blob.lease = None
    else:
        raise _not_imitated(call.request)
    return Response(200, {**_stamps(blob), "x-ms-lease-id": lease_id})


def _until(seconds: int) -> float | None:
    return None if seconds == -1 else time.monotonic() + seconds


# ---------------------------------------------------------------- rules


def _page_blob(call: _Call) -> Blob:
    blob = call.existing_blob()
    if blob.kind != "PageBlob":
        raise BlobError(409, "InvalidBlobType", "The blob type is invalid for this operation.")
    return blob


def _checked_name(name: str) -> None:
    if not 1 <= len(name) <= 1024 or name.endswith(("/", ".")):
        raise BlobError(400, "InvalidUri", "The requested URI does not represent any resource on the server.")


def _writable(call: _Call, container: Container, blob: Blob | None) -> None:
    """Refuse a write that an immutability policy, a condition or another client's lease forbids."""
    if container.immutable and (blob is not None or call.request.method == "DELETE"):
        raise BlobError(
            409,
            "BlobImmutableDueToPolicy",
            "This operation is not permitted as the blob is immutable due to a policy.",
        )
    if blob is not None and blob.snapshot:
        raise BlobError(400, "SnapshotOperationNotSupported", "The operation is not supported on a snapshot.")
    _conditions(call, blob)
    lease_id = call.header("x-ms-lease-id")
    active = blob.leased() if blob else None
    if active and not lease_id:
        raise BlobError(
            412,
            "LeaseIdMissing",
            "There is currently a lease on the blob and no lease ID was specified in the request.",
        )
    if active and active.id != lease_id:
        raise BlobError(
            412,
            "LeaseIdMismatchWithBlobOperation",
            "The lease ID specified did not match the lease ID for the blob.",
        )
    if lease_id and active is None:
        lost = blob is not None and blob.lease is not None
        code = "LeaseLost" if lost else "LeaseNotPresentWithBlobOperation"
        raise BlobError(412, code, "There is currently no lease on the blob.")
    if blob is not None and active is None:
        blob.lease = None  # after a change, an expired lease can no longer be renewed


def _conditions(call: _Call, blob: Blob | None) -> None:
    """Check If-Match and If-None-Match."""
    match, none = call.header("If-Match"), call.header("If-None-Match")
    failed = BlobError(
        412, "ConditionNotMet", "The condition specified using HTTP conditional header(s) is not met."
    )
    if match and (blob is None or match not in {"*", blob.etag}):
        raise failed
    if none == "*" and blob is not None and call.request.method in {"PUT", "POST"}:
        raise BlobError(409, "BlobAlreadyExists", "The specified blob already exists.")
    if none and blob is not None and none == blob.etag:
        raise failed


def _aligned(size: int, name: str) -> None:
    if size % PAGE or not 0 <= size <= _LONGEST:
        raise BlobError(
            400,
            "InvalidHeaderValue",
            f"The value for one of the HTTP headers is not in the correct format: {name}",
        )


def _invalid_metadata() -> BlobError:
    return BlobError(
        400, "InvalidMetadata", "The metadata specified is invalid. It has characters that are not permitted."
    )


# ---------------------------------------------------------------- shapes


def _stamps(item: Blob | Container) -> dict[str, str]:
    stamps = {"ETag": item.etag, "Last-Modified": item.modified}
    return {**stamps, "x-ms-version-id": item.version} if isinstance(item, Blob) and item.version else stamps


def _metadata(metadata: dict[str, str]) -> dict[str, str]:
    return {f"x-ms-meta-{name}": value for name, value in metadata.items()}


def _properties(blob: Blob) -> dict[str, str]:
    lease = blob.leased()
    state = "leased" if lease else "expired" if blob.lease else "available"
    head = {
        **_stamps(blob),
        **_metadata(blob.metadata),
        **blob.copied,
        "Content-Type": blob.content_type,
        "Accept-Ranges": "bytes",
        "x-ms-blob-type": blob.kind,
        "x-ms-creation-time": blob.made,
        "x-ms-lease-status": "locked" if lease else "unlocked",
        "x-ms-lease-state": state,
        "x-ms-server-encrypted": "true",
    }
    if lease:
        head["x-ms-lease-duration"] = "infinite" if lease.until is None else "fixed"
    return head


def _xml(inner: str, headers: dict[str, str] | None = None) -> Response:
    body = f'<?xml version="1.0" encoding="utf-8"?>{inner}'.encode()
    return Response(200, {"Content-Type": "application/xml", **(headers or {})}, body)


_CONTAINER_ROUTES: dict[tuple[str, str], tuple[Need, Handler]] = {
    ("PUT", ""): (CONTAINER_WRITE, _create_container),
    ("GET", ""): (CONTAINER_READ, _get_container),
    ("HEAD", ""): (CONTAINER_READ, _get_container),
    ("DELETE", ""): (CONTAINER_DELETE, _delete_container),
    ("GET", "list"): (LIST, _list_blobs),
}
_BLOB_ROUTES: dict[tuple[str, str], tuple[Need, Handler]] = {
    ("GET", ""): (READ, _get),
    ("HEAD", ""): (READ, _head),
    ("GET", "pagelist"): (READ, _page_list),
    ("PUT", ""): (WRITE, _put),
    ("PUT", "page"): (WRITE, _put_page),
    ("PUT", "block"): (WRITE, _put_block),
    ("PUT", "blocklist"): (WRITE, _put_block_list),
    ("PUT", "properties"): (WRITE, _resize),
    ("PUT", "metadata"): (WRITE, _set_metadata),
    ("PUT", "snapshot"): (WRITE, _take_snapshot),
    ("PUT", "lease"): (WRITE, _lease),
    ("DELETE", ""): (DELETE, _delete),
}
