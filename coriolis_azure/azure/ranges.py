"""Reads ranges of a blob through a signed URL straight into memory.

The storage library holds what it reads three times, which is more than this process may take for many reads at a time.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from azure.core.exceptions import HttpResponseError, IncompleteReadError, ServiceResponseError
from azure.core.pipeline import Pipeline
from azure.core.pipeline.policies import UserAgentPolicy
from azure.core.pipeline.transport import HttpRequest

from .. import __version__
from .blob_retries import BUSY, Retries
from .pace import Pace
from .sas import Sas

_TRIES = 3  # of a read whose answer ends too early


class Ranges:
    """The content of the blob at `sas`, read at a `pace` that all its readers share. For threads."""

    def __init__(self, transport: Any, sas: Sas, version: str, pace: Pace) -> None:
        self._sas, self._version, self._pace = sas, version, pace
        agent = UserAgentPolicy(f"coriolis-azure/{__version__}")
        self._pipeline: Pipeline[Any, Any] = Pipeline(transport, [agent, Retries()])

    def fill(self, offset: int, data: memoryview) -> None:
        """Fill `data` with what the blob holds from `offset` on. Raises the exceptions of Azure's SDKs."""
        with self._pace.request(len(data)):
            for _ in range(_TRIES - 1):
                with suppress(ServiceResponseError, IncompleteReadError):
                    self._filled(offset, data)
                    return
            self._filled(offset, data)

    def _filled(self, offset: int, data: memoryview) -> None:
        headers = {
            "x-ms-range": f"bytes={offset}-{offset + len(data) - 1}",
            "x-ms-version": self._version,
            "Accept-Encoding": "identity",
        }
        request = HttpRequest("GET", self._sas.url, headers)
        response = self._pipeline.run(request, stream=True, retry_hook=self._retried).http_response
        if response.status_code != 206:
            response.body()  # which may say why
            raise HttpResponseError(response=response)
        at = 0
        for part in response.stream_download(self._pipeline):
            if at + len(part) > len(data):
                break
            data[at : at + len(part)] = part
            at += len(part)
        if at != len(data):
            raise ServiceResponseError(f"{at} bytes came where {len(data)} were asked for")

    def _retried(self, response: Any = None, **details: Any) -> None:
        """See the library's retry_hook."""
        del details
        if response is not None and response.status_code in BUSY:
            self._pace.busy()
