"""The worker is chosen from what the location sells today, and is let in by SSH only."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import paramiko
import pytest
from paramiko.buffered_pipe import PipeTimeout
from paramiko.common import AUTH_SUCCESSFUL, OPEN_SUCCEEDED
from paramiko.ssh_exception import SSHException

from coriolis_azure import errors
from coriolis_azure.azure import names
from coriolis_azure.clock import Clock
from coriolis_azure.events import Event, Notice, silent
from coriolis_azure.model import Machine, Run, Worker
from coriolis_azure.readers import keys, ssh
from coriolis_azure.readers.paramiko_internals import Arrived
from coriolis_azure.run.journal import Journal
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from coriolis_azure.worker import images, launch, pool, sizes
from harness.clocks import Held


@pytest.fixture
def machine(azure: Sandbox, source: Source, image: Callable[..., Path]) -> Machine:
    azure.add_vm(
        "web", image("os"), [image(f"d{n}", 1 << 16) for n in range(4)], VmSpec(size="Standard_D4s_v5")
    )
    return source.inspect("web")


def needs(source: Source, machine: Machine) -> sizes.Needs:
    return sizes.needs(machine, machine.disks, source.environment)


def chosen(source: Source, machine: Machine) -> sizes.Size:
    return sizes.choose_size(source.azure, needs(source, machine), source.environment, silent)


def test_the_first_size_that_holds_all_disks_is_chosen(source: Source, machine: Machine) -> None:
    """Five disks are more than a D2s_v5 takes."""
    assert chosen(source, machine).slots >= 5


def test_the_page_on_the_orchestrator_says_which_size_a_worker_has(source: Source) -> None:
    page = " ".join(
        (Path(__file__).parent.parent / "docs/reference/coriolis.md").read_text(encoding="utf-8").split()
    )
    numbers = dict(
        enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    )

    def size(disks: int) -> sizes.Size:
        return sizes.choose_size(source.azure, sizes.Needs(disks), source.environment, silent)

    few, some = size(1), size(5)
    assert f"{few.vcpus:.0f} vCPUs for a VM with up to {numbers[few.slots]} slow disks" in page
    assert f"or up to {numbers[some.slots]} where `{some.name}` is offered, and more for more" in page
    assert some.vcpus == few.vcpus < size(some.slots + 1).vcpus
    assert f"others are tried, up to {numbers[launch.TRIES]} in all" in page
    assert f"it is the first that holds {numbers[pool._NEEDS.disks]} disks" in page


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
    assert chosen(source, machine) == sizes.Size("Standard_D2s_v5", 4)


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
    let_in = [rule for rule in told.values() if rule["access"] == "Allow" and rule["direction"] == "Inbound"]
    assert [rule["sourceAddressPrefixes"] for rule in let_in] == [allowed] * 2  # SSH, and the ports for data
    assert max(rule["priority"] for rule in let_in) < told["nothing-else"]["priority"]
    assert source.finish(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("code", ["SkuNotAvailable", "OperationNotAllowed", "InvalidParameter"])
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
                body = json.dumps(
                    {"error": {"code": code, "message": "Sold out.", "target": "vmSize"}}
                ).encode()
                return Response(409, {"Content-Type": "application/json"}, body)
        return answer(request)

    azure.intercept = sold_out
    rooms = 3
    run, _ = source.prepare("web")
    assert len(set(tried)) == 3
    assert sum("no capacity" in event.text for event in told if isinstance(event, Notice)) == 2
    assert source.finish(run) == []
    tried.clear()
    rooms = 1000
    with pytest.raises(errors.AzureError, match=code):
        source.prepare("web")
    assert len(set(tried)) == launch.TRIES
    assert azure.resources() == before


@pytest.mark.slow
def test_each_try_has_an_os_disk_of_its_own(
    azure: Sandbox, source: Source, image: Callable[..., Path], told: list[Event]
) -> None:
    """The disk of a VM that failed for want of room may stay for a while: its name is taken."""
    azure.add_vm("web", image("os"))
    before = azure.resources()
    disks = []

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/virtualMachines/coriolis" in request.path:
            disks.append(json.loads(request.body)["properties"]["storageProfile"]["osDisk"]["name"])
        return answer(request)

    azure.intercept = look
    azure.faults.add("no-allocation", path="/virtualMachines/coriolis", times=2)
    run, _ = source.prepare("web")
    assert len(disks) == len(set(disks)) == 3
    assert sum("no capacity" in event.text for event in told if isinstance(event, Notice)) == 2
    made = launch.ids(source.resources(run, Journal(run)))
    assert {names.name_of(id) for id in made} >= set(disks)
    assert source.finish(run) == []
    assert azure.resources() == before


@pytest.mark.slow
def test_a_worker_is_of_a_size_that_its_zone_has(
    azure: Sandbox, connect: Callable[..., Source], image: Callable[..., Path], told: list[Event]
) -> None:
    """The SKU list tells the zones in `locationInfo` alone: nothing there is restricted."""
    azure.add_vm("web", image("os"), spec=VmSpec(zone="3"))
    tried = []

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/virtualMachines/coriolis" in request.path:
            tried.append(json.loads(request.body)["properties"]["hardwareProfile"]["vmSize"])
        return answer(request)

    azure.intercept = look
    azure.faults.add("no-capacity", path="/virtualMachines/coriolis", times=1)
    source = connect(environment={"export_worker_size": "Standard_D2s_v4"})
    run, _ = source.prepare("web")
    assert tried == ["Standard_D2s_v5", "Standard_B2ms"]
    notice = "export_worker_size Standard_D2s_v4 cannot be used in westeurope"
    assert any(notice in event.text for event in told if isinstance(event, Notice))
    assert source.finish(run) == []


@pytest.mark.slow
def test_sizes_outside_our_list_are_tried_and_all_that_was_tried_is_told(
    azure: Sandbox, source: Source, image: Callable[..., Path]
) -> None:
    azure.add_vm("web", image("os"), spec=VmSpec(zone="3"))
    azure.faults.add("no-capacity", path="/virtualMachines/coriolis", times=0)
    with pytest.raises(errors.QuotaExceeded, match="tried Standard_D2s_v5, Standard_B2ms, Standard_E2s_v5"):
        source.prepare("web")


def test_a_size_for_confidential_vms_is_no_worker(azure: Sandbox, source: Source) -> None:
    """Azure makes no other VM of such a size."""
    sku = next(sku for sku in source.azure.sizes("westeurope") if sku["name"] == "Standard_D2s_v5")
    assert sizes._usable(sku, "westeurope", sizes.Needs()) is not None
    sku["capabilities"].append({"name": "ConfidentialComputingType", "value": "SNP"})
    assert sizes._usable(sku, "westeurope", sizes.Needs()) is None


def test_a_size_without_encryption_at_host_is_none_where_that_is_demanded(source: Source) -> None:
    sku = next(sku for sku in source.azure.sizes("westeurope") if sku["name"] == "Standard_D2s_v5")
    demanding = sizes.Needs(host_encryption=True)
    assert sizes._usable(sku, "westeurope", demanding) is not None
    told = [each for each in sku["capabilities"] if each["name"] != "EncryptionAtHostSupported"]
    assert sizes._usable({**sku, "capabilities": told}, "westeurope", demanding) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("disks", "rate", "size"),
    [
        (1, 0, "Standard_D2s_v5"),
        (1, 85_000_000, "Standard_D2s_v5"),
        (1, 86_000_000, "Standard_DS2_v2"),
        (5, 100_000_000, "Standard_D4s_v5"),
        (1, 200_000_000, "Standard_D8s_v5"),
        (1, 5_000_000_000, "Standard_D8s_v5"),
        (40, 0, "Standard_D8s_v5"),
    ],
)
def test_the_size_holds_all_disks_and_reads_as_fast_as_they_give(
    source: Source, disks: int, rate: int, size: str
) -> None:
    """Else it is the fastest that holds all, else the one that holds most."""
    needed = sizes.Needs(disks, rate=rate)
    assert sizes.choose_size(source.azure, needed, source.environment, silent).name == size


def test_what_disks_give_that_are_read_at_a_time_is_added_up(source: Source, machine: Machine) -> None:
    assert needs(source, machine).rate == 4 * 60_000_000


@pytest.mark.parametrize(
    ("rates", "count"),
    [
        ([], 1),
        ([60_000_000], 1),
        ([0, 0, 0], 2),  # not known
        ([60_000_000] * 3, 3),
        ([60_000_000] * 9, 4),
        ([200_000_000] * 9, 3),
        ([300_000_000] * 9, 2),
        ([900_000_000] * 9, 2),
        ([25_000_000] * 3 + [500_000_000], 4),
    ],
)
def test_as_many_disks_are_read_at_a_time_as_keep_the_worker_busy(rates: list[int], count: int) -> None:
    assert sizes.at_a_time(rates, 1 << 20) == count
    assert sizes.at_a_time(rates, 2 << 20) == 1


@pytest.mark.slow
def test_a_quota_that_is_too_small_makes_way_for_fewer_vcpus(
    azure: Sandbox, connect: Callable[..., Source], image: Callable[..., Path], told: list[Event]
) -> None:
    azure.add_vm("web", image("os"))
    source = connect(environment={"export_worker_size": "Standard_D4s_v5"})
    azure.faults.add("quota", path="/virtualMachines/coriolis")
    run, _ = source.prepare("web")
    made = source.azure.resources("vm", "sandbox")
    assert {vm["properties"]["hardwareProfile"]["vmSize"] for vm in made if "coriolis" in vm["name"]} == {
        "Standard_D2as_v5"  # of another family too: quotas are also of families
    }
    assert source.finish(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("code", ["PlatformImageNotFound", "VMMarketplaceInvalidInput"])
def test_an_image_that_azure_does_not_take_gives_way_to_the_next(
    azure: Sandbox, source: Source, image: Callable[..., Path], told: list[Event], code: str
) -> None:
    azure.add_vm("web", image("os"))
    azure.faults.add("refuse", method="PUT", path="/virtualMachines/coriolis", status=404, code=code)
    run, reader = source.prepare("web")
    assert reader is not None
    assert source.azure.get(reader.vm)["properties"]["storageProfile"]["imageReference"]["offer"] != (
        images.IMAGES[0].offer
    )
    assert any(code in event.text for event in told if isinstance(event, Notice))
    assert source.finish(run) == []


def test_an_image_with_terms_of_its_own_is_replaced(
    azure: Sandbox, connect: Callable[..., Source], told: list[Event]
) -> None:
    """Only a person can accept them; without the plan in the request Azure would refuse the VM."""
    asked = {"publisher": "Debian", "offer": "debian-12", "sku": "12-gen2"}
    source = connect(environment={"export_worker_image": asked})

    def with_plan(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if "/offers/debian-12/" in request.path and not request.path.endswith("/versions"):
            document = json.loads(response.body)
            document["properties"]["plan"] = {"publisher": "p", "name": "n", "product": "o"}
            return Response.of(200, document)
        return response

    azure.intercept = with_plan
    assert images.choose_image(source.azure, source.environment, told.append) == images.IMAGES[0]
    assert any("has terms to accept" in event.text for event in told if isinstance(event, Notice))


@pytest.mark.slow
def test_another_host_key_is_refused_before_anything_is_sent(
    azure: Sandbox, source: Source, image: Callable[..., Path]
) -> None:
    azure.add_vm("web", image("os"))
    run, reader = source.prepare("web")
    assert reader is not None
    impostor = Worker(**{**_fields(reader), "host_key": keys.host_key()[1]})
    with ssh.connect(reader, Clock(), silent), pytest.raises(errors.HostKeyChanged):
        ssh.connect(impostor, Held(pace=100), silent)
    stranger = Worker(**{**_fields(reader), "private_key": keys.client_key()[0]})
    with pytest.raises(errors.Unreachable, match="refuses our key"):
        ssh.connect(stranger, Held(pace=100), silent)
    assert source.finish(run) == []
    with pytest.raises(errors.Unreachable):
        ssh.connect(reader, Held(pace=100), silent)


@pytest.mark.slow
def test_a_worker_that_says_nothing_for_too_long_counts_as_lost(
    azure: Sandbox, source: Source, image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "SILENCE_SECONDS", 0.2)
    azure.add_vm("web", image("os"))
    run, reader = source.prepare("web")
    assert reader is not None
    with (
        ssh.connect(reader, Clock(), silent) as connection,
        connection._run("sleep 60") as stream,
        pytest.raises(errors.ConnectionLost, match="it was silent"),
    ):
        stream.read(1)
    assert source.finish(run) == []


@pytest.mark.parametrize(
    ("first", "match"),
    [
        (b"SSH-2.0-x\r\n" + (0x0FFFFFFC).to_bytes(4, "big"), "announced a packet of"),
        (b"", "began with a text of more than"),
    ],
    ids=["a packet", "a greeting"],
)
def test_who_answers_with_too_much_is_hung_up_on(first: bytes, match: str) -> None:
    """Whoever is at the worker's address can do that: it is before the host key is compared."""

    def send() -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            connection.sendall(first)
            while True:
                sent.append(connection.send(b"A" * 65536))

    sent: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = threading.Thread(target=send)
        sender.start()
        worker = Worker("vm", "127.0.0.1", server.getsockname()[1], "u", keys.host_key()[1], 1, "")
        with pytest.raises(errors.Unreachable, match=match):
            ssh.connect(worker, Clock(), silent, -1)
        sender.join()
    assert sum(sent) < 32 << 20  # what the sockets' buffers take


