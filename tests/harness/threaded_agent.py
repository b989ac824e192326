"""An agent in threads of this process: its code and its messages, without the start of a Python."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from coriolis_azure.agent import main, scan, wire
from coriolis_azure.errors import ConnectionLost, StreamEnded


class ThreadedAgent:
    """A Stream to an agent. The connection is lost once `lasts` bytes were read; -1: it lasts."""

    def __init__(self, lasts: int = -1) -> None:
        self._input, self._to = os.pipe()
        self._from, self._output = os.pipe()
        self._lasts, self._closed, self._writing = lasts, False, threading.Lock()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        out = wire.Output(wire.pipe_writer(self._output))
        incoming = None
        with suppress(EOFError, OSError, wire.Failure):  # the host is gone
            job = main.receive(self._input)
            incoming = wire.Input(self._input, gone=lambda: None)
            name = main.chosen(job)
            reading = scan.Scan(job, name, incoming, out)
            reading.fd, reading.device = scan.open_device(job["device_candidates"], job["size"], job["wait"])
            out.send_json(wire.READY, {"size": reading.size, "hash": name, "port": 0, "why": "not wanted"})
            incoming.go()
            with os.fdopen(reading.fd):
                reading.run()
        os.close(self._output)
        if incoming is not None:
            incoming.listener.join()
        os.close(self._input)

    def read(self, size: int, /) -> bytes:
        """See Stream."""
        if self._lasts == 0:
            raise ConnectionLost("the connection was cut")
        data = os.read(self._from, size if self._lasts < 0 else min(size, self._lasts))
        if not data:
            raise StreamEnded("the agent has ended")
        self._lasts -= len(data) if self._lasts > 0 else 0
        return data

    def write(self, data: bytes, /) -> None:
        """See Stream."""
        view = memoryview(data)
        while view:
            with self._writing:  # once closed, the number of the pipe may be another agent's
                if self._closed:
                    raise StreamEnded("the connection was closed")
                try:
                    view = view[os.write(self._to, view) :]
                except OSError as error:
                    raise StreamEnded("the agent has ended") from error

    def close(self) -> None:
        """See Stream."""
        with self._writing:
            if self._closed:
                return
            self._closed = True
            os.close(self._to)
        os.close(self._from)
        self._thread.join()
