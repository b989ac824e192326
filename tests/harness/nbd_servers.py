"""Real NBD servers for tests: nbdkit and qemu-nbd, on Unix sockets."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import pytest

# With the socket as file descriptor 3, as systemd starts servers: who connects is queued, whenever the server is ready.
_ACTIVATED = 'exec 3<&"$0" && LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'


def needs(*programs: str) -> None:
    """Skip the test, with the reason, where libnbd's Python binding or a program is missing."""
    if find_spec("nbd") is None or find_spec("libnbdmod") is None:
        pytest.skip("libnbd's Python binding (Debian: python3-libnbd) is not installed for this Python")
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


class Server:
    """A running server at a Unix socket."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.path, self.process = path, process

    def url(self, state: Path, name: str = "web-1") -> str:
        """The destination, with its state."""
        return f"nbd+unix:///{name}?socket={quote(str(self.path))}&state={quote(str(state))}"

    def kill(self) -> None:
        """What a crash does to it."""
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(*command: str | Path, at: Path | None = None) -> Iterator[Server]:
    """The server that this command starts, at this socket or one of its own; it must not fork."""
    with ExitStack() as ending:
        path = at or Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="nbd-"))) / "s"
        path.unlink(missing_ok=True)
        listener = ending.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(8)
        words = ["bash", "-c", _ACTIVATED, str(listener.fileno()), *map(str, command)]
        process = subprocess.Popen(words, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
        ending.callback(process.wait)
        ending.callback(process.kill)
        listener.close()
        yield Server(path, process)


def nbdkit(*words: str | Path) -> list[str | Path]:
    """The command of nbdkit with this plugin or these filters."""
    needs("nbdkit")
    return ["nbdkit", "-f", *words]


def qemu_nbd(image: Path, name: str) -> list[str | Path]:
    """The command of qemu-nbd that serves a qcow2 image."""
    needs("qemu-nbd", "qemu-img")
    options = ["--format=qcow2", "--discard=unmap", "--persistent", f"--export-name={name}"]
    return ["qemu-nbd", *options, image]


def qcow2(path: Path, size: int) -> Path:
    """An empty image."""
    needs("qemu-img")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
    return path
