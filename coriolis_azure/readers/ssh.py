"""Pinned connections: to the worker, and to the target that the orchestrator names.

We make the worker's host key ourselves and give it to the worker through cloud-init, so the very first
connection already knows what to expect. Another key is never accepted. The target's key nobody tells us: what
it shows on the first connection of a run is what it must show on all others.
"""

from __future__ import annotations

import hashlib
import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType

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
    exhausted,
    told_by_others,
)
from ..events import Report, Wait
from ..model import Worker
from ..threads import Lock, within
from .channel import SILENCE_SECONDS
from .keys import private_key
from .paramiko_internals import (
    TAKEN,
    agree_on_new_keys_after,
    receive_into_blocks,
    usual_window,
    wait_for_status,
)

# A worker answers about a minute after Azure calls it started; slow images take longer.
READY_SECONDS = 600.0
# How long a worker that was there is waited for: a network that fails for a minute, or a worker that reboots.
RECONNECT_SECONDS = 300.0
_RETRY_SECONDS = 2.0
_CONNECT_SECONDS = 15.0
# A keepalive that the other host does not acknowledge for a minute ends the connection: 75 seconds in all.
_KEEPALIVE_SECONDS = 15
_DEAD_SECONDS = 60
# AES-GCM first: paramiko's own first choice, AES-CTR with a separate MAC, takes twice the time.
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes256-ctr", "aes128-ctr")
# After so many bytes new keys are agreed upon, and nothing flows for two round trips. paramiko would do that every 512
# MiB; keys of AES may be used for 64 GiB (RFC 4344, 3.2).
_REKEY_BYTES = 4 << 30
# Enough for 500 MiB/s over a round trip of 20 ms, of all disks together. So much may be kept in memory, twice that
# from a server that means ill.
WINDOW = 10 << 20
# What the worker's Python begins with: it takes so many bytes, and runs them if they have this digest. Python 3.5.
_START = """# coriolis-azure agent
import hashlib, os, sys
size, digest, code = int(sys.argv.pop(1)), sys.argv.pop(1), b""
while len(code) < size:
    part = os.read(0, size - len(code))
    if not part:
        sys.exit(0)
    code += part
if hashlib.sha256(code).hexdigest() != digest:
    sys.exit("what arrived is not the agent that was sent")
exec(compile(code, "agent", "exec"))
"""
_BROKEN = (SSHException, OSError, EOFError)  # what paramiko raises on a connection that broke
_STDERR_BYTES = 4096
_BOOT_ID_BYTES = 64  # it has 36 and a newline
_BY_SIGNAL = 128  # a shell's way to tell of one: its number on top of this
_PACKET_BYTES = 32768  # what servers take in one packet


def agent_words(source: bytes) -> list[str]:
    """What a worker's Python is to be told so that it takes the program `source` from its input and runs that only.

    -I: what lies in the login directory is not imported.
    """
    return ["-I", "-c", _START, str(len(source)), hashlib.sha256(source).hexdigest()]


