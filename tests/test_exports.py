"""The mechanism `snapshots`: disks are read from their snapshots through signed URLs; nothing else is created."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coriolis_azure import errors
from coriolis_azure.azure import permissions
from coriolis_azure.azure.sas import Sas, masked
from coriolis_azure.events import Event, Notice
from coriolis_azure.machine import cloning, exports
from coriolis_azure.run.journal import Journal
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.command_line import run
from harness.constants import MIB

Image = Callable[..., Path]
Connect = Callable[..., Source]
SNAPSHOTS = {"replica_export_mechanism": "snapshots"}
SMALL_ROLE = permissions.role({permissions.EXPORT, permissions.SHUTDOWN}, ["/"])["Actions"]
# Azure, and the sandbox, tell everybody what they may do.
MISSED = [action for action in SMALL_ROLE if action != "Microsoft.Authorization/permissions/read"]


class Watched:
    """Counts the requests to Azure by method and path; `before` may answer one itself."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.before: Callable[[Request], Response | None] = lambda request: None

    def __call__(self, request: Request, answer: Callable[[Request], Response]) -> Response:
        self.requests.append((request.method, request.path.lower()))
        return self.before(request) or answer(request)

    def created(self) -> set[str]:
        """The types of what was created."""
        return {
            path.split("/")[7] for method, path in self.requests if method == "PUT" and path.count("/") == 8
        }


@pytest.fixture
def watched(azure: Sandbox) -> Watched:
    azure.intercept = watched = Watched()
    return watched


