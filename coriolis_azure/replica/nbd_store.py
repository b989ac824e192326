"""Exports of NBD servers as stores, through libnbd's own Python binding; translates its errors into DestinationFailed.

libnbd's calls wait for the server however long it takes, so only its asynchronous half is used: each command waits in
`select.poll`, with a limit, and can be stopped. One connection serves an export, and one command at a time.
"""

from __future__ import annotations

import contextlib
import errno
import select
from bisect import bisect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from ..clock import Clock
from ..errors import DestinationFailed, InvalidInput, cleaned
from ..threads import Lock
from .medium import Content, Store
from .nbd_url import Exports

PATIENCE = 60.0  # seconds without a sign of the server until it counts as stalled
FLUSH_PATIENCE = 900.0  # a server may have much to flush
_TICK_MS = 200  # how soon a command notices that it is to stop
_MOST = 1 << 22  # bytes of one read or write
_MOST_CLEARED = 1 << 26  # bytes of one request to clear: some servers write zeros for it
_MAPPED = 1 << 30  # bytes of which the allocation is asked at once
_ZERO = 2  # LIBNBD_STATE_ZERO
_INSTALL = (
    "Install it from your distribution (Debian, Ubuntu: python3-libnbd; Fedora: python3-libnbd) for the same version "
    "of Python, in a virtual environment with --system-site-packages. PyPI does not have it: `nbd` there is another "
    "program. See docs/howto/nbd.md."
)
_REMEDIES = {
    errno.ENOSPC: "Free space where the server keeps the export, then run again: what had arrived is kept.",
    errno.EPERM: "Let the server write the export, then run again.",
    errno.EROFS: "Let the server write the export, then run again.",
    errno.EIO: "See the server's log, and check the storage under the export, then run again.",
    errno.ESHUTDOWN: "Start the server again, then run again: what had arrived is kept.",
}
_GONE = "See why the server or the network failed, start the server again, then run again: what had arrived is kept."


def binding() -> Any:
    """libnbd's Python binding. Raises InvalidInput if it is not there, or something else has its name."""
    try:
        found = import_module("nbd")
    except ImportError as error:
        raise InvalidInput(f"nbd:// needs libnbd's Python binding: {error}", remedy=_INSTALL) from error
    if not hasattr(found, "NBD"):
        raise InvalidInput("the Python module `nbd` that is installed is not libnbd's", remedy=_INSTALL)
    return found


