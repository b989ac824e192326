"""Executions of a transfer in which a task, its service or its answer is lost: the volumes are right after the next."""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.plugin import write_data
from coriolis_azure.plugin.provider import AzureExportProvider
from coriolis_azure.run import cleanup
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.battles import served
from harness.conductor import Task, Transfer
from harness.constants import MIB
from harness.late_answers import Later
from harness.waiting import eventually
from harness.writer_targets import HttpsTarget, SshTarget

pytestmark = pytest.mark.slow

POOL = "0f6f1c1e-1111-4222-8333-444455556666"


def content(seed: int, number: int, size: int = MIB) -> bytes:
    """Random halves, and zeros where another seed has none."""
    half, chance = size // 2, random.Random(f"{seed} {number}")
    parts = [chance.randbytes(half), bytes(half)]
    return b"".join(parts if seed % 2 else reversed(parts))


class Site:
    """The sandbox with `web` of two disks, a pool of two workers, and the other end of a writer."""

    def __init__(
        self, azure: Sandbox, connection: Any, folder: Path, target: SshTarget | HttpsTarget
    ) -> None:
        self.azure, self.connection, self.folder, self.target = azure, connection, folder, target
        self._workers: list[Any] = []
        paths = [self._file(1, number) for number in range(2)]
        azure.add_vm("web", paths[0], [paths[1]])
        self.shared = self._call("set_up_pool_shared_resources", azure.environment(), POOL)
        self.worker(0)
        self.idle = self.left()

    def _file(self, seed: int, number: int) -> Path:
        path = self.folder / f"content-{number}.raw"
        path.write_bytes(content(seed, number))
        return path

    def holds(self, seed: int) -> None:
        """The VM's disks have this content from now on."""
        names: tuple[str | int, ...] = ("os", 0)
        for number, name in enumerate(names):
            self.azure.write("web", name, self._file(seed, number))

    def transfer(self, name: str = "volumes") -> Transfer:
        environment = {**self.azure.environment(), "chunk_size_kib": 64}
        return Transfer(self.connection, environment, self.target.info, self.folder / name, self.worker(0))

    def worker(self, number: int) -> Any:
        """A worker of the pool."""
        while len(self._workers) <= number:
            name = f"{len(self._workers):08d}-aaaa-4bbb-8ccc-ddddeeeeffff"
            environment = self.azure.environment()
            made = self._call("create_minion", environment, POOL, "linux", self.shared, name)
            self._workers.append((made["minion_provider_properties"], made["connection_info"]))
        return self._workers[number]

    def _call(self, method: str, *arguments: Any) -> Any:
        made = getattr(AzureExportProvider(None), method)(None, self.connection, *arguments)
        return json.loads(json.dumps(made))

    def left(self) -> list[str]:
        """What there is in Azure but for the records of volumes."""
        return [
            each["id"] for each in self.azure.resources() if "coriolis-volume" not in (each.get("tags") or {})
        ]


ON_BOTH = pytest.mark.parametrize("site", ["ssh", "https"], indirect=True)


@pytest.fixture
def site(request: pytest.FixtureRequest, azure: Sandbox, tmp_path: Path) -> Iterator[Site]:
    """Over HTTPS where a test does not ask for another way."""
    kind = SshTarget if getattr(request, "param", "") == "ssh" else HttpsTarget
    target = kind(tmp_path / "receiver")
    try:
        with served(azure) as connection:
            yield Site(azure, connection, tmp_path, target)
    finally:
        azure.intercept = None
        target.close()


def right(transfer: Transfer, seed: int) -> bool:
    """Whether all volumes hold that content."""
    return [transfer.content(number) for number in range(2)] == [content(seed, number) for number in range(2)]


