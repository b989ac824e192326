"""The disks of the benchmarks: made from a seed, so every machine measures the same content.

base      40 % random, 30 % text, 30 % written zeros, in extents of 64 KiB to 1 MiB
scattered base with 1 % of its blocks of 4 KiB changed, anywhere
clustered base with 1 % changed in five places
ext4      a file system with real files; `ext4 after` is the same one after files were removed, made and grown
empty     written zeros
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
BLOCK = 4096


def make(folder: Path, name: str, size: int) -> Path:
    """The image `name` of `size` bytes in `folder`, made unless it is there."""
    path = folder / name.replace(" ", "-")
    if not path.exists():
        unready = path.with_suffix(".new")
        _MAKERS[name](unready, size)
        unready.rename(path)
    return path


def _base(path: Path, size: int) -> None:
    chance = random.Random(1)
    noise, text = chance.randbytes(8 * MIB), _text(chance, 8 * MIB)
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            length = min(left, chance.randrange(1, 17) * 65536)
            kind, start = chance.random(), chance.randrange(7 * MIB)
            if kind < 0.4:
                file.write(noise[start : start + length])
            else:
                file.write(text[start : start + length] if kind < 0.7 else bytes(length))


def _text(chance: random.Random, size: int) -> bytes:
    words = [chance.randbytes(chance.randrange(1, 6)).hex() for _ in range(4000)]
    parts, length = [], 0
    while length < size:
        parts.append(chance.choice(words))
        length += len(parts[-1]) + 1
    return " ".join(parts).encode()[:size].ljust(size)


def _scattered(path: Path, size: int) -> None:
    blocks = random.Random(2).sample(range(size // BLOCK), size // BLOCK // 100)
    _changed(path, size, [(block * BLOCK, BLOCK) for block in sorted(blocks)])


def _clustered(path: Path, size: int) -> None:
    length = size // 500 // BLOCK * BLOCK
    _changed(path, size, [(size // 5 * place + BLOCK * 17, length) for place in range(5)])


def _changed(path: Path, size: int, places: list[tuple[int, int]]) -> None:
    chance = random.Random(3)
    shutil.copyfile(make(path.parent, "base", size), path)
    with path.open("r+b") as file:
        for offset, length in places:
            file.seek(offset)
            file.write(chance.randbytes(length))


def _ext4(path: Path, size: int) -> None:
    """Python's own library, as often as it takes to fill 40 % of the disk, and some files of noise."""
    chance = random.Random(4)
    tree = path.with_suffix(".tree")
    copies = 0
    while (used := sum(file.stat().st_size for file in tree.rglob("*"))) < 0.4 * size:
        shutil.copytree(
            sysconfig.get_path("stdlib"),
            tree / f"copy{copies}",
            ignore=shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.so", "*.a"),
        )
        for number in range(8):
            (tree / f"copy{copies}" / f"noise{number}").write_bytes(chance.randbytes(size // 100))
        copies += 1
        if not used and copies > 1:
            raise SystemExit("the library of this Python is empty")
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, path], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)


def _ext4_after(path: Path, size: int) -> None:
    """A day's work: some hundred files removed, as many made, a log that has grown."""
    chance = random.Random(5)
    shutil.copyfile(make(path.parent, "ext4", size), path)
    fresh = path.with_suffix(".file")
    commands = []
    for number in range(40):
        commands.append(f"rm /copy0/{('abc.py', 'ast.py', 'argparse.py', 'typing.py')[number % 4]}")
        fresh.with_name(f"{fresh.name}{number}").write_bytes(
            chance.randbytes(size // 80000) + _text(chance, size // 20000)
        )
        commands.append(f"write {fresh}{number} /new{number}")
    subprocess.run(
        ["debugfs", "-w", "-f", "-", path],
        input="\n".join(commands).encode(),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for file in path.parent.glob(f"{fresh.name}*"):
        file.unlink()


def _empty(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(bytes(MIB))


_MAKERS: dict[str, Callable[[Path, int], None]] = {
    "base": _base,
    "scattered": _scattered,
    "clustered": _clustered,
    "ext4": _ext4,
    "ext4 after": _ext4_after,
    "empty": _empty,
}


def changed_bytes(one: Path, other: Path, unit: int) -> int:
    """Bytes of the units in which two images of one size differ."""
    total = 0
    with one.open("rb", buffering=0) as a, other.open("rb", buffering=0) as b:
        while data := a.read(unit):
            total += len(data) if data != b.read(unit) else 0
    return total


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) * MIB), os.getpid())
