"""Ours and every peer that is installed, on the same disks, in turn: `tox -e bench`, or with `-- --full` all of it.

    python benchmarks/transfers.py [--full] [--mib N] [--rounds N] [--folder F] [--only PART]...

Prints a JSON line for each run and the table of targets; in full form it is also written into
docs/explanation/performance.md, with a plot beside it.
All go through one OpenSSH server on this machine or, where they have a way of their own,
past it; ours reads nothing back (`verify` off), as no peer does. Every result of the first two parts is compared
with the image, outside of the time that counts.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cryptography
import engine
import images
import paramiko
import worker

from coriolis_azure.events import counted
from coriolis_azure.replica.digests import Digests
from coriolis_azure.replica.files import FileMedium
from coriolis_azure.replica.manifest import DIGEST
from coriolis_azure.replica.replica import Replica

MIB = 1 << 20
HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "explanation"
PORT = 47100  # the first of the direct channel
ONE_WAY = 0.01
NO_SHA = ":~0x20000000"  # for OpenSSL on x86: bit 29 of the second word of features
INCREMENTALS = {"scattered": "base", "clustered": "base", "ext4 after": "ext4"}
PARTS = ("peers", "distance", "limit", "memory", "side", "writers", "plot")

OURS, OURS_SSH = "ours, TLS", "ours, SSH"
ENGINE, ENGINE_PLAIN, CAT, NBD, NBD_TLS, BDSYNC = (
    "orchestrator's engine (emulated)",
    "the same, without SHA instructions",
    "ssh cat, AES-128-GCM",
    "nbdcopy, plain",
    "nbdcopy, TLS",
    "bdsync",
)
RSYNC, RSYNC_SMALL = "rsync --inplace, SSH", "rsync --inplace -B 4096, SSH"
# Peer: how many times faster ours is to be, for a first run and for an incremental one.
TARGETS: dict[str, tuple[float | None, float | None]] = {
    ENGINE: (6, 6),
    ENGINE_PLAIN: (6, 6),
    RSYNC: (2, 3),
    RSYNC_SMALL: (None, 3),
    BDSYNC: (3, 2),
    CAT: (1, 3),
    NBD: (0.8, None),
    NBD_TLS: (None, None),  # no target: how much of the distance to the line above is encryption
}
NEEDS = {
    RSYNC: ("rsync",),
    RSYNC_SMALL: ("rsync",),
    BDSYNC: ("bdsync",),
    CAT: ("ssh",),
    NBD: ("nbdcopy", "nbdkit|qemu-nbd"),
    NBD_TLS: ("nbdcopy", "nbdkit", "openssl"),
}


@dataclass
class Bench:
    """What all measurements share, and what they have found: `rows` are runs, `facts` single figures."""

    folder: Path
    size: int
    rounds: int
    ssh: worker.SshServer
    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def note(self, **row: Any) -> None:
        """Keep what a run has shown, and print it."""
        self.rows.append(row)
        print(json.dumps({**row, "load": os.getloadavg()[0], "machine": self.machine}), flush=True)

    def middle(self, way: str, case: str, what: str = "seconds") -> float | None:
        """The median of a figure over the rounds; None where it was not measured."""
        found = [row[what] for row in self.rows if row["way"] == way and row["case"] == case]
        return statistics.median(found) if found else None


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--full", action="store_true", help="2 GiB, five rounds; writes docs/explanation/performance.md"
    )
    parser.add_argument("--mib", type=int, help="size of a disk")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--folder", type=Path, help="where the disks are; in memory where that is large enough"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be repeated")
    wanted = parser.parse_args()
    size = (wanted.mib or (2048 if wanted.full else 256)) * MIB
    rounds = wanted.rounds or (5 if wanted.full else 2)
    parts = wanted.only or [part for part in PARTS if wanted.full or part not in ("plot", "writers")]
    apart_from_others()
    with (
        TemporaryDirectory(dir=wanted.folder or roomy(7 * size), prefix="bench-") as name,
        ExitStack() as stack,
    ):
        server = worker.SshServer(Path(name, "ssh"))
        stack.callback(server.close)
        bench = Bench(Path(name), size, rounds, server, described(Path(name), size))
        measures: dict[str, Callable[[Bench], None]] = {
            "peers": peers,
            "distance": distance,
            "limit": limit,
            "memory": memory,
            "side": side,
            "writers": writers,
            "plot": plot,
        }
        for part in parts:
            measures[part](bench)
            if wanted.full and not wanted.only:  # after each, for what comes may fail
                keep(table(bench))
        print("\n" + table(bench))


def apart_from_others() -> None:
    """Go on in a network of our own, where that is allowed: the bytes on the loopback are all ours then."""
    if os.environ.get("BENCH_NET") or os.geteuid() or subprocess.run(["unshare", "-n", "true"]).returncode:
        return
    # tox's own Python, and the user's environment, in a shell that brings the loopback up first.
    command = f"ip link set lo up && exec {shlex.join([sys.executable, *sys.argv])}"
    os.execvpe("unshare", ["unshare", "-n", "sh", "-c", command], {**os.environ, "BENCH_NET": "own"})


def roomy(size: int) -> str | None:
    """Memory for the disks, where there is enough: the disk of this machine is not to be measured."""
    with Path("/proc/meminfo").open() as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    shared = Path("/dev/shm")
    fits = shared.is_dir() and min(free, shutil.disk_usage(shared).free) > size + (2 << 30)
    return str(shared) if fits else None


def described(folder: Path, size: int) -> dict[str, Any]:
    """The machine and the versions, as they may be published."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    flags = set(Path("/proc/cpuinfo").read_text().split())
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "paramiko": paramiko.__version__}
    versions["cryptography"] = cryptography.__version__
    for program, option in (
        ("ssh", "-V"),
        ("rsync", "--version"),
        ("nbdcopy", "--version"),
        ("bdsync", "-V"),
    ):
        if shutil.which(program):
            said = subprocess.run([program, option], capture_output=True, text=True)
            found = re.search(r"\d+\.[\w.]+", said.stdout + said.stderr)
            versions[program] = found.group() if found else "?"
    return {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "has": sorted(flags & {"aes", "sha_ni", "vaes", "avx512f"}),
        "linux": platform.release().split("-")[0],
        "disks": f"{size // MIB} MiB on {kind}",
        "versions": versions,
    }


