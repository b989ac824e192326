"""Our client of the orchestrator's SSH backup writer: several `write_data` processes on the target per disk.

Messages are pipelined, with up to 8 MiB unanswered; answers must come in order. An SSH session's window, 2 MiB with
OpenSSH, limits its throughput over a link with latency, so threads that write concurrently use receivers of their
own, over one connection. Their writes do not overlap, so the order between receivers does not matter. There are no
threads besides the writing ones: a thread that has to wait reads the answers, and one that meets a failure records it
for the others.

The orchestrator's own client also removes udev rules and edits lvm.conf on the target before it writes, so that no
volume group on the volumes is activated. We do not: the target belongs to the destination plugin, which deploys it
with the volumes attached, and editing the system of a machine that is not ours could break its other uses.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..clock import Clock, retried
from ..errors import DestinationFailed, HostKeyChanged, InvalidInput, StreamEnded, Unreachable
from ..readers import ssh
from ..replica.destinations import Content
from ..threads import Condition, Lock
from . import write_data

RECEIVERS = 6  # most receivers per device; by default an SSH server allows ten sessions on a connection
IN_FLIGHT = 8 << 20  # most bytes sent to a receiver and not answered yet
_PIECE = 4 << 20  # most zeros in one message
_SYNC_SECONDS = 600.0
_LAST_WORDS_SECONDS = 5.0
_PAUSES = (1.0, 3.0)  # seconds between attempts to reach the target
# Seconds between attempts to open a session where only one is allowed: OpenSSH's server needs a moment after the last.
_SESSION_PAUSES = (0.05, 0.1, 0.2, 0.5)
_OURS = ".coriolis-azure-write-data.py"
_REMEDY = (
    "Check that the target is up and accepts SSH from this host with the configured key, then run again."
)
_MEANING = {
    1: "it could not read the length of a message, or sudo refused to start it",
    2: "the length of a message is out of bounds",
    3: "it could not open a file",
    4: "a message contains no path and offset",
    5: "it could not open the device, or the stream ended within a message",
    6: "it could not seek on the device",
    7: "it could not write to the device",
    8: "it could not close the device",
    9: "it ran out of memory",
    10: "it does not know its arguments",
    11: "it could not read the id of a message",
    12: "the decompressed length of a message is out of bounds",
    13: "compressed data arrived damaged",
    14: "it could not send an answer",
    15: "the write lies beyond the end of the device",
    126: "it cannot be executed",
    127: "it was not found",
}


class Target:
    """The host with the devices. A writer.Backend.

    `details`: ip, port, username, and pkey (PEM, or an object with `write_private_key`) or password.
    """

    def __init__(self, details: dict[str, Any], *, compress: bool, clock: Clock, patience: float) -> None:
        self._host = ssh.Target(_login(details))
        self._compress, self._clock, self._patience = compress, clock, patience
        self._command = ""
        self._lock = Lock()

    def device(self, disk: str, path: str) -> Device:
        """The device at `path`. See Backend."""
        return Device(self, disk, path, compress=self._compress, patience=self._patience)

    def connect(self) -> ssh.Connection:
        """A connection; Unreachable after several attempts, or HostKeyChanged."""
        return retried(self._host.connect, Unreachable, _PAUSES, self._clock)

    def receiver(self, connection: ssh.Connection) -> str:
        """The command that starts `write_data`, which is installed if missing. StreamEnded if that fails."""
        with self._lock:
            self._command = self._command or self._prepared(connection)
            return self._command

    @property
    def ours(self) -> bool:
        """Whether the receiver is our own, which syncs by itself."""
        return _OURS in self._command

    def _prepared(self, connection: ssh.Connection) -> str:
        theirs = "exec sudo -n ./write_data"
        if self.run(connection, "test -f write_data") == 0:
            return f"chmod +x write_data && {theirs}"
        binary = _orchestrators()
        if binary is not None:
            self._push(connection, binary, "write_data", "755")
            return theirs
        self._push(connection, Path(write_data.__file__).read_bytes(), _OURS, "600")
        return f"exec sudo -n python3 {_OURS}"

    def _push(self, connection: ssh.Connection, content: bytes, name: str, mode: str) -> None:
        """Put a file into the login directory atomically."""
        command = f"umask 077 && cat > {name}.$$ && chmod {mode} {name}.$$ && mv {name}.$$ {name}"
        if self.run(connection, command, content) != 0:
            raise StreamEnded(f"{name} cannot be written to the login directory")

    def started(self, connection: ssh.Connection, command: str, patience: float) -> ssh.Program:
        """Start a program, retrying while the connection has no session for it. StreamEnded if that fails."""
        start = partial(connection.start, command, patience)
        return retried(start, ssh.SessionRefused, _SESSION_PAUSES, self._clock)

    def run(self, connection: ssh.Connection, command: str, content: bytes = b"", seconds: float = 0) -> int:
        """Run a command with `content` as its input; return its status. StreamEnded if none arrives in time."""
        patience = max(seconds, self._patience)
        with self.started(connection, command, patience) as program:
            # Without input, send no EOF: to a process that has already exited, EOF makes OpenSSH drop the connection.
            if content:
                program.send(content)
                program.finish()
            status = program.status(patience)
        if status is None:
            raise StreamEnded(f"{command!r} returned no status within {patience:g} seconds")
        return status


class Device:
    """One device, written through its own receivers. A writer.Device."""

    checkable = False

    def __init__(self, target: Target, disk: str, path: str, *, compress: bool, patience: float) -> None:
        self._target, self._disk, self._path = target, disk, path
        self._compress, self._patience = compress, patience
        self._connection: ssh.Connection | None = None
        self._command = ""
        self._receivers: list[Receiver] = []
        self._free: deque[Receiver] = deque()
        self._may_start = RECEIVERS
        self._changed = Condition()  # notified about free receivers and about a failure
        self._failing = Lock()
        self._failure: DestinationFailed | None = None

    def open(self) -> None:
        """Connect and start the first receiver. See Device."""
        try:
            self._connection = self._target.connect()
            self._command = self._target.receiver(self._connection)
            first = Receiver(self._target.started(self._connection, self._command, self._patience))
        except (Unreachable, HostKeyChanged, StreamEnded) as error:
            self.close()
            raise self._failed(error.message, None, _REMEDY) from error
        self._may_start -= 1
        self._receivers.append(first)
        self._free.append(first)

    def write(self, offset: int, data: Content) -> None:
        """Send `data`; a failure may be raised only by a later call. See Device."""
        prefix = self._prefix(offset)
        if self._compress:
            deflate = zlib.compressobj(1)
            packed = deflate.compress(prefix) + deflate.compress(data) + deflate.flush()
            if len(packed) < len(prefix) + len(data):
                self._send(offset, packed, b"", len(prefix) + len(data))
                return
        self._send(offset, prefix, data, 0)

    def zero(self, offset: int, length: int) -> None:
        """Send compressed zeros. See Device."""
        for start in range(offset, offset + length, _PIECE):
            size = min(_PIECE, offset + length - start)
            prefix = self._prefix(start)
            self._send(start, _packed_zeros(prefix, size), b"", len(prefix) + size)

    def flush(self) -> None:
        """Wait for all answers, end the receivers and sync. See Device."""
        connection = self._connected()
        if self._failure is not None:
            raise self._failure
        # All finish each step before the next one: the sync of one at its end covers the writes of all.
        for receiver in self._receivers:
            with self._watched(receiver):
                receiver.drain()
        for receiver in self._receivers:
            with self._watched(receiver):
                receiver.end()
        for receiver in self._receivers:
            with self._watched(receiver):
                receiver.ended(self._patience)
        if self._target.ours:
            return
        try:
            status = self._target.run(connection, "sudo -n sync", seconds=_SYNC_SECONDS)
        except StreamEnded as error:
            raise self._failed(f"the target's sync: {error.message}", None) from error
        if status != 0:
            raise self._failed(f"the target's sync ended with status {status}", None)

    def check(self) -> bool | None:
        """None: the protocol cannot ask what is on the device. See Device."""
        return None

    def quiet(self) -> bool:
        """Whether no receiver has anything left to write. See Device."""
        with self._changed:
            in_use = self._failure is None and len(self._free) < len(self._receivers)
        return not in_use and all(receiver.over(_LAST_WORDS_SECONDS) for receiver in self._receivers)

    def close(self) -> None:
        """Close the connection, which ends the receivers at any point. See Device."""
        if self._connection is not None:
            self._connection.close()

    def _prefix(self, offset: int) -> bytes:
        return self._path.encode() + b"\0" + write_data.OFFSET.pack(offset)

    def _send(self, offset: int, head: bytes, body: Content, inflated: int) -> None:
        receiver = self._taken()
        with self._watched(receiver):
            receiver.send(offset, head, body, inflated)
        with self._changed:
            self._free.append(receiver)
            self._changed.notify()

    def _taken(self) -> Receiver:
        """Take a receiver for exclusive use: a free one, a new one, or the next one that another thread frees.

        Receivers are used in turn, so that a failure of any of them is noticed soon.
        """
        while True:
            with self._changed:
                while self._failure is None and not self._free and not self._may_start:
                    self._changed.wait()
                if self._failure is not None:
                    raise self._failure
                if self._free:
                    return self._free.popleft()
                self._may_start -= 1
            if (started := self._started()) is not None:
                return started

    def _started(self) -> Receiver | None:
        """Start another receiver; None if the target allows no more."""
        try:
            receiver = Receiver(self._connected().start(self._command, self._patience))
        except StreamEnded:  # if the connection was lost, the other receivers report it
            with self._changed:
                self._may_start = 0
            return None
        with self._changed:
            self._receivers.append(receiver)
        return receiver

    def _connected(self) -> ssh.Connection:
        if self._connection is None:
            raise ValueError(f"{self._disk}: the device is not open")
        return self._connection

    @contextmanager
    def _watched(self, receiver: Receiver) -> Iterator[None]:
        """An error in the block fails the device for all threads; they all get the reason of the first one."""
        try:
            yield
        except BaseException as error:
            with self._failing:
                failure = self._failure or self._reason(receiver, error)
                with self._changed:
                    self._failure = failure
                    self._changed.notify_all()
                self.close()  # also wakes a thread that is starting a receiver
            if isinstance(error, StreamEnded):
                raise failure from error
            raise

    def _reason(self, receiver: Receiver, error: BaseException) -> DestinationFailed:
        """Why the receiver failed.

        Answers are in order, so the oldest message without one is where it failed.
        """
        program = receiver.program
        offset = receiver.oldest()
        if not isinstance(error, StreamEnded):
            # Part of a message may have been sent; the receiver would take the next message for its rest.
            return self._failed(f"a message could not be sent: {type(error).__name__}", offset)
        status = program.status(min(_LAST_WORDS_SECONDS, self._patience))
        reason = f"write_data on the target: {error.message}"
        if status:
            reason = f"write_data on the target ended with status {status}: {_MEANING.get(status, 'unknown')}"
            reason += f" ({words})" if (words := program.words()) else ""
        return self._failed(reason, offset)

    def _failed(self, reason: str, offset: int | None, remedy: str | None = None) -> DestinationFailed:
        where = "" if offset is None else f" (at offset {offset} of {self._path})"
        return DestinationFailed(
            f"{self._disk}: {reason}{where}", disk=self._disk, offset=offset, remedy=remedy
        )


class Receiver:
    """A `write_data` process on the target and its unanswered messages. Used by one thread at a time.

    StreamEnded if an answer is missing or not the one that is due.
    """

    def __init__(self, program: ssh.Program) -> None:
        self.program = program
        self._next = 0
        self._unanswered: deque[tuple[int, int, int]] = deque()  # id, offset, bytes
        self._in_flight = 0

    def send(self, offset: int, head: bytes, body: Content, inflated: int) -> None:
        """Send a message once it fits into IN_FLIGHT."""
        size = len(head) + len(body)
        while self._unanswered and self._in_flight + size > IN_FLIGHT:
            self._take_answer()
        self._take_ready()
        self._unanswered.append((self._next, offset, size))
        self._in_flight += size
        lengths = write_data.HEAD.pack(self._next, size) + write_data.NUMBER.pack(inflated)
        self._next += 1
        self.program.send(lengths + head)
        self.program.send(memoryview(body))

    def drain(self) -> None:
        """Wait for all outstanding answers."""
        while self._unanswered:
            self._take_answer()

    def end(self) -> None:
        """Ask it to flush to the medium and end."""
        self.program.send(write_data.HEAD.pack(self._next, 0))

    def ended(self, patience: float) -> None:
        """Wait for its last answer, which may take long because of the sync, and `patience` seconds for its status."""
        self.program.wait_up_to(max(_SYNC_SECONDS, patience))
        self._take(self._next)
        status = self.program.status(patience)
        if status != 0:
            raise StreamEnded("it was killed" if status is None else f"it ended with status {status}")
        self.program.close()  # frees the session for the sync, in case the server allows only one

    def over(self, patience: float) -> bool:
        """Whether it writes no more: it has answered everything, waiting `patience` for each answer, or has ended."""
        with suppress(StreamEnded):
            self.program.wait_up_to(patience)
            self.drain()
        return not self._unanswered or self.program.status(0) is not None

    def oldest(self) -> int | None:
        """The offset of the oldest message that is still unanswered."""
        with suppress(StreamEnded):
            self._take_ready()
        return self._unanswered[0][1] if self._unanswered else None

    def _take_ready(self) -> None:
        while self._unanswered and self.program.ready:
            self._take_answer()

    def _take_answer(self) -> None:
        self._take(self._unanswered[0][0])
        _, _, size = self._unanswered.popleft()
        self._in_flight -= size

    def _take(self, due: int) -> None:
        answer = self.program.receive(write_data.NUMBER.size)
        if len(answer) < write_data.NUMBER.size:
            raise StreamEnded("it ended")
        (number,) = write_data.NUMBER.unpack(answer)
        if number != due:
            raise StreamEnded(f"it answered message {number} instead of {due}")


def _orchestrators() -> bytes | None:
    """The `write_data` binary of the orchestrator's package; None if that is not installed or not built."""
    package = importlib.util.find_spec("coriolis")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / "resources" / "bin" / "write_data"
        if path.is_file():
            return path.read_bytes()
    return None


