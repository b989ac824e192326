"""The retries of requests to Blob storage."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from azure.storage.blob import ExponentialRetry

from .transport import request_id

# How Azure asks for fewer requests.
BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class Retries(ExponentialRetry):
    """The retries of requests to Blob storage; but answers with the error code `final` are not asked for again.

    The library's default first backoff is 15 seconds: too long for a multi-threaded transfer.
    """

    def __init__(self, final: str = "") -> None:
        super().__init__(initial_backoff=1, increment_base=2, retry_total=5, random_jitter_range=1)
        self._final = final

    def increment(
        self, settings: dict[str, Any], request: Any, response: Any = None, error: Any = None
    ) -> bool:
        """Whether to ask once more."""
        code = response.headers.get("x-ms-error-code") if response is not None else None
        if self._final and code == self._final:
            return False
        return super().increment(settings, request, response, error)


class ClientRetries(Retries):
    """The same in a client of the library, whose requests get their ids here: see `request_id`."""

    def configure_retries(self, request: Any) -> dict[str, Any]:
        """The settings for one request."""
        request.context.options.setdefault("client_request_id", request_id())
        return super().configure_retries(request)
