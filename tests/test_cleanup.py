"""What is dead is swept, what lives is left, and Azure's refusals are waited out."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from coriolis_azure import errors
from coriolis_azure.azure import names, patience
from coriolis_azure.events import Event, Notice
from coriolis_azure.model import Run
from coriolis_azure.run import cleanup, journal, resources
from coriolis_azure.run.journal import Journal
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness.late_answers import NSG, Later
from harness.processes import PROCESSES


@pytest.fixture
def run(source: Source) -> Run:
    return Run(names.new_run(), source.azure.subscription, "sandbox", "westeurope", "", "web")


def made(source: Source, run: Run, folder: Path | None = None) -> tuple[resources.Resources, Journal]:
    kept = Journal(run, folder)
    found = resources.Resources(source.azure, run, kept, {}, Later())
    found.create("nsg", "nsg", NSG)
    return found, kept


def sweep(source: Source, hours_later: float, folder: Path | None = None) -> list[str]:
    found, stayed = cleanup.sweep(
        replace(source.context, clock=Later(hours_later)), timedelta(hours=2), folder
    )
    assert stayed == []
    return [leftover.run for leftover in found]


def test_a_run_is_dead_after_two_hours_of_silence(source: Source, run: Run) -> None:
    made(source, run)
    assert sweep(source, 1.9) == []
    assert sweep(source, 2.1) == [run.id]
    assert cleanup.leftovers(source.context) == []


def test_a_sign_of_life_keeps_a_long_run_alive(source: Source, run: Run) -> None:
    found, _ = made(source, run)
    living = resources.Resources(source.azure, run, Journal(run), {}, Later(5))
    living.show_life()
    assert sweep(source, 6) == []
    assert sweep(source, 7.1) == [run.id]
    assert found.azure.find(found.id("nsg", "nsg")) is None


def test_a_sign_of_life_is_somewhere_else_where_the_security_group_is_locked(
    azure: Sandbox, source: Source, run: Run
) -> None:
    found, _ = made(source, run)
    empty = {"properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}}
    found.create("disk", "clone", empty)
    azure.faults.add("lock", method="PATCH", path="/networkSecurityGroups/", times=0)
    living = resources.Resources(source.azure, run, found._journal, {}, Later(5))
    living.show_life()
    assert sweep(source, 6) == []
    azure.faults.add("lock", method="PATCH", times=0)
    living.show_life()  # nowhere: that is logged
    assert sweep(source, 7.1) == [run.id]


def test_a_journal_that_nobody_holds_is_a_dead_run(source: Source, run: Run, tmp_path: Path) -> None:
    found, kept = made(source, run, tmp_path)
    assert sweep(source, 0, tmp_path) == []
    kept.close()
    assert [dead.id for dead, _ in journal.abandoned(tmp_path)] == [run.id]
    assert sweep(source, 0, tmp_path) == [run.id]
    assert found.azure.find(found.id("nsg", "nsg")) is None
    assert list(tmp_path.glob("*.journal")) == []


def test_a_journal_tells_what_was_made_of_blobs_from_resources(run: Run, tmp_path: Path) -> None:
    blobs = names.BlobsId.of("https://account.blob.core.windows.net/vhds/os.vhd", run.id)
    with Journal(run, tmp_path) as kept:
        kept.intend("/subscriptions/s/disk")
        kept.intend(blobs)
    path = tmp_path / f"{run.id}.journal"
    with path.open("a") as file:
        file.write("[" * 100_000 + "\n")  # damaged
        file.write(json.dumps({"id": blobs}) + "\n")  # as earlier versions wrote it
    found = journal.intended(path)
    assert found == ["/subscriptions/s/disk", blobs, blobs]
    assert [isinstance(id, names.BlobsId) for id in found] == [False, True, True]
    assert (blobs.url, blobs.run) == ("https://account.blob.core.windows.net/vhds/os.vhd", run.id)


def test_a_journal_with_what_this_version_cannot_have_made_is_set_aside(
    source: Source, run: Run, tmp_path: Path
) -> None:
    """Of a newer version, or damaged: it must not end this sweep and all that follow."""
    _, kept = made(source, run, tmp_path)
    kept.intend(
        f"/subscriptions/{run.subscription}/resourceGroups/{run.group}/providers/Microsoft.New/kinds/x"
    )
    kept.close()
    assert sweep(source, 0, tmp_path) == []
    assert [path.suffix for path in tmp_path.glob(f"{run.id}.*")] == [".unreadable"]
    assert sweep(source, 2.1, tmp_path) == [run.id]


def test_a_journal_that_cannot_be_deleted_is_no_error(
    source: Source,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a file system that has become read-only: nothing is left in Azure, at the end of a run or of a sweep."""
    _, kept = made(source, run, tmp_path)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        kept.done()
        kept.close()
        assert sweep(source, 0, tmp_path) == [run.id]
        assert sweep(source, 0, tmp_path) == []
    assert "cannot be deleted: Read-only file system" in caplog.text
    assert sweep(source, 0, tmp_path) == []
    assert list(tmp_path.glob("*.journal")) == []