def missing() -> dict[str, str]:
    """The peers that are not here, and what of them is not."""
    lacks = {}
    for peer, needs in NEEDS.items():
        for need in needs:
            if not any(shutil.which(program) for program in need.split("|")):
                lacks[peer] = need
    return lacks


def received() -> int:
    """Bytes that have gone over the loopback. /proc, unlike /sys, tells those of this process's own network."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


# Ours


def ours(
    bench: Bench, disks: list[tuple[Path, Path]], *, port: int = PORT, distant: int = 0, **task: Any
) -> dict[str, Any]:
    """A run of ours, past SSH where there is a `port`; `distant`: the port of a relay to the SSH server."""
    there = bench.ssh.worker
    if distant:
        there = replace(there, address=worker.RELAY, port=distant)
    pairs = [[str(image), str(target)] for image, target in disks]
    # As the product does it by default, but for reading back.
    document = {"worker": asdict(there), "port": port, "disks": pairs, "compress": "auto", **task}
    said: dict[str, Any] = json.loads(output([sys.executable, str(HERE / "ours.py"), json.dumps(document)]))
    if port and said["notices"]:
        raise SystemExit(f"a run of ours was not as it should be: {said['notices']}")
    return said


def output(command: list[str]) -> str:
    """What a program prints."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


# Peers


