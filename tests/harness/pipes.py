"""An agent in a process of its own, over pipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coriolis_azure import agent
from coriolis_azure.agent import wire
from coriolis_azure.errors import StreamEnded
from coriolis_azure.replica.manifest import ZERO, Manifest

if TYPE_CHECKING:
    from typing_extensions import Self


def old_python() -> str:
    """A Python 3.6 of this machine, from PATH or from pyenv; empty when there is none that runs."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in ["python3.6", *map(str, pyenv.glob("versions/3.6.*/bin/python3.6"))]:
        if shutil.which(python) and not subprocess.run([python, "--version"], capture_output=True).returncode:
            return python
    return ""


AGENT = ("-c", agent.program().decode())  # the words that make a Python the agent


class Pipes:
    """A transfer.Stream over the pipes of an agent on this machine. Keeps what the agent said."""

    def __init__(
        self, python: str = sys.executable, program: Sequence[str] = AGENT, words: Sequence[str] = ()
    ) -> None:
        self.process = subprocess.Popen(
            [python, *program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.heard = bytearray()

    def read(self, size: int, /) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = os.read(self.stdout.fileno(), size - len(data))
            if not part:
                raise StreamEnded("the agent's output ended")
            data += part
        self.heard += data
        return bytes(data)

    def write(self, data: bytes, /) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self.stdin.write(view) :]
        except OSError as error:
            raise StreamEnded("the agent's input is closed") from error

    def close(self) -> None:
        self.process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()

    def start(self, disk: Path, base: Manifest, first: int = 0, **changes: object) -> None:
        """Send a job for `disk`, and the digests of `base` from the chunk `first` on."""
        self.offer(disk, base, **changes)
        self.begin(base, first)

    def offer(self, disk: Path, base: Manifest, **changes: object) -> None:
        """Send a job for `disk`."""
        job: dict[str, Any] = {
            "device_candidates": [str(disk)],
            "size": base.size,
            "chunk": base.chunk,
            "leaf": 0,
            "hashes": [base.hash],
            "choose": False,
            "key": base.key.hex(),
            "compress": "none",
            "packings": [],
            "threads": 2,
            "wait": 0,
            "direct": None,
        }
        self.send(wire.JOB, 0, json.dumps({**job, **changes}).encode())

    def begin(self, base: Manifest, first: int = 0) -> None:
        """Send the digests of `base`."""
        self.send(wire.GO, 0, b"")
        self.send(wire.BASE, first, base.digests.span(first, base.count))
        self.send(wire.BASE, base.count, b"")

    def send(self, kind: int, index: int, payload: bytes, count: int = 0) -> None:
        self.write(wire.HEAD.pack(kind, 0, index, count, len(payload), ZERO) + payload)

    def message(self) -> tuple[int, int, int, bytes, bytes]:
        """kind, index, count, digest, payload."""
        kind, _, index, count, length, digest = wire.HEAD.unpack(self.read(wire.HEAD.size))
        return kind, index, count, digest, self.read(length)

    def document(self, kind: int) -> dict[str, Any]:
        """The JSON of the next message, which must be of this kind."""
        found, _, _, _, payload = self.message()
        document: dict[str, Any] = json.loads(payload)
        assert found == kind, document
        return document
