"""The script that asks a real subscription what no document says, against the sandbox over HTTPS."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coriolis_azure.sandbox.server import local

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "docs/ask_azure.py"


def ask(served: Path, *options: object, check: int = 0) -> str:
    """Run the script about the VM `web`; return what it prints."""
    files = (served / "connection.json", served / "environment.json")
    words = [sys.executable, SCRIPT, *files, "--vm", "web", *options]
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout


def test_nothing_is_made_unless_asked(served: Path) -> None:
    before = local.resources(served)
    told = ask(served)
    assert "Nothing was made" in told
    assert "1 USD" in told
    assert local.resources(served) == before


def test_every_question_gets_an_answer_and_nothing_stays(served: Path, tmp_path: Path) -> None:
    before, answers = local.resources(served), tmp_path / "answers.json"
    told = ask(served, "--yes", "--json", answers, "--pause", 0.5)
    assert "All that was made is deleted." in told
    assert local.resources(served) == before
    found = {row["question"]: row["answer"] for row in json.loads(answers.read_text())}
    assert found["a second grant gives the same URL"] == "True"
    assert found["a read after the second grant was ended"] == "403 AuthenticationFailed"
    assert found["deleting a snapshot that is granted"].startswith("409")
    assert found["a sixth grant in a family"].startswith("409")
    assert found["what changed from a snapshot to itself"].startswith("0 written, 0 cleared")
    assert found["the older one asked about the newer"].startswith("400")
    assert found["changes since a full snapshot"].startswith("409")
    assert "a second" in found["reads of 1 MiB, 8 at a time"]
    assert "boot worker" in found["a first run"]
    assert [found[f"it {what}"] for what in ("stops", "starts", "is deleted")] == ["done"] * 3
    assert found["a first run"].endswith("0 left behind")
    assert found["a later run"].startswith("0 MiB")
    assert re.fullmatch(r"has \d+ of the \d+ tags of its VM", found["the OS disk of its worker"])
    assert not any("could not go on" in question for question in found)
    written = answers.read_text() + told
    assert "sig=" not in written
    assert str(local.resources(served)[0]["id"]).split("/")[2] not in written  # the subscription


def test_what_was_made_is_deleted_whatever_happens(served: Path) -> None:
    """Azure refuses everything about one kind of question: the others go on."""
    before = local.resources(served)
    local.fault(served, "refuse", method="PUT", path="/restorePointCollections/", times=0)
    told = ask(served, "--yes", "--pause", 0.1, "--only", "points", "--only", "grants")
    local.fault_rules(served, clear=True)
    assert "points could not go on" in told
    assert "a second grant gives the same URL" in told
    assert local.resources(served) == before