@contextmanager
def served_engine(
    image: Path, had: Path | None, *, plain: bool = False
) -> Iterator[Callable[[Path], dict[str, Any]]]:
    """The orchestrator's engine, whose worker's side runs while the block lasts.

    `plain`: as on a processor that has no instructions for SHA-256, like many of those in Azure.
    """
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "engine.py"), "serve", folder, str(image)]
        env = {**os.environ, "OPENSSL_ia32cap": NO_SHA} if plain else None
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        known = Path(folder, "had")
        if had:
            known.write_text(json.dumps(engine.hashes(had)))
        try:
            task = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            task |= {"size": image.stat().st_size, "had": str(known) if had else None}

            def fetch(target: Path) -> dict[str, Any]:
                document = json.dumps({**task, "target": str(target)})
                found: dict[str, Any] = json.loads(
                    output([sys.executable, str(HERE / "engine.py"), "fetch", document])
                )
                return found

            yield fetch
        finally:
            process.communicate()


def timed(run: Callable[[], object]) -> dict[str, Any]:
    """How long it takes, with the start of whatever program it is."""
    began = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - began}


def ssh_cat(bench: Bench, image: Path, target: Path) -> dict[str, Any]:
    """The plainest way there is, over what is there: nothing is truncated first."""
    with target.open("r+b" if target.exists() else "wb") as file:
        command = [*bench.ssh.command, f"cat {image}"]
        return timed(lambda: subprocess.run(command, check=True, stdout=file))


def rsync(bench: Bench, image: Path, target: Path, *options: str) -> dict[str, Any]:
    """rsync over the same SSH; `-I`: times say nothing of a disk."""
    *shell, host = bench.ssh.command
    command = ["rsync", "--inplace", "-I", *options, "-e", shlex.join(shell), f"{host}:{image}", str(target)]
    return timed(lambda: subprocess.run(command, check=True))


def bdsync(bench: Bench, image: Path, target: Path) -> dict[str, Any]:
    """bdsync with SHA-1, its fastest hash that is one; what is remote is what is to be had here."""
    if not target.exists():
        with target.open("wb") as file:
            file.truncate(image.stat().st_size)
    server = shlex.join([*bench.ssh.command, "bdsync --server"])
    program = f"bdsync --hash=sha1 --remdata {shlex.quote(server)} {target} {image} | bdsync --patch={target}"
    return timed(lambda: subprocess.run(program, shell=True, check=True))


def nbdcopy(bench: Bench, image: Path, target: Path, *, tls: bool = False) -> dict[str, Any]:
    """The practical limit: C, several connections, nothing compared; no encryption, or its own choice of TLS."""
    port, name = str(worker.free_port()), "nbd"
    if shutil.which("nbdkit"):
        server = ["nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", port, "file", str(image)]
    else:
        server = ["qemu-nbd", "-r", "-t", "-e", "8", "-b", "127.0.0.1", "-p", port, "-f", "raw", str(image)]
    query = ""
    if tls:
        folder = certificates(bench.folder / "tls")
        server[1:1] = ["--tls=require", f"--tls-certificates={folder}"]
        name, query = "nbds", f"?tls-certificates={folder}"
    process = subprocess.Popen(server, stderr=subprocess.DEVNULL)
    try:
        worker.wait_for(int(port))
        command = ["nbdcopy", f"{name}://127.0.0.1:{port}{query}", str(target)]
        return timed(lambda: subprocess.run(command, check=True))
    finally:
        process.terminate()
        process.wait()


