"""The commands on VMs, one function each; its docstring is its help."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import __version__, settings
from ..azure import codes, permissions
from ..errors import CorruptChunk, IncompleteReplica, InvalidInput
from ..events import span
from . import files
from .options import (
    FILE,
    Group,
    assignable,
    at_places,
    json_option,
    opened,
    report_option,
    source_options,
    state_option,
)
from .output import print_json, raise_left_behind, say, show
from .progress import watching
from .reporting import reporting
from .tables import (
    Cleaned,
    codes_table,
    cutover_table,
    demo_checks_table,
    findings_table,
    replicas_table,
    replication_table,
    resources_table,
    restored_table,
    show_machine,
    status_table,
    verdict_table,
    vms_table,
)

if TYPE_CHECKING:
    from ..replica.verification import Verdict

EXIT_CODES = """\b
Exit codes: 0 done, 1 a bug in this program, 2 wrong input, 3 Azure, 4 worker, 5 transfer or damage,
            6 time limit, 7 done, but something is left in Azure (it is listed), 8 done, but standard
            output or the report could not be written, 130 interrupted"""
_UNTAGGED = (
    "Resources with the names of ours but without our tags are left alone. "
    "Delete them by hand, unless they belong to a run that is active."
)
_SETTINGS = settings.schema("source_environment")["properties"]
_MECHANISM, _CONSISTENCY = _SETTINGS["replica_export_mechanism"], _SETTINGS["consistency"]


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="coriolis-azure")
def cli() -> None:
    """Take virtual machines out of Azure: once, or repeatedly, sending only what changed.

    \b
    New here?   coriolis-azure demo
    For real:   coriolis-azure check     -c connection.json -e environment.json web-1
                coriolis-azure plan      -c connection.json -e environment.json web-1 --to /srv/replicas/web-1
                coriolis-azure replicate -c connection.json -e environment.json web-1 --to /srv/replicas/web-1

    What the two files may contain: `coriolis-azure schema connection`, `coriolis-azure schema source-environment`.
    """


@cli.command("schema")
@click.argument("name", type=click.Choice(["connection", "source-environment", "prices"]))
@json_option
def schema(name: str, as_json: bool) -> None:
    """Print the JSON schema of a file of settings or prices.

    It describes every property.
    """
    del as_json  # always JSON
    files = {"connection": "connection_info", "source-environment": "source_environment", "prices": "prices"}
    print_json(settings.schema(files[name]))


@cli.command()
@click.argument("code", required=False)
@json_option
def explain(code: str | None, as_json: bool) -> None:
    """Explain an error code of Azure and what to do about it.

    Without CODE, lists all. Works offline.
    """
    if code is None:
        if as_json:
            print_json([known.to_json() for known in codes.CODES])
            return
        codes_table(codes.CODES).show()
        return
    known = codes.find(code)
    if known is None:
        near = " or ".join(codes.nearest(code))
        raise InvalidInput(
            f"{code!r} is not a known error code of Azure",
            remedy=f"Try {near}; `coriolis-azure explain` lists all."
            if near
            else "Run `coriolis-azure explain` to list all.",
        )
    waiting = "can help" if known.waits else "does not help"
    say(
        known.to_json(),
        f"{known.name}: {known.kind.__name__}, exit code {known.kind.exit_code}; waiting {waiting}\n"
        f"{known.meaning}\nwhat to do: {known.remedy}",
        as_json=as_json,
    )


@cli.command("list")
@source_options
@json_option
def list_vms(connection: Path, environment: Path, as_json: bool) -> None:
    """List the VMs of the resource group in the location."""
    with opened(connection, environment, as_json=as_json) as source:
        vms = source.list_vms()
    if as_json:
        print_json(vms)
        return
    if not vms:
        click.echo("There are no VMs in this resource group and location.")
        return
    vms_table(vms).show()


@cli.command()
@source_options
@click.argument("vm")
@json_option
def inspect(connection: Path, environment: Path, vm: str, as_json: bool) -> None:
    """Show a VM's configuration.

    VM is a name in the resource group, or an ARM id. With --json, this is the export info that the orchestrator gets.
    """
    from ..machine.export_info import export_info

    with opened(connection, environment, as_json=as_json) as source:
        machine = source.inspect(vm)
    if as_json:
        print_json(export_info(machine))
        return
    show_machine(machine)


shutdown_option = click.option(
    "--shutdown/--no-shutdown", default=True, help="Whether runs may shut down VMs. [default: --shutdown]"
)
pool_option = click.option(
    "--pool/--no-pool",
    default=True,
    help="Whether an orchestrator may keep a pool of workers that it stops and starts. [default: --pool]",
)


mechanism_option = partial(
    click.option,
    "--mechanism",
    type=click.Choice(_MECHANISM["enum"]),
    help="How disks are read: by a temporary worker VM, from their snapshots, or by both. "
    "Replaces the setting replica_export_mechanism.",
)

consistency_option = partial(
    click.option,
    "--consistency",
    type=click.Choice(_CONSISTENCY["enum"]),
    help="How the disks of a running VM are frozen: each for itself, or all in a restore point. "
    "Replaces the setting consistency.",
)


@cli.command()
@source_options
@click.argument("vm", required=False)
@mechanism_option()
@consistency_option()
@shutdown_option
@pool_option
@json_option
def check(
    connection: Path,
    environment: Path,
    vm: str | None,
    mechanism: str | None,
    consistency: str | None,
    shutdown: bool,
    pool: bool,
    as_json: bool,
) -> None:
    """Find out beforehand what would make a run fail.

    Creates and changes nothing. Checks credentials, permissions, locks, quotas, the worker's size, image and network
    and, if VM is given, whether it can be moved. Exit code 0 if a run should work; 2 if something would make it fail,
    or if the identity lacks an action of the role that `coriolis-azure role` prints, because then not everything can be
    checked.
    """
    changes = {"replica_export_mechanism": mechanism, "consistency": consistency}
    with opened(connection, environment, as_json=as_json, **changes) as source:
        checked = source.check(vm, strict=True, shutdown=shutdown, pool=pool)
    if as_json:
        print_json(checked.to_json())
    else:
        findings_table(checked.findings).show()
    if not checked.ok:
        raise click.exceptions.Exit(InvalidInput.exit_code)


@cli.command()
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    metavar="ID",
    callback=assignable,
    help="ARM id of a subscription or resource group where the role may be assigned. May be repeated.",
)
@click.option(
    "--public-ip/--no-public-ip",
    default=True,
    help="Whether the worker gets a public IP, as export_worker_use_fip says. [default: --public-ip]",
)
@click.option(
    "--own-network/--existing-network",
    default=True,
    help="Whether a run makes its own network, or uses export_network. [default: --own-network]",
)
@shutdown_option
@pool_option
@click.option(
    "--orchestrator",
    is_flag=True,
    help="For Coriolis: with the records of volumes, which runs of our own do not need.",
)
@click.option(
    "--customer-keys", is_flag=True, help="For disks with customer-managed keys, including the worker's."
)
@click.option(
    "--storage",
    type=click.Choice(["identity", "key"]),
    help="For Blob storage, accessed as this identity or with the account's key (storage_use_account_key).",
)
@mechanism_option(default=_MECHANISM["default"], show_default=True)
@consistency_option(default=_CONSISTENCY["default"], show_default=True)
@json_option
def role(
    scopes: tuple[str, ...],
    mechanism: str,
    consistency: str,
    public_ip: bool,
    own_network: bool,
    shutdown: bool,
    pool: bool,
    orchestrator: bool,
    customer_keys: bool,
    storage: str | None,
    as_json: bool,
) -> None:
    """Print a custom role with the least permissions for runs.

    Works offline.

    \b
    coriolis-azure role --scope /subscriptions/ID > role.json && az role definition create --role-definition role.json
    """
    del as_json  # always JSON
    worker = mechanism != settings.SNAPSHOTS
    features = (
        (worker, permissions.WORKER),
        (mechanism not in (settings.WORKER, "azure_worker"), permissions.EXPORT),
        (consistency != settings.DISK, permissions.RESTORE_POINTS),
        (worker and own_network, permissions.OWN_NETWORK),
        (worker and not own_network, permissions.GIVEN_NETWORK),
        (worker and public_ip, permissions.PUBLIC_IP),
        (shutdown, permissions.SHUTDOWN),
        (worker and pool, permissions.POOL),
        (orchestrator, permissions.VOLUMES),
        (customer_keys, permissions.CUSTOMER_KEYS),
        (worker and customer_keys, permissions.WORKER_KEY),
        (storage is not None, permissions.BLOB_STORAGE),
        (storage == "identity", permissions.BLOB_DATA),
        (storage == "key", permissions.ACCOUNT_KEY),
    )
    chosen = {feature for wanted, feature in features if wanted}
    print_json(permissions.role(chosen, scopes or ("/subscriptions/00000000-0000-0000-0000-000000000000",)))


@cli.command()
@partial(source_options, required=False)
@click.argument("dest", metavar="DEST")
@state_option("dest")
@json_option
def verify(connection: Path | None, environment: Path | None, dest: str, as_json: bool) -> None:
    """Read a replica again and compare it with its digests.

    Reports the first chunk of each disk that differs, missing images, and disks that come from different runs. Exit
    code 0 if everything is as the last run left it, 5 if something is not, 2 if some disk could not be checked, which
    is shown as "not verified". The settings are needed only for a destination in Azure, blob://...
    """
    from ..replica import verification

    with at_places(connection, environment, dest, as_json=as_json) as (report, clock, storage):
        verdicts = verification.verify_at(dest, report, storage, clock)
    if as_json:
        print_json([verdict.to_json() for verdict in verdicts])
    else:
        verdict_table(verdicts).show()
    _raise_wrong(verdicts)


def _raise_wrong(verdicts: Iterable[Verdict]) -> None:
    """End with the exit code of a verification that did not find everything right."""
    for verdict in verdicts:
        if verdict.verified is False and verdict.of_set:
            raise IncompleteReplica(f"{verdict.name}: {verdict.reason}", disk=verdict.name)
        if verdict.verified is False:
            remedy = "Replicate to it again with --full, which sends everything."
            raise CorruptChunk(f"{verdict.name}: {verdict.reason}", remedy=remedy, offset=verdict.bad_offset)
    if any(verdict.verified is None for verdict in verdicts):
        raise click.exceptions.Exit(InvalidInput.exit_code)


@cli.command()
@source_options
@click.argument("vm")
@click.option("--to", required=True, metavar="DEST", help="A destination as for `replicate`.")
@state_option("to")
@mechanism_option()
@consistency_option()
@click.option("--full", is_flag=True, help="Read all of the disks in the last run; the outage takes longer.")
@report_option
@json_option
def cutover(
    connection: Path,
    environment: Path,
    vm: str,
    to: str,
    mechanism: str | None,
    consistency: str | None,
    full: bool,
    report_file: Path | None,
    as_json: bool,
) -> None:
    """Move a VM to DEST for good, with the shortest outage.

    Replicates it twice while it runs, deallocates it, replicates what is left, and verifies the replica. The VM stays
    off. If one of the first two runs fails, the VM keeps running.
    """
    from ..cutover import cut_over

    changes = {"replica_export_mechanism": mechanism, "consistency": consistency}
    with reporting(report_file) as take:
        with opened(connection, environment, as_json=as_json, **changes) as source:
            source.on_report = take
            done = cut_over(source, vm, to, full=full)
        if as_json:
            print_json(done.to_json())
        else:
            cutover_table(done).show()
            verdict_table(done.verdicts).show()
            click.echo(
                f"Outage: {span(done.outage_seconds)}, expected: {span(done.predicted_seconds)}. "
                f"{done.vm} is off."
            )
        _raise_wrong(done.verdicts)
        raise_left_behind([id for run in done.runs for id in run.left_behind])


@cli.command()
@partial(source_options, required=False)
@click.argument("dest", metavar="DEST")
@state_option("dest")
@click.option("--html", type=FILE, metavar="FILE", help="Write a page about the replicas, for a browser.")
@click.option(
    "--prometheus",
    type=FILE,
    metavar="FILE",
    help="Write metrics, for the textfile collector of node_exporter: a name that ends with .prom.",
)
@json_option
def status(
    connection: Path | None,
    environment: Path | None,
    dest: str,
    html: Path | None,
    prometheus: Path | None,
    as_json: bool,
) -> None:
    """Show how old and how large replicas are, and what to do.

    Shows the replica at DEST or, if DEST is a folder of several, all replicas below it (DEST/VM). Of a single replica,
    also the earlier points that `restore` can bring back. The settings are needed only for a destination in Azure,
    blob://... Exit code 2 if a replica cannot be read; the others are shown.
    """
    from ..replica.survey import survey

    for file in filter(None, (html, prometheus)):
        files.refuse_unwritable(file)
    with at_places(connection, environment, dest, as_json=as_json) as (report, clock, storage):
        found, many = survey(dest, report, storage)
    now = clock.now()
    if prometheus is not None:
        from . import prometheus as metrics

        files.write(prometheus, metrics.text(found, now))
    if html is not None:
        from . import pages

        files.write(html, pages.of_replicas(found, now))
    unreadable = [one for one in found if one.error]
    if as_json:
        documents = [{**({"name": one.name} if many else {}), **one.to_json(now)} for one in found]
        print_json({"replicas": documents} if many else documents[0])
    else:
        if not many and not unreadable:
            status_table(found[0]).show()
        replicas_table(found, now).show()
    if unreadable:
        names = ", ".join(one.name or one.place for one in unreadable)
        raise InvalidInput(f"cannot be read: {names}: {unreadable[0].error}", remedy=unreadable[0].remedy)


@cli.command()
@partial(source_options, required=False)
@click.argument("dest", metavar="DEST")
@state_option("dest")
@click.option(
    "--point", required=True, metavar="TIME", help="The point's time, as `status` prints it, or latest."
)
@click.option(
    "--to",
    required=True,
    metavar="DIR",
    help="A new or empty folder, blob://..., or nbd://... with state=DIR.",
)
@json_option
def restore(
    connection: Path | None, environment: Path | None, dest: str, point: str, to: str, as_json: bool
) -> None:
    """Make a new replica from an earlier point in time.

    The points are those at DEST that `replicate --keep` has kept, and the newest one. DEST is not changed. Every chunk
    is compared with its digest; exit code 5 if the point is damaged. The settings are needed only if DEST or DIR is in
    Azure, blob://...
    """
    from .. import restoring
    from ..replica import places

    with (
        at_places(connection, environment, dest, to, as_json=as_json) as (report, clock, storage),
        places.open(dest, report, storage, existing=True) as place,
    ):
        done = restoring.restore(place, point, lambda: places.open(to, report, storage), report, clock)
    if as_json:
        print_json(done.to_json())
    else:
        restored_table(done).show()


@cli.command()
@source_options
@click.option(
    "--older-than",
    default="2h",
    show_default=True,
    help="Least age of a run's last sign of life: 90s, 15m, 2h, 0s.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be deleted.")
@click.option(
    "--volumes-older-than",
    help="Forget the orchestrator's volumes that no run has used for this long: 90d.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Delete the baselines that runs have kept, too; the next runs then read whole disks.",
)
@json_option
def cleanup(
    connection: Path,
    environment: Path,
    older_than: str,
    dry_run: bool,
    volumes_older_than: str | None,
    baselines: bool,
    as_json: bool,
) -> None:
    """Delete what dead runs have left in the resource group.

    Only resources with our tags are deleted. An active run gives a sign of life every 15 minutes, so do not use a lower
    age while others may be active. Runs of this host whose process is gone are cleaned up at any age; runs that died
    while they were deployed or deleted, and workers of pools that were never completed, after ten minutes.

    The records of the orchestrator's volumes are listed too. A transfer whose record is forgotten sends its whole
    volume once. If its first execution failed, delete the transfer's disks before the next one.

    So are the baselines (keep_baseline). They are deleted when their end date has passed.
    """
    age = timedelta(seconds=settings.duration(older_than))
    silent = timedelta(seconds=settings.duration(volumes_older_than)) if volumes_older_than else None
    with opened(connection, environment, as_json=as_json) as source:
        leftovers, left_behind = source.sweep(age, dry_run=dry_run)
        volumes = source.records().all()
        forgotten, unforgotten = source.forget(volumes, silent, dry_run=dry_run)
        listed = source.baselines()
        retired, unretired = source.retire(listed, every=baselines, dry_run=dry_run)
        untagged = source.untagged()
    left_behind += unforgotten + unretired
    done = Cleaned(dry_run, leftovers, volumes, forgotten, listed, retired, left_behind, untagged)
    if as_json:
        print_json(done.to_json())
    elif done.found_nothing:
        click.echo("Nothing to clean up.")
    else:
        done.table().show()
        if untagged:
            show(sys.stderr, _UNTAGGED, "! ", "yellow")
    raise_left_behind(left_behind)


@cli.command()
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Keep the sandbox and the images in this new folder."
)
@json_option
def demo(keep: Path | None, as_json: bool) -> None:
    """Replicate a VM on a local Azure, and check every byte.

    Needs no account and no root. A VM with an OS disk and two data disks is replicated, changed, and replicated again.
    Each time, every image is compared with the VM's disk; at the end, the Azure resources are compared with those at
    the beginning. Exit code 0 only if every check passes.
    """
    from .demo import run

    with watching(as_json=as_json) as report:
        outcome = run(report, keep)
    if as_json:
        print_json(outcome.to_json())
    else:
        for title, replicated in (("First run", outcome.first), ("Second run", outcome.second)):
            replication_table(title, replicated).show()
        resources_table(outcome.resources_before, outcome.resources_after).show()
        demo_checks_table(outcome.checks).show()
    if not outcome.held:
        raise click.exceptions.Exit(1)
