"""What it takes to replicate many small VMs: time, requests a VM, and memory, threads and descriptors of this host.

    python benchmarks/fleet.py [--vms 50] [--parallel 8] [--alone 10] [--mechanism worker] [--delay 0.1] [--imitate]

The sandbox runs in a process of its own. It answers each request for a resource after a delay, because on one machine
the time of its own processor would hide what waiting side by side is worth; its clock runs at the pace of its settings,
and so do Azure's request budgets. The fleet is a process of its own, whose peaks count. `--alone`: how many VMs are
replicated one after another by `Source.replicate`, for comparison; the time for all is extrapolated from theirs.
`--imitate`: operations take as long as Azure's usually do (see `waiting.py`), in real time.

Each image is compared with its own disk. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from waiting import Imitation

from coriolis_azure import Fleet, Source
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.sandbox.server.https import Server

MIB = 1 << 20
NETWORK_QUOTAS = ("PublicIPAddresses", "StandardSkuPublicIpAddresses", "NetworkInterfaces")


def serve(folder: Path, images: list[Path], delay: float | None, pace: float, pipe: Pipe) -> None:
    """Serve a sandbox with a VM for each image; tell what it was asked, on request. No `delay`: imitate Azure."""
    seen: collections.Counter[str] = collections.Counter()
    imitation = Imitation()

    def answer(request: Request) -> Response:
        path = request.path.lower()
        if path.startswith("/subscriptions/"):
            kinds = path.partition("/providers/")[2].split("/")
            seen[f"{request.method} {'/'.join(kinds[1::2]) or path.count('/')}"] += 1
            time.sleep(delay or 0)
        response = imitation(request, sandbox.handle) if delay is None else sandbox.handle(request)
        seen["throttled"] += response.status == 429
        return response

    with Sandbox(folder, pace=pace) as sandbox:
        for quota in ("cores", "virtualMachines", "standardDSv5Family", *NETWORK_QUOTAS):
            sandbox.quotas[quota] = (0, 10_000)
        for image in images:
            sandbox.add_vm(image.stem, image)
        server = Server(answer, folder, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, document in (
            ("connection", sandbox.connection_info(server.url)),
            ("environment", sandbox.environment()),
        ):
            (folder / f"{name}.json").write_text(json.dumps(document))
        left = len(sandbox.resources())
        pipe.send(None)
        while pipe.recv():
            pipe.send({"seen": dict(seen), "left": len(sandbox.resources()) - left})
            seen.clear()
        server.shutdown()


def replicate(task: dict[str, Any]) -> None:
    """Replicate VMs in this process, and print what it took."""
    azure, to = Path(task["azure"]), Path(task["to"])
    connection, environment = (
        json.loads((azure / f"{name}.json").read_text()) for name in ("connection", "environment")
    )
    environment |= {"replica_export_mechanism": task["mechanism"]}
    peaks, ended = {"threads": 0, "descriptors": 0}, threading.Event()

    def sample() -> None:
        while not ended.wait(0.05):
            for name, folder in (("threads", "task"), ("descriptors", "fd")):
                peaks[name] = max(peaks[name], len(os.listdir(f"/proc/self/{folder}")))  # noqa: PTH208

    threading.Thread(target=sample, daemon=True).start()
    begun, failed = time.perf_counter(), list[str]()
    if task["parallel"]:
        with Fleet(connection, [environment]) as fleet:
            result = fleet.replicate(fleet.select(), to, parallel=task["parallel"])
            failed = [f"{each.vm}: {each.error}" for each in result.failed]
    else:
        with Source(connection, environment) as source:
            for vm in task["vms"]:
                source.replicate(vm, to / vm)
    seconds = time.perf_counter() - begun
    ended.set()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    processor = sum(os.times()[:2])
    print(
        json.dumps(
            {"seconds": seconds, "processor": processor, "host_mib": peak >> 10, **peaks, "failed": failed}
        )
    )


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vms", type=int, default=50)
    parser.add_argument("--mib", type=int, default=4)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--alone", type=int, default=10)
    parser.add_argument("--mechanism", default="worker")
    parser.add_argument("--delay", type=float, default=0.1)
    parser.add_argument("--pace", type=float, default=60.0)
    parser.add_argument("--imitate", action="store_true")
    given = parser.parse_args()
    delay, pace = (None, 1.0) if given.imitate else (given.delay, given.pace)
    with TemporaryDirectory() as name:
        folder = Path(name)
        images = []
        for number in range(given.vms):
            images.append(folder / f"vm-{number:03}.raw")
            images[-1].write_bytes(random.Random(number).randbytes(given.mib * MIB // 2))
            os.truncate(images[-1], given.mib * MIB)
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        azure = folder / "azure"
        server = context.Process(target=serve, args=(azure, images, delay, pace, theirs), daemon=True)
        server.start()
        ours.recv()

        def run(to: str, **task: Any) -> dict[str, Any]:
            ours.send(True)
            ours.recv()
            task |= {"azure": str(azure), "to": str(folder / to), "mechanism": given.mechanism}
            done = subprocess.run(
                [sys.executable, __file__, json.dumps(task)], check=True, stdout=subprocess.PIPE, text=True
            )
            ours.send(True)
            result = {**json.loads(done.stdout), **ours.recv()}
            print(to, json.dumps(result), file=sys.stderr, flush=True)
            return result

        together = run("together", parallel=given.parallel)
        wrong = [
            image.stem
            for image in images
            if not (folder / "together" / image.stem / "os.raw").exists()
            or (folder / "together" / image.stem / "os.raw").read_bytes() != image.read_bytes()
        ]
        arm = sum(count for what, count in together["seen"].items() if what != "throttled")
        result = {"together": together, "wrong": wrong, "requests_a_vm": round(arm / given.vms, 1)}
        if given.alone:
            vms = [image.stem for image in images[: given.alone]]
            alone = run("alone", parallel=0, vms=vms)
            seconds = alone["seconds"] / given.alone * given.vms
            asked = sum(count for what, count in alone["seen"].items() if what != "throttled")
            result |= {
                "alone": alone,
                "alone_all_seconds": seconds,
                "share": round(together["seconds"] / seconds, 3),
                "alone_requests_a_vm": round(asked / given.alone, 1),
            }
        ours.send(False)
        server.join()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        replicate(json.loads(sys.argv[1]))
    else:
        main()
