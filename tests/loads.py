"""What is large, each as a program of its own: `python loads.py sparse|extents|fleet FOLDER`. Prints what was seen.

`sparse FOLDER MIB` reads less: the short form of it.
"""

from __future__ import annotations

import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from coriolis_azure import transfer
from coriolis_azure.clock import Clock
from coriolis_azure.events import Progress, silent
from coriolis_azure.readers.agents import AgentReader
from coriolis_azure.readers.conversation import Job
from coriolis_azure.readers.flow import Flow
from coriolis_azure.replica import manifest as manifests
from coriolis_azure.source import Source  # with all SDKs, whose memory counts too
from harness.copies import by_agent
from harness.images import Image
from harness.pipes import Pipes

MIB = 1 << 20
MOST = 128  # MiB a process may need for a disk of 4 TiB


def peak(pid: int | str) -> int:
    """The most memory that a process has had, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) >> 10 if found else 0


class Watched(Pipes):
    """An agent whose memory is looked at while it talks; what it said is counted, not kept."""

    most = said = 0

    def read(self, size: int, /) -> bytes:
        self.most = max(self.most, peak(self.process.pid))
        self.heard.clear()
        self.said += size
        return super().read(size)


def sparse(folder: Path, read: int = 2 << 30, size: int = 4 << 40) -> None:
    """A disk of 4 TiB in chunks of 1 MiB; the real agent reads the end of it. Run again it is incremental.

    Reading 4 TiB of holes takes an hour and shows nothing that the last of them do not: the state is that of
    the whole disk on both sides. The copy is told that everything before is settled, as after a lost connection,
    and that one chunk in 16 of the whole disk has changed in it: no page of digests is empty, none as it was.
    """
    run = "incremental" if folder.exists() else "full"
    folder.mkdir(exist_ok=True)
    disk, chunk = folder / "disk", MIB
    with disk.open("r+b" if run == "incremental" else "wb") as file:
        file.truncate(size)
        for at in range(size - read, size, 64 * MIB):
            file.seek(at + random.randrange(32 * MIB))
            file.write(os.urandom(MIB))
    settled = (size - read) // chunk
    with Image(folder / "os.raw") as image, Watched() as pipes:
        job = Job((str(disk),), size, leaf=4096)
        base = image.known("id", size, chunk, full=False)
        digests = base.digests.copy()
        for index in range(0, settled, 16):
            digests.put(index, os.urandom(manifests.DIGEST))
        flow, progress = Flow("os", silent, Clock()), Progress("os", size, silent, Clock())
        reader = AgentReader(lambda: pipes, job, flow)
        reader._next = settled
        began = time.monotonic()
        outcome = transfer.copy(reader, replace(base, digests=digests), image, progress, verify=True)
        seconds = time.monotonic() - began
    host, agent = peak("self"), pipes.most
    print(
        f"{size >> 40} TiB, {run}: peak of the host {host} MiB, of the agent {agent} MiB, "
        f"{outcome.sent_bytes >> 20} MiB sent, {seconds:.0f} s for the last {read >> 20} MiB"
    )
    assert max(host, agent) < MOST
    _compare(disk, folder / "os.raw", range(size - read, size, MIB))


def _compare(disk: Path, image: Path, places: range) -> None:
    """A MiB from each of these places is the same in both."""
    with disk.open("rb") as one, image.open("rb") as other:
        for at in places:
            one.seek(at)
            other.seek(at)
            assert one.read(MIB) == other.read(MIB)


def extents(folder: Path, sizes: tuple[int, ...] = (4, 64)) -> None:
    """Changes of 4 KiB all over a disk that was empty, 76 in each MiB: 5 million in the one of 64 GiB."""
    folder.mkdir()
    seen = []
    for size in sizes:
        disk, path, count = folder / "disk", folder / "os.raw", 76 * size << 10
        chance = random.Random(size)
        with disk.open("wb", buffering=0) as file:
            file.truncate(size << 30)
            for at in range(0, size << 30, MIB):
                for block in chance.sample(range(256), 76):
                    os.pwrite(file.fileno(), chance.randbytes(512).ljust(4096, b"\1"), at + 4096 * block)
        with Image(path) as image, Watched() as pipes:
            base = image.known("id", size << 30, MIB, full=True)
            image.commit(replace(base, fresh=False))  # as after a run that found nothing but zeros
            base = image.known("id", size << 30, MIB, full=False)
            job = Job((str(disk),), base.size, leaf=4096)
            began, worked = time.monotonic(), _worked()
            outcome = by_agent(lambda: pipes, job, base, image)
            seconds = time.monotonic() - began
        work = _worked() - worked  # the agent has ended
        assert outcome.verified
        assert outcome.sent_bytes == count * 4096
        _compare(disk, path, range(0, size << 30, size * MIB))
        seen.append(work / count)
        print(
            f"{count} extents of change in {size} GiB: {seconds:.0f} s, {1e6 * seconds / count:.0f} µs each, "
            f"{1e6 * work / count:.0f} µs of processor time on both sides, "
            f"{pipes.said / outcome.sent_bytes:.2f} bytes over the line for each sent, peak of the host "
            f"{peak('self')} MiB, of the agent {pipes.most} MiB",
            flush=True,
        )
        disk.unlink()  # longer than all else where a file system is mounted with `discard`
        path.unlink()
    print(
        f"{sizes[-1] // sizes[0]} times the disk and the extents: {seen[-1] / seen[0]:.2f} times the processor time "
        "for each"
    )
    assert seen[-1] < 1.5 * seen[0]


def _worked() -> float:
    """Seconds of processor time of this process and of those that it has waited for: other work does not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def fleet(folder: Path, machines: int = 20) -> None:
    """That many VMs of three disks, replicated side by side by one process."""
    # The sandbox is no part of a run: elsewhere its memory must not count.
    from coriolis_azure.sandbox import Sandbox

    folder.mkdir()
    contents: dict[tuple[int, int], bytes] = {}
    with Sandbox(folder / "azure") as azure:
        azure.quotas.clear()
        for machine in range(machines):
            files = []
            for disk in range(3):
                contents[machine, disk] = random.Random(f"{machine}-{disk}").randbytes(2 * MIB)
                files.append(folder / f"content-{machine}-{disk}")
                files[-1].write_bytes(contents[machine, disk])
            azure.add_vm(f"vm-{machine}", files[0], files[1:])
        before, threads, failed = azure.resources(), 0, []

        def replicate(machine: int) -> None:
            try:
                with Source(
                    azure.connection_info(),
                    azure.environment(),
                    transport=azure.transport(),
                ) as source:
                    source.journals = None
                    source.replicate(f"vm-{machine}", folder / f"images-{machine}")
            except Exception as error:  # noqa: BLE001
                failed.append(f"vm-{machine}: {error!r}")

        began = time.monotonic()
        running = [threading.Thread(target=replicate, args=(machine,)) for machine in range(machines)]
        at_first = threading.active_count()
        for thread in running:
            thread.start()
        while any(thread.is_alive() for thread in running):
            threads = max(threads, threading.active_count())
            time.sleep(0.05)
        seconds = time.monotonic() - began
        assert failed == [], failed
        for machine in range(machines):
            for disk, name in enumerate(("os", "data-0", "data-1")):
                image = folder / f"images-{machine}" / f"{name}.raw"
                assert image.read_bytes() == contents[machine, disk], f"{image} is wrong"
        assert azure.resources() == before
        print(
            f"{machines} VMs of 3 disks side by side in one process: {seconds:.0f} s, peak {peak('self')} MiB "
            f"(the sandbox included), {threads - at_first} threads at most, {3 * machines} images right, no leaks"
        )


if __name__ == "__main__":
    load, place, *less = sys.argv[1:]
    loads: dict[str, Callable[..., None]] = {"sparse": sparse, "extents": extents, "fleet": fleet}
    loads[load](Path(place), *(int(mib) << 20 for mib in less))
