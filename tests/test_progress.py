"""Long steps tell what is waited for and for how long, on a terminal and elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coriolis_azure.azure import patience
from coriolis_azure.cli.one_vm import Lines
from coriolis_azure.cli.progress import watching
from coriolis_azure.cli.screens import OneVm
from coriolis_azure.events import Copied, Event, Notice, Step, Wait, Waiting, amount, json_lines, line, span
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from harness.clocks import Held
from harness.constants import MIB
from harness.processes import Forked
from harness.terminals import shown, text


def test_a_wait_is_told_as_it_begins_and_every_ten_seconds() -> None:
    clock, told = Held(), list[Event]()
    wait = Wait(told.append, clock, "the worker", 300)
    for _ in range(11):
        wait.still(clock.moment / 2)
        clock.sleep(2)
    assert told == [Waiting("the worker", 300, at, int(at / 2)) for at in (0, 10, 20)]
    assert line(told[-1]) == "waiting for the worker, 10 % done (0:20 of up to 5:00)"


def test_where_no_line_can_be_written_over_a_long_step_tells_how_long_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Held()
    lines = Lines(clock)
    lines.report(Step("boot worker", "Standard_D2s_v5"))
    for second in range(25):
        lines.tick()
        if second == 12:
            lines.report(Waiting("the worker's SSH server", 300))
        clock.sleep(1)
    lines.report(Step("snapshot", "os"))
    clock.sleep(3)
    lines.report(Step("clone", "os"))
    assert capsys.readouterr().err.splitlines() == [
        "→ boot worker: Standard_D2s_v5",
        "  boot worker: 0:10 so far",
        "  waiting for the worker's SSH server (0:00 of up to 5:00)",
        "  waiting for the worker's SSH server (0:10 of up to 5:00)",
        "  boot worker took 0:25",
        "→ snapshot: os",
        "→ clone: os",
    ]


def test_several_disks_have_a_total_with_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Held()
    lines = Lines(clock)
    for name, size in (("os", 100 * MIB), ("data-0", 300 * MIB)):
        lines.report(Copied(name, 0, size, 0))
    lines.report(Copied("os", 10 * MIB, 100 * MIB, 5 * MIB))
    clock.sleep(10)
    lines.report(Copied("os", 50 * MIB, 100 * MIB, 5 * MIB, "limit"))
    clock.sleep(10)
    lines.report(Copied("os", 100 * MIB, 100 * MIB, 7 * MIB))
    assert capsys.readouterr().err.splitlines() == [
        "  os: 50 MiB of 100 MiB, 5 MiB sent, 5 MiB/s, ETA 0:10, bottleneck: limit",
        "  total: 50 MiB of 400 MiB, 5 MiB sent, 5 MiB/s, ETA 1:10",
        "  os: 100 MiB done in 0:20, 7 MiB sent",
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_live_display_fits_its_terminal(width: int) -> None:
    clock = Held()
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
    screen = OneVm(clock, console)
    for name in ("os", "data-0"):
        screen.report(Copied(name, 0, 200 * MIB, 0))
    for name in ("os", "data-0"):
        screen.report(Copied(name, 40 * MIB, 200 * MIB, 10 * MIB, "destination"))
    screen.report(Waiting("the worker's SSH server", 300, 40.0))
    clock.sleep(2)
    console.print(screen.live.get_renderable())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [row.split()[0] for row in lines[:3]] == ["os", "data-0", "total"]
    assert "(0:42 of up to 5:00)" in " ".join(lines)
    assert max(map(len, lines)) <= width
    assert not any("…" in row for row in lines)
    if width >= 80:
        assert "destination" in lines[0]
        assert "80 MiB of 400 MiB" in lines[2]


def watch() -> None:
    with watching(as_json=False) as report:
        report(Step("boot worker"))
        report(Copied("os", 10 * MIB, 10 * MIB, 5 * MIB))
        report(
            Notice(
                "An " + "x" * 100 + " of words that are read one after the other, and of which none is cut."
            )
        )


def test_a_terminal_gets_a_live_display_that_leaves_only_lines_and_cuts_no_word() -> None:
    said = shown(watch, width=40)
    assert "\x1b[?25l" in said  # the cursor is hidden while it lives
    notice = text(said).partition("! An")[2].splitlines()[:4]
    assert notice[1] == "  " + "x" * 100
    assert notice[2].startswith("  of words that are read one after")
    assert max(map(len, notice[2:])) <= 40


@pytest.mark.parametrize("variable", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"CI": "true"}])
def test_whoever_asks_for_plain_text_gets_lines(variable: dict[str, str]) -> None:
    said = shown(watch, variables=variable)
    assert "\x1b" not in said
    assert said.startswith("→ boot worker\n  os: 10 MiB done in 0:00, 5 MiB sent\n! An ")


def test_a_pipe_gets_lines() -> None:
    with Forked(watch) as process:
        assert process.communicate(30)[1].startswith(
            "→ boot worker\n  os: 10 MiB done in 0:00, 5 MiB sent\n! An "
        )


def test_events_in_json_carry_the_time_in_utc() -> None:
    stream = StringIO()
    json_lines(stream)(Waiting("the worker", 300, 10.0, 5))
    event = json.loads(stream.getvalue())
    time = datetime.fromisoformat(event.pop("time").replace("Z", "+00:00"))
    assert time.utcoffset() == timedelta(0)
    about = {"vm": "", "disk": ""}
    assert event == about | {
        "event": "waiting",
        "what": "the worker",
        "seconds": 300,
        "waited": 10.0,
        "percent": 5,
    }


@pytest.mark.parametrize(
    ("seconds", "shown_"),
    [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_time_spans(seconds: float, shown_: str) -> None:
    assert span(seconds) == shown_


@pytest.mark.parametrize(
    ("count", "shown_"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (64 * MIB, "64 MiB"), (1 << 40, "1 TiB")],
)
def test_amounts_of_bytes(count: int, shown_: str) -> None:
    assert amount(count) == shown_


@pytest.mark.slow
def test_a_run_tells_its_times_the_size_of_all_disks_and_what_it_waits_for(
    azure: Sandbox,
    source: Source,
    image: Callable[..., Path],
    told: list[Event],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(patience, "_LONG_SECONDS", 0.05)  # on Azure an operation takes seconds and minutes
    azure.add_vm("web", image("os"), [image("data", MIB, seed=1)])
    for method, path in (
        ("PUT", "/snapshots/"),
        ("PUT", "/disks/coriolis"),
        ("PUT", "/virtualMachines/"),
        ("POST", "/deallocate"),
    ):
        azure.faults.add("slow-operation", method=method, path=path, times=1)
    azure.faults.add("throttle", path="/disks/", seconds=1.5)
    before = datetime.now(timezone.utc)
    done = source.replicate("web", tmp_path / "images", shutdown=True)
    after = datetime.now(timezone.utc)
    started, point = (
        datetime.fromisoformat(time.replace("Z", "+00:00")) for time in (done.started, done.point)
    )
    assert before - timedelta(seconds=1) <= started <= point <= after
    assert done.started.endswith("Z")
    copied = [event for event in told if isinstance(event, Copied)]
    assert copied[:2] == [Copied("os", 0, 3 * MIB, 0), Copied("data-0", 0, MIB, 0)]
    waits = " | ".join(line(event) for event in told if isinstance(event, Waiting))
    assert "waiting for Azure, which is throttling our requests (0:00 of up to 0:02)" in waits
    made = [rf"create coriolis-\w+-{role}" for role in (r"snapshot-\S+", r"clone-\S+", "worker")]
    for what in [*made, "deallocate web"]:
        assert re.search(rf"waiting for Azure to {what} \(0:\d\d of up to 45:00\)", waits), (what, waits)
    assert re.search(r"waiting for the deletion of \d+ resources, 0 % done \(0:00 so far\)", waits)
