"""The worker of the benchmarks: OpenSSH's own server on this machine, and a line to it that is as long as asked."""

from __future__ import annotations

import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from coriolis_azure.model import Worker
from coriolis_azure.readers import keys

RELAY = "127.0.0.2"  # an address of its own: the port of the direct channel is the same on both sides
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
# Bash that sshd starts at SHLVL 2 reads no .bashrc: a developer's takes longer than all else here, a worker's nothing.
_CONFIG = """
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
SetEnv PATH={folder}/bin:/usr/local/bin:/usr/bin:/bin SHLVL=2
ForceCommand cd {folder}/home && exec sh -c "$SSH_ORIGINAL_COMMAND"
MaxStartups 100
"""
_CLIENT = """
Host *
IdentityFile {folder}/client_key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
Ciphers aes128-gcm@openssh.com
LogLevel ERROR
"""
# Where there is no sudo, and none is needed: the server runs as the user that the agent is to run as.
_SUDO = '#!/bin/sh\n[ "$1" = -n ] && shift\nexec "$@"\n'


class SshServer:
    """A server that lets one new key in. `worker` is how we reach it, `command` how OpenSSH's client does.

    `home` is the login directory. `run`: the command that runs another one where the server is to be, at `address`.
    """

    def __init__(self, folder: Path, address: str = "127.0.0.1", run: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True)
        private, public = keys.client_key()
        host_private, host_public = keys.host_key()
        self.port = free_port()
        files = {
            "host_key": host_private,
            "client_key": private,
            "authorized_keys": public + "\n",
            "known_hosts": f"[{address}]:{self.port} {host_public}\n",
            "config": _CONFIG.format(address=address, port=self.port, folder=folder),
            "client": _CLIENT.format(folder=folder),
        }
        for name, text in files.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o600)
        self.home = folder / "home"
        self.home.mkdir()
        (folder / "bin").mkdir()
        (folder / "bin" / "sudo").write_text(_SUDO)
        # A worker's Python is a bare one: it is not to import what this machine's has been given besides.
        (folder / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        for program in (folder / "bin").iterdir():
            program.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [*run, SSHD, "-D", "-e", "-f", folder / "config"], stderr=subprocess.DEVNULL
        )
        wait_for(self.port, address)
        user = os.environ.get("USER") or "root"
        self.worker = Worker("vm", address, self.port, user, host_public, 8, private)
        self.command = ["ssh", "-F", str(folder / "client"), "-p", str(self.port), f"{user}@{address}"]

    def close(self) -> None:
        """End the server."""
        self.process.terminate()
        self.process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(port: int, address: str = "127.0.0.1") -> None:
    """Wait until something listens on `port`."""
    until = time.monotonic() + 10
    while True:
        with suppress(OSError), socket.create_connection((address, port), 1):
            return
        if time.monotonic() > until:
            raise SystemExit(f"nothing listens on port {port}")
        time.sleep(0.02)


@contextmanager
def relayed(
    port: int, one_way: float, rate: float = 0, listen: int = 0, address: str = RELAY
) -> Iterator[int]:
    """The port, at `address`, of a relay to `port`, in a process of its own while the block lasts.

    Each byte arrives `one_way` seconds later; `rate` bytes a second pass each way, 0 for as many as come.
    """
    arguments = [str(port), str(one_way), str(rate), str(listen), address]
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield int(process.stdout.readline())  # type: ignore[union-attr]
    finally:
        process.communicate()


def relay(port: int, one_way: float, rate: float, listen: int, address: str) -> None:
    """Pass connections on until stdin ends."""
    listener = socket.create_server((address, listen))
    print(listener.getsockname()[1], flush=True)

    def late(source: socket.socket, sink: socket.socket) -> None:
        waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(1024)

        def deliver() -> None:
            free = 0.0
            with suppress(OSError):
                while True:
                    due, data = waiting.get()
                    if rate:
                        due = free = max(due, free) + len(data) / rate
                    time.sleep(max(0.0, due - time.monotonic()))
                    if not data:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    sink.sendall(data)

        threading.Thread(target=deliver, daemon=True).start()
        data = b"-"
        while data:
            try:
                data = source.recv(64 << 10)
            except OSError:
                data = b""
            waiting.put((time.monotonic() + one_way, data))

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", port))
            except OSError:
                near.close()
                continue
            for one, other in ((near, far), (far, near)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=late, args=(one, other), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    relay(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
