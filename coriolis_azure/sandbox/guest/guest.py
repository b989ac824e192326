"""A guest: one process that imitates a Linux VM of the sandbox. `guests` runs it with its folder as argument.

It enters its own mount namespace and mounts a private folder over /dev, in which the sandbox creates and removes links
to the VM's disks. Then it serves SSH at the VM's address, only for the VM's admin user with the VM's key, and only
commands. Commands run as the user of the sandbox; `sudo` adds no rights.

If the machine allows no namespaces, `sitecustomize` maps paths below /dev/disk/ to the private folder, for the guest's
Python programs only. `method.json` in the folder says which method is used.

This file imports nothing from this package, so that it starts quickly. It does not imitate users, a root filesystem,
package management, block device ioctls (a disk is a regular file), reboots, or security groups for anything but SSH:
a port on which a command listens is open to the whole machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_SUCCEEDED,
)
from paramiko.pkey import PublicBlob

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000
_PIECE = 256 << 10
_WINDOW = 16 << 20
_PACKET = 256 << 10
_CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
)
# The nodes of the machine's /dev that the guest's /dev has too.
_SHARED_NODES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm")

_SUDO = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        --) shift; break ;;
        -n|-E|-H|-S|-k|--non-interactive) shift ;;
        -u|-g) shift 2 ;;
        *=*) export "$1"; shift ;;
        *) break ;;
    esac
done
[ $# -eq 0 ] && exit 0
exec "$@"
"""
_CLOUD_INIT = """#!/bin/sh
if [ "$1" = status ]; then echo "status: done"; fi
"""
# Each guest has its own boot id; the kernel's is that of the machine.
_CAT = """#!/bin/sh
[ "$1" = /proc/sys/kernel/random/boot_id ] && set -- "{boot_id}"
exec /bin/cat "$@"
"""
_BLOCKDEV = """#!/bin/sh
case "$1" in
    --getsize64) exec stat -L -c %s "$2" ;;
    --getro) echo 0 ;;
    --getss|--getpbsz) echo 512 ;;
esac
"""
_NOTHING = "#!/bin/sh\n"
# The disks of this machine are not the guest's, and flushing them would take long.
_SYNC = """#!/bin/sh
: > "{synced}"
"""
_PYTHON = '#!/bin/sh\nexec "{python}" "$@"\n'
# With -I, Python would ignore `sitecustomize`.
_MAPPING_PYTHON = '#!/bin/sh\n[ "$1" = -I ] && shift\nexec "{python}" "$@"\n'

_SITECUSTOMIZE = '''"""Maps /dev/disk/ to the guest's private folder, for Python programs."""
import builtins
import io
import os

_DEV = {dev!r}


def _mapped(path):
    text = path
    if isinstance(path, (bytes, os.PathLike)):
        text = os.fsdecode(path)
    if isinstance(text, str) and text.startswith("/dev/disk/"):
        return _DEV + text[4:]
    return path


def _wrapped(function):
    def call(path, *arguments, **options):
        return function(_mapped(path), *arguments, **options)

    return call


for _module, _names in (
    (os, ("open", "stat", "lstat", "readlink", "listdir", "scandir", "access")),
    (builtins, ("open",)),
    (io, ("open",)),
):
    for _name in _names:
        setattr(_module, _name, _wrapped(getattr(_module, _name)))
'''


