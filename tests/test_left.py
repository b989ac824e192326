"""Policies, locks, stale answers and other hosts: nothing that a run has made is forgotten, or waited for in vain."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import pytest

from coriolis_azure import errors
from coriolis_azure.azure import names
from coriolis_azure.clock import boot_id
from coriolis_azure.events import Event, Notice
from coriolis_azure.model import Run
from coriolis_azure.run import cleanup, journal, resources
from coriolis_azure.run.journal import Journal
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.clocks import Held
from harness.late_answers import NSG, Later

Image = Callable[..., Path]
Answer = Callable[[Request], Response]


@pytest.fixture
def clock() -> Later:
    """What is waited for passes at once."""
    return Later()


@pytest.fixture
def run(source: Source) -> Run:
    return Run(names.new_run(), source.azure.subscription, "sandbox", "westeurope", "", "web")


def retagged(
    change: Callable[[str], dict[str, str]], kind: str = ""
) -> Callable[[Request, Answer], Response]:
    """A policy that changes each of our tags."""

    def intercept(request: Request, answer: Answer) -> Response:
        if request.method in {"PUT", "PATCH"} and b"coriolis-run" in request.body and kind in request.path:
            body = json.loads(request.body)
            tags = body["tags"].items()
            body["tags"] = {new: value for name, value in tags for new in change(name)}
            request = Request(request.method, request.url, request.headers, json.dumps(body).encode())
        return answer(request)

    return intercept


@pytest.mark.slow
def test_names_of_tags_have_no_case(azure: Sandbox, source: Source, image: Image, tmp_path: Path) -> None:
    azure.add_vm("web", image("os"))
    before = azure.resources()
    azure.intercept = retagged(lambda name: {name.title(): ""})
    assert source.replicate("web", tmp_path / "images").left_behind == ()
    assert azure.resources() == before


def test_signs_of_life_replace_one_another_whatever_their_case(
    azure: Sandbox, source: Source, run: Run
) -> None:
    made = resources.Resources(source.azure, run, Journal(run), {"Owner": "Ann"}, Later())
    azure.intercept = retagged(lambda name: {name.upper(): ""})
    id = made.create("nsg", "nsg", NSG)["id"]
    azure.intercept = None
    for _ in range(2):
        made.show_life()
    tags = source.azure.get(id)["tags"]
    assert len({name.lower() for name in tags}) == len(tags) == 6
    assert source.sweep(timedelta(0))[1] == []
    assert source.azure.find(id) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["snapshots", "virtualMachines"])
def test_what_has_lost_its_tags_is_left_behind_and_never_forgotten(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path, kind: str
) -> None:
    azure.add_vm("web", image("os"))
    azure.intercept = retagged(lambda name: {}, f"/{kind}/coriolis")
    left = source.replicate("web", tmp_path / "images").left_behind
    azure.intercept = None
    assert f"/{kind}/" in left[0]
    told: list[Event] = []
    source.context = replace(source.context, report=told.append)
    for _ in range(2):  # of every clean-up, until somebody has deleted it
        assert source.sweep(timedelta(hours=2))[1][0] == left[0]
        assert source.azure.find(left[0]) is not None
    assert not [event for event in told if isinstance(event, Notice) and "had left" in event.text]
    source.azure.delete(left[0])
    assert source.sweep(timedelta(hours=2))[1] == []
    assert source.sweep(timedelta(0)) == ([], [])
    assert not list((tmp_path / "state/coriolis-azure").iterdir())


def test_without_a_journal_its_name_tells_what_has_lost_its_tags(
    azure: Sandbox, source: Source, run: Run
) -> None:
    made = source.resources(run, Journal(run))
    id = made.create("nsg", "nsg", NSG)["id"]
    source.azure.tag(id, {})
    assert [names.name_of(left) for left in source.finish(run)] == [names.name_of(id)]
    assert source.azure.find(id) is not None


def test_of_two_runs_whose_ids_a_policy_has_rewritten_each_deletes_its_own(source: Source, run: Run) -> None:
    other = replace(run, id=names.new_run())
    ids = [source.resources(each, Journal(each)).create("nsg", "nsg", NSG)["id"] for each in (run, other)]
    for id in ids:
        source.azure.tag(id, names.retagged(source.azure.get(id), {names.RUN_TAG: "redacted"}))
    assert source.finish(run) == []
    assert [source.azure.find(id) is not None for id in ids] == [False, True]


@pytest.mark.parametrize("name", [f"coriolis-{'0123456789abcdef'[:length]}-nsg" for length in (8, 12, 16)])
def test_what_a_run_a_pool_or_a_record_has_made_is_told_by_its_name(source: Source, name: str) -> None:
    id = names.resource_id(source.azure.subscription, "sandbox", "nsg", name)
    source.azure.put(id, {**NSG, "location": "westeurope"})
    assert source.untagged() == [id]


@pytest.mark.slow
def test_a_locked_worker_costs_no_patience_though_its_disk_has_its_tags(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path, clock: Held
) -> None:
    azure.add_vm("web", image("os"))
    azure.faults.add("lock", path="/virtualMachines/coriolis", times=0)
    left = source.replicate("web", tmp_path / "images").left_behind
    assert clock.monotonic() < 60
    disks = [each for each in azure.resources() if "worker" in each["id"] and "/disks/" in each["id"]]
    assert {tag.lower() for tag in disks[0]["tags"]} >= {names.RUN_TAG, names.ROLE_TAG}
    assert len({id.lower() for id in left}) == len(left)
    azure.faults.clear()
    assert source.sweep(timedelta(0))[1] == []


HOLDERS = {"vm": {"disk", "nic"}, "nic": {"ip", "nsg", "vnet"}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOLDERS)
def test_what_is_held_by_a_stranger_is_told_with_its_holder_and_not_waited_for(
    azure: Sandbox,
    source: Source,
    image: Image,
    clock: Held,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """The worker or its NIC is somebody else's: it lacks our tags. No waiting makes it let go."""
    azure.add_vm("web", image("os"))
    run, _ = source.prepare("web")
    (holder,) = (made["id"] for made in source.azure.resources(kind, run.group) if run.id in made["id"])
    source.azure.tag(holder, {})
    begun = clock.monotonic()
    held = {names.kind_of(id): id.lower() for id in source.sweep(timedelta(0))[1]}
    assert clock.monotonic() - begun < 60
    assert held.keys() >= HOLDERS[kind]
    for each in HOLDERS[kind]:
        words = f"could not delete {held[each]}: it is held by {holder}, which is not ours"
        assert words.lower() in caplog.text.lower()


