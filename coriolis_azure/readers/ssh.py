"""SSH connections with pinned host keys: to the worker, and to the target that the orchestrator names.

We generate the worker's host key and pass it through cloud-init, so even the first connection knows it; no other key
is ever accepted. The target's key is trusted on first use: every later connection of a run must show the same one.
"""

from __future__ import annotations

import hashlib
import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from paramiko.ssh_exception import AuthenticationException, ChannelException, SSHException

from .. import agent
from ..clock import Clock
from ..errors import (
    AgentFailed,
    ConnectionLost,
    CoriolisAzureError,
    HostKeyChanged,
    StreamEnded,
    Unreachable,
    cleaned_output,
    exhausted,
)
from ..events import Notice, Report, Wait
from ..model import Worker
from ..threads import Lock, within
from .channel import SILENCE_SECONDS
from .keys import private_key
from .paramiko_internals import (
    TAKEN,
    agree_on_new_keys_after,
    receive_into_blocks,
    refuse_what_is_too_large,
    usual_window,
    wait_for_status,
)

# A worker answers about a minute after Azure reports it as running; slow images take longer.
READY_SECONDS = 600.0
# Time for a known worker to come back: enough for a network outage of a minute or a reboot.
RECONNECT_SECONDS = 300.0
_RETRY_SECONDS = 2.0
_MOST_LOST = 3  # connections in a row that may be lost while the same is asked
_CONNECT_SECONDS = 15.0
# A connection ends if a keepalive is not acknowledged for a minute: after 75 seconds in all.
_KEEPALIVE_SECONDS = 15
_DEAD_SECONDS = 60
# AES-GCM first: paramiko's own preference, AES-CTR with a separate MAC, takes twice the time.
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes256-ctr", "aes128-ctr")
# Rekeying stops the data for two round trips. paramiko does it every 512 MiB, but an AES key is good for 64 GiB
# (RFC 4344, 3.2).
_REKEY_BYTES = 4 << 30
# Enough for 500 MiB/s over a round trip of 20 ms, all disks together. It is also what may pile up in memory; a
# malicious server can make it twice as much.
WINDOW = 10 << 20
# The worker's Python starts with this: it reads so many bytes and runs them if their digest matches. Python 3.5.
_START = """# coriolis-azure agent
import hashlib, os, sys
size, digest, code = int(sys.argv.pop(1)), sys.argv.pop(1), b""
while len(code) < size:
    part = os.read(0, size - len(code))
    if not part:
        sys.exit(0)
    code += part
if hashlib.sha256(code).hexdigest() != digest:
    sys.exit("the agent was damaged on its way to the worker")
exec(compile(code, "agent", "exec"))
"""
_BROKEN = (SSHException, OSError, EOFError)  # what paramiko raises on a lost connection
_STDERR_BYTES = 4096
_BOOT_ID_BYTES = 64  # a boot id has 36, then a newline
_BOOT_ID_SECONDS = 60.0
_BY_SIGNAL = 128  # a shell reports a signal as this plus its number
_PACKET_BYTES = 32768  # what every server accepts in one packet
_PACKET_TO_US = 192 << 10  # the most that a server may put into one: larger ones cost less than many

T = TypeVar("T")


def agent_words(source: bytes) -> list[str]:
    """The arguments that make Python read the program `source` from stdin and run nothing else.

    -I keeps it from importing files in the login directory.
    """
    return ["-I", "-c", _START, str(len(source)), hashlib.sha256(source).hexdigest()]


