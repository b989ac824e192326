"""The direct channel: TLS on a port of the worker, without SSH. Only the agent writes to it.

Each side accepts exactly one certificate of the other; both were made for this run and come with the job. If the worker
is far away, the channel has several connections, because the buffers of one would not fill the line.
"""

import contextlib
import os
import queue
import socket
import ssl
import threading
from typing import Any, List, Tuple

from .wire import Failure

HANDSHAKE_SECONDS = 5.0
TLS_PIECE = 256 << 10  # bytes encrypted at a time
STRIPE = 256 << 10  # bytes of the stream that go over one connection before the next one's turn
RECORD = 16 << 10  # most bytes in a record of TLS
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
        self._room = memoryview(bytearray(RECORD if server else TLS_PIECE))  # the server hardly reads

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


class Stripes:
    """One stream over one or several connections, which take turns after each `STRIPE` bytes. One side writes."""

    def __init__(self, connections: List[Tls]) -> None:
        self._connections, self._at = connections, 0

    def __len__(self) -> int:
        """The number of connections."""
        return len(self._connections)

    def write(self, buffers: List[Any]) -> None:
        """Write a list of buffers."""
        parts = []  # type: List[memoryview]
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                tls, room = self._turn()
                parts.append(view[:room])
                self._at += len(parts[-1])
                if len(parts[-1]) == room:
                    tls.write(parts)
                    parts = []
                view = view[room:]
        if parts:
            self._turn()[0].write(parts)

    def read_into(self, view: memoryview) -> int:
        """Read available bytes into `view` and return how many, at least one. EOFError at the end."""
        tls, room = self._turn()
        done = tls.read_into(view[:room])
        self._at += done
        return done

    def _turn(self) -> Tuple[Tls, int]:
        """The connection whose turn it is, and how many more bytes go over it."""
        turns, within = divmod(self._at, STRIPE)
        return self._connections[turns % len(self)], STRIPE - within

    def close(self) -> None:
        """Break the connections off, even during reads and writes."""
        for tls in self._connections:
            tls.close()


class Listener:
    """Accepts TLS connections that the peer's certificate authenticates, and rejects all others.

    The peer's first byte on each is its number.
    """

    def __init__(self, address: str, offer: Any) -> None:
        self._context = tls_context(offer["certificate"], offer["key"], offer["peer"], server=True)
        self._peer = offer["peer"]
        self._accepted = queue.Queue()  # type: queue.Queue[Tuple[int, Tls]]
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
            number = bytearray(1)
            tls.read_into(memoryview(number))
            connection.settimeout(None)
            self._accepted.put((number[0], tls))
        except (OSError, EOFError, ValueError):
            connection.close()

    def host(self, count: int) -> Stripes:
        """The host's first `count` connections, after it has said that it has them. No more are accepted afterwards."""
        found = {}  # type: dict[int, Tls]
        while not all(number in found for number in range(count)):
            try:
                number, tls = self._accepted.get(timeout=HANDSHAKE_SECONDS)
            except queue.Empty:
                raise Failure("the host did not connect to the direct channel") from None
            found[number] = tls
        self.close()
        return Stripes([found[number] for number in range(count)])

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