def at(
    site: Site, when: Callable[[Request], bool], act: Callable[[], object], *, after: bool = False
) -> list[str]:
    """Do `act` at the first request for which `when`; the paths of those at which it was done."""
    struck: list[str] = []

    def strike(request: Request, answer: Callable[[Request], Response]) -> Response:
        due = not struck and when(request)
        if due:
            struck.append(request.path)
        response = answer(request) if after or not due else None
        if due:
            act()
        return response or answer(request)

    site.azure.intercept = strike
    return struck


def detaching(request: Request) -> bool:
    """Everything is copied; the clones are about to be taken from the worker."""
    if request.method != "PATCH" or "/virtualMachines/" not in request.path:
        return False
    return bool(json.loads(request.body)["properties"].get("storageProfile", {}).get("dataDisks") == [])


def recording(request: Request) -> bool:
    """A change of what outlives runs: the record, or the mark, of a volume."""
    name = request.path.rpartition("/")[2]
    return (
        request.method in ("PUT", "DELETE")
        and name.startswith("coriolis-")
        and ("volume" in name or "doubt" in name)
    )


@ON_BOTH
@pytest.mark.parametrize("how", ["answer lost", "service killed", "task killed"])
def test_a_result_that_is_not_stored_is_not_believed(site: Site, how: str) -> None:
    """A, then B by a run whose answer the orchestrator never hears of, then A again: nothing seems changed."""
    transfer = site.transfer()
    transfer.execute()
    assert right(transfer, 1)
    site.holds(2)
    with transfer.start() as task:
        acts = {"service killed": task.kill_service, "task killed": lambda: task.signal(signal.SIGKILL)}
        if how in acts:
            assert at(site, detaching, acts[how]) is not None
        result = task.result()
        task.wait_for_end()
    site.azure.intercept = None
    assert ("returned" in result) == (how == "answer lost")
    assert right(transfer, 2)
    site.holds(1)
    transfer.execute()
    assert right(transfer, 1)
    transfer.execute()
    assert right(transfer, 1)
    assert site.left() == site.idle


@ON_BOTH
@pytest.mark.parametrize("after", [False, True], ids=["before Azure acts", "after"])
def test_a_cancel_in_the_last_bookkeeping_leaves_no_state_that_is_believed_and_wrong(
    site: Site, after: bool
) -> None:
    transfer = site.transfer()
    transfer.execute()
    site.holds(2)
    with transfer.start() as task:
        struck = at(
            site,
            lambda request: recording(request) and right(transfer, 2),
            lambda: task.signal(signal.SIGINT),
            after=after,
        )
        assert "returned" not in task.result()
    site.azure.intercept = None
    assert struck
    site.holds(1)
    transfer.execute()
    assert right(transfer, 1)
    assert site.left() == site.idle


@ON_BOTH
def test_a_run_whose_execution_was_given_up_ends_before_it_writes_beside_its_successor(site: Site) -> None:
    """A forced cancel sends no signal: the old process goes on, and the next one gets the pool's other worker."""
    transfer = site.transfer()
    transfer.execute()
    site.holds(2)
    with transfer.start(bandwidth_limit="8KiB/s") as orphan:
        eventually(lambda: transfer.content(1) != content(1, 1) or not orphan.lives())
        assert orphan.lives()
        site.holds(3)
        transfer.execute(site.worker(1))
        assert right(transfer, 3)
        orphan.wait_for_end()
        assert "another run has taken over its volume" in orphan.result().get("error", "")
    assert right(transfer, 3)
    site.holds(1)
    transfer.execute()
    assert right(transfer, 1)


@pytest.mark.parametrize("site", ["ssh"], indirect=True)
def test_a_run_that_was_stopped_over_its_lease_writes_nothing_when_it_wakes(site: Site) -> None:
    transfer = site.transfer()
    transfer.execute()
    site.holds(2)
    with transfer.start(bandwidth_limit="8KiB/s") as orphan:
        eventually(lambda: transfer.content(1) != content(1, 1) or not orphan.lives())
        orphan.signal(signal.SIGSTOP)
        site.holds(3)
        transfer.execute(site.worker(1))
        orphan.signal(signal.SIGCONT)
        orphan.wait_for_end()
        assert "another run has taken over its volume" in orphan.result().get("error", "")
    assert right(transfer, 3)


