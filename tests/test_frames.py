"""How deep our own stack is where a chunk is received and where it is written: at most six frames each."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import coriolis_azure
from coriolis_azure.replica.medium import Content
from harness.copies import CHUNK, by_agent, job
from harness.images import Image
from harness.pipes import Pipes

PACKAGE = str(Path(coriolis_azure.__file__).parent)
MOST = 6


def ours() -> list[str]:
    """The functions of the package on the stack of this thread, the outermost first."""
    return [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]


class Seen(Image):
    """An image that keeps the stack of its first write."""

    stack: list[str] = []

    def write(self, offset: int, data: Content) -> None:
        self.stack = self.stack or ours()
        super().write(offset, data)


class Heard(Pipes):
    """An agent that keeps the stack of each kind of reading."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: list[list[str]] = []

    def read(self, size: int, /) -> bytes:
        self.stacks.append(ours())
        return super().read(size)


def test_a_chunk_passes_through_few_frames(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(3 * CHUNK))
    with Seen(tmp_path / "os.raw") as image, Heard() as pipes:
        base = image.known("id", 3 * CHUNK, CHUNK, full=False)
        by_agent(lambda: pipes, job(disk), base, image)
    assert image.stack[-1] == "_put"
    assert len(image.stack) <= MOST, image.stack
    receiving = [stack[stack.index("scan") :] for stack in pipes.stacks if "scan" in stack]
    assert receiving
    assert all(len(stack) <= MOST for stack in receiving), receiving