class Connection:
    """A connection to a worker. A context manager; leaving it ends everything started through it."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = transport

    def try_agent(self) -> None:
        """Make sure that the agent can be started: AgentFailed where there is no Python or no right to be root."""
        with self.start_agent() as stream:
            stream.finish()

    def start_agent(self, window: int = WINDOW) -> AgentStream:
        """Start the agent as root; the stream to talk to it. `window`: bytes that may be under way to us.

        It goes in over the stream itself: no file is left, and nothing on the worker can change it on the way.
        """
        source = agent.program()
        # The third word is this server's own address, as seen from here on; sudo would not pass the variable on.
        command = f'set -- $SSH_CONNECTION; exec sudo -n python3 {shlex.join(agent_words(source))} "$3"'
        stream = self._run(command, window)
        try:
            stream.write(source)
        except ConnectionLost:
            raise stream.ended() from None
        return stream

    def boot_id(self) -> str:
        """Which boot of the worker this is. AgentFailed where it does not tell, ConnectionLost where that breaks."""
        said = b""
        with self._run("cat /proc/sys/kernel/random/boot_id") as stream:
            while not said.endswith(b"\n") and len(said) < _BOOT_ID_BYTES:
                said += stream.read(_BOOT_ID_BYTES)
        return said.decode(errors="replace").strip()

    def start(self, command: str, patience: float) -> Program:
        """Start a command that others than the worker's agent answer to; `patience` as Program has it.

        SessionRefused where the server lets the connection have no session more.
        """
        try:
            channel = self._executing(command, usual_window(self._transport), patience)
        except ChannelException as error:
            raise SessionRefused(
                f"it lets a connection have no more sessions (MaxSessions): {error}"
            ) from error
        except Exception as error:
            raise exhausted(error) or StreamEnded(f"the connection broke: {_reason(error)}") from error
        return Program(channel, patience)

    def close(self) -> None:
        """Close the connection; whatever waits for it gets ConnectionLost, or StreamEnded from a Program."""
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
            broke = f"the connection to the worker broke: {_reason(error)}"
            raise exhausted(error) or ConnectionLost(broke) from error

    def _executing(self, command: str, window: int, patience: float) -> paramiko.Channel:
        """A session in which `command` runs. Raises whatever the thread that reads the connection has died of."""
        channel = self._transport.open_session(window_size=window, timeout=_CONNECT_SECONDS)
        receive_into_blocks(channel, window)
        channel.settimeout(patience)

        def give_up() -> None:
            with suppress(*_BROKEN):
                channel.close()

        try:
            with within(_CONNECT_SECONDS, give_up):  # paramiko would wait for the answer for ever
                channel.exec_command(command)
        except BaseException:
            give_up()
            raise
        return channel


class SessionRefused(StreamEnded):
    """A server lets a connection have no session more: with OpenSSH for a moment also where one has just ended."""


class AgentStream:
    """A program on the worker: bytes in, bytes out."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._rest = memoryview(b"")

    def read(self, size: int) -> memoryview:
        """What there is of its output, `size` bytes at most; AgentFailed or ConnectionLost where it has ended."""
        if not self._rest:
            try:
                came = self._channel.recv(TAKEN)
            except _BROKEN as error:
                raise ConnectionLost(f"the connection to the worker broke: {_reason(error)}") from error
            if not came:
                raise self.ended()
            self._rest = memoryview(came)
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece

    def write(self, data: bytes) -> None:
        """All of `data` to its input."""
        try:
            self._channel.sendall(data)
        except _BROKEN as error:
            raise ConnectionLost(f"the connection to the worker broke: {_reason(error)}") from error

    def finish(self) -> None:
        """End its input and wait for it; AgentFailed unless it ends well, ConnectionLost where nobody can tell."""
        try:
            self._channel.shutdown_write()
        except _BROKEN as error:
            raise ConnectionLost(f"the connection to the worker broke: {_reason(error)}") from error
        if not wait_for_status(self._channel, SILENCE_SECONDS):
            raise ConnectionLost("the program on the worker does not end")
        if self._channel.recv_exit_status() != 0:
            raise self.ended()

    def close(self) -> None:
        """End the program's input and output."""
        with suppress(*_BROKEN):
            self._channel.close()

    def __enter__(self) -> AgentStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ended(self) -> AgentFailed | ConnectionLost:
        """Why there is no more output: the program's own last words, where it had any."""
        if not self._channel.exit_status_ready():
            wait_for_status(self._channel, _CONNECT_SECONDS)
        status = self._channel.recv_exit_status() if self._channel.exit_status_ready() else -1
        if status < 0:  # no status: the connection broke off, or a signal ended the program
            return ConnectionLost("the connection to the worker broke off")
        if status > _BY_SIGNAL:
            return ConnectionLost("the program on the worker was killed")
        words = ""
        self._channel.settimeout(_CONNECT_SECONDS)
        with suppress(TimeoutError):
            said = bytes(self._channel.recv_stderr(_STDERR_BYTES)).decode(errors="replace")
            words = " | ".join(line.strip() for line in said.splitlines() if line.strip())
        return AgentFailed(f"the program on the worker ended with status {status}: {words or 'no message'}")