class Connection:
    """An SSH connection. A context manager; leaving it ends every program started through it."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = transport

    def try_agent(self) -> None:
        """Check that the agent can be started; AgentFailed if the worker lacks Python or passwordless sudo."""
        with self.start_agent() as stream:
            stream.finish()

    def start_agent(self, window: int = WINDOW) -> AgentStream:
        """Start the agent as root and return the stream to it. `window`: most bytes in flight to us.

        The program itself is sent over the stream, so no file is left behind and nothing on the worker can alter it.
        """
        source = agent.program()
        # "$3" is the server's own address, as this host sees it; sudo does not pass SSH_CONNECTION on.
        command = f'set -- $SSH_CONNECTION; exec sudo -n python3 {shlex.join(agent_words(source))} "$3"'
        stream = self._run(command, window)
        try:
            stream.write(source)
        except ConnectionLost:
            raise stream.ended() from None
        return stream

    def boot_id(self) -> str:
        """The id of the worker's current boot. AgentFailed if the command fails, ConnectionLost as its name says.

        Before it answers, what the worker has written is on its disk: a worker that is reset within half a minute of
        its first boot would otherwise come up with an empty host key, and its SSH server would not start.
        """
        output, late = b"", False

        def give_up() -> None:
            nonlocal late
            late = True
            stream.close()

        try:
            with (
                self._run("sync; cat /proc/sys/kernel/random/boot_id") as stream,
                within(_BOOT_ID_SECONDS, give_up),
            ):
                while not output.endswith(b"\n") and len(output) < _BOOT_ID_BYTES:
                    output += stream.read(_BOOT_ID_BYTES)
        except ConnectionLost as error:
            if not late:
                raise
            raise ConnectionLost(
                f"the worker did not tell its boot id within {_BOOT_ID_SECONDS:g} seconds: its disk may be stuck",
                remedy="Run again; if it repeats, choose another export_worker_image or export_worker_size.",
            ) from error
        return output.decode(errors="replace").strip()

    def start(self, command: str, patience: float) -> Program:
        """Start any command other than the agent; see Program for `patience`.

        SessionRefused if the server allows no further session on this connection.
        """
        try:
            channel = self._executing(command, usual_window(self._transport), patience)
        except ChannelException as error:
            raise SessionRefused(
                f"it allows this connection no more sessions (MaxSessions): {error}"
            ) from error
        except Exception as error:
            raise exhausted(error) or StreamEnded(f"the connection was lost: {_reason(error)}") from error
        return Program(channel, patience)

    def close(self) -> None:
        """Close the connection; pending calls raise ConnectionLost, or StreamEnded in a Program."""
        self._transport.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, command: str, window: int = WINDOW) -> AgentStream:
        try:
            return AgentStream(self._executing(command, window, SILENCE_SECONDS))
        except Exception as error:
            text = f"the connection to the worker was lost: {_reason(error)}"
            raise exhausted(error) or ConnectionLost(text) from error

    def _executing(self, command: str, window: int, patience: float) -> paramiko.Channel:
        """A session that runs `command`. Raises whatever ended the thread that reads the connection."""
        channel = self._transport.open_session(
            window_size=window, max_packet_size=_PACKET_TO_US, timeout=_CONNECT_SECONDS
        )
        receive_into_blocks(channel, window)
        channel.settimeout(patience)

        def give_up() -> None:
            with suppress(*_BROKEN):
                channel.close()

        try:
            with within(_CONNECT_SECONDS, give_up):  # paramiko itself waits without a limit
                channel.exec_command(command)
        except BaseException:
            give_up()
            raise
        return channel


class SessionRefused(StreamEnded):
    """The server allows no further session on a connection. OpenSSH refuses briefly even after one has ended."""


class AgentStream:
    """A Stream to a program on the worker."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._rest = memoryview(b"")

    def read(self, size: int) -> memoryview:
        """Read available output, at most `size` bytes; AgentFailed or ConnectionLost once it has ended."""
        if not self._rest:
            try:
                part = self._channel.recv(TAKEN)
            except _BROKEN as error:
                raise ConnectionLost(f"the connection to the worker was lost: {_reason(error)}") from error
            if not part:
                raise self.ended()
            self._rest = memoryview(part)
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece

    def write(self, data: bytes) -> None:
        """Write all of `data` to the program's input."""
        try:
            self._channel.sendall(data)
        except _BROKEN as error:
            raise ConnectionLost(f"the connection to the worker was lost: {_reason(error)}") from error

    def finish(self) -> None:
        """Close the program's input and wait for it. AgentFailed if it fails, ConnectionLost if that is unknown."""
        try:
            self._channel.shutdown_write()
        except _BROKEN as error:
            raise ConnectionLost(f"the connection to the worker was lost: {_reason(error)}") from error
        if not wait_for_status(self._channel, SILENCE_SECONDS):
            raise ConnectionLost("the program on the worker does not end")
        if self._channel.recv_exit_status() != 0:
            raise self.ended()

    def close(self) -> None:
        """Close the program's input and output."""
        with suppress(*_BROKEN):
            self._channel.close()

    def __enter__(self) -> AgentStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ended(self) -> AgentFailed | ConnectionLost:
        """The error that says why the output ended, with what the program wrote to stderr."""
        if not self._channel.exit_status_ready():
            wait_for_status(self._channel, _CONNECT_SECONDS)
        status = self._channel.recv_exit_status() if self._channel.exit_status_ready() else -1
        if status < 0:  # no status: the connection was lost, or a signal ended the program
            return ConnectionLost("the connection to the worker was lost")
        if status > _BY_SIGNAL:
            return ConnectionLost("the program on the worker was killed")
        message = ""
        self._channel.settimeout(_CONNECT_SECONDS)
        with suppress(TimeoutError):
            stderr = bytes(self._channel.recv_stderr(_STDERR_BYTES)).decode(errors="replace")
            message = " | ".join(line.strip() for line in stderr.splitlines() if line.strip())
        return AgentFailed(f"the program on the worker ended with status {status}: {message or 'no message'}")


