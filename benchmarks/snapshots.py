"""What it takes to read disks from their snapshots: time, requests, bytes and memory.

    python benchmarks/snapshots.py [SCENE ...]

The sandbox runs in a process of its own. It keeps the limits that are told of one snapshot in Azure, 60 MiB and 500
requests a second, and answers each read after a delay. Every run of ours is a process of its own, whose peak of memory
counts. Each result is compared with the disk.

Scenes: `rate`: disks of which all or a little is read, near and far. `unchanged`: a disk of 64 GiB, mostly holes, of
which nothing has changed. `fourth`: the fourth run of a disk of which 1 % has changed before each. `ranges`: 1 TiB
with 2.7 million ranges, listed by a host that times out for windows of more than 32 GiB.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs, urlsplit

from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.sandbox.server import local
from coriolis_azure.sandbox.server.https import Server

MIB, GIB = 1 << 20, 1 << 30
GRAIN = 64 << 10
RANGES = 2_700_000
Next = Callable[[Request], Response]
Run = Callable[..., dict[str, Any]]


class Limits:
    """One snapshot serves so many bytes and requests a second; what would wait for over half a second is refused."""

    def __init__(self, delay: float, rate: float = 60 * MIB, requests: float = 500) -> None:
        self._delay, self._rate, self._requests = delay, rate, requests
        self._free_at: dict[str, float] = {}
        self._lock = threading.Lock()
        self.seen = dict.fromkeys(("requests", "reads", "refused", "bytes", "polls"), 0)

    def around(self, request: Request, answer: Next) -> Response:
        """Answer a request as slowly as Azure would."""
        pages = request.path.startswith("/md-") and request.method == "GET"
        with self._lock:
            self.seen["requests"] += 1
            self.seen["polls"] += "/diskoperations/" in request.path.lower()
        if not pages or "comp" in request.query:
            return answer(request)
        start, _, end = (request.header("x-ms-range") or "bytes=0-0").removeprefix("bytes=").partition("-")
        size, snapshot = int(end) - int(start) + 1, request.query.get("snapshot", "")
        with self._lock:
            now = time.monotonic()
            free = max(now, self._free_at.get(snapshot, 0.0))
            if free - now > 0.5:
                self.seen["refused"] += 1
                return Response(503, {"x-ms-error-code": "ServerBusy"}, b"")
            free += max(size / self._rate, 1 / self._requests)
            self._free_at[snapshot] = free
            self.seen["reads"] += 1
            self.seen["bytes"] += size
        time.sleep(self._delay + free - now)
        return answer(request)


def ranges(request: Request, answer: Next) -> Response:
    """Every page list is one of 2.7 million ranges of 1 TiB, a tenth of them changed; large windows time out."""
    if request.query.get("comp") != "pagelist":
        return answer(request)
    start, _, end = (request.header("x-ms-range") or "").removeprefix("bytes=").partition("-")
    if int(end) - int(start) > 32 * GIB:
        return Response(500, {"x-ms-error-code": "OperationTimedOut"}, b"")
    response = answer(replace(request, url=re.sub(r"&marker=[^&]*", "", request.url)))
    step = (1 << 40) // RANGES // 512 * 512
    older = request.header("x-ms-previous-snapshot-url")
    if older is not None and parse_qs(urlsplit(older).query).get("snapshot") == [
        request.query.get("snapshot")
    ]:
        return response  # a snapshot against itself
    every = 10 if older is not None else 1
    first = max(-(-int(start) // step), int(request.query.get("marker") or 0))
    numbers = [number for number in range(first, int(end) // step + 1) if number % every == 0]
    now, rest = numbers[:10_000], numbers[10_000:]
    rows = "".join(
        f"<PageRange><Start>{at}</Start><End>{at + 511}</End></PageRange>"
        for at in (number * step for number in now)
        if at < 1 << 40
    )
    if older is None and int(end) >= 1 << 40:
        rows += f"<PageRange><Start>{1 << 40}</Start><End>{(1 << 40) + 511}</End></PageRange>"
    marker = f"<NextMarker>{rest[0]}</NextMarker>" if rest else ""
    body = f'<?xml version="1.0" encoding="utf-8"?><PageList>{rows}{marker}</PageList>'.encode()
    headers = {name: value for name, value in response.headers.items() if name != "Content-Length"}
    return Response(response.status, headers, body)


def serve(folder: Path, delay: float, long: bool, pipe: Pipe) -> None:
    """Serve a sandbox with limits; tell what was asked of it, whenever asked."""
    limits = Limits(delay)
    with Sandbox(folder, pace=600.0) as sandbox:
        answer: Next = (lambda request: ranges(request, sandbox.handle)) if long else sandbox.handle
        server = Server(lambda request: limits.around(request, answer), folder, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, document in (
            ("connection", sandbox.connection_info(server.url)),
            ("environment", sandbox.environment()),
        ):
            (folder / f"{name}.json").write_text(json.dumps(document))
        pipe.send(None)
        while pipe.recv():
            pipe.send(dict(limits.seen))
            limits.seen.update(dict.fromkeys(limits.seen, 0))
        server.shutdown()


@contextmanager
def sandbox(folder: Path, delay: float = 0.0, *, long: bool = False) -> Iterator[tuple[Path, Run]]:
    """A sandbox, and how to run ours against it."""
    azure = folder / "azure"
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve, args=(azure, delay, long, theirs))
    server.start()
    ours.recv()

    def run(**environment: Any) -> dict[str, Any]:
        ours.send(True)  # forget what was counted up to now
        ours.recv()
        settings = {"replica_export_mechanism": "snapshots", **environment}
        task = {"azure": str(azure), "to": str(folder / "images"), "environment": settings}
        command = [sys.executable, str(Path(__file__).with_name("replicating.py")), json.dumps(task)]
        found: dict[str, Any] = json.loads(subprocess.check_output(command))
        ours.send(True)
        counted: dict[str, int] = ours.recv()
        return {**found, **counted}

    try:
        yield azure, run
    finally:
        ours.send(False)
        server.join()


def show(what: str, found: dict[str, Any]) -> None:
    """Print a row."""
    print(
        f"{what:44} {found['seconds']:6.1f} s  read {found['read_mib']:7.1f}  relied {found['relied_mib']:7.0f}  "
        f"checked {found['checked_mib']:5.1f}  sent {found['sent_mib']:6.1f} MiB  requests {found['requests']:5} "
        f"(reads {found['reads']}, refused {found['refused']}, polls {found['polls']})  host {found['host_mib']} MiB  "
        f"{'; '.join(sorted(set(found['tiers'])))}",
        flush=True,
    )


def disk(path: Path, size: int, content: int, seed: int = 0) -> Path:
    """A raw disk with so many random bytes, and holes behind them."""
    with path.open("wb") as file:
        for at in range(0, content, MIB):
            file.write(random.Random(seed + at).randbytes(min(MIB, content - at)))
        file.truncate(size)
    return path


def change(azure: Path, image: Path, number: int, seed: int, part: float = 0.01) -> None:
    """Change a part of a disk, in runs of 64 KiB, in the sandbox and in the image that it has to be equal to."""
    size = image.stat().st_size
    chosen = random.Random(seed)
    piece = image.with_suffix(".piece")
    for grain in sorted(chosen.sample(range(size // GRAIN), max(1, int(size * part / GRAIN)))):
        piece.write_bytes(chosen.randbytes(GRAIN))
        with image.open("r+b") as file:
            file.seek(grain * GRAIN)
            file.write(piece.read_bytes())
        local.write(azure, "web", number - 1 if number else "os", piece, grain * GRAIN)


def compare(folder: Path, images: list[Path]) -> None:
    """The replica is right, or the figures are worth nothing."""
    names = ["os.raw", *(f"data-{number}.raw" for number in range(len(images) - 1))]
    for name, image in zip(names, images, strict=True):
        if os.system(f"cmp -s '{folder / 'images' / name}' '{image}'"):
            sys.exit(f"{name} differs from the disk")


def rate(folder: Path) -> None:
    """First runs and scattered changes, at three distances."""
    for delay in (0.005, 0.03, 0.1):
        for count, size in ((1, 256 * MIB), (4, 128 * MIB)):
            where = folder / f"{delay}-{count}"
            where.mkdir()
            with sandbox(where, delay) as (azure, run):
                images = [disk(where / f"{number}.raw", size, size, number) for number in range(count)]
                local.add_vm(azure, "web", images[0], images[1:])
                show(f"first, {count} of {size // MIB} MiB, {delay * 1000:.0f} ms", run(keep_baseline=True))
                run(keep_baseline=True)
                for number, image in enumerate(images):
                    change(azure, image, number, number, 0.1)
                show(f"10 % changed, {delay * 1000:.0f} ms", run(keep_baseline=True))
                compare(where, images)


def unchanged(folder: Path) -> None:
    """Nothing has changed."""
    with sandbox(folder) as (azure, run):
        image = disk(folder / "disk.raw", 64 * GIB, 64 * MIB)
        local.add_vm(azure, "web", image)
        for turn in ("first", "second", "third"):
            show(f"64 GiB sparse, {turn} run", run(keep_baseline=True))


def fourth(folder: Path) -> None:
    """The fourth run after changes of 1 % before each, by each mechanism that knows what has changed."""
    for mechanism in ("snapshots", "hybrid"):
        where = folder / mechanism
        where.mkdir()
        with sandbox(where, 0.005) as (azure, run):
            image = disk(where / "disk.raw", 4 * GIB, 4 * GIB)
            local.add_vm(azure, "web", image)
            for turn in range(4):
                if turn:
                    change(azure, image, 0, turn)
                found = run(replica_export_mechanism=mechanism, keep_baseline=True)
                show(f"4 GiB by {mechanism}, run {turn + 1}, 1 % changed", found)
            compare(where, [image])


def listed(folder: Path) -> None:
    """The lists of 1 TiB with millions of ranges. Nothing is read of the disk: that takes hours."""
    with sandbox(folder, long=True) as (azure, _):
        local.add_vm(azure, "web", disk(folder / "disk.raw", 1 << 40, 0))
        command = [sys.executable, str(Path(__file__).with_name("listing.py")), str(azure)]
        found = json.loads(subprocess.check_output(command))
        print(
            f"1 TiB, lists of {found['ranges']:,} ranges twice, and of {found['changed_mib']:.0f} MiB of changes: "
            f"{found['seconds']:.0f} s, host {found['host_mib']} MiB"
        )


SCENES = {"rate": rate, "unchanged": unchanged, "fourth": fourth, "ranges": listed}

if __name__ == "__main__":
    for scene in sys.argv[1:] or SCENES:
        with TemporaryDirectory(prefix="bench-") as name:
            SCENES[scene](Path(name))
