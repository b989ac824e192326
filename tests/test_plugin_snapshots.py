"""The plugin reads snapshots: no worker is made, and from the third execution on only what changed is read."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coriolis_azure.azure import names
from coriolis_azure.cli.commands import cli
from coriolis_azure.errors import Denied
from coriolis_azure.plugin import claims, provider, states
from coriolis_azure.plugin.provider import AzureExportProvider
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.plugin_errors import raised
from harness.snapshot_transfers import CHUNK, FILES, NOT_READ, Json, Place, Transfer, copied
from harness.writer_targets import HttpsTarget, SshTarget

slow = pytest.mark.slow


@pytest.fixture
def place(
    request: pytest.FixtureRequest, azure: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """Volumes are files where a test does not ask for another writer. Azure is reached without sockets."""
    target: SshTarget | HttpsTarget | None = None
    if kind := getattr(request, "param", None):
        target = kind(tmp_path / "receiver")
    monkeypatch.setattr(provider, "_transport", lambda connection: azure.transport())
    yield Place(azure, azure.connection_info(), tmp_path, target.info if target else FILES)
    azure.intercept = None
    if target:
        target.close()


ON_ALL = pytest.mark.parametrize(
    "place", [None, SshTarget, HttpsTarget], ids=["file", "ssh", "https"], indirect=True
)
OVER_HTTPS = pytest.mark.parametrize("place", [HttpsTarget], ids=["https"], indirect=True)


def proved(place: Place, **settings: Any) -> Transfer:
    """A transfer whose next execution relies on Azure's list."""
    transfer = Transfer(place, **settings)
    transfer.execute()
    transfer.execute()
    return transfer


def source_of(place: Place) -> Source:
    """For a look at Azure."""
    return Source(place.connection, place.azure.environment(), transport=place.azure.transport())


@slow
@ON_ALL
def test_the_third_execution_reads_only_what_changed(place: Place) -> None:
    transfer = Transfer(place)
    for execution in range(4):
        told = transfer.execute()
        assert place.left() == transfer.baselines()
        line = copied(told, "os")
        assert (NOT_READ in line) == (execution > 1), line
        if execution > 1:  # the changed chunk, and one in 32 of the others
            assert "os: 128 KiB read, 64 KiB sent" in line, line
        place.write(0, 12 + execution, execution)
        place.write(1, 20 + execution)
    transfer.execute()
    transfer.give_up()
    assert place.left() == []


@slow
@pytest.mark.parametrize(("mechanism", "has_worker"), [("hybrid", True), ("auto", False)])
def test_the_other_mechanisms_read_only_what_changed_too(
    place: Place, mechanism: str, has_worker: bool
) -> None:
    transfer = Transfer(place, replica_export_mechanism=mechanism)
    resources, _ = transfer.begin()
    assert ("worker" in resources) == has_worker
    transfer.end(resources)
    for execution in range(4):
        told = transfer.execute()
        assert place.left() == transfer.baselines()
        assert (NOT_READ in copied(told, "os")) == (execution > 1), told
        place.write(0, 12 + execution, execution)
    transfer.give_up()
    assert place.left() == []


