"""The command that replicates VMs, one or many at once; and which VMs a command is about."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .. import settings
from ..errors import InvalidInput
from ..events import Notice
from .commands import cli, consistency_option, mechanism_option
from .options import json_option, rate, report_option, several_sources_options, state_option, tags
from .output import print_json, raise_left_behind
from .progress import watching
from .reporting import reporting
from .tables import fleet_table, replication_table

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    from ..fleet import Fleet, FleetResult, VmResult
    from ..results import Replicated


def chosen_vms(command: F) -> F:
    """Add what says which VMs: VM..., --all, --tag and --exclude; see `chosen`."""
    options = (
        click.argument("vms", metavar="[VM]...", nargs=-1),
        click.option(
            "--all", "every", is_flag=True, help="All VMs of the environments' groups and locations."
        ),
        click.option(
            "--tag",
            "tags",
            multiple=True,
            metavar="KEY=VALUE",
            callback=tags,
            help="All VMs with this tag. May be repeated: VMs with all of them.",
        ),
        click.option(
            "--exclude",
            multiple=True,
            metavar="VM",
            help="Leave this VM out: a name or an ARM id. May be repeated.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def refuse_unclear(
    vms: Sequence[str], *, every: bool, tags: Mapping[str, str], exclude: Sequence[str]
) -> None:
    """Raise InvalidInput if the options of `chosen_vms` do not say, in one way, which VMs are meant."""
    if bool(vms) + every + bool(tags) != 1:
        raise InvalidInput(
            "it is unclear which VMs are meant",
            remedy="Name VMs, or give --all, or --tag: one of the three.",
        )
    if len(vms) == 1 and exclude:
        raise InvalidInput("--exclude leaves nothing of one VM", remedy="Leave --exclude out.")


@cli.command()
@several_sources_options
@chosen_vms
@click.option(
    "--to",
    required=True,
    metavar="DEST",
    help="A folder or file:// URL, for a sparse raw image per disk; blob://account/container/prefix, for VHDs; "
    "nbd://host:port/name or nbd+unix:///name?socket=PATH, with --state, for an export per disk.",
)
@state_option("to")
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    metavar="N",
    help="How many VMs at a time. [default: by this host's cores and free memory, at most 16]",
)
@click.option(
    "--retries",
    type=click.IntRange(0, 100),
    default=0,
    metavar="N",
    show_default=True,
    help="How often to try a VM again after an error that may pass. What had arrived is kept.",
)
@click.option(
    "--own-workers",
    is_flag=True,
    help="Boot a worker for each VM that needs one, instead of sharing them: for VMs that must not trust each other.",
)
@click.option("--shutdown", is_flag=True, help="Deallocate each VM before copying its disks. It stays off.")
@click.option("--full", is_flag=True, help="Send everything, whatever the destination already holds.")
@click.option(
    "--adopt",
    is_flag=True,
    help="Take over images at DEST that no run has made. By default they are refused.",
)
@click.option(
    "--keep",
    type=click.IntRange(0, 999),
    metavar="N",
    help="Keep N earlier points in time at DEST for `restore`, in later runs too. [default: as before; at first 0]",
)
@click.option(
    "--limit",
    metavar="RATE",
    callback=rate,
    help="Bandwidth limit for all disks together: 50MiB/s.",
)
@mechanism_option()
@consistency_option()
@report_option
@json_option
def replicate(
    connection: Path,
    environments: tuple[Path, ...],
    vms: tuple[str, ...],
    every: bool,
    tags: dict[str, str],
    exclude: tuple[str, ...],
    to: str,
    parallel: int | None,
    retries: int,
    own_workers: bool,
    mechanism: str | None,
    consistency: str | None,
    limit: str | None,
    report_file: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Copy all disks of VMs to DEST. Run it again to send only what has changed since.

    The disks of one VM, named alone, lie in DEST; those of several, of --all or of --tag in DEST/VM. A VM that fails
    does not stop the others; then the exit code is that of the first VM in the table that failed.

    Everything that a run makes in Azure (snapshots, disks, a worker VM and its network) is deleted at its end, even if
    it fails or is interrupted.
    """
    refuse_unclear(vms, every=every, tags=tags, exclude=exclude)
    changes = {
        "bandwidth_limit": limit,
        "replica_export_mechanism": mechanism,
        "consistency": consistency,
    }
    alone = len(vms) == 1
    with reporting(report_file) as take:
        with opened_fleet(
            connection, environments, as_json=as_json, many=not alone, changes=changes
        ) as fleet:
            for source in fleet.sources:
                source.on_report = take
            if alone:
                done = fleet.replicate_alone(vms[0], to, retries=retries, **options)
            else:
                chosen = fleet.select(vms, tags=tags, exclude=exclude)
                results: list[VmResult] = []
                try:
                    result = fleet.replicate(
                        chosen,
                        to,
                        parallel=parallel,
                        retries=retries,
                        own_workers=own_workers,
                        done=results.append,
                        **options,
                    )
                except KeyboardInterrupt:
                    in_order = {vm.id: number for number, vm in enumerate(chosen)}
                    _show(sorted(results, key=lambda each: in_order[each.id]), as_json=as_json)
                    raise
        if alone:
            _conclude_one(done, as_json=as_json)
        else:
            _conclude(result, as_json=as_json)


def _conclude_one(done: Replicated, *, as_json: bool) -> None:
    """Show the result of one VM."""
    if as_json:
        print_json(done.to_json())
    else:
        replication_table(done.vm, done).show()
    raise_left_behind(done.left_behind)


def _show(results: Sequence[VmResult], *, as_json: bool) -> None:
    if as_json:
        print_json({"vms": [each.to_json() for each in results]})
    else:
        fleet_table(results).show()


def _conclude(result: FleetResult, *, as_json: bool) -> None:
    """Show the results of all VMs, and end with the exit code of the first that failed."""
    if as_json:
        print_json(result.to_json())
    else:
        fleet_table(result.vms).show()
    for failed in result.failed:
        if failed.error is not None:
            raise click.exceptions.Exit(failed.error.exit_code)
    raise_left_behind(result.left_behind)


@contextlib.contextmanager
def opened_fleet(
    connection: Path,
    environments: Sequence[Path],
    *,
    as_json: bool,
    many: bool,
    changes: dict[str, str | None],
) -> Iterator[Fleet]:
    """A Fleet from the settings files, with its progress shown; `changes` but None replace settings."""
    from ..fleet import Fleet  # the SDKs take a second to import: not for --help

    connection_info = settings.read_json(connection)
    read = [settings.changed(settings.read_json(path), changes) for path in environments]
    with watching(as_json=as_json, many=many) as report:
        for warning in settings.exposed(connection, connection_info):
            report(Notice(warning))
        with Fleet(connection_info, read, report=report) as fleet:
            yield fleet
