"""The book holds together: its links, the commands and settings that it shows, and the tests that it names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from coriolis_azure.cli.entry import cli
from coriolis_azure.settings import checked

ROOT = Path(__file__).parent.parent
BOOK = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *BOOK]


def test_every_link_to_a_file_leads_to_one() -> None:
    links = [
        (page, link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if not re.match(r"[a-z]+:", link)
    ]
    assert len(links) > 50
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_every_page_that_code_and_messages_name_is_there() -> None:
    named = {
        (path.name, page)
        for folder in ("coriolis_azure", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/]+\.(?:md|py|png)\b", path.read_text())
    }
    assert named
    assert {(name, page) for name, page in named if not (ROOT / page).exists()} == set()


def test_every_test_that_the_book_names_is_there() -> None:
    named = {name for page in BOOK for name in re.findall(r"\btest_\w+\.py\b", page.read_text())}
    assert len(named) > 20
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert named - there == set()


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """The code of all pages, without its indentation."""
    for page in PAGES:
        for indented, code in re.findall(
            rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE
        ):
            yield page, re.sub(f"^{indented}", "", code, flags=re.MULTILINE)


def commands() -> Iterator[tuple[str, list[str]]]:
    """All commands of ours in the shell code of all pages."""
    for page, code in blocks("sh"):
        for line in code.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\||>|\$\(", line.partition(" #")[0]):
                words = part.strip().removesuffix("&").strip().removesuffix(")")
                if re.match(r"(\S*/)?coriolis-azure ", words):
                    yield page.name, shlex.split(words)[1:]


def test_every_command_of_the_pages_has_that_form() -> None:
    found = list(commands())
    assert len(found) > 40
    for page, words in found:
        command: click.Command = cli
        context = click.Context(cli)
        while isinstance(command, click.Group) and words[:1] != ["--version"]:
            inner = command.get_command(context, words[0])
            assert inner, (page, words)
            command, words = inner, words[1:]
        known = {option for each in command.params for option in each.opts + each.secondary_opts}
        given = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert given - known == set(), (page, words)


@pytest.mark.parametrize("words", [[], ["sandbox"]])
def test_no_line_of_the_list_of_commands_is_cut_off(words: list[str]) -> None:
    listed = CliRunner().invoke(cli, [*words, "--help"]).output.partition("\nCommands:\n")[2].splitlines()
    assert len(listed) > 5
    assert [line for line in listed if line.endswith("...")] == []


SHOWN = {"subscription_id": "connection_info", "location": "source_environment", "vcpu_hour": "prices"}


def test_all_settings_that_pages_show_are_valid() -> None:
    seen = set()
    for page, code in blocks("json"):
        document = json.loads(code)
        schemas = [schema for key, schema in SHOWN.items() if key in document]
        assert schemas, (page, code)
        checked(schemas[0], document)
        seen.update(schemas)
    assert seen == set(SHOWN.values())


@pytest.mark.parametrize(
    "page", [page for page in BOOK if page.name != "index.md"], ids=lambda page: page.stem
)
def test_every_page_is_in_the_contents_of_its_kind(page: Path) -> None:
    contents = (page.parent / "index.md").read_text()
    assert re.search(rf"^{page.stem}$", contents, re.MULTILINE)


def test_the_readme_is_short_and_its_pictures_fetch_nothing() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    picture = (ROOT / "docs/pictures/demo.svg").read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "passed" in picture
    assert "http" not in picture
