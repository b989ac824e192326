"""The agent as what it is: a program of its own, spoken to over pipes, also under an old Python."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import agent
from coriolis_azure.agent import scan, wire
from coriolis_azure.agent.pack import Packer
from coriolis_azure.replica.digests import Digests
from coriolis_azure.replica.manifest import UNKNOWN, ZERO, Manifest
from harness.constants import DEADLINE
from harness.pipes import Pipes, old_python

CHUNK = 65536
FOLDER = Path(agent.__file__).parent


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Chunks: content, zeros, zeros, content with a hole, a short one."""
    path = tmp_path / "disk"
    path.write_bytes(b"a" * CHUNK + bytes(2 * CHUNK) + b"b" * CHUNK + b"c" * 512)
    return path


def base_of(disk: Path, fill: bytes) -> Manifest:
    return Manifest.new(disk.stat().st_size, CHUNK, "", fill)


def held(disk: Path, chunk: int = CHUNK) -> Manifest:
    """The manifest of a destination that holds the disk."""
    base = Manifest.new(disk.stat().st_size, chunk, "", ZERO)
    digest, data = base.digester(), memoryview(disk.read_bytes())
    digests = b"".join(digest(data[at : at + chunk]) for at in range(0, len(data), chunk))
    return Manifest(base.size, chunk, base.hash, base.key, Digests(digests))


@pytest.mark.parametrize("module", agent.MODULES)
def test_what_is_sent_is_of_old_syntax(module: str) -> None:
    tree = ast.parse((FOLDER / f"{module}.py").read_text(), feature_version=(3, 5))
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Match)
    assert [node for node in ast.walk(tree) if isinstance(node, newer)] == []


def test_all_modules_are_sent_in_one_small_piece_each_after_those_that_it_imports() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {"__init__", *agent.MODULES}
    assert len(agent.program()) < 48 << 10
    for number, module in enumerate(agent.MODULES):
        tree = ast.parse((FOLDER / f"{module}.py").read_text())
        ours = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
        assert ours <= set(agent.MODULES[:number])


@pytest.mark.parametrize("python", [sys.executable, old_python()], ids=["this", "3.6"])
def test_it_says_same_zeros_and_data(python: str, disk: Path) -> None:
    if not python:
        pytest.skip("there is no Python 3.6 here")
    base = held(disk)
    changed = bytearray(disk.read_bytes())
    changed[0] = 1
    changed[4 * CHUNK :] = bytes(512)
    disk.write_bytes(changed)
    with Pipes(python) as pipes:
        pipes.start(disk, base)
        assert pipes.document(wire.READY)["size"] == base.size
        kind, index, count, digest, payload = pipes.message()
        assert (kind, index, count) == (wire.DATA, 0, 1)
        assert payload == wire.PIECE.pack(0, CHUNK, False) + changed[:CHUNK]
        assert digest == base.digester()(changed[:CHUNK])
        assert pipes.message()[:3] == (wire.SAME, 1, 3)
        assert pipes.message()[:3] == (wire.ZEROS, 4, 1)
        assert pipes.document(wire.END).keys() == {"root"}
        assert pipes.process.wait(DEADLINE) == 0


def test_it_begins_where_the_job_says_and_its_root_is_of_what_it_has_told(disk: Path) -> None:
    base = held(disk)
    with Pipes() as pipes:
        pipes.start(disk, base, first=2)
        pipes.document(wire.READY)
        kind, index, count, _, _ = pipes.message()
        assert (kind, index, index + count) == (wire.SAME, 2, base.count)
        assert pipes.document(wire.END)["root"] == base.root(2) != base.root()


def test_nothing_known_means_everything_is_told(disk: Path) -> None:
    with Pipes() as pipes:
        pipes.start(disk, base_of(disk, UNKNOWN))
        pipes.document(wire.READY)
        told = [pipes.message()[:3] for _ in range(4)]
        assert told == [(wire.DATA, 0, 1), (wire.ZEROS, 1, 2), (wire.DATA, 3, 1), (wire.DATA, 4, 1)]


def test_runs_end_so_that_progress_moves(tmp_path: Path) -> None:
    disk, run = tmp_path / "disk", wire.RUNS[wire.ZEROS]
    with disk.open("wb") as file:
        file.truncate(CHUNK * (2 * run + 1))
    with Pipes() as pipes:
        pipes.start(disk, base_of(disk, ZERO))
        pipes.document(wire.READY)
        runs = [pipes.message()[1:3] for _ in range(3)]
        assert runs == [(0, run), (run, run), (2 * run, 1)]


