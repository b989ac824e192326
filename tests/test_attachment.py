"""Workers that may have booted with clones attached: a pool's, before they are used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from coriolis_azure.clock import Clock
from coriolis_azure.events import Event, Notice, silent
from coriolis_azure.machine import cloning
from coriolis_azure.model import Worker
from coriolis_azure.readers import ssh
from coriolis_azure.replica import places, sets
from coriolis_azure.run import attached_disks
from coriolis_azure.run.journal import Journal
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from coriolis_azure.worker.pool import Pool
from harness.clients import Clients


def boot_of(reader: Worker) -> str:
    with ssh.connect(reader, Clock(), silent) as connection:
        return connection.boot_id()


def luns(source: Source, reader: Worker) -> list[int]:
    return [
        entry["lun"] for entry in source.azure.get(reader.vm)["properties"]["storageProfile"]["dataDisks"]
    ]


@pytest.fixture
def pool(source: Source, told: list[Event]) -> Pool:
    return Pool(replace(source.context, report=told.append, clock=Clock()), "0f6f1c1e-1111")


@pytest.mark.slow
def test_a_pools_worker_is_rid_of_a_dead_runs_clones_before_it_is_used(
    azure: Sandbox,
    source: Source,
    pool: Pool,
    image: Callable[..., Path],
    told: list[Event],
    tmp_path: Path,
) -> None:
    content = image("os")
    azure.add_vm("web", content)
    machine = source.inspect("web")
    disks = source.chosen(machine)
    shared, subnet = pool.share()
    made, reader = pool.add("9a7b6c5d-aaaa", subnet)
    dead = source.resources(source.new_run(machine), Journal(source.new_run(machine)))
    snapshots = cloning.snapshot_all(dead, disks, silent, Clock())

    def dies_with_a_clone(before: int) -> None:
        (clone,) = cloning.clone_all(dead, disks, snapshots, before)
        entry = {"lun": 5, "createOption": "Attach", "managedDisk": {"id": clone}}
        body = {"properties": {"storageProfile": {"dataDisks": [entry]}}}
        source.azure.patch_vm(reader.vm, body)
        assert luns(source, reader) == [5]

    dies_with_a_clone(0)
    boot = boot_of(reader)
    with places.open(str(tmp_path / "images"), silent, source.storage) as folder:
        record = sets.begin(folder, machine.id, sets.Begun("run", "now", ("os",)))
        (report,) = source.copy(source.new_run(machine), reader, machine, disks, folder)
        sets.complete(folder, record, {"os": report.root})
    assert (tmp_path / "images/os.raw").read_bytes() == content.read_bytes()
    assert (boot_of(reader) != boot, luns(source, reader)) == (True, [])
    assert any("of another run attached" in event.text for event in told if isinstance(event, Notice))

    dies_with_a_clone(1)
    pool.stop(reader.vm)
    pool.start(reader.vm)
    assert luns(source, reader) == []
    pool.check_health(reader)
    boot = boot_of(reader)
    assert not attached_disks.emptied(source.azure, reader.vm, silent, Clock())
    assert boot_of(reader) == boot
    pool.remove(made)
    pool.remove(shared)


def test_what_the_first_boot_wrote_is_on_the_disk_before_a_clone_is_attached(
    azure: Sandbox, source: Source, image: Callable[..., Path], tmp_path: Path
) -> None:
    """Otherwise a worker that is reset a moment later has an empty host key: seen with Debian 13 in QEMU."""
    azure.add_vm("web", image("os"))
    synced = list[list[Path]]()

    def watch(request: Request, answer: Callable[[Request], Response]) -> Response:
        if (
            request.method in ("PUT", "PATCH")
            and b'"Attach"' in request.body
            and b"dataDisks" in request.body
        ):
            synced.append(list((tmp_path / "azure" / "guests").glob("*/synced")))
        return answer(request)

    azure.intercept = watch
    source.replicate("web", tmp_path / "images")
    assert [len(found) for found in synced] == [1]


def test_a_run_attaches_and_detaches_its_own_disks_and_no_others(
    azure: Sandbox, source: Source, image: Callable[..., Path], clients: Clients
) -> None:
    """A run that was given up ends while its successor uses the same worker: the successor's clones stay."""
    worker = Worker(azure.add_vm("worker", image("worker", 96 << 10)), "192.0.2.1", 22, "us", "", 4, "")
    first, second = ([clients.disk(f"{run}-{number}").id for number in range(2)] for run in ("a", "b"))
    with ExitStack() as given_up, ExitStack() as successor:
        mine = given_up.enter_context(attached_disks.attached(source.azure, worker, first, Clock()))
        its = successor.enter_context(attached_disks.attached(source.azure, worker, second, Clock()))
        assert sorted(luns(source, worker)) == sorted(mine + its) == [0, 1, 2, 3]
        given_up.close()
        assert sorted(luns(source, worker)) == sorted(its)
    assert luns(source, worker) == []
