"""How fast a disk goes into Blob storage and out of it: ours, the SDK's own one call, and one request at a time.

    python benchmarks/blobs.py [MiB]

Against the sandbox's endpoint and, where it is installed, Azurite, each in a process of its own: over the loopback,
then over links with a delay. Every way runs three times, in turn with the others, each run in a process of its own,
whose peak of memory counts. Each result is compared with the image.

The SDK's one call is `upload_blob` with 16 requests at a time, or with 4, which are as many bytes as ours has under
way, and `download_blob` with 8; one request at a time is a loop over pieces of 4 MiB. Ours is what a replication does:
it also reads and hashes, leases, notes what it changes, clears and writes the footer and keeps a manifest; and in
reading it lists the pages and hashes. Then come later runs, of which 1 % of all blocks have changed.
"""
# ruff: noqa: ARG001

from __future__ import annotations

import filecmp
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import worker
import writers

from coriolis_azure import transfer
from coriolis_azure.azure.blobs import Blob, Storage
from coriolis_azure.azure.client import Azure
from coriolis_azure.azure.transport import https
from coriolis_azure.clock import Clock
from coriolis_azure.events import Progress, silent
from coriolis_azure.readers.extents import Everything
from coriolis_azure.readers.flow import Flow
from coriolis_azure.readers.pages import PageReader
from coriolis_azure.replica.container import BlobFolder
from coriolis_azure.replica.files import FileMedium
from coriolis_azure.replica.replica import Replica
from coriolis_azure.settings import Connection

sys.path.insert(0, str(writers.TESTS))
from harness import replicas  # from the tests' folder

ROUNDS = 3
MIB = 1 << 20
CHUNK, PIECE = MIB, 4 * MIB
WRITERS, READERS = 16, 8  # requests that ours has under way
DELAYS = (0, 20, 40)  # milliseconds there and back


@dataclass(frozen=True)
class Target:
    """A blob endpoint: the certificate to trust, and the connection to sign in with, where there is one."""

    endpoint: str
    certificate: str
    connection: str = ""

    def storage(self) -> Storage:
        """Ours at that endpoint."""
        azure = replicas.AzuriteOnly(self.endpoint, Path(self.certificate))
        here = Connection(
            "", endpoints={"resource_manager_endpoint": self.endpoint}, ca_bundle=self.certificate
        )
        azure.transport = https(here)
        if self.connection:
            known = Connection.from_json(json.loads(Path(self.connection).read_text()))
            azure.credential = Azure(known, transport=https(known)).credential
        return azure.storage()


def main() -> None:
    """Measure all ways at all endpoints, print a table for each."""
    size = int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 256 * MIB
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with TemporaryDirectory(dir=fast) as folder, ExitStack() as stack:
        image = Path(folder, "image")
        writers.mixed(image, size)
        print(f"{size // MIB} MiB: half random, a quarter text, a quarter zeros; median of {ROUNDS} runs")
        targets = {"the sandbox": stack.enter_context(sandbox(Path(folder, "sandbox")))}
        program = replicas.azurite_program()
        if program:
            served = stack.enter_context(replicas.azurite(program))
            targets["Azurite"] = Target(served.endpoint, str(served.certificate))
        else:
            print("Azurite is not installed: npm install azurite, on the PATH or in $AZURITE_HOME")
        for name, target in targets.items():
            for delay in DELAYS:
                with distant(target, delay) as far:
                    compare(f"{name}, {delay} ms" if delay else f"{name}, loopback", far, image, folder)
                    compare_later(far, image, Path(folder, "changed"))


def compare(where: str, target: Target, image: Path, folder: str) -> None:
    """Measure all ways at one endpoint over one link."""
    size = image.stat().st_size
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name in WAYS:
            result = Path(folder, "result")
            result.unlink(missing_ok=True)
            arguments = [name, json.dumps(vars(target)), str(image), str(result)]
            done = subprocess.run(
                [sys.executable, __file__, "way", *arguments], stdout=subprocess.PIPE, check=True
            )
            found[name].append(tuple(json.loads(done.stdout)))
            if not filecmp.cmp(image, result, shallow=False):
                raise SystemExit(f"{name}: the image is not what arrived")
    rates = {name: size / MIB / statistics.median(run[0] for run in runs) for name, runs in found.items()}
    print(f"\n{where}:")
    for name, runs in found.items():
        each = " ".join(f"{size / MIB / seconds:.0f}" for seconds, _ in runs)
        print(
            f"  {name:22} {rates[name]:6.0f} MiB/s ({each}), {max(run[1] for run in runs):4.0f} MiB of memory"
        )
    for verb in ("write", "read"):
        ours = f"{verb}, ours"
        for other in (name for name in WAYS if name.startswith(verb) and name != ours):
            print(f"  {ours} : {other} = {rates[ours] / rates[other]:.2f}", flush=True)