def _login(details: dict[str, Any]) -> ssh.Login:
    """The orchestrator's connection details as a Login."""
    for name in ("ip", "port", "username"):
        if not details.get(name):
            raise InvalidInput(f"the connection details of the ssh_backup_writer have no {name}")
    pkey = details.get("pkey") or ""
    if not isinstance(pkey, str):  # the orchestrator has turned the text into a key object
        text = io.StringIO()
        pkey.write_private_key(text)
        pkey = text.getvalue()
    password = details.get("password") or ""
    if not (pkey or password):
        raise InvalidInput("the connection details of the ssh_backup_writer have neither pkey nor password")
    return ssh.Login(details["ip"], int(details["port"]), details["username"], pkey, password)


@functools.lru_cache(maxsize=16)
def _zeros(length: int) -> bytes:
    """Zeros as the last block of a deflate stream."""
    deflate = zlib.compressobj(9, wbits=-15)
    return deflate.compress(bytes(length)) + deflate.flush()


def _packed_zeros(prefix: bytes, length: int) -> bytes:
    """A zlib stream of `prefix` and `length` zeros, made without processing the zeros."""
    deflate = zlib.compressobj(1)
    head = deflate.compress(prefix) + deflate.flush(zlib.Z_FULL_FLUSH)
    # In adler32 a zero byte leaves the lower half unchanged and adds it to the upper half.
    low, high = (sums := zlib.adler32(prefix)) & 0xFFFF, sums >> 16
    sums = (high + length * low) % 65521 << 16 | low
    return head + _zeros(length) + sums.to_bytes(4, "big")