def test_journals_are_private(run: Run, tmp_path: Path) -> None:
    with Journal(run, tmp_path / "new") as kept:
        kept.intend("id-1")
        path = tmp_path / "new" / f"{run.id}.journal"
        assert os.stat(path).st_mode & 0o777 == 0o600  # noqa: PTH116


@pytest.mark.parametrize(
    "text",
    {
        "cut": b'{"id": "torn',
        "empty": b"",
        "damaged": b"\xff\0\xff\n",
        "newer": b'{"id": "1", "subscription": "s", "group": "g", "era": "next"}\n',
        "foreign": b'["somebody", "else"]\n',
        "deep": b"[" * 100_000 + b"\n",
    }.values(),
)
def test_a_journal_that_cannot_be_read_is_named_and_its_run_is_found_by_its_tags(
    source: Source, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    found, kept = made(source, run, tmp_path)
    kept.close()
    path = tmp_path / f"{run.id}.journal"
    path.write_bytes(text)
    assert sweep(source, 0, tmp_path) == []
    assert str(path) in caplog.text
    assert not path.exists()
    assert path.with_suffix(".unreadable").read_bytes() == text
    caplog.clear()
    assert sweep(source, 2.1, tmp_path) == [run.id]
    assert caplog.text == ""
    assert found.azure.find(found.id("nsg", "nsg")) is None


@pytest.mark.parametrize(
    ("status", "code", "retried"),
    [
        (400, "NicInUse", True),
        (409, "OperationNotAllowed", True),
        pytest.param(503, "ServiceUnavailable", True, marks=pytest.mark.slow),  # the SDK waits, too
        (409, "ScopeLocked", False),
        (403, "No", False),
    ],
)
def test_what_may_pass_is_waited_out_and_a_lock_is_not(
    azure: Sandbox, source: Source, run: Run, status: int, code: str, retried: bool
) -> None:
    found, _ = made(source, run)
    id, clock = found.id("nsg", "nsg"), Later()
    refusals: list[str] = []

    def refuse(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "DELETE" and len(refusals) < 3:
            refusals.append(request.path)
            body = f'{{"error": {{"code": "{code}", "message": "in the way"}}}}'
            return Response(status, {"Content-Type": "application/json"}, body.encode())
        return answer(request)

    azure.intercept = refuse
    stayed = resources.delete(source.azure, [id], clock)
    assert (stayed == []) == retried
    assert (len(refusals) == 3) == retried
    assert clock.monotonic() <= resources.PATIENCE_SECONDS


def test_patience_ends(azure: Sandbox, source: Source, run: Run) -> None:
    found, _ = made(source, run)
    clock = Later()

    def refuse(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "DELETE":
            body = b'{"error": {"code": "NicInUse", "message": "for ever"}}'
            return Response(400, {"Content-Type": "application/json"}, body)
        return answer(request)

    azure.intercept = refuse
    id = found.id("nsg", "nsg")
    assert resources.delete(source.azure, [id], clock) == [id]
    assert resources.PATIENCE_SECONDS - 10 < clock.monotonic() <= resources.PATIENCE_SECONDS


@pytest.mark.slow
def test_minutes_of_throttling_are_told_by_id_and_finished_by_the_next_sweep(
    azure: Sandbox, source: Source, run: Run
) -> None:
    found, _ = made(source, run)
    id, clock = found.id("nsg", "nsg"), Later()

    def throttle(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "DELETE":
            # No wrapper around it, as Azure's gateways answer; the library's own tries take no time here.
            headers = {"Content-Type": "application/json", "retry-after-ms": "1"}
            return Response(429, headers, b'{"code": "TooManyRequests", "message": "later"}')
        return answer(request)

    azure.intercept = throttle
    assert resources.delete(source.azure, [id], clock) == [id]
    assert clock.monotonic() > resources.PATIENCE_SECONDS - 10
    azure.intercept = None
    assert sweep(source, 3) == [run.id]
    assert source.azure.find(id) is None


def test_what_is_in_use_by_something_that_stayed_is_not_waited_for(
    azure: Sandbox, source: Source, run: Run
) -> None:
    """A locked NIC would else cost the patience for its address, its firewall and its network, one after another."""
    found, _ = made(source, run)
    subnet = names.resource_id(run.subscription, run.group, "vnet", "sandbox-vnet") + "/subnets/default"
    nic = {
        "networkSecurityGroup": {"id": found.id("nsg", "nsg")},
        "ipConfigurations": [{"name": "nic", "properties": {"subnet": {"id": subnet}}}],
    }
    found.create("nic", "nic", {"properties": nic})
    azure.intercept = lambda request, answer: (
        Response.of(409, {"error": {"code": "ScopeLocked", "message": "Locked."}})
        if request.method == "DELETE" and "/networkInterfaces/" in request.path
        else answer(request)
    )
    ids, clock = [found.id("nic", "nic"), found.id("nsg", "nsg")], Later()
    assert resources.delete(source.azure, ids, clock) == ids
    assert clock.monotonic() < resources.PATIENCE_SECONDS
    azure.intercept = None
    assert resources.delete(source.azure, ids, clock) == []


def test_with_rewritten_tags_only_an_age_of_zero_deletes(source: Source, run: Run, told: list[Event]) -> None:
    """A date without a time zone, or none at all, tells no age: clean-up says so."""
    for name, made in (("x", "?"), ("y", "2026-11-24")):
        id = names.resource_id(run.subscription, run.group, "nsg", f"coriolis-{name}-nsg")
        tags = {names.RUN_TAG: name, names.MADE_TAG: made}
        source.azure.put(id, {**NSG, "location": "westeurope", "tags": tags})
    assert sweep(source, 100) == []
    (said,) = (event.text for event in told if isinstance(event, Notice))
    assert "were rewritten: x, y; when no run is active, `coriolis-azure cleanup --older-than 0s`" in said
    found, _ = source.sweep(timedelta(0), dry_run=True)
    assert [leftover.alive for leftover in found] == [None, None]
    assert len(cleanup.leftovers(source.context)) == 2
    assert source.sweep(timedelta(0))[1] == []
    assert cleanup.leftovers(source.context) == []


def read_as_nobody(folder: str) -> tuple[list[str], set[str], list[str]]:
    """What a user who may not read all journals learns from them: unheld and living runs, unfinished ids."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    path = Path(folder)
    unheld = [run.id for run, _, _ in journal.unheld(path)]
    return unheld, journal.living(path), journal.unfinished(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("closed", ["journal", "folder", "folder above"])
def test_journals_of_somebody_else_are_left_alone(run: Run, closed: str) -> None:
    """As after a run with sudo: its journal belongs to root, in the folder of a user."""
    with TemporaryDirectory() as home:
        Path(home).chmod(0o711)
        folder = Path(home) / "state" / "journals"
        with Journal(run, folder) as kept:
            kept.intend("/subscriptions/x")
        os.mkfifo(folder / "pipe.journal")
        folder.parent.chmod(0o700 if closed == "folder above" else 0o755)
        folder.chmod(0o700 if closed == "folder" else 0o755)
        with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
            assert pool.submit(read_as_nobody, str(folder)).result(60) == ([], set(), [])
        assert journal.unfinished(folder) == ["/subscriptions/x"]


def test_a_run_whose_journal_is_held_lives_whatever_its_age(source: Source, run: Run, tmp_path: Path) -> None:
    _, kept = made(source, run, tmp_path)
    assert sweep(source, 100, tmp_path) == []
    kept.close()
    assert sweep(source, 100, tmp_path) == [run.id]


def test_a_stuck_delete_does_not_keep_the_others_alive(
    azure: Sandbox, source: Source, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = made(source, run)
    found.create("vnet", "vnet", {"properties": {"addressSpace": {"addressPrefixes": ["10.0.0.0/24"]}}})
    monkeypatch.setattr(patience, "OPERATION_SECONDS", 0.0)
    stayed = resources.delete(source.azure, [found.id("nsg", "nsg"), found.id("vnet", "vnet")], Later())
    assert len(stayed) == 2
    assert {path.rpartition("/")[2] for method, path in azure.requests if method == "DELETE"} == {
        names.resource(run.id, "nsg"),
        names.resource(run.id, "vnet"),
    }


def test_what_is_known_is_deleted_even_where_azure_does_not_list(
    azure: Sandbox, source: Source, run: Run
) -> None:
    found, kept = made(source, run)

    def denied(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "GET" and request.path.endswith("/virtualMachines"):
            body = b'{"error": {"code": "AuthorizationFailed", "message": "No list."}}'
            return Response(403, {"Content-Type": "application/json"}, body)
        return answer(request)

    azure.intercept = denied
    with pytest.raises(errors.Denied):
        cleanup.finish(replace(source.context, clock=Later()), run, kept.ids)
    azure.intercept = None
    assert source.azure.find(found.id("nsg", "nsg")) is None