def certificates(folder: Path) -> Path:
    """A folder with a certificate that is its own authority, as nbdkit and nbdcopy want them."""
    if not folder.exists():
        folder.mkdir(mode=0o700)
        wanted = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=bench"
        files = ["-keyout", str(folder / "server-key.pem"), "-out", str(folder / "server-cert.pem")]
        named = ["-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run(["openssl", *wanted.split(), *named, *files], check=True, stderr=subprocess.DEVNULL)
        shutil.copy(folder / "server-cert.pem", folder / "ca-cert.pem")
    return folder


Ways = dict[str, Callable[[Path], dict[str, Any]]]


def peers(bench: Bench) -> None:
    """The first table: all ways, a first run of two disks and three incremental ones."""
    cases: list[str] = ["base", "scattered", "clustered"]
    if shutil.which("mkfs.ext4") and shutil.which("debugfs"):
        cases += ["ext4", "ext4 after"]
    else:
        print("mkfs.ext4 or debugfs is missing: no file system is measured", file=sys.stderr)
    for case in cases:
        image = images.make(bench.folder, case, bench.size)
        before = images.make(bench.folder, INCREMENTALS[case], bench.size) if case in INCREMENTALS else None
        with served_engine(image, before) as fetch, served_engine(image, before, plain=True) as slower:
            engines = {ENGINE: fetch, ENGINE_PLAIN: slower}
            compared(bench, case, image, before, ways_for(bench, image, before, engines))


def ways_for(bench: Bench, image: Path, before: Path | None, engines: Ways) -> Ways:
    """All that can be measured here."""
    found: Ways = {
        OURS: lambda target: ours(bench, [(image, target)]),
        OURS_SSH: lambda target: ours(bench, [(image, target)], port=0),
        **engines,
        RSYNC: lambda target: rsync(bench, image, target),
        RSYNC_SMALL: lambda target: rsync(bench, image, target, "-B", "4096"),
        BDSYNC: lambda target: bdsync(bench, image, target),
        CAT: lambda target: ssh_cat(bench, image, target),
        NBD: lambda target: nbdcopy(bench, image, target),
        NBD_TLS: lambda target: nbdcopy(bench, image, target, tls=True),
    }
    absent = {*missing(), *((NBD, NBD_TLS) if before else (RSYNC_SMALL,))}
    if "sha_ni" not in bench.machine["has"]:
        absent.add(ENGINE_PLAIN)
    return {way: run for way, run in found.items() if way not in absent}


def compared(bench: Bench, case: str, image: Path, before: Path | None, ways: Ways) -> None:
    """All ways in turn, as many rounds as asked for. Each begins with the disk as it was before, or with none."""
    target = bench.folder / "target.raw"
    if before:
        ours(bench, [(before, target)])
        stamp = target.stat()
        kept = {path: path.read_bytes() for path in beside(target)}
        bench.facts[f"changed {case}"] = images.changed_bytes(before, image, 4096)
        bench.facts[f"changed chunks {case}"] = images.changed_bytes(before, image, MIB)
    for _ in range(bench.rounds):
        for way, run in ways.items():
            if before:
                with before.open("rb") as source, target.open("r+b") as file:
                    shutil.copyfileobj(source, file, MIB)
                os.utime(target, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
                for path, content in kept.items():
                    path.write_bytes(content)
            else:
                clear(target)
            os.sync()
            went = received()
            found = run(target)
            found["wire"] = received() - went
            if not filecmp.cmp(image, target, shallow=False):
                raise SystemExit(f"{way}, {case}: the target does not hold the image")
            bench.note(way=way, case=case, **found)
    clear(target)


def clear(target: Path) -> None:
    """Remove a target and what is kept beside it."""
    for path in (target, *beside(target)):
        path.unlink(missing_ok=True)


def beside(target: Path) -> list[Path]:
    """What is kept beside a target."""
    return list(target.parent.glob(f"{target.name}.*"))


# What else the issue of speed is about


def distance(bench: Bench) -> None:
    """A round trip of 20 ms, against the same relay without one."""
    image, target = images.make(bench.folder, "base", bench.size), bench.folder / "target.raw"
    for _ in range(bench.rounds):
        for one_way in (0, ONE_WAY):
            for way, port in ((OURS, PORT), (OURS_SSH, 0)):
                clear(target)
                with far(bench, one_way) as there:
                    found = ours(bench, [(image, target)], port=port, distant=there)
                bench.note(way=way, case=f"{2000 * one_way:g} ms", **found)
    clear(target)


@contextmanager
def far(bench: Bench, one_way: float) -> Iterator[int]:
    """The port of a relay to the SSH server; the port of the direct channel is relayed too."""
    with (
        worker.relayed(bench.ssh.port, one_way) as port,
        worker.relayed(PORT, one_way, listen=PORT),
    ):
        yield port


def limit(bench: Bench) -> None:
    """What comes in a second where a limit is given: noise, so that all is sent."""
    image, target = bench.folder / "noise", bench.folder / "target.raw"
    seconds = 20 if bench.rounds > 2 else 6
    for rate in (1, 50):
        with image.open("wb") as file:
            for _ in range(rate * seconds):
                file.write(os.urandom(MIB))
        for way, port in ((OURS, PORT), (OURS_SSH, 0)):
            clear(target)
            found = ours(bench, [(image, target)], port=port, rate=rate * MIB)
            bench.note(way=way, case=f"limit {rate}", reached=found["sent"] / MIB / found["seconds"], **found)
    image.unlink()
    clear(target)


def memory(bench: Bench) -> None:
    """The peak on both sides, with the SDK loaded: one disk, eight, 64, and one of many chunks."""
    base = images.make(bench.folder, "base", bench.size)
    small, tiny = bench.folder / "small", bench.folder / "tiny"
    for part, share in ((small, 4), (tiny, 32)):
        with base.open("rb") as source, part.open("wb") as file:
            file.write(source.read(bench.size // share))
    for (way, port), (chunk, count, image) in itertools.product(
        ((OURS, PORT), (OURS_SSH, 0)),
        ((1, 1, base), (1, 8, small), (1, 64, tiny), (4, 1, base), (4, 8, small)),
    ):
        disks = [(image, bench.folder / f"target{number}.raw") for number in range(count)]
        peaks(
            bench,
            way,
            f"{counted(count, 'disk')}, chunks of {chunk} MiB",
            disks,
            port=port,
            chunk=chunk * MIB,
        )
    disks = [(small, bench.folder / f"target{number}.raw") for number in range(8)]
    for way, port in ((OURS, PORT), (OURS_SSH, 0)):
        what = "8 disks that Azure limits to 60 MB/s, chunks of 1 MiB"
        peaks(bench, way, what, disks, port=port, chunk=MIB, limits=[60_000_000] * len(disks))
    small.unlink()
    # In chunks of 4 KiB, as nothing but their number matters here; each of them is known, and all become zeros.
    many, target = bench.size // 512, bench.folder / "many.raw"
    with small.open("wb") as file:
        file.truncate(many * 4096)
    with Replica(FileMedium(target)) as image_of_many:
        nothing = image_of_many.known("id", many * 4096, 4096, full=True)
        image_of_many.commit(replace(nothing, digests=Digests(os.urandom(DIGEST * many))))
        image_of_many.publish()
        image_of_many.close()  # which a place does, once all its disks are published
    peaks(bench, OURS, f"as many chunks as {many / MIB:g} TiB has", [(small, target)], port=PORT, chunk=4096)
    small.unlink()


def peaks(bench: Bench, way: str, what: str, disks: list[tuple[Path, Path]], **task: Any) -> None:
    """A run of ours, and the most memory that its processes took on each side."""
    with peak(b"# coriolis-azure agent") as seen, peak(b"ours.py") as host:
        found = ours(bench, disks, sdk=True, **task)
    bench.note(way=way, case=f"memory, {what}", worker_kib=max(seen), **{**found, "host_kib": max(host)})
    for _, target in disks:
        clear(target)


@contextmanager
def peak(program: bytes) -> Iterator[list[int]]:
    """KiB that all processes of `program` together take, seen every 50 ms; shared pages once."""
    seen, over = [0], threading.Event()
    mine = Path("/proc/self/ns/net").readlink()  # where we are in a network of our own, others' do not count

    def look() -> None:
        while not over.wait(0.05):
            total = 0
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    words = (process / "cmdline").read_bytes().split(b"\0")
                    if not any(program in word for word in words) or b"python" not in words[0]:
                        continue  # the shell that starts it has the same words
                    if (process / "ns" / "net").readlink() == mine:
                        told = (process / "smaps_rollup").read_text().splitlines()
                        total += next(int(line.split()[1]) for line in told if line.startswith("Pss:"))
                except (OSError, StopIteration):
                    continue
            seen.append(total)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def side(bench: Bench) -> None:
    """Two disks side by side, against one; and a disk of zeros, against reading it."""
    base, empty = (images.make(bench.folder, name, bench.size) for name in ("base", "empty"))
    targets = [bench.folder / f"target{number}.raw" for number in range(2)]
    for _ in range(bench.rounds):
        for case, disks in (
            ("one disk", [(base, targets[0])]),
            ("two disks", [(base, target) for target in targets]),
            ("empty", [(empty, targets[0])]),
        ):
            used = sum(os.times()[2:4])
            found = ours(bench, disks)
            bench.note(way=OURS, case=case, cpu=sum(os.times()[2:4]) - used, **found)
            for target in targets:
                clear(target)
        bench.note(way="dd", case="empty", **timed(lambda: read(empty)))
    empty.unlink()


def read(path: Path) -> None:
    """Read a file, as fast as that goes."""
    room = bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(room):
            pass


def writers(bench: Bench) -> None:
    """The orchestrator's SSH writer as the destination: benchmarks/writers.py, of which two figures are kept."""
    said = output([sys.executable, str(HERE / "writers.py"), "512"])
    print(said)
    near, far = re.findall(r"SSH, ours : SSH, orchestrator's way = ([\d.]+)", said)
    bench.facts["writer"] = f"{near} times its client, {far} over a delay"


def plot(bench: Bench) -> None:
    """Throughput against the chunk size, a line for each round-trip time: docs/explanation/performance.png."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    size = min(bench.size, 256 * MIB)
    image, target = bench.folder / "part", bench.folder / "target.raw"
    with images.make(bench.folder, "base", bench.size).open("rb") as source, image.open("wb") as file:
        file.write(source.read(size))
    chunks, trips = (64, 256, 1024, 4096), (0, 5, 20, 80)
    for _ in range(2):
        for trip in trips:
            with far(bench, trip / 2000) as there:
                for chunk in chunks:
                    clear(target)
                    found = ours(bench, [(image, target)], distant=there, chunk=chunk << 10)
                    bench.note(way=OURS, case=f"{trip} ms, {chunk} KiB", **found)
    image.unlink()
    clear(target)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for trip in trips:
        speeds = [size / MIB / (bench.middle(OURS, f"{trip} ms, {chunk} KiB") or 1) for chunk in chunks]
        axes.plot([str(chunk) for chunk in chunks], speeds, marker="o", label=f"{trip} ms")
    axes.set(xlabel="chunk, KiB", ylabel="MiB of disk a second", ylim=(0, None))
    axes.set_title(
        f"A first run of {size // MIB} MiB over TLS, with its start, by round-trip time", fontsize=9
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(DOCS / "performance.png", dpi=90)


# What is shown


def table(bench: Bench) -> str:
    """All that was measured, as Markdown."""
    told = bench.machine
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    parts = [
        f"{told['cores']} cores of {told['cpu']} ({', '.join(told['has'])}), Linux {told['linux']}; "
        f"disks of {told['disks']}; {versions}. Median of {bench.rounds} rounds, all ways in turn in each.",
    ]
    if any(row["case"] == "base" for row in bench.rows):
        parts += [_ratios(bench, OURS), _ratios(bench, OURS_SSH), _seconds(bench), _wire(bench)]
    rest = _others(bench)
    if rest:
        parts.append(rest)
    return "\n\n".join(parts)


def _rows(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cases(bench: Bench) -> list[str]:
    known = ["base", "ext4", *INCREMENTALS]
    return [case for case in known if bench.middle(OURS, case) is not None]


def _ratios(bench: Bench, way: str) -> str:
    """How many times faster than each peer one of our ways is, and the targets. Bold: met."""
    absent, cases, body = missing(), _cases(bench), []
    for peer, goals in TARGETS.items():
        line = [peer]
        for case in cases:
            goal, theirs = goals[case in INCREMENTALS], bench.middle(peer, case)
            if theirs is None:
                line.append("not installed" if peer in absent and goal else "-")
                continue
            ratio = theirs / (bench.middle(way, case) or 1)
            line.append(f"**{ratio:.1f}**" if goal and ratio >= goal else f"{ratio:.1f}")
        body.append([*line, *(f"{goal:g}" if goal else "-" for goal in goals)])
    head = [f"{way}: times faster than", *map(_named, cases), "target, first run", "target, later run"]
    return _rows(head, body)


def _named(case: str) -> str:
    return {"base": "first run, mix", "ext4": "first run, ext4"}.get(case, f"1 % {case}").replace(
        "1 % ext4 after", "ext4 after changes"
    )


def _seconds(bench: Bench) -> str:
    body = []
    for way in (OURS, OURS_SSH, *TARGETS):
        line = [way]
        for case in _cases(bench):
            found = [row["seconds"] for row in bench.rows if (row["way"], row["case"]) == (way, case)]
            line.append(
                f"{statistics.median(found):.2f} [{min(found):.2f}-{max(found):.2f}]" if found else "-"
            )
        body.append(line)
    return _rows(["seconds [least-most]"] + [_named(case) for case in _cases(bench)], body)


def _wire(bench: Bench) -> str:
    """Bytes on the loopback, both ways, with what protocols and acknowledgements add."""
    cases = [case for case in _cases(bench) if case in INCREMENTALS]
    body = []
    for way in (OURS, OURS_SSH, *TARGETS):
        found = [bench.middle(way, case, "wire") for case in cases]
        if any(found):
            body.append([way, *(f"{wire / MIB:.0f}" if wire else "-" for wire in found)])
    for what in ("changed", "changed chunks"):
        unit = "blocks of 4 KiB" if what == "changed" else "chunks of 1 MiB"
        body.append([f"*changed {unit}*", *(f"{bench.facts[f'{what} {case}'] / MIB:.0f}" for case in cases)])
    return _rows(["MiB on the wire"] + [_named(case) for case in cases], body)


def _others(bench: Bench) -> str:
    """The figures that stand alone."""
    found = []

    def line(what: str, reached: str, goal: str) -> None:
        found.append([what, reached, goal])

    for way in (OURS, OURS_SSH):
        near, distant = bench.middle(way, "0 ms"), bench.middle(way, f"{2000 * ONE_WAY:g} ms")
        if near and distant:
            line(
                f"a round trip of 20 ms, {way}",
                f"{near:.2f} s without, {distant:.2f} s with: {100 * (1 - near / distant):.0f} % less a second",
                "< 10 %",
            )
    for row in bench.rows:
        if row["case"].startswith("limit"):
            rate = int(row["case"].split()[1])
            off = 100 * (row["reached"] / rate - 1)
            line(
                f"limit of {rate} MiB/s, {row['way']}", f"{row['reached']:.2f} MiB/s ({off:+.1f} %)", "± 5 %"
            )
        if row["case"].startswith("memory"):
            line(
                f"{row['case']}, {row['way']}",
                f"host {row['host_kib'] >> 10} MiB, worker {row['worker_kib'] >> 10} MiB",
                "≤ 192 and ≤ 128 MiB" if "64 disks" in row["case"] else "≤ 128 and ≤ 64 MiB",
            )
    one, two = bench.middle(OURS, "one disk"), bench.middle(OURS, "two disks")
    if one and two:
        busy = (bench.middle(OURS, "two disks", "cpu") or 0) / two
        line("two disks side by side", f"{two:.2f} s, one alone {one:.2f} s; host uses {busy:.1f} cores", "")
    empty, plain = bench.middle(OURS, "empty"), bench.middle("dd", "empty")
    if empty and plain:
        line("a disk of written zeros", f"{empty:.2f} s, only to read it {plain:.2f} s", "")
    if bench.facts.get("writer"):
        line("orchestrator's SSH writer as destination", bench.facts["writer"], "≥ 4")
    return _rows(["what", "reached", "target"], found) if found else ""


def keep(text: str) -> None:
    """Put the tables between the marks of docs/explanation/performance.md."""
    path = DOCS / "performance.md"
    begin, end = "<!-- tox -e bench -- --full -->", "<!-- end -->"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    tail = rest.partition(end)[2]
    path.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
