"""Random histories of a disk and its replicas: after every good run, each image is the disk.

The disk and its snapshots are in memory, the replicas are files. See `harness/families.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coriolis_azure import transfer
from coriolis_azure.azure import names
from coriolis_azure.azure.pages import PAGE
from coriolis_azure.clock import Clock
from coriolis_azure.errors import ChangeListWrong
from coriolis_azure.events import Progress, silent
from coriolis_azure.mechanisms.hybrid import Lists
from coriolis_azure.mechanisms.snapshots import SnapshotReading
from coriolis_azure.mechanisms.target import Read
from coriolis_azure.readers.agents import AgentReader
from coriolis_azure.readers.changed import WINDOW
from coriolis_azure.readers.conversation import Job
from coriolis_azure.readers.flow import Flow
from coriolis_azure.readers.reader import Reader
from coriolis_azure.replica.files import FileMedium
from coriolis_azure.replica.manifest import GRAIN
from coriolis_azure.replica.replica import Replica
from coriolis_azure.run.baselines import Baselines
from harness.deaths import Died
from harness.families import Family
from harness.threaded_agent import ThreadedAgent

HISTORIES = int(os.environ.get("HISTORIES", "24"))  # a long run: HISTORIES=2000
STEPS = 12


class Destination:
    """A replica of the disk, and the runs that bring it up to date."""

    def __init__(self, family: Family, path: Path, chance: random.Random | None = None) -> None:
        self.family, self.path, self.chunk = family, path, GRAIN
        self.chance = chance
        self.clock = Clock()

    def run(self, mechanism: str = "snapshots", *, keep: bool = True, full_every: int = 7) -> Read:
        """One run, as `Source.replicate` does it, from the sweep to the deletion of what is not kept."""
        family = self.family
        settings = SimpleNamespace(
            keep_baseline=keep,
            baseline_days=14,
            full_every=full_every,
            tags={},
            resource_group="g",
            chunk_size_kib=self.chunk >> 10,
        )
        context: Any = SimpleNamespace(azure=family, clock=self.clock, report=silent, environment=settings)
        run = SimpleNamespace(id="run", instance="web", group="g")
        resources: Any = SimpleNamespace(run=run, outlives=lambda snapshot: None, delete=family.delete)
        baselines = Baselines(context, resources)
        family.delete([id for id, taken in family.snapshots.items() if not is_baseline(taken.document)])
        reader, read = self.reading(mechanism, context, baselines)
        replica = Replica(FileMedium(self.path))
        try:
            while True:
                base = replica.known(family.unique_id, family.size, self.chunk, full=False)
                progress = Progress("os", family.size, silent, self.clock)
                try:
                    transfer.copy(reader(replica), base, replica, progress, verify=False)
                except ChangeListWrong:
                    continue
                break
            baselines.keep()
            replica.publish()
        finally:
            replica.close()
        baselines.retire()
        family.delete([id for id, taken in family.snapshots.items() if not is_baseline(taken.document)])
        return read()["os"]

    def reading(
        self, mechanism: str, context: Any, baselines: Baselines
    ) -> tuple[Callable[[Replica], Reader], Callable[[], dict[str, Read]]]:
        """What gives the readers of a new snapshot, and what tells what was read."""
        family = self.family
        snapshot = family.shot()
        disk: Any = SimpleNamespace(name="os", unique_id=family.unique_id, size_bytes=family.size)
        if mechanism == "snapshots":
            export: Any = family.exported(context, family.get(snapshot), family.size)
            direct = SnapshotReading(context, {"os": export}, baselines, self.flow, family.exported)  # type: ignore[arg-type]
            return lambda replica: direct.reader(disk, replica), direct.read
        target: Any = SimpleNamespace(context=context, baselines=baselines)
        lists = Lists(target, {"os": family.get(snapshot)}, {"os": ""}, family.exported)  # type: ignore[arg-type]
        clone = self.path.with_name(f"{self.path.name}-clone")
        clone.write_bytes(family.snapshots[snapshot.lower()].content)
        job = Job((str(clone),), family.size, wait=0)

        def reader(replica: Replica) -> Reader:
            return AgentReader(self.agent, job, self.flow(disk), known=lists.known(disk, replica))

        return reader, lists.read

    def agent(self) -> ThreadedAgent:
        """An agent; by chance, the connection to it is lost."""
        cut = self.chance is not None and self.chance.random() < 0.25
        return ThreadedAgent(self.chance.randrange(100_000) if self.chance is not None and cut else -1)

    def flow(self, disk: object) -> Flow:
        del disk
        return Flow("os", silent, self.clock)

    def is_right(self) -> bool:
        """Whether the image is the disk as it is now."""
        return self.path.read_bytes() == self.family.content


def is_baseline(document: dict[str, Any]) -> bool:
    return names.BASELINE_TAG in document["tags"]


class History:
    """What happens to a disk and its two replicas, by chance."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance, self.told = random.Random(seed), list[str]()
        self.family = Family(
            self.chance.choice((8, 13, 32)) * GRAIN + self.chance.choice((0, PAGE, 5 * PAGE))
        )
        folder.mkdir(parents=True)
        self.destinations = [
            Destination(self.family, folder / f"{name}.raw", self.chance) for name in ("first", "second")
        ]
        for _ in range(6):
            self.write()

    def range(self) -> tuple[int, int]:
        """Pages of the disk: offset and length."""
        pages = self.family.size // PAGE
        first = self.chance.randrange(pages)
        count = min(self.chance.choice((1, 1, 8, 128, 300)), pages - first)
        return first * PAGE, count * PAGE

    def write(self) -> None:
        offset, length = self.range()
        self.family.write(offset, self.chance.randbytes(length))

    def rewrite(self) -> None:
        offset, length = self.range()
        self.family.write(offset, bytes(self.family.content[offset : offset + length]))

    def clear(self) -> None:
        self.family.clear(*self.range())

    def grow(self) -> None:
        self.family.grow(self.family.size + self.chance.choice((PAGE, GRAIN, 3 * GRAIN)))

    def swap(self) -> None:
        self.family.swap(self.chance)

    def other_snapshot(self) -> None:
        """Another product takes one."""
        self.family.snapshots[self.family.shot().lower()].document["tags"] = {
            names.BASELINE_TAG: "of another"
        }

    def lose_baseline(self) -> None:
        if self.family.snapshots:
            del self.family.snapshots[self.chance.choice(list(self.family.snapshots))]

    def edit(self) -> None:
        """Somebody writes to an image."""
        path = self.chance.choice(self.destinations).path
        if path.exists():
            with path.open("r+b") as file:
                file.seek(self.chance.randrange(path.stat().st_size))
                file.write(self.chance.randbytes(100))
                file.truncate(path.stat().st_size)

    def lose_state(self) -> None:
        """What is beside an image is damaged."""
        kind = self.chance.choice(("manifest", "draft", "index", "redo", "grains"))
        path = self.chance.choice(self.destinations).path
        beside = path.with_name(f"{path.name}.{kind}")
        if beside.exists():
            beside.write_bytes(beside.read_bytes()[: self.chance.randrange(200)])

    def other_chunk(self) -> None:
        self.chance.choice(self.destinations).chunk = self.chance.choice((4096, GRAIN, 4 * GRAIN))

    def die(self) -> None:
        """A run ends at one of its calls."""
        self.family.calls_left = self.chance.randrange(30)
        try:
            self.chance.choice(self.destinations).run(self.mechanism())
        except Died:
            pass
        finally:
            self.family.calls_left = -1

    def run(self) -> None:
        destination = self.chance.choice(self.destinations)
        read = destination.run(mechanism := self.mechanism(), keep=self.chance.random() < 0.9)
        self.told[-1] += f" {mechanism}"
        assert destination.is_right(), (self.told, read)

    def mechanism(self) -> str:
        return self.chance.choice(("snapshots", "hybrid"))

    def go_on(self) -> None:
        """The next thing that happens."""
        acts = [
            self.write,
            self.write,
            self.rewrite,
            self.clear,
            self.other_snapshot,
            self.die,
            self.run,
            self.run,
            self.run,
        ]
        rare = [self.grow, self.swap, self.lose_baseline, self.edit, self.lose_state, self.other_chunk]
        act = self.chance.choice(acts if self.chance.random() < 0.8 else rare)
        self.told.append(act.__name__)
        act()


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_whatever_happened_an_image_is_the_disk_after_each_good_run(seed: int, tmp_path: Path) -> None:
    history = History(seed, tmp_path / "images")
    for _ in range(STEPS):
        history.go_on()
    for destination in history.destinations:
        destination.run(history.mechanism())
        assert destination.is_right(), history.told
    baselines = [each for each in history.family.snapshots.values() if is_baseline(each.document)]
    ours = [each for each in baselines if each.document["tags"][names.BASELINE_TAG] != "of another"]
    assert len({each.document["tags"][names.BASELINE_TAG] for each in ours}) == len(ours)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["snapshots", "hybrid"])