class NbdStore:
    """One export. See Store. `disk`: its name; `stopped`: whether everything must fail from now on.

    Raises InvalidInput if the server cannot be reached or has no such export, or if it cannot be written safely; with
    `write`, also if it is read-only. `several`: whether the server has other disks of the VM, which it must tell apart.
    """

    is_device = True

    def __init__(
        self, export: Exports, disk: str, stopped: Callable[[], bool], *, write: bool, several: bool = False
    ) -> None:
        self.export, self.where, self._disk, self._stopped = export, export.uri, disk, stopped
        self.far = export.is_far
        self._nbd, self._clock, self._lock = binding(), Clock(), Lock()
        self._broken: str | None = None
        self._held: list[object] = []  # what a command that was given up may still use
        self._map: tuple[int, int, list[tuple[int, int]]] | None = None
        self._handle: Any = None
        try:
            self._connect(several=several)
            self._examine(write=write)
        except BaseException:
            self.close()
            raise

    # The connection

    def _connect(self, *, several: bool) -> None:
        try:
            if several:
                self._refuse_nameless()
            self._handle = handle = self._begun(options=False)
            self._until(handle.aio_is_ready, PATIENCE)
        except (self._nbd.Error, _Dead) as error:
            raise InvalidInput(
                f"{self.where} cannot be used: {_said(error)}",
                remedy="Check that the server runs there and serves an export of that name.",
            ) from error
        except _Silent as error:
            raise InvalidInput(
                f"{self.where} does not answer",
                remedy="Check the server. Some serve one client at a time: end what else uses the export.",
            ) from error

    def _begun(self, *, options: bool) -> Any:
        """A new connection. `options`: one that asks the server before it names the export."""
        handle = self._nbd.NBD()
        handle.set_uri_allow_local_file(True)  # the user's own, for TLS
        handle.add_meta_context("base:allocation")
        handle.set_opt_mode(options)
        handle.aio_connect_uri(self.export.uri)
        return handle

    def _refuse_nameless(self) -> None:
        """Raise InvalidInput if the server takes any name: all disks would be written to one export."""
        names: list[str] = []
        ended: list[int] = []

        def found(name: str, description: str) -> int:
            del description
            names.append(name)
            return 0

        def done(error: Any) -> int:
            ended.append(int(getattr(error, "value", error)))
            return 1

        self._handle = handle = self._begun(options=True)
        self._until(handle.aio_is_negotiating, PATIENCE)
        handle.aio_opt_list(found, done)
        self._until(lambda: bool(ended), PATIENCE)
        handle.aio_opt_abort()
        with contextlib.suppress(_Dead):
            self._until(handle.aio_is_closed, PATIENCE)
        if not ended[0] and self.export.name not in names:
            raise InvalidInput(
                f"{self.where}: the server does not list that export, so it may take any name for the same one",
                remedy="Serve each disk under its name, or at a socket of its own with {disk} in its path.",
            )

    def _examine(self, *, write: bool) -> None:
        handle = self._handle
        self.size = handle.get_size()
        least, most = (self._block_size(handle, kind) for kind in ("SIZE_MINIMUM", "SIZE_MAXIMUM"))
        self._least = max(1, least)
        self._most = max(self._least, min(most or _MOST, _MOST) // self._least * self._least)
        self._clears, self._maps = handle.can_zero(), handle.can_meta_context("base:allocation")
        self._flushes = handle.can_flush()
        if write and handle.is_read_only():
            raise InvalidInput(f"{self.where} is read-only", remedy="Serve it for writing: without -r.")
        if write and not self._flushes:
            raise InvalidInput(
                f"{self.where}: the server cannot flush, so nothing shows when the content is safe",
                remedy="Serve the export with flush, or by another server.",
            )

    def _block_size(self, handle: Any, kind: str) -> int:
        if not hasattr(handle, "get_block_size"):  # libnbd before 1.12
            return 0
        return int(handle.get_block_size(getattr(self._nbd, kind)))

    def _until(self, reached: Callable[[], bool], patience: float) -> None:
        """Let libnbd work until it has reached something. Raises _Dead, _Silent, or DestinationFailed if stopped."""
        handle, since = self._handle, self._clock.monotonic()
        while not reached():
            if handle.aio_is_dead() or handle.aio_is_closed():
                raise _Dead("the connection has ended")
            self._go_on()
            direction = handle.aio_get_direction()
            poll = select.poll()
            reading = direction & 1
            if direction:
                events = (select.POLLIN if reading else 0) | (select.POLLOUT if direction & 2 else 0)
                poll.register(handle.aio_get_fd(), events)
            ready = poll.poll(_TICK_MS)
            if not ready:
                if self._clock.monotonic() - since > patience:
                    raise _Silent
                continue
            since = self._clock.monotonic()
            if reading and ready[0][1] & ~select.POLLOUT:
                handle.aio_notify_read()
            else:
                handle.aio_notify_write()

    def _do(
        self, what: str, offset: int | None, begin: Callable[[Any], int], *, patience: float | None = None
    ) -> None:
        """One command, with the lock held. After one without an end the connection is of no use."""
        at = f" at offset {offset}" if offset is not None else ""
        remedy: str | None = _GONE
        try:
            if self._broken is not None:
                raise _Dead(self._broken)
            cookie = begin(self._handle)
            self._until(lambda: self._handle.aio_command_completed(cookie), patience or PATIENCE)
            return
        except self._nbd.Error as error:
            text, cause = _said(error), error
            gone = self._handle.aio_is_dead() or self._handle.aio_is_closed()
            if gone:
                self._broken = "the connection has ended"
            else:
                remedy = _REMEDIES.get(error.errnum, _REMEDIES[errno.EIO])
        except _Dead as error:
            text, cause = str(error), error
            self._broken = text
        except _Silent as error:
            text, cause = "the server has not answered in time", error
            self._broken = text
        except DestinationFailed:  # stopped
            self._broken = "it was stopped"
            raise
        raise DestinationFailed(
            f"{self.where} {what}{at}: {text}", remedy=remedy, disk=self._disk, offset=offset
        ) from cause

    def _go_on(self) -> None:
        if self._stopped():
            raise DestinationFailed(f"work on {self.where} was stopped", disk=self._disk)

    def close(self) -> None:
        """End the connection. May be repeated."""
        with contextlib.suppress(self._nbd.Error):
            if self._handle is not None and self._handle.aio_is_ready():
                self._handle.aio_disconnect()
        self._broken = self._broken or "it was closed"

    # Content

    def read(self, offset: int, length: int) -> bytes:
        """See Store."""
        if offset + length > self.size:
            raise DestinationFailed(
                f"{self.where} ends at offset {self.size}", disk=self._disk, offset=self.size
            )
        self._go_on()
        with self._lock:
            return self._read(offset, length)

    def _read(self, offset: int, length: int) -> bytes:
        begin, end = self._around(offset, length)
        parts = [self._read_piece(at, min(self._most, end - at)) for at in range(begin, end, self._most)]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return bytes(data) if len(data) == length else bytes(data[offset - begin : offset - begin + length])

    def _read_piece(self, offset: int, length: int) -> bytearray:
        buffer = self._nbd.Buffer(length)
        self._held = [buffer]
        self._do("cannot be read", offset, lambda handle: int(handle.aio_pread(buffer, offset)))
        return buffer.to_bytearray()  # type: ignore[no-any-return]

    def _around(self, offset: int, length: int) -> tuple[int, int]:
        """The range in whole blocks of the server."""
        least = self._least
        return offset // least * least, min(self.size, -(-(offset + length) // least) * least)

    def write(self, offset: int, data: Content) -> None:
        """See Store."""
        self._go_on()
        view = memoryview(data)
        with self._lock:
            self._map = None
            begin, end = self._around(offset, len(view))
            if (begin, end) != (offset, offset + len(view)):
                whole = bytearray(self._read(begin, end - begin))
                whole[offset - begin : offset - begin + len(view)] = view
                view = memoryview(whole)
            for start in range(0, len(view), self._most):
                self._write_piece(begin + start, view[start : start + self._most])

    def _write_piece(self, offset: int, data: memoryview) -> None:
        buffer = self._nbd.Buffer.from_bytearray(bytearray(data))
        self._held = [buffer]
        self._do("cannot be written", offset, lambda handle: int(handle.aio_pwrite(buffer, offset)))

    def zero(self, offset: int, length: int) -> None:
        """Have the server clear the range: it may free the space, but the range reads as zeros. See Store.

        A trim frees space, too, but promises nothing about what is read afterwards.
        """
        self._go_on()
        begin, end = -(-offset // self._least) * self._least, (offset + length) // self._least * self._least
        if offset + length == self.size:
            end = self.size
        if not self._clears or begin >= end:
            self._write_zeros(offset, offset + length)
            return
        self._write_zeros(offset, begin)
        self._write_zeros(end, offset + length)
        for at in range(begin, end, _MOST_CLEARED):
            self._clear_piece(at, min(_MOST_CLEARED, end - at))

    def _clear_piece(self, offset: int, length: int) -> None:
        with self._lock:
            self._map = None
            self._do("cannot be cleared", offset, lambda handle: int(handle.aio_zero(length, offset)))

    def _write_zeros(self, begin: int, end: int) -> None:
        for at in range(begin, end, _MOST):
            self.write(at, bytes(min(_MOST, end - at)))

    def reflink(self, source: Store, offset: int, length: int) -> bool:
        """See Store."""
        del source, offset, length
        return False

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield what does not read as zeros, as the server says; all of it if the server does not say. See Store."""
        end = offset + length
        while offset < end:
            until, data = self._mapped(offset, end)
            for at in range(max(0, bisect(data, (offset, self.size)) - 1), len(data)):
                start, size = data[at]
                if start >= end:
                    break
                low, high = max(start, offset), min(start + size, end)
                if low < high:
                    yield low, high - low
            offset = until

    def _mapped(self, offset: int, end: int) -> tuple[int, list[tuple[int, int]]]:
        """How far from `offset` on the allocation is known, and the extents with data there."""
        if not self._maps:
            return end, [(offset, end - offset)]
        with self._lock:
            if self._map is None or not self._map[0] <= offset < self._map[1]:
                self._map = self._ask_map(offset, end)
            return self._map[1], self._map[2]

    def _ask_map(self, offset: int, end: int) -> tuple[int, int, list[tuple[int, int]]]:
        begin, _ = self._around(offset, 1)
        until = min(self.size, max(begin + _MAPPED, begin + self._least))
        found: list[tuple[int, int]] = []
        last = begin

        def extent(context: str, start: int, entries: list[int], error: Any) -> int:
            nonlocal last
            del error
            if context == "base:allocation":
                last = start
                for size, flags in zip(entries[::2], entries[1::2], strict=True):
                    if not flags & _ZERO:
                        found.append((last, size))
                    last += size
            return 0

        def ask(handle: Any) -> int:
            return int(handle.aio_block_status(until - begin, begin, extent))

        try:
            self._do("does not tell what it holds", offset, ask)
        except DestinationFailed:
            if self._broken is not None:
                raise
        if last <= offset:  # no answer: all of it may hold data
            return offset, end, [(offset, end - offset)]
        return begin, last, found

    def resize(self, size: int) -> None:
        """Do nothing: an export keeps its size. See Store."""
        del size

    def flush(self) -> None:
        """See Store."""
        if self._flushes:
            with self._lock:
                self._do(
                    "cannot be flushed",
                    None,
                    lambda handle: int(handle.aio_flush()),
                    patience=FLUSH_PATIENCE,
                )

    @contextlib.contextmanager
    def uncached(self) -> Iterator[Callable[[int, int], Content]]:
        """See Store. Nothing is cached on this host; what the server's host caches, it has flushed before."""
        self.flush()
        self._map = None
        yield self.read


class _Dead(Exception):
    """The connection has ended."""


class _Silent(Exception):
    """The server has not answered in time."""


def _said(error: Exception) -> str:
    """What libnbd says, on one line, without what a server might put in to redraw a terminal."""
    return cleaned(str(error).removeprefix("nbd_"))
