"""The blob endpoint of exported managed disks, path-style: /md-name/container/abcd.

It answers what a read SAS allows: the blob, a range of it, its headers, its page list. In Entra mode a token for disks
is needed, too, of an identity that may download; and only a private network reaches what is not public.
"""

from __future__ import annotations

import base64
import hashlib
import os
from contextlib import AbstractContextManager
from email.utils import format_datetime

from coriolis_azure.sandbox.compute import exports
from coriolis_azure.sandbox.identity.permissions import allowed, held
from coriolis_azure.sandbox.identity.tokens import Tokens
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.storage import page_lists
from coriolis_azure.sandbox.storage.access import BlobError
from coriolis_azure.sandbox.storage.exported import Asked, check_conditions, failed, located, opened
from coriolis_azure.sandbox.wire import ArmError, Request, Response
from coriolis_azure.sandbox.world import World

HOSTS = "/md-"
AUDIENCE = "https://disk.azure.com/"
_DIGEST_MOST = 4 << 20  # the longest range whose MD5 is told


def answer(
    world: World, lock: AbstractContextManager[object], tokens: Tokens, request: Request
) -> Response | None:
    """Answer a request to a disk's host; None if the path does not begin with one. It is read outside `lock`."""
    if not request.path.startswith(HOSTS):
        return None
    try:
        with lock:
            asked = Asked(world, request, opened(world, _authorized(world, tokens, request)))
            check_conditions(asked)
            if request.query.get("comp") == "pagelist":
                return _versioned(request, page_lists.answer(asked))
            file = os.open(world.contents.path(asked.blob.resource.hidden["content"]), os.O_RDONLY)
        try:
            response = _read(asked, file)
        finally:
            os.close(file)
    except BlobError as error:
        response = error.response()
        if request.method == "HEAD" or error.status == 304:
            response = Response(response.status, response.headers)
    return _versioned(request, response)


def _versioned(request: Request, response: Response) -> Response:
    """An answer with the version of the request."""
    response.headers.setdefault("x-ms-version", request.header("x-ms-version") or "2009-09-19")
    return response


def _authorized(world: World, tokens: Tokens, request: Request) -> Resource:
    """The disk or snapshot that the request may read."""
    exported = located(world, request.path, request.query)
    if exported is None or not exports.signed(world, exported, request.query):
        raise failed()
    _check_merged(world, exports.place(exported)[0])
    if request.method not in {"GET", "HEAD"} or request.query.get("comp", "") not in {"", "pagelist"}:
        raise BlobError(
            403,
            "AuthorizationPermissionMismatch",
            "This request is not authorized to perform this operation using this permission.",
        )
    properties = exported.properties
    public = (properties.get("networkAccessPolicy"), properties.get("publicNetworkAccess")) == (
        "AllowAll",
        "Enabled",
    )
    if not (public or world.exporting.private_clients):
        raise BlobError(
            403, "AuthorizationFailure", "This request is not authorized to perform this operation."
        )
    if properties.get("dataAccessAuthMode") == "AzureActiveDirectory":
        _check_token(world, tokens, request, exported)
    return exported


def _check_merged(world: World, host: str) -> None:
    """Refuse while the family merges a snapshot that was deleted a moment ago."""
    until, status, code = world.exporting.merging.get(host, (0.0, 0, ""))
    if world.clock.monotonic() < until:
        raise BlobError(status, code, "The snapshot is not accessible at the moment.")


def _check_token(world: World, tokens: Tokens, request: Request, exported: Resource) -> None:
    """Check the token that Entra mode asks for: made for disks, of an identity that may download."""
    try:
        audience = tokens.audience(request.header("Authorization"))
    except ArmError:
        audience = ""
    if audience != AUDIENCE:
        tenant = f"{request.base}/{world.state.identity.tenant}"
        raise BlobError(
            401,
            "InvalidAuthenticationInfo" if request.header("Authorization") else "NoAuthenticationInformation",
            "Server failed to authenticate the request. Please refer to the information in the www-authenticate "
            "header.",
            {"WWW-Authenticate": f'Bearer authorization_uri="{tenant}", resource_id="{AUDIENCE}"'},
        )
    roles = [
        {"actions": role.get("dataActions", ()), "notActions": role.get("notDataActions", ())}
        for role in held(world.permissions, exported.id)
    ]
    if not allowed(roles, f"{exported.type}/download/action"):
        raise BlobError(
            403,
            "AuthorizationPermissionMismatch",
            "This request is not authorized to perform this operation using this permission.",
        )


def _read(asked: Asked, file: int) -> Response:
    """The blob or a range of it."""
    blob, span = asked.blob, asked.range()
    start, end = span or (0, blob.size)
    head = _headers(asked)
    if span:
        head["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
        head["x-ms-blob-content-md5"] = head.pop("Content-MD5")
    if asked.request.method == "HEAD":
        return Response(200, {**head, "Content-Length": str(blob.size)})
    body = os.pread(file, max(0, min(end, blob.content) - start), start)
    if end > blob.content:
        body += blob.footer[max(0, start - blob.content) : end - blob.content]
    if asked.header("x-ms-range-get-content-md5") == "true" and len(body) <= _DIGEST_MOST:
        head["Content-MD5"] = base64.b64encode(hashlib.md5(body).digest()).decode()  # noqa: S324  (HTTP's own)
    return Response(206 if span else 200, head, body)


def _headers(asked: Asked) -> dict[str, str]:
    """The headers of the blob. Its MD5 is not of the content, as in Azure: a family has one."""
    host, _, snapshot = exports.place(asked.blob.resource)
    head = {
        **asked.blob.stamps,
        "Content-Type": "application/octet-stream",
        "Content-MD5": base64.b64encode(hashlib.sha256(host.encode()).digest()[:16]).decode(),
        "Accept-Ranges": "bytes",
        "x-ms-blob-type": "PageBlob",
        "x-ms-blob-sequence-number": "2",
        "x-ms-creation-time": format_datetime(asked.blob.modified, usegmt=True),
        "x-ms-lease-status": "unlocked",
        "x-ms-lease-state": "available",
        "x-ms-server-encrypted": "true",
    }
    if snapshot:
        copied = {"incremental-copy": "true", "copy-status": "success", "copy-destination-snapshot": snapshot}
        head |= {f"x-ms-{name}": value for name, value in copied.items()}
    return head
