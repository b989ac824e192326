"""One run of ours in a process of its own, so that its memory and its CPU time are its own.

    python ours.py '{"worker": {...}, "disks": [[image, destination], ...], ...}'

Starts when all is imported, as a service would have it: connect, start the agents, copy, commit. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from peak import peak_kib

from coriolis_azure import transfer
from coriolis_azure.clock import Clock
from coriolis_azure.events import Event, Notice, Progress
from coriolis_azure.model import Worker
from coriolis_azure.readers import conversation, rate_limiter, ssh
from coriolis_azure.readers.agents import AgentReader
from coriolis_azure.readers.channel import Direct
from coriolis_azure.readers.flow import Flow
from coriolis_azure.replica.files import FileMedium
from coriolis_azure.replica.replica import Replica
from coriolis_azure.threads import ordered
from coriolis_azure.worker.sizes import at_a_time, threads_each


def main(task: dict[str, Any]) -> None:
    """Copy all disks of the task, side by side, and print what it took."""
    if task.get("sdk"):  # all that a run has loaded when it copies
        import azure.mgmt.network  # noqa: F401

        import coriolis_azure.source  # noqa: F401
    worker = Worker(**task["worker"])
    clock, notices = Clock(), []

    def report(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    direct = Direct(worker.address, task["port"], report) if task.get("port") else None
    limiter = rate_limiter.RateLimiter(task["rate"], clock) if task.get("rate") else None

    def copy(item: tuple[int, tuple[str, str]]) -> transfer.Outcome:
        slot, (image, target) = item
        with Path(image).open("rb") as disk:
            size = disk.seek(0, os.SEEK_END)  # also of a block device
        job = conversation.Job(
            (image,),
            size,
            compress=task.get("compress", "none"),
            leaf=task.get("leaf", 4096),
            slot=slot,
            threads=threads_each(beside),
        )
        name, line = Path(target).name, ssh.Line(worker, clock, report, ssh.WINDOW // beside)
        reader = AgentReader(line.agent, job, Flow(name, report, clock, limiter), direct, line.close)
        with Replica(FileMedium(Path(target))) as destination:
            base = destination.known("id", size, task.get("chunk", 1 << 20), full=task.get("full", False))
            outcome = transfer.copy(
                reader,
                base,
                destination,
                Progress(name, size, report, clock),
                verify=task.get("verify", False),
                concurrent=beside,
            )
            destination.publish()
        return outcome

    # `limits`: what Azure limits each disk to, in bytes a second
    limits = task.get("limits") or [0] * len(task["disks"])
    beside = at_a_time(limits, task.get("chunk", 1 << 20))
    began = time.perf_counter()
    outcomes = list(ordered(copy, enumerate(task["disks"]), threads=beside, ahead=2 * beside))
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "seconds": seconds,
                "host_kib": peak_kib(),
                "sent": sum(o.sent_bytes for o in outcomes),
                "notices": notices,
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
