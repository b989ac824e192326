"""Access to a storage account's blob endpoint: Entra tokens, account keys, and SAS signatures."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from coriolis_azure.sandbox.identity.permissions import allowed
from coriolis_azure.sandbox.identity.tokens import Tokens
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import ArmError, Json, Request, Response

_SIGNED = (
    *("content-encoding", "content-language", "content-length", "content-md5", "content-type", "date"),
    *("if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range"),
)
_DELEGATED = ("skoid", "sktid", "skt", "ske", "sks", "skv", "saoid", "suoid", "scid")
# Fields that later service versions also sign, and since which version: users, and request headers and queries.
_OF_USERS, _SINCE_USERS = ("skdutid", "sduoid"), "2025-07-05"
_SINCE_REQUESTS = "2026-04-06"
_DATA = "Microsoft.Storage/storageAccounts/blobServices"


class BlobError(Exception):
    """A refusal in the blob service's words."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        headers: dict[str, str] | None = None,
        details: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}
        self.details = details or {}

    def response(self) -> Response:
        """The HTTP response."""
        details = "".join(f"<{name}>{value}</{name}>" for name, value in self.details.items())
        body = (
            '<?xml version="1.0" encoding="utf-8"?>'
            f"<Error><Code>{self.code}</Code><Message>{self.message}</Message>{details}</Error>"
        )
        headers = {"Content-Type": "application/xml", "x-ms-error-code": self.code, **self.headers}
        return Response(self.status, headers, body.encode())


class Need(NamedTuple):
    """The permission that a request needs: an `action` of a role, or a `letter` in a SAS."""

    action: str
    letter: str


READ, WRITE, DELETE = (
    Need(f"{_DATA}/containers/blobs/{verb}", letter)
    for verb, letter in (("read", "r"), ("write", "w"), ("delete", "d"))
)
# Of the built-in roles only Storage Blob Data Owner has this; Storage Blob Data Contributor does not.
DELETE_VERSION = Need(f"{_DATA}/containers/blobs/deleteBlobVersion/action", "x")
LIST = Need(READ.action, "l")
CONTAINER_READ, CONTAINER_WRITE, CONTAINER_DELETE = (
    Need(f"{_DATA}/containers/{verb}", "") for verb in ("read", "write", "delete")
)
DELEGATE = Need(f"{_DATA}/generateUserDelegationKey/action", "")


def check(account: Resource, request: Request, need: Need, tokens: Tokens, permissions: list[Json]) -> None:
    """Raise BlobError unless the request is authorized."""
    rules = account.properties.get("networkAcls") or {}
    if (
        account.properties.get("publicNetworkAccess") == "Disabled"
        or str(rules.get("defaultAction", "Allow")).lower() == "deny"
    ):
        raise BlobError(
            403, "AuthorizationFailure", "This request is not authorized to perform this operation."
        )
    scheme, _, proof = (request.header("Authorization") or "").partition(" ")
    if "sig" in request.query:
        _check_signature(account, request, need)
    elif scheme.lower() == "sharedkey":
        _check_key(account, request, proof)
    elif scheme.lower() == "bearer":
        _check_token(request, need, tokens, permissions)
    else:
        raise BlobError(
            401,
            "NoAuthenticationInformation",
            "Server failed to authenticate the request. Please refer to the information in the www-authenticate "
            "header.",
            _challenge(request),
        )


def _check_token(request: Request, need: Need, tokens: Tokens, permissions: list[Json]) -> None:
    try:
        tokens.check(request.header("Authorization"))
    except ArmError:
        raise BlobError(
            401,
            "InvalidAuthenticationInfo",
            "Server failed to authenticate the request. Please refer to the information in the www-authenticate "
            "header.",
            _challenge(request),
        ) from None
    granted = (
        {"actions": role.get("dataActions", ()), "notActions": role.get("notDataActions", ())}
        for role in permissions
    )
    managed = need.action.count("/") == 4 and "/blobs/" not in need.action
    if not allowed(permissions if managed or need is DELEGATE else granted, need.action):
        raise BlobError(
            403,
            "AuthorizationPermissionMismatch",
            "This request is not authorized to perform this operation using this permission.",
        )


def _challenge(request: Request) -> dict[str, str]:
    url = f"{request.base}/common/oauth2/authorize"
    return {
        "WWW-Authenticate": f"Bearer authorization_uri={url} resource_id=https://storage.azure.com",
    }


def _keys_allowed(account: Resource) -> None:
    if account.properties.get("allowSharedKeyAccess") is False:
        raise BlobError(
            403,
            "KeyBasedAuthenticationNotPermitted",
            "Key based authentication is not permitted on this storage account.",
        )


def _check_key(account: Resource, request: Request, proof: str) -> None:
    """Check a Shared Key signature over verb, headers and resource."""
    _keys_allowed(account)
    headers = {name.lower(): value for name, value in request.headers.items()}
    if headers.get("content-length") == "0":
        headers["content-length"] = ""
    special = sorted((name, value) for name, value in headers.items() if name.startswith("x-ms-"))
    query = sorted(
        (name.lower(), value)
        for name, value in parse_qsl(urlsplit(request.url).query, keep_blank_values=True)
    )
    text = "\n".join(
        [
            request.method,
            *(headers.get(name, "") for name in _SIGNED),
            *(f"{name}:{value}" for name, value in special),
            f"/{account.name}{urlsplit(request.url).path}",
            *(f"{name}:{value}" for name, value in query),
        ]
    )
    _, _, signature = proof.partition(":")
    if signature not in _signatures(account.hidden["keys"], text):
        raise _failed()


def _check_signature(account: Resource, request: Request, need: Need) -> None:
    """Check a service SAS or a user delegation SAS, for one blob or a container."""
    query = request.query
    path = request.path.strip("/").split("/", 2)
    scope = {"b": "/".join(path), "bs": "/".join(path), "c": "/".join(path[:2])}.get(query.get("sr", ""))
    if scope is None or need.letter not in query.get("sp", "") or not need.letter:
        raise BlobError(
            403,
            "AuthorizationPermissionMismatch",
            "This request is not authorized to perform this operation using this permission.",
        )
    delegated = "skoid" in query
    if not delegated:
        _keys_allowed(account)
    version = query.get("sv", "")
    of_key = (*_DELEGATED, *(_OF_USERS if version >= _SINCE_USERS else ())) if delegated else ("si",)
    names = ("sp", "st", "se", "", *of_key, "sip", "spr", "sv", "sr")
    values = [query.get(name, "") for name in names]
    values[3] = f"/blob/{scope}"
    values += [query.get("snapshot", "") if query["sr"] == "bs" else "", query.get("ses", "")]
    values += ["", ""] if delegated and version >= _SINCE_REQUESTS else []
    values += [query.get(name, "") for name in ("rscc", "rscd", "rsce", "rscl", "rsct")]
    keys = [account.hidden["delegation"]] if delegated else account.hidden["keys"]
    if query["sig"] not in _signatures(keys, "\n".join(values)):
        raise _failed()
    ends = datetime.fromisoformat(query.get("se", "").replace("Z", "+00:00"))
    if ends < datetime.now(timezone.utc):
        raise _failed()


def _signatures(keys: Iterable[str], text: str) -> set[str]:
    return {
        base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
        for key in keys
    }


def _failed() -> BlobError:
    return BlobError(
        403,
        "AuthenticationFailed",
        "Server failed to authenticate the request. Make sure the value of Authorization header is formed correctly "
        "including the signature.",
    )
