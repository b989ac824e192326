"""What remedies name is there: settings, commands and options."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest

from coriolis_azure import settings
from coriolis_azure.azure import codes
from coriolis_azure.cli.entry import cli
from coriolis_azure.events import counted

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "coriolis_azure"
WRITERS = {"file_backup_writer", "http_backup_writer", "ssh_backup_writer"}  # the orchestrator's


@cache
def code() -> list[tuple[Path, list[ast.AST]]]:
    """The package's files, each with all nodes of its syntax tree."""
    return [(path, list(ast.walk(ast.parse(path.read_text())))) for path in sorted(PACKAGE.rglob("*.py"))]


@cache
def remedies() -> list[tuple[str, str]]:
    """Every remedy in the code, in pieces, with its place."""
    return list(_remedies())


def _remedies() -> Iterator[tuple[str, str]]:
    for path, nodes in code():
        for node in nodes:
            given: list[ast.AST] = []
            if isinstance(node, ast.Call):
                given = [keyword.value for keyword in node.keywords if keyword.arg == "remedy"]
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                given = [node.value] if any("remed" in ast.dump(target).lower() for target in targets) else []
            for part in (part for value in given for part in ast.walk(value)):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield f"{path.name}:{part.lineno}", part.value
    yield from ((code.name, code.remedy) for code in codes.CODES)


def properties(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for part in schema.values():
            yield from properties(part)


def commands(group: click.Group, above: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield f"{above}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{above}{name} ")


COMMANDS = dict(commands(cli))


def test_all_remedies_are_found() -> None:
    assert len(remedies()) > 200
    assert {"errors.py", "files.py", "transport.py", "network.py"} <= {
        place.partition(":")[0] for place, _ in remedies()
    }


def test_settings_that_remedies_name_are_settings() -> None:
    known = WRITERS.union(
        *(properties(settings.schema(name)) for name in ("connection_info", "source_environment"))
    )
    named = {
        (place, word) for place, text in remedies() for word in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text)
    }
    assert {word for _, word in named} & known
    assert {(place, word) for place, word in named if word not in known} == set()


def test_commands_that_remedies_name_are_commands() -> None:
    named = {
        (place, line) for place, text in remedies() for line in re.findall(r"`coriolis-azure ([^`]+)`", text)
    }
    assert named
    for place, line in named:
        words = [word for word in line.split() if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-")]
        assert " ".join(words) in COMMANDS or words[0] in COMMANDS, (place, line)


def test_options_that_remedies_name_are_options() -> None:
    known = {option for command in COMMANDS.values() for each in command.params for option in each.opts} | {
        "--help",
        "--setrw",  # of blockdev
    }
    named = {
        (place, option)
        for place, text in remedies()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub("`az [^`]+`", "", text))
    }
    assert named
    assert {(place, option) for place, option in named if option not in known} == set()


def told() -> Iterator[tuple[str, str]]:
    """What people read: the pages, and the texts in the code but for those that the sandbox has from Azure."""
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        yield from (
            (f"{path.name}:{number}", line) for number, line in enumerate(path.read_text().splitlines(), 1)
        )
    for path, nodes in code():
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "sandbox" not in path.parts:
                yield f"{path.name}:{node.lineno}", node.value


def test_amounts_are_told_in_one_kind_of_units() -> None:
    """GiB and MiB, in which disks are sold, and what `amount` writes. A limit may be given in others, too."""
    texts = list(told())
    assert len(texts) > 1000
    taken = {"Memory (MB)", "Total Disk Size (GB)"}  # the orchestrator's own names of columns
    wrong = re.compile(r"(?<![A-Za-z])[KMGT]B(?![A-Za-z])")
    assert [place for place, text in texts if text not in taken and wrong.search(text)] == []


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 disks"), (1, "1 disk"), (2, "2 disks"), (1000, "1000 disks")]
)
def test_what_is_counted_agrees_with_its_number(count: int, words: str) -> None:
    assert counted(count, "disk") == words
    assert counted(count, "free address", "free addresses") == words.replace(
        "disks", "free addresses"
    ).replace("disk", "free address")


def test_no_text_leaves_the_plural_to_the_reader() -> None:
    assert [place for place, text in told() if "(s)" in text] == []


def test_a_number_of_things_that_may_be_one_is_counted() -> None:
    plural = re.compile(r"^ (disks|resources|runs|chunks|addresses|vCPUs|times|VMs|volumes|requests|pages)\b")
    found = [
        f"{path.name}:{node.lineno}{text.value!s}"
        for path, nodes in code()
        if "sandbox" not in path.parts
        for node in nodes
        if isinstance(node, ast.JoinedStr)
        for number, text in pairwise(node.values)
        if isinstance(number, ast.FormattedValue)
        and isinstance(text, ast.Constant)
        and plural.search(str(text.value))
    ]
    assert found == []