class Dripping(paramiko.ServerInterface):
    """Lets everybody in, and answers a byte at a time, for ever."""

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        def drip() -> None:
            with suppress(OSError, EOFError):  # the latter if the connection ends meanwhile
                while True:
                    channel.sendall(b"a")
                    channel.status_event.wait(0.1)

        threading.Thread(target=drip).start()
        return True


def test_a_worker_that_answers_for_ever_is_not_listened_to_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "_BOOT_ID_SECONDS", 0.5)
    private, public = keys.host_key()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        worker = Worker("vm", "127.0.0.1", listener.getsockname()[1], "u", public, 1, keys.client_key()[0])

        def serve() -> None:
            server = paramiko.Transport(listener.accept()[0])
            server.add_server_key(paramiko.Ed25519Key.from_private_key(io.StringIO(private)))
            server.start_server(server=Dripping())

        serving = threading.Thread(target=serve)
        serving.start()
        with (
            ssh.connect(worker, Clock(), silent, 0) as connection,
            pytest.raises(
                errors.ConnectionLost, match=r"within 0\.5 seconds: its disk may be stuck"
            ) as raised,
        ):
            connection.boot_id()
        serving.join()
    assert "network" not in raised.value.remedy


def test_what_comes_for_a_channel_is_taken_in_order_and_in_pieces_no_larger_than_asked_for() -> None:
    arrived = Arrived(3000007)
    for packet in (b"abc", b"", b"defg", b""):
        arrived.feed(packet)
    assert (arrived.read_ready(), len(arrived)) == (True, 7)
    assert [bytes(arrived.read(size)) for size in (2, 9)] == [b"ab", b"cdefg"]
    with pytest.raises(PipeTimeout):
        arrived.read(9, 0.01)
    for number in range(100):  # of blocks that are used again
        arrived.feed(bytes([number]) * 30000)
        assert bytes(arrived.read(30000)) == bytes([number]) * 30000
    packets = [bytes([number]) * 30000 for number in range(100)]
    for packet in packets:
        arrived.feed(packet)
    arrived.feed(b"lastone")
    with pytest.raises(SSHException, match="than its window allows"):
        arrived.feed(b"1")
    arrived.close()
    found = bytearray()
    while part := arrived.read(1 << 20):
        found += part
    assert found == b"".join(packets) + b"lastone"
    assert (arrived.read_ready(), len(arrived), arrived.read(9)) == (False, 0, b"")


def _fields(reader: Worker) -> dict[str, Any]:
    return {name: getattr(reader, name) for name in Worker.__dataclass_fields__}


def test_no_secret_is_in_a_workers_repr() -> None:
    private, _ = keys.client_key()
    reader = Worker("vm", "a", 22, "u", "h", 4, private)
    assert "PRIVATE" not in repr(reader)


def test_a_run_goes_to_json_and_back() -> None:
    run = Run("1", "s", "g", "l", "", "web")
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run


def test_a_machine_goes_to_json_and_back(machine: Machine) -> None:
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine
