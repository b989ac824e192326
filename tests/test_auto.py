"""The mechanism `auto`: each disk is read in the way that is best for it, by a worker only if one is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import errors
from coriolis_azure.azure import host, permissions
from coriolis_azure.checks.finding import Checked
from coriolis_azure.events import Event, Notice
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.constants import MIB

pytestmark = pytest.mark.slow

Image = Callable[..., Path]
Connect = Callable[..., Source]
Intercept = Callable[[Request, Callable[[Request], Response]], Response]
AUTO = {"replica_export_mechanism": "auto"}


def in_azure(location: str, then: Intercept | None = None) -> Intercept:
    """Azure as a host in this location sees it."""

    def intercept(request: Request, answer: Callable[[Request], Response]) -> Response:
        if host.ADDRESS in request.url:
            return Response(200, {"Content-Type": "text/plain"}, location.encode())
        return then(request, answer) if then is not None else answer(request)

    return intercept


def changed(suffix: str, change: Callable[[Any], object]) -> Intercept:
    """Answers to a GET of a path with this end are changed on their way."""

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method != "GET" or not request.path.lower().endswith(suffix) or response.status != 200:
            return response
        document = json.loads(response.body)
        change(document)
        return replace(response, body=json.dumps(document).encode())

    return look


def texts(checked: Checked) -> str:
    return "\n".join(finding.text for finding in checked.findings)


class Watched:
    """Which types of resources are created."""

    def __init__(self, then: Intercept | None = None) -> None:
        self.created, self._then = set[str](), then

    def __call__(self, request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and request.path.count("/") == 8:
            self.created.add(request.path.split("/")[7])
        return self._then(request, answer) if self._then is not None else answer(request)


def test_next_to_the_disks_no_worker_is_made(
    azure: Sandbox, connect: Connect, image: Image, told: list[Event], tmp_path: Path
) -> None:
    disk = image("os", seed=1)
    azure.add_vm("web", disk)
    azure.quotas["cores"] = (10, 10)  # nor could one be made
    azure.intercept = in_azure("westeurope", watched := Watched())
    (report,) = connect(environment=AUTO).replicate("web", tmp_path / "images").disks
    assert (tmp_path / "images/os.raw").read_bytes() == disk.read_bytes()
    assert watched.created == {"snapshots"}
    assert (report.mechanism, report.tier) == ("snapshots", "allocated")
    assert report.reason == "this host is in westeurope, too; there is no baseline"
    assert any("os: mechanism snapshots" in event.text for event in told if isinstance(event, Notice))


def test_vhd_blobs_are_read_from_here(azure: Sandbox, connect: Connect, image: Image, tmp_path: Path) -> None:
    azure.add_vm("old", disk := image("os", seed=1), spec=VmSpec(unmanaged="oldstorage"))
    before = azure.resources()
    azure.intercept = watched = Watched()
    source = connect(environment=AUTO)
    assert "os is read from its snapshot: its VHD can be read" in texts(source.check("old"))
    (report,) = source.replicate("old", tmp_path / "images").disks
    assert (tmp_path / "images/os.raw").read_bytes() == disk.read_bytes()
    assert (report.mechanism, report.tier) == ("snapshots", "allocated")
    assert report.reason.startswith("its VHD can be read")
    assert watched.created == set()
    assert azure.resources() == before


@pytest.mark.parametrize("place", ["elsewhere", "in northeurope"])
def test_from_afar_a_worker_reads_until_a_list_is_proved(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, place: str
) -> None:
    azure.add_vm("web", image("os", seed=1))
    before = azure.resources()
    source = connect(environment={**AUTO, "keep_baseline": True})
    disk = azure.disk("web")
    told = []
    for number in range(3):
        disk.write(number * 4096, b"x" * 4096)
        watched = Watched()
        azure.intercept = in_azure("northeurope", watched) if place == "in northeurope" else watched
        (report,) = source.replicate("web", tmp_path / "images").disks
        assert (tmp_path / "images/os.raw").read_bytes() == disk.path.read_bytes()
        told.append((report.mechanism, report.tier, "virtualMachines" in watched.created))
    assert told == [
        ("hybrid", "allocated", True),
        ("hybrid", "allocated", True),
        ("snapshots", "changed", False),
    ]
    assert len(azure.resources()) == len(before) + 1


def instead(refusal: Callable[[Request], Response | None]) -> Intercept:
    """A service that answers some requests in this way."""
    return lambda request, answer: refusal(request) or answer(request)


def denied(request: Request) -> Response | None:
    """By a policy that forbids snapshots that can be exported."""
    if request.method == "PUT" and "/snapshots/" in request.path and b"AllowAll" in request.body:
        return refusal(403, "RequestDisallowedByPolicy", "Disallowed by policy.")
    return None


def full(request: Request) -> Response | None:
    """As others read snapshots of the family already."""
    if request.path.lower().endswith("/begingetaccess"):
        return refusal(409, "OperationNotAllowed", "5 snapshots have active SAS.")
    return None


def refusal(status: int, code: str, message: str) -> Response:
    error = {"error": {"code": code, "message": message}}
    return Response(status, {"Content-Type": "application/json"}, json.dumps(error).encode())


def unreachable(request: Request) -> Response | None:
    return blocked() if "/md-" in request.url else None


def no_lists(request: Request) -> Response | None:
    return blocked() if request.query.get("comp") == "pagelist" else None


def blocked() -> Response:
    body = b"<?xml version='1.0'?><Error><Code>AuthorizationFailure</Code><Message>no</Message></Error>"
    return Response(403, {"x-ms-error-code": "AuthorizationFailure", "Content-Type": "application/xml"}, body)


def modified(old: bytes, new: bytes) -> Intercept:
    """A policy that changes snapshots as they are created."""

    def intercept(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/snapshots/" in request.path:
            request = replace(request, body=request.body.replace(old, new))
        return answer(request)

    return intercept


OBSTACLES = {
    "a policy forbids it": (instead(denied), "it has the network access policy DenyAll"),
    "a policy closes it": (modified(b"AllowAll", b"DenyAll"), "it has the network access policy DenyAll"),
    "a policy wants sign-in": (
        modified(b'"incremental"', b'"dataAccessAuthMode": "AzureActiveDirectory", "incremental"'),
        "it has the data access mode AzureActiveDirectory",
    ),
    "unreachable": (instead(unreachable), "AuthorizationFailure"),
    "others read the family": (instead(full), "5 snapshots have active SAS"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_snapshot_that_cannot_be_read_after_all_is_read_by_a_worker(
    azure: Sandbox, connect: Connect, image: Image, told: list[Event], tmp_path: Path, obstacle: str
) -> None:
    disk = image("os", seed=1)
    azure.add_vm("web", disk)
    before = azure.resources()
    refuse, why = OBSTACLES[obstacle]
    azure.intercept = in_azure("westeurope", refuse)
    (report,) = connect(environment=AUTO).replicate("web", tmp_path / "images").disks
    assert (tmp_path / "images/os.raw").read_bytes() == disk.read_bytes()
    assert (report.mechanism, report.tier) == ("hybrid", "whole")
    assert why in report.reason
    assert any("by a worker after all" in event.text for event in told if isinstance(event, Notice))
    assert azure.resources() == before


@pytest.mark.parametrize("obstacle", [*OBSTACLES, "no lists"])
def test_with_hybrid_whatever_has_no_lists_is_read_as_a_whole(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, obstacle: str
) -> None:
    disk = image("os", seed=1)
    azure.add_vm("web", disk)
    before = azure.resources()
    azure.intercept, why = OBSTACLES.get(obstacle, (instead(no_lists), "AuthorizationFailure"))
    source = connect(environment={"replica_export_mechanism": "hybrid"})
    (report,) = source.replicate("web", tmp_path / "images").disks
    assert (tmp_path / "images/os.raw").read_bytes() == disk.read_bytes()
    assert (report.mechanism, report.tier) == ("hybrid", "whole")
    assert why in report.reason
    assert azure.resources() == before


def test_only_disks_that_need_it_are_read_by_the_worker(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path
) -> None:
    disks = [image("os", seed=1), image("data", MIB, seed=2)]
    azure.add_vm("web", disks[0], disks[1:])
    modern = changed("/disks/web-data-0", lambda disk: disk["sku"].update(name="PremiumV2_LRS"))
    azure.intercept = in_azure("westeurope", modern)
    source = connect(environment=AUTO)
    assert "data-0 is read by a worker: it is of type PremiumV2_LRS" in texts(source.check("web"))
    assert "os is read from its snapshot: this host is in westeurope" in texts(source.check("web"))
    done = source.replicate("web", tmp_path / "images")
    assert [disk.mechanism for disk in done.disks] == ["snapshots", "hybrid"]
    assert "PremiumV2_LRS" in done.disks[1].reason
    for name, disk in zip(("os", "data-0"), disks, strict=True):
        assert (tmp_path / f"images/{name}.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("policy", ["a policy forbids it", "a policy closes it"])
def test_without_a_choice_a_policy_ends_the_run_and_nothing_is_left(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, policy: str
) -> None:
    azure.add_vm("web", image("os", seed=1))
    before = azure.resources()
    azure.intercept, _ = OBSTACLES[policy]
    source = connect(environment={"replica_export_mechanism": "snapshots"})
    with pytest.raises(errors.Denied) as caught:
        source.replicate("web", tmp_path / "images")
    assert "policy" in f"{caught.value.message} {caught.value.remedy}".lower()
    assert azure.resources() == before


@pytest.mark.parametrize(
    "disk", [{"sku": "UltraSSD_LRS"}, {"sku": "PremiumV2_LRS"}, {"sectors": 4096}], ids=str
)
def test_a_disk_that_has_no_lists_is_read_as_a_whole_by_hybrid_and_refused_by_snapshots(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, disk: dict[str, Any]
) -> None:
    original = image("os", seed=1)
    azure.add_vm("web", original)

    def change(document: Any) -> None:
        document["sku"]["name"] = disk.get("sku", "Premium_LRS")
        document["properties"]["creationData"]["logicalSectorSize"] = disk.get("sectors", 512)

    azure.intercept = changed("/disks/web-os", change)
    before = azure.resources()
    (report,) = (
        connect(environment={"replica_export_mechanism": "hybrid"}).replicate("web", tmp_path / "a").disks
    )
    assert (tmp_path / "a/os.raw").read_bytes() == original.read_bytes()
    assert (report.mechanism, report.tier) == ("hybrid", "whole")
    assert str(next(iter(disk.values()))) in report.reason
    with pytest.raises(errors.InvalidInput, match="cannot be read from its snapshot"):
        connect(environment={"replica_export_mechanism": "snapshots"}).replicate("web", tmp_path / "b")
    assert azure.resources() == before


def test_access_that_dies_in_the_run_is_granted_again(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path
) -> None:
    disk = image("os", seed=1)
    azure.add_vm("web", disk)
    before = azure.resources()
    azure.intercept = in_azure("westeurope")
    azure.faults.add("sas-expired", after=3)
    (report,) = connect(environment=AUTO).replicate("web", tmp_path / "images").disks
    assert (tmp_path / "images/os.raw").read_bytes() == disk.read_bytes()
    assert report.mechanism == "snapshots"
    assert azure.resources() == before


LACKING = [
    "Microsoft.Compute/snapshots/beginGetAccess/action",
    "Microsoft.Compute/snapshots/endGetAccess/action",
]


def test_an_identity_that_may_not_end_the_access_never_begins_it(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path
) -> None:
    disk = image("os", seed=1)
    azure.add_vm("web", disk)
    before = azure.resources()
    azure.permissions[:] = [{"actions": ["*"], "notActions": [LACKING[1]]}]
    azure.intercept = in_azure("westeurope", watched := Watched())
    for mechanism in ("auto", "hybrid"):
        source = connect(environment={"replica_export_mechanism": mechanism})
        (report,) = source.replicate("web", tmp_path / mechanism).disks
        assert (tmp_path / mechanism / "os.raw").read_bytes() == disk.read_bytes()
        assert f"lacks {LACKING[1]}" in report.reason
        assert azure.resources() == before
    watched.created.clear()
    with pytest.raises(errors.InvalidInput, match="endGetAccess") as caught:
        connect(environment={"replica_export_mechanism": "snapshots"}).replicate(
            "web", tmp_path / "snapshots"
        )
    assert watched.created == set()
    assert "auto or worker" in str(caught.value.remedy)


@pytest.mark.parametrize("mechanism", ["hybrid", "auto"])
def test_the_role_is_enough_for_the_whole_job_and_check_names_each_action_that_is_missing(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, mechanism: str
) -> None:
    azure.add_vm("web", image("os", seed=1))
    source = connect(environment={"replica_export_mechanism": mechanism})
    chosen = {*permissions.features(source.environment), permissions.SHUTDOWN}
    role = permissions.role(chosen, ["/"])
    azure.permissions[:] = [{"actions": role["Actions"], "notActions": []}]
    assert source.check("web", strict=True, pool=False).ok
    source.replicate("web", tmp_path / "images", shutdown=True)
    for action in role["Actions"]:
        azure.permissions[:] = [
            {"actions": [name for name in role["Actions"] if name != action], "notActions": []}
        ]
        if action == "Microsoft.Authorization/permissions/read":
            continue  # without it, nobody can tell
        found = source.check("web", strict=True, pool=False)
        assert any(action in finding.text for finding in found.findings if finding.severity == "error"), (
            action
        )
