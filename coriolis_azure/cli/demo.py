"""The demo on the sandbox, with real bytes: replicate, change, replicate again, compare everything."""

from __future__ import annotations

import filecmp
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import sandbox
from ..errors import CoriolisAzureError
from ..events import Notice, Report, Step, amount
from ..model import Json
from ..results import Replicated
from ..settings import read_json
from ..source import Source

_MIB = 1 << 20
VM = "web-1"
# The second run may send whole leaves of 64 KiB where less was written.
_SLACK = 2.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of the demo: two runs, the resources before and after, and whether each check held."""

    first: Replicated
    second: Replicated
    written_bytes: int
    resources_before: list[Json]
    resources_after: list[Json]
    checks: dict[str, bool]

    @property
    def held(self) -> bool:
        """Whether every check held."""
        return all(self.checks.values())

    def to_json(self) -> Json:
        """Plain JSON values."""
        return {
            "held": self.held,
            "checks": self.checks,
            "first": self.first.to_json(),
            "second": self.second.to_json(),
            "written_bytes": self.written_bytes,
            "resources_before": self.resources_before,
            "resources_after": self.resources_after,
        }


def run(report: Report, keep: Path | None = None) -> Outcome:
    """Run the demo in a temporary folder, or in the new folder `keep`, which is not deleted."""
    with ExitStack() as stack:
        if keep:
            keep.mkdir(parents=True, exist_ok=False)
            folder = keep
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coriolis-azure-demo-")))
        disks = _make_disks(folder, report)
        azure = folder / "azure"
        report(Step("start sandbox", str(azure)))
        stack.enter_context(_serving(azure))
        sandbox.add_vm(azure, VM, disks["os"], [disks["data-0"], disks["data-1"]])
        connection, environment = read_json(azure / "connection.json"), read_json(azure / "environment.json")
        source = stack.enter_context(Source(connection, environment, report=report))
        source.journals = None
        before = sandbox.resources(azure)
        images = folder / "images"
        checks: dict[str, bool] = {}

        report(Step("first run", "everything that is not zero"))
        first = source.replicate(VM, images)
        checks.update(_compared("first run", disks, images))

        written = _change(disks, report)
        for name in written:
            sandbox.write(azure, VM, "os" if name == "os" else int(name.removeprefix("data-")), disks[name])
        report(Step("second run", f"{amount(sum(written.values()))} were changed"))
        second = source.replicate(VM, images)
        checks.update(_compared("second run", disks, images))

        after = sandbox.resources(azure)
        checks["resources after = resources before"] = after == before
        checks["nothing left behind"] = not (first.left_behind or second.left_behind)
        sent = sum(disk.sent_bytes for disk in second.disks)
        checks["second run moved only what changed"] = sent <= _SLACK * sum(written.values())
        checks["the disk without changes was skipped"] = second.disks[2].sent_bytes == 0
        return Outcome(first, second, sum(written.values()), before, after, checks)


@contextmanager
def _serving(folder: Path) -> Iterator[None]:
    """Run `coriolis-azure sandbox serve` in its own process, as a user would."""
    command = [sys.executable, "-m", "coriolis_azure", "sandbox", "serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            if not process.stdout or process.stdout.readline().strip() != "ready":
                raise CoriolisAzureError("the sandbox did not start")
            yield
        finally:
            process.terminate()


def _make_disks(folder: Path, report: Report) -> dict[str, Path]:
    """Make the raw images of the VM's disks."""
    disks = {name: folder / f"vm-{name}.raw" for name in ("os", "data-0", "data-1")}
    kind = _make_os_disk(disks["os"], folder)
    report(Notice(f"OS disk: {kind}; data disks: extents of random, text and zero data"))
    _make_extents(disks["data-0"], 96 * _MIB, seed=1)
    _make_extents(disks["data-1"], 48 * _MIB, seed=2)
    return disks


def _make_os_disk(path: Path, folder: Path) -> str:
    """Make an OS disk, partitioned and with an ext4 filesystem if e2fsprogs is installed; return a description."""
    size, start = 192 * _MIB, _MIB
    mkfs = _e2fs_tool("mkfs.ext4")
    if not mkfs:
        _make_extents(path, size, seed=0)
        return "extents of random, text and zero data (no mkfs.ext4 here)"
    files, filesystem = folder / "files", folder / "filesystem.raw"
    files.mkdir()
    rng = random.Random(0)  # noqa: S311 - content of a demo
    for index in range(24):
        (files / f"photo-{index}.bin").write_bytes(rng.randbytes(2 * _MIB))
        (files / f"log-{index}.txt").write_text(f"2026-11-24 service {index} started\n" * 20000)
    command = [mkfs, "-q", "-F", "-d", str(files), str(filesystem), f"{(size - start) >> 10}k"]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    with path.open("wb") as disk, filesystem.open("rb") as content:
        disk.write(_partition_table(start // 512, (size - start) // 512))
        disk.seek(start)
        shutil.copyfileobj(content, disk, _MIB)
        disk.truncate(size)
    shutil.rmtree(files)
    filesystem.unlink()
    return "a partition table and an ext4 filesystem with 48 files"


def _partition_table(first: int, count: int) -> bytes:
    """A master boot record with one Linux partition, in sectors of 512 bytes."""
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", first, count)
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"


def _make_extents(path: Path, size: int, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - content of a demo
    with path.open("wb") as disk:
        while disk.tell() < size:
            length = min(rng.choice((64 << 10, 256 << 10, _MIB)), size - disk.tell())
            match rng.choice(("random", "text", "zero")):
                case "random":
                    disk.write(rng.randbytes(length))
                case "text":
                    disk.write(
                        (b"%08d all work and no play makes a dull disk\n" % disk.tell() * (length // 32))[
                            :length
                        ]
                    )
                case _:
                    disk.seek(length, os.SEEK_CUR)
        disk.truncate(size)


def _change(disks: dict[str, Path], report: Report) -> dict[str, int]:
    """Change the content of two of the disks; return the bytes written, by disk."""
    rng = random.Random(3)  # noqa: S311 - content of a demo
    written = {"os": _add_file(disks["os"], rng.randbytes(3 * _MIB)), "data-0": 0}
    with disks["data-0"].open("r+b") as disk:
        for offset in range(5 * _MIB, 90 * _MIB, 17 * _MIB):
            disk.seek(offset + 4096)
            written["data-0"] += disk.write(rng.randbytes(64 << 10))
        disk.seek(33 * _MIB)
        written["data-0"] += disk.write(bytes(2 * _MIB))
    report(
        Notice(
            "changed: a new file of 3 MiB on os; five places and a zeroed range on data-0; nothing on data-1"
        )
    )
    return written


def _add_file(path: Path, content: bytes) -> int:
    """Write `content` as a new file into the OS disk's filesystem, or over some bytes if it has none."""
    debugfs = _e2fs_tool("debugfs")
    if debugfs and _e2fs_tool("mkfs.ext4"):
        with tempfile.NamedTemporaryFile(dir=path.parent) as new:
            new.write(content)
            new.flush()
            command = [debugfs, "-w", "-R", f"write {new.name} new-file.bin", f"{path}?offset={_MIB}"]
            subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    else:
        with path.open("r+b") as disk:
            disk.seek(40 * _MIB)
            disk.write(content)
    return len(content)


def _e2fs_tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _compared(run: str, disks: dict[str, Path], images: Path) -> dict[str, bool]:
    filecmp.clear_cache()
    return {
        f"{run}: {name} is identical, byte for byte": filecmp.cmp(disk, images / f"{name}.raw", shallow=False)
        for name, disk in disks.items()
    }