def test_strangers_that_come_to_hold_what_is_ours_are_named_too(
    azure: Sandbox, source: Source, run: Run, image: Image, clock: Held, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that somebody's VM has got, a firewall in front of somebody's subnet, a network that it is in."""
    web = azure.add_vm("web", image("os"))
    made = source.resources(run, Journal(run))
    disk = made.create(
        "disk", "os", {"properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}}
    )
    entry = {"lun": 7, "createOption": "Attach", "managedDisk": {"id": disk["id"]}}
    source.azure.patch_vm(web, {"properties": {"storageProfile": {"dataDisks": [entry]}}})
    nsg = made.create("nsg", "nsg", NSG)
    vnet = names.resource_id(run.subscription, run.group, "vnet", "theirs")
    subnet = {"addressPrefix": "10.9.0.0/24", "networkSecurityGroup": {"id": nsg["id"]}}
    space = {"addressPrefixes": ["10.9.0.0/24"]}
    properties = {"addressSpace": space, "subnets": [{"name": "default", "properties": subnet}]}
    source.azure.put(vnet, {"location": run.location, "properties": properties})
    assert len(source.sweep(timedelta(0))[1]) == 2
    assert clock.monotonic() < 60
    for id, holder in ((disk["id"], web), (nsg["id"], vnet)):
        words = f"could not delete {id}: it is held by {holder}, which is not ours"
        assert words.lower() in caplog.text.lower()
    source.azure.delete(vnet)
    source.azure.patch_vm(web, {"properties": {"storageProfile": {"dataDisks": []}}})
    assert source.sweep(timedelta(0))[1] == []


@pytest.mark.parametrize("level", ["ReadOnly", "CanNotDelete"])
def test_a_lock_on_the_group_stops_a_run_before_it_makes_anything(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path, level: str
) -> None:
    azure.add_vm("web", image("os"))
    group = f"/subscriptions/{source.azure.subscription}/resourceGroups/sandbox"
    lock = f"{group}/providers/Microsoft.Authorization/locks/l"
    body = json.dumps({"properties": {"level": level}}).encode()

    def locked(request: Request, answer: Answer) -> Response:
        assert request.method == "GET" or "/subscriptions/" not in request.path, "something is made"
        if request.path.endswith("/locks"):
            return Response.of(200, {"value": [{"id": lock, "name": "l", **json.loads(body)}]})
        return answer(request)

    azure.intercept = locked
    acts: list[Callable[[], object]] = [
        lambda: source.replicate("web", tmp_path / "images"),
        lambda: source.prepare("web"),
    ]
    for act in acts:
        with pytest.raises(errors.InvalidInput, match="the lock l"):
            act()
    assert not (tmp_path / "images").exists()


def test_a_worker_of_a_pool_that_is_locked_keeps_nothing_alive_but_the_disks_attached_to_it(
    azure: Sandbox, source: Source, run: Run, image: Image, clock: Held, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in the clean-up of the run nor in a sweep, which every other run begins with."""
    pooled = azure.add_vm("pooled", image("os"))
    source.azure.tag(pooled, {names.POOL_TAG: "pool"})
    made = source.resources(run, Journal(run))
    empty = {"properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}}
    disk = made.create("disk", "clone", empty)["id"]
    entry = {"lun": 3, "createOption": "Attach", "managedDisk": {"id": disk}}
    source.azure.patch_vm(pooled, {"properties": {"storageProfile": {"dataDisks": [entry]}}})
    azure.faults.add("lock", method="PATCH", path="/virtualMachines/pooled", times=0)
    cleans: list[Callable[[], list[str]]] = [
        lambda: source.sweep(timedelta(0))[1],
        lambda: source.finish(run),
    ]
    for clean in cleans:
        nsg = made.create("nsg", "nsg", NSG)["id"]
        assert [id.lower() for id in clean()] == [disk.lower()]
        assert source.azure.find(nsg) is None
    assert clock.monotonic() < 60
    assert f"could not detach {disk}".lower() in caplog.text.lower()
    azure.faults.clear()
    assert source.sweep(timedelta(0))[1] == []


# Stale and busy answers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["networkInterfaces", "virtualMachines", "snapshots"])
def test_a_stale_not_found_in_the_clean_up_costs_nothing(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path, clock: Held, kind: str
) -> None:
    azure.add_vm("web", image("os"))
    before = azure.resources()
    stale: list[str] = []

    def forgetful(request: Request, answer: Answer) -> Response:
        is_it = f"/{kind}/coriolis" in request.path
        if is_it and request.method == "DELETE":
            assert stale, "asked for before it is deleted"
        if is_it and request.method == "GET" and source_is_done and not stale:
            stale.append(request.path)
            return Response.of(404, {"error": {"code": "ResourceNotFound", "message": "not found"}})
        return answer(request)

    source_is_done: list[bool] = []

    def report(event: Event) -> None:
        if "clean up" in str(event):
            source_is_done.append(True)

    source.context = replace(source.context, report=report)
    azure.intercept = forgetful
    assert source.replicate("web", tmp_path / "images").left_behind == ()
    assert stale
    assert clock.monotonic() < resources.PATIENCE_SECONDS
    assert azure.resources() == before


@pytest.mark.slow
def test_what_waiting_helps_ends_no_run(azure: Sandbox, source: Source, image: Image, tmp_path: Path) -> None:
    """Each kind is refused with one code after the other."""
    azure.add_vm("web", image("os"))
    before = azure.resources()
    for kind in ("snapshots", "networkInterfaces", "disks"):
        for status, code in (
            (409, "Conflict"),
            (409, "AnotherOperationInProgress"),
            (429, "RetryableErrorDueToAnotherOperation"),
            (404, "NotFound"),
        ):
            rule = {"method": "PUT", "path": f"/{kind}/coriolis", "status": status, "code": code}
            azure.faults.add("refuse", seconds=0.001, **rule)
    assert source.replicate("web", tmp_path / "images").left_behind == ()
    assert azure.resources() == before
    assert azure.faults.listed() == []


def test_that_the_subscription_is_unknown_does_not_mean_that_all_is_gone(
    azure: Sandbox, source: Source, run: Run
) -> None:
    id = source.resources(run, Journal(run)).create("nsg", "nsg", NSG)["id"]
    azure.faults.add("refuse", method="GET", status=404, code="SubscriptionNotFound", times=0)
    assert resources.delete(source.azure, [id], Later()) == [id]


# Journals that several hosts see


def begun_elsewhere(run: Run, folder: Path, **other: str) -> Path:
    with Journal(run, folder):
        path = folder / f"{run.id}.journal"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **other}), *rest, ""]))
    return path


