"""The whole story through the Python API: real SDKs, real SSH, real files; bytes compared."""

from __future__ import annotations

import json
import random
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from coriolis_azure import errors
from coriolis_azure.azure import names
from coriolis_azure.events import Event, Notice, silent
from coriolis_azure.replica import places
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.clocks import Held
from harness.constants import DEADLINE, GROUP, MIB

Image = Callable[..., Path]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def power_state(source: Source, vm: str) -> str:
    return source.inspect(vm).power_state


def test_two_runs_move_everything_then_only_what_changed_and_leave_nothing(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    os_disk, data = image("os", 5 * MIB + 512, seed=1), image("data", 3 * MIB, seed=2)
    azure.add_vm("web", os_disk, [data])
    before, to = azure.resources(), tmp_path / "images"

    first = source.replicate("web", to)
    assert (to / "os.raw").read_bytes() == os_disk.read_bytes()
    assert (to / "data-0.raw").read_bytes() == data.read_bytes()
    assert [disk.name for disk in first.disks] == ["os", "data-0"]
    assert all(disk.full and disk.verified and disk.zero_bytes > 0 for disk in first.disks)

    overwrite(data, 2 * MIB + 4096, random.Random(3).randbytes(4096))
    azure.write("web", 0, data)
    second = source.replicate("web", to)
    assert (to / "data-0.raw").read_bytes() == data.read_bytes()
    assert [disk.sent_bytes for disk in second.disks] == [0, 4096]
    assert not any(disk.full for disk in second.disks)
    for disk in (*first.disks, *second.disks):
        assert disk.sent_bytes + disk.zero_bytes + disk.skipped_bytes == disk.read_bytes == disk.size_bytes

    assert azure.resources() == before
    assert first.left_behind == second.left_behind == ()
    assert power_state(source, "web") == "running"


@pytest.mark.slow
def test_snapshots_are_taken_while_the_worker_boots_and_last_is_deleted_what_tells_of_the_run(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    taken = threading.Event()

    def booting(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == "PUT" and "/snapshots/coriolis" in request.path:
            taken.set()
        if request.method == "PUT" and "/virtualMachines/coriolis" in request.path:
            assert taken.wait(DEADLINE), "the snapshot waits for the worker"
        return response

    azure.intercept = booting
    source.replicate("web", tmp_path / "images")
    deleted = [path.split("/")[-2] for method, path in azure.requests if method == "DELETE"]
    assert set(deleted[:2]) == {"virtualMachines", "snapshots"}
    assert deleted[2] == "networkInterfaces"
    assert sorted(deleted[3:]) == ["networkSecurityGroups", "publicIPAddresses", "virtualNetworks"]


@pytest.mark.slow
def test_grown_new_and_removed_disks_are_ordinary(
    azure: Sandbox, source: Source, image: Image, told: list[Event], tmp_path: Path
) -> None:
    os_disk, old, to = image("os", seed=1), image("old", seed=2), tmp_path / "images"
    azure.add_vm("web", os_disk, [old])
    source.replicate("web", to)

    vm = source.azure.get(source.inspect("web").id)
    new = image("new", 2 * MIB, seed=4)
    azure.add_vm("other", image("x", MIB, seed=9), [new])
    spare = source.inspect("other").disks[1].id
    source.azure.patch_vm(source.inspect("other").id, {"properties": {"storageProfile": {"dataDisks": []}}})
    attach = {"lun": 7, "createOption": "Attach", "managedDisk": {"id": spare}}
    source.azure.patch_vm(vm["id"], {"properties": {"storageProfile": {"dataDisks": [attach]}}})
    grown = tmp_path / "grown.raw"
    grown.write_bytes(os_disk.read_bytes() + random.Random(5).randbytes(MIB))
    azure.write("web", "os", grown)

    report = source.replicate("web", to)
    assert [(disk.name, disk.full) for disk in report.disks] == [("os", False), ("data-7", True)]
    assert report.disks[0].sent_bytes <= MIB + 4096
    assert (to / "os.raw").read_bytes() == grown.read_bytes()
    assert (to / "data-7.raw").read_bytes() == new.read_bytes()
    assert (to / "data-0.raw").read_bytes() == old.read_bytes()
    assert any(
        "the VM no longer has the disk data-0" in event.text for event in told if isinstance(event, Notice)
    )


@pytest.mark.slow
def test_a_recreated_disk_of_the_same_name_is_another_disk(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"), [image("data", 3 * MIB, seed=2)])
    source.replicate("web", tmp_path / "images")
    machine = source.inspect("web")
    source.azure.patch_vm(machine.id, {"properties": {"storageProfile": {"dataDisks": []}}})
    disk = machine.disks[1].id
    source.azure.delete(disk)
    body = {
        "location": machine.location,
        "properties": {"creationData": {"createOption": "Copy", "sourceResourceId": machine.disks[0].id}},
    }
    source.azure.put(disk, body)
    attach = {"lun": 0, "createOption": "Attach", "managedDisk": {"id": disk}}
    source.azure.patch_vm(machine.id, {"properties": {"storageProfile": {"dataDisks": [attach]}}})

    report = source.replicate("web", tmp_path / "images")
    assert [disk.full for disk in report.disks] == [False, True]
    images = tmp_path / "images"
    assert (images / "data-0.raw").read_bytes() == (images / "os.raw").read_bytes()


@pytest.mark.slow
def test_more_disks_than_the_worker_holds_go_in_waves(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path
) -> None:
    disks = [image(f"data{lun}", MIB // 2, seed=lun) for lun in range(6)]
    azure.add_vm("big", image("os"), disks, VmSpec(size="Standard_D8s_v5"))
    source = connect(environment={"export_worker_size": "Standard_D2s_v5"})
    before = azure.resources()
    source.replicate("big", tmp_path / "images")
    for lun, disk in enumerate(disks):
        assert (tmp_path / f"images/data-{lun}.raw").read_bytes() == disk.read_bytes()
    assert azure.resources() == before


@pytest.mark.slow
def test_shutdown_happens_only_when_asked_for(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    source.replicate("web", tmp_path / "images")
    assert power_state(source, "web") == "running"
    azure.requests.clear()
    source.replicate("web", tmp_path / "images", shutdown=True)
    assert power_state(source, "web") == "deallocated"
    steps = ["/virtualMachines/coriolis", "/deallocate", "/snapshots/coriolis"]
    done = [path for method, path in azure.requests if method in ("PUT", "POST")]
    begun = [next(at for at, path in enumerate(done) if step in path) for step in steps]
    assert begun == sorted(begun), "the outage begins before everything else is ready"


@pytest.mark.slow
def test_a_deallocated_vm_is_replicated_although_its_document_has_lost_the_sizes(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    os_disk = image("os")
    azure.add_vm("web", os_disk)
    source.deallocate(source.inspect("web"))
    source.replicate("web", tmp_path / "images")
    assert (tmp_path / "images/os.raw").read_bytes() == os_disk.read_bytes()


@pytest.mark.slow
def test_a_worker_without_public_ip_in_an_existing_subnet(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path
) -> None:
    os_disk = image("os")
    azure.add_vm("web", os_disk)
    before = azure.resources()
    source = connect(environment={"export_network": "sandbox-vnet/default", "export_worker_use_fip": False})
    source.replicate("web", tmp_path / "images")
    made = {path for method, path in azure.requests if method == "PUT" and "/coriolis-" in path}
    assert not any("publicIPAddresses" in path or "virtualNetworks" in path for path in made)
    assert (tmp_path / "images/os.raw").read_bytes() == os_disk.read_bytes()
    assert azure.resources() == before


@pytest.mark.slow
def test_excluded_disks_are_left_out(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"), [image("data")])
    report = connect(environment={"exclude_disks": ["data-0"]}).replicate("web", tmp_path / "images")
    assert [disk.name for disk in report.disks] == ["os"]
    with pytest.raises(errors.InvalidInput, match="web has no disk data-5"):
        connect(environment={"exclude_disks": ["data-5"]}).replicate("web", tmp_path / "images")


@pytest.mark.slow
def test_a_zonal_vm_gets_a_worker_and_clones_in_its_zone(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    os_disk = image("os")
    azure.add_vm("zoned", os_disk, spec=VmSpec(zone="2"))
    source.replicate("zoned", tmp_path / "images")
    assert (tmp_path / "images/os.raw").read_bytes() == os_disk.read_bytes()


@pytest.mark.slow
def test_the_documentations_retired_size_and_image_are_replaced_and_said_so(
    azure: Sandbox, connect: Callable[..., Source], image: Image, told: list[Event], tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    retired = {"publisher": "Canonical", "offer": "UbuntuServer", "sku": "16.04.0-LTS", "version": "latest"}
    source = connect(environment={"export_worker_size": "Standard_A1", "export_worker_image": retired})
    source.replicate("web", tmp_path / "images")
    texts = [event.text for event in told if isinstance(event, Notice)]
    assert any("Standard_A1" in text and "instead" in text for text in texts)
    assert any("UbuntuServer" in text and "instead" in text for text in texts)


@pytest.mark.slow
def test_the_users_tags_are_on_everything_that_is_made(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    untagged = []

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/coriolis-" in request.path:
            tags = json.loads(request.body).get("tags", {})
            if tags.get("cost-centre") != "42" or names.RUN_TAG not in tags:
                untagged.append(request.path)
        return answer(request)

    azure.intercept = look
    connect(environment={"tags": {"cost-centre": "42"}}).replicate("web", tmp_path / "images")
    assert untagged == []


@pytest.mark.parametrize(
    ("vm", "environment", "connection", "kind", "words"),
    [
        ("nobody", {}, {}, errors.NotFound, "no VM nobody"),
        ("web", {"resource_group": "elsewhere"}, {}, errors.NotFound, "elsewhere"),
        ("web", {"location": "northeurope"}, {}, errors.InvalidInput, "is in westeurope"),
        ("web", {}, {"subscription_id": "0000"}, errors.NotFound, "0000"),
    ],
)
def test_bad_input_names_the_thing_and_creates_nothing(
    azure: Sandbox,
    connect: Callable[..., Source],
    image: Image,
    tmp_path: Path,
    vm: str,
    environment: dict[str, str],
    connection: dict[str, str],
    kind: type[errors.CoriolisAzureError],
    words: str,
) -> None:
    azure.add_vm("web", image("os"))
    before = azure.resources()
    with pytest.raises(kind, match=words) as caught:
        connect(environment, connection).replicate(vm, tmp_path / "images")
    assert caught.value.remedy
    assert azure.resources() == before
    assert not (tmp_path / "images").exists()
    assert not any(method == "PUT" and "/coriolis-" in path for method, path in azure.requests)


def test_wrong_credentials_are_denied_with_azures_own_words(
    azure: Sandbox, connect: Callable[..., Source], tmp_path: Path
) -> None:
    principal = {**azure.connection_info()["service_principal_credentials"], "client_secret": "wrong"}
    source = connect(connection={"service_principal_credentials": principal})
    with pytest.raises(errors.Denied, match="AADSTS7000215") as caught:
        source.replicate("web", tmp_path / "images")
    assert "wrong" not in str(caught.value)


def test_an_ephemeral_os_disk_is_refused_with_the_reason(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))

    def ephemeral(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == "GET" and request.path.endswith("/virtualMachines/web"):
            document = json.loads(response.body)
            document["properties"]["storageProfile"]["osDisk"]["diffDiskSettings"] = {"option": "Local"}
            return replace(response, body=json.dumps(document).encode())
        return response

    azure.intercept = ephemeral
    before = azure.resources()
    with pytest.raises(errors.Unsupported, match="ephemeral OS disk"):
        source.replicate("web", tmp_path / "images")
    assert azure.resources() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        "networkSecurityGroups/coriolis",
        "publicIPAddresses/coriolis",
        "virtualNetworks/coriolis",
        "networkInterfaces/coriolis",
        "virtualMachines/coriolis",
        "snapshots/coriolis",
        "disks/coriolis",
    ],
)
def test_an_error_in_any_step_leaves_nothing(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path, step: str
) -> None:
    azure.add_vm("web", image("os"), [image("data")])
    before = azure.resources()

    def refuse(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and step in request.path:
            body = b'{"error": {"code": "RequestDisallowedByPolicy", "message": "Not here."}}'
            return Response(403, {"Content-Type": "application/json"}, body)
        return answer(request)

    azure.intercept = refuse
    with pytest.raises(errors.Denied, match="RequestDisallowedByPolicy: Not here"):
        source.replicate("web", tmp_path / "images")
    assert azure.resources() == before


@pytest.mark.slow
@pytest.mark.parametrize("step", ["virtualMachines/coriolis", "snapshots/coriolis", "disks/coriolis"])
def test_an_interrupt_in_any_step_leaves_nothing(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path, step: str
) -> None:
    azure.add_vm("web", image("os"), [image("data")])
    before = azure.resources()

    def interrupt(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == "PUT" and step in request.path:
            raise KeyboardInterrupt
        return response

    azure.intercept = interrupt
    with pytest.raises(KeyboardInterrupt):
        source.replicate("web", tmp_path / "images")
    azure.intercept = None
    assert azure.resources() == before


@pytest.mark.slow
def test_what_cannot_be_deleted_is_reported_and_found_by_the_next_sweep(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    before = azure.resources()

    def locked(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "DELETE" and "/snapshots/coriolis" in request.path:
            body = b'{"error": {"code": "ScopeLocked", "message": "Please remove the lock and try again."}}'
            return Response(409, {"Content-Type": "application/json"}, body)
        return answer(request)

    azure.intercept = locked
    report = source.replicate("web", tmp_path / "images")
    assert [names.kind_of(id) for id in report.left_behind] == ["snapshot"]
    azure.intercept = None
    found, stayed = source.sweep(timedelta(0))
    assert [leftover.instance for leftover in found] == ["web"]
    assert stayed == []
    assert azure.resources() == before


@pytest.mark.slow
def test_what_an_interrupted_run_could_not_delete_is_named_with_the_code_for_it(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    before = azure.resources()

    def interrupted_and_locked(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "DELETE" and "/snapshots/coriolis" in request.path:
            return Response.of(409, {"error": {"code": "ScopeLocked", "message": "Locked."}})
        response = answer(request)
        if request.method == "PUT" and "/disks/coriolis" in request.path:
            raise KeyboardInterrupt
        return response

    azure.intercept = interrupted_and_locked
    with pytest.raises(errors.CleanupIncomplete) as caught:
        source.replicate("web", tmp_path / "images")
    azure.intercept = None
    assert caught.value.exit_code == 7
    assert [names.kind_of(id) for id in caught.value.facts["left_behind"]] == ["snapshot"]
    assert source.sweep(timedelta(0))[1] == []
    assert azure.resources() == before


@pytest.mark.slow
@pytest.mark.parametrize("code", ["AttachDiskWhileBeingDetached", "OperationPreempted"])
def test_other_operations_on_the_worker_are_waited_out(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path, code: str
) -> None:
    os_disk, clock = image("os"), Held()
    refusals: list[str] = []
    azure.add_vm("web", os_disk)

    def busy(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PATCH" and len(refusals) < 3:
            refusals.append(request.path)
            body = json.dumps({"error": {"code": code, "message": "Try again."}}).encode()
            return Response(409, {"Content-Type": "application/json"}, body)
        return answer(request)

    azure.intercept = busy
    connect(clock=clock).replicate("web", tmp_path / "images")
    assert len(refusals) == 3
    assert clock.monotonic() >= 15
    assert (tmp_path / "images/os.raw").read_bytes() == os_disk.read_bytes()


@pytest.mark.slow
def test_another_vms_replica_is_not_overwritten(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    first = image("first", seed=1)
    azure.add_vm("web", first)
    azure.add_vm("db", image("second", seed=2))
    source.replicate("web", tmp_path / "images")
    azure.requests.clear()
    with pytest.raises(errors.InvalidInput, match="replica of another VM"):
        source.replicate("db", tmp_path / "images")
    assert (tmp_path / "images/os.raw").read_bytes() == first.read_bytes()
    assert not any(method == "PUT" for method, path in azure.requests)


@pytest.mark.parametrize("why", ["no run of ours has made it", "in use", "is a qcow2 image"])
def test_an_image_that_may_not_be_written_is_refused_before_anything_is_made(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path, why: str
) -> None:
    source = connect(environment={"replica_export_mechanism": "snapshots"})
    disk, to = image("os", seed=1), tmp_path / "images"
    azure.add_vm("web", disk)
    to.mkdir()
    (to / "os.raw").write_bytes((b"QFI\xfb" if "qcow2" in why else b"mine") * 1000)
    before = (to / "os.raw").read_bytes()
    azure.requests.clear()
    with ExitStack() as ending:
        if why == "in use":
            ending.enter_context((to / "os.raw").open("r+b"))
        with pytest.raises(errors.InvalidInput, match=why):
            source.replicate("web", to, shutdown=True, adopt=why == "in use")
    assert not any(method == "PUT" or "deallocate" in path for method, path in azure.requests)
    assert (to / "os.raw").read_bytes() == before
    assert {path.name for path in to.iterdir()} == {"os.raw", ".lock"}
    if "qcow2" not in why:
        source.replicate("web", to, adopt=True)
        assert (to / "os.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("what", ["partial", "redo", "index", "draft", "manifest", "dirty"])
def test_a_folder_in_the_place_of_a_file_is_refused_and_the_remedy_helps(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path, what: str
) -> None:
    source = connect(environment={"replica_export_mechanism": "snapshots"})
    azure.add_vm("web", image("os"))
    folder = tmp_path / "images" / f"os.raw.{what}"
    folder.mkdir(parents=True)
    azure.requests.clear()
    with pytest.raises(errors.InvalidInput, match=rf"os\.raw\.{what} is not a regular file") as caught:
        source.replicate("web", folder.parent)
    assert caught.value.remedy == "Remove it and run again."
    assert not any(method == "PUT" for method, path in azure.requests)
    folder.rmdir()
    source.replicate("web", folder.parent)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "/foo",
        "/subscriptions/other/resourceGroups/sandbox/providers/Microsoft.Compute/virtualMachines/web",
        "{0}/resourceGroups/sandbox/providers/Microsoft.Compute/disks/web-os",
        "{0}/resourceGroups/sandbox/providers/Microsoft.Compute/virtualMachines/web/extensions/x",
    ],
)
def test_a_name_that_can_be_no_vm_is_refused(azure: Sandbox, source: Source, image: Image, name: str) -> None:
    azure.add_vm("web", image("os"))
    with pytest.raises(errors.InvalidInput):
        source.inspect(name.format(f"/subscriptions/{source.azure.subscription}"))


@pytest.mark.slow
def test_the_runs_own_error_is_told_although_deleting_fails_too(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    broken = False

    def down(request: Request, answer: Callable[[Request], Response]) -> Response:
        nonlocal broken
        broken = broken or (request.method == "PUT" and "-clone-os" in request.path)
        if broken:
            body = b'{"error": {"code": "AuthorizationFailed", "message": "Role was taken away."}}'
            return Response(403, {"Content-Type": "application/json"}, body)
        return answer(request)

    azure.intercept = down
    with pytest.raises(errors.Denied, match=r"could not create .*clone-os") as caught:
        source.replicate("web", tmp_path / "images")
    kinds = {names.kind_of(id) for id in caught.value.facts["left_behind"]}
    assert {"vm", "nic", "ip", "nsg", "vnet"} <= kinds


def test_strangers_are_left_alone(azure: Sandbox, source: Source, image: Image) -> None:
    """Our name prefix without our tags is no resource of ours; one that a run is known to have named is told of."""
    id = names.resource_id(source.azure.subscription, GROUP, "nsg", "coriolis-12345678-nsg")
    source.azure.put(id, {"location": "westeurope", "tags": {"coriolis-role": "nsg"}})
    assert source.sweep(timedelta(0)) == ([], [])
    azure.add_vm("web", image("os"))
    assert source.finish(source.new_run(source.inspect("web")), [id]) == [id]
    assert source.azure.find(id) is not None


def test_a_second_run_to_the_same_destination_is_refused(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    with (
        places.open(str(tmp_path / "images"), silent),
        pytest.raises(errors.InvalidInput, match="another run"),
    ):
        source.replicate("web", tmp_path / "images")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["a folder", "a container"])
def test_tokens_that_expire_in_the_middle_of_a_run_are_renewed(
    azure: Sandbox, source: Source, image: Callable[..., Path], tmp_path: Path, to: str
) -> None:
    """Those for the resource manager and those for Blob storage; nothing is done twice because of it."""
    azure.add_vm("web", image("os"))
    to = str(tmp_path / "images") if to == "a folder" else "blob://sandboxstorage/replicas/web"
    given: list[str] = []

    def short_lived(request: Request, answer: Callable[[Request], Response]) -> Response:
        """Clients are told that each token expires at once."""
        response = answer(request)
        if request.path.endswith("/token"):
            told = json.loads(response.body)
            given.append(told["access_token"])
            return Response.of(200, {**told, "expires_in": 1, "ext_expires_in": 1})
        return response

    azure.intercept = short_lived
    report = source.replicate("web", to)
    assert len(set(given)) > 10
    assert report.disks[0].sent_bytes == 2 * MIB
    assert [verdict.verified for verdict in source.verify(to)] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("sku", ["UltraSSD_LRS", "PremiumV2_LRS"])
def test_snapshots_that_are_filled_later_are_waited_for(
    azure: Sandbox, connect: Callable[..., Source], image: Callable[..., Path], tmp_path: Path, sku: str
) -> None:
    """Azure calls such a snapshot Succeeded while it cannot be copied yet, and takes only incremental ones."""
    data = image("data", seed=1)
    azure.add_vm("web", image("os"), [data], VmSpec(data_sku=sku))
    before, clock = azure.resources(), Held()
    connect(clock=clock).replicate("web", str(tmp_path / "images"))
    assert clock.monotonic() >= 20, "it was looked at again and again until it was full"
    assert (tmp_path / "images/data-0.raw").read_bytes() == data.read_bytes()
    assert azure.resources() == before


@pytest.mark.slow
def test_a_disk_with_large_sectors_is_copied_by_the_kind_of_disk_that_has_them(
    azure: Sandbox, connect: Callable[..., Source], image: Callable[..., Path], tmp_path: Path
) -> None:
    """Azure makes nothing else of their snapshots; an Ultra disk would need a worker that is made for it."""
    data = image("data", seed=1)
    azure.add_vm("web", image("os"), [data], VmSpec(zone="1", data_sku="UltraSSD_LRS"))
    made: list[str] = []

    def large(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == "GET" and request.path.endswith("/disks/web-data-0"):
            document = json.loads(response.body)
            document["properties"]["creationData"]["logicalSectorSize"] = 4096
            return Response.of(200, document)
        if request.method == "PUT" and "clone-data-0" in request.path:
            made.append(json.loads(request.body)["sku"]["name"])
        return response

    azure.intercept = large
    connect(clock=Held()).replicate("web", str(tmp_path / "images"))
    assert made == ["PremiumV2_LRS"]
    assert (tmp_path / "images/data-0.raw").read_bytes() == data.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "blob"])
def test_nothing_in_a_run_makes_an_id_that_may_leave_a_file_open(
    azure: Sandbox, source: Source, image: Callable[..., Path], tmp_path: Path, where: str
) -> None:
    """libuuid's `uuid1` does, in each thread, where /var/lib/libuuid exists; ours have an id all the same."""
    azure.add_vm("web", image("os"), [image("data")])
    threads, ids = set[str](), list[str]()

    def noted() -> uuid.UUID:
        threads.add(threading.current_thread().name)
        return uuid.uuid4()

    def seen(request: Request, answer: Callable[[Request], Response]) -> Response:
        ids.append(request.header("x-ms-client-request-id") or "")
        return answer(request)

    azure.intercept = seen
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(uuid, "uuid1", noted)
        source.replicate(
            "web", str(tmp_path / "web") if where == "folder" else "blob://sandboxstorage/images/web"
        )
    assert not threads
    assert all(ids)