class Program:
    """A program on a host: bytes in, bytes out, a status at the end.

    A call that waits for the other side for `patience` seconds, or finds the connection broken, raises
    StreamEnded. `close` from another thread wakes what waits.
    """

    def __init__(self, channel: paramiko.Channel, patience: float) -> None:
        self._channel = channel
        self._patience = patience

    @property
    def ready(self) -> bool:
        """Whether there is output that can be received without waiting."""
        return self._channel.recv_ready()

    def send(self, data: bytes | memoryview) -> None:
        """All of `data` to its input."""
        with self._telling():
            view = memoryview(data)
            while view:  # paramiko's own loop would copy what is left after each packet
                view = view[self._channel.send(view[:_PACKET_BYTES].tobytes()) :]

    def receive(self, size: int) -> bytes:
        """`size` bytes of its output; fewer where that ends."""
        pieces = bytearray()
        with self._telling():
            while len(pieces) < size and (piece := self._channel.recv(size - len(pieces))):
                pieces += piece
        return bytes(pieces)

    def wait_up_to(self, patience: float) -> None:
        """Be as patient as this from now on."""
        self._patience = patience
        self._channel.settimeout(patience)

    def finish(self) -> None:
        """End its input."""
        with self._telling():
            self._channel.shutdown_write()

    def status(self, seconds: float) -> int | None:
        """What it ended with; None where it does not tell within `seconds`, or not at all."""
        wait_for_status(self._channel, seconds)
        if not self._channel.exit_status_ready():
            return None
        status = self._channel.recv_exit_status()
        return status if status >= 0 else None

    def words(self) -> str:
        """What it complained of so far: the last printable line."""
        if not self._channel.recv_stderr_ready():
            return ""
        lines = bytes(self._channel.recv_stderr(_STDERR_BYTES)).strip().splitlines()
        return told_by_others(lines[-1], 300) if lines else ""

    def close(self) -> None:
        """End its input and output; the other side ends it then."""
        with suppress(*_BROKEN):
            self._channel.close()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise StreamEnded(f"nothing was heard for {self._patience:g} seconds") from error
        except _BROKEN as error:
            # A program that ends while it is written to closes its channel: the connection holds all the same.
            over = self._channel.closed and self._channel.get_transport().is_active()
            raise StreamEnded("it ended" if over else f"the connection broke: {_reason(error)}") from error


@dataclass(frozen=True)
class Login:
    """How to sign in to a host that others have made: with a private key (PEM), or else a password."""

    address: str
    port: int
    username: str
    private_key: str = field(default="", repr=False)
    password: str = field(default="", repr=False)


class Target:
    """A host that others have made, and the key it showed first. InvalidInput where ours cannot be read."""

    def __init__(self, login: Login) -> None:
        self._login = login
        self._ours = private_key(login.private_key) if login.private_key else None
        self._key = ""
        self._lock = Lock()

    def connect(self) -> Connection:
        """A connection to it. Unreachable, or HostKeyChanged where another key was shown before."""
        login = self._login
        where = f"the target at {login.address} port {login.port}"
        transport = _opened(login.address, login.port, where)
        with _signing_in(transport, where):
            shown = transport.get_remote_server_key()
            line = f"{shown.get_name()} {shown.get_base64()}"
            with self._lock:
                self._key = self._key or line
            if line != self._key:
                raise HostKeyChanged(f"{where} shows another host key than at first")
            if self._ours is not None:
                transport.auth_publickey(login.username, self._ours)
            else:
                transport.auth_password(login.username, login.password)
            transport.set_keepalive(_KEEPALIVE_SECONDS)
        return Connection(transport)