class Guest:
    """The guest in its folder: its configuration and its running commands."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "guest.json").read_text())
        config = settings["cloud_config"]
        if isinstance(config, str):
            raise ValueError(config)
        self.folder = folder
        self.user: str = settings["user"]
        self.keys = [PublicBlob.from_string(text) for text in settings["keys"]]
        self.address: str = settings["address"]
        self.python: str = settings["python"]
        self.namespaces: bool = settings["namespaces"]
        self.config: dict[str, Any] = config or {}
        self.home = folder / "home" / self.user
        self.groups: set[int] = set()
        self._lock = threading.Lock()
        self._ended = False

    @property
    def port(self) -> int:
        """The SSH port."""
        return self._sshd("Port", 22)

    @property
    def sessions(self) -> int:
        """How many concurrent sessions a connection may have."""
        return self._sshd("MaxSessions", 10)

    def _sshd(self, keyword: str, default: int) -> int:
        """A number in the sshd configuration that cloud-init wrote; `default` if it is not there."""
        for file in self.config.get("write_files") or []:
            if "sshd_config" in str(file.get("path")):
                line = rf"^\s*{keyword}\s+(\d+)\s*$"
                match = re.search(line, str(file.get("content")), re.MULTILINE | re.IGNORECASE)
                if match:
                    return int(match.group(1))
        return default

    def host_key(self) -> paramiko.PKey:
        """The host key in the cloud-config, or a new one."""
        text = (self.config.get("ssh_keys") or {}).get("ed25519_private")
        if text:
            return paramiko.Ed25519Key.from_private_key(io.StringIO(text))
        return paramiko.ECDSAKey.generate()

    # the machine inside

    def furnish(self) -> None:
        """Create what the guest's commands need: home, programs, files from the cloud-config."""
        self.home.mkdir(mode=0o700, parents=True)
        (self.folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        programs = {
            "sudo": _SUDO,
            "cloud-init": _CLOUD_INIT,
            "blockdev": _BLOCKDEV,
            "cat": _CAT.format(boot_id=self.folder / "boot_id"),
            "sync": _SYNC.format(synced=self.folder / "synced"),
            "systemctl": _NOTHING,
            "udevadm": _NOTHING,
            "python3": _PYTHON.format(python=self.python),
        }
        for name, text in programs.items():
            (self.folder / "bin" / name).write_text(text)
            (self.folder / "bin" / name).chmod(0o755)
        root = (self.folder / "root").resolve()
        for file in self.config.get("write_files") or []:
            path = (root / str(file["path"]).lstrip("/")).resolve()
            if root in path.parents:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(str(file.get("content") or ""))

    def enter(self) -> None:
        """Mount the private folder over /dev; if that is not allowed, map paths for Python programs."""
        try:
            if not self.namespaces:
                raise PermissionError(errno.EPERM, "mount namespaces are switched off")
            _own_mounts()
            _cover_dev(self.folder / "dev")
            method = {"method": "namespace"}
        except OSError as error:
            site = self.folder / "site"
            site.mkdir()
            (site / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(dev=str(self.folder / "dev")))
            (self.folder / "bin" / "python3").write_text(_MAPPING_PYTHON.format(python=self.python))
            missing = "only Python programs see the disks below /dev/disk; other programs do not"
            method = {"method": "python paths", "reason": str(error), "not_imitated": missing}
            print(f"no mount namespace ({error}): {missing}", file=sys.stderr, flush=True)  # noqa: T201
        (self.folder / "method.json").write_text(json.dumps(method))

    def environment(self, connection: str) -> dict[str, str]:
        """The environment of a command. `connection`: address and port of the client, then of the server."""
        path = f"{self.folder / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {
            "PATH": path,
            "HOME": str(self.home),
            "USER": self.user,
            "LOGNAME": self.user,
            "SHELL": "/bin/sh",
            "LANG": "C.UTF-8",
            "TMPDIR": "/tmp",  # noqa: S108
            "SSH_CONNECTION": connection,
        }
        if (self.folder / "site").exists():
            environment["PYTHONPATH"] = str(self.folder / "site")
        return environment

    def run(self, command: str, connection: str) -> subprocess.Popen[bytes]:
        """Start a command in its own process group; OSError while the guest is shutting down."""
        with self._lock:
            if self._ended:
                raise OSError(errno.ESHUTDOWN, "the guest is shutting down")
            process = subprocess.Popen(  # noqa: S602
                command,
                shell=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self.home,
                env=self.environment(connection),
                start_new_session=True,
            )
            self.groups.add(process.pid)
            return process

    def ended(self, process: subprocess.Popen[bytes]) -> None:
        """Record that a command's process group is gone."""
        with self._lock:
            self.groups.discard(process.pid)

    def shut_down(self) -> None:
        """Kill everything that runs in the guest."""
        with self._lock:
            self._ended = True
            for group in self.groups:
                _kill(group)

    def lets_in(self, peer: str, port: int) -> bool:
        """Whether the present security groups allow this connection."""
        rule_sets = json.loads((self.folder / "rules.json").read_text())
        return all(_allowed(rules, peer, port) for rules in rule_sets)


