"""The direct channel: TLS straight to an agent on the worker. SSH would cost twice the processor time.

Each side has a certificate made for this one `Direct` object and accepts only the other's. The worker receives its
key over SSH and stores it nowhere. Only the agent's messages use the channel: ours go over SSH, and when that
connection ends, so does the agent.
"""

from __future__ import annotations

import datetime
import socket
import time
from contextlib import suppress
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ..agent.tls import Stripes, Tls, tls_context
from ..events import Notice, Report
from ..threads import Lock, within

PORTS = 64  # consecutive ports, one for each disk that a worker can hold
_TRY_SECONDS = 3.0
_HANDSHAKE_SECONDS = 15.0
# One more connection for each of these that a round trip takes. With the kernel's usual buffers (4 MiB to send, 6 to
# receive), one connection carries about 35 MB in a second over 80 ms.
_NEAR_SECONDS, _MOST = 0.025, 4
# A worker silent for this long counts as gone. Reading a clone that Azure is still filling may take a minute.
SILENCE_SECONDS = 300.0
# TCP keepalive: probe an idle connection, and give it up after 75 seconds in all.
_IDLE_SECONDS, _PROBES = 15, 4
# No clock should matter: the certificates themselves are compared, and they do not outlive the run.
_FROM, _UNTIL = datetime.datetime(1950, 1, 1), datetime.datetime(9999, 12, 31, 23, 59, 59)


class Direct:
    """The direct channel to the agents of the worker at `address`, on ports from `first_port` on. Thread-safe.

    After one failure it is not tried again; `report` gets a notice of the reason and that SSH is used.
    """

    def __init__(self, address: str, first_port: int, report: Report) -> None:
        self._address, self._first_port, self._report = address, first_port, report
        self._certificate, self._key = _identity("coriolis-azure host")
        self._worker_certificate, self._worker_key = _identity("coriolis-azure worker")
        self._context = tls_context(self._certificate, self._key, self._worker_certificate, server=False)
        self._blocked = False
        self._lock = Lock()

    def offer(self, slot: int) -> dict[str, Any] | None:
        """What the agent that reads the disk in `slot` needs to listen; None if the channel is given up."""
        if self._blocked:
            return None
        return {
            "port": self._first_port + slot % PORTS,
            "certificate": self._worker_certificate,
            "key": self._worker_key,
            "peer": self._certificate,
        }

    def connect(self, port: int) -> Stripes | None:
        """Connections to the agent that listens on `port`, several if it is far away.

        None if the first one fails, and then the channel is given up.
        """
        begun = time.monotonic()
        try:
            connection = socket.create_connection((self._address, port), _TRY_SECONDS)
        except OSError as error:
            self.give_up(f"port {port} of the worker cannot be reached ({error})")
            return None
        further = min(_MOST - 1, int((time.monotonic() - begun) / _NEAR_SECONDS))
        try:
            found = [self._greeted(connection, 0)]
        except (OSError, EOFError) as error:  # ssl.SSLError is an OSError
            self.give_up(
                f"what answers on port {port} of the worker is not our agent ({str(error) or 'it hung up'})"
            )
            return None
        with suppress(OSError, EOFError):  # those that are there are enough
            for number in range(1, 1 + further):
                connection = socket.create_connection((self._address, port), _TRY_SECONDS)
                found.append(self._greeted(connection, number))
        return Stripes(found)

    def _greeted(self, connection: socket.socket, number: int) -> Tls:
        """The connection, once each side knows the other. Raises OSError or EOFError, and closes it, if it fails."""
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = Tls(connection, self._context, server=False)
            with within(_HANDSHAKE_SECONDS, tls.close):
                tls.shake_hands(self._worker_certificate)
            tls.write([bytes([number])])
            connection.settimeout(SILENCE_SECONDS)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _IDLE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        except (OSError, EOFError):
            connection.close()
            raise
        return tls

    def give_up(self, reason: str) -> None:
        """Use SSH from now on, and report why."""
        with self._lock:
            if not self._blocked:
                self._report(Notice(f"data comes over SSH, which is slower: {reason}"))
            self._blocked = True


def _identity(name: str) -> tuple[str, str]:
    """A new self-signed certificate and its key, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()
