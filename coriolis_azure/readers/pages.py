"""Reads a VHD blob through its page ranges, in the words of the agent."""

from __future__ import annotations

import socket
from contextlib import suppress

from ..agent import main, scan, wire
from ..agent.wire import Failure, Output
from ..azure.blobs import Blob, Pages
from ..errors import StreamEnded
from ..model import Json
from ..threads import Lock, aside

_READERS = 8


class _PageScan(scan.Scan):
    """A disk in the pages of a blob; those that are not allocated are zeros without being asked for."""

    threads = _READERS
    ended = False

    def __init__(
        self, job: Json, name: str, heard: wire.Input, out: Output, blob: Blob, pages: Pages
    ) -> None:
        super().__init__(job, name, heard, out)
        self._blob, self._pages = blob, pages

    def run(self) -> None:
        """See Scan. This process goes on: where it fails, threads that still wait for a buffer are to end."""
        try:
            super().run()
        finally:
            for _ in range(self.threads):
                self.buffers.put(self.spare)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` with these bytes of the disk."""
        if self.ended:
            raise Failure("the reading was ended", offset)
        length = len(view)
        view[:] = bytes(length)
        for start, size in self._pages.within(offset, length):
            view[start - offset : start - offset + size] = self._blob.read(start, size)

    def drop(self, offset: int, length: int) -> None:
        """Nothing is kept."""


class DirectStream:
    """A disk in a page blob, read and hashed in this process: a transfer.Stream that speaks as the agent does."""

    def __init__(self, blob: Blob, size: int) -> None:
        self._blob, self._size = blob, size
        self._lock = Lock()
        self._failure: Exception | None = None
        self._scan: _PageScan | None = None
        self._ours, self._theirs = socket.socketpair()
        self._closed = False
        self._ended = aside(self._serve)

    def read(self, size: int) -> bytes:
        """What there is, `size` bytes at most; the AzureError that ended the reading, or StreamEnded."""
        try:
            part = self._ours.recv(size)
        except OSError:
            part = b""
        if not part:
            if self._failure is not None and not self._closed:
                raise self._failure
            raise StreamEnded(f"the reading of {self._blob.url} was ended")
        return part

    def write(self, data: bytes) -> None:
        """All of `data`."""
        try:
            self._ours.sendall(data)
        except OSError as error:
            raise self._failure or StreamEnded(f"the reading of {self._blob.url} was ended") from error

    def close(self) -> None:
        """End the reading."""
        with self._lock:
            self._closed = True
            if self._scan is not None:
                self._scan.ended = True
            with suppress(OSError):
                self._ours.shutdown(socket.SHUT_RDWR)
            self._ended()
            self._ours.close()

    def _serve(self) -> None:
        """The agent's part: what its `main` does, with a blob for a device."""
        out = Output(wire.pipe_writer(self._theirs.fileno()))
        heard: wire.Input | None = None
        try:
            job = main.receive(self._theirs.fileno())
            heard = wire.Input(self._theirs.fileno(), job["first"], gone=lambda: None)
            name = main.chosen(job)
            scan = self._scan = _PageScan(job, name, heard, out, self._blob, self._blob.pages(self._size))
            out.send_json(wire.READY, {"device": self._blob.url, "size": self._size, "hash": name})
            heard.go()
            scan.run()
        except (EOFError, OSError, Failure):
            pass  # the host has hung up
        except Exception as error:  # noqa: BLE001  (it is raised where the stream is read)
            self._failure = error
        finally:
            with suppress(OSError):
                self._theirs.shutdown(socket.SHUT_WR)
            if heard is not None:
                heard.listener.join()  # it ends with `close`; until then it has the socket
            self._theirs.close()