def way(name: str, target: str, image: str, result: str) -> None:
    """One run of a way, in this process: says seconds, and by how many MiB its memory has grown."""
    storage = Target(**json.loads(target)).storage()
    # What is written must not be there yet: otherwise ours would keep it until all has arrived, and write twice.
    if name.startswith("write"):
        _drop_container(storage, Path(result).with_name("container"))
    container = storage.account("any").container(_container(result))
    container.ensure()
    theirs = name.startswith("write") and name != "write, ours"
    blob = container.blob("theirs.vhd" if theirs else "os.vhd")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    WAYS[name](storage, blob, Path(image), Path(result))
    seconds = time.monotonic() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if name.startswith("write"):
        with Path(result).open("wb") as file:
            for at in range(0, Path(image).stat().st_size, PIECE):
                file.write(blob.read(at, PIECE)[: Path(image).stat().st_size - at])
    print(json.dumps([seconds, grown]))


# Later runs


def compare_later(target: Target, image: Path, changed: Path) -> None:
    """Measure runs that find 1 % of all blocks of 4 KiB changed, with the digests of grains and without."""
    size = image.stat().st_size
    scatter(image, changed)
    found: dict[str, list[tuple[float, float]]] = {"grains": [], "whole chunks": []}
    for _ in range(ROUNDS):
        for name, runs in found.items():
            place = replicas.BlobPlace(target.storage(), "any", f"later-{time.time_ns()}")
            replicate(place, image, by_grains=True)
            began = time.monotonic()
            sent = replicate(place, changed, by_grains=name == "grains")
            runs.append((time.monotonic() - began, sent / MIB))
            if place.content(size) != changed.read_bytes():
                raise SystemExit(f"{name}: the image is not what arrived")
            with place.folder() as folder:
                folder.remove(["os"])
    for name, runs in found.items():
        each = " ".join(f"{seconds:.1f}" for seconds, _ in runs)
        median = statistics.median(seconds for seconds, _ in runs)
        print(f"  later run, {name:12} {runs[0][1]:5.0f} MiB sent, {median:.1f} s ({each})", flush=True)