class Line:
    """The way to the agent on a worker, over as many connections as it takes. A context manager.

    `close`, from any thread, is for good: what waits for the worker ends soon.
    """

    def __init__(
        self,
        worker: Worker,
        clock: Clock,
        report: Report,
        window: int = WINDOW,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        """`gone`: whether there is no such worker any more, which need not be waited for."""
        self._worker, self._clock, self._report, self._window = worker, clock, report, window
        self._gone = gone
        self._connection: Connection | None = None
        self._closed = False

    def connect(self) -> Connection:
        """A new connection; the one before is closed. Unreachable as `connect` raises it; HostKeyChanged at once."""
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
            raise Unreachable("the transfer was given up")
        return self._connection

    def agent(self) -> AgentStream:
        """A new agent on the connection. AgentFailed where it cannot be started, ConnectionLost where that breaks."""
        return (self._connection or self.connect()).start_agent(self._window)

    def close(self) -> None:
        """End it. Harmless when repeated."""
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
    """A connection to `worker`, waiting until it is up.

    Unreachable when it does not answer, HostKeyChanged when something else does, within `patience` seconds or
    until it is `given_up`. HostExhausted at once. A worker that `is_set_up` has shown its key before: another key is
    another system's, which no waiting changes.
    """
    waiting = Wait(report, clock, "the worker to answer on SSH", patience)
    while True:
        try:
            return Connection(_connected(worker))
        except (HostKeyChanged, Unreachable) as error:
            # A worker's SSH server may answer for a moment with the image's own keys, before cloud-init has
            # put ours in place. Nothing is sent to it then.
            is_other = is_set_up and isinstance(error, HostKeyChanged)
            if is_other or waiting.left < 0 or given_up():
                raise error
            waiting.pause(_RETRY_SECONDS)


def _connected(worker: Worker) -> paramiko.Transport:
    where = f"the worker at {worker.address} port {worker.port}"
    transport = _opened(worker.address, worker.port, where)
    with _signing_in(transport, where):
        shown = transport.get_remote_server_key()
        if f"{shown.get_name()} {shown.get_base64()}" != worker.host_key:
            raise HostKeyChanged(
                f"what answers at {worker.address} port {worker.port} is not our worker: its host key is another"
            )
        transport.auth_publickey(worker.username, _own_key(worker.private_key))
        transport.set_keepalive(_KEEPALIVE_SECONDS)
    return transport


def _own_key(text: str) -> paramiko.PKey:
    """A key that `client_key` has made. It is not checked to be one: that took a third of a start."""
    try:
        key = serialization.load_pem_private_key(text.encode(), None, unsafe_skip_rsa_key_validation=True)
    except ValueError:  # of whatever kind, and not ours
        return private_key(text)
    return paramiko.RSAKey(key=key) if isinstance(key, rsa.RSAPrivateKey) else private_key(text)


class _Prompt(socket.socket):
    """Acknowledges at once what comes.

    Before a program runs, OpenSSH's server does not send a packet while another is not acknowledged, and left to
    itself this host's kernel acknowledges after 40 ms.
    """

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """What has come, `size` bytes at most."""
        came = super().recv(size, flags)
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return came


def _opened(address: str, port: int, where: str) -> paramiko.Transport:
    """A connection on which keys are agreed upon; nobody has signed in yet.

    A host key of Ed25519, as our workers have it, is preferred; another kind tells that it is another host.
    """
    try:
        with ExitStack() as undo:
            connected = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
            plain = undo.enter_context(_Prompt(fileno=connected.detach()))
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _DEAD_SECONDS)
            transport = paramiko.Transport(plain)
            agree_on_new_keys_after(transport, _REKEY_BYTES)
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
    """Whatever goes wrong in the block closes the connection; what SSH says of it is Unreachable."""
    try:
        yield
    except BaseException as error:
        transport.close()
        if isinstance(error, AuthenticationException):
            raise Unreachable(f"{where} refuses our key: {error}") from error
        if isinstance(error, CoriolisAzureError) or not isinstance(error, Exception):
            raise
        # Whatever the thread that reads the connection has died of.
        raise exhausted(error) or Unreachable(
            f"{where} does not speak SSH with us: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """What an error of paramiko's says; many of them say nothing."""
    return str(error) or ("it was silent" if isinstance(error, TimeoutError) else type(error).__name__)
