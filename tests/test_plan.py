"""What a run would make, read and move, how long it takes and what it costs: compared with runs that do it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coriolis_azure import errors
from coriolis_azure.checks.plan import Plan, Range
from coriolis_azure.checks.prices import Prices
from coriolis_azure.events import Event, Step
from coriolis_azure.sandbox import Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.command_line import run
from harness.constants import MIB

Image = Callable[..., Path]
Connect = Callable[..., Source]
PRICES = {
    "date": "2026-02-01",
    "currency": "EUR",
    "source": "our contract",
    "vcpu_hour": 0.5,
    "address_hour": 0.25,
    "disk_gib_month": {"Standard_LRS": 1, "StandardSSD_LRS": 2, "Premium_LRS": 4},
    "snapshot_gib_month": 3,
    "egress_gib": 0.125,
}


@pytest.fixture
def vm(azure: Sandbox, image: Image) -> str:
    azure.add_vm("web", image("os", seed=1), [image("data", 2 * MIB, seed=2)])
    return "web"


def within(figure: float, estimate: Range) -> bool:
    return estimate.least <= figure <= estimate.most


def price_file(folder: Path, **changes: object) -> Path:
    path = folder / "prices.json"
    path.write_text(json.dumps({**PRICES, **changes}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="worker"),
        pytest.param(
            {"export_network": "sandbox-vnet/default", "export_worker_use_fip": False},
            id="worker in a network",
        ),
        pytest.param({"replica_export_mechanism": "snapshots"}, id="snapshots"),
        pytest.param({"replica_export_mechanism": "auto"}, id="auto"),
        pytest.param({"replica_export_mechanism": "hybrid", "consistency": "crash"}, id="restore point"),
    ],
)
def test_a_run_makes_reads_and_moves_what_was_planned(
    azure: Sandbox, connect: Connect, vm: str, tmp_path: Path, environment: dict[str, object]
) -> None:
    source = connect(environment=environment)
    before, asked = azure.resources(), len(azure.requests)
    planned = source.plan(vm, tmp_path / "replica")
    assert azure.resources() == before
    assert {method for method, path, *_ in list(azure.requests)[asked:] if "/oauth2/" not in path} == {"GET"}
    asked = len(azure.requests)
    done = source.replicate(vm, tmp_path / "replica")
    made = {
        re.sub("coriolis-[0-9a-z]+-", "coriolis-RUN-", path.rpartition("/")[2])
        for method, path, *_ in list(azure.requests)[asked:]
        if method == "PUT" and re.search(r"/(coriolis-[0-9a-z]+-[\w-]+)$", path)
    }
    implied = {"coriolis-RUN-worker-os-1"} if planned.worker else set()
    assert set(planned.creates) == made | implied
    assert planned.first
    assert [disk.mechanism for disk in planned.disks] == [disk.mechanism for disk in done.disks]
    for estimate, real in zip(planned.disks, done.disks, strict=True):
        assert within(real.read_bytes, estimate.read_bytes)
        assert within(real.sent_bytes, estimate.moved_bytes)
    assert planned.cost.most > 0
    assert planned.monthly == Range(0, 0)


@pytest.mark.slow
def test_what_the_destination_holds_is_reckoned_with(
    azure: Sandbox, connect: Connect, vm: str, tmp_path: Path
) -> None:
    source = connect(environment={"replica_export_mechanism": "snapshots", "keep_baseline": True})
    assert source.plan(vm).first
    first = source.plan(vm, tmp_path / "replica")
    assert first.first
    source.replicate(vm, tmp_path / "replica")
    unproved = source.plan(vm, tmp_path / "replica")
    assert not unproved.first
    assert unproved.disks[0].read_bytes == Range(2 * MIB, 3 * MIB)  # a third of it is zeros
    assert unproved.monthly.least > 0
    source.replicate(vm, tmp_path / "replica")
    proved = source.plan(vm, tmp_path / "replica")
    assert proved.disks[0].read_bytes == Range(0, 3 * MIB)
    assert proved.seconds.least < unproved.seconds.least


def test_the_allocated_pages_of_a_vhd_are_known(azure: Sandbox, connect: Connect, image: Image) -> None:
    sparse = image("os", 4 * MIB, 1)
    os.truncate(sparse, 6 * MIB)
    azure.add_vm("old", sparse, (), VmSpec(unmanaged="oldstorage"))
    source = connect(environment={"replica_export_mechanism": "snapshots"})
    planned = source.plan("old")
    (disk,) = planned.disks
    assert disk.read_bytes == Range(4 * MIB, 4 * MIB)
    assert planned.creates == (f"a snapshot of {source.inspect('old').disks[0].id}",)


def test_each_part_of_the_cost_comes_from_the_prices(
    azure: Sandbox, connect: Connect, vm: str, tmp_path: Path
) -> None:
    source = connect()
    prices = Prices.read(price_file(tmp_path))
    planned = source.plan(vm, prices=prices, line=1 << 20)
    assert set(planned.costs) == {"worker", "public address", "disks", "snapshots", "data out of Azure"}
    assert planned.currency == "EUR"
    assert planned.prices == "2026-02-01: our contract"
    hours = planned.seconds.most / 3600
    assert planned.costs["public address"].most == pytest.approx(hours * 0.25)
    assert planned.costs["worker"].most == pytest.approx(hours * 0.5 * 4)
    assert planned.costs["data out of Azure"].most == pytest.approx(5 / 1024 * 0.125)
    assert planned.costs["snapshots"].most == pytest.approx(5 / 1024 * 3 / 30)
    of_size = replace(prices, size_hour={planned.worker.upper(): 7.0})
    assert source.plan(vm, prices=of_size, line=1 << 20).costs["worker"].most == pytest.approx(hours * 7)


def test_a_slower_line_takes_longer_and_a_limit_counts(connect: Connect, vm: str) -> None:
    def planned(line: int, **environment: object) -> Plan:
        return connect(environment=environment).plan(vm, line=line)

    assert planned(1000).seconds.most > planned(100_000).seconds.most
    limited = planned(0, bandwidth_limit="1KiB/s")
    assert limited.seconds.most == pytest.approx(420 + 2 * 15 + 5 * 1024)
    assert planned(100_000).outage_seconds.most < planned(1000).outage_seconds.most


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vcpu_hours": 1}, "vcpu_hour"),
        ({"egress_gib": "0.1"}, "egress_gib"),
        ({"egress_gib": -1}, "egress_gib"),
        ({"disk_gib_month": {"Premium_LRS": 1}}, "Standard_LRS"),
        ({"currency": "euros"}, "currency"),
        ({"date": "yesterday"}, "date"),
    ],
)
def test_a_price_file_with_a_typo_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(errors.InvalidInput, match=words):
        Prices.read(price_file(tmp_path, **changes))


def test_a_plan_says_what_is_known_of_the_destination_and_names_the_vm(
    connect: Connect, vm: str, told: list[Event], tmp_path: Path
) -> None:
    source = connect()
    assert "--to" in " ".join(source.plan(vm).assumed)
    for to in (tmp_path / "to", "blob://sandboxstorage/missing/web"):
        empty = " ".join(source.plan(vm, to).assumed)
        assert "--to" not in empty
        assert "no replica at the destination yet" in empty
    source.plan(source.inspect(vm).id)
    assert {step.target for step in told if isinstance(step, Step)} == {vm}


@pytest.mark.slow
def test_the_replica_of_another_vm_is_refused(
    azure: Sandbox, connect: Connect, vm: str, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("db", image("db", seed=3))
    source = connect()
    source.replicate(vm, tmp_path / "replica")
    with pytest.raises(errors.InvalidInput, match="another VM"):
        source.plan("db", tmp_path / "replica")


@pytest.mark.slow
def test_the_command_shows_each_vm_all_together_and_what_failed(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    run("sandbox", "add-vm", served, "db", "--os-disk", served.parent / "os.raw")
    shown = run("plan", *settings, "--all").stdout
    assert "db (a first run; estimates)" in shown
    assert "all, one after another" in shown
    assert "coriolis-RUN-worker" in shown
    assert "estimate by prices of" in shown
    told = json.loads(
        run("plan", *settings, "web", "--json", "--prices", price_file(tmp_path), "--line", "50MiB/s").stdout
    )
    (one,) = told["vms"]
    assert one["estimate"] is True
    assert one["currency"] == "EUR"
    assert one["cost"]["least"] <= one["cost"]["most"]
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "web").write_text("a file, and no folder")
    partly = run("plan", *settings, "--all", "--to", tmp_path / "to", "--json", check=2)
    assert [vm["vm"] for vm in json.loads(partly.stdout)["vms"]] == ["db", "web"]
    assert "web cannot be used as a destination" in partly.stderr
    assert "which VMs are meant" in run("plan", *settings, check=2).stderr
    assert "no VM nobody" in run("plan", *settings, "nobody", check=3).stderr
