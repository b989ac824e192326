"""Our client of the orchestrator's HTTPS backup writer: posts chunks over several connections concurrently.

Both sides authenticate with the certificates that the orchestrator provides. While the device is open, it is locked
for this run's token. Transient failures (a lost connection, a 5xx) are retried, others (a 4xx) are not; posting a
chunk twice is harmless.

The server can compute digests of ranges, so each posted range is checked against the digest of what was sent. The
protocol has no sync request; the server's answer to a chunk is its only confirmation.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import ssl
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import tls
from ..clock import Clock, retried
from ..errors import CorruptChunk, DestinationFailed, InvalidInput, cleaned_output, exhausted
from ..events import Notice, Report, Wait, silent
from ..replica.destinations import Content
from ..threads import Lock, ordered

CHECKS = 4  # checksum jobs at a time
_PIECE = 4 << 20  # most zeros in one request
_PAUSES = (0.2, 1.0, 3.0)  # seconds between attempts
_CERTIFICATES = ("client_crt", "client_key", "ca_crt")
_WORDS = 300  # most characters of the server's own message in ours
_ANSWER_BYTES = 1 << 20
_ALGORITHM = "sha256"
_SENT = struct.Struct(">QQ32s")  # offset, length, digest
_END = 0  # added to a range's exclusive end: a checksum stops before end_offset
_ACQUIRE_SECONDS = 8.0
_CHECK_SECONDS = 3600.0
_POLL_SECONDS = (0.02, 5.0)  # the first pause, and the longest
_JSON = {"Content-Type": "application/json"}
_NO_SUCH_THING = (404, 405, 501)
_REMEDY = "Check the backup writer's service on the target, and that this host may reach it, then run again."


class Target:
    """The server with the devices. A writer.Backend.

    `details`: ip, port and certificates: client_crt, client_key and ca_crt, each in PEM.
    """

    def __init__(
        self, details: dict[str, Any], report: Report, *, compress: bool, clock: Clock, patience: float
    ) -> None:
        for name in ("ip", "port"):
            if not details.get(name):
                raise InvalidInput(f"the connection details of the http_backup_writer have no {name}")
        self.host, self.port = str(details["ip"]), int(details["port"])
        self.compress, self.clock, self.patience, self.report = compress, clock, patience, report
        self._trust = _trust(details.get("certificates") or {})

    def device(self, disk: str, path: str) -> Device:
        """The device at `path`. See Backend."""
        return Device(self, disk, path)

    def connection(self) -> HTTPSConnection:
        """A new connection, opened by its first request."""
        return HTTPSConnection(self.host, self.port, timeout=self.patience, context=self._trust)


@dataclass(frozen=True)
class _Request:
    """A request to the server. `path`: below that of the device; empty for the write of a chunk."""

    method: str
    path: str
    body: Content = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.path or 'of a chunk'}"


class _TransientFailure(Exception):
    """A request failed, but the next attempt may succeed. The text is the reason."""


class Device:
    """One device of the server. A writer.Device."""

    def __init__(self, target: Target, disk: str, path: str) -> None:
        self._target, self._disk = target, disk
        # As in the orchestrator's client: the standard base64 alphabet, not quoted.
        self._base = f"/api/v2/device/{base64.b64encode(path.encode()).decode()}"
        self._token = str(uuid.uuid4())
        self._acquired = False
        self._idle: list[HTTPSConnection] = []
        self._sent = bytearray()  # a _SENT record of 48 bytes for each range that was posted
        self._unanswered = 0  # write requests without an answer
        self._lock = Lock()

    def open(self) -> None:
        """Lock the device; a run that has just been ended may still hold the lock. See Device."""
        awaited = f"an earlier run to release the volume of {self._disk}"
        waiting = Wait(self._target.report, self._target.clock, awaited, _ACQUIRE_SECONDS)
        while self._send(_Request("POST", "/acquire"), missing=(409,) if waiting.left > 0 else ()) is None:
            waiting.pause(0.5)
        self._acquired = True

    def write(self, offset: int, data: Content) -> None:
        """Post a chunk and wait until the server has accepted it. See Device."""
        body, packed = data, False
        if self._target.compress:
            compressed = gzip.compress(data, 1, mtime=0)
            if len(compressed) < len(data):
                body, packed = compressed, True
        self._post(offset, len(data), body, hashlib.sha256(data).digest(), packed=packed)

    def zero(self, offset: int, length: int) -> None:
        """Post compressed zeros. See Device."""
        for start in range(offset, offset + length, _PIECE):
            size = min(_PIECE, offset + length - start)
            body, digest = _zeros(size)
            self._post(start, size, body, digest, packed=True)

    def flush(self) -> None:
        """Do nothing: each accepted chunk has been answered, and the protocol has no sync. See Device."""

    @property
    def checkable(self) -> bool:
        """Whether anything was posted. See Device."""
        return bool(self._sent)

    def check(self) -> bool | None:
        """Compare the digest of each posted range with the server's. See Destination."""
        if not self._sent:
            return None
        ranges: Iterable[tuple[int, int, bytes]] = _SENT.iter_unpack(self._sent)
        with closing(
            ordered(self._compare, ranges, threads=CHECKS, ahead=2 * CHECKS, abort=self._hang_up)
        ) as results:
            return True if all(results) else None

    def quiet(self) -> bool:
        """Whether every attempt to post a chunk was answered. See Device."""
        return not self._unanswered

    def close(self) -> None:
        """Unlock the device and close the connections. See Device."""
        if self._acquired:
            self._acquired = False
            try:
                self._send(_Request("POST", "/release"), pauses=())
            except DestinationFailed as error:
                self._target.report(Notice(f"the device may still be locked on the target: {error.message}"))
        self._hang_up()

    def _post(self, offset: int, length: int, body: Content, digest: bytes, *, packed: bool) -> None:
        headers = {"X-Write-Offset": str(offset), "Content-Type": "application/octet-stream"}
        if packed:
            headers["Content-Encoding"] = "gzip"
        self._send(_Request("POST", "", body, headers), offset=offset)
        with self._lock:
            self._sent += _SENT.pack(offset, length, digest)

    def _compare(self, sent: tuple[int, int, bytes]) -> bool:
        """Whether the server could compute the digest of a range. CorruptChunk if it differs."""
        offset, length, digest = sent
        with self._job(offset, length) as id:
            if not id:
                return False
            actual = self._digest(id, offset)
        if actual.lower() != digest.hex():
            raise CorruptChunk(
                f"{self._disk}: at offset {offset} the target holds {length} bytes with the digest {actual}, "
                f"but the bytes sent have {digest.hex()}",
                disk=self._disk,
                offset=offset,
            )
        return True

    @contextmanager
    def _job(self, offset: int, length: int) -> Iterator[str]:
        """The id of a checksum job for a range; empty if the server has no such jobs."""
        task = {
            "start_offset": offset,
            "end_offset": offset + length + _END,
            "checksum_algorithm": _ALGORITHM,
        }
        order = _Request("POST", "/checksumJob", json.dumps(task).encode(), _JSON)
        answer = self._asked(order, offset, _NO_SUCH_THING)
        id = str(answer.get("job_id") or "")
        try:
            yield id
        finally:
            if id:
                with suppress(DestinationFailed):
                    self._send(_Request("DELETE", f"/checksumJob/{id}"), pauses=(), offset=offset)

    def _digest(self, id: str, offset: int) -> str:
        """Wait for the result of a checksum job."""
        waiting = Wait(silent, self._target.clock, "a checksum", _CHECK_SECONDS)
        pause, longest = _POLL_SECONDS
        while True:
            job = self._asked(_Request("GET", f"/checksumJob/{id}"), offset)
            state = job.get("execution_status")
            if state == "finished":
                if job.get("checksum_algorithm", _ALGORITHM) != _ALGORITHM:
                    raise self._failed(f"it computed a {job['checksum_algorithm']!r}", offset)
                return str(job.get("checksum_value"))
            if state == "failed":
                raise self._failed(f"its checksum job failed: {_words(job.get('error_message'))}", offset)
            if waiting.left < 0:
                raise self._failed(f"its checksum job took longer than {_CHECK_SECONDS:g} seconds", offset)
            waiting.pause(pause)
            pause = min(2 * pause, longest)

    def _asked(self, request: _Request, offset: int, missing: tuple[int, ...] = ()) -> dict[str, Any]:
        """The JSON object that the server answers with; empty if the status is one of `missing`."""
        answer = self._send(request, offset=offset, missing=missing)
        if answer is None:
            return {}
        try:
            document = json.loads(answer)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self._failed(f"its answer to {request} is not a JSON object", offset)
        return document

    def _send(
        self,
        request: _Request,
        *,
        offset: int | None = None,
        pauses: Sequence[float] = _PAUSES,
        missing: tuple[int, ...] = (),
    ) -> bytes | None:
        """The body of a successful answer, with retries; None if the status is one of `missing`."""
        attempt = partial(self._attempt, request, offset, missing)
        try:
            return retried(attempt, _TransientFailure, pauses, self._target.clock)
        except _TransientFailure as failure:
            raise self._failed(str(failure), offset) from failure

    def _attempt(self, request: _Request, offset: int | None, missing: tuple[int, ...]) -> bytes | None:
        """`_send` without retries. Raises _TransientFailure if another attempt may succeed."""
        try:
            status, content = self._exchange(request)
        except (OSError, HTTPException) as error:
            reason = f"no answer to {request}: {str(error) or type(error).__name__}"
            if exhausted(error):
                raise self._failed(reason, offset) from error
            raise _TransientFailure(reason) from error
        if 200 <= status < 300:
            return content
        if status in missing:
            return None
        reason = f"{request} was answered with status {status}: {_words(content)}"
        if status < 500:
            raise self._failed(reason, offset)
        raise _TransientFailure(reason)

    def _exchange(self, request: _Request) -> tuple[int, bytes]:
        """Send one request over an idle or new connection; a connection that fails is dropped."""
        with self._lock:
            connection = self._idle.pop() if self._idle else self._target.connection()
        writes = not request.path  # a path below the device's own is not a write
        headers = {"X-Client-Token": self._token, **request.headers}
        try:
            if connection.sock is None:
                connection.connect()
            with self._lock:
                self._unanswered += writes
            connection.request(request.method, self._base + request.path, request.body, headers)
            with connection.getresponse() as answer:
                content = answer.read(_ANSWER_BYTES)
                complete = answer.isclosed()
            with self._lock:
                self._unanswered -= writes
        except BaseException:
            connection.close()
            raise
        if answer.will_close or not complete:
            connection.close()
        else:
            with self._lock:
                self._idle.append(connection)
        return answer.status, content

    def _hang_up(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _failed(self, reason: str, offset: int | None) -> DestinationFailed:
        where = "" if offset is None else f" at offset {offset}"
        text = f"{self._disk}: the backup writer at {self._target.host} port {self._target.port}{where}: {reason}"
        return DestinationFailed(text, disk=self._disk, offset=offset, remedy=_REMEDY)


def _trust(certificates: dict[str, Any]) -> ssl.SSLContext:
    """A TLS context with our certificate and the CA to trust. InvalidInput if the certificates are unusable."""
    for name in _CERTIFICATES:
        if not isinstance(certificates.get(name), str):
            raise InvalidInput(f"the certificates of the http_backup_writer have no {name}")
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.sslsocket_class = tls.AskingSocket
    try:
        trust.load_verify_locations(cadata=certificates["ca_crt"])
        # A key can be loaded only from a file; the folder is private to this user and removed at once.
        with TemporaryDirectory() as folder:
            client = Path(folder) / "client.pem"
            client.touch(mode=0o600)
            client.write_text(f"{certificates['client_crt']}\n{certificates['client_key']}\n")
            trust.load_cert_chain(client, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidInput(f"the certificates of the http_backup_writer cannot be used: {error}") from error
    return trust


def _no_password() -> str:
    """Refuse, where OpenSSL would otherwise ask at the terminal."""
    raise ValueError("the key is encrypted")


@functools.lru_cache(maxsize=16)
def _zeros(length: int) -> tuple[bytes, bytes]:
    """Zeros compressed with gzip, and the digest of the zeros."""
    zeros = bytes(length)
    return gzip.compress(zeros, 9, mtime=0), hashlib.sha256(zeros).digest()


def _words(text: object) -> str:
    return cleaned_output(text, _WORDS) or "no message"
