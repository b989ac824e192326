"""How long a user waits for whole runs, with Azure's usual times imitated, and how many requests they take.

    python benchmarks/waiting.py [--disks 1,3,16] [--mechanism worker] [--shutdown] [--timeline]

Nothing here measures copying: the disks are small. A sandbox in this process answers each request after a delay, an
operation ends when Azure's would, and its polls say when to come back as Azure's do. Everything runs in real time. The
times are what Azure was seen to take for small resources in a quiet region; Azure guarantees none of them.

Prints one line a run: seconds, requests, and the seconds from the moment when the data was complete.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from coriolis_azure import Source
from coriolis_azure.clock import Clock
from coriolis_azure.events import Copied, Event, Step
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.sandbox.catalog import VmSpec

MIB = 1 << 20
REQUEST_SECONDS = 0.12
# Seconds of an operation: by method and type, or action, of the resource.
OPERATION_SECONDS = {
    "PUT networksecuritygroups": 3,
    "PUT virtualnetworks": 4,
    "PUT publicipaddresses": 3,
    "PUT networkinterfaces": 2,
    "PUT virtualmachines": 60,  # until its agent says that the system is up; then its SSH server answers, too
    "PATCH virtualmachines": 14,  # attaching and detaching disks
    "PUT snapshots": 3,
    "PUT disks": 3,
    "PUT restorepoints": 20,
    "POST deallocate": 45,
    "POST begingetaccess": 2,
    "POST endgetaccess": 2,
    "DELETE virtualmachines": 45,
    "DELETE networkinterfaces": 6,
    "DELETE publicipaddresses": 11,
    "DELETE networksecuritygroups": 5,
    "DELETE virtualnetworks": 6,
    "DELETE disks": 4,
    "DELETE snapshots": 4,
    "DELETE restorepointcollections": 10,
}


@dataclass
class Imitation:
    """Delays the answers of a sandbox. `seen` counts the requests by method and type."""

    seen: collections.Counter[str] = field(default_factory=collections.Counter)
    _due: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: Request, answer: Callable[[Request], Response]) -> Response:
        """Answer a request as late as Azure would."""
        path = request.path.lower()
        if not path.startswith("/subscriptions/"):
            return answer(request)
        time.sleep(REQUEST_SECONDS)
        what = f"{request.method} {_kind(path)}"
        with self._lock:
            self.seen[what] += 1
            due = self._due.get(_operation(path), 0.0)
        if request.method == "GET" and time.monotonic() < due:
            answer(request)  # the sandbox's own operation ends after some polls
            style = "disk" if "/diskoperations/" in path else "other"
            headers = {"Content-Type": "application/json", "Retry-After": {"disk": "2"}.get(style, "10")}
            if "monitor" in request.query or "/operationresults/" in path:
                return Response(202, {**headers, "Location": request.url}, b"")
            return Response(200, headers, b'{"status": "InProgress"}')
        response = answer(request)
        for name in ("Azure-AsyncOperation", "Location"):
            if url := response.headers.get(name):
                operation = Request("GET", url)
                with self._lock:
                    seconds = OPERATION_SECONDS.get(what, 0.0)
                    self._due[_operation(operation.path.lower())] = time.monotonic() + seconds
        return response


def _kind(path: str) -> str:
    """The type of the resource in a path, or the action on it."""
    parts = path.partition("/providers/")[2].split("/")
    if "locations" in parts[:2]:
        return "operation" if {"operations", "diskoperations", "operationresults"} & set(parts) else parts[-1]
    return parts[-1] if len(parts) % 2 == 0 else parts[-2] if len(parts) > 1 else "subscription"


def _operation(path: str) -> str:
    return path.rpartition("/")[2]


def run(folder: Path, disks: int, mechanism: str, *, shutdown: bool, timeline: bool) -> dict[str, Any]:
    """Replicate a VM with so many small disks once; what it took."""
    imitation, steps = Imitation(), list[tuple[float, Event]]()
    images = []
    for number in range(disks):
        image = folder / f"{disks}-{number}.raw"
        image.write_bytes(random.Random(number).randbytes(MIB) + bytes(MIB))
        images.append(image)
    with Sandbox(folder / f"azure-{disks}", clock=Clock(), pace=1) as sandbox:
        sandbox.add_vm("web", images[0], images[1:], VmSpec(size="Standard_D8s_v5"))
        before = sandbox.resources()
        sandbox.intercept = imitation
        began = time.monotonic()

        def report(event: Event) -> None:
            steps.append((time.monotonic() - began, event))

        settings = {**sandbox.environment(), "replica_export_mechanism": mechanism}
        with Source(
            sandbox.connection_info(), settings, report=report, transport=sandbox.transport()
        ) as source:
            source.journals = None
            done = source.replicate("web", folder / f"to-{disks}", shutdown=shutdown)
        seconds = time.monotonic() - began
        sandbox.intercept = None
        left = len(sandbox.resources()) - len(before)
    for number, image in enumerate(images):
        name = "os" if number == 0 else f"data-{number - 1}"
        if (folder / f"to-{disks}/{name}.raw").read_bytes() != image.read_bytes():
            raise AssertionError(f"{name} differs")
    if timeline:
        for at, event in steps:
            if isinstance(event, Step):
                print(f"  {at:6.1f} {event.name} {event.target}")
    complete = [at for at, event in steps if isinstance(event, Copied)]
    return {
        "disks": disks,
        "mechanism": mechanism,
        "seconds": round(seconds, 1),
        "after_data": round(seconds - complete[-1], 1),
        "outage": done.outage_seconds,
        "requests": sum(imitation.seen.values()),
        "left": left,
        "by_kind": dict(imitation.seen.most_common()) if timeline else None,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--disks", default="1,3,16")
    options.add_argument("--mechanism", default="worker")
    options.add_argument("--shutdown", action="store_true")
    options.add_argument("--timeline", action="store_true")
    asked = options.parse_args()
    with TemporaryDirectory() as folder:
        for disks in map(int, asked.disks.split(",")):
            done = run(Path(folder), disks, asked.mechanism, shutdown=asked.shutdown, timeline=asked.timeline)
            print(json.dumps(done), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TMPDIR", "/dev/shm")
    main()