# A receiver whose medium stands still: what it has taken in, it writes when that goes on, whoever has hung up.
STALLING = f"""#!{sys.executable}
import os, time
whole = open({write_data.__file__!r}).read()
names = {{"__name__": "write_data"}}
exec(whole, names)
write, stalled = names["Devices"].write, os.path.exists("stalled")
def slow(*arguments):
    if stalled:
        open("taken", "w").close()
    while stalled and not os.path.exists("goes on"):
        time.sleep(0.01)
    write(*arguments)
    if stalled:
        open("written", "w").close()
names["Devices"].write = slow
os._exit(names["main"]())
"""


@pytest.mark.parametrize("site", ["ssh"], indirect=True)
def test_what_a_cancelled_run_has_sent_to_a_stalled_volume_is_outlasted(site: Site) -> None:
    """Nobody takes it back: it may still be written when the volume goes on, after the run has ended."""
    transfer = site.transfer()
    transfer.execute()
    assert isinstance(site.target, SshTarget)
    site.target.program("write_data", STALLING)
    home = site.target.home
    (home / "stalled").touch()
    site.holds(2)
    with transfer.start() as task:
        eventually(lambda: (home / "taken").exists() or not task.lives())
        task.signal(signal.SIGINT)
        assert "returned" not in task.result()
    (home / "stalled").unlink()
    site.holds(1)
    with transfer.start() as following:
        following.says("an earlier run that may still write")
        (home / "goes on").touch()
        eventually((home / "written").exists)
        transfer.store(following)
    assert right(transfer, 1)


@pytest.mark.parametrize("site", ["ssh"], indirect=True)
def test_without_a_state_a_run_is_refused_while_another_of_the_disk_lives(site: Site) -> None:
    """First executions: nothing tells whether both write to the same volume. A killed one is outlasted."""
    transfer = site.transfer()
    with transfer.start(bandwidth_limit="8KiB/s") as orphan:
        eventually(lambda: any(transfer.content(1)) or not orphan.lives())
        with transfer.start(site.worker(1)) as refused:
            assert "is writing to a volume of this disk" in refused.result().get("error", "")
        assert orphan.lives()
        orphan.signal(signal.SIGKILL)
        orphan.result()
    site.holds(2)
    transfer.execute(site.worker(1))
    assert right(transfer, 2)


def half_way(site: Site, transfer: Transfer) -> None:
    """An execution that is killed when it has written to both volumes."""
    with transfer.start() as task:
        struck = at(
            site,
            lambda request: detaching(request),
            lambda: task.signal(signal.SIGKILL),
        )
        task.result()
    site.azure.intercept = None
    assert struck


@ON_BOTH
def test_what_a_failed_first_execution_has_written_is_overwritten_with_zeros_after_an_update(
    site: Site,
) -> None:
    transfer = site.transfer()
    half_way(site, transfer)
    transfer.update(chunk_size_kib=128)
    site.holds(2)
    transfer.execute()
    assert right(transfer, 2)


