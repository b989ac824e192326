"""The command line as a user meets it: a real process, its stdout, stderr and exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from coriolis_azure import errors, sandbox
from coriolis_azure.azure import names
from coriolis_azure.model import Record, Run
from coriolis_azure.run import journal
from coriolis_azure.run.journal import Journal
from coriolis_azure.source import Source
from harness.command_line import COMMAND, SLOW, run
from harness.constants import DEADLINE, MIB
from harness.late_answers import NSG
from harness.processes import Forked, command
from harness.waiting import eventually

pytestmark = pytest.mark.slow


def test_replicate_twice_with_json_on_stdout_and_events_on_stderr(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    before = run("sandbox", "resources", served).stdout
    page = tmp_path / "run.html"
    first = run("replicate", *settings, "web", "--to", tmp_path / "images", "--json", "--report", page)
    assert all(f"<h2>{part}</h2>" in page.read_text() for part in ("Timeline", "Disks", "Change maps"))
    told = json.loads(first.stdout)
    assert told["vm"] == "web"
    assert told["mechanism"] == "worker"
    assert told["left_behind"] == []
    names = {"name", "id", "size_bytes", "read_bytes", "sent_bytes", "zero_bytes", "skipped_bytes"}
    names |= {
        "full",
        "verified",
        "root",
        "mechanism",
        "tier",
        "reason",
        "listed_bytes",
        "relied_bytes",
        "checked_bytes",
    }
    assert [set(disk) for disk in told["disks"]] == [names] * 2
    events = [json.loads(line) for line in first.stderr.splitlines()]
    assert {"step", "copied"} <= {event["event"] for event in events}

    changed = served.parent / "data.raw"
    content = bytearray(changed.read_bytes())
    content[8192:12288] = os.urandom(4096)
    changed.write_bytes(content)
    run("sandbox", "write", served, "web", "0", changed)
    second = json.loads(run("replicate", *settings, "web", "--to", tmp_path / "images", "--json").stdout)
    assert [disk["sent_bytes"] for disk in second["disks"]] == [0, 4096]
    assert (tmp_path / "images/data-0.raw").read_bytes() == content
    assert (tmp_path / "images/os.raw").read_bytes() == (served.parent / "os.raw").read_bytes()
    assert run("sandbox", "resources", served).stdout == before


def test_a_point_that_was_kept_is_listed_and_given_back(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    images, older = tmp_path / "images", (served.parent / "data.raw").read_bytes()
    first = json.loads(run("replicate", *settings, "web", "--to", images, "--keep", 1, "--json").stdout)
    changed = served.parent / "data.raw"
    changed.write_bytes(os.urandom(4096) + older[4096:])
    run("sandbox", "write", served, "web", "0", changed)
    second = json.loads(run("replicate", *settings, "web", "--to", images, "--json").stdout)
    told = json.loads(run("status", images, "--json").stdout)
    assert told["vm"].endswith("/web")
    assert told["point"] == second["point"]
    assert told["points"] == [first["point"]]
    assert told["disks"] == ["data-0", "os"]
    assert told["unfinished"] is None
    shown = run("status", images).stdout
    assert [line.split()[0] for line in shown.splitlines() if line.strip().startswith("20")] == [
        first["point"],
        second["point"],
    ]
    missing = run("restore", images, "--point", "2001-01-01T00:00:00Z", "--to", tmp_path / "no", check=2)
    assert first["point"] in missing.stderr
    assert not (tmp_path / "no").exists()
    done = run("restore", images, "--point", first["point"], "--to", tmp_path / "restored")
    assert "yes" in done.stdout
    assert (tmp_path / "restored/data-0.raw").read_bytes() == older
    assert (tmp_path / "restored/os.raw").read_bytes() == (served.parent / "os.raw").read_bytes()
    assert (images / "data-0.raw").read_bytes() == changed.read_bytes()
    for folder in (images, tmp_path / "restored"):
        assert "NO" not in run("verify", folder).stdout
    with Source(*(json.loads(Path(file).read_text()) for file in settings[1::2])) as source:
        assert source.status(images).points == (first["point"],)
        again = source.restore(images, "latest", tmp_path / "latest")
    assert again.point == second["point"]
    assert [(disk.name, disk.verified) for disk in again.disks] == [("data-0", True), ("os", True)]


def test_of_two_schedules_of_one_replica_the_second_ends_and_nothing_is_lost(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    """Two real processes: the first is stopped while it holds the replica, the second comes in the meantime."""
    images, before = tmp_path / "images", run("sandbox", "resources", served).stdout
    run(
        "sandbox",
        "fault",
        served,
        "throttle",
        "--path",
        "/snapshots/coriolis",
        "--method",
        "PUT",
        "--seconds",
        "3",
    )
    line = ["replicate", *settings, "web", "--to", str(images)]
    with Forked(command, [*line, "--json"]) as first:
        eventually((images / ".run").exists)
        first.send_signal(signal.SIGSTOP)
        try:
            second = run(*line, check=errors.InvalidInput.exit_code)
            seen = json.loads(run("status", images, "--json").stdout)
        finally:
            first.send_signal(signal.SIGCONT)
        assert f"another run is using {images}" in second.stderr
        assert "what to do: Wait until it ends" in second.stderr
        assert (seen["running"], seen["state"]) == (True, "running")
        out, said = first.communicate(DEADLINE)
        assert first.wait(DEADLINE) == 0, said
    assert all(disk["verified"] for disk in json.loads(out)["disks"])
    assert (images / "os.raw").read_bytes() == (served.parent / "os.raw").read_bytes()
    assert json.loads(run("status", images, "--json").stdout)["state"] == "good"
    assert run("sandbox", "resources", served).stdout == before


def test_a_vm_that_azure_could_not_have_is_not_added(served: Path) -> None:
    before = run("sandbox", "resources", served).stdout
    line = ("sandbox", "add-vm", served, "[red]\nv\u202e[/red]", "--os-disk", served.parent / "os.raw")
    failed = run(*line, check=2)
    assert r"'[red]\nv\u202e[/red]' cannot be the name of a VM in Azure" in " ".join(failed.stderr.split())
    assert run("sandbox", "resources", served).stdout == before


def test_list_and_inspect_for_people_and_for_machines(settings: list[str]) -> None:
    assert "web" in run("list", *settings).stdout
    assert json.loads(run("list", *settings, "--json").stdout)[0]["name"] == "web"
    people = run("inspect", *settings, "web").stdout
    assert "2 vCPUs" in people
    info = json.loads(run("inspect", *settings, "web", "--json").stdout)
    assert info["num_cpu"] == 2
    assert [disk["size_bytes"] for disk in info["devices"]["disks"]] == [3 * MIB, 2 * MIB + 512]


@pytest.mark.parametrize("line", [["--help"], ["replicate", "--help"], ["explain"]], ids=" ".join)
def test_words_need_no_library_that_takes_long_to_import(line: list[str]) -> None:
    code = "import sys; from coriolis_azure.cli import main; main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "click" in imported
    assert not imported & {"azure.core", "rich.console", "jsonschema", "paramiko", "jinja2", "cryptography"}


def test_a_list_of_vms_does_not_wait_for_the_sdk_of_networks(settings: list[str]) -> None:
    """Importing it takes as long as importing all the other SDKs."""
    code = (
        "import sys; from coriolis_azure.cli import main; main(); print('azure.mgmt.network' in sys.modules)"
    )
    line = [sys.executable, "-c", code, "list", *settings]
    listed = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any("web" in row for row in listed)
    assert listed[-1] == "False"


def test_the_settings_may_come_from_the_environment(served: Path) -> None:
    """And an interpreter that has nothing imported yet does the same."""
    variables = {
        **os.environ,
        "CORIOLIS_AZURE_CONNECTION": str(served / "connection.json"),
        "CORIOLIS_AZURE_ENVIRONMENT": str(served / "environment.json"),
    }
    done = subprocess.run([*COMMAND, "list"], env=variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "web" in done.stdout


def test_an_unknown_vm_is_an_azure_error_that_names_those_there_are(
    settings: list[str], tmp_path: Path
) -> None:
    failed = run("replicate", *settings, "nobody", "--to", tmp_path / "x", check=3)
    assert "no VM nobody" in failed.stderr
    assert "web" in failed.stderr
    assert failed.stdout == ""
    page = tmp_path / "run.html"
    line = ("replicate", *settings, "nobody", "--to", tmp_path / "x", "--json", "--report", page)
    machine = run(*line, check=3)
    assert "no VM nobody" in page.read_text()
    error = json.loads(machine.stderr.splitlines()[-1])
    assert error["event"] == "error"
    assert error["exit_code"] == 3
    assert error["status"] == 404


def test_settings_that_do_not_match_are_told_line_by_line_with_exit_code_2(
    served: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "environment.json"
    wrong.write_text(json.dumps({"location": 1, "colour": "red"}))
    failed = run("list", "-c", served / "connection.json", "-e", wrong, check=2)
    assert "source_environment: location: must be of type string, not integer" in failed.stderr
    assert "source_environment: colour is not a known property" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["replicate"],
        ["nonsense"],
        ["schema", "nothing"],
        ["list", "-c", "/no/such/file", "-e", "/no/such/file"],
        ["sandbox", "resources", "/no/such/folder"],
    ],
)
def test_wrong_usage_is_exit_code_2_without_a_traceback(arguments: list[str]) -> None:
    failed = run(*arguments, check=2)
    assert failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("group", [[], ["sandbox"]])
def test_a_group_without_a_command_shows_its_help(group: list[str]) -> None:
    shown = run(*group, check=2).stderr
    assert shown.startswith("Usage: coriolis-azure")
    assert "\nCommands:\n" in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_how_to_complete(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_CORIOLIS_AZURE_COMPLETE", f"{shell}_source")
    assert "_CORIOLIS_AZURE_COMPLETE" in run().stdout


def test_words_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_CORIOLIS_AZURE_COMPLETE", "bash_complete")
    for words, found in (
        ("coriolis-azure rep", "plain,replicate"),
        ("coriolis-azure verify --js", "plain,--json"),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert run().stdout.splitlines() == [found]


def test_a_missing_argument_is_told_in_one_line_with_its_choices() -> None:
    assert "Choose from: connection, source-environment, prices\n" in run("schema", check=2).stderr


def test_bad_durations_and_disks_are_explained(served: Path, settings: list[str]) -> None:
    assert "Write a duration as" in run("cleanup", *settings, "--older-than", "soon", check=2).stderr
    assert (
        "is not the name of a disk"
        in run("sandbox", "write", served, "web", "first", settings[1], check=2).stderr
    )
    assert (
        "is not the name of a disk"
        in run("sandbox", "write", served, "web", "data-x", settings[1], check=2).stderr
    )
    for disk in ("9", "data-9"):
        assert "web" in run("sandbox", "write", served, "web", disk, served.parent / "os.raw", check=2).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_undoes_itself(
    served: Path, settings: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    before = run("sandbox", "resources", served).stdout
    line = ["replicate", *settings, "web", "--to", str(tmp_path / "images"), "--json", *SLOW]
    with Forked(command, line) as running:
        for event in running.stderr:
            if json.loads(event).get("name") == "snapshot":
                break
        running.send_signal(number)
        rest = running.stderr.read()
        assert running.wait(timeout=60) == 130, rest
    assert run("sandbox", "resources", served).stdout == before


def test_an_impatient_second_interrupt_does_not_stop_the_deleting(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    before = run("sandbox", "resources", served).stdout
    run("sandbox", "fault", served, "throttle", "--method", "DELETE", "--seconds", "3")
    line = ["replicate", *settings, "web", "--to", str(tmp_path / "images"), "--json"]
    with Forked(command, line) as running:
        for event in running.stderr:
            if json.loads(event).get("name") == "clean up":
                running.send_signal(signal.SIGINT)
                break
        rest = running.stderr.read()
        assert running.wait(timeout=60) == 0, rest
        assert "still deleting" in rest
    assert run("sandbox", "resources", served).stdout == before


def test_a_failed_run_that_leaves_something_says_what_to_do_about_it(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    run(
        "sandbox",
        "fault",
        served,
        "lock",
        "--path",
        "/virtualNetworks/coriolis",
        "--method",
        "DELETE",
        "--times",
        "0",
    )
    run(
        "sandbox",
        "fault",
        served,
        "refuse",
        "--path",
        "/snapshots/coriolis",
        "--method",
        "PUT",
        "--code",
        "BadRequest",
    )
    failed = run("replicate", *settings, "web", "--to", tmp_path / "images", check=3)
    assert (
        "left in Azure: temporary resources that could not be deleted: 1. Run `coriolis-azure cleanup`."
        in failed.stderr
    )
    run("sandbox", "fault", served, "--clear")
    run("cleanup", *settings)


def test_a_killed_run_is_cleaned_up_by_the_next_command(
    served: Path, settings: list[str], tmp_path: Path
) -> None:
    """Its journal shows that it is dead, so its age does not matter."""
    before = run("sandbox", "resources", served).stdout
    line = ["replicate", *settings, "web", "--to", str(tmp_path / "images"), "--json", *SLOW]
    with Forked(command, line) as running:
        for event in running.stderr:
            if json.loads(event).get("name") == "clone":
                break
        running.kill()
    assert run("sandbox", "resources", served).stdout != before
    dry = json.loads(run("cleanup", *settings, "--dry-run", "--json").stdout)
    assert [leftover["instance"] for leftover in dry["runs"]] == ["web"]
    assert run("sandbox", "resources", served).stdout != before
    assert "deleted" in run("cleanup", *settings).stdout
    assert run("sandbox", "resources", served).stdout == before
    assert "Nothing to clean up" in run("cleanup", *settings, "--older-than", "0s").stdout


def test_what_has_lost_its_tags_is_told_without_a_journal(settings: list[str]) -> None:
    connection, environment = (json.loads(Path(file).read_text()) for file in settings[1::2])
    with Source(connection, environment) as source:
        run_id = Run(names.new_run(), source.azure.subscription, "sandbox", "westeurope", "", "web")
        id = source.resources(run_id, Journal(run_id)).create("nsg", "nsg", NSG)["id"]
        source.azure.tag(id, {})
        told = run("cleanup", *settings, "--older-than", "0s")
        assert id in told.stdout
        assert "NO TAGS" in told.stdout
        assert "by hand" in told.stderr
        assert json.loads(run("cleanup", *settings, "--json").stdout)["untagged"] == [id]
        source.azure.delete(id)
    assert "Nothing to clean up" in run("cleanup", *settings).stdout


def test_a_replica_is_good_though_its_report_could_not_be_written(
    settings: list[str], served: Path, tmp_path: Path
) -> None:
    line = [*COMMAND, "replicate", *settings, "web", "--to", str(tmp_path / "images")]
    for more, told in (([], "could not be written to standard output"), (["--json"], '"exit_code": 8')):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run([*line, *more], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == errors.OutputLost.exit_code == 8
        assert told in done.stderr.splitlines()[-1 if more else -2]
        assert (tmp_path / "images/os.raw").read_bytes() == (served.parent / "os.raw").read_bytes()
    assert "yes" in run("verify", tmp_path / "images").stdout


@pytest.mark.parametrize("boot", ["", "an-earlier-one"])
def test_what_a_journal_names_and_has_lost_its_tags_is_left_behind(
    settings: list[str], tmp_path: Path, boot: str
) -> None:
    """Whatever the journal tells of its process: exit code 7, until it is gone."""
    connection, environment = (json.loads(Path(file).read_text()) for file in settings[1::2])
    dead = Run(names.new_run(), "", "sandbox", "westeurope", "", "web")
    with Source(connection, environment) as source:
        dead = replace(dead, subscription=source.azure.subscription)
        with Journal(dead, journal.default_folder()) as kept:
            id = source.resources(dead, kept).create("nsg", "nsg", NSG)["id"]
            source.azure.tag(id, {})
        path = journal.default_folder() / f"{dead.id}.journal"
        if boot:
            first, rest = path.read_text().split("\n", 1)
            path.write_text(json.dumps({**json.loads(first), "boot": boot}) + "\n" + rest)
        for more in ([], ["--older-than", "0s"]):
            told = run("cleanup", *settings, *more, check=7)
            assert f"could not delete: {id}" in told.stderr
            assert "Delete by hand those that have lost our tags" in told.stderr
            assert told.stdout.count(id) == 1
            assert "NO TAGS" in told.stdout
            document = json.loads(run("cleanup", *settings, *more, "--json", check=7).stdout)
            assert document["left_behind"] == document["untagged"] == [id]
        tried = run("cleanup", *settings, "--dry-run")
        assert id in tried.stdout
        assert "would be deleted" not in tried.stdout
        source.azure.delete(id)
    assert "Nothing to clean up" in run("cleanup", *settings).stdout


def test_records_of_volumes_are_listed_and_forgotten_by_age(settings: list[str]) -> None:
    """Those of the orchestrator's transfers, which nobody deletes with a transfer."""
    connection, environment = (json.loads(Path(settings[index]).read_text()) for index in (1, 3))
    id = "0123456789abcdef"
    with Source(connection, environment) as source:
        source.records().update(id, lambda _: Record(id, "disk", "state"))

    def old(*options: str) -> list[bool]:
        volumes = json.loads(run("cleanup", *settings, "--json", *options).stdout)["volumes"]
        assert [volume["holds"] for volume in volumes] == ["state"] * len(volumes)
        return [volume["old"] for volume in volumes]

    assert old("--older-than", "0s") == [False]
    assert old("--volumes-older-than", "1d") == [False]
    assert old("--volumes-older-than", "0s", "--dry-run") == [True]
    assert "kept" in run("cleanup", *settings).stdout
    assert old("--volumes-older-than", "0s") == [True]
    assert old() == []