class Program:
    """A program on a host: its input, its output, and its exit status.

    A call raises StreamEnded if the other side is silent for `patience` seconds or the connection is lost. `close`
    from another thread wakes pending calls.
    """

    def __init__(self, channel: paramiko.Channel, patience: float) -> None:
        self._channel = channel
        self._patience = patience

    @property
    def ready(self) -> bool:
        """Whether output can be received without waiting."""
        return self._channel.recv_ready()

    def send(self, data: bytes | memoryview) -> None:
        """Write all of `data` to the program's input."""
        with self._translated():
            view = memoryview(data)
            while view:  # paramiko's own loop would copy the rest after each packet
                view = view[self._channel.send(view[:_PACKET_BYTES].tobytes()) :]

    def receive(self, size: int) -> bytes:
        """Read `size` bytes of the program's output; fewer if it ends before."""
        pieces = bytearray()
        with self._translated():
            while len(pieces) < size and (piece := self._channel.recv(size - len(pieces))):
                pieces += piece
        return bytes(pieces)

    def wait_up_to(self, patience: float) -> None:
        """Change the patience for later calls."""
        self._patience = patience
        self._channel.settimeout(patience)

    def finish(self) -> None:
        """Close the program's input."""
        with self._translated():
            self._channel.shutdown_write()

    def status(self, seconds: float) -> int | None:
        """The exit status; None if none arrives within `seconds`."""
        wait_for_status(self._channel, seconds)
        if not self._channel.exit_status_ready():
            return None
        status = self._channel.recv_exit_status()
        return status if status >= 0 else None

    def words(self) -> str:
        """The last line that the program has written to stderr so far, cleaned."""
        if not self._channel.recv_stderr_ready():
            return ""
        lines = bytes(self._channel.recv_stderr(_STDERR_BYTES)).strip().splitlines()
        return cleaned_output(lines[-1], 300) if lines else ""

    def close(self) -> None:
        """Close the program's input and output, which ends it."""
        with suppress(*_BROKEN):
            self._channel.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Translate what paramiko raises in the block to StreamEnded."""
        try:
            yield
        except TimeoutError as error:
            raise StreamEnded(f"nothing was heard for {self._patience:g} seconds") from error
        except _BROKEN as error:
            # A program that ends while we write to it closes only its channel; the connection stays up.
            ended = self._channel.closed and self._channel.get_transport().is_active()
            raise StreamEnded(
                "it ended" if ended else f"the connection was lost: {_reason(error)}"
            ) from error


@dataclass(frozen=True)
class Login:
    """How to sign in to the orchestrator's target: with a private key (PEM), or else a password."""

    address: str
    port: int
    username: str
    private_key: str = field(default="", repr=False)
    password: str = field(default="", repr=False)


