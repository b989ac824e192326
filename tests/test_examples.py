"""The examples in the README, the pages and the docstrings run as they stand, against a sandbox that serves HTTPS."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import (
    AzureExportProvider,
    Fleet,
    FleetResult,
    Replicated,
    Source,
    errors,
    events,
    testing,
)
from coriolis_azure.settings import Environment, read_json
from harness.command_line import run
from harness.constants import DEADLINE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def names(served: Path) -> dict[str, Any]:
    """What the examples take for granted: two settings, and a VM that is called web-1."""
    disk = served.parent / "os.raw"
    run("sandbox", "add-vm", served, "web-1", "--os-disk", disk)
    return {
        "connection_info": read_json(served / "connection.json"),
        "source_environment": read_json(served / "environment.json"),
    }


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def in_docstring(documented: object) -> str:
    """The indented code of a docstring."""
    lines = (inspect.getdoc(documented) or "").splitlines()
    indented = [number for number, line in enumerate(lines) if line.startswith("    ")]
    return textwrap.dedent("\n".join(lines[indented[0] : indented[-1] + 1]))


def in_page(page: str) -> list[str]:
    """The Python code of a page, with its folders below the current one."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [example.replace('"/srv/', '"') for example in code]


def of_source() -> str:
    return in_docstring(Source)


def of_the_readme() -> str:
    (code,) = in_page("README.md")
    return code


@pytest.mark.parametrize("example", [of_source, of_the_readme])
def test_an_example_of_the_api_replicates(
    example: Callable[[], str], names: dict[str, Any], tmp_path: Path
) -> None:
    scope = dict(names)
    exec(example(), scope)
    report = scope["report"]
    assert isinstance(report, Replicated)
    assert (report.vm, report.left_behind) == ("web-1", ())
    assert (tmp_path / "replicas/web-1/os.raw").stat().st_size == report.disks[0].size_bytes


@pytest.mark.parametrize(
    "of_a_fleet", [lambda: in_docstring(Fleet), lambda: in_page("docs/howto/fleet.md")[0]]
)
def test_an_example_of_a_fleet_replicates(
    of_a_fleet: Callable[[], str], names: dict[str, Any], tmp_path: Path
) -> None:
    names["source_environment"] = {**names["source_environment"], "replica_export_mechanism": "snapshots"}
    scope = dict(names)
    exec(of_a_fleet(), scope)
    result = scope["result"]
    assert isinstance(result, FleetResult)
    assert (result.failed, result.left_behind) == ((), ())
    assert (tmp_path / "replicas/web-1/os.raw").exists()


def test_the_examples_of_the_page_on_the_api(names: dict[str, Any]) -> None:
    first, _, third = in_page("docs/howto/python.md")
    scope = dict(names)
    exec(first, scope)
    with Source(names["connection_info"], names["source_environment"]) as source:
        scope["source"] = source
        exec(third, scope)
    assert [disk.sent_bytes for disk in scope["report"].disks] == [0]


@pytest.mark.parametrize("limit", ["", "16KiB/s"])
def test_the_script_of_the_page_on_the_api_shows_progress_and_is_cancelled_by_a_signal(
    names: dict[str, Any], tmp_path: Path, limit: str
) -> None:
    """Cancelled while it copies, which would take minutes."""
    settings = {"connection": names["connection_info"], "environment": dict(names["source_environment"])}
    if limit:
        settings["environment"]["bandwidth_limit"] = limit
    (tmp_path / "azure").mkdir()
    for name, content in settings.items():
        (tmp_path / f"azure/{name}.json").write_text(json.dumps(content))
    script = in_page("docs/howto/python.md")[1]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state")}
    command = [sys.executable, "-uc", script]
    with subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if limit and line.startswith("copy "):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    assert said[-1].startswith("cancelled; left in Azure: []" if limit else "as of ")
    assert ("os: 100 %" in "".join(said)) == (not limit)


def test_the_example_of_the_plugin(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    exec(in_docstring(AzureExportProvider), dict(names))
    assert "web-1" in capsys.readouterr().out.splitlines()


def test_the_example_of_events(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scope = dict(names)
    exec(in_docstring(events), scope)
    with Source(names["connection_info"], names["source_environment"], report=scope["report"]) as source:
        source.replicate("web-1", tmp_path / "images")
    assert "web-1 os: 100%" in capsys.readouterr().out.splitlines()


def test_the_example_of_errors(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with Source(names["connection_info"], names["source_environment"]) as source:
        exec(in_docstring(errors), {"source": source})
    assert "Exit code 3" in capsys.readouterr().out


def test_the_example_of_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    exec(in_docstring(Environment), {})
    assert capsys.readouterr().out == "westeurope 1024\n"


def test_the_example_of_checking_a_medium(tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(in_docstring(testing.check_medium), scope)
    scope["test_my_medium"](tmp_path)


LESSON, ON_AZURE = "docs/tutorial/sandbox.md", "docs/tutorial/azure.md"
NOT_RUN = r"\*Not run by our tests[^\n]*\*"


def steps(page: str, part: str = "") -> str:
    """The shell commands of a page or a part of it, but for those that it says are not run."""
    text = (ROOT / page).read_text()
    if part:
        (text,) = re.findall(rf"^## {part}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    blocks = re.findall(rf"^({NOT_RUN}\n+)?```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return "\n".join(code for told, code in blocks if not told)


def test_the_lesson_on_azure_has_the_commands_of_the_lesson_on_the_sandbox() -> None:
    """So they are run here as they stand, once; but for the role, which is printed without Azure."""
    ours = [line for line in steps(ON_AZURE).splitlines() if line]
    assert len(ours) > 5
    rest = set(ours) - set(steps(LESSON).splitlines())
    assert [line.split(" --scope")[0] for line in rest] == ["coriolis-azure role"]
    words = rest.pop().partition(" > ")[0].split()[1:]
    assert json.loads(run(*words).stdout)["IsCustom"]


def test_the_lesson_on_the_sandbox_runs_as_it_stands(tmp_path: Path) -> None:
    """With what two how-tos add to it; in a session of its own, so that nothing of it outlives the test."""
    lesson, stop, rest = steps(LESSON).partition("kill %1")
    assert (stop, rest.strip()) == ("kill %1", "")
    more = [steps(f"docs/howto/{page}.md", "Try it on the sandbox") for page in ("fleet", "failed")]
    script = "\n".join([lesson, *more, stop])
    program = tmp_path / "bin/coriolis-azure"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m coriolis_azure "$@"\n')
    program.chmod(0o755)
    surroundings = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    with (tmp_path / "told").open("w+") as told:
        shell = subprocess.Popen(
            ["bash", "-euxo", "pipefail", "-c", script],
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
        try:
            code = shell.wait(timeout=5 * DEADLINE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
        told.seek(0)
        said = told.read()
        assert code == 0, said[-3000:]
        sent = re.findall(r"^ os +64 MiB +64 MiB +(\d+ MiB)", said, re.MULTILINE)
        assert sent[:2] == re.findall(r"\b[Ii]t sent (\d+ MiB)", (ROOT / LESSON).read_text())
        assert re.findall(r"^exit code \d+", said, re.MULTILINE) == ["exit code 3", "exit code 7"]
        for page in ("replicas.html", "run.html", "fleet.html"):
            assert "web-1" in (tmp_path / page).read_text()
