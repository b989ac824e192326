"""Several worker hosts: no task needs the host of another, and what a host has to itself may vanish at any moment."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.azure import names
from coriolis_azure.sandbox import Sandbox
from harness.battles import served
from harness.constants import MIB
from harness.hosts import Host, Transfer
from harness.waiting import eventually, together
from harness.writer_targets import HttpsTarget

pytestmark = pytest.mark.slow

SNAPSHOTS = {"replica_export_mechanism": "snapshots", "keep_baseline": True}
MECHANISMS: list[dict[str, Any]] = [{}, *[SNAPSHOTS] * 7]


class Fleet:
    """Eight transfers that do the same step at once, each on another host than its step before."""

    def __init__(self, azure: Sandbox, connection: Any, folder: Path, target: HttpsTarget) -> None:
        self.azure, self.folder, self.target = azure, folder, target
        self.hosts = [Host(folder / "one"), Host(folder / "two")]
        self.steps = 0
        self.transfers = []
        for number, mechanism in enumerate(MECHANISMS):
            disk = folder / "content.raw"
            disk.write_bytes(random.Random(number).randbytes(MIB // 2) + bytes(MIB // 2))
            azure.add_vm(f"vm-{number}", disk)
            transfer = Transfer(azure, connection, f"vm-{number}", target.info, **mechanism)
            transfer.make_volumes(folder / transfer.vm)
            self.transfers.append(transfer)
        self.before = azure.resources()

    def host(self, number: int) -> Host:
        """Where the transfer of this number has its next task."""
        return self.hosts[(number + self.steps) % len(self.hosts)]

    def step(self, work: Callable[[Transfer, Host], object]) -> list[str]:
        """One task of each transfer; then all hosts lose what they have. What that was."""
        together(
            [partial(work, transfer, self.host(number)) for number, transfer in enumerate(self.transfers)]
        )
        self.steps += 1
        return [path for host in self.hosts for path in host.lose_all()]

    def change(self) -> None:
        """Something is written to every disk."""
        for number, transfer in enumerate(self.transfers):
            disk = self.azure.disk(transfer.of("entries")[0]["disk_id"])
            disk.write(number << 16, random.Random(-number).randbytes(256 << 10))

    def wrong(self) -> list[str]:
        """The volumes that are not their disks."""
        return [each for transfer in self.transfers for each in transfer.wrong()]

    def left(self) -> list[str]:
        """What there is in Azure but for records of volumes and the baselines that the states name."""
        known = {each["id"] for each in self.before}
        states = [transfer.of("entries")[0].get("replica_state", {}) for transfer in self.transfers]
        named = {state["baseline"]["id"].lower() for state in states if "baseline" in state}
        return [
            each["id"]
            for each in self.azure.resources()
            if each["id"] not in known
            and each["id"].lower() not in named
            and names.VOLUME_TAG not in (each.get("tags") or {})
        ]


@pytest.fixture
def fleet(azure: Sandbox, tmp_path: Path) -> Iterator[Fleet]:
    with ExitStack() as ending:
        target = HttpsTarget(tmp_path / "receiver")
        ending.callback(target.close)
        yield Fleet(azure, ending.enter_context(served(azure)), tmp_path, target)


def test_tasks_of_eight_transfers_alternate_between_two_hosts_that_keep_nothing(fleet: Fleet) -> None:
    """A first copying, in which a host dies; then an execution whose copying is on the other host."""
    one, two = fleet.hosts
    for transfer in fleet.transfers:
        transfer.deploy(None)
    fleet.step(partial(copied_or_killed, killed_on=one))
    for transfer in fleet.transfers:
        transfer.undeploy(None)
    assert len(fleet.wrong()) == 4
    fleet.change()
    fleet.target.holder.clear()  # the orchestrator starts its writers anew for each execution
    fleet.steps = 0
    put_down = [fleet.step(task) for task in (Transfer.deploy, Transfer.copy, Transfer.undeploy)]
    assert put_down == [[], [], []]
    assert fleet.wrong() == fleet.left() == []
    assert one.tasks == two.tasks
    for transfer in fleet.transfers:
        transfer.give_up()
    assert fleet.left() == []
    # Nobody knows whose volumes the dead tasks have written to.
    assert len(fleet.azure.resources()) - len(fleet.before) == 4


def copied_or_killed(transfer: Transfer, host: Host, killed_on: Host) -> None:
    """The copying; one of the hosts dies when it has written something, with all that it has."""
    if host is not killed_on:
        transfer.copy(host)
        return
    (volume,) = transfer.volumes()
    blank = volume.stat().st_mtime_ns
    with transfer.copying(host, bandwidth_limit="16KiB/s") as task:
        eventually(lambda: volume.stat().st_mtime_ns != blank or task.returncode is not None)
        task.kill()
        assert task.wait(600) == -signal.SIGKILL