class Target:
    """The orchestrator's target, with its host key pinned on first use. InvalidInput if our key is unreadable."""

    def __init__(self, login: Login) -> None:
        self._login = login
        self._ours = private_key(login.private_key) if login.private_key else None
        self._key = ""
        self._lock = Lock()

    def connect(self) -> Connection:
        """A new connection. Unreachable if it fails; HostKeyChanged if the host key is not the first one seen."""
        login = self._login
        where = f"the target at {login.address} port {login.port}"
        transport = _opened(login.address, login.port, where)
        with _signing_in(transport, where):
            shown = transport.get_remote_server_key()
            line = f"{shown.get_name()} {shown.get_base64()}"
            with self._lock:
                self._key = self._key or line
            if line != self._key:
                raise HostKeyChanged(f"{where} shows a different host key than before")
            if self._ours is not None:
                transport.auth_publickey(login.username, self._ours)
            else:
                transport.auth_password(login.username, login.password)
            transport.set_keepalive(_KEEPALIVE_SECONDS)
        return Connection(transport)


class Line:
    """Starts agents on a worker, reconnecting as often as needed. A context manager.

    `close`, from any thread, is final: pending calls soon end.
    """

    def __init__(
        self,
        worker: Worker,
        clock: Clock,
        report: Report,
        window: int = WINDOW,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        """`gone`: whether the worker no longer exists, so that waiting for it is useless."""
        self._worker, self._clock, self._report, self._window = worker, clock, report, window
        self._gone = gone
        self._connection: Connection | None = None
        self._closed = False

    def connect(self) -> Connection:
        """Open a new connection and close the last one. Unreachable as for `connect`; HostKeyChanged at once."""
        if self._connection is not None:
            self._connection.close()
        self._connection = connect(
            self._worker,
            self._clock,
            self._report,
            RECONNECT_SECONDS,
            lambda: self._closed or self._gone(),
            is_set_up=True,
        )
        if self._closed:
            self._connection.close()
            raise Unreachable("the transfer was cancelled")
        return self._connection

    def agent(self) -> AgentStream:
        """Start an agent. AgentFailed if it cannot be started, ConnectionLost if the connection is lost."""
        return (self._connection or self.connect()).start_agent(self._window)

    def close(self) -> None:
        """Close the connection for good. May be repeated."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(
    worker: Worker,
    clock: Clock,
    report: Report,
    patience: float = READY_SECONDS,
    given_up: Callable[[], bool] = lambda: False,
    *,
    is_set_up: bool = False,
) -> Connection:
    """Connect to `worker`, waiting until it is up.

    After `patience` seconds, or once `given_up`, raises Unreachable if nothing answers and HostKeyChanged if another
    system does. HostExhausted is raised at once. A worker that `is_set_up` has shown its key before, so another key
    means another system, and waiting is useless.
    """
    waiting = Wait(report, clock, "the worker to answer on SSH", patience)
    while True:
        try:
            return Connection(_connected(worker))
        except (HostKeyChanged, Unreachable) as error:
            # The worker's SSH server may briefly use the image's own keys, until cloud-init has installed ours.
            # Until then we send nothing to it.
            is_other = is_set_up and isinstance(error, HostKeyChanged)
            if is_other or waiting.left < 0 or given_up():
                raise error
            waiting.pause(_RETRY_SECONDS)


def asked(
    ask: Callable[[Connection], T],
    worker: Worker,
    clock: Clock,
    report: Report,
    patience: float = READY_SECONDS,
    given_up: Callable[[], bool] = lambda: False,
) -> T:
    """Connect to `worker`, and return what `ask` returns of the connection, which is closed then.

    If the connection is lost meanwhile, another one is asked, a few times. Raises what `connect` and `ask` raise.
    """
    lost = 0
    while True:
        try:
            with connect(worker, clock, report, patience, given_up) as connection:
                return ask(connection)
        except ConnectionLost as error:
            lost += 1
            if lost == _MOST_LOST or given_up():
                raise
            report(Notice(f"{error}; trying again"))


def _connected(worker: Worker) -> paramiko.Transport:
    where = f"the worker at {worker.address} port {worker.port}"
    transport = _opened(worker.address, worker.port, where)
    with _signing_in(transport, where):
        shown = transport.get_remote_server_key()
        if f"{shown.get_name()} {shown.get_base64()}" != worker.host_key:
            raise HostKeyChanged(
                f"what answers at {worker.address} port {worker.port} is not our worker: its host key differs"
            )
        transport.auth_publickey(worker.username, _own_key(worker.private_key))
        transport.set_keepalive(_KEEPALIVE_SECONDS)
    return transport


def _own_key(text: str) -> paramiko.PKey:
    """Load a key made by `client_key`, without validation, which took a third of the connection's start."""
    try:
        key = serialization.load_pem_private_key(text.encode(), None, unsafe_skip_rsa_key_validation=True)
    except ValueError:  # not one of ours
        return private_key(text)
    return paramiko.RSAKey(key=key) if isinstance(key, rsa.RSAPrivateKey) else private_key(text)


class _BufferedSocket(socket.socket):
    """A socket for paramiko, which reads each packet in two pieces.

    Received data is acknowledged at once: before a program runs, OpenSSH's server sends no packet while the previous
    one is unacknowledged (Nagle), and by default our kernel delays acknowledgements by 40 ms.
    """

    _received, _pages = memoryview(b""), memoryview(b"")

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Receive at most `size` bytes. Only one thread may do so."""
        if not self._received:
            self._pages = self._pages or memoryview(bytearray(TAKEN))
            self._received = self._pages[: super().recv_into(self._pages, 0, flags)]
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        part, self._received = bytes(self._received[:size]), self._received[size:]
        return part


def _opened(address: str, port: int, where: str) -> paramiko.Transport:
    """An encrypted connection before authentication.

    Host keys of type Ed25519, which our workers have, are preferred; another type means another host.
    """
    try:
        with ExitStack() as undo:
            connected = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
            plain = undo.enter_context(_BufferedSocket(fileno=connected.detach()))
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _DEAD_SECONDS)
            transport = paramiko.Transport(plain)
            agree_on_new_keys_after(transport, _REKEY_BYTES)
            refuse_what_is_too_large(transport)
            undo.pop_all()
    except (OSError, SSHException) as error:
        raise exhausted(error) or Unreachable(f"{where} does not answer: {error}") from error
    with _signing_in(transport, where):
        transport.get_security_options().ciphers = _CIPHERS
        transport.banner_timeout = transport.auth_timeout = _CONNECT_SECONDS
        transport.start_client(timeout=_CONNECT_SECONDS)
    return transport


@contextmanager
def _signing_in(transport: paramiko.Transport, where: str) -> Iterator[None]:
    """Close the connection if the block fails; translate errors of SSH to Unreachable."""
    try:
        yield
    except BaseException as error:
        transport.close()
        if isinstance(error, AuthenticationException):
            raise Unreachable(f"{where} refuses our key: {error}") from error
        if isinstance(error, CoriolisAzureError) or not isinstance(error, Exception):
            raise
        # Any error that ended the thread reading the connection arrives here.
        raise exhausted(error) or Unreachable(
            f"{where} does not speak SSH with us: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The text of an error from paramiko, or a substitute: many of them have none."""
    return str(error) or ("it was silent" if isinstance(error, TimeoutError) else type(error).__name__)
