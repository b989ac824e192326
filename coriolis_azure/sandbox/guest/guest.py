"""A guest: one process that stands for a Linux VM of the sandbox. Run by `guests`, with its folder as
argument.

It enters a mount namespace of its own and lays a private folder over /dev, in which the sandbox makes and
removes the links of the VM's disks. Then it answers SSH at the VM's address: only the VM's admin user with
the VM's key, only commands. Commands run as the user of the sandbox, `sudo` does nothing more.

Where the machine allows no namespace, Python programs of the guest get another way: `sitecustomize` maps
paths below /dev/disk/ to the private folder. `method.json` in the folder says which way was taken.

This file imports nothing of this package, so that it starts quickly. What is not imitated: users, a root
filesystem, package management, block device ioctls (a disk is a regular file), reboots; and security groups for
anything but SSH: where a command listens at a port, everybody on this machine reaches it.
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
# Of the machine's /dev, what the guest's has too.
_KEPT_NODES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm")

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
# Each guest has a boot of its own; the kernel's is the machine's.
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
_PYTHON = '#!/bin/sh\nexec "{python}" "$@"\n'
# With -I it would not see what maps the paths.
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
    """The guest in its folder: what it was told, and the sessions that run in it."""

    def __init__(self, folder: Path) -> None:
        told = json.loads((folder / "guest.json").read_text())
        config = told["cloud_config"]
        if isinstance(config, str):
            raise ValueError(config)
        self.folder = folder
        self.user: str = told["user"]
        self.keys = [PublicBlob.from_string(text) for text in told["keys"]]
        self.address: str = told["address"]
        self.python: str = told["python"]
        self.namespaces: bool = told["namespaces"]
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
        """How many sessions a connection may have at a time."""
        return self._sshd("MaxSessions", 10)

    def _sshd(self, keyword: str, otherwise: int) -> int:
        """The number that cloud-init wrote into sshd's configuration, or `otherwise`, as OpenSSH has it."""
        for file in self.config.get("write_files") or []:
            if "sshd_config" in str(file.get("path")):
                line = rf"^\s*{keyword}\s+(\d+)\s*$"
                found = re.search(line, str(file.get("content")), re.MULTILINE | re.IGNORECASE)
                if found:
                    return int(found.group(1))
        return otherwise

    def host_key(self) -> paramiko.PKey:
        """The host key of the cloud-config, else a new one."""
        text = (self.config.get("ssh_keys") or {}).get("ed25519_private")
        if text:
            return paramiko.Ed25519Key.from_private_key(io.StringIO(text))
        return paramiko.ECDSAKey.generate()

    # the machine inside

    def furnish(self) -> None:
        """Make what the guest's commands find: home, programs, files of the cloud-config."""
        self.home.mkdir(mode=0o700, parents=True)
        (self.folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        programs = {
            "sudo": _SUDO,
            "cloud-init": _CLOUD_INIT,
            "blockdev": _BLOCKDEV,
            "cat": _CAT.format(boot_id=self.folder / "boot_id"),
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
        """Lay the private folder over /dev; where that is not allowed, map paths for Python programs."""
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
        """The environment of a command over this connection: client and server, each address and port."""
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
        """Start a command in a process group of its own; refused when the guest is going down."""
        with self._lock:
            if self._ended:
                raise OSError(errno.ESHUTDOWN, "the guest is going down")
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
        """Note that a command's group is gone."""
        with self._lock:
            self.groups.discard(process.pid)

    def shut_down(self) -> None:
        """Kill everything that runs in the guest."""
        with self._lock:
            self._ended = True
            for group in self.groups:
                _kill(group)

    def lets_in(self, peer: str, port: int) -> bool:
        """Whether the security groups, as they are now, allow this connection."""
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
    """Enter a mount namespace, in a user namespace if it takes one; OSError where neither is allowed."""
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
    """Give the private /dev the nodes that programs need, then lay it over the machine's."""
    for name in _KEPT_NODES:
        node, mine = Path("/dev") / name, dev / name
        if node.is_symlink():
            mine.symlink_to(node.readlink())
        elif node.is_dir():
            mine.mkdir(exist_ok=True)
            _bind(node, mine)
        elif node.exists():
            mine.touch()
            _bind(node, mine)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        (dev / name).symlink_to(f"/proc/self/fd{target}")
    _bind(dev, Path("/dev"))


# ---------------------------------------------------------------- the firewall


def _allowed(rules: list[dict[str, Any]], peer: str, port: int) -> bool:
    """What the first matching rule says; nothing matches: denied."""
    for rule in rules:
        if str(rule["protocol"]).lower() not in {"*", "tcp"}:
            continue
        sources = [rule.get("sourceAddressPrefix"), *(rule.get("sourceAddressPrefixes") or [])]
        ports = [rule.get("destinationPortRange"), *(rule.get("destinationPortRanges") or [])]
        if any(_from(source, peer) for source in sources if source) and any(
            _to(one, port) for one in ports if one
        ):
            return bool(rule["access"] == "Allow")
    return False


def _from(source: str, peer: str) -> bool:
    # All peers are processes of this machine; the sandbox leaves out the rules whose tag cannot mean them.
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
    """The rules of one connection: the admin user, its key, commands."""

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
        """Let the session begin once the client has been told that its command runs.

        That is told after `check_channel_exec_request`, by the thread that reads the connection; a quick command
        would end before. So the client is asked something: when its answer has been read, the telling is done.
        """
        transport = channel.get_transport()
        with self._asking, contextlib.suppress(paramiko.SSHException, OSError, EOFError):
            transport.global_request("begun@sandbox", wait=True)
        _session(self._guest, channel, process, self._sessions.release)


def _connection(guest: Guest, connection: socket.socket, key: paramiko.PKey) -> None:
    """Serve one connection until it ends. Negotiation errors end this thread, never the guest."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    transport = paramiko.Transport(connection, default_window_size=_WINDOW, default_max_packet_size=_PACKET)
    options = transport.get_security_options()
    options.ciphers = [cipher for cipher in _CIPHERS if cipher in options.ciphers]
    transport.add_server_key(key)
    try:
        both = (*connection.getpeername()[:2], *connection.getsockname()[:2])
        transport.start_server(server=_Server(guest, " ".join(map(str, both))))
    except (paramiko.SSHException, EOFError, OSError):
        transport.close()


def _session(
    guest: Guest, channel: paramiko.Channel, process: subprocess.Popen[bytes], ended: Callable[[], None]
) -> None:
    """Pump one command's streams; when the client has gone, kill what it started.

    `ended` is called before the client hears of the end: it may begin another session then.
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
        # The client does not take it any more: keep the pipe from filling up while its group is being killed.
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
    # End of input is not the end of the session: that is when channel or connection close.
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
    """Boot, say so, serve until stdin ends."""
    try:
        guest = Guest(folder)
        key = guest.host_key()
        listener = _listener(guest.address, guest.port)
        guest.furnish()
        guest.enter()
    except (OSError, ValueError, paramiko.SSHException) as error:
        _say({"error": str(error)})
        return 1
    threading.Thread(target=_accept, args=(guest, listener, key), daemon=True).start()
    _say({"ready": True, "address": guest.address, "port": guest.port})
    signal.signal(signal.SIGTERM, lambda *_: os.close(0))
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    guest.shut_down()
    return 0


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    os._exit(code)  # connections still have threads; nothing of theirs is worth waiting for
