"""`replicate` of many VMs as a user meets it: tables, documents, exit codes, progress, Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from coriolis_azure.cli.entry import cli
from coriolis_azure.cli.screens import ManyVms
from coriolis_azure.cli.several_vms import Lines
from coriolis_azure.errors import InvalidInput
from coriolis_azure.events import BEGIN, DONE, FAILED, Copied, Event, Notice, Step
from harness.clocks import Held
from harness.command_line import COMMAND, SLOW, run
from harness.constants import DEADLINE, MIB

DIRECT = ["--mechanism", "snapshots"]


@pytest.mark.slow
def test_all_vms_go_to_folders_of_their_own_and_the_first_failure_gives_the_exit_code(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    disk = served.parent / "os.raw"
    run("sandbox", "add-vm", served, "db", "--os-disk", disk)
    dest = tmp_path / "dest"
    everything = ["replicate", *settings, *DIRECT, "--all", "--to", dest]
    page = tmp_path / "all.html"
    done = json.loads(run(*everything, "--json", "--parallel", 2, "--report", page).stdout)
    assert sorted(re.findall('<h2 id="r[0-9]+">(\\S+) <small>began', page.read_text())) == ["db", "web"]
    assert [vm["vm"] for vm in done["vms"]] == ["db", "web"]
    assert {disk["name"] for disk in done["vms"][1]["disks"]} == {"os", "data-0"}
    assert done["left_behind"] == []
    assert (dest / "db/os.raw").read_bytes() == (dest / "web/os.raw").read_bytes() == disk.read_bytes()

    (dest / "db/.vm").write_text("another\n")
    again = run(*everything, check=InvalidInput.exit_code)
    first, second = again.stdout.splitlines()[2:]
    assert first.split()[0] == "db"
    assert "holds the replica of another VM: another" in first
    assert second.split()[:2] == ["web", "done"]
    assert "! failed: db: " in again.stderr
    assert "web: 0 B sent" in again.stderr

    alone = run("replicate", *settings, *DIRECT, "web", "--to", dest / "web", "--retries", 1, "--json")
    assert json.loads(alone.stdout)["vm"] == "web"

    # Ctrl-C ends all VMs, and the table tells of each. The limit keeps the copying from being over before that.
    command = [*COMMAND, *map(str, everything), "--json", "--full", *SLOW]
    before = run("sandbox", "resources", served).stdout
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if '"name": "snapshot"' in line:
                break
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    told = json.loads(out)["vms"]
    assert [vm["vm"] for vm in told] == ["db", "web"]
    assert told[1]["error"]["error"] == "Cancelled"
    assert run("sandbox", "resources", served).stdout == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "it is unclear which VMs"),
        (["web", "--all"], "it is unclear which VMs"),
        (["--tag", "a=b", "--all"], "it is unclear which VMs"),
        (["--tag", "backup"], "'backup' is not a tag with its value"),
        (["--tag", "a=b", "--tag", "a=c"], "cannot have two values of the tag a"),
        (["web", "--exclude", "web"], "leaves nothing"),
    ],
    ids=" ".join,
)
def test_what_is_not_clear_is_refused(arguments: list[str], says: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text("{}")
    line = ["replicate", "-c", str(file), "-e", str(file), "--to", str(tmp_path / "dest"), *arguments]
    result = CliRunner().invoke(cli, line, standalone_mode=False)
    assert isinstance(result.exception, InvalidInput)
    assert says in result.exception.message
    assert not (tmp_path / "dest").exists()


STORY: list[Event] = [
    Step("replicate", "3 VMs, 2 at a time"),
    Step(BEGIN, "web to /d/web", vm="web"),
    Step("snapshot", "os", vm="web"),
    Step(BEGIN, "db to /d/db", vm="db"),
    Copied("os", MIB, 4 * MIB, MIB, vm="web"),
    Notice("the VM is\x1b[2J caught", vm="db"),
    Step(FAILED, "db: no", vm="db"),
]


def test_lines_tell_of_each_vm_that_ends_and_of_all_from_time_to_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Held()
    lines = Lines(clock)
    for event in STORY:
        lines.report(event)
    lines.tick()
    clock.sleep(10)
    lines.tick()
    lines.report(Step(DONE, "web: 4 MiB sent in 0:10", vm="web"))
    assert capsys.readouterr().err.splitlines() == [
        "→ replicate: 3 VMs, 2 at a time",
        "! db: the VM is\\x1b[2J caught",
        "! failed: db: no",
        "  0 done, 1 failed, 1 VM in progress: 1 MiB of 4 MiB",
        "  web: 4 MiB sent in 0:10",
    ]


@pytest.mark.parametrize("width", [40, 120])
def test_a_screen_has_a_line_for_each_vm_in_progress(width: int) -> None:
    console = Console(file=StringIO(), width=width, force_terminal=True)
    screen = ManyVms(Held(), console)
    for event in STORY[:6]:
        screen.report(event)
    with console.capture() as shown:
        console.print(screen.live.get_renderable(), soft_wrap=False)
    lines = [line.rstrip() for line in shown.get().splitlines()]
    assert [line.split()[0] for line in lines[:2]] == ["web", "db"]
    assert "copy: 1 MiB of 4 MiB" in lines[0]
    assert "0 done, 2 VMs in progress" in lines[2]
    assert max(map(len, lines)) <= width


@pytest.mark.slow
def test_what_a_killed_fleet_leaves_is_gone_after_the_next_clean_up(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    before = run("sandbox", "resources", served).stdout
    command = [*COMMAND, "replicate", *settings, "--all", "--to", str(tmp_path / "dest"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if '"name": "copy"' in line:
                break
        process.kill()
        process.communicate(timeout=DEADLINE)
    assert run("sandbox", "resources", served).stdout != before
    run("cleanup", *settings)
    assert run("sandbox", "resources", served).stdout == before