@slow
def test_a_worker_that_auto_turns_out_to_need_is_made_and_deleted(place: Place) -> None:
    def closing(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/snapshots/" in request.path:
            request = replace(request, body=request.body.replace(b"AllowAll", b"DenyAll"))
        return answer(request)

    place.azure.intercept = closing
    transfer = Transfer(place, replica_export_mechanism="auto")
    told = transfer.execute()
    assert any("by a worker after all" in line for line in told), told
    assert place.left() == []


@slow
def test_nothing_is_created_but_snapshots(place: Place) -> None:
    created: set[str] = set()

    def seen(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and request.path.startswith("/subscriptions"):
            created.add(request.path.split("/")[-2])
        return answer(request)

    place.azure.intercept = seen
    transfer = Transfer(place)
    resources, reached = transfer.begin()
    assert created == set()
    assert reached == {}
    assert set(resources) == {"run", "vhds"}
    transfer.end(resources)
    transfer.execute()
    assert created == {"snapshots"}


@slow
@OVER_HTTPS
def test_what_travels_is_small_and_has_no_secrets(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    transfer = Transfer(place)
    lines = transfer.execute() + transfer.execute()
    state = transfer.entries[0]["replica_state"]
    assert len(json.dumps(state["baseline"])) < 1024
    with source_of(place) as source:
        document = source.azure.get(state["baseline"]["id"])
    assert state["baseline"]["unique_id"] == document["properties"]["uniqueId"]
    assert state["baseline"]["disk"] == document["properties"]["creationData"]["sourceUniqueId"]
    assert state["baseline"]["proved"] is True
    told = json.dumps([transfer.entries, lines]) + caplog.text
    assert not re.search(r"[?&](si|sig)=(?!\*|REDACTED)", told)


# The state


def test_a_baseline_is_only_used_with_the_state_that_it_was_stored_with() -> None:
    baseline = {"stream": "s", "id": "/a", "proved": False, "turn": 1}
    one, other = ({"size": 1, "check": check} for check in ("one", "other"))
    state = json.loads(json.dumps(states.with_baseline(one, baseline)))
    assert states.baseline_in(state) == baseline
    assert states.with_baseline(one, None) == one
    kept = state["baseline"]
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    damaged: list[Any] = [
        *(None, 5, "text", [], [kept], {}, {"check": kept["check"]}, baseline),
        {**kept, "proved": True},
        {**kept, "id": "/b"},
        {**kept, "more": 1},
        {**kept, "more": deep},
        {name: value for name, value in kept.items() if name != "turn"},
    ]
    for each in damaged:
        assert states.baseline_in({**state, "baseline": each}) is None
    assert states.baseline_in({**other, "baseline": kept}) is None
    nothing: list[Any] = [None, 5, [], "text", {}]
    assert [states.baseline_in(each) for each in nothing] == [None] * len(nothing)


def lost(transfer: Transfer) -> None:
    """The destination has rebuilt its entries."""
    for entry in transfer.entries:
        del entry["replica_state"]


def without_baseline(transfer: Transfer) -> None:
    for entry in transfer.entries:
        del entry["replica_state"]["baseline"]


def tampered(transfer: Transfer) -> None:
    for entry in transfer.entries:
        entry["replica_state"]["baseline"]["made"] = "2020-01-01T00:00:00Z"


def swapped(transfer: Transfer) -> None:
    """Each disk has the other one's state."""
    one, other = (entry["replica_state"] for entry in transfer.entries)
    transfer.entries[0]["replica_state"], transfer.entries[1]["replica_state"] = other, one


def swapped_baselines(transfer: Transfer) -> None:
    one, other = (entry["replica_state"] for entry in transfer.entries)
    one["baseline"], other["baseline"] = other["baseline"], one["baseline"]


def answer_lost(transfer: Transfer) -> None:
    """An execution has ended well, and its result has not reached the database."""
    transfer.place.write(0, 9)
    transfer.execute(stored=False)
    transfer.place.disks[0].write(9 * CHUNK, transfer.place.folder.joinpath("os.raw").read_bytes()[:CHUNK])


DAMAGES = [lost, without_baseline, tampered, swapped, swapped_baselines, answer_lost]


@slow
@ON_ALL
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_state_that_is_not_that_of_the_volume_is_not_relied_on(
    place: Place, damage: Callable[[Transfer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "FENCE_SECONDS", 1.0)
    transfer = proved(place)
    damage(transfer)
    place.write(0, 3)
    place.write(1, 4)
    told = transfer.execute()
    assert NOT_READ not in "".join(told), told
    if damage not in (swapped, swapped_baselines):  # whose streams are the other disk's
        assert place.left() == transfer.baselines()
    transfer.give_up()


@slow
def test_the_baselines_of_two_transfers_do_not_touch_each_other(place: Place) -> None:
    one, other = proved(place), Transfer(place, "other")
    other.execute()
    place.write(0, 3)
    assert NOT_READ in copied(one.execute(), "os")
    assert place.left() == sorted([*one.baselines(), *other.baselines()])
    one.give_up()
    assert place.left() == other.baselines()
    other.execute()
    assert NOT_READ in copied(other.execute(), "os")


@slow
@ON_ALL
def test_a_change_that_is_not_listed_is_found_and_everything_is_read(place: Place) -> None:
    """It lies in the part whose turn it is; what was written before that was noticed is known no more."""
    transfer = proved(place)
    place.write(0, 0)
    place.write(0, 1)  # the third execution's turn
    place.write(0, 12)

    def omitting(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        previous = request.header("x-ms-previous-snapshot-url")
        if not previous or Request("GET", previous).query["snapshot"] == request.query["snapshot"]:
            return response
        start = CHUNK + 8192
        omitted = b"<PageRange><Start>%d</Start><End>%d</End></PageRange>" % (start, start + 4095)
        return replace(response, body=response.body.replace(omitted, b""))

    place.azure.intercept = omitting
    told = transfer.execute()
    assert any(f"leaves out a change at offset {CHUNK}" in line for line in told), told
    assert NOT_READ not in copied(told, "os")
    assert place.left() == transfer.baselines()
    place.azure.intercept = None
    assert NOT_READ not in copied(transfer.execute(), "os")  # it is proved anew
    assert NOT_READ in copied(transfer.execute(), "os")


# Deletion


@slow
def test_baselines_are_deleted_with_the_transfers_disks_whatever_is_known_of_them(place: Place) -> None:
    transfer = Transfer(place)
    transfer.execute(stored=False)
    assert len(place.left()) == 2
    transfer.give_up()  # the result of the first execution was lost
    assert place.left() == []

    transfer = Transfer(place, "second")
    transfer.execute()
    before = copy.deepcopy(transfer.entries)
    transfer.execute()
    transfer.entries = before  # that of a later one was lost
    transfer.give_up()
    assert place.left() == []

    transfer = Transfer(place, "third")
    transfer.execute()
    with_one = transfer.baselines()[0]
    snapshots = {each["id"].lower(): each["id"] for each in place.azure.resources()}
    with source_of(place) as source:
        source.azure.delete(snapshots[with_one])  # by hand
    transfer.give_up()
    transfer.give_up()
    assert place.left() == []


@slow
def test_a_baseline_that_cannot_be_deleted_is_named_and_stops_nothing(place: Place) -> None:
    transfer = Transfer(place)
    transfer.execute()
    locked = Response.of(409, {"error": {"code": "ScopeLocked", "message": "The scope is locked."}})
    place.azure.intercept = lambda request, answer: (
        locked if request.method == "DELETE" and "/snapshots/" in request.path else answer(request)
    )
    entries, told = place.call("delete_replica_source_snapshots", transfer.environment, transfer.entries)
    assert not any("replica_state" in entry for entry in entries)
    for baseline in transfer.baselines():
        assert any(baseline in line.lower() for line in told), told
    transfer.execute()  # nor an execution
    place.azure.intercept = None


@slow
def test_a_deployment_deletes_baselines_whose_end_date_has_passed(place: Place) -> None:
    transfer = Transfer(place)
    transfer.execute()
    for document in place.azure.resources():
        if names.BASELINE_TAG in (document.get("tags") or {}):
            tags = {**document["tags"], names.UNTIL_TAG: "2020-01-01T00:00:00Z"}
            with source_of(place) as source:
                source.azure.tag(document["id"], tags)
    other = Transfer(place, "other", keep_baseline=False)
    other.end(other.begin()[0])
    assert place.left() == []
    assert NOT_READ not in "".join(transfer.execute())


# Settings


@slow
def test_a_transfer_changes_between_worker_and_snapshots(place: Place) -> None:
    transfer = proved(place)
    transfer.update(replica_export_mechanism="worker")
    place.write(0, 5)
    assert NOT_READ not in "".join(transfer.execute())
    assert place.left() == []
    transfer.update(replica_export_mechanism="snapshots")
    place.write(0, 6)
    told = transfer.execute()
    assert "64 KiB sent" in copied(told, "os")
    assert place.left() == transfer.baselines() != []
    transfer.execute()
    place.write(0, 7)
    assert NOT_READ in copied(transfer.execute(), "os")
    transfer.update(keep_baseline=False)
    transfer.execute()
    assert place.left() == []


@slow
@pytest.mark.parametrize("mechanism", ["hybrid", "auto"])
def test_the_other_mechanisms_read_what_changed_as_well(place: Place, mechanism: str) -> None:
    transfer = proved(place, replica_export_mechanism=mechanism)
    place.write(0, 5)
    told = transfer.execute()
    assert NOT_READ in copied(told, "os"), told
    assert place.left() == transfer.baselines() != []
    transfer.update(replica_export_mechanism="snapshots")
    place.write(0, 6)
    assert NOT_READ in copied(transfer.execute(), "os")
    transfer.give_up()
    assert place.left() == []


@slow
def test_a_worker_of_a_pool_is_left_alone(place: Place) -> None:
    """It may not even exist any more."""
    transfer = proved(place)
    place.write(0, 5)
    (run, _) = transfer.begin()
    worker = {"vm": f"{place.info['id']}-gone", "host_key": "", "slots": 4}
    pools = {"run": {**run["run"], "pool": "pool"}, "worker": worker, "environment": {}}
    reached = {"ip": "127.0.0.9", "port": 22, "username": "user", "password": "-----BEGIN"}
    transfer.entries, told = place.call("replicate_disks", *transfer.copying(pools, reached))
    assert NOT_READ in copied(told, "os")
    transfer.check()
    assert place.left() == transfer.baselines()


@slow
def test_the_user_interface_is_told_of_the_mechanisms(place: Place) -> None:
    schema = AzureExportProvider(None).get_source_environment_schema()["properties"]
    options, _ = place.call("get_source_environment_options", {}, [])
    (values,) = (each["values"] for each in options if each["name"] == "replica_export_mechanism")
    assert values[:2] == ["worker", "snapshots"]
    assert set(values) <= set(schema["replica_export_mechanism"]["enum"])
    for name in ("replica_export_mechanism", "keep_baseline", "baseline_days", "full_every"):
        assert schema[name]["title"]
        assert schema[name]["description"]


# Rights


def role(*options: str) -> list[Json]:
    """The permissions that `coriolis-azure role` prints."""
    printed = json.loads(CliRunner().invoke(cli, ["role", *options], catch_exceptions=False).stdout)
    return [{"actions": printed["Actions"], "dataActions": printed["DataActions"]}]


@slow
@OVER_HTTPS
def test_the_small_role_is_enough_with_the_records_of_volumes(place: Place) -> None:
    small = role("--mechanism", "snapshots", "--no-shutdown")
    assert not [name for name in small[0]["actions"] if re.search(r"(?<!snapshots)/(write|delete)$", name)]
    place.azure.permissions[:] = small
    transfer = Transfer(place)
    resources, reached = transfer.begin()
    with pytest.raises(raised(Denied), match="networkSecurityGroups/write"):
        place.call("replicate_disks", *transfer.copying(resources, reached))
    _, told = place.call("validate_replica_export_input", "web", transfer.environment)
    assert any("lacks Microsoft.Network/networkSecurityGroups/write" in line for line in told), told
    transfer.end(resources)
    assert place.left() == []
    place.azure.permissions[:] = role("--mechanism", "snapshots", "--no-shutdown", "--orchestrator")
    for _ in range(3):
        told = transfer.execute()
    assert NOT_READ in copied(told, "os")
    transfer.give_up()
    assert place.left() == []


# Blob storage

CONTAINER = {"storage_account_name": "sandboxstorage", "storage_container_name": "replicas"}


@slow
def test_volumes_in_blob_storage_have_baselines_as_well(place: Place) -> None:
    transfer = Transfer(place, **CONTAINER)
    for entry in transfer.entries:
        entry["volume_dev"] = ""
    vhds = place.azure.storage

    def check() -> None:
        for entry, disk in zip(transfer.entries, place.disks, strict=True):
            blob = vhds.blob("sandboxstorage/" + entry["vhd_url"].partition("/sandboxstorage/")[2])
            assert blob is not None
            assert vhds.content(blob)[:-512] == disk.path.read_bytes()

    transfer.check = check  # type: ignore[method-assign]
    transfer.execute()
    transfer.execute()
    place.write(0, 5)
    told = transfer.execute()
    assert NOT_READ in copied(told, "os"), told
    assert "64 KiB sent" in copied(told, "os")
    assert len(place.left()) == 2
    transfer.give_up()
    assert place.left() == []


def test_vhd_blobs_that_only_this_host_can_read_need_no_worker(
    azure: Sandbox, image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mechanism worker: their account is in another location, so Azure does not import them."""
    monkeypatch.setattr(provider, "_transport", lambda connection: azure.transport())
    disk = image("os")
    azure.add_vm("web", disk, spec=VmSpec(unmanaged="oldstorage"))
    azure.storage.resource("oldstorage").document["location"] = "northeurope"
    before = azure.resources()
    plugin, connection, environment = AzureExportProvider(None), azure.connection_info(), azure.environment()
    info = plugin.get_replica_instance_info(None, connection, environment, "web")
    deployed = plugin.deploy_replica_source_resources(None, connection, info, environment)
    assert deployed["connection_info"] == {}
    made = [each["type"].rpartition("/")[2] for each in azure.resources() if each not in before]
    assert made == ["networkSecurityGroups"]  # whose tags say that the run is alive
    volume = tmp_path / "volume"
    volume.touch()
    entries = [{"disk_id": info["devices"]["disks"][0]["id"], "volume_dev": str(volume)}]
    resources = deployed["migr_resources"]
    plugin.replicate_disks(None, connection, environment, "web", resources, {}, FILES, entries, True)
    plugin.delete_replica_source_resources(None, connection, environment, resources)
    assert volume.read_bytes() == disk.read_bytes()
    assert azure.resources() == before