@pytest.mark.parametrize("leaf", [4096, 16384, 65536])
def test_it_keeps_scanning_while_it_waits_for_leaves_but_asks_for_no_more_than_agreed(
    tmp_path: Path, leaf: int
) -> None:
    disk, chunk = tmp_path / "disk", wire.MAX_CHUNK
    many = wire.window(chunk) + 2
    old = b"x" * wire.GRAIN
    with disk.open("wb") as file:
        file.truncate(chunk * many)
        for index in range(many):
            file.seek(index * chunk + 3 * wire.GRAIN)
            file.write(old)
    base = held(disk, chunk)
    with disk.open("r+b") as file:
        for index in range(many):
            file.seek(index * chunk + 3 * wire.GRAIN)
            file.write(b"y" * 512)
    answer = wire.NUMBER.pack(3) + b"".join(base.digester().leaves(old, leaf)) * (leaf < wire.GRAIN)
    with Pipes() as pipes:
        pipes.start(disk, base, leaf=leaf)
        pipes.document(wire.READY)
        asked = wire.window(chunk)
        assert asked == wire.RUNS[wire.ASK]
        kind, first, count, _, digests = pipes.message()
        assert (kind, first, count) == (wire.ASK, 0, asked)
        assert len(digests) == count * wire.DIGEST * (chunk // wire.GRAIN)
        for index in range(3):
            pipes.send(wire.LEAVES, index, answer, 1)
        patches = [
            pipes.message() for _ in range(3)
        ]  # which are not held back while it waits for more answers
        for index in reversed(range(3, many)):  # answers in any order; these wait until it takes them
            pipes.send(wire.LEAVES, index, answer, 1)
        rest = [pipes.message() for _ in range(many - 3 + 1)]
        assert [message[:3] for message in rest if message[0] == wire.ASK] == [(wire.ASK, asked, 2)]
        patches += [message for message in rest if message[0] == wire.PATCH]
        assert [message[1] for message in patches] == list(range(many))
        piece = wire.PIECE.pack(3 * wire.GRAIN, leaf, False) + b"y" * 512 + b"x" * (leaf - 512)
        assert {message[4] for message in patches} == {piece}
        assert pipes.document(wire.END).keys() == {"root"}


def test_zeros_inside_a_chunk_are_left_out(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    grain = wire.GRAIN
    disk.write_bytes(bytes(grain) + b"a" * 2 * grain + bytes(grain) + b"b" * grain + bytes(3 * grain))
    base = Manifest.new(8 * grain, 8 * grain, "", ZERO)
    with Pipes() as pipes:
        pipes.start(disk, base)
        pipes.document(wire.READY)
        kind, _, count, _, payload = pipes.message()
        assert (kind, count) == (wire.DATA, 2)
        table = wire.PIECE.pack(grain, 2 * grain, False) + wire.PIECE.pack(4 * grain, grain, False)
        assert payload == table + b"a" * 2 * grain + b"b" * grain


@pytest.mark.parametrize(
    ("count", "payload", "said"),
    [
        (1, b"", "bytes of leaves"),
        (1, wire.NUMBER.pack(0) + bytes(5), "bytes of leaves"),
        (0, bytes(wire.DIGEST), "bytes of leaves"),
        (1, wire.NUMBER.pack(0) + bytes(160000), "bytes of leaves"),
        (1, wire.NUMBER.pack(1), "asked for grain 1"),
    ],
)
def test_wrong_leaves_are_refused(disk: Path, count: int, payload: bytes, said: str) -> None:
    base = held(disk)
    disk.write_bytes(b"A" + disk.read_bytes()[1:])
    with Pipes() as pipes:
        pipes.start(disk, base, leaf=4096)
        pipes.document(wire.READY)
        pipes.send(wire.LEAVES, 0, payload, count)
        while (message := pipes.message())[0] != wire.ERROR:
            pass
        assert said in json.loads(message[4])["message"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hashes": ["sha3"]}, "cannot compute sha3"),
        ({"device_candidates": ["/nonexistent/a", "/nonexistent/b"]}, "/nonexistent/a, /nonexistent/b"),
        ({"key": "not hex"}, "fault of the agent: ValueError"),
    ],
)
def test_it_says_why_it_cannot(disk: Path, changes: dict[str, Any], said: str) -> None:
    with Pipes() as pipes:
        pipes.start(disk, base_of(disk, ZERO), **changes)
        assert said in pipes.document(wire.ERROR)["message"]
        assert pipes.process.wait(DEADLINE) == 1


def test_a_disk_of_another_size_is_not_read(disk: Path) -> None:
    base = Manifest.new(disk.stat().st_size + 512, CHUNK, "", ZERO)
    with Pipes() as pipes:
        pipes.start(disk, base)
        message = pipes.document(wire.ERROR)["message"]
    assert all(part in message for part in (str(disk), str(base.size), str(disk.stat().st_size)))


def test_it_waits_for_a_disk_that_is_being_attached(disk: Path, tmp_path: Path) -> None:
    later = tmp_path / "lun0"
    with Pipes() as pipes:
        pipes.start(later, base_of(disk, ZERO), wait=30, device_candidates=["/nonexistent/x", str(later)])
        later.symlink_to(disk)
        assert pipes.document(wire.READY)["device"] == str(later)


def test_a_place_that_cannot_be_read_is_named() -> None:
    """The memory of a process at address 0 stands for a bad block: reading it is EIO."""
    told = subprocess.run(
        [sys.executable, "-c", UNREADABLE], capture_output=True, text=True, timeout=30, check=True
    )
    assert "cannot read /proc/self/mem at offset 0: Input/output error [0]" in told.stdout


def test_a_disk_that_is_detached_is_named_with_the_place(disk: Path) -> None:
    """To whoever has opened it a disk that was pulled out of Linux has an end where it is read next."""
    base = held(disk)
    with Pipes() as pipes:
        pipes.offer(disk, base)
        pipes.document(wire.READY)
        os.truncate(disk, CHUNK)
        pipes.begin(base)
        while (message := pipes.message())[0] != wire.ERROR:
            pass
    told = json.loads(message[4])
    assert told["offset"] == CHUNK
    assert told["message"] == f"{disk} ends at offset {CHUNK}: no longer attached"


UNREADABLE = """
import os
from coriolis_azure.agent import scan, wire
from coriolis_azure.agent.pack import Packer
job = dict(size=4096, chunk=4096, choose=True, leaf=0, compress="none", packings=[], threads=2, key="00" * 32)
out = wire.Output(wire.pipe_writer(1))
host, told = os.pipe()
for index, digests in ((0, wire.ZERO), (1, b"")):
    os.write(told, wire.HEAD.pack(wire.BASE, 0, index, 0, len(digests), wire.ZERO) + digests)
disk = scan.Scan(job, "blake2b", wire.Input(host), out)
disk.fd, disk.device = os.open("/proc/self/mem", os.O_RDONLY), "/proc/self/mem"
try:
    disk.run()
except wire.Failure as failure:
    print(failure, [failure.offset])
"""


@pytest.mark.parametrize("when", ["before the job", "while it waits for a disk", "in the middle of the scan"])
def test_it_ends_when_the_host_is_gone(tmp_path: Path, when: str) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.write(b"x" * (64 << 20))  # more than the pipe holds, so that it is blocked writing
    with Pipes() as pipes:
        if when == "while it waits for a disk":
            pipes.start(tmp_path / "never", base_of(disk, ZERO), wait=60)
        elif when == "in the middle of the scan":
            pipes.start(disk, base_of(disk, ZERO))
            pipes.document(wire.READY)
        pipes.stdin.close()
        assert pipes.process.wait(DEADLINE) == 0


@pytest.mark.parametrize("whole", [True, False])
def test_the_threads_of_a_scan_end_where_the_process_goes_on(whole: bool) -> None:
    before = set(threading.enumerate())
    results = scan.ordered(str, range(20), 3, 4)
    assert next(results) == "0"
    if whole:
        assert list(results) == [str(number) for number in range(1, 20)]
    assert isinstance(results, Generator)
    results.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()


def test_it_ends_when_nobody_reads_any_more(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * (16 << 20))
    with Pipes() as pipes:
        pipes.start(disk, base_of(disk, ZERO))
        pipes.document(wire.READY)
        pipes.stdout.close()
        assert pipes.process.wait(DEADLINE) == 0


def test_the_secret_is_never_said(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = base_of(disk, ZERO)
    with Pipes() as pipes:
        pipes.start(disk, base, compress=None, chunk="?")
        assert "fault of the agent" in pipes.document(wire.ERROR)["message"]
        assert pipes.process.wait(DEADLINE) == 1
        heard = bytes(pipes.heard) + "".join(capfd.readouterr()).encode()
    assert base.key not in heard
    assert base.key.hex().encode() not in heard
    assert b"Traceback" not in heard


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize(
    ("content", "most"),
    [
        (os.urandom(16 << 10) + bytes(range(256)) * 4032, 0.05),
        (bytes(range(256)) * 256 + os.urandom(960 << 10), 0.95),
        (os.urandom(1 << 20), 1.0),
    ],
    ids=["after a random start", "in one part", "nowhere"],
)
def test_auto_compresses_what_can_be_compressed_wherever_that_lies(
    content: bytes, most: float, pieces: int
) -> None:
    size = -(-len(content) // pieces)
    buffers = [b"table", *(memoryview(content)[at : at + size] for at in range(0, len(content), size))]
    packing, packed = Packer("auto", ["zlib"], wire.Rate(10e6), 1).packed(buffers)
    sent = sum(len(part) for part in packed)
    assert sent <= most * len(content) + len(b"table")
    assert (packing == wire.RAW) == (most == 1.0)


def test_auto_sends_raw_where_the_line_is_faster_than_compression() -> None:
    packing, _ = Packer("auto", ["zlib"], wire.Rate(1e9), 1).packed([b"table", bytes(1 << 20)])
    assert packing == wire.RAW