@pytest.mark.parametrize("anew", ["rebuilt", "attached", "with a note of its own"])
def test_volumes_that_are_handed_over_anew_are_not_taken_for_blank_ones(site: Site, anew: str) -> None:
    """Their entries say `zeroed` each time, as some destinations' do, and lack what we have put into them."""
    transfer = site.transfer()
    notes = iter(range(9))

    def deploy(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        bare = [{key: entry[key] for key in ("disk_id", "volume_dev")} for entry in entries]
        note = {"attachment_id": next(notes)} if anew == "with a note of its own" else {}
        return [{**entry, "zeroed": True, **note} for entry in bare]

    transfer.deploy = deploy
    if anew == "with a note of its own":
        half_way(site, transfer)
    else:
        transfer.execute()
    site.holds(2)
    if anew == "attached":
        attached = site.transfer("another")
        attached.entries = deploy(transfer.entries)
        transfer = attached
    transfer.execute()
    assert right(transfer, 2)


def test_a_good_run_of_another_transfer_vouches_for_nothing(site: Site) -> None:
    """Two transfers whose entries say the same words; only the devices differ."""
    one, other = site.transfer("one"), site.transfer("other")
    half_way(site, one)
    other.execute()
    assert right(other, 1)
    site.holds(2)
    one.execute()
    assert right(one, 2)
    other.execute()
    assert right(other, 2)


@pytest.mark.parametrize("step", ["/snapshots/coriolis", "/disks/coriolis", "detaching"])
def test_what_a_killed_run_on_a_pools_worker_has_left_goes_with_the_next_one(site: Site, step: str) -> None:
    transfer = site.transfer()
    transfer.execute()
    site.holds(2)
    with transfer.start() as task:
        struck = at(
            site,
            detaching
            if step == "detaching"
            else lambda request: request.method == "PUT" and step in request.path,
            lambda: task.signal(signal.SIGKILL),
            after=step != "detaching",
        )
        task.result()
    site.azure.intercept = None
    assert struck
    assert site.left() != site.idle
    site.holds(3)
    transfer.execute()
    assert right(transfer, 3)
    assert site.left() == site.idle


def test_a_task_ends_by_itself_when_its_service_is_killed(site: Site) -> None:
    """And cleans up as when it is cancelled: nobody is there to take its result."""
    transfer = site.transfer()
    with transfer.start(bandwidth_limit="8KiB/s") as task:
        eventually(lambda: any(transfer.content(1)) or not task.lives())
        task.kill_service()
        task.wait_for_end()
    assert site.left() == site.idle


class Deployments:
    """The tasks of a transfer of the VM web that deploy its worker and delete it."""

    def __init__(self, azure: Sandbox, connection: Any) -> None:
        self.connection, self.environment = connection, azure.environment()
        self.before = azure.resources()
        self.info = self.call("get_replica_instance_info", self.environment, "web")

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the provider in this process."""
        return getattr(AzureExportProvider(None), method)(None, self.connection, *arguments)

    def task(self) -> Task:
        """A deployment in a process of its own."""
        return Task("deploy_replica_source_resources", self.connection, self.info, self.environment)

    def deploy(self) -> Any:
        """Deploy in a process of its own; return what the orchestrator keeps of it."""
        with self.task() as task:
            return task.result()["returned"]["migr_resources"]

    def delete(self, deployed: Any) -> None:
        self.call("delete_replica_source_resources", self.environment, deployed)


@pytest.fixture
def deployments(azure: Sandbox, image: Callable[..., Path]) -> Iterator[Deployments]:
    azure.add_vm("web", image("os", MIB))
    with served(azure) as connection:
        yield Deployments(azure, connection)


@pytest.mark.parametrize("stage", ["no security group yet", "worker"])
def test_a_killed_deployment_goes_with_the_next_one_of_the_vm_and_a_living_one_stays(
    azure: Sandbox, deployments: Deployments, stage: str
) -> None:
    """Nobody is told of it. A run that is deployed, and waits for its next task, is none."""
    waiting = deployments.deploy()
    with_it = azure.resources()
    with deployments.task() as killed:
        azure.intercept = (
            killed_at("/virtualMachines/", killed) if stage == "worker" else without_group(killed)
        )
        killed.result()
    azure.intercept = None
    assert len(azure.resources()) > len(with_it)
    deployments.delete(deployments.deploy())
    assert [each["id"] for each in azure.resources()] == [each["id"] for each in with_it]
    deployments.delete(waiting)
    assert azure.resources() == deployments.before


def test_what_a_killed_clean_up_has_left_goes_with_the_next_deployment_of_the_vm(
    azure: Sandbox, deployments: Deployments
) -> None:
    """The orchestrator does not ask for it a second time."""
    connection, environment = deployments.connection, deployments.environment
    deployed = deployments.deploy()
    with Task("delete_replica_source_resources", connection, environment, deployed) as killed:
        azure.intercept = killed_at("/virtualMachines/", killed, "DELETE")
        killed.result()
    azure.intercept = None
    assert len(azure.resources()) > len(deployments.before)
    deployments.delete(deployments.deploy())
    assert azure.resources() == deployments.before


def killed_at(type_: str, task: Task, method: str = "PUT") -> Callable[..., Response]:
    """Azure has made, or deleted, a resource of this type when the process that asked for it is killed."""

    def strike(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == method and f"{type_}coriolis" in request.path:
            task.signal(signal.SIGKILL)
        return response

    return strike


def without_group(task: Task) -> Callable[..., Response]:
    """The network exists, and the request for the security group never arrives."""
    others = threading.Event()

    def strike(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/networkSecurityGroups/coriolis" in request.path:
            assert others.wait(60)
            task.signal(signal.SIGKILL)
            return Response.of(503, {})
        response = answer(request)
        if request.method == "PUT" and "/virtualNetworks/coriolis" in request.path:
            others.set()
        return response

    return strike


@pytest.mark.parametrize("type_", ["/networkSecurityGroups/", "/publicIPAddresses/", "/virtualMachines/"])
@pytest.mark.parametrize("by", ["pool", "sweep"])
def test_a_pools_worker_that_was_killed_in_the_making_goes_with_the_pool_or_with_a_sweep(
    azure: Sandbox, source: Source, type_: str, by: str
) -> None:
    """The orchestrator knows nothing of it that it could delete. The pool's other worker stays."""
    environment = azure.environment()
    before = azure.resources()
    with served(azure) as connection:

        def here(method: str, *arguments: Any) -> Any:
            return getattr(AzureExportProvider(None), method)(None, connection, *arguments)

        shared = here("set_up_pool_shared_resources", environment, POOL)
        names = [f"{number:08d}-aaaa-4bbb-8ccc-ddddeeeeffff" for number in range(2)]
        whole = here("create_minion", environment, POOL, "linux", shared, names[0])
        with_it = azure.resources()
        with Task("create_minion", connection, environment, POOL, "linux", shared, names[1]) as killed:
            azure.intercept = killed_at(type_, killed)
            killed.result()
        azure.intercept = None
        assert len(azure.resources()) > len(with_it)
        if by == "sweep":
            assert swept(source, minutes=9) == []
            assert len(swept(source, minutes=11)) == 1
            assert azure.resources() == with_it
        here("delete_minion", whole["minion_provider_properties"])
        here("tear_down_pool_shared_resources", environment, shared)
    assert azure.resources() == before


def test_the_network_of_a_pool_that_was_killed_in_the_making_goes_with_a_sweep(
    azure: Sandbox, source: Source
) -> None:
    environment, before = azure.environment(), azure.resources()
    with served(azure) as connection:
        with Task("set_up_pool_shared_resources", connection, environment, POOL) as killed:
            azure.intercept = killed_at("/virtualNetworks/", killed)
            killed.result()
        azure.intercept = None
        assert len(azure.resources()) > len(before)
        assert len(swept(source, minutes=11)) == 1
        assert azure.resources() == before
        AzureExportProvider(None).set_up_pool_shared_resources(None, connection, environment, POOL)
        assert swept(source, minutes=10**6) == []


def swept(source: Source, minutes: float) -> list[str]:
    """The runs that a sweep so many minutes later has deleted."""
    found, stayed = cleanup.sweep(
        replace(source.context, clock=Later(minutes / 60)), cleanup.DEAD_AFTER, None
    )
    assert stayed == []
    return [leftover.run for leftover in found]
