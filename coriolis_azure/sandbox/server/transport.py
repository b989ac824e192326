"""Access to the sandbox without sockets: a `requests` adapter, and an azure-core transport that uses it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from typing import Any

import requests
from azure.core.pipeline.transport import RequestsTransport
from requests.adapters import BaseAdapter
from urllib3 import HTTPHeaderDict, HTTPResponse

from coriolis_azure.sandbox.faults import Lost
from coriolis_azure.sandbox.wire import Request, Response


class HandlerAdapter(BaseAdapter):
    """Passes every request to a function and converts its answer for `requests`."""

    def __init__(self, handle: Callable[[Request], Response]) -> None:
        super().__init__()
        self._handle = handle

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: float | tuple[float, float] | tuple[float, None] | None = None,
        verify: bool | str = True,
        cert: bytes | str | tuple[bytes | str, bytes | str] | None = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Answer at once. Lost becomes a ConnectionError; any other error of the function is raised as it is."""
        del stream, timeout, verify, cert, proxies
        headers = {name: str(value) for name, value in request.headers.items()}
        try:
            answer = self._handle(
                Request(str(request.method), str(request.url), headers, _bytes(request.body))
            )
        except Lost as error:
            raise requests.ConnectionError(error) from error
        head = HTTPHeaderDict({"Date": formatdate(usegmt=True), **answer.headers})
        # There is no connection on which chunks could be told apart.
        if head.pop("Transfer-Encoding", None) is None:
            head.setdefault("Content-Length", str(len(answer.body)))
        raw = HTTPResponse(
            body=io.BytesIO(answer.body),
            headers=head,
            status=answer.status,
            preload_content=False,
            request_method=request.method,
        )
        response = requests.Response()
        response.status_code = answer.status
        response.headers.update(head)
        response.raw = raw
        response.url = str(request.url)
        response.request = request
        response.encoding = "utf-8"
        return response

    def close(self) -> None:
        """Do nothing: no connection is open."""


def in_process(
    handle: Callable[[Request], Response], sleep: Callable[[float], None] = time.sleep
) -> RequestsTransport:
    """A transport for SDK clients and credentials. Thread-safe, so all of them may share one.

    They call `sleep` to wait between two polls of an operation and before a retry.
    """
    session = requests.Session()
    session.trust_env = False
    adapter = HandlerAdapter(handle)
    for scheme in ("https://", "http://"):
        session.mount(scheme, adapter)
    transport = RequestsTransport(session=session, session_owner=False)
    transport.sleep = sleep
    return transport


def _bytes(body: Any) -> bytes:
    if body is None:
        return b""
    if isinstance(body, str):
        return body.encode()
    return bytes(body) if isinstance(body, bytes | bytearray | memoryview) else b"".join(body)