def test_two_runs_create_snapshots_only_and_read_allocated_pages_only(
    azure: Sandbox, connect: Connect, image: Image, watched: Watched, tmp_path: Path
) -> None:
    os_disk, data, to = (
        image("os", 5 * MIB + 512, seed=1),
        image("data", 3 * MIB, seed=2),
        tmp_path / "images",
    )
    for disk in (os_disk, data):
        with disk.open("r+b") as file:
            file.truncate(8 * MIB)  # a hole: pages that were never written
    azure.add_vm("web", os_disk, [data])
    source, before = connect(environment=SNAPSHOTS), azure.resources()

    first = source.replicate("web", to)
    assert watched.created() == {"snapshots"}
    assert (to / "os.raw").read_bytes() == os_disk.read_bytes()
    assert (to / "data-0.raw").read_bytes() == data.read_bytes()
    assert first.mechanism == "snapshots"
    assert all(disk.full and disk.verified for disk in first.disks)
    assert [disk.read_bytes // MIB for disk in first.disks] == [5, 3]

    content = bytearray(data.read_bytes())
    content[2 * MIB + 4096 : 2 * MIB + 8192] = random.Random(3).randbytes(4096)
    data.write_bytes(content)
    azure.write("web", 0, data)
    second = source.replicate("web", to)
    assert (to / "data-0.raw").read_bytes() == data.read_bytes()
    assert [disk.sent_bytes > 0 for disk in second.disks] == [False, True]
    for report in (*first.disks, *second.disks):
        assert report.sent_bytes + report.zero_bytes + report.skipped_bytes == report.size_bytes
    assert azure.resources() == before
    assert first.left_behind == second.left_behind == ()


def test_pages_that_lie_near_are_read_in_one_request(
    azure: Sandbox, connect: Connect, watched: Watched, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.raw"
    empty.touch()
    os.truncate(empty, 4 * MIB)
    azure.add_vm("web", empty)
    source = connect(environment=SNAPSHOTS)
    disk = azure.disk(source.inspect("web").disks[0].id)
    for page in range(0, 64, 2):
        disk.write(page * 4096, b"x" * 512)
    disk.write(3 * MIB, b"y" * 512)
    (report,) = source.replicate("web", tmp_path / "images").disks
    assert (tmp_path / "images/os.raw").read_bytes() == disk.path.read_bytes()
    reads = [path for method, path in watched.requests if method == "GET" and path.endswith("/abcd")]
    assert len(reads) == 1 + 2  # the list of pages, two ranges
    assert report.read_bytes == 62 * 4096 + 512 + 512


@pytest.mark.slow
@pytest.mark.parametrize("order", [("worker", "snapshots"), ("snapshots", "azure_worker")], ids=" then ".join)
def test_each_mechanism_goes_on_with_the_replica_of_the_other(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, order: tuple[str, str]
) -> None:
    disk = image("os", 3 * MIB, seed=1)
    azure.add_vm("web", disk)
    first, second = (
        connect(environment={"replica_export_mechanism": mechanism}).replicate("web", tmp_path / "images")
        for mechanism in order
    )
    assert (tmp_path / "images/os.raw").read_bytes() == disk.read_bytes()
    assert second.disks[0].sent_bytes == 0
    assert second.disks[0].root == first.disks[0].root


@pytest.mark.parametrize("sign", ["error", "interrupt"])
def test_a_run_that_fails_ends_the_access_to_its_snapshots(
    azure: Sandbox, connect: Connect, image: Image, watched: Watched, tmp_path: Path, sign: str
) -> None:
    azure.add_vm("web", image("os", seed=1), [image("data", seed=2)])
    before = azure.resources()

    def fail(request: Request) -> Response | None:
        if request.query.get("comp") == "pagelist":
            raise KeyboardInterrupt if sign == "interrupt" else errors.DestinationFailed("provoked")
        return None

    watched.before = fail
    with pytest.raises((KeyboardInterrupt, errors.CoriolisAzureError)):
        connect(environment=SNAPSHOTS).replicate("web", tmp_path / "images")
    assert azure.resources() == before
    assert sum(path.endswith("/endgetaccess") for _, path in watched.requests) == 2


@pytest.mark.slow
def test_the_small_role_is_enough_for_the_whole_job(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os", seed=1), spec=VmSpec())
    writes = [action for action in SMALL_ROLE if action.endswith(("/write", "/delete"))]
    assert writes == ["Microsoft.Compute/snapshots/delete", "Microsoft.Compute/snapshots/write"]
    azure.permissions[:] = [{"actions": SMALL_ROLE, "notActions": []}]
    source, before = connect(environment={**SNAPSHOTS, "keep_baseline": True}), len(azure.resources())
    assert source.check("web", strict=True, pool=False).ok
    for _ in range(3):  # the third one reads from a list
        source.replicate("web", tmp_path / "images")
    assert len(azure.resources()) == before + 1
    connect(environment=SNAPSHOTS).replicate("web", tmp_path / "images", shutdown=True)
    assert len(azure.resources()) == before


@pytest.mark.slow
@pytest.mark.parametrize("missing", MISSED)
def test_each_action_of_the_small_role_is_missed_by_name(
    azure: Sandbox, connect: Connect, image: Image, missing: str
) -> None:
    azure.add_vm("web", image("os", seed=1))
    left = [action for action in SMALL_ROLE if action != missing]
    azure.permissions[:] = [{"actions": left, "notActions": []}]
    checked = connect(environment={**SNAPSHOTS, "keep_baseline": True}).check("web", strict=True, pool=False)
    assert not checked.ok
    assert any(missing in finding.text for finding in checked.errors)


def test_a_snapshot_of_a_dead_run_is_closed_before_it_is_deleted(
    azure: Sandbox, connect: Connect, image: Image, watched: Watched, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os", seed=1))
    source, before = connect(environment=SNAPSHOTS), azure.resources()
    run = source.new_run(source.inspect("web"))
    with Journal(run, None) as journal:
        resources = source.resources(run, journal)
        machine = source.inspect("web")
        taken = cloning.snapshot_all(
            resources, machine.disks, source.context.report, source.context.clock, exported=lambda _: "yes"
        )
        source.azure.grant_read(taken["os"]["id"], 3600)
    assert source.finish(run) == []
    assert azure.resources() == before


@pytest.mark.slow
@pytest.mark.parametrize("strangers", [4, 5])
def test_a_family_full_of_other_peoples_urls(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, strangers: int
) -> None:
    """Azure lets five snapshots of a disk be read at a time. With four taken, there is no room for the baseline."""
    disk = image("os", seed=1)
    azure.add_vm("web", disk)
    source = connect(environment={**SNAPSHOTS, "keep_baseline": True})
    for _ in range(2):
        source.replicate("web", tmp_path / "images")
    (os_disk,) = source.inspect("web").disks
    group = os_disk.id.rpartition("/disks/")[0]
    for number in range(strangers):
        id = f"{group}/snapshots/backup-{number}"
        creation = {"createOption": "Copy", "sourceResourceId": os_disk.id}
        body = {"location": "westeurope", "properties": {"creationData": creation, "incremental": True}}
        source.azure.put(id, body)
        source.azure.grant_read(id, 3600)
    before = azure.resources()
    azure.disk(os_disk.id).write(0, b"changed" * 512)
    if strangers == 5:
        with pytest.raises(errors.AzureError, match="active shared access signature") as caught:
            source.replicate("web", tmp_path / "images")
        assert caught.value.remedy
        assert azure.resources() == before
        return
    (report,) = source.replicate("web", tmp_path / "images").disks
    assert (tmp_path / "images/os.raw").read_bytes() == azure.disk(os_disk.id).path.read_bytes()
    assert report.tier == "allocated"
    assert "active shared access signature" in report.reason
    assert len(azure.resources()) == len(before)


def test_a_policy_that_closes_snapshots_ends_the_run_with_nothing_left(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os", seed=1))
    before = azure.resources()
    azure.faults.add("network-policy", times=0)
    with pytest.raises(errors.AzureError, match="DenyAll") as caught:
        connect(environment=SNAPSHOTS).replicate("web", tmp_path / "images")
    assert caught.value.remedy
    assert azure.resources() == before


@pytest.mark.slow
def test_a_baseline_that_cannot_be_deleted_is_named(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, told: list[Event]
) -> None:
    """Somebody has locked it, or made it immutable. The replica is right, and the next run goes on."""
    azure.add_vm("web", image("os", seed=1))
    source = connect(environment={**SNAPSHOTS, "keep_baseline": True})
    source.replicate("web", tmp_path / "images")
    (locked,) = [each["id"] for each in azure.resources() if each["type"].endswith("/snapshots")]
    azure.faults.add("lock", path=locked.rpartition("/")[2], times=0)
    disk = azure.disk(source.inspect("web").disks[0].id)
    for number in (1, 2):
        disk.write(number * 4096, b"changed" * 512)
        result = source.replicate("web", tmp_path / "images")
        assert (tmp_path / "images/os.raw").read_bytes() == disk.path.read_bytes()
        assert result.left_behind == ()  # it has an end date, and each run tries again
        notices = [event.text.lower() for event in told if isinstance(event, Notice)]
        assert sum(f"{locked.lower()} could not be deleted" in text for text in notices) == number
    azure.faults.clear()
    source.replicate("web", tmp_path / "images")
    snapshots = [each["id"] for each in azure.resources() if each["type"].endswith("/snapshots")]
    assert len(snapshots) == 1
    assert snapshots != [locked]


@pytest.mark.slow
def test_an_error_page_of_a_proxy_is_no_traceback(
    azure: Sandbox, connect: Connect, image: Image, watched: Watched, tmp_path: Path
) -> None:
    """XML without the words that the storage library looks for in an error."""
    disk = image("os", seed=1)
    azure.add_vm("web", disk)
    page = Response(403, {"Content-Type": "application/xml"}, b"<html><body>Denied by proxy</body></html>")
    watched.before = lambda request: page if request.query.get("comp") == "pagelist" else None
    (report,) = connect(environment=SNAPSHOTS).replicate("web", tmp_path / "images").disks
    assert (tmp_path / "images/os.raw").read_bytes() == disk.read_bytes()
    assert report.tier == "whole"
    watched.before = lambda request: page if request.path.endswith("/abcd") else None
    with pytest.raises(errors.Denied):
        connect(environment=SNAPSHOTS).replicate("web", tmp_path / "others")


def test_a_signed_url_is_shown_as_its_host() -> None:
    sas = Sas("https://md-1.z1.blob.storage.azure.net/c/abcd?sv=2018-03-28&sr=b&si=x&sig=S3cret%2B")
    assert "S3cret" not in f"{sas} {sas!r} {[sas]}"
    assert masked(f"url: {sas.url} (caused by)").endswith("&sig=... (caused by)")


@pytest.mark.parametrize(
    "place",
    [
        "http://sandbox.invalid",
        "https://example.net",
        "https://example.net\\@sandbox.invalid",
        "https:/",
        "https://[",
    ],
)
def test_a_signed_url_of_another_place_is_used_for_nothing(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, place: str
) -> None:
    """Neither in clear text, nor at a host that is not the cloud's, nor where it is no URL at all."""
    strange: list[str] = []

    def lie(request: Request, answer: Callable[[Request], Response]) -> Response:
        if not request.url.startswith("https://sandbox.invalid/"):
            strange.append(request.url)
        told = answer(request)
        return replace(
            told,
            body=told.body.replace(
                b"https://sandbox.invalid/md-", place.replace("\\", "\\\\").encode() + b"/md-"
            ),
        )

    azure.add_vm("web", image("os", seed=1))
    before = azure.resources()
    azure.intercept = lie
    with pytest.raises(errors.Unreadable, match="signed URL") as told:
        connect(environment=SNAPSHOTS).replicate("web", tmp_path / "images")
    assert strange == []
    assert "sig=" not in f"{told.value} {told.value.remedy}"
    assert azure.resources() == before


@pytest.mark.slow
def test_no_signature_is_in_a_log_or_file_of_a_run_over_https(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    done = run(
        *("replicate", *settings, "web", "--to", tmp_path / "images", "--mechanism", "snapshots", "-vv")
    )
    assert (tmp_path / "images/os.raw").read_bytes() == (served.parent / "os.raw").read_bytes()
    assert "sig=..." in done.stderr  # the library does log its requests
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".raw"]
    for text in (done.stdout.encode(), done.stderr.encode(), *files):
        assert not re.search(rb"sig=(?!\.\.\.)", text, re.IGNORECASE)


def test_a_list_that_times_out_is_asked_for_in_smaller_windows_and_not_again(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os", seed=1))
    source = connect(environment=SNAPSHOTS)
    context, machine = source.context, source.inspect("web")
    run = source.new_run(machine)
    with Journal(run, None) as journal:
        taken = cloning.snapshot_all(
            source.resources(run, journal),
            machine.disks,
            context.report,
            context.clock,
            exported=lambda _: "yes",
        )
        azure.faults.add("list-timeout", about="list", times=0)
        asked = len(azure.requests)
        with (
            exports.opened(context, machine.disks, taken) as contents,
            pytest.raises(errors.AzureError, match="OperationTimedOut"),
        ):
            contents["os"].pages()
    lists = [path for _, path, *_ in list(azure.requests)[asked:] if path.startswith("/md-")]
    assert len(lists) == 8  # from 128 GiB down to 1 GiB
    assert source.finish(run) == []
