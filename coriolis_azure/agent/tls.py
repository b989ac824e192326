"""The direct channel: TLS on a port of the worker, past SSH. Only the agent writes to it.

Each side takes the other's one certificate and no other; both were made for this run and came with the job.
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
TLS_PIECE = 256 << 10  # bytes that are encrypted at a time
CIPHERS = "ECDHE-ECDSA-AES128-GCM-SHA256"


def tls_context(server: bool, certificate: str, key: str, peer: str) -> ssl.SSLContext:
    """TLS that proves itself with `certificate` and `key` and takes `peer` and nobody else, all PEM.

    Python loads certificates from files only. Pipes are such, and never lie on a disk.
    """
    side = "PROTOCOL_TLS_SERVER" if server else "PROTOCOL_TLS_CLIENT"
    context = ssl.SSLContext(getattr(ssl, side, ssl.PROTOCOL_SSLv23))
    context.check_hostname = False  # there are no names: the certificate itself is compared
    context.verify_mode = ssl.CERT_REQUIRED
    # Up to 1.2 Python lets us choose AES-128, the fastest there is here.
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
    """One side of a TLS connection, which either only writes or only reads, after `shake_hands`.

    Many records are passed to and from the socket at a time: Python's own SSLSocket takes two system calls for each
    of 16 KiB.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, server: bool) -> None:
        self._socket = connection
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)
        self._room = memoryview(bytearray(TLS_PIECE))

    def shake_hands(self, peer: str) -> None:
        """Make sure that `peer` (PEM) is at the other end; OSError (as ssl.SSLError is) where it is not."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
        self._flush()
        if self._tls.getpeercert(True) != ssl.PEM_cert_to_DER_cert(peer):
            raise OSError("somebody else is at the other end")

    def write(self, buffers: List[Any]) -> None:
        """Write all of some buffers."""
        for buffer in buffers:
            view = memoryview(buffer)
            for at in range(0, len(view), TLS_PIECE):
                self._tls.write(view[at : at + TLS_PIECE])
                if self._out.pending >= TLS_PIECE:
                    self._flush()
        self._flush()

    def read_into(self, view: memoryview) -> int:
        """What has come, at least one byte, into `view`: how many. EOFError where the connection has ended."""
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
        """Break off, whatever is under way."""
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
    """Waits at a port of this host for the host to come: who else comes is sent away."""

    def __init__(self, address: str, offer: Any) -> None:
        self._context = tls_context(True, offer["certificate"], offer["key"], offer["peer"])
        self._peer, self._come = offer["peer"], queue.Queue()  # type: str, queue.Queue[Tls]
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
            tls = Tls(connection, self._context, True)
            tls.shake_hands(self._peer)
            connection.settimeout(None)
            self._come.put(tls)
        except (OSError, EOFError, ValueError):
            connection.close()

    def host(self) -> Tls:
        """The connection of the host, which says that it has come. Nobody else is let in any more."""
        try:
            tls = self._come.get(timeout=HANDSHAKE_SECONDS)
        except queue.Empty:
            raise Failure("the host did not come to the direct channel") from None
        self.close()
        return tls

    def close(self) -> None:
        """Listen no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
