"""What a run did, from its events: steps, waits, rates; and the history that is kept of the last runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coriolis_azure import errors
from coriolis_azure.change_map import ALL, CELLS, KINDS, ChangeMap, Tally
from coriolis_azure.events import Copied, Notice, Step, Waiting
from coriolis_azure.replica import history, places
from coriolis_azure.replica.history import History, Verified
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from coriolis_azure.timeline import Recorder, RunReport
from harness.clocks import Held
from harness.constants import MIB

TIB = 1 << 40


def recorded() -> RunReport:
    """A run of 400 seconds that boots a worker and copies a disk."""
    clock = Held()
    recorder = Recorder("web", clock)
    recorder(Step("boot worker", "a size", vm="web"))
    recorder(Step("boot worker", "of another VM", vm="db"))
    for waited in range(0, 100, 10):
        recorder(Waiting("the VM", 300, waited, vm="web"))
        clock.sleep(10)
    clock.sleep(20)
    recorder(Step("copy", "os", vm="web"))
    recorder(Copied("os", 0, 270 * MIB, 0, vm="web"))
    for second in range(1, 271):
        clock.sleep(1)
        recorder(
            Copied("os", second * MIB, 270 * MIB, 0, "source" if second < 200 else "destination", vm="web")
        )
    recorder(Step("verify", "os", vm="web", disk="os"))
    recorder(Notice("a notice", vm="web"))
    clock.sleep(5)
    recorder.disk_ended("os", clock.monotonic())
    clock.sleep(5)
    return recorder.report()


def test_a_report_has_the_steps_with_their_waits_and_the_rates() -> None:
    report = recorded()
    assert [(step.name, step.begin, step.end) for step in report.steps] == [
        ("boot worker", 0, 120),
        ("copy", 120, 400),
        ("verify", 390, 395),
    ]
    assert list(report.steps[0].waits) == [("the VM", 100)]
    assert [report.seconds, report.outcome, *report.notices] == [400, "done", "a notice"]
    assert (report.rates.seconds, sum(report.rates.done)) == (8, 270 * MIB)
    assert len(report.rates.done) <= 60
    assert report.rates.shares()["source"] > 0.6
    assert RunReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize(
    ("error", "outcome"), [(errors.Denied("no"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_run_that_ends_early_says_why(error: BaseException, outcome: str) -> None:
    recorder = Recorder("web", Held())
    recorder(Copied("os", 5, 10, 3))
    recorder.failed(error)
    report = recorder.report()
    assert (report.outcome, report.remedy) == (outcome, getattr(error, "remedy", ""))
    assert [(disk.size_bytes, disk.done_bytes, disk.sent_bytes) for disk in report.disks] == [(10, 5, 3)]


@pytest.mark.parametrize("size", [512, 3 * MIB + 512, 300 * MIB, 32 * TIB])
def test_a_map_is_small_and_tells_nothing_that_is_not_so(size: int) -> None:
    """One changed chunk of 32 TiB is a cell that is not all the same."""
    count = -(-size // MIB)
    tally = Tally(size, MIB)
    tally.add("same", 0, count - 1)
    tally.add("changed", count - 1, 1)
    found = tally.map()
    assert found.cells <= CELLS
    assert sum(found.totals.values()) == size
    assert found.totals["changed"] == size - (count - 1) * MIB
    mixed, share = count > CELLS, 8 if count < 512 else 1
    assert (found.shares["changed"][-1], found.shares["same"][-1]) == (
        (share, max(8, ALL - share)) if mixed else (ALL, 0)
    )
    assert found.shares["changed"][:-1] == bytes(found.cells - 1)
    assert ChangeMap.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_history_keeps_the_last_runs_and_the_map_of_the_last_good_one() -> None:
    run = recorded()
    tally = Tally(MIB, MIB)
    tally.add("zero", 0, 1)
    good = History().after(replace(run, maps={"os": tally.map()}))
    for number in range(9):
        failed = RunReport("web", "2026-01-01T00:00:00Z", number, "failed")
        good = good.after(failed)
    assert [each.seconds for each in good.runs] == [4, 5, 6, 7, 8]
    assert set(good.maps) == {"os"}
    assert History.of(good.text()) == good


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda _: b"",
    lambda text: text[:-5],
    lambda _: b"[" * 100_000,
    lambda _: b"[]",
    lambda text: text.replace(b'"seconds": 400', b'"seconds": "\\u202e"'),
    lambda text: text.replace(b'"seconds": 400', b'"seconds": 1e999'),
    lambda text: text.replace(b'"size_bytes": ', b'"size_bytes": 1' + b"0" * 400),
    lambda text: text.replace(b'"done"', b'"well"'),
    lambda text: text.replace(b'"cells": "', b'"cells": "AAAA'),
    lambda text: text + b" " * history.LIMIT,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_history_counts_as_none(damage: Callable[[bytes], bytes]) -> None:
    tally = Tally(MIB, MIB)
    tally.add("zero", 0, 1)
    text = History().after(replace(recorded(), maps={"os": tally.map()})).text()
    assert damage(text) != text
    assert History.of(damage(text)) == History()


def test_a_history_stays_within_its_limit() -> None:
    long = RunReport("web", "t", 1.0, "failed", notices=("\u202e" * 200,) * 2000)
    found = History((long,) * 5)
    assert len(found.text()) <= history.LIMIT


@pytest.mark.slow
def test_a_run_leaves_its_history_and_none_that_is_damaged_stops_it(
    azure: Sandbox, source: Source, image: Callable[..., Path], tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"), [image("data", seed=1)])
    told: list[RunReport] = []
    source.on_report = told.append
    to = tmp_path / "images"
    done = source.replicate("web", to)
    path = to / history.NAME
    assert path.stat().st_mode & 0o777 == 0o600
    with places.open(str(to), print, existing=True) as place:
        found = history.read(place)
    (run,) = found.runs
    assert told == [run] or told[0].seconds >= run.seconds
    assert (run.outcome, run.point, found.mapped) == ("done", done.point, done.point)
    assert [disk.sent_bytes for disk in run.disks] == [disk.sent_bytes for disk in done.disks]
    assert {"inspect", "boot worker", "snapshot", "copy", "verify", "clean up"} <= {
        step.name for step in run.steps
    }
    assert {name: sum(each.totals.values()) for name, each in found.maps.items()} == {
        disk.name: disk.size_bytes for disk in done.disks
    }
    assert found.maps["os"].totals["changed"] == 2 * MIB
    path.write_bytes(b"{")
    second = source.replicate("web", to)
    assert [disk.sent_bytes for disk in second.disks] == [0, 0]
    found = History.of(path.read_bytes())
    assert [each.point for each in found.runs] == [second.point]
    assert (found.maps["os"].totals["same"], found.maps["os"].totals["zero"]) == (2 * MIB, MIB)
    assert all(verdict.verified for verdict in source.verify(to))
    seen = History.of(path.read_bytes()).verified
    assert seen is not None
    assert seen.point == second.point
    path.unlink()
    path.mkdir()
    source.replicate("web", to)


@pytest.mark.slow
def test_a_run_that_fails_is_in_the_history(
    azure: Sandbox, source: Source, image: Callable[..., Path], tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    source.replicate("web", tmp_path / "images")
    before = History.of((tmp_path / "images" / history.NAME).read_bytes())
    azure.faults.add("refuse", method="PUT", path="/snapshots/", status=403, code="AuthorizationFailed")
    with pytest.raises(errors.CoriolisAzureError) as failure:
        source.replicate("web", tmp_path / "images")
    found = History.of((tmp_path / "images" / history.NAME).read_bytes())
    assert [run.outcome for run in found.runs] == ["done", "failed"]
    assert (found.runs[-1].error, found.runs[-1].remedy) == (failure.value.message, failure.value.remedy)
    assert found.maps == before.maps


def test_a_verification_is_recorded_where_there_is_a_history(tmp_path: Path) -> None:
    with places.open(str(tmp_path / "a"), print) as place:
        history.verified(place, "p", "t", print)
        assert history.read(place) == History()
        place.keep_history(History((recorded(),)).text())  # type: ignore[attr-defined]
        history.verified(place, "p", "t", print)
        assert history.read(place).verified == Verified("p", "t")
    assert set(KINDS) == {"zero", "same", "relied", "checked", "changed"}
