"""HTTPS to Azure: one pool of connections for all clients, proxies, certificate authorities, who may get a token."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import requests
from azure.core.pipeline.transport import HttpTransport, RequestsTransport
from requests.adapters import HTTPAdapter

from .. import errors, tls
from ..clock import Clock, wait
from ..settings import Connection
from .profiles import Profile

Transport = HttpTransport[Any, Any]
_API_VERSION = re.compile(
    r"/resourceGroups/.*/providers/(?P<type>[\w.]+/\w+)(?=[/?]).*[?&]api-version=(?P<version>[\w-]+)",
    re.IGNORECASE,
)
# Connections that are kept open to one host: blobs are written by many threads.
_CONNECTIONS = 64


class SharedTransport(Transport):
    """One transport for all clients: closing a client leaves it open for the others.

    Whatever an answer names as the place to go on (a next page, an operation, an account), what proves who we are
    goes to no other hosts than those of the cloud's profile.
    """

    def __init__(self, transport: Transport, clock: Clock) -> None:
        self._transport, self._clock = transport, clock
        self.profile: Profile | None = None
        self.skew = timedelta(0)  # how far Azure's clock is ahead of this host's
        # By lower-cased resource type, the API version with which it was asked for.
        self.api_versions: dict[str, str] = {}

    def send(self, request: Any, **options: Any) -> Any:
        asked = _API_VERSION.search(request.url)
        if asked:
            self.api_versions[asked["type"].lower()] = asked["version"]
        if "Authorization" in request.headers and not (self.profile and self.profile.owns(request.url)):
            parts = urlsplit(request.url)
            raise errors.Unreadable(
                f"{parts.scheme}://{parts.hostname} is not of this cloud: no credentials are sent there"
            )
        response = self._transport.send(request, **options)
        date = _date(response.headers.get("Date"))
        if date is not None:
            self.skew = date - self._clock.now()
        return response

    def sleep(self, duration: float) -> None:
        self._transport.sleep(duration)

    def open(self) -> None:
        self._transport.open()

    def close(self) -> None:
        """The clients' close: not ours to act upon."""

    def really_close(self) -> None:
        self._transport.close()

    def __enter__(self) -> SharedTransport:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy that stands between this host and Azure; its credentials, if any, are part of the URL."""

    url: str = field(repr=False)
    exceptions: tuple[str, ...] = ()

    def serves(self, host: str) -> bool:
        """Whether `host` is reached through it: it is none of the exceptions, nor within one."""
        return not any(host == name or host.endswith(f".{name}") for name in self.exceptions)


class _Trusting(HTTPAdapter):
    """HTTPS with certificates trusted besides the system's, through a proxy too."""

    def __init__(self, ca_bundle: str) -> None:
        self._context = ssl.create_default_context()
        self._context.sslsocket_class = tls.Socket
        try:
            self._context.load_verify_locations(ca_bundle)
        except OSError as error:  # as ssl.SSLError is
            raise errors.InvalidInput(
                f"connection_info: ca_bundle: {ca_bundle} holds no certificate that can be read: {error}",
                remedy="Give a file of certificates in PEM, which this user may read.",
            ) from error
        super().__init__(pool_maxsize=_CONNECTIONS)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options, ssl_context=self._context)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, **options, ssl_context=self._context)


class _Proxied(requests.Session):
    """A session that goes through `proxy`, whatever proxy the environment names."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__()
        self._proxy = proxy

    def merge_environment_settings(self, url: Any, *rest: Any, **options: Any) -> Any:
        merged: Any = super().merge_environment_settings(url, *rest, **options)
        through = self._proxy.serves(urlsplit(url).hostname or "")
        # Without an entry for the scheme there is no proxy, not even the environment's.
        return {**merged, "proxies": {"https": self._proxy.url, "http": self._proxy.url} if through else {}}


def https(connection: Connection, proxy: Proxy | None = None) -> Transport:
    """The HTTPS connections that the settings ask for, through `proxy` where one is given.

    Without one, the environment's (`HTTPS_PROXY`, `NO_PROXY`) is used, except for what is on this machine.
    """
    session = requests.Session()
    if proxy:
        session = _Proxied(proxy)
    elif urlsplit(connection.resource_manager).hostname in {"127.0.0.1", "localhost", "::1"}:
        session.trust_env = False
    verifies = not connection.allow_untrusted
    trusting = _Trusting(connection.ca_bundle) if connection.ca_bundle and verifies else None
    session.mount("https://", trusting or HTTPAdapter(pool_maxsize=_CONNECTIONS))
    transport: Transport = _Https(session=session, connection_verify=verifies)
    return transport


class _Https(RequestsTransport):  # type: ignore[misc]  # its module is untyped
    """HTTPS; what azure-core waits for can be called off."""

    def sleep(self, duration: float) -> None:
        """Wait before a request is repeated, or between two looks at an operation."""
        wait(duration)


def _date(header: str | None) -> datetime | None:
    """The moment that a Date header names; None without one, or where it is no date."""
    try:
        found = parsedate_to_datetime(header) if header else None
    except ValueError:
        return None
    return found if found is not None and found.tzinfo else None