# ---------------------------------------------------------------- mounts


def _libc(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _bind(source: Path, target: Path) -> None:
    _libc("mount", os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(_MS_BIND | _MS_REC), None)


def _own_mounts() -> None:
    """Enter a mount namespace, within a user namespace if necessary; OSError if neither is allowed."""
    try:
        _libc("unshare", _CLONE_NEWNS)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        user, group = os.getuid(), os.getgid()
        _libc("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _libc("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)


def _cover_dev(dev: Path) -> None:
    """Give the private /dev the nodes that programs need, then mount it over the machine's."""
    for name in _SHARED_NODES:
        source, target = Path("/dev") / name, dev / name
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_dir():
            target.mkdir(exist_ok=True)
            _bind(source, target)
        elif source.exists():
            target.touch()
            _bind(source, target)
    for name, stream in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        (dev / name).symlink_to(f"/proc/self/fd{stream}")
    _bind(dev, Path("/dev"))


# ---------------------------------------------------------------- the firewall


def _allowed(rules: list[dict[str, Any]], peer: str, port: int) -> bool:
    """Whether the first matching rule allows the connection; without a match it is denied."""
    for rule in rules:
        if str(rule["protocol"]).lower() not in {"*", "tcp"}:
            continue
        sources = [rule.get("sourceAddressPrefix"), *(rule.get("sourceAddressPrefixes") or [])]
        ports = [rule.get("destinationPortRange"), *(rule.get("destinationPortRanges") or [])]
        if any(_from(source, peer) for source in sources if source) and any(
            _to(span, port) for span in ports if span
        ):
            return bool(rule["access"] == "Allow")
    return False


def _from(source: str, peer: str) -> bool:
    # All peers are processes of this machine; the sandbox has already removed rules whose tag excludes them.
    if source.lower() in {"*", "any", "internet", "virtualnetwork"}:
        return True
    try:
        return ipaddress.ip_address(peer) in ipaddress.ip_network(source, strict=False)
    except ValueError:
        return False


def _to(ports: str, port: int) -> bool:
    if ports == "*":
        return True
    first, _, last = ports.partition("-")
    return int(first) <= port <= int(last or first)


# ---------------------------------------------------------------- SSH


class _Server(paramiko.ServerInterface):
    """The policy of one connection: only the admin user, only its key, only commands."""

    def __init__(self, guest: Guest, connection: str) -> None:
        self._guest = guest
        self._connection = connection
        self._asking = threading.Lock()
        self._sessions = threading.BoundedSemaphore(guest.sessions)

    def get_allowed_auths(self, username: str) -> str:
        del username
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        known = any(blob.key_blob == key.asbytes() for blob in self._guest.keys)
        return AUTH_SUCCESSFUL if known and username == self._guest.user else AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        del chanid
        allowed = kind == "session" and self._sessions.acquire(blocking=False)
        return OPEN_SUCCEEDED if allowed else OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        try:
            process = self._guest.run(os.fsdecode(command), self._connection)
        except OSError:
            self._sessions.release()
            return False
        threading.Thread(target=self._begin, args=(channel, process), daemon=True).start()
        return True

    def _begin(self, channel: paramiko.Channel, process: subprocess.Popen[bytes]) -> None:
        """Start the session once the client knows that its command runs.

        The thread that reads the connection sends that reply after `check_channel_exec_request` returns, and a short
        command could end before. So we send the client a request: its answer arrives only after the reply was sent.
        """
        transport = channel.get_transport()
        with self._asking, contextlib.suppress(paramiko.SSHException, OSError, EOFError):
            transport.global_request("begun@sandbox", wait=True)
        _session(self._guest, channel, process, self._sessions.release)


def _connection(guest: Guest, connection: socket.socket, key: paramiko.PKey) -> None:
    """Serve one connection until it ends. Negotiation errors end this thread but never the guest."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    transport = paramiko.Transport(connection, default_window_size=_WINDOW, default_max_packet_size=_PACKET)
    options = transport.get_security_options()
    options.ciphers = [cipher for cipher in _CIPHERS if cipher in options.ciphers]
    transport.add_server_key(key)
    try:
        ends = (*connection.getpeername()[:2], *connection.getsockname()[:2])
        transport.start_server(server=_Server(guest, " ".join(map(str, ends))))
    except (paramiko.SSHException, EOFError, OSError):
        transport.close()


def _session(
    guest: Guest, channel: paramiko.Channel, process: subprocess.Popen[bytes], ended: Callable[[], None]
) -> None:
    """Pump the streams of one command; if the client leaves, kill what it started.

    `ended` is called before the client learns of the end, since it may then start another session.
    """
    assert process.stdout is not None  # noqa: S101 (all three were asked for as pipes)
    assert process.stderr is not None  # noqa: S101
    done = threading.Event()
    output = [
        threading.Thread(target=_pump_out, args=(process.stdout.fileno(), channel.sendall), daemon=True),
        threading.Thread(
            target=_pump_out, args=(process.stderr.fileno(), channel.sendall_stderr), daemon=True
        ),
    ]
    pumps = [*output, threading.Thread(target=_pump_in, args=(channel, process, done), daemon=True)]
    for thread in pumps:
        thread.start()
    for thread in output:
        thread.join()
    status = process.wait()
    done.set()
    ended()
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        channel.send_exit_status(status if status >= 0 else 128 - status)
        channel.shutdown_write()
    channel.close()
    _kill(process.pid)
    guest.ended(process)
    for stream in (process.stdout, process.stderr):
        stream.close()


def _pump_out(source: int, send: Any) -> None:
    try:
        while piece := os.read(source, _PIECE):
            send(piece)
    except (OSError, EOFError, paramiko.SSHException):
        # The client is gone: drain the pipe, so that the command is not blocked while its group is killed.
        with contextlib.suppress(OSError):
            while os.read(source, _PIECE):
                pass


def _pump_in(channel: paramiko.Channel, process: subprocess.Popen[bytes], done: threading.Event) -> None:
    assert process.stdin is not None  # noqa: S101
    try:
        while piece := channel.recv(_PIECE):
            process.stdin.write(piece)
            process.stdin.flush()
    except (OSError, EOFError):
        pass
    with contextlib.suppress(OSError):
        process.stdin.close()
    # The end of input does not end the session; the end of the channel or the connection does.
    while not done.wait(0.05):
        transport = channel.get_transport()
        if channel.closed or transport is None or not transport.is_active():
            _kill(process.pid)
            return


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _accept(guest: Guest, listener: socket.socket, key: paramiko.PKey) -> None:
    port = listener.getsockname()[1]
    while True:
        connection, peer = listener.accept()
        if not guest.lets_in(str(peer[0]), port):
            connection.close()
            continue
        threading.Thread(target=_connection, args=(guest, connection, key), daemon=True).start()


def _listener(address: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except PermissionError:
        raise OSError(
            f"this user may not listen on port {port}: a sandbox worker needs an SSH port above 1024 "
            "(export_worker_ssh_port)"
        ) from None
    listener.listen(64)
    return listener


def main(folder: Path) -> int:
    """Boot, report the outcome, serve until stdin ends."""
    try:
        guest = Guest(folder)
        key = guest.host_key()
        listener = _listener(guest.address, guest.port)
        guest.furnish()
        guest.enter()
    except (OSError, ValueError, paramiko.SSHException) as error:
        _report({"error": str(error)})
        return 1
    threading.Thread(target=_accept, args=(guest, listener, key), daemon=True).start()
    _report({"ready": True, "address": guest.address, "port": guest.port})
    signal.signal(signal.SIGTERM, lambda *_: os.close(0))
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    guest.shut_down()
    return 0


def _report(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    os._exit(code)  # do not wait for the threads of connections
