"""A VM is moved for good: copied while it runs, shut down, copied again, verified."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from coriolis_azure import errors
from coriolis_azure.cutover import cut_over
from coriolis_azure.events import Event, Notice
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from coriolis_azure.timeline import RunReport
from harness.command_line import run
from harness.constants import MIB

Image = Callable[..., Path]


def refusing(
    method: str, part: str, after: int = 0
) -> Callable[[Request, Callable[[Request], Response]], Response]:
    """An Azure that refuses such requests, but for the first."""
    seen = []

    def answered(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == method and part in request.path:
            seen.append(request)
            if len(seen) > after:
                body = b'{"error": {"code": "AuthorizationFailed", "message": "no"}}'
                return Response(403, {"Content-Type": "application/json"}, body)
        return answer(request)

    return answered


@pytest.mark.slow
@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param("worker", marks=pytest.mark.slow),
        pytest.param("hybrid", marks=pytest.mark.slow),
        "snapshots",
    ],
)
def test_the_last_run_copies_little_and_what_the_vm_wrote_until_the_end_is_there(
    azure: Sandbox,
    connect: Callable[..., Source],
    image: Image,
    told: list[Event],
    tmp_path: Path,
    mechanism: str,
) -> None:
    azure.add_vm("web", image("os", 4 * MIB, seed=1))
    source = connect(environment={"replica_export_mechanism": mechanism, "keep_baseline": True})
    disk = azure.disk(source.inspect("web").disks[0].id)
    snapshots: list[str] = []

    def write(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT" and "/snapshots/" in request.path:  # the VM writes until then
            disk.write(len(snapshots) * MIB, random.Random(len(snapshots)).randbytes(65536))
            snapshots.append(request.path)
        return answer(request)

    azure.intercept = write
    done = cut_over(source, "web", tmp_path / "images")
    assert (tmp_path / "images/os.raw").read_bytes() == disk.path.read_bytes()
    assert source.inspect("web").power_state == "deallocated"
    assert [run.disks[0].full for run in done.runs] == [True, False, False]
    assert done.runs[2].disks[0].sent_bytes <= 65536
    assert [verdict.verified for verdict in done.verdicts] == [True]
    assert [run.outage_seconds is None for run in done.runs] == [True, True, False]
    assert done.outage_seconds == done.runs[2].outage_seconds
    assert any("the outage is expected" in event.text for event in told if isinstance(event, Notice))


def test_a_first_run_that_fails_leaves_the_vm_running(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os", seed=1))
    source = connect(environment={"replica_export_mechanism": "snapshots"})

    azure.intercept = refusing("PUT", "/snapshots/")
    with pytest.raises(errors.AzureError):
        cut_over(source, "web", tmp_path / "images")
    azure.intercept = None
    assert source.inspect("web").power_state == "running"


@pytest.mark.parametrize(
    ("method", "part", "after", "told_that"),
    [
        ("POST", "/deallocate", 0, ""),
        ("PUT", "/snapshots/", 2, "web is off, and nothing starts it: replicate again, or start it in Azure"),
        ("", "", 0, "web is off, and its replica is complete: run `coriolis-azure verify` to verify it"),
    ],
    ids=["before", "after", "verifying"],
)
def test_who_loses_a_vm_to_a_cutover_that_fails_is_told(
    azure: Sandbox,
    connect: Callable[..., Source],
    image: Image,
    told: list[Event],
    tmp_path: Path,
    method: str,
    part: str,
    after: int,
    told_that: str,
) -> None:
    azure.add_vm("web", image("os", seed=1))
    source = connect(environment={"replica_export_mechanism": "snapshots"})
    azure.intercept = refusing(method, part, after) if method else None
    with ExitStack() as ending:

        def keep_out(report: RunReport) -> None:
            """Somebody takes the replica after the last run."""
            if not method and any(step.name == "shut down" for step in report.steps):
                ending.enter_context(ImageFolder(tmp_path / "images"))

        source.on_report = keep_out
        with pytest.raises(errors.CoriolisAzureError):
            cut_over(source, "web", tmp_path / "images")
    azure.intercept = None
    is_off = source.inspect("web").power_state == "deallocated"
    assert is_off is bool(told_that)
    off = [event.text for event in told if isinstance(event, Notice) and " off" in event.text]
    assert off == ([told_that] if told_that else [])


@pytest.mark.slow
def test_the_command_says_how_long_the_outage_was_and_writes_a_page_about_its_three_runs(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    page, dest = tmp_path / "cutover.html", tmp_path / "images"
    line = ("cutover", *settings, "web", "--to", dest, "--mechanism", "snapshots", "--report", page)
    done = json.loads(run(*line, "--json").stdout)
    assert (dest / "os.raw").read_bytes() == (served.parent / "os.raw").read_bytes()
    assert done["outage_seconds"] > 0
    began = re.findall("<h2 id=.*>web <small>began (.*) UTC</small></h2>", page.read_text())
    assert len(began) == 3
    assert began == sorted(began)
