"""The command `plan`: what runs would make, read, move and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from .. import settings
from ..errors import CoriolisAzureError, InvalidInput, cleaned
from ..events import amount, counted, duration
from .commands import cli
from .options import json_option, opened, rate, source_options
from .output import Table, out, print_json

if TYPE_CHECKING:
    from ..checks.plan import Plan, Range

_MECHANISMS = settings.schema("source_environment")["properties"]["replica_export_mechanism"]["enum"]


@cli.command()
@source_options
@click.argument("vms", metavar="[VM]...", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="All VMs of the resource group in the location.")
@click.option(
    "--to",
    metavar="DEST",
    help="The destination, whose replicas tell what a later run has to move. Of several VMs: DEST/VM.",
)
@click.option(
    "--mechanism",
    type=click.Choice(_MECHANISMS),
    help="How disks are read, as replica_export_mechanism.",
)
@click.option(
    "--line", metavar="RATE", callback=rate, help="What the line to the destination carries, such as 50MiB/s."
)
@click.option(
    "--prices",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A JSON file of prices, instead of ours; `coriolis-azure schema prices` says what is in it.",
)
@json_option
def plan(
    connection: Path,
    environment: Path,
    vms: tuple[str, ...],
    all_: bool,
    to: str | None,
    mechanism: str | None,
    line: str | None,
    prices: Path | None,
    as_json: bool,
) -> None:
    """Estimate what a run of each VM would make, read and move, how long it takes, its outage, and its cost.

    Nothing is made. All amounts are estimates: ranges where something is known only during the run. The prices are ours
    or those of a file, and no offer of Azure's. Whether runs are permitted is told by `coriolis-azure check`. Exit code
    0, or that of the first VM that cannot be planned.
    """
    from ..checks.prices import Prices

    if all_ == bool(vms):
        raise InvalidInput("plan needs VMs", remedy="Name VMs, or give --all, but not both.")
    table = Prices.read(prices)
    with opened(connection, environment, as_json=as_json, replica_export_mechanism=mechanism) as source:
        names = [str(vm["name"]) for vm in source.list_vms()] if all_ else list(vms)
        bytes_per_second = settings.rate(line) if line else 0
        plans: list[Plan] = []
        failures: dict[str, CoriolisAzureError] = {}
        for name in names:
            at = f"{to.rstrip('/')}/{name.rpartition('/')[2]}" if to and (all_ or len(names) > 1) else to
            try:
                plans.append(source.plan(name, at, prices=table, line=bytes_per_second))
            except CoriolisAzureError as error:
                failures[name] = error
    if as_json:
        failed = [{"vm": name, "error": error.to_json()} for name, error in failures.items()]
        print_json({"vms": [*(each.to_json() for each in plans), *failed]})
    else:
        for each in plans:
            _show(each)
        if len(plans) > 1:
            _show_all(plans)
    if failures:
        raise next(iter(failures.values()))


def _show(each: Plan) -> None:
    head = f" ({'a first run' if each.first else 'a later run'}; estimates)"
    out().print(Text.assemble((cleaned(each.vm), "bold"), head))
    disks = [
        (
            disk.name,
            amount(disk.size_bytes),
            disk.mechanism,
            disk.reason or "as the settings say",
            _between(disk.read_bytes, amount),
            _between(disk.moved_bytes, amount),
        )
        for disk in each.disks
    ]
    Table(("disk", "size", "mechanism", "why", "reads", "moves"), disks).show()
    money = partial(_money, currency=each.currency)
    facts = [
        ("makes", ", ".join(each.creates)),
        ("worker", each.worker or "none"),
        ("takes", _between(each.seconds, duration)),
        ("outage of a cutover", _between(each.outage_seconds, duration)),
        ("costs", _between(each.cost, money)),
        *((f"  {part}", _between(cost, money)) for part, cost in each.costs.items()),
    ]
    if each.monthly.most:
        facts.append(("baselines, a month", _between(each.monthly, money)))
    facts.append(("prices", f"estimate by prices of {each.prices}"))
    Table(("what", "estimate"), facts).show()
    for line in each.assumed:
        out().print(cleaned(line))
    out().print()


def _show_all(plans: Sequence[Plan]) -> None:
    money = partial(_money, currency=plans[0].currency)
    rows = [
        (
            each.vm,
            _between(each.read_bytes, amount),
            _between(each.moved_bytes, amount),
            _between(each.seconds, duration),
            _between(each.cost, money),
        )
        for each in plans
    ]
    total = (
        "all, one after another",
        _between(_sum(each.read_bytes for each in plans), amount),
        _between(_sum(each.moved_bytes for each in plans), amount),
        _between(_sum(each.seconds for each in plans), duration),
        _between(_sum(each.cost for each in plans), money),
    )
    Table(("VM", "reads", "moves", "takes", "costs"), [*rows, total], title=counted(len(plans), "VM")).show()


def _sum(ranges: Iterable[Range]) -> Range:
    first, *others = ranges
    return sum(others, first)


def _between(estimate: Range, shown: Callable[[float], str]) -> str:
    """A range for people; one amount where both ends look alike."""
    least, most = shown(estimate.least), shown(estimate.most)
    return most if least == most else f"{least} to {most}"


def _money(sum_: float, currency: str) -> str:
    return f"{sum_:.2f} {currency}"
