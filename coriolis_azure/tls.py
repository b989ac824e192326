"""A TLS socket that is closed as soon as it fails, instead of when it is garbage-collected."""

from __future__ import annotations

import ssl
from typing import Any


class Socket(ssl.SSLSocket):
    """The `sslsocket_class` for our SSLContexts.

    Python before 3.11.8 and 3.12.2 does not close a socket that the peer reset before the handshake began
    (https://github.com/python/cpython/issues/113280). It calls `recv` then, to look for early data.
    """

    def recv(self, *args: Any, **options: Any) -> bytes:
        """Receive as usual, but close the socket if the connection fails."""
        try:
            return super().recv(*args, **options)
        except ConnectionError:
            self.close()
            raise
