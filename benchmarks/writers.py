"""How fast a disk goes through the backup writers' protocols: our clients, and the orchestrator's way beside them.

    python benchmarks/writers.py [MiB]

All ways send the same image to the same receivers, OpenSSH's server with `write_data` and a server of HTTPS, in
processes of their own: over the loopback, then over a link with a delay. Every way is run three times, in turn with
the others, and each result is compared with the image. The orchestrator's way is emulated by the small clients
below, which were written from the description of its protocol: messages of 10 MiB, one in flight, prepared by three
threads; over SSH never compressed and with the cipher that paramiko asks for first, over HTTPS gzip at level 9 or
plain. What it spends besides (seconds of waiting at close) is not emulated.
"""
# ruff: noqa: ARG002

from __future__ import annotations

import base64
import filecmp
import gzip
import io
import json
import random
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import paramiko
import requests
import worker

from coriolis_azure.agent import is_zero
from coriolis_azure.model import Disk, Record
from coriolis_azure.plugin import write_data, writer
from coriolis_azure.plugin.claims import Claimant
from coriolis_azure.threads import ordered

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))
from harness import writer_targets  # noqa: E402  (from the tests' folder)

ROUNDS = 3
MIB = 1 << 20
ONE_WAY = 0.02  # seconds from here to the distant target
OURS, THEIRS = MIB, 10 * MIB  # bytes of a chunk


def main() -> None:
    """Measure all ways, print a line each, and the ratios."""
    size = int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 256 * MIB
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with TemporaryDirectory(dir=fast) as folder, ExitStack() as stack:
        image, device = Path(folder, "image"), Path(folder, "device")
        mixed(image, size)
        shell = stack.enter_context(closing(worker.SshServer(Path(folder, "ssh"))))
        program = shell.home / "write_data"
        program.write_text(f"#!{sys.executable}\n" + Path(write_data.__file__).read_text())
        program.chmod(0o755)
        # What a whole machine's `sync` takes is a matter of what else it does. The orchestrator's way does without.
        sync = shell.home.parent / "bin" / "sync"
        sync.write_text("#!/bin/sh\n")
        sync.chmod(0o755)
        there = shell.worker
        details = {
            "ip": there.address,
            "port": there.port,
            "username": there.username,
            "pkey": there.private_key,
        }
        target = {"backend": "ssh_backup_writer", "connection_details": details}
        https = stack.enter_context(served([writer_targets.__file__, str(Path(folder, "https"))]))
        print(f"{size // MIB} MiB: half random, a quarter text, a quarter zeros; median of {ROUNDS} runs")
        compare("the loopback", target, https, image, device)
        far = [stack.enter_context(distant(info)) for info in (target, https)]
        compare(f"a link of {2000 * ONE_WAY:g} ms there and back", far[0], far[1], image, device)


def compare(link: str, shell: dict[str, Any], https: dict[str, Any], image: Path, device: Path) -> None:
    """Measure all ways over one link."""
    ways: dict[str, Callable[[], None]] = {
        "SSH, ours": lambda: ours(shell, image, device, compress=False),
        "SSH, ours, compressed": lambda: ours(shell, image, device, compress=True),
        "SSH, orchestrator's way": lambda: their_ssh(shell, image, device),
        "HTTPS, ours": lambda: ours(https, image, device, compress=False),
        "HTTPS, ours, compressed": lambda: ours(https, image, device, compress=True),
        "HTTPS, orchestrator's way, plain": lambda: their_https(https, image, device, compress=False),
        "HTTPS, orchestrator's way, gzip -9": lambda: their_https(https, image, device, compress=True),
    }
    size = image.stat().st_size
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            device.write_bytes(b"")
            with device.open("r+b") as file:
                file.truncate(size)
            began = time.monotonic()
            way()
            times[name].append(time.monotonic() - began)
            if not filecmp.cmp(image, device, shallow=False):
                raise SystemExit(f"{name}: the device does not hold the image")
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"\nOver {link}:")
    for name, seconds in middle.items():
        runs = " ".join(f"{size / MIB / value:.0f}" for value in times[name])
        print(f"  {name:36} {seconds:6.2f} s  {size / MIB / seconds:6.0f} MiB/s   ({runs})")
    for one, other in (
        ("SSH, ours", "SSH, orchestrator's way"),
        ("SSH, ours, compressed", "SSH, orchestrator's way"),
        ("HTTPS, ours", "HTTPS, orchestrator's way, plain"),
        ("HTTPS, ours, compressed", "HTTPS, orchestrator's way, gzip -9"),
    ):
        print(f"  {one} : {other} = {middle[other] / middle[one]:.1f}", flush=True)


