"""Replicas in Blob storage: what a reader that knows nothing of us finds there, and what is refused."""

from __future__ import annotations

import base64
import hmac
import random
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from coriolis_azure import vhd
from coriolis_azure.azure import blobs, names
from coriolis_azure.azure.blobs import Storage
from coriolis_azure.clock import Clock
from coriolis_azure.errors import CoriolisAzureError, Denied, DestinationFailed, InvalidInput, NoReplica
from coriolis_azure.events import Event, Waiting, silent
from coriolis_azure.replica import places
from coriolis_azure.replica.digests import Digests
from coriolis_azure.replica.manifest import DIGEST
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.deaths import Died
from harness.replica_runs import CHUNK, LAST, SIZE, A, B, expected, run
from harness.replicas import SandboxPlace

pytestmark = [pytest.mark.slow]

MIB = 1 << 20
OS = "sandboxstorage/images/replicas/web-1/os.vhd"


@pytest.fixture
def place(azure: Sandbox) -> SandboxPlace:
    return SandboxPlace(azure)


def stored(azure: Sandbox, path: str = OS) -> Any:
    found = azure.storage.blob(path)
    assert found is not None
    return found


# What is there


def test_a_whole_vhd_says_so_and_one_that_is_being_written_is_none(
    azure: Sandbox, place: SandboxPlace
) -> None:
    """While a first run writes, and after it has died, there is no footer: nothing takes it for a disk.

    A later run leaves it as it is until it publishes.
    """
    run(place, {0: A, 1: B}, die=1)
    assert stored(azure).metadata["coriolis_state"] == "writing"
    assert place.whole()[-512:] == bytes(512)
    place.died()
    run(place, {0: A, 1: B})
    assert stored(azure).metadata["coriolis_state"] == "complete"
    assert vhd.content_size(place.whole()[-512:], len(place.whole()), "it") == 3 * MIB
    run(place, {0: B, 1: A}, die=1)
    assert stored(azure).metadata["coriolis_state"] == "complete"
    assert place.content(SIZE) == expected({0: A, 1: B})
    place.died()
    run(place, {0: B, 1: A})
    assert stored(azure).metadata["coriolis_state"] == "complete"
    assert vhd.content_size(place.whole()[-512:], len(place.whole()), "it") == 3 * MIB


def test_a_large_manifest_goes_up_and_comes_down_in_pieces(azure: Sandbox, place: SandboxPlace) -> None:
    """As many chunks as 320 GiB has, all of them different: one text of 5.7 MiB."""
    count = 320 << 10
    with place.open() as image:
        nothing = image.known("id", count * CHUNK, CHUNK, full=False)
        made = replace(nothing, digests=Digests(random.Random(5).randbytes(DIGEST * count)))
        image.commit(made)
    manifest = stored(azure, OS + ".manifest")
    with place.open() as image:
        again = image.known("id", count * CHUNK, CHUNK, full=False)
    assert again == made
    assert manifest.size > blobs.MOST