@pytest.mark.parametrize(
    "other",
    [
        {"host": "elsewhere", "boot": "another"},
        {"boot": "an-earlier-one"},
        {"boot": ""},
        {"boot": boot_id()},
        {"boot": f"{boot_id()} 7"},
    ],
    ids=["host", "boot", "no boot", "no mount", "mount"],
)
def test_a_journal_of_another_host_boot_or_mount_tells_nothing_by_its_lock(
    source: Source, run: Run, tmp_path: Path, other: dict[str, str]
) -> None:
    """Hosts, and containers of one host, may share a home and not its locks: the run may live, so its age decides."""
    path = begun_elsewhere(run, tmp_path, **other)
    source.resources(run, Journal(run)).create("nsg", "nsg", NSG)
    assert list(journal.abandoned(tmp_path)) == []
    assert cleanup.sweep(source.context, timedelta(hours=2), tmp_path) == ([], [])
    found, _ = cleanup.sweep(replace(source.context, clock=Later(3)), timedelta(hours=2), tmp_path)
    assert [leftover.run for leftover in found] == [run.id]
    assert path.exists()


def test_a_dead_run_is_found_where_an_exclusive_lock_needs_the_right_to_write(
    source: Source, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: an exclusive lock of a file that is open for reading only is refused with EBADF."""
    real = fcntl.flock

    def lock(file: int | TextIO, how: int) -> None:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if how & fcntl.LOCK_EX and flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    with Journal(run, tmp_path) as kept:
        source.resources(run, kept).create("nsg", "nsg", NSG)
        assert list(journal.abandoned(tmp_path)) == []
    assert [dead.id for dead, _ in journal.abandoned(tmp_path)] == [run.id]
    assert [leftover.run for leftover in cleanup.sweep(source.context, timedelta(hours=2), tmp_path)[0]] == [
        run.id
    ]
    assert list(tmp_path.glob("*.journal")) == []


@pytest.mark.parametrize("code", [0, errno.ENOLCK])
def test_a_journal_that_was_never_locked_tells_nothing_by_its_lock(
    source: Source, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The file system says that it has locked and keeps nobody out, or its locks came up after the run had begun."""

    def unlocked(*arguments: object) -> None:
        if code:
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", unlocked)
        kept = Journal(run, tmp_path)
    with kept:
        source.resources(run, kept).create("nsg", "nsg", NSG)
        assert list(journal.abandoned(tmp_path)) == []
        assert cleanup.sweep(source.context, timedelta(hours=2), tmp_path) == ([], [])


@pytest.mark.parametrize("name", ["cores", "StandardSnapshotCount", "NetworkInterfaces"])
def test_a_used_up_quota_stops_a_run_before_it_makes_anything(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path, name: str
) -> None:
    azure.add_vm("web", image("os"))
    azure.quotas[name] = (100, 100)
    made = len([method for method, _ in azure.requests if method == "PUT"])
    acts: list[Callable[[], object]] = [
        lambda: source.replicate("web", tmp_path / "images"),
        lambda: source.prepare("web"),
    ]
    for act in acts:
        with pytest.raises(errors.InvalidInput, match="quota"):
            act()
    assert len([method for method, _ in azure.requests if method == "PUT"]) == made
    assert not (tmp_path / "images").exists()
