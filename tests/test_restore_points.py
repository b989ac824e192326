"""`consistency`: the disks of a running VM as a restore point of Azure, by whichever mechanism they are read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coriolis_azure import errors
from coriolis_azure.azure import names, permissions
from coriolis_azure.cli.commands import cli
from coriolis_azure.events import Event, Notice
from coriolis_azure.machine import restore_points
from coriolis_azure.run import cleanup
from coriolis_azure.run.journal import Journal
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.constants import MIB
from harness.deaths import Died, dying

Image = Callable[..., Path]
Connect = Callable[..., Source]
CRASH = {"replica_export_mechanism": "snapshots", "consistency": "crash"}
COLLECTIONS = "Microsoft.Compute/restorePointCollections"


@pytest.fixture
def disks(azure: Sandbox, image: Image) -> tuple[Path, Path]:
    """The disks of a running VM."""
    files = image("os", seed=1), image("data", seed=2)
    azure.add_vm("web", files[0], [files[1]])
    return files


def created(azure: Sandbox) -> set[str]:
    """The types of what was created."""
    return {path.split("/")[7] for method, path in azure.requests if method == "PUT" and path.count("/") == 8}


def notices(told: list[Event]) -> str:
    return "\n".join(event.text for event in told if isinstance(event, Notice))


def right(folder: Path, files: tuple[Path, Path]) -> bool:
    return all(
        (folder / f"{name}.raw").read_bytes() == file.read_bytes()
        for name, file in zip(("os", "data-0"), files, strict=True)
    )


def test_a_run_reads_a_restore_point_and_leaves_nothing(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path], tmp_path: Path
) -> None:
    before = azure.resources()
    azure.requests.clear()
    report = connect(environment=CRASH).replicate("web", tmp_path / "images")
    assert created(azure) == {"restorePointCollections"}
    assert right(tmp_path / "images", disks)
    assert azure.resources() == before
    assert report.left_behind == ()
    assert {disk.reason for disk in report.disks} == {
        "the disks of restore points are not compared with each other"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "consistency"),
    [("worker", "crash"), ("worker", "application"), ("hybrid", "crash"), ("auto", "crash")],
)
def test_a_worker_reads_copies_of_a_restore_point(
    azure: Sandbox,
    connect: Connect,
    disks: tuple[Path, Path],
    tmp_path: Path,
    mechanism: str,
    consistency: str,
) -> None:
    before = azure.resources()
    azure.requests.clear()
    settings = {"replica_export_mechanism": mechanism, "consistency": consistency, "keep_baseline": True}
    connect(environment=settings).replicate("web", tmp_path / "images")
    assert "snapshots" not in created(azure)
    assert right(tmp_path / "images", disks)
    assert azure.resources() == before


def test_all_disks_are_of_one_moment(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path], tmp_path: Path
) -> None:
    def writing(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == "PUT" and "/restorePoints/" in request.path:
            for disk in ("os", 0):
                azure.disk("web", disk).write(0, b"later" + bytes(507))
        return response

    azure.intercept = writing
    connect(environment=CRASH).replicate("web", tmp_path / "images")
    assert right(tmp_path / "images", disks)


def test_disks_that_are_left_out_are_left_out_of_the_restore_point(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path], tmp_path: Path
) -> None:
    bodies: list[bytes] = []

    def seen(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/restorePoints/" in request.path:
            bodies.append(request.body)
        return answer(request)

    azure.intercept = seen
    source = connect(environment={**CRASH, "exclude_disks": ["data-0"]})
    (report,) = source.replicate("web", tmp_path / "images").disks
    assert report.name == "os"
    assert source.inspect("web").disks[1].id.encode() in bodies[0]


def test_a_restore_point_that_is_less_than_was_asked_for_is_told(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path], told: list[Event], tmp_path: Path
) -> None:
    def weaker(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if "/restorePoints/" not in request.path:
            return response
        return replace(
            response, body=response.body.replace(b"ApplicationConsistent", b"FileSystemConsistent")
        )

    azure.intercept = weaker
    connect(environment={**CRASH, "consistency": "application"}).replicate("web", tmp_path / "images")
    assert "FileSystemConsistent, not ApplicationConsistent" in notices(told)


@pytest.mark.slow
def test_one_too_many_in_an_hour_ends_at_once_with_a_remedy_that_works(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path], tmp_path: Path
) -> None:
    azure.exporting.restore_point_rate = 1
    source, before = connect(environment=CRASH), azure.resources()
    source.replicate("web", tmp_path / "images")
    with pytest.raises(errors.Throttled, match="no more restore points") as refused:
        source.replicate("web", tmp_path / "images")
    assert "consistency to disk" in refused.value.remedy
    assert refused.value.retry_after > 0
    assert azure.resources() == before
    connect(environment={**CRASH, "consistency": "disk"}).replicate("web", tmp_path / "images")


@pytest.mark.slow
def test_a_vm_that_is_off_needs_none(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path], told: list[Event], tmp_path: Path
) -> None:
    azure.requests.clear()
    source = connect(environment=CRASH)
    source.replicate("web", tmp_path / "images", shutdown=True)
    assert created(azure) == {"snapshots"}
    assert right(tmp_path / "images", disks)
    assert "need no restore point" in notices(told)
    assert any("need no restore point" in each.text for each in source.check("web").findings)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "shared": ({"properties": {"maxShares": 2}}, "can be shared"),
    "closed": ({"properties": {"networkAccessPolicy": "DenyAll"}}, "network access policy DenyAll"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_what_azure_does_not_support_is_refused_before_anything_is_created(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    change, why = REFUSED[kind]
    source = connect(environment=CRASH)
    document = azure.disk("web", 0)._disk.document
    document["properties"] |= change["properties"]
    azure.requests.clear()
    with pytest.raises(errors.InvalidInput, match=why) as refused:
        source.replicate("web", tmp_path / "images")
    assert created(azure) == set()
    assert any(why in finding.text for finding in source.check("web").findings)
    assert "consistency to disk" in refused.value.remedy
    allowed = {"shared": CRASH | {"consistency": "disk"}, "closed": {"consistency": "crash"}}[kind]
    connect(environment=allowed).replicate("web", tmp_path / "images")
    assert right(tmp_path / "images", disks)


def test_premium_ssd_v2_needs_application_mode(azure: Sandbox, connect: Connect, image: Image) -> None:
    azure.add_vm("db", image("os"), [image("data")], VmSpec(zone="1", data_sku="PremiumV2_LRS"))
    findings = connect(environment={"consistency": "crash"}).check("db").findings
    assert any("which only application mode supports" in each.text for each in findings)
    findings = connect(environment={"consistency": "application"}).check("db").findings
    assert not any("takes no restore point" in each.text for each in findings)
    assert any("installs the extension" in each.text for each in findings)


@pytest.mark.slow
def test_the_role_is_enough_and_check_names_what_is_missing(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path], tmp_path: Path
) -> None:
    role = permissions.role({permissions.EXPORT, permissions.RESTORE_POINTS}, ["/"])
    azure.permissions[:] = [{"actions": role["Actions"], "notActions": []}]
    source = connect(environment=CRASH)
    assert source.check("web", strict=True, shutdown=False, pool=False).ok
    source.replicate("web", tmp_path / "images")
    for action in (each for each in role["Actions"] if "restorePoint" in each):
        azure.permissions[:] = [{"actions": role["Actions"], "notActions": [action]}]
        checked = connect(environment=CRASH).check("web", shutdown=False, pool=False)
        assert any(action in each.text for each in checked.findings if each.severity == "error"), action


def test_the_role_of_the_command_line_has_the_rights_only_if_asked() -> None:
    printed = [
        CliRunner().invoke(cli, ["role", "--mechanism", "snapshots", *more]).output
        for more in ([], ["--consistency", "crash"])
    ]
    rights = [{action for action in json.loads(text)["Actions"] if COLLECTIONS in action} for text in printed]
    assert rights[0] == set()
    assert f"{COLLECTIONS}/restorePoints/write" in rights[1]


def test_who_may_not_see_restore_points_cleans_up_all_the_same(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path]
) -> None:
    azure.permissions[:] = [{"actions": ["*"], "notActions": [f"{COLLECTIONS}/read"]}]
    assert connect().sweep(timedelta(0)) == ([], [])


def test_a_restore_point_that_a_dead_run_was_reading_is_closed_and_deleted(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path]
) -> None:
    source, before = connect(environment=CRASH), azure.resources()
    machine = source.inspect("web")
    run = source.new_run(machine)
    with Journal(run, None) as journal:
        taken = restore_points.take(source.context, source.resources(run, journal), machine, machine.disks)
        for document in taken.values():
            source.azure.grant_read(document["id"], 3600)
    (leftover,) = source.sweep(timedelta(0), dry_run=True)[0]
    assert [names.kind_of(id) for id in leftover.ids] == ["collection"]
    assert source.finish(run) == []
    assert azure.resources() == before


def test_a_run_whose_deletion_died_is_known_by_its_restore_points(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path]
) -> None:
    source = connect(environment=CRASH)
    machine = source.inspect("web")
    run = source.new_run(machine)
    with Journal(run, None) as journal:
        restore_points.take(source.context, source.resources(run, journal), machine, machine.disks)
    assert cleanup.unfinished(source.azure, run.group, "web") == {}

    def die(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "DELETE":
            raise Died
        return answer(request)

    azure.intercept = die
    with pytest.raises(Died):
        source.finish(run)
    azure.intercept = None
    assert list(cleanup.unfinished(source.azure, run.group, "web")) == [run.id]
    assert source.finish(run) == []


@pytest.mark.slow
def test_baselines_and_restore_points_do_not_go_together(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path], tmp_path: Path
) -> None:
    kept = {"replica_export_mechanism": "snapshots", "keep_baseline": True}
    before = azure.resources()
    connect(environment=kept).replicate("web", tmp_path / "images")
    assert len(azure.resources()) == len(before) + 2
    azure.disk("web").write(MIB, random.Random(5).randbytes(4096))
    source = connect(environment={**kept, "consistency": "crash"})
    report = source.replicate("web", tmp_path / "images")
    assert {disk.tier for disk in report.disks} == {"allocated"}
    assert (tmp_path / "images/os.raw").read_bytes() == azure.disk("web").path.read_bytes()
    assert azure.resources() == before  # the baselines are of the replica that was
    assert any("no baseline is kept" in each.text for each in source.check("web").findings)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("journals", ["own journals", "another host"])
def test_whatever_a_run_dies_of_a_sweep_leaves_nothing(
    azure: Sandbox, connect: Connect, disks: tuple[Path, Path], tmp_path: Path, part: int, journals: str
) -> None:
    azure.exporting.restore_point_rate = 1000
    before, at = azure.resources(), part + 8
    while True:
        azure.intercept = dying(at)
        try:
            connect(environment=CRASH).replicate("web", tmp_path / "images")
        except Died:
            pass
        else:
            break
        finally:
            azure.intercept = None
        age = timedelta(hours=2)
        if journals == "another host":
            age = timedelta(0)
            for journal in (tmp_path / "state").rglob("*.journal"):
                journal.unlink()
        connect(environment={"consistency": "disk"}).sweep(age)
        assert azure.resources() == before
        at += 8
    assert right(tmp_path / "images", disks)
    assert at > 30