def test_schemas_and_help(tmp_path: Path) -> None:
    for name in ("connection", "source-environment"):
        assert json.loads(run("schema", name).stdout)["properties"]
    for words in ([], ["replicate"], ["sandbox"], ["sandbox", "serve"], ["cleanup"], ["demo"]):
        assert "Usage: " in run(*words, "--help").stdout
    assert "Exit codes" in run("--help").stdout


@pytest.mark.parametrize("before", [True, False])
def test_v_works_before_and_after_the_command_and_logs_each_step_once(
    settings: list[str], tmp_path: Path, before: bool
) -> None:
    line = ["replicate", *settings, "web", "--to", str(tmp_path / "images")]
    done = run(*(["-v", *line] if before else [*line, "-v"]))
    for step in ("inspect: web", "snapshot: os, data-0", "clean up: "):
        (told,) = (told for told in done.stderr.splitlines() if step in told)
        assert " INFO coriolis_azure." in told
    made = [
        told
        for told in done.stderr.splitlines()
        if " INFO coriolis_azure.run.resources: create /subs" in told
    ]
    assert len(made) > 5
    assert " DEBUG " not in done.stderr


def test_v_counts_wherever_it_is_given(served: Path) -> None:
    assert " DEBUG " in run("-v", "sandbox", "-v", "resources", served).stderr
    assert " DEBUG " in run("sandbox", "resources", served, "-vv").stderr
    assert run("sandbox", "resources", served).stderr == ""


