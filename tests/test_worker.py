"""The worker is chosen from what the location sells today, and is let in by SSH only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import errors, ssh, worker
from coriolis_azure.clock import Clock
from coriolis_azure.events import Event, Notice, silent
from coriolis_azure.journal import Journal
from coriolis_azure.model import Machine, Run, Worker
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source


class Held(Clock):
    """A clock that waits for nothing."""

    def __init__(self, pace: float = 1) -> None:
        self.moment, self.pace = 0.0, pace

    def monotonic(self) -> float:
        return self.moment

    def sleep(self, seconds: float) -> None:
        self.moment += seconds * self.pace


@pytest.fixture
def machine(azure: Sandbox, source: Source, image: Callable[..., Path]) -> Machine:
    azure.add_vm("web", image("os"), [image(f"d{n}", 1 << 16) for n in range(4)], size="Standard_D4s_v5")
    return source.inspect("web")


def chosen(source: Source, machine: Machine) -> worker.Size:
    return worker.choose_size(source.azure, worker.needs(machine, machine.disks), source.environment, silent)


def test_the_first_size_that_holds_all_disks_is_chosen(source: Source, machine: Machine) -> None:
    """Five disks are more than a D2s_v5 takes."""
    assert chosen(source, machine).slots >= 5


@pytest.mark.parametrize("unfit", ["Standard_A1", "Standard_D2s_v6", "Standard_D2ps_v5", "standard_nothing"])
def test_retired_nvme_only_and_arm_sizes_are_replaced(
    connect: Callable[..., Source], machine: Machine, unfit: str
) -> None:
    source = connect(environment={"export_worker_size": unfit})
    assert chosen(source, machine).name.lower() != unfit.lower()


def test_the_size_that_was_asked_for_is_taken_whatever_its_case(
    connect: Callable[..., Source], machine: Machine
) -> None:
    source = connect(environment={"export_worker_size": "standard_d2S_V5"})
    assert chosen(source, machine) == worker.Size("Standard_D2s_v5", 4)


def test_only_ssh_is_let_in_and_only_from_the_addresses_asked_for(
    azure: Sandbox, connect: Callable[..., Source], image: Callable[..., Path]
) -> None:
    azure.add_vm("web", image("os"))
    allowed = ["127.0.0.0/8", "203.0.113.7"]
    source = connect(environment={"export_worker_allowed_addresses": allowed})
    run, _ = source.prepare("web")
    rules = source.azure.get(source.resources(run, Journal(run)).id("nsg", "nsg"))["properties"][
        "securityRules"
    ]
    told = {rule["name"]: rule["properties"] for rule in rules}
    assert told["ssh"]["sourceAddressPrefixes"] == allowed
    assert told["ssh"]["destinationPortRange"] == str(source.environment.export_worker_ssh_port)
    assert told["nothing-else"]["access"] == "Deny"
    assert source.finish(run) == []


@pytest.mark.parametrize("code", ["SkuNotAvailable", "OperationNotAllowed"])
def test_a_size_that_azure_has_no_room_for_gives_way_to_the_next(
    azure: Sandbox, source: Source, image: Callable[..., Path], told: list[Event], code: str
) -> None:
    azure.add_vm("web", image("os"))
    before = azure.resources()
    tried = []

    def sold_out(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/virtualMachines/coriolis" in request.path:
            tried.append(json.loads(request.body)["properties"]["hardwareProfile"]["vmSize"])
            if len(tried) < rooms:
                body = json.dumps({"error": {"code": code, "message": "Sold out."}}).encode()
                return Response(409, {"Content-Type": "application/json"}, body)
        return answer(request)

    azure.intercept = sold_out
    rooms = 3
    run, _ = source.prepare("web")
    assert len(set(tried)) == 3
    assert sum("no room" in event.text for event in told if isinstance(event, Notice)) == 2
    assert source.finish(run) == []
    tried.clear()
    rooms = 1000
    with pytest.raises((errors.QuotaExceeded, errors.Conflict)):
        source.prepare("web")
    assert len(set(tried)) == worker.SIZES_TRIED
    assert azure.resources() == before


def test_cloud_config_sets_host_key_port_and_keeps_hands_off_the_clones() -> None:
    private, public = ssh.host_key()
    head, _, body = worker.cloud_config(private, public, 2222).partition("\n")
    assert head == "#cloud-config"
    config = json.loads(body)
    assert config["ssh_keys"] == {"ed25519_private": private, "ed25519_public": public}
    files = {file["path"]: file["content"] for file in config["write_files"]}
    assert files["/etc/ssh/sshd_config.d/10-coriolis-azure.conf"] == "Port 2222\n"
    assert "global_filter" in files["/etc/lvm/lvmlocal.conf"]
    assert not any("sshd_config" in path for path in _paths(worker.cloud_config(private, public, 22)))


def _paths(config: str) -> list[str]:
    return [file["path"] for file in json.loads(config.partition("\n")[2])["write_files"]]


def test_another_host_key_is_refused_before_anything_is_sent(
    azure: Sandbox, source: Source, image: Callable[..., Path]
) -> None:
    azure.add_vm("web", image("os"))
    run, reader = source.prepare("web")
    impostor = Worker(**{**_fields(reader), "host_key": ssh.host_key()[1]})
    with ssh.connect(reader, Clock(), silent), pytest.raises(errors.HostKeyChanged):
        ssh.connect(impostor, Held(pace=100), silent)
    stranger = Worker(**{**_fields(reader), "private_key": ssh.client_key()[0]})
    with pytest.raises(errors.Unreachable, match="refuses our key"):
        ssh.connect(stranger, Held(pace=100), silent)
    assert source.finish(run) == []
    with pytest.raises(errors.Unreachable):
        ssh.connect(reader, Held(pace=100), silent)


def _fields(reader: Worker) -> dict[str, Any]:
    return {name: getattr(reader, name) for name in Worker.__dataclass_fields__}


def test_no_secret_is_in_a_workers_repr() -> None:
    private, _ = ssh.client_key()
    reader = Worker("vm", "a", 22, "u", "h", 4, private)
    assert "PRIVATE" not in repr(reader)


def test_a_run_goes_to_json_and_back() -> None:
    run = Run("1", "s", "g", "l", "", "web")
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run


def test_a_machine_goes_to_json_and_back(machine: Machine) -> None:
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine
