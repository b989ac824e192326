"""The command `plan`: what runs would make, read, move and cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import settings
from ..errors import CoriolisAzureError, cleaned
from ..events import amount, counted, duration
from .commands import cli, mechanism_option
from .fleet import chosen_vms, opened_fleet, refuse_unclear
from .options import json_option, rate, several_sources_options, state_option
from .output import Table, print_json, show

if TYPE_CHECKING:
    from ..checks.plan import Plan, Range


@cli.command()
@several_sources_options
@chosen_vms
@click.option(
    "--to",
    metavar="DEST",
    help="The destination, whose replicas tell what a later run has to move. Of several VMs: DEST/VM.",
)
@mechanism_option()
@click.option(
    "--line", metavar="RATE", callback=rate, help="What the line to the destination carries, such as 50MiB/s."
)
@click.option(
    "--prices",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A JSON file of prices, instead of ours; `coriolis-azure schema prices` says what is in it.",
)
@state_option("to")
@json_option
def plan(
    connection: Path,
    environments: tuple[Path, ...],
    vms: tuple[str, ...],
    every: bool,
    tags: dict[str, str],
    exclude: tuple[str, ...],
    to: str | None,
    mechanism: str | None,
    line: str | None,
    prices: Path | None,
    as_json: bool,
) -> None:
    """Estimate what a run would make, move, take and cost.

    Creates nothing. For each VM: what a run would create, read and move, how long it would take, how long the outage of
    a cutover would be, and what it would cost. All amounts are estimates, given as ranges. The prices are ours or those
    of a file, not an offer of Azure's. Use `coriolis-azure check` to find out whether a run is permitted. Exit code 0,
    or that of the first VM that cannot be planned.
    """
    from ..checks.prices import Prices
    from ..replica import places

    refuse_unclear(vms, every=every, tags=tags, exclude=exclude)
    table, bytes_per_second = Prices.read(prices), settings.rate(line) if line else 0
    changes = {"replica_export_mechanism": mechanism}
    with opened_fleet(connection, environments, as_json=as_json, many=False, changes=changes) as fleet:
        chosen = fleet.select(vms, tags=tags, exclude=exclude)
        plans: list[Plan] = []
        failures: dict[str, CoriolisAzureError] = {}
        for vm in chosen:
            try:
                at = places.below(to, vm.name) if to and len(vms) != 1 else to
                plans.append(
                    fleet.sources[vm.environment].plan(vm.id, at, prices=table, line=bytes_per_second)
                )
            except CoriolisAzureError as error:
                failures[vm.name] = error
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
    show(sys.stdout, head, cleaned(each.vm), "bold")
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
        click.echo(cleaned(line))
    click.echo()


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
