"""Lines that are slower than the disks or long, and disks that are slower than the line, as in Azure. Needs root.

    python benchmarks/lines.py [--scene compression|disks|distance] [--rounds 5] [--mib 300] [--data FILE]

The worker's OpenSSH runs in a network namespace. The line to it is shaped by the kernel (tbf), so its TCP is a real
one; both ends share this machine's processors. Each result is compared with its disk.

`compression`: one disk, ours with the setting "auto" and without compression against `zstd -1` in a pipe over ssh. The
disk holds what is installed under /usr, or FILE. `disks`: four disks of random bytes, which the kernel limits to
60 MB/s each as Azure limits each disk, against `ssh cat` side by side. `distance`: one disk of random bytes, eight
times as large, over lines of 1 Gbit/s with round trips of 20 and 80 ms (`distance.py`), against `ssh cat`.

Prints the medians, their ranges, and how much longer ours takes than the peer in the same run. The time of ours starts
when its modules are imported, which takes another second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from worker import SshServer

HERE = Path(__file__).parent
MIB = 1 << 20
SPACE, HOST, ADDRESS = "lines", "10.9.0.1", "10.9.0.2"
PORT = 45000  # of the direct channel
THROTTLE = Path("/sys/fs/cgroup/blkio")
DISK_BYTES = 60_000_000  # a second
Way = Callable[[list[Path], list[Path]], float]  # from the disks to the images; the seconds that it took


@contextlib.contextmanager
def namespace() -> Iterator[list[str]]:
    """A network namespace; the command that runs another one there. One that a killed run has left is replaced."""
    for left in (["link", "del", "lines-host"], ["netns", "del", SPACE]):
        subprocess.run(["ip", *left], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["ip", "netns", "add", SPACE], check=True)
    try:
        yield ["ip", "netns", "exec", SPACE]
    finally:
        subprocess.run(["ip", "netns", "del", SPACE], check=True)


@contextlib.contextmanager
def line(mbit: int) -> Iterator[list[str]]:
    """A line of so many Mbit/s to a network namespace; the command that runs another one there."""
    with namespace() as there:
        for command in (
            f"ip link add lines-host type veth peer name lines-worker netns {SPACE}",
            f"ip addr add {HOST}/24 dev lines-host",
            "ip link set lines-host up",
            f"{shlex.join(there)} ip addr add {ADDRESS}/24 dev lines-worker",
            f"{shlex.join(there)} ip link set lines-worker up",
            f"{shlex.join(there)} ip link set lo up",
            f"{shlex.join(there)} tc qdisc add dev lines-worker root tbf rate {mbit}mbit burst 512kb latency 30ms",
        ):
            subprocess.run(shlex.split(command), check=True)
        try:
            yield there
        finally:
            # What still runs in a namespace keeps its devices for a while.
            subprocess.run(["ip", "link", "del", "lines-host"], check=True)


@contextlib.contextmanager
def long_line(mbit: int, ms: int) -> Iterator[list[str]]:
    """The same with a round trip of so many milliseconds, by `distance.py`."""
    command = [sys.executable, str(HERE / "distance.py"), SPACE, HOST, ADDRESS, str(mbit), str(ms)]
    with (
        namespace() as there,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield there
        process.stdin.close()


@contextlib.contextmanager
def devices(images: list[Path], limit: int) -> Iterator[tuple[list[Path], list[str]]]:
    """Loop devices, and a command. What that runs reads `limit` bytes a second of each; 0 for no limit."""
    group = THROTTLE / SPACE
    found = list[Path]()
    try:
        for image in images:
            command = ["losetup", "--find", "--show", str(image)]
            found.append(Path(subprocess.check_output(command, text=True).strip()))
        if not limit:
            yield found, []
            return
        group.mkdir(exist_ok=True)
        for device in found:
            number = subprocess.check_output(["lsblk", "-ndo", "MAJ:MIN", str(device)], text=True).strip()
            (group / "blkio.throttle.read_bps_device").write_text(f"{number} {limit}")
        yield found, ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        for device in found:
            subprocess.run(["losetup", "--detach", str(device)], check=True)
        if group.exists():
            group.rmdir()


def piped(server: SshServer, there: str, here: str = "") -> Way:
    """A program of the worker, side by side for each disk, and one of this host behind it."""

    def run(disks: list[Path], images: list[Path]) -> float:
        began = time.perf_counter()
        pairs = zip(disks, images, strict=True)
        programs = [
            f"{shlex.join([*server.command, f'{there} < {disk}'])} {here} > {image}" for disk, image in pairs
        ]
        running = [subprocess.Popen(["bash", "-o", "pipefail", "-c", program]) for program in programs]
        if any(process.wait() for process in running):
            raise SystemExit(f"{there} failed")
        return time.perf_counter() - began

    return run


def ours(server: SshServer, *, port: int, compress: str, limit: int = 0) -> Way:
    """A run of ours."""

    def run(disks: list[Path], images: list[Path]) -> float:
        task = {
            "worker": asdict(server.worker),
            "disks": [[str(disk), str(image)] for disk, image in zip(disks, images, strict=True)],
            "port": port,
            "full": True,
            "compress": compress,
            "limits": [limit] * len(disks),
        }
        command = [sys.executable, str(HERE / "ours.py"), json.dumps(task)]
        return float(json.loads(subprocess.check_output(command))["seconds"])

    return run


def measured(ways: dict[str, Way], disks: list[Path], folder: Path, rounds: int) -> dict[str, list[float]]:
    """The seconds of each way, interleaved, each with nothing cached of the disks and new images."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    images = [folder / f"{number}.raw" for number in range(len(disks))]
    for _ in range(rounds):
        for name, way in ways.items():
            for device in disks:
                subprocess.run(["blockdev", "--flushbufs", str(device)], check=True)
            seconds[name].append(way(disks, images))
            for disk, image in zip(disks, images, strict=True):
                if subprocess.run(["cmp", "-s", str(disk), str(image)], check=False).returncode:
                    raise SystemExit(f"{name}: {image} differs from its disk")
            for path in folder.iterdir():
                path.unlink() if path.is_file() else shutil.rmtree(path)
    return seconds