def test_where_there_is_no_place_for_the_manifest_it_is_said_and_the_older_one_stays(
    azure: Sandbox, place: SandboxPlace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(place, {0: A})
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        with pytest.raises(DestinationFailed, match="no temporary file can be created") as failure:
            run(place, {0: B})
        assert "TMPDIR" in failure.value.remedy
    run(place, {0: B})
    assert place.whole()[:SIZE] == expected({0: B})


def test_only_pages_that_hold_something_are_uploaded_and_zeroed_ones_cleared(
    azure: Sandbox, place: SandboxPlace
) -> None:
    run(place, {0: A, 20: B})
    footer = (3 * MIB, 3 * MIB + 512)
    assert stored(azure).written(0, 1 << 40) == [(0, CHUNK), (20 * CHUNK, 21 * CHUNK), footer]
    run(place, {0: A})
    assert stored(azure).written(0, 1 << 40) == [(0, CHUNK), footer]


def test_nothing_else_in_the_container_is_touched(azure: Sandbox, place: SandboxPlace) -> None:
    run(place, {0: A})
    container = azure.storage.account("sandboxstorage").containers["images"]
    assert sorted(container.blobs) == [
        f"replicas/web-1/{name}" for name in (".vm", "os.vhd", "os.vhd.manifest", "replica.json")
    ]
    place.blob("data-0.vhd").create_pages(MIB, {"owner": "somebody"})
    place.prefix = "replicas/web-10"
    run(place, {0: A})
    place.prefix = "replicas/web-1"
    with place.folder() as folder:
        assert folder.names() == ["os"]


def test_another_program_reads_the_same_disk(place: SandboxPlace, tmp_path: Path) -> None:
    """An independent reader of the format: qemu-img."""
    program = shutil.which("qemu-img")
    if program is None:
        pytest.skip("qemu-img is not installed (Debian: qemu-utils)")
    content = {0: A, 7: B, LAST: A}
    run(place, content)
    (tmp_path / "os.vhd").write_bytes(place.whole())
    (tmp_path / "os.raw").write_bytes(expected(content).ljust(3 * MIB, b"\0"))
    command = [program, "compare", "-s", "-f", "vpc", "-F", "raw", "os.vhd", "os.raw"]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def test_azure_makes_a_managed_disk_of_it(azure: Sandbox, place: SandboxPlace) -> None:
    """And refuses to while it is half-written."""
    content = {0: A, 7: B, LAST: A}
    run(place, content)
    account = place.storage.account("sandboxstorage")
    creation = {"createOption": "Import", "sourceUri": place.blob().url, "storageAccountId": account.id}
    body: dict[str, Any] = {"location": "westeurope", "properties": {"creationData": creation}}
    subscription = azure.connection_info()["subscription_id"]
    id = names.resource_id(subscription, "sandbox", "disk", "restored")
    made = place.azure.put(id, body)
    assert made["properties"]["diskSizeBytes"] == 3 * MIB
    state = azure._world.state.find(id)
    assert state is not None
    whole = azure._world.contents.path(state.hidden["content"]).read_bytes()
    assert whole == expected(content).ljust(3 * MIB, b"\0")
    place.prefix = "replicas/web-2"
    run(place, {0: B, 1: B}, die=1)
    body["properties"]["creationData"]["sourceUri"] = place.blob().url
    with pytest.raises(CoriolisAzureError, match="InvalidVhd"):
        place.azure.put(names.resource_id(subscription, "sandbox", "disk", "torn"), body)


def test_the_whole_story_into_a_container(
    azure: Sandbox, source: Source, image: Callable[..., Path], tmp_path: Path
) -> None:
    """With a worker: two runs of a VM with two disks, then a look at what is there, then verify."""
    disks = [image("os", 3 * MIB, 1), image("data", 2 * MIB, 2)]
    azure.add_vm("web-1", disks[0], [disks[1]])
    where = "blob://sandboxstorage/replicas/web-1"
    before = azure.resources()
    first = source.replicate("web-1", where)
    disks[1].write_bytes(b"changed" + disks[1].read_bytes()[7 : MIB // 2] + bytes(3 * MIB // 2))
    azure.write("web-1", 0, disks[1])
    second = source.replicate("web-1", where)
    assert [disk.full for disk in first.disks] == [True, True]
    assert [disk.verified for disk in second.disks] == [True, True]
    assert [(disk.full, disk.sent_bytes) for disk in second.disks] == [(False, 0), (False, 65536)]
    assert azure.resources() == before
    for name, disk in zip(("os", "data-0"), disks, strict=True):
        blob = azure.storage.blob(f"sandboxstorage/replicas/web-1/{name}.vhd")
        assert blob is not None
        assert azure.storage.content(blob)[:-512] == disk.read_bytes()
        assert blob.leased() is None
    assert [verdict.verified for verdict in source.verify(where)] == [True, True]
    found = azure.storage.blob("sandboxstorage/replicas/web-1/os.vhd")
    assert found is not None
    azure.storage.overwrite(found, 0, b"x" * 512)
    assert [verdict.verified for verdict in source.verify(where)] == [True, False]


def test_an_account_that_keeps_versions_and_what_is_deleted_changes_nothing(
    azure: Sandbox, place: SandboxPlace
) -> None:
    account = azure.storage.account("sandboxstorage")
    account.versioning = account.soft_delete = True
    run(place, {0: A, 1: B})
    run(place, {0: B, 1: A}, die=1)
    place.died()
    assert run(place, {0: A, 1: B}) == [0]
    assert 0 in run(place, {0: A}, full=True)
    assert place.content(SIZE) == expected({0: A})
    with place.folder() as folder:
        assert folder.names() == ["os"]


def test_an_older_cloud_is_spoken_to_in_its_own_version(tmp_path: Path) -> None:
    with Sandbox(tmp_path / "hub", api_profile="2020-09-01-hybrid") as hub:
        place, said = SandboxPlace(hub), set()

        def seen(request: Request, answer: Callable[[Request], Response]) -> Response:
            said.add(request.header("x-ms-version"))
            return answer(request)

        hub.intercept = seen
        run(place, {0: A})
        assert place.content(SIZE) == expected({0: A})
        list(place.storage.account("sandboxstorage").container("images").blobs(past=True))
        assert said == {None, "2019-07-07"}  # the resource manager is told in the URL


# One run at a time, and no strangers


def test_a_second_run_waits_a_minute_for_the_first_and_then_says_who_is_in_the_way(
    place: SandboxPlace,
) -> None:
    told: list[Event] = []
    with place.open() as image:
        image.known("id", SIZE, CHUNK, full=False)
        with (
            pytest.raises(InvalidInput, match=r"another run is using .*images/replicas/web-1"),
            place.open(told.append),
        ):
            pass
    assert any(isinstance(event, Waiting) for event in told)
    assert 60 < place.storage.clock.monotonic() < 90
    run(place, {0: A})


def test_a_run_that_died_lets_the_next_one_in_when_its_lease_has_run_out(
    azure: Sandbox, place: SandboxPlace
) -> None:
    class Ending(Clock):
        def sleep(self, seconds: float) -> None:
            azure.storage.end_leases()

    run(place, {0: A})
    for name in (".vm", "os.vhd"):
        place.blob(name).lease(60)
    place.storage.clock = Ending()
    assert run(place, {0: B}) == [0]


def test_a_stranger_cannot_write_while_a_run_does(place: SandboxPlace) -> None:
    with place.open() as image:
        image.known("id", SIZE, CHUNK, full=False)
        with pytest.raises(CoriolisAzureError, match="LeaseIdMissing"):
            place.blob().write(0, b"x" * 512)


@pytest.mark.parametrize("part", ["os.vhd", "os.vhd.redo"])
def test_a_run_whose_lease_was_broken_stops_and_says_so(place: SandboxPlace, part: str) -> None:
    if part != "os.vhd":
        run(place, {})
    with place.open() as image:
        image.known("id", SIZE, CHUNK, full=False)
        image.intend(0, CHUNK)
        place.break_lease(part)
        with pytest.raises(DestinationFailed, match=r"os\.vhd") as error:
            image.write(0, A)
    assert "lease was broken" in error.value.remedy


@pytest.mark.parametrize(("lost", "name"), [("replica.json", "replica.json"), (".vm", "history.json")])
def test_a_run_that_lost_the_place_says_so_as_it_writes_about_the_replica(
    place: SandboxPlace, lost: str, name: str
) -> None:
    with place.folder() as folder:
        folder.keep_record(b"{}")
        place.break_lease(lost)
        place.blob(lost).lease(60)
        with pytest.raises(DestinationFailed, match=name.replace(".", r"\.")) as error:
            folder.keep_record(b"{}") if name == lost else folder.keep_document(name, b"{}")
    assert "lease was broken" in error.value.remedy


def leased(place: SandboxPlace) -> list[str]:
    return [
        blob.name for blob in place.storage.account(place.account).container("images").blobs() if blob.leased
    ]


@pytest.mark.parametrize("part", ["os.vhd.redo", "os.vhd.index"])
def test_a_part_that_cannot_be_deleted_is_not_left_leased(place: SandboxPlace, part: str) -> None:
    """A stranger's tool has taken a snapshot of it."""
    run(place, {0: A})
    with place.open() as image:
        image.known("id", SIZE, CHUNK, full=False)
        image.intend(0, CHUNK)
        snapshot = place.blob(part).take_snapshot({})
    for content in ({0: B}, {0: A}):
        with pytest.raises(DestinationFailed, match="SnapshotsPresent"):
            run(place, content)
        assert leased(place) == []
    snapshot.delete()
    run(place, {0: B})
    assert place.content(SIZE) == expected({0: B})


def test_a_draft_whose_size_is_lost_is_fetched_again(place: SandboxPlace) -> None:
    run(place, {0: A})
    run(place, {0: B}, die=1)
    place.died()
    redo = place.blob("os.vhd.redo")
    found = redo.find()
    assert found is not None
    redo.set_metadata({name: text for name, text in found.metadata.items() if name != "coriolis_size"})
    assert run(place, {0: B}) == [0]
    assert leased(place) == []


def test_what_a_lifecycle_rule_has_archived_is_named_with_the_way_back(
    azure: Sandbox, place: SandboxPlace
) -> None:
    run(place, {0: A})

    def archived(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "GET" and request.path.endswith("/os.vhd.manifest"):
            return Response(409, {"x-ms-error-code": "BlobArchived"})
        return answer(request)

    azure.intercept = archived
    with pytest.raises(DestinationFailed, match=r"os\.vhd\.manifest") as error:
        run(place, {0: B})
    assert "set-tier" in error.value.remedy
    azure.intercept = None
    assert place.content(SIZE) == expected({0: A})


def test_a_strangers_change_between_two_runs_is_never_written_over_unasked(place: SandboxPlace) -> None:
    run(place, {0: A, 9: B})
    place.blob().write(9 * CHUNK, b"x" * 512)
    changed = place.whole()
    with pytest.raises(InvalidInput, match=r"somebody else changed .*os\.vhd") as error:
        run(place, {0: A, 9: B})
    assert "--full" in error.value.remedy
    assert place.whole() == changed
    assert {0, 9} <= set(run(place, {0: A, 9: B}, full=True))
    assert place.content(SIZE) == expected({0: A, 9: B})


@pytest.mark.parametrize(
    "left", [{}, {"coriolis_dirty": "%%"}, {"coriolis_dirty": "AAAA", "coriolis_region": "1048576"}]
)
def test_what_a_dead_run_of_an_earlier_build_has_left_is_read_as_a_whole(
    place: SandboxPlace, left: dict[str, str]
) -> None:
    """It wrote the VHD itself, and its metadata said where."""
    run(place, {0: A, 9: B})
    place.scribble(0, B)
    blob = place.blob()
    found = blob.find()
    assert found is not None
    blob.set_metadata({**found.metadata, "coriolis_state": "writing", **left})
    assert run(place, {0: A, 9: B}) == [0]
    assert place.content(SIZE) == expected({0: A, 9: B})


def test_a_blob_of_somebody_else_is_left_as_it_is(place: SandboxPlace) -> None:
    run(place, {0: A})
    place.blob().delete()
    place.blob().create_pages(MIB, {"owner": "somebody"})
    with pytest.raises(InvalidInput, match="was not made by this program"):
        run(place, {0: A}, full=True)
    place.blob().delete()
    place.blob().put(b"text")
    with pytest.raises(InvalidInput, match="is not a page blob"):
        run(place, {0: A})
    assert place.blob().text() == b"text"


def test_the_replica_of_another_vm_is_not_written_over(place: SandboxPlace) -> None:
    with place.folder() as folder:
        folder.claim("/subscriptions/s/vm-1")
    with place.folder() as folder:
        folder.claim("/SUBSCRIPTIONS/s/vm-1")
        with pytest.raises(InvalidInput, match="another VM: /subscriptions/s/vm-1"):
            folder.claim("/subscriptions/s/vm-2")


# Dying anywhere


@pytest.mark.parametrize(
    ("then", "arrives"),
    [(SIZE, False), (SIZE, True), (SIZE + MIB, True), (MIB, True)],
    ids=["lost", "arrived", "grown", "shrunk"],
)
def test_dying_at_any_request_never_makes_a_wrong_replica(
    azure: Sandbox, place: SandboxPlace, then: int, arrives: bool
) -> None:
    """The source goes back to what it was: what the dead run wrote must not be taken for that."""
    first, second = {0: A, 1: B, 20: A, 31: A}, {0: B, 2: A, 20: B, 31: A, 40: B}
    fits = {index: data for index, data in second.items() if index * CHUNK < then}
    again = {index: data for index, data in first.items() if index * CHUNK < SIZE}
    at, died = 0, True
    while died:
        at += 1
        place.prefix = f"replicas/at-{at}"
        run(place, again)
        count, died = 0, False

        def dying(request: Request, answer: Callable[[Request], Response], at: int = at) -> Response:
            nonlocal count, died
            if "repeat" in threading.current_thread().name:  # the one that renews leases is not counted
                return answer(request)
            count += request.method in {"PUT", "DELETE"}
            if died or count == at:
                if not died and arrives:
                    answer(request)
                died = True
                raise Died
            return answer(request)

        azure.intercept = dying
        try:
            run(place, fits, size=then)
        except Died:
            pass
        finally:
            azure.intercept = None
        place.died()
        run(place, again)
        assert place.content(SIZE) == expected(again), f"wrong after dying at request {at}"
        assert vhd.content_size(place.whole()[-512:], len(place.whole()), "it") == 3 * MIB
    assert at > 10


# Bad input


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("blob://", "valid name of a storage account"),
        ("blob://Account/container/x", "valid name of a storage account"),
        ("blob://sandboxstorage", "valid name of a container"),
        ("blob://sandboxstorage/UPPER/x", "valid name of a container"),
        ("blob://sandboxstorage/a--b/x", "valid name of a container"),
        ("blob://sandboxstorage/ab/x", "valid name of a container"),
        ("blob://sandboxstorage/images//x", "prefix of blob names"),
        ("blob://sandboxstorage/images/a/../x", "prefix of blob names"),
        ("blob://nosuchaccount/images/x", "no storage account nosuchaccount in resource group sandbox"),
    ],
)
def test_a_url_that_names_no_place_is_refused_in_clear_words(
    place: SandboxPlace, url: str, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words) as error:
        places.open(url, silent, place.storage)
    assert error.value.remedy


def test_without_a_connection_blob_storage_is_not_reached() -> None:
    with pytest.raises(InvalidInput, match="is in Azure"):
        places.open("blob://sandboxstorage/images/x", silent)


def test_a_container_that_is_missing_holds_no_replica_and_a_reader_does_not_make_it(
    place: SandboxPlace,
) -> None:
    """The first run makes it, so before that a plan has to find nothing there."""
    for _ in range(2):
        with pytest.raises(NoReplica, match="there is no replica at "):
            places.open("blob://sandboxstorage/missing/web", silent, place.storage, existing=True)


def test_an_account_of_another_resource_group_is_found_and_named(place: SandboxPlace) -> None:
    elsewhere = Storage(place.azure, "production", Clock())
    with pytest.raises(InvalidInput, match="is in resource group sandbox, not in production") as error:
        elsewhere.account("sandboxstorage")
    assert "set resource_group to sandbox" in error.value.remedy


def spoiled(azure: Sandbox, **properties: object) -> None:
    azure.storage.resource("sandboxstorage").properties.update(properties)


def test_account_keys_are_used_only_when_asked_for(azure: Sandbox, place: SandboxPlace) -> None:
    azure.permissions[:] = [{"actions": ["*"], "notActions": []}]  # an owner without a data role
    with pytest.raises(Denied, match="AuthorizationPermissionMismatch") as error:
        run(place, {0: A})
    assert "Storage Blob Data Contributor" in error.value.remedy
    assert not any(path.endswith("/listKeys") for _, path in azure.requests)
    place.storage = Storage(place.azure, "sandbox", Clock(), by_key=True)
    run(place, {0: A})
    assert place.content(SIZE) == expected({0: A})


def test_an_account_that_takes_no_keys_says_so(azure: Sandbox, place: SandboxPlace) -> None:
    spoiled(azure, allowSharedKeyAccess=False)
    run(place, {0: A})
    place.storage = Storage(place.azure, "sandbox", Clock(), by_key=True)
    with pytest.raises(Denied, match="KeyBasedAuthenticationNotPermitted") as error:
        run(place, {0: A})
    assert "storage_use_account_key" in error.value.remedy


def test_a_firewall_that_keeps_us_out_is_named(azure: Sandbox, place: SandboxPlace) -> None:
    spoiled(azure, networkAcls={"defaultAction": "Deny"})
    with pytest.raises(Denied, match=r"sandboxstorage/images.*AuthorizationFailure") as error:
        run(place, {0: A})
    assert "firewall" in error.value.remedy


def test_an_immutable_container_keeps_what_it_has(azure: Sandbox, place: SandboxPlace) -> None:
    run(place, {0: A})
    before = place.whole()
    azure.storage.account("sandboxstorage").containers["images"].immutable = True
    with pytest.raises(CoriolisAzureError, match="BlobImmutableDueToPolicy") as error:
        run(place, {0: B})
    assert "immutab" in error.value.remedy
    azure.storage.account("sandboxstorage").containers["images"].immutable = False
    place.died()
    assert place.whole()[:SIZE] == before[:SIZE]


# Speed


def test_reading_a_part_is_one_request(azure: Sandbox, place: SandboxPlace) -> None:
    """The library would list all pages of the blob each time."""
    run(place, dict.fromkeys(range(8), A))
    azure.requests.clear()
    with place.open() as image:
        image.known("id", SIZE, CHUNK, full=False)
        azure.requests.clear()
        for index in range(8):
            image.read(index * CHUNK, CHUNK)
    assert [path for method, path in azure.requests if method == "GET"] == [f"/{OS}"] * 8


def test_the_pages_of_a_large_blob_are_listed_window_by_window(
    azure: Sandbox, place: SandboxPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies across two windows is there, and so is what an answer had no room for."""
    run(place, {0: A, 3: B, 15: A, 16: B, 30: A})
    monkeypatch.setattr("coriolis_azure.azure.blobs.WINDOW", MIB)
    azure.storage.page_ranges(1)
    pages = place.blob().pages(3 * MIB)
    held = [(offset // CHUNK, length // CHUNK) for offset, length in pages.within(0, 3 * MIB)]
    assert held == [(0, 1), (3, 1), (15, 2), (30, 1)]
    assert pages.is_empty(4 * CHUNK, 11 * CHUNK)


def test_a_busy_service_is_asked_again_within_seconds(
    azure: Sandbox, place: SandboxPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would wait for fifteen and more."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    busy = 2

    def refusing(request: Request, answer: Callable[[Request], Response]) -> Response:
        nonlocal busy
        if request.query.get("comp") == "page" and busy:
            busy -= 1
            return Response(503, {"x-ms-error-code": "ServerBusy"})
        return answer(request)

    azure.intercept = refusing
    run(place, {0: A})
    assert place.content(SIZE) == expected({0: A})
    assert len(slept) >= 2
    assert max(slept) < 10


def test_no_account_key_and_no_signature_made_with_it_gets_into_a_log(
    azure: Sandbox,
    connect: Callable[..., Source],
    image: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A whole run into a container, by key, at DEBUG."""
    azure.add_vm("web", image("os", 1 << 20))
    source, secrets = connect({"storage_use_account_key": True}), set()

    def learn(request: Request, answer: Callable[[Request], Response]) -> Response:
        kind, _, rest = (request.header("Authorization") or "").partition(" ")
        if kind == "SharedKey":
            secrets.add(rest.partition(":")[2])
        return answer(request)

    azure.intercept = learn
    with caplog.at_level("DEBUG"):
        source.replicate("web", "blob://sandboxstorage/images/web")
    assert len(secrets) > 5
    secrets.add(source.storage.account("sandboxstorage")._key)
    assert len(caplog.records) > 100
    assert [secret for secret in secrets if secret in caplog.text] == []


def test_a_signed_url_outlives_the_copy_it_is_for(place: SandboxPlace) -> None:
    """The one use of a SAS: nothing that is read or written directly ends with one."""
    run(place, {0: A})
    account, clock = place.storage.account("sandboxstorage"), Clock()
    (expires,) = parse_qs(urlsplit(account.readable_url(place.blob(), clock)).query)["se"]
    ends = datetime.strptime(expires, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    longest = timedelta(seconds=blobs._COPY_SECONDS)
    assert longest < ends - clock.now() < longest + timedelta(hours=2)


@pytest.mark.parametrize(
    ("version", "users", "requests"),
    [
        ("2025-05-05", 0, 0),
        ("2025-07-05", 2, 0),
        ("2026-02-06", 2, 0),
        ("2026-04-06", 2, 2),
        ("2026-10-06", 2, 2),
    ],
)
def test_a_url_may_be_signed_in_any_version_of_the_service(
    azure: Sandbox, place: SandboxPlace, version: str, users: int, requests: int
) -> None:
    """The package signs in the newest that it knows; each that we take is of another. Later ones sign more fields."""
    run(place, {0: A})
    moments = datetime.now(timezone.utc), datetime.now(timezone.utc) + timedelta(hours=1)
    key = place.storage.account("sandboxstorage")._service.get_user_delegation_key(*moments)
    url = urlsplit(place.blob().url)
    fields: dict[str, Any] = {
        **{"sp": "r", "st": "", "se": f"{moments[1]:%Y-%m-%dT%H:%M:%SZ}", "": f"/blob{url.path}"},
        **{
            "skoid": key.signed_oid,
            "sktid": key.signed_tid,
            "skt": key.signed_start,
            "ske": key.signed_expiry,
        },
        **{"sks": key.signed_service, "skv": key.signed_version},
    }

    def answered(users: int, requests: int) -> int:
        between = ["", "", "", *[""] * users, "", "", version, "b", "", "", *[""] * requests]
        text = "\n".join([*fields.values(), *between, "", "", "", "", ""])
        signed = hmac.new(base64.b64decode(str(key.value)), text.encode(), "sha256").digest()
        shown = {name: value for name, value in fields.items() if name and value}
        query = urlencode({**shown, "sv": version, "sr": "b", "sig": base64.b64encode(signed).decode()})
        return azure.handle(
            Request("GET", f"{place.blob().url}?{query}", {"x-ms-version": "2020-04-08"}, b"")
        ).status

    assert answered(users, requests) == 200
    assert answered(2 - users, 2 - requests) == 403


def test_no_signed_url_gets_into_a_log(
    azure: Sandbox, place: SandboxPlace, caplog: pytest.LogCaptureFixture
) -> None:
    run(place, {0: A})
    account = place.storage.account("sandboxstorage")
    with caplog.at_level("DEBUG"):
        secret = account.readable_url(place.blob(), Clock()).partition("sig=")[2]
        copy = account.container("images").blob("copy.vhd")
        copy._client.start_copy_from_url(account.readable_url(place.blob(), Clock()))
        copy.copy_from(place.blob(), {}, Clock())
    assert secret
    copied, original = copy.find(), place.blob().find()
    assert copied is not None
    assert original is not None
    assert copied.size == original.size
    # As a whole it might be there with another way to write what is between the %.
    assert max(secret.split("%"), key=len) not in caplog.text
    assert "sig=" not in caplog.text.replace("sig=REDACTED", "").replace("sig=*****", "")
