"""VHD blobs are read from snapshots of them: what is allocated, and later what Azure says has changed."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coriolis_azure.events import Event, Notice
from coriolis_azure.plugin.provider import AzureExportProvider
from coriolis_azure.readers.changed import WINDOW
from coriolis_azure.results import DiskReport
from coriolis_azure.sandbox import Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.battles import served
from harness.constants import MIB
from harness.deaths import Died, dying

Image = Callable[..., Path]
Connect = Callable[..., Source]
ACCOUNT = "oldstorage"
KEPT = {"replica_export_mechanism": "snapshots", "keep_baseline": True, "chunk_size_kib": 64}
SIZE = 8 * MIB
CHUNK = 64 << 10
HISTORIES = int(os.environ.get("VHD_HISTORIES", "3"))  # a long run: VHD_HISTORIES=300


class Replica:
    """An old VM with one VHD, its replica, and runs that bring the one up to the other."""

    def __init__(self, azure: Sandbox, connect: Connect, image: Image, folder: Path) -> None:
        azure.add_vm("old-1", image("os", SIZE, seed=1), spec=VmSpec(unmanaged=ACCOUNT))
        self.azure, self.folder, self._connect = azure, folder, connect
        azure.storage.clear(self.blob, 3 * MIB, 5 * MIB)
        self.resources = azure.resources()

    @property
    def blob(self) -> Any:
        return self.azure.storage.blob(f"{ACCOUNT}/vhds/old-1-os.vhd")

    @property
    def content(self) -> bytes:
        return self.azure.storage.content(self.blob)[:-512]

    def run(self, folder: Path | None = None, **environment: object) -> DiskReport:
        """A run; the image is compared with the disk."""
        to = folder or self.folder
        (report,) = self._connect(environment={**KEPT, **environment}).replicate("old-1", to).disks
        assert (to / "os.raw").read_bytes() == self.content
        assert self.azure.resources() == self.resources
        return report

    def write(self, chunk: int, seed: int = 7) -> None:
        """Change 4 KiB in a chunk."""
        data = random.Random(seed).randbytes(4096)
        self.azure.storage.overwrite(self.blob, chunk * CHUNK + 8192, data)

    def snapshots(self) -> list[Any]:
        """The snapshots of the blob."""
        return list(self.azure.storage.account(ACCOUNT).containers["vhds"].snapshots)

    def kill(self, at: int) -> bool:
        """A run that dies at this request; False if it needs fewer."""
        self.azure.intercept = dying(at)
        try:
            self._connect(environment=KEPT).replicate("old-1", self.folder)
        except Died:
            return True
        finally:
            self.azure.intercept = None
        return False


@pytest.fixture
def replica(azure: Sandbox, connect: Connect, image: Image, tmp_path: Path) -> Replica:
    return Replica(azure, connect, image, tmp_path / "images")


def noticed(told: list[Event], text: str) -> bool:
    return any(text in event.text for event in told if isinstance(event, Notice))


@pytest.mark.slow
def test_runs_make_nothing_but_a_snapshot_and_read_what_is_allocated(replica: Replica) -> None:
    replica.azure.requests.clear()
    first = replica.run(keep_baseline=False)
    assert (first.tier, first.full) == ("allocated", True)
    assert first.read_bytes == SIZE - 2 * MIB
    assert replica.snapshots() == []
    made = [path for method, path in replica.azure.requests if method == "PUT"]
    assert all(f"/{ACCOUNT}/vhds/" in path for path in made)


@pytest.mark.slow
def test_the_second_run_proves_the_list_and_the_third_reads_what_changed(replica: Replica) -> None:
    assert replica.run().tier == "allocated"
    (first,) = replica.snapshots()
    replica.write(3)
    second = replica.run()
    assert (second.tier, second.listed_bytes) == ("allocated", 4096)
    assert second.checked_bytes > 0
    (kept,) = replica.snapshots()
    assert kept.snapshot > first.snapshot
    replica.write(100)
    third = replica.run()
    assert (third.tier, third.listed_bytes, third.sent_bytes) == ("changed", 4096, CHUNK)
    assert third.read_bytes <= (1 + -(-SIZE // CHUNK // WINDOW)) * CHUNK
    assert len(replica.snapshots()) == 1


@pytest.mark.slow
def test_a_baseline_says_what_it_is_and_is_listed_and_deleted_by_clean_up(
    replica: Replica, connect: Connect
) -> None:
    replica.run(baseline_days=3)
    (kept,) = replica.snapshots()
    assert "coriolis_run" not in kept.metadata
    source = connect()
    (listed,) = source.baselines()
    assert (listed.instance, listed.disk, listed.used_bytes) == ("old-1", "os", SIZE)
    assert source.retire([listed]) == ([], [])
    assert source.retire([listed], every=True, dry_run=True) == ([listed], [])
    assert len(replica.snapshots()) == 1
    over = replace(listed, until="2020-01-01T00:00:00Z")
    assert source.retire([over]) == ([over], [])
    assert replica.snapshots() == []
    lost = replica.run()
    assert (lost.tier, lost.reason) == ("allocated", "the baseline was deleted")
    assert len(replica.snapshots()) == 1


@pytest.mark.slow
def test_two_destinations_have_a_baseline_each_and_without_the_setting_it_is_deleted(
    replica: Replica, tmp_path: Path
) -> None:
    replica.run()
    for _ in range(2):
        replica.run(tmp_path / "second")
    assert len(replica.snapshots()) == 2
    replica.write(9)
    assert replica.run(tmp_path / "second").tier == "changed"
    assert replica.run(keep_baseline=False).sent_bytes == CHUNK
    (rest,) = replica.snapshots()
    assert replica.run(tmp_path / "second").tier == "changed"
    assert rest not in replica.snapshots()


@pytest.mark.slow
def test_cleared_pages_become_zeros_and_a_vhd_that_has_grown_is_read_where_it_grew(replica: Replica) -> None:
    replica.run()
    replica.run()
    replica.azure.storage.clear(replica.blob, 2 * MIB, 3 * MIB)
    cleared = replica.run()
    assert cleared.tier == "changed"
    assert cleared.zero_bytes > 0
    replica.azure.storage.grow(replica.blob, SIZE + MIB)
    replica.azure.storage.overwrite(replica.blob, SIZE + 4096, b"grown" + bytes(507))
    grown = replica.run()
    assert grown.size_bytes == SIZE + MIB
    assert grown.tier == "changed"


@pytest.mark.slow
def test_a_blob_that_was_put_in_its_place_is_another_disk(
    replica: Replica, tmp_path: Path, image: Image
) -> None:
    replica.run()
    replica.run()
    blob = replica.blob
    blob.life, blob.made = "another", "Mon, 01 Jan 2024 00:00:00 GMT"
    replica.write(5)
    report = replica.run()
    assert (report.tier, report.full) == ("allocated", True)
    assert len(replica.snapshots()) == 1


@pytest.mark.slow
def test_an_account_that_cannot_be_read_hides_only_its_own_baselines(
    replica: Replica, connect: Connect, image: Image
) -> None:
    replica.run()
    replica.azure.add_vm("old-2", image("other"), spec=VmSpec(unmanaged="closedaccount"))
    resource = replica.azure.storage.resource("closedaccount")
    resource.properties["networkAcls"] = {"defaultAction": "Deny", "ipRules": []}
    assert [each.instance for each in connect().baselines()] == ["old-1"]


@pytest.mark.slow
def test_the_plugin_reads_what_changed_and_deletes_baselines_with_a_transfer(
    replica: Replica, tmp_path: Path
) -> None:
    azure, volume = replica.azure, tmp_path / "volume"
    volume.write_bytes(b"")
    target = {"backend": "file_backup_writer", "connection_details": {"ip": "127.0.0.1", "port": 22}}
    environment = {**azure.environment(), **KEPT}
    told: list[str] = []

    def tell(message: str, **options: Any) -> dict[str, int]:
        del options
        told.append(message)
        return {"index": 0}

    handler: Any = SimpleNamespace(
        add_progress_update=tell,
        update_progress_update=lambda *_, **__: None,
        get_progress_update_identifier=lambda update: update["index"],
    )
    with served(azure) as connection:

        def call(method: str, *arguments: Any) -> Any:
            told.clear()
            provider = AzureExportProvider(handler)
            return json.loads(json.dumps(getattr(provider, method)(None, connection, *arguments)))

        info = call("get_replica_instance_info", environment, "old-1")
        (disk,) = info["devices"]["disks"]
        entries = [{"disk_id": disk["id"], "volume_dev": str(volume), "zeroed": True}]
        for execution in range(4):
            replica.write(10 + execution, seed=execution)
            deployed = call("deploy_replica_source_resources", info, environment)
            resources, reached = deployed["migr_resources"], deployed["connection_info"]
            arguments = (environment, "old-1", resources, reached, target, entries, True)
            entries = call("replicate_disks", *arguments)
            assert any("lists no change there" in line for line in told) == (execution > 1), told
            call("delete_replica_source_resources", environment, resources)
            assert volume.read_bytes() == replica.content
            assert [each.metadata["coriolis_baseline"] for each in replica.snapshots()] == [
                entries[0]["replica_state"]["baseline"]["stream"]
            ]
        call("delete_replica_source_snapshots", environment, entries)
        assert replica.snapshots() == []


LIES = {
    "header-ignored": "from a snapshot to itself",
    "list-cut": "",
    "range-left-out": "neither allocated nor written",
    "ranges-unsorted": "do not fit",
    "ranges-overlapping": "do not fit",
    "ranges-beyond-end": "beyond what was asked for",
    "ranges-unaligned": "do not fit",
    "wrong-length": "of a blob of another size",
    "wrong-version": "was not made by version",
}


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_a_list_that_cannot_be_right_is_not_used(replica: Replica, lie: str, told: list[Event]) -> None:
    replica.azure.storage.clear(replica.blob, SIZE - MIB, SIZE)
    replica.run()
    replica.run()
    for chunk in (3, 4, 6, SIZE // CHUNK - 8, SIZE // CHUNK - 6, SIZE // CHUNK - 4):
        replica.write(chunk)
    replica.azure.faults.add(lie, path=f"/{ACCOUNT}/", about="difference", times=0)
    report = replica.run()
    replica.azure.faults.clear()
    assert report.tier == "allocated"
    assert LIES[lie] in report.reason
    replica.write(5)
    assert replica.run().tier == "allocated"  # what was proved has to be proved anew
    assert replica.run().tier == "changed"


@pytest.mark.slow
def test_a_change_that_is_not_listed_is_found_by_the_proof(replica: Replica, told: list[Event]) -> None:
    replica.run()
    for chunk in (1, 2, 3):
        replica.write(chunk)
    replica.azure.faults.add("range-left-out", path=f"/{ACCOUNT}/", about="difference", times=0)
    replica.run()
    replica.azure.faults.clear()
    assert noticed(told, f"leaves out a change at offset {2 * CHUNK}")
    assert replica.run().tier == "allocated"  # nothing was proved


@pytest.mark.slow
def test_a_change_that_is_not_listed_is_found_within_so_many_runs(
    replica: Replica, connect: Connect, told: list[Event]
) -> None:
    replica.run()
    replica.run()
    for chunk in (10, 40, 41):
        replica.write(chunk)
    replica.azure.faults.add("range-left-out", path=f"/{ACCOUNT}/", about="difference", times=0)
    source, runs = connect(environment={**KEPT, "full_every": 1000}), 0
    while (replica.folder / "os.raw").read_bytes() != replica.content:
        source.replicate("old-1", replica.folder)
        replica.azure.faults.clear()
        runs += 1
    assert 1 < runs <= WINDOW
    assert noticed(told, "leaves out a change")
    assert noticed(told, "all of the disk is read")


@pytest.mark.slow
def test_a_run_that_dies_leaves_what_its_journal_has_deleted(replica: Replica, connect: Connect) -> None:
    replica.run()
    (before,) = replica.snapshots()
    at = 1
    while replica.kill(at):  # some requests before the end, the record is published
        connect().sweep(timedelta(hours=2))
        rest = replica.snapshots()
        assert len(rest) == 1 or at > 30  # between the marks and the record, one that nothing names yet
        at += 3
    assert before not in replica.snapshots()
    replica.run()
    assert len(replica.snapshots()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_whatever_a_run_dies_of_the_next_one_is_right_and_leaves_one_baseline(
    replica: Replica, tmp_path: Path, part: int
) -> None:
    replica.run()
    replica.run()
    at, chance = part, random.Random(part)
    while True:
        at += 3
        replica.write(chance.randrange(SIZE // CHUNK), seed=at)
        if not replica.kill(at):
            break
        if chance.random() < 0.3:  # on another host
            for journal in (tmp_path / "state").rglob("*.journal"):
                journal.unlink()
        replica.run()
        assert len(replica.snapshots()) == 1
    assert at > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(HISTORIES))
def test_whatever_happened_an_image_is_the_disk_after_each_good_run(
    replica: Replica, tmp_path: Path, seed: int
) -> None:
    chance, storage = random.Random(seed), replica.azure.storage
    folders = [tmp_path / "first", tmp_path / "second"]

    def write() -> None:
        replica.write(chance.randrange(SIZE // CHUNK), seed=chance.randrange(1000))

    def clear() -> None:
        start = chance.randrange(SIZE // CHUNK) * CHUNK
        storage.clear(replica.blob, start, min(SIZE, start + 3 * CHUNK))

    def lose() -> None:
        snapshots = storage.account(ACCOUNT).containers["vhds"].snapshots
        if snapshots:
            snapshots.remove(chance.choice(snapshots))

    def edit() -> None:
        path = chance.choice(folders) / "os.raw"
        if path.exists():
            with path.open("r+b") as file:
                file.seek(chance.randrange(SIZE))
                file.write(b"by hand"[: SIZE - file.tell()])

    def die() -> None:
        replica.folder = chance.choice(folders)
        replica.kill(chance.randrange(40))

    def run() -> None:
        replica.run(chance.choice(folders), keep_baseline=chance.random() < 0.9, full_every=7)

    for _ in range(14):
        chance.choice([write, write, clear, die, run, run, run, lose, edit])()
    for folder in folders:
        replica.run(folder)
    assert len(replica.snapshots()) <= 2
