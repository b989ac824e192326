"""The direct channel: TLS on a port of the worker, without SSH. Only the agent writes to it.

Each side accepts exactly one certificate of the other; both were made for this run and come with the job.
"""

import contextlib
import os
import queue
import socket
import ssl
import threading
from typing import Any, List

from .wire import Failure

HANDSHAKE_SECONDS = 5.0
TLS_PIECE = 256 << 10  # bytes encrypted at a time
CIPHERS = "ECDHE-ECDSA-AES128-GCM-SHA256"


def tls_context(certificate: str, key: str, peer: str, *, server: bool) -> ssl.SSLContext:
    """A TLS context that presents `certificate` with `key` and accepts only `peer`. All are PEM.

    Python loads a certificate only from a file, so it gets a pipe: the key never reaches a disk.
    """
    side = "PROTOCOL_TLS_SERVER" if server else "PROTOCOL_TLS_CLIENT"
    context = ssl.SSLContext(getattr(ssl, side, ssl.PROTOCOL_SSLv23))
    context.check_hostname = False  # the certificate itself is compared instead
    context.verify_mode = ssl.CERT_REQUIRED
    # Only for TLS 1.2 and older does Python let us choose AES-128, the fastest cipher here.
    if hasattr(context, "maximum_version"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        context.options |= getattr(ssl, "OP_NO_TLSv1_3", 0) | ssl.OP_NO_TLSv1_1 | ssl.OP_NO_TLSv1
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    context.set_ciphers(CIPHERS)
    context.load_verify_locations(cadata=peer)
    ends = []
    try:
        for text in (certificate, key):
            read, write = os.pipe()
            ends.append(read)
            os.write(write, text.encode())
            os.close(write)
        context.load_cert_chain(*("/proc/self/fd/{}".format(end) for end in ends))
    finally:
        for end in ends:
            os.close(end)
    return context


class Tls:
    """One side of a TLS connection that, after `shake_hands`, only writes or only reads.

    It passes many records to or from the socket at a time; Python's SSLSocket makes two system calls per record of
    16 KiB.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, server: bool) -> None:
        self._socket = connection
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)
        self._room = memoryview(bytearray(TLS_PIECE))

    def shake_hands(self, peer: str) -> None:
        """Do the handshake and check that the other side is `peer` (PEM); OSError (or its ssl.SSLError) if not."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
        self._flush()
        if self._tls.getpeercert(binary_form=True) != ssl.PEM_cert_to_DER_cert(peer):
            raise OSError("the other side has another certificate")

    def write(self, buffers: List[Any]) -> None:
        """Write a list of buffers."""
        for buffer in buffers:
            view = memoryview(buffer)
            for at in range(0, len(view), TLS_PIECE):
                self._tls.write(view[at : at + TLS_PIECE])
                if self._out.pending >= TLS_PIECE:
                    self._flush()
        self._flush()

    def read_into(self, view: memoryview) -> int:
        """Read available bytes into `view` and return how many, at least one. EOFError at the end."""
        read, at, size = self._tls.read, 0, len(view)
        while at < size:
            try:
                done = read(size - at, view[at:])  # type: Any
            except ssl.SSLWantReadError:
                if at:
                    break
                self._fill()
                continue
            if not done:
                raise EOFError
            at += done
        return at

    def close(self) -> None:
        """Break the connection off, even during reads and writes."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _flush(self) -> None:
        if self._out.pending:
            self._socket.sendall(self._out.read())

    def _fill(self) -> None:
        done = self._socket.recv_into(self._room)
        if not done:
            raise EOFError
        self._in.write(self._room[:done])


class Listener:
    """Accepts one TLS connection, authenticated by the peer's certificate; rejects all others."""

    def __init__(self, address: str, offer: Any) -> None:
        self._context = tls_context(offer["certificate"], offer["key"], offer["peer"], server=True)
        self._peer, self._accepted = offer["peer"], queue.Queue()  # type: str, queue.Queue[Tls]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, offer["port"]))
        self._socket.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(HANDSHAKE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = Tls(connection, self._context, server=True)
            tls.shake_hands(self._peer)
            connection.settimeout(None)
            self._accepted.put(tls)
        except (OSError, EOFError, ValueError):
            connection.close()

    def host(self) -> Tls:
        """The host's connection, after it has said that it is connected. No one else is accepted afterwards."""
        try:
            tls = self._accepted.get(timeout=HANDSHAKE_SECONDS)
        except queue.Empty:
            raise Failure("the host did not connect to the direct channel") from None
        self.close()
        return tls

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
