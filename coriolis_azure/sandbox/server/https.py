"""The sandbox's HTTPS server, based on the standard library's threaded server.

Handshakes happen in each connection's thread, so a client that never completes one blocks nobody else. Request lines
may have 16 KiB: Azure's operation URLs have up to 5.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from coriolis_azure import tls
from coriolis_azure.sandbox.server.certificates import server_files
from coriolis_azure.sandbox.wire import Request, Response

LOG = logging.getLogger(__name__)
_LONGEST_LINE = 16 << 10
_LONGEST_BODY = 4 << 20
_IDLE_SECONDS = 300.0
_BODILESS = {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}


class Server(ThreadingHTTPServer):
    """Serves `handle` over HTTPS at 127.0.0.1, with certificates in `directory`. OSError if the port is in use."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handle: Callable[[Request], Response], directory: Path, port: int) -> None:
        certificate, key = server_files(directory)
        self.handle = handle
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.sslsocket_class = tls.Socket
        self._context.load_cert_chain(certificate, key)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """The base URL of the server."""
        return f"https://127.0.0.1:{self.server_port}"

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection without a handshake."""
        connection, peer = super().get_request()
        connection.settimeout(_IDLE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), peer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log at debug level only: connections are lost all the time."""
        del request
        LOG.debug("connection from %s ended", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def handle(self) -> None:
        try:
            self.request.do_handshake()
            super().handle()
        except (ssl.SSLError, ConnectionError, TimeoutError):
            LOG.debug("connection from %s was lost", self.client_address, exc_info=True)

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(_LONGEST_LINE + 1)
        if len(self.raw_requestline) > _LONGEST_LINE:
            self.requestline = self.command = self.request_version = ""
            self.send_error(414)
            self.close_connection = True
        elif not self.raw_requestline:
            self.close_connection = True
        elif self.parse_request():
            self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if length > _LONGEST_BODY:
            self.send_error(413)
            self.close_connection = True
            return
        body = self.rfile.read(length) if length else b""
        host = self.headers.get("Host") or f"127.0.0.1:{self.server.server_port}"
        request = Request(self.command, f"https://{host}{self.path}", dict(self.headers.items()), body)
        try:
            response = self.server.handle(request)
        except ConnectionError:
            raise
        except Exception:
            # A bug in the sandbox must not look like a network failure.
            LOG.exception("%s %s", request.method, request.path)
            document = {
                "error": {"code": "InternalServerError", "message": "The sandbox has a bug; see its log."}
            }
            response = Response.of(500, document)
        self._send(response)

    def _send(self, response: Response) -> None:
        """Send head and body in one write. A body that is shorter than the head says ends the connection."""
        body = response.body
        lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        if "Transfer-Encoding" in response.headers:
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        elif response.status not in _BODILESS and "Content-Length" not in response.headers:
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"Date: {self.date_time_string()}", "", ""]
        head = "\r\n".join(lines).encode("latin-1")
        if self.command != "HEAD" and len(body) < int(response.headers.get("Content-Length", 0)):
            self.close_connection = True
        self.wfile.write(head if self.command == "HEAD" else head + body)
