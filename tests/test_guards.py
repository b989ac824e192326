"""Each lie of a disk's host that the sandbox knows: which guard notices it, what is read instead, a right replica."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from coriolis_azure.events import Event, Notice
from coriolis_azure.results import DiskReport
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from harness.constants import MIB

pytestmark = pytest.mark.slow  # four runs each

KEPT = {"replica_export_mechanism": "snapshots", "keep_baseline": True, "chunk_size_kib": 64}
SIZE = 8 * MIB


@dataclass(frozen=True)
class Guard:
    """What notices a lie `about` some requests, in its own words, and the tier that the run ends at.

    Without words the lie does no harm. `times`: how often it is told; 0: always.
    """

    words: str
    tier: str = "allocated"
    about: str = "difference"
    times: int = 0


# By the kind of the sandbox's fault.
GUARDS = [
    ("header-ignored", Guard("from a snapshot to itself")),
    ("window-ignored", Guard("", "changed")),
    ("list-cut", Guard("neither allocated nor written")),
    ("range-left-out", Guard("neither allocated nor written")),
    ("ranges-unsorted", Guard("do not fit behind")),
    ("ranges-overlapping", Guard("do not fit behind")),
    ("ranges-beyond-end", Guard("beyond what was asked for")),
    ("ranges-unaligned", Guard("do not fit")),
    ("footer-counted", Guard("from a snapshot to itself")),
    ("wrong-length", Guard("of a blob of another size")),
    ("wrong-version", Guard("not made by version")),
    ("list-timeout", Guard("OperationTimedOut")),
    ("server-busy", Guard("", "changed", times=1)),
    ("sas-expired", Guard("", "changed", times=1)),
    ("list-cut", Guard("ends before the footer", "whole", about="list")),
    ("ranges-unsorted", Guard("all of the snapshot is read", "whole", about="list")),
    ("wrong-length", Guard("all of the snapshot is read", "whole", about="list")),
    ("list-timeout", Guard("all of the snapshot is read", "whole", about="list")),
    ("broken-body", Guard("", "changed", about="read", times=1)),
    ("sas-expired", Guard("", "changed", about="read", times=1)),
    ("server-busy", Guard("", "changed", about="read", times=1)),
    ("wrong-length", Guard("", "changed", about="read")),
]


@pytest.mark.parametrize(("kind", "guard"), GUARDS, ids=[f"{kind} {guard.about}" for kind, guard in GUARDS])
def test_a_lie_ends_in_a_right_replica(
    azure: Sandbox,
    connect: Callable[..., Source],
    image: Callable[..., Path],
    tmp_path: Path,
    told: list[Event],
    kind: str,
    guard: Guard,
) -> None:
    azure.add_vm("web", image("os", SIZE, seed=1))
    disk = azure.disk(connect().inspect("web").disks[0].id)
    disk.clear(SIZE - MIB, MIB)

    def run() -> DiskReport:
        (report,) = connect(environment=KEPT).replicate("web", tmp_path / "images").disks
        assert (tmp_path / "images/os.raw").read_bytes() == disk.path.read_bytes()
        return report

    for _ in range(2):
        run()
    for chunk in (3, 40, SIZE // 65536 - 8, SIZE // 65536 - 4):  # the last two where nothing was allocated
        disk.write(chunk * 65536 + 8192, random.Random(chunk).randbytes(4096))
    azure.faults.add(kind, about=guard.about, times=guard.times)
    report = run()
    azure.faults.clear()
    said = [report.reason, *(event.text for event in told if isinstance(event, Notice))]
    assert report.tier == guard.tier, said
    assert any(guard.words in text for text in said), said
    if guard.words:
        assert run().tier == "allocated"  # lists are proved anew
    assert run().tier == "changed"
