"""The sandbox's requests, responses and errors.

The HTTPS server and the in-process transport both use these types, so one handler serves both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

Json = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One HTTP request. `url` is absolute; header names are case-insensitive."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)

    @property
    def base(self) -> str:
        """Scheme and host as the client wrote them; operation URLs begin with it."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def path(self) -> str:
        """The decoded path."""
        return unquote(urlsplit(self.url).path)

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters by lower-case name; the last one wins if a name is repeated."""
        pairs = parse_qsl(urlsplit(self.url).query, keep_blank_values=True)
        return {name.lower(): value for name, value in pairs}

    def header(self, name: str) -> str | None:
        """The value of a header; None if absent."""
        return next((value for key, value in self.headers.items() if key.lower() == name.lower()), None)


@dataclass(frozen=True)
class Response:
    """One HTTP response."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def of(cls, status: int, document: Any = None, headers: Mapping[str, str] | None = None) -> Response:
        """A JSON response, or one without a body if there is no document."""
        if document is None:
            return cls(status, dict(headers or {}))
        body = json.dumps(document).encode()
        return cls(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, body)


class ArmError(Exception):
    """A refusal in Azure's words: HTTP status, code, message and sometimes a target."""

    def __init__(self, status: int, code: str, message: str, target: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.target = target

    def document(self) -> Json:
        """The inner error document: code, message and target."""
        document: Json = {"code": self.code, "message": self.message}
        if self.target is not None:
            document["target"] = self.target
        return document

    def response(self, **more: Any) -> Response:
        """The HTTP response; `more` are further properties of the error."""
        return Response.of(self.status, {"error": {**self.document(), **more}})


def invalid(message: str, target: str | None = None) -> ArmError:
    """400 InvalidParameter."""
    return ArmError(400, "InvalidParameter", message, target)


def bad_request(message: str) -> ArmError:
    """400 BadRequest."""
    return ArmError(400, "BadRequest", message)


def not_allowed(message: str, target: str | None = None) -> ArmError:
    """409 OperationNotAllowed."""
    return ArmError(409, "OperationNotAllowed", message, target)