def show(title: str, seconds: dict[str, list[float]]) -> None:
    """Print a table; the first way is the peer."""
    peer = statistics.median(next(iter(seconds.values())))
    print(title)
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(
            f"  {name:24} {middle:6.2f} s ({min(each):.2f} to {max(each):.2f})  {middle / peer:.2f}",
            flush=True,
        )


def compression(folder: Path, images: Path, asked: argparse.Namespace) -> None:
    """One disk that can be compressed, on lines of 250, 500, 1000 and 4000 Mbit/s."""
    disk = folder / "disk"
    command = f"cat {shlex.quote(asked.data)}" if asked.data else "tar -c -C /usr lib share 2>/dev/null"
    subprocess.run(f"{command} | head -c {asked.mib * MIB} > {disk}", shell=True, check=True)
    for mbit in (250, 500, 1000, 4000):
        with (
            line(mbit) as there,
            devices([disk], 0) as (disks, _),
            contextlib.closing(SshServer(folder / f"ssh-{mbit}", ADDRESS, there)) as server,
        ):
            ways = {
                "zstd -1 over ssh": piped(server, "zstd -1", "| zstd -d"),
                "ours over TLS": ours(server, port=PORT, compress="auto"),
                "ours over SSH": ours(server, port=0, compress="auto"),
                "ours over TLS, raw": ours(server, port=PORT, compress="none"),
                "ours over SSH, raw": ours(server, port=0, compress="none"),
            }
            show(f"{mbit} Mbit/s, {asked.mib} MiB", measured(ways, disks, images, asked.rounds))


def capped(folder: Path, images: Path, asked: argparse.Namespace) -> None:
    """Four disks of 60 MB/s each and a line of 2 Gbit/s."""
    files = [folder / f"disk-{number}" for number in range(4)]
    for file in files:
        subprocess.run(f"head -c {asked.mib * MIB} /dev/urandom > {file}", shell=True, check=True)
    with (
        line(2000) as there,
        devices(files, DISK_BYTES) as (disks, limited),
        contextlib.closing(SshServer(folder / "ssh", ADDRESS, [*limited, *there])) as server,
    ):
        ways = {
            "ssh cat": piped(server, "cat"),
            "ours over TLS": ours(server, port=PORT, compress="none", limit=DISK_BYTES),
            "ours over SSH": ours(server, port=0, compress="none", limit=DISK_BYTES),
        }
        show(f"four disks of 60 MB/s, {asked.mib} MiB each", measured(ways, disks, images, asked.rounds))


def distance(folder: Path, images: Path, asked: argparse.Namespace) -> None:
    """One disk over 20 and 80 ms."""
    disk, mib = folder / "disk", 8 * asked.mib
    subprocess.run(f"head -c {mib * MIB} /dev/urandom > {disk}", shell=True, check=True)
    for ms in (20, 80):
        with (
            long_line(1000, ms) as there,
            devices([disk], 0) as (disks, _),
            contextlib.closing(SshServer(folder / f"ssh-{ms}", ADDRESS, there)) as server,
        ):
            ways = {
                "ssh cat": piped(server, "cat"),
                "ours over TLS": ours(server, port=PORT, compress="none"),
                "ours over SSH": ours(server, port=0, compress="none"),
            }
            needed = mib * MIB / 125e6
            show(
                f"1 Gbit/s over {ms} ms, {mib} MiB: the line needs {needed:.1f} s",
                measured(ways, disks, images, asked.rounds),
            )


SCENES = {"compression": compression, "disks": capped, "distance": distance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scene", choices=SCENES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=300)
    parser.add_argument("--data")
    asked = parser.parse_args()
    if os.geteuid():
        sys.exit("Network namespaces and loop devices need root: run this as root.")
    for name, scene in SCENES.items():
        if asked.scene in (None, name):
            with TemporaryDirectory() as disks, TemporaryDirectory(dir="/dev/shm") as images:
                scene(Path(disks), Path(images), asked)


if __name__ == "__main__":
    main()