def mixed(path: Path, size: int) -> None:
    """Random, text, random and zeros in turn, 1 MiB each."""
    chance = random.Random(1)
    words = [chance.randbytes(chance.randrange(2, 9)).hex() for _ in range(2000)]
    text = " ".join(chance.choice(words) for _ in range(200_000)).encode()
    with path.open("wb") as file:
        for index in range(size // MIB):
            start = chance.randrange(len(text) - MIB)
            file.write(
                (chance.randbytes(MIB), text[start : start + MIB], chance.randbytes(MIB), bytes(MIB))[
                    index % 4
                ]
            )


def chunks(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Offset and content of each chunk."""
    with path.open("rb") as file:
        offset = 0
        while data := file.read(size):
            yield offset, data
            offset += len(data)


@contextmanager
def served(command: list[str]) -> Iterator[Any]:
    """A program of ours in a process of its own while the block lasts; gives the JSON that it says first."""
    process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield json.loads(process.stdout.readline())  # type: ignore[union-attr]
    finally:
        process.communicate()


@contextmanager
def distant(info: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The target of `info`, behind a relay that delays what passes."""
    details = info["connection_details"]
    with worker.relayed(details["port"], ONE_WAY, address=details["ip"]) as port:
        yield {**info, "connection_details": {**details, "port": port}}


# Ours


class InMemory:
    """The records of volumes that nobody else writes to."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def find(self, id: str) -> Record | None:
        return self._records.get(id)

    def of_disk(self, disk: str) -> list[Record]:
        return list(self._records.values())

    def update(self, id: str, change: Callable[[Record | None], Record]) -> Record:
        self._records[id] = change(self._records.get(id))
        return self._records[id]

    def delete(self, id: str) -> None:
        self._records.pop(id, None)


def ours(info: dict[str, Any], image: Path, device: Path, *, compress: bool) -> None:
    """As a copy does it: sixteen writes at a time, whole chunks; chunks of zeros are asked for as such."""
    size = image.stat().st_size
    disk = Disk("id", "os", None, size, "unique", "", "")
    entries = [{"disk_id": "id", "volume_dev": str(device)}]
    backend = writer.backend(info, compress=compress)
    with writer.Volumes(backend, entries, [disk], Claimant("0", InMemory())) as volumes:
        volume = volumes.disk("os")
        volume.known("unique", size, OURS, full=True)
        volume.intend(0, size)

        def put(chunk: tuple[int, bytes]) -> None:
            offset, data = chunk
            if is_zero(data):
                volume.zero(offset, len(data))
            else:
                volume.write(offset, data)

        for _ in ordered(put, chunks(image, OURS), threads=16, ahead=18):
            pass
        volume.flush()


# The orchestrator's way, emulated


def their_ssh(info: dict[str, Any], image: Path, device: Path) -> None:
    """One message in flight: write, flush, wait for four bytes."""
    details = info["connection_details"]
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    key = paramiko.RSAKey.from_private_key(io.StringIO(details["pkey"]))
    client.connect(details["ip"], details["port"], details["username"], pkey=key)
    with closing(client):
        stdin, stdout, _ = client.exec_command("chmod +x write_data && sudo ./write_data")

        def encoded(item: tuple[int, tuple[int, bytes]]) -> bytes:
            number, (offset, data) = item
            payload = str(device).encode() + b"\0" + struct.pack("<Q", offset) + data
            return struct.pack("<III", number, len(payload), 0) + payload

        for message in ordered(encoded, enumerate(chunks(image, THEIRS)), threads=3, ahead=5):
            stdin.write(message)
            stdin.flush()
            stdout.read(4)
        stdin.write(struct.pack("<II", 0, 0))
        stdin.flush()
        stdout.read(4)


def their_https(info: dict[str, Any], image: Path, device: Path, *, compress: bool) -> None:
    """One request in flight, over one session."""
    details = info["connection_details"]
    base = f"https://{details['ip']}:{details['port']}/api/v2/device/"
    base += base64.b64encode(str(device).encode()).decode()
    token = {"X-Client-Token": "theirs"}

    def encoded(chunk: tuple[int, bytes]) -> tuple[bytes, dict[str, str]]:
        offset, data = chunk
        headers = {**token, "X-Write-Offset": str(offset)}
        packed = gzip.compress(data) if compress else data
        if len(packed) < len(data):
            return packed, {**headers, "Content-Encoding": "gzip"}
        return data, headers

    with TemporaryDirectory() as folder, requests.Session() as session:
        for name, pem in details["certificates"].items():
            Path(folder, name).write_text(pem)
        session.cert = (f"{folder}/client_crt", f"{folder}/client_key")
        session.trust_env = False  # a bundle that the environment names would replace ours
        session.verify = f"{folder}/ca_crt"
        session.post(f"{base}/acquire", headers=token, timeout=60).raise_for_status()
        for body, headers in ordered(encoded, chunks(image, THEIRS), threads=3, ahead=5):
            session.post(base, headers=headers, data=body, timeout=60).raise_for_status()
        session.post(f"{base}/release", headers=token, timeout=60).raise_for_status()


if __name__ == "__main__":
    main()
