"""The page on schedules: its units are units, its commands parse, and its alerts name metrics that exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import pytest

from coriolis_azure.cli import (
    fleet,  # noqa: F401 - its command belongs to the group
    prometheus,
)
from coriolis_azure.cli.commands import cli

PAGE = Path(__file__).parent.parent / "docs/howto/schedules.md"
PROGRAM = "coriolis-azure"


def block(mark: str) -> str:
    """The code after a mark in the page."""
    found = re.search(rf"<!-- {re.escape(mark)} -->\n```\w*\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found, mark
    return found[1]


def commands() -> list[list[str]]:
    """All commands of the page, without the name of the program."""
    code = re.findall(r"```(?:ini|sh)?\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code += re.findall(r"`([^`\n]+)`", PAGE.read_text())
    found = []
    for text in code:
        for line in re.split(r"\n|;|\|\|", text):
            words = shlex.split(line, comments=True) if f"{PROGRAM} " in line else []
            at = [number for number, word in enumerate(words) if re.split("[/=]", word)[-1] == PROGRAM]
            if at and words[at[0] + 1] in cli.commands:
                rest = words[at[0] + 1 :]
                found.append([word for word in rest if not re.match(r"\d?>", word)])
    return found


def test_the_page_has_the_commands_that_a_schedule_needs() -> None:
    names = [line[0] for line in commands()]
    assert names.count("replicate") == 2
    assert {"status", "verify"} <= set(names)
    for line in commands():
        if line[0] == "replicate":
            assert {"--retries", "--json"} <= set(line)


@pytest.mark.parametrize("line", commands(), ids=" ".join)
def test_a_command_of_the_page_parses(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text("{}")
    for name in ("CONNECTION", "ENVIRONMENT"):
        monkeypatch.setenv(f"CORIOLIS_AZURE_{name}", str(settings))
    words = [str(settings) if word.startswith("/etc/coriolis-azure/") else word for word in line]
    called, command, rest = cli.resolve_command(click.Context(cli), words)
    assert command is not None
    assert command.make_context(called, rest).params


def test_the_units_are_units(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    ours = tmp_path / "coriolis-azure"
    ours.write_text("#!/bin/sh\n")
    ours.chmod(0o755)
    units = []
    for name in ("coriolis-azure.service", "coriolis-azure.timer"):
        units.append(tmp_path / name)
        units[-1].write_text(block(f"unit: {name}").replace("/usr/local/bin/coriolis-azure", str(ours)))
    line = [program, "verify", "--man=no", "--recursive-errors=no", *map(str, units)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    told = [text for text in done.stderr.splitlines() if str(tmp_path) in text or "coriolis-azure." in text]
    assert told == []
    assert done.returncode == 0, done.stderr
    units[0].write_text(units[0].read_text().replace("Type=oneshot", "Type=twoshot"))
    spoilt = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert "twoshot" in spoilt.stderr


def test_the_cron_line_has_five_fields_a_user_and_a_command() -> None:
    (line,) = block("cron").splitlines()
    fields = line.split(maxsplit=6)
    assert all(re.fullmatch(r"[\d*/,-]+", field) for field in fields[:5])
    assert fields[5] == "replicas"
    assert "%" not in line  # which cron takes for the end of the line
    subprocess.run(["sh", "-n", "-c", fields[6]], check=True)


def test_the_alerts_name_metrics_that_are_written() -> None:
    yaml: Any = pytest.importorskip("yaml")
    rules = yaml.safe_load(block("alerts"))["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    known = {f"{prometheus.PREFIX}{name}" for name, *_ in prometheus.METRICS}
    known |= set(re.findall(r"coriolis_azure_\w+", prometheus.text([], datetime.now(timezone.utc))))
    named = {name for rule in rules for name in re.findall(r"coriolis_azure_\w+", rule["expr"])}
    assert named
    assert named <= known
