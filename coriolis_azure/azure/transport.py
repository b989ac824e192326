"""HTTPS to Azure: one connection pool for all clients, proxies, CA certificates, and which hosts may get a token."""

from __future__ import annotations

import re
import ssl
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from azure.core.pipeline.transport import HttpTransport, RequestsTransport
from requests.adapters import DEFAULT_CA_BUNDLE_PATH, HTTPAdapter

from .. import errors, tls
from ..clock import Clock, wait
from ..settings import Connection
from ..threads import Lock
from .profiles import Profile

Transport = HttpTransport[Any, Any]
_API_VERSION = re.compile(
    r"/resourceGroups/.*/providers/(?P<type>[\w.]+/\w+)(?=[/?]).*[?&]api-version=(?P<version>[\w-]+)",
    re.IGNORECASE,
)
_REDIRECTS = range(300, 309)
_LINK_LOCAL = "169.254."  # what is there is different for every host
# Connections kept open per host: many threads write blobs.
_CONNECTIONS = 64
# Bytes that are taken from a connection at once. With azure-core's 4096, reading takes twice the processor time.
_BLOCK = 64 << 10


class SharedTransport(Transport):
    """A transport shared by all clients: closing a client leaves it open for the others.

    Credentials are sent only to hosts of the cloud's profile, whatever host an answer refers to (for a next page, an
    operation, a storage account). A redirect to another host is an error: the SDKs would send it what a request holds
    besides them, and believe its answer.
    """

    def __init__(self, transport: Transport, clock: Clock) -> None:
        self._transport, self._clock = transport, clock
        self.profile: Profile | None = None
        self.skew = timedelta(0)  # how far Azure's clock is ahead of this host's
        # The API version that was last requested, by lower-case resource type.
        self.api_versions: dict[str, str] = {}

    def send(self, request: Any, **options: Any) -> Any:
        match = _API_VERSION.search(request.url)
        if match:
            self.api_versions[match["type"].lower()] = match["version"]
        request.headers.setdefault("x-ms-client-request-id", request_id())
        if "Authorization" in request.headers and not self._owns(request.url):
            raise errors.Unreadable(
                f"{origin(request.url)} does not belong to this cloud: credentials are not sent there"
            )
        response = self._transport.send(request, **options)
        self._refuse_redirect(request.url, response)
        date = _date(response.headers.get("Date"))
        if date is not None and _is_azures(response.headers):
            self.skew = date - self._clock.now()
        return response

    def _owns(self, url: str) -> bool:
        return self.profile is not None and self.profile.owns(url)

    def _refuse_redirect(self, url: str, response: Any) -> None:
        """Raise Unreadable if the answer sends us to a host outside the cloud."""
        to = response.headers.get("Location", "") if response.status_code in _REDIRECTS else ""
        if _has_host(to) and not self._owns(to):
            raise errors.Unreadable(
                f"{origin(url)} redirects to {origin(to)}, which does not belong to this cloud: it is not followed"
            )

    def sleep(self, duration: float) -> None:
        self._transport.sleep(duration)

    def open(self) -> None:
        self._transport.open()

    def close(self) -> None:
        """Do nothing: clients call this, but the others still need the transport."""

    def really_close(self) -> None:
        self._transport.close()

    def __enter__(self) -> SharedTransport:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def request_id() -> str:
    """An id for a request, by which Azure's support finds it.

    The SDKs make theirs with `uuid1`. Where /var/lib/libuuid exists, as with Debian's uuid-runtime, and root runs this,
    libuuid then leaves a file open in each thread (seen with 2.38): runs with many threads would end with EMFILE.
    """
    return str(uuid.uuid4())


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy between this host and Azure; its credentials, if any, are part of the URL."""

    url: str = field(repr=False)
    exceptions: tuple[str, ...] = ()

    def serves(self, host: str) -> bool:
        """Whether `host` is reached through the proxy: no exception, no subdomain of one, not link-local."""
        return not host.startswith(_LINK_LOCAL) and not any(
            host == name or host.endswith(f".{name}") for name in self.exceptions
        )


class _Adapter(HTTPAdapter):
    """HTTPS that trusts `ca_bundle`, if one is given, besides the certificates that requests trusts.

    They are read once. urllib3 would read them again for each connection, which takes about 25 ms each time.
    """

    def __init__(self, ca_bundle: str = "") -> None:
        self._ca_bundle = ca_bundle
        self._lock, self._contexts = Lock(), dict[str, ssl.SSLContext]()
        if ca_bundle:
            self._trust_bundle(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        super().__init__(pool_maxsize=_CONNECTIONS)

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        if verify:
            pool.pop("ca_certs", None)  # the context has the certificates
            pool.pop("ca_cert_dir", None)
            pool["ssl_context"] = self._context(DEFAULT_CA_BUNDLE_PATH if verify is True else verify)
        return host, pool

    def _context(self, trusted: str) -> ssl.SSLContext:
        """The context for a file or folder of certificates: that of certifi, or one that the environment names."""
        with self._lock:
            if trusted not in self._contexts:
                folder = trusted if Path(trusted).is_dir() else None
                with _read(trusted, "REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE"):
                    context = ssl.create_default_context(cafile=None if folder else trusted, capath=folder)
                context.sslsocket_class = tls.AskingSocket
                if self._ca_bundle:
                    context.load_default_certs()
                    self._trust_bundle(context)
                self._contexts[trusted] = context
            return self._contexts[trusted]

    def _trust_bundle(self, context: ssl.SSLContext) -> None:
        with _read(self._ca_bundle, "connection_info: ca_bundle"):
            context.load_verify_locations(self._ca_bundle)

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        if not verify:
            super().cert_verify(conn, url, verify, cert)  # type: ignore[no-untyped-call]


@contextmanager
def _read(path: str, setting: str) -> Iterator[None]:
    """Raise InvalidInput if the certificates at `path` cannot be read within the block."""
    try:
        yield
    except OSError as error:  # ssl.SSLError is one
        raise errors.InvalidInput(
            f"{setting}: {path} holds no readable certificate: {error}",
            remedy="Give a PEM file of certificates that this user may read.",
        ) from error


class _Proxied(requests.Session):
    """A session that uses `proxy` and ignores the proxy of the environment."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__()
        self._proxy = proxy

    def merge_environment_settings(self, url: Any, *rest: Any, **options: Any) -> Any:
        merged: Any = super().merge_environment_settings(url, *rest, **options)
        proxied = self._proxy.serves(urlsplit(url).hostname or "")
        # An empty dictionary disables even the proxy of the environment.
        return {**merged, "proxies": {"https": self._proxy.url, "http": self._proxy.url} if proxied else {}}


