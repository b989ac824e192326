"""TLS sockets that are closed as soon as they fail, instead of when they are garbage-collected, and that wait for no
answer for ever.
"""

from __future__ import annotations

import math
import ssl
import time
from typing import Any

# An answer of a few MiB takes longer only on a line with which nothing can be copied.
ANSWER_SECONDS = 30 * 60.0


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


class AskingSocket(Socket):
    """The same for a client that sends a request and reads its answer: that ends within ANSWER_SECONDS.

    Otherwise there is a TimeoutError. A socket's own timeout begins again with each byte, so an answer that trickles
    would never end.
    """

    _asked = math.inf

    def send(self, *args: Any, **options: Any) -> int:
        """Send as usual."""
        self._asked = time.monotonic()
        return super().send(*args, **options)

    def recv_into(self, *args: Any, **options: Any) -> int:
        """Receive as usual, until the answer takes too long."""
        if time.monotonic() - self._asked > ANSWER_SECONDS:
            raise TimeoutError("the answer does not end")
        return super().recv_into(*args, **options)
