"""The pages of the book that are made while it is built: the API, the settings, the commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

import coriolis_azure
from coriolis_azure import errors
from coriolis_azure.cli.entry import cli
from coriolis_azure.settings import schema

DIRECTIVE = "```{eval-rst}\n%s\n```\n\n"
# Documented on pages of their own, or by a module.
ELSEWHERE = {"__version__", "errors", "events"}
SCHEMAS = {
    "connection.json": "connection_info",
    "environment.json": "source_environment",
    "The file of --prices": "prices",
}


def api() -> str:
    """The public names, by their docstrings."""
    classes = [name for name in coriolis_azure.__all__ if name not in ELSEWHERE]
    parts = [f"## {name}\n\n" + DIRECTIVE % _autoclass(f"coriolis_azure.{name}") for name in classes]
    events = ("Step", "Copied", "Waiting", "Notice")
    told = "".join(DIRECTIVE % _autoclass(f"coriolis_azure.events.{name}") for name in events)
    checking = DIRECTIVE % ".. autofunction:: coriolis_azure.testing.check_medium"
    root = DIRECTIVE % _autoclass(f"coriolis_azure.errors.{errors.CoriolisAzureError.__name__}")
    return (
        "".join(parts)
        + f"## Events\n\n{told}## Errors\n\nAll others are in [the table](errors.md).\n\n{root}"
        + f"## Testing a medium of your own\n\n{checking}"
    )


def _autoclass(path: str) -> str:
    return f".. autoclass:: {path}\n   :members:"


def settings() -> str:
    """All settings, by the schemas."""
    return "".join(
        f"## {title}\n\n{found['description']}\n\n" + "".join(_properties(found, found))
        for title, found in ((title, schema(name)) for title, name in SCHEMAS.items())
    )


def _properties(whole: dict[str, Any], part: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, given in part.get("properties", {}).items():
        reference = given.get("$ref", "").rpartition("/")[2]
        body = {**whole.get("definitions", {}).get(reference, {}), **given}
        kind = body.get("type", "")
        facts = [" or ".join(kind) if isinstance(kind, list) else kind]
        if name in part.get("required", ()):
            facts.append("required")
        if "enum" in body:
            facts.append("one of " + ", ".join(f"`{json.dumps(each)}`" for each in body["enum"]))
        if "default" in body:
            facts.append(f"default `{json.dumps(body['default'])}`")
        facts += [f"{word} {body[word]}" for word in ("minimum", "maximum") if word in body]
        text = _plain(body.get("description", body.get("title", "")))
        yield f"`{above}{name}`\n: {text}\n: *{'; '.join(fact for fact in facts if fact)}*\n\n"
        yield from _properties(whole, body, f"{above}{name}.")


def commands() -> str:
    """All commands and their options, by click."""
    return "".join(_commands(cli, ["coriolis-azure"]))


def _commands(command: click.Command, words: Sequence[str]) -> Iterator[str]:
    context = click.Context(command, info_name=" ".join(words))
    if isinstance(command, click.Group):
        if len(words) > 1:
            yield f"## {' '.join(words[1:])}\n\n{_plain(command.help or '')}\n\n"
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner and not inner.hidden:
                yield from _commands(inner, [*words, name])
        return
    usage = " ".join([*words, *command.collect_usage_pieces(context)])
    yield f"{'#' * min(len(words), 3)} {' '.join(words[1:])}\n\n```text\n{usage}\n```\n\n{_help(command)}\n\n"
    for option in command.params:
        record = option.get_help_record(context)
        if record and record[1]:  # an argument is in the usage
            names, text = record
            yield f"`{names}`\n: {_plain(text)}\n\n"


def _help(command: click.Command) -> str:
    """The help, with its examples (paragraphs after \\b) as they stand."""
    parts = []
    for paragraph in (command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):
            parts.append("```text\n" + paragraph[2:] + "\n```")
        else:
            parts.append(_plain(paragraph))
    return "\n\n".join(parts)


def _plain(text: str) -> str:
    """Text that is not Markdown, as Markdown; code between backticks stays."""
    parts = " ".join(text.split()).split("`")
    for number in range(0, len(parts), 2):
        for letter in "\\*_<[{$|":
            parts[number] = parts[number].replace(letter, "\\" + letter)
    return "`".join(parts)


def restructured(lines: Sequence[str]) -> list[str]:
    """A docstring of ours as reStructuredText: indented lines are code, stars are stars."""
    made: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("    ") and not inside and (not made or not made[-1].strip()):
            made += ["::", ""]
            inside = True
        elif line.strip() and not line.startswith("    "):
            inside = False
        made.append(line if inside else line.replace("*", "\\*").replace("_ ", "\\_ "))
    return made


PAGES: dict[str, Callable[[], str]] = {
    "reference/api": api,
    "reference/settings": settings,
    "reference/commands": commands,
}
