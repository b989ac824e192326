"""The network between this host and the workers, as something that can fail.

The sandbox is made to tell the relay's address as the worker's public one; what comes there goes on to the worker.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.settings import Environment
from harness.constants import DEADLINE

Answer = Callable[[Request], Response]
_DISKS = 4  # as many as a VM of the tests has


class Relay:
    """All SSH of a sandbox's workers goes through it, and where it is asked for, the direct channel. A context manager.

    Without that one, or while it is `blocked`, there is no way past SSH. `received` is the number of bytes that came
    from workers, `pieces` that of the pieces in both directions, `refuse` how many of the next connections are closed
    at once. SSH connections go to `astray` instead, while it is set. Any other one breaks after `lasts` bytes from the
    worker; -1: none does.
    """

    def __init__(self, azure: Sandbox, direct: bool = False) -> None:
        self.received = self.pieces = self.refuse = 0
        self._port = azure.environment()["export_worker_ssh_port"]
        ports = [self._port]
        if direct:
            first = Environment.from_json(azure.environment()).export_worker_data_port
            ports += range(first, first + _DISKS)
        self.blocked = False
        self.lasts = -1
        self.astray: tuple[str, int] | None = None
        self._acts: list[tuple[str, int, Callable[[], None]]] = []
        self._open: dict[socket.socket, int] = {}
        self._lock = threading.Lock()
        self._worker = ""
        self._damage = False
        parts = (random.randint(200, 250), random.randint(1, 250), random.randint(1, 250))
        self.address = "127.{}.{}.{}".format(*parts)
        self._listeners = [socket.create_server((self.address, port)) for port in ports]
        self._threads = [
            threading.Thread(target=self._accept, args=(listener,), name="relay", daemon=True)
            for listener in self._listeners
        ]
        for thread in self._threads:
            thread.start()

    def __call__(self, request: Request, answer: Answer) -> Response:
        """The sandbox's `intercept`: public addresses are the relay's."""
        response = answer(request)
        if "/publicIPAddresses/coriolis" in request.path and response.status < 300 and response.body:
            document = json.loads(response.body)
            if document.get("properties", {}).get("ipAddress"):
                self._worker = document["properties"]["ipAddress"]
                document["properties"]["ipAddress"] = self.address
                return replace(response, body=json.dumps(document).encode())
        return response

    def at(self, received: int, act: Callable[[], None]) -> None:
        """Do `act` when so many bytes more have come from workers; the last is not passed on yet."""
        self._acts.append(("received", self.received + received, act))

    def at_piece(self, pieces: int, act: Callable[[], None]) -> None:
        """Do `act` when so many pieces more have come from either side; the last is not passed on yet."""
        self._acts.append(("pieces", self.pieces + pieces, act))

    def quiet(self) -> None:
        """Forget what was to be done, and let all connections in."""
        self._acts, self.refuse, self._damage = [], 0, False

    def cut(self, but_ssh: bool = False) -> None:
        """Break all connections."""
        with self._lock:
            for end, port in self._open.items():
                if port != self._port or not but_ssh:
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    def damage(self) -> None:
        """One of the next bytes from a worker arrives as another one."""
        self._damage = True

    def close(self) -> None:
        """End it."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        port = listener.getsockname()[1]
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            if self.blocked and port != self._port:
                near.close()
                continue
            if self.refuse > 0:
                self.refuse -= 1
                near.close()
                continue
            try:
                astray = self.astray if port == self._port else None
                far = socket.create_connection(astray or (self._worker, port), timeout=DEADLINE)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._open |= {near: port, far: port}
            for source, sink in ((near, far), (far, near)):
                pump = threading.Thread(target=self._pump, args=(source, sink, source is far), daemon=True)
                pump.name = "relay"
                pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_worker: bool) -> None:
        left = self.lasts if from_worker and self._open[source] != self._port else -1
        with contextlib.suppress(OSError):
            while piece := source.recv(min(32768, left) if left >= 0 else 32768):
                sink.sendall(self._seen(piece, from_worker))
                left -= len(piece) if left >= 0 else 0
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open.pop(source, None)
        source.close()

    def _seen(self, piece: bytes, from_worker: bool) -> bytes:
        """Count the piece, do what is due, and give back what is passed on."""
        with self._lock:
            self.pieces += 1
            self.received += len(piece) if from_worker else 0
            due = [act for counter, at, act in self._acts if at <= getattr(self, counter)]
            self._acts = [each for each in self._acts if each[1] > getattr(self, each[0])]
        for act in due:
            act()
        if self._damage and from_worker:
            self._damage = False
            middle = len(piece) // 2
            return piece[:middle] + bytes([piece[middle] ^ 0x20]) + piece[middle + 1 :]
        return piece
