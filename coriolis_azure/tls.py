"""TLS sockets of ours: closed where they fail, and not when the garbage collector comes by."""

from __future__ import annotations

import ssl
from typing import Any


class Socket(ssl.SSLSocket):
    """What an SSLContext makes of a connection, as its `sslsocket_class`.

    Python before 3.11.8 and 3.12.2 forgets to close what its peer has reset before the handshake began
    (https://github.com/python/cpython/issues/113280): it looks with `recv` whether anything came yet.
    """

    def recv(self, *args: Any, **options: Any) -> bytes:
        """As of any socket; one that is reset is closed."""
        try:
            return super().recv(*args, **options)
        except ConnectionError:
            self.close()
            raise