def test_every_part_of_the_disk_is_read_within_so_many_runs(tmp_path: Path, mechanism: str) -> None:
    family = Family(2 * WINDOW * GRAIN)
    family.write(0, os.urandom(family.size))
    destination = Destination(family, tmp_path / "os.raw")
    destination.run(mechanism)
    assert destination.run(mechanism, full_every=1000).checked_bytes == family.size
    runs = [destination.run(mechanism, full_every=1000) for _ in range(WINDOW)]
    assert [run.checked_bytes for run in runs] == [2 * GRAIN] * WINDOW
    assert [run.relied_bytes for run in runs] == [family.size - 2 * GRAIN] * WINDOW


@pytest.mark.parametrize("mechanism", ["snapshots", "hybrid"])
def test_a_page_that_lists_forget_is_found_within_so_many_runs(tmp_path: Path, mechanism: str) -> None:
    family = Family(WINDOW * GRAIN)
    family.write(0, os.urandom(family.size))
    destination = Destination(family, tmp_path / "os.raw")
    destination.run(mechanism)
    destination.run(mechanism)
    page = 20 * GRAIN // PAGE + 3
    family.forgotten = {page}
    family.write(page * PAGE, os.urandom(PAGE))
    runs = 0
    while not destination.is_right():
        destination.run(mechanism)
        runs += 1
    assert 1 <= runs <= WINDOW


def test_a_whole_grain_is_written_without_reading_what_it_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = Family(32 * GRAIN)
    family.write(0, os.urandom(family.size))
    destination = Destination(family, tmp_path / "os.raw")
    destination.chunk = 4 * GRAIN
    for _ in range(2):
        destination.run()
    family.write(5 * GRAIN, os.urandom(GRAIN))
    read = list[int]()
    original = Replica.read

    def noted(replica: Replica, offset: int, length: int) -> bytes:
        read.append(offset)
        return original(replica, offset, length)

    monkeypatch.setattr(Replica, "read", noted)
    assert destination.run().relied_bytes
    assert read == []
    assert destination.is_right()