def scatter(image: Path, changed: Path) -> None:
    """Write a copy of an image in which 1 % of all blocks of 4 KiB are others."""
    shutil.copyfile(image, changed)
    chance = random.Random(1)
    with changed.open("r+b") as file:
        for at in chance.sample(range(image.stat().st_size // 4096), image.stat().st_size // 409600):
            file.seek(at * 4096)
            file.write(chance.randbytes(4096))


def replicate(place: replicas.BlobPlace, image: Path, *, by_grains: bool) -> int:
    """A whole run, with the switch to what it has written; the bytes that were sent."""
    size = image.stat().st_size
    with place.open() as vhd:
        grains = vhd.grains.proved if by_grains and vhd.grains is not None else None
        reader = PageReader(Local(image), Flow("os", silent, Clock()), lambda _: Everything(), grains=grains)
        progress = Progress("os", size, silent, Clock())
        base = vhd.known("id", size, CHUNK, full=False)
        return transfer.copy(reader, base, vhd, progress, verify=False).sent_bytes


# Writing: each time a blob that is not there


def write_ours(storage: Storage, blob: Blob, image: Path, result: Path) -> None:
    """As a first run: read, hashed, zeros left out, then footer and manifest."""
    size = image.stat().st_size
    with BlobFolder(storage, "any", _container(result), "", silent) as folder, folder.disk("os") as vhd:
        reader = PageReader(Local(image), Flow("os", silent, Clock()), lambda _: Everything())
        progress = Progress("os", size, silent, Clock())
        transfer.copy(reader, vhd.known("id", size, CHUNK, full=True), vhd, progress, verify=False)


def _drop_container(storage: Storage, name: Path) -> None:
    """Delete the container that was written to last, so that memory is not filled, and name another one."""
    if name.exists():
        storage.account("any").container(name.read_text())._client.delete_container()
    name.write_text(f"benchmark-{time.time_ns()}")


def _container(result: str | Path) -> str:
    """The name of the container that is written to, or was written to last."""
    return Path(result).with_name("container").read_text()


class Local:
    """An image as the content of a disk."""

    def __init__(self, image: Path) -> None:
        self._fd = os.open(image, os.O_RDONLY)

    def fill(self, offset: int, data: memoryview) -> None:
        """See Content."""
        os.preadv(self._fd, [data], offset)


def write_sdk(storage: Storage, blob: Blob, image: Path, result: Path, requests: int = WRITERS) -> None:
    """`upload_blob`, which leaves pieces of zeros out too."""
    with image.open("rb") as file:
        blob._client.upload_blob(
            file, "PageBlob", image.stat().st_size, overwrite=True, max_concurrency=requests
        )


def write_few(storage: Storage, blob: Blob, image: Path, result: Path) -> None:
    """The same with as many bytes under way as ours has."""
    write_sdk(storage, blob, image, result, WRITERS * CHUNK // PIECE)


def write_one(storage: Storage, blob: Blob, image: Path, result: Path) -> None:
    """`upload_page` in a loop."""
    blob.create_pages(image.stat().st_size, {})
    for offset, data in writers.chunks(image, PIECE):
        if data.count(0) != len(data):
            blob.write(offset, data)


# Reading: what ours wrote before


def read_ours(storage: Storage, blob: Blob, image: Path, result: Path) -> None:
    """As a VHD is read that cannot be imported: pages listed, eight requests at a time, hashed, into a raw image."""
    size = image.stat().st_size
    with Replica(FileMedium(result)) as raw:
        reader = PageReader(blob, Flow("os", silent, Clock()), blob.pages)
        progress = Progress("os", size, silent, Clock())
        transfer.copy(reader, raw.known("id", size, CHUNK, full=True), raw, progress, verify=False)
        raw.publish()


def read_sdk(storage: Storage, blob: Blob, image: Path, result: Path) -> None:
    """`download_blob`, which lists the pages and leaves out what holds nothing."""
    with result.open("wb") as file:
        size = image.stat().st_size
        blob._client.download_blob(0, size, max_concurrency=READERS).readinto(file)
        file.truncate(size)


def read_one(storage: Storage, blob: Blob, image: Path, result: Path) -> None:
    """`download_blob` of a piece after the other."""
    size = image.stat().st_size
    with result.open("wb") as file:
        for low, high in pairwise([*range(0, size, PIECE), size]):
            file.write(blob._client.download_blob(low, high - low).readall())


WAYS: dict[str, Callable[[Storage, Blob, Path, Path], None]] = {
    "write, one by one": write_one,
    "write, SDK's one call": write_sdk,
    "write, SDK, 4 at a time": write_few,
    "write, ours": write_ours,
    "read, ours": read_ours,
    "read, SDK's one call": read_sdk,
    "read, one by one": read_one,
}


# The other ends


@contextmanager
def sandbox(folder: Path) -> Iterator[Target]:
    """The sandbox's endpoint."""
    command = [sys.executable, "-m", "coriolis_azure", "sandbox", "serve", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        for line in process.stdout:  # type: ignore[union-attr]
            if b"ready" in line:
                break
        connection = json.loads((folder / "connection.json").read_text())
        manager = connection["custom_cloud_properties"]["endpoints"]["resource_manager_endpoint"]
        yield Target(
            f"{manager.rstrip('/')}/sandboxstorage", connection["ca_bundle"], str(folder / "connection.json")
        )
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def distant(target: Target, delay: int) -> Iterator[Target]:
    """The same endpoint behind a relay that holds back what passes, for so many milliseconds there and back."""
    if not delay:
        yield target
        return
    where = urlsplit(target.endpoint)
    if where.port is None:
        raise SystemExit(f"{target.endpoint} names no port")
    with worker.relayed(where.port, delay / 2000, address="127.0.0.1") as port:
        yield Target(f"https://127.0.0.1:{port}{where.path}", target.certificate, target.connection)


if __name__ == "__main__":
    if sys.argv[1:2] == ["way"]:
        way(*sys.argv[2:])
    else:
        main()