def test_a_limit_without_a_unit_says_what_is_meant(settings: list[str], tmp_path: Path) -> None:
    failed = run("replicate", *settings, "web", "--to", tmp_path / "images", "--limit", "10", check=2)
    assert "--limit: '10' is not a rate" in failed.stderr
    assert "in bytes per second: 10MiB/s." in failed.stderr
    assert not (tmp_path / "images").exists()
    run("replicate", *settings, "web", "--to", tmp_path / "images", "--limit", "10MiB/s")


def test_no_secret_is_logged_at_any_level(served: Path, settings: list[str], tmp_path: Path) -> None:
    secret = json.loads((served / "connection.json").read_text())["service_principal_credentials"][
        "client_secret"
    ]
    done = run("-vv", "replicate", *settings, "web", "--to", tmp_path / "images")
    assert "DEBUG" in done.stderr
    for text in (secret, "PRIVATE KEY", "Bearer ey"):
        assert text not in done.stderr + done.stdout


def test_the_demo_holds_every_comparison() -> None:
    told = json.loads(run("demo", "--json").stdout)
    assert told["held"]
    assert told["resources_before"] == told["resources_after"]
    assert len(told["checks"]) == 10
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    said = re.search(r"a new file of 3 MiB on a disk of (\d+) MiB moves ([\d.]+) MiB", readme)
    assert said
    moved = told["second"]["disks"][0]
    assert (moved["size_bytes"] / MIB, round(moved["sent_bytes"] / MIB, 1)) == (int(said[1]), float(said[2]))


def test_the_local_functions_need_a_serving_sandbox(tmp_path: Path) -> None:
    from coriolis_azure.errors import InvalidInput

    with pytest.raises(InvalidInput, match="no sandbox is serving"):
        sandbox.resources(tmp_path)
