"""Documents and tables on stdout, and the two consoles."""

from __future__ import annotations

import json
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import CleanupIncomplete

_WRAPPED = {"id", "resource", "code", "meaning", "reason"}  # columns of tables that may take several lines
VERIFIED = {True: "yes", None: "not verified", False: "NO"}

OUT = Console()
ERR = Console(stderr=True)


def replication_table(title: str, disks: Any, seconds: float) -> Table:
    table = table_of(
        "disk", "size", "read", "sent", "zero", "same", "run", "verified", title=f"{title}: {seconds:.1f} s"
    )
    for disk in disks:
        sizes = (disk.size_bytes, disk.read_bytes, disk.sent_bytes, disk.zero_bytes, disk.skipped_bytes)
        table.add_row(
            disk.name, *map(amount, sizes), "full" if disk.full else "changes", VERIFIED[disk.verified]
        )
    return table


def resources_table(before: list[Any], after: list[Any]) -> Table:
    table = table_of("Azure resource", "before", "after")
    ids = {resource["id"]: resource["type"] for resource in (*before, *after)}
    held = [{resource["id"] for resource in resources} for resources in (before, after)]
    for id, type_ in sorted(ids.items()):
        table.add_row(
            f"{type_}/{id.rpartition('/')[2]}", *("there" if id in ids_then else "-" for ids_then in held)
        )
    return table


def table_of(*columns: str, title: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for column in columns:
        table.add_column(column, no_wrap=column not in _WRAPPED, overflow="fold")
    return table


def raise_left_behind(ids: Any) -> None:
    if ids:
        raise CleanupIncomplete(f"could not delete: {', '.join(ids)}", left_behind=list(ids))


def say(as_json: bool, document: Any, text: str) -> None:
    if as_json:
        print_json(document)
    else:
        click.echo(text)


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def amount(count: float) -> str:
    """Bytes as people read them: three digits are enough."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.3g} {units[power]}"


def plain(text: str) -> str:
    """Text as it is: names in brackets are not markup."""
    return text.replace("[", r"\[")