def https(connection: Connection, proxy: Proxy | None = None) -> Transport:
    """The HTTPS transport for the settings, through `proxy` if one is given.

    Otherwise the proxy of the environment (`HTTPS_PROXY`, `NO_PROXY`) is used, except for localhost.
    """
    session = requests.Session()
    if proxy:
        session = _Proxied(proxy)
    elif urlsplit(connection.resource_manager).hostname in {"127.0.0.1", "localhost", "::1"}:
        session.trust_env = False
    verifies = not connection.allow_untrusted
    session.mount("https://", _Adapter(connection.ca_bundle if verifies else ""))
    transport: Transport = _Https(
        session=session, connection_verify=verifies, connection_data_block_size=_BLOCK
    )
    return transport


class _Https(RequestsTransport):  # type: ignore[misc]  # its module is untyped
    """HTTPS whose waits can be cancelled, also those inside azure-core."""

    def sleep(self, duration: float) -> None:
        """Wait before a retry, or between two polls of an operation."""
        wait(duration)


def _has_host(location: str) -> bool:
    """Whether a Location names a host; otherwise it is a path on the same one."""
    try:
        return bool(urlsplit(location).netloc)
    except ValueError:
        return True


def origin(url: str) -> str:
    """A URL up to its path, for a message."""
    return re.split("[?#]", "/".join(url.split("/", 3)[:3]))[0][:200]


def _is_azures(headers: Mapping[str, str]) -> bool:
    """Whether an answer is Azure's, which has an id of the request at least. A proxy's page has the proxy's time."""
    return any(name.lower().startswith("x-ms-") for name in headers)


def _date(header: str | None) -> datetime | None:
    """The moment in a Date header; None if it is absent or not a date."""
    try:
        parsed = parsedate_to_datetime(header) if header else None
    except ValueError:
        return None
    return parsed if parsed is not None and parsed.tzinfo else None
