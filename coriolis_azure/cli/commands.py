"""The commands on VMs: one function each, whose docstring is its help."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path

import click
from rich.text import Text

from .. import __version__, settings
from ..azure import codes, names, permissions
from ..errors import CorruptChunk, IncompleteReplica, InvalidInput
from ..events import amount
from .options import Group, json_option, opened, rate, source_options
from .output import (
    VERIFIED,
    Table,
    err,
    out,
    print_json,
    raise_left_behind,
    replication_table,
    resources_table,
    say,
    show,
    show_machine,
)
from .progress import watching

EXIT_CODES = """\b
Exit codes: 0 done · 2 input · 3 Azure · 4 worker · 5 transfer · 6 deadline · 7 cleanup incomplete
            (the ids that stayed are listed) · 8 done, but standard output could not be written ·
            130 interrupted · 1 a fault of this program"""
_UNTAGGED = (
    "Resources called as runs call theirs carry none of our tags, so they are left alone. "
    "Delete them by hand, if no run is at work that has made them."
)
_MECHANISM = settings.schema("source_environment")["properties"]["replica_export_mechanism"]


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="coriolis-azure")
def cli() -> None:
    """Take virtual machines out of Azure: once, or again and again, moving only what changed.

    \b
    New here?   coriolis-azure demo
    For real:   coriolis-azure check     -c connection.json -e environment.json web-1
                coriolis-azure inspect   -c connection.json -e environment.json web-1
                coriolis-azure replicate -c connection.json -e environment.json web-1 --to /srv/replicas/web-1

    What goes into the two files: coriolis-azure schema connection, coriolis-azure schema source-environment.
    """


@cli.command("schema")
@click.argument("name", type=click.Choice(["connection", "source-environment"]))
@json_option
def schema(name: str, as_json: bool) -> None:
    """Print the JSON schema of a settings file, with a description of every property."""
    del as_json  # it is JSON anyway
    files = {"connection": "connection_info", "source-environment": "source_environment"}
    print_json(settings.schema(files[name]))


@cli.command()
@click.argument("code", required=False)
@json_option
def explain(code: str | None, as_json: bool) -> None:
    """Say what an error code of Azure means and what to do about it; without CODE, list all. Works offline."""
    if code is None:
        if as_json:
            print_json([each.to_json() for each in codes.CODES])
            return
        Table(
            ("code", "class", "exit", "meaning"),
            [(each.name, each.kind.__name__, str(each.kind.exit_code), each.meaning) for each in codes.CODES],
        ).show()
        return
    known = codes.find(code)
    if known is None:
        near = " or ".join(codes.nearest(code))
        raise InvalidInput(
            f"{code!r} is no known code of Azure",
            remedy=f"Try {near}; `coriolis-azure explain` lists all."
            if near
            else "Run `coriolis-azure explain` for the list of all.",
        )
    waiting = "can help" if known.waits else "does not help"
    say(
        as_json,
        known.to_json(),
        f"{known.name}: {known.kind.__name__}, exit code {known.kind.exit_code}; waiting {waiting}\n"
        f"{known.meaning}\nwhat to do: {known.remedy}",
    )


@cli.command("list")
@source_options
@json_option
def list_vms(connection: Path, environment: Path, as_json: bool) -> None:
    """List the VMs of the resource group in the location."""
    with opened(connection, environment, as_json) as source:
        vms = source.list_vms()
    if as_json:
        print_json(vms)
        return
    if not vms:
        out().print("There are no VMs in this resource group and location.")
        return
    Table(
        ("name", "size", "OS", "disks", "zones"),
        [
            (vm["name"], vm["size"], vm["os_type"], str(vm["disks"]), ", ".join(vm["zones"]) or "-")
            for vm in vms
        ],
    ).show()


@cli.command()
@source_options
@click.argument("vm")
@json_option
def inspect(connection: Path, environment: Path, vm: str, as_json: bool) -> None:
    """Show what is known of a VM: the export info that the orchestrator gets.

    VM is a name in the resource group, or an ARM id.
    """
    from ..plugin.export_info import export_info

    with opened(connection, environment, as_json) as source:
        machine = source.inspect(vm)
    if as_json:
        print_json(export_info(machine))
        return
    show_machine(machine)


shutdown_option = click.option(
    "--shutdown/--no-shutdown", default=True, help="Whether runs may shut VMs down. [default: --shutdown]"
)
pool_option = click.option(
    "--pool/--no-pool",
    default=True,
    help="Whether an orchestrator may keep a pool of workers, which it stops and starts. [default: --pool]",
)


@cli.command()
@source_options
@click.argument("vm", required=False)
@shutdown_option
@pool_option
@json_option
def check(
    connection: Path, environment: Path, vm: str | None, shutdown: bool, pool: bool, as_json: bool
) -> None:
    """Ask everything that can be known before anything is made or shut down. Changes nothing.

    Credentials, permissions, locks, quota, the worker's size, image and network, and, of the VM that is named, what
    speaks against moving it. Exit code 0 when a run can be expected to work, 2 when something speaks against it, or
    when the identity lacks an action of the role that `coriolis-azure role` prints: then not everything can be known.
    """
    with opened(connection, environment, as_json) as source:
        checked = source.check(vm, strict=True, shutdown=shutdown, pool=pool)
    if as_json:
        print_json(checked.to_json())
    else:
        colours = {"fine": "green", "warning": "yellow", "error": "red"}
        Table(
            ("step", "", "result", "what to do"),
            [
                (
                    finding.step,
                    Text(finding.severity, colours[finding.severity]),
                    finding.text,
                    finding.remedy or "-",
                )
                for finding in checked.findings
            ],
        ).show()
    if not checked.ok:
        raise click.exceptions.Exit(InvalidInput.exit_code)


@cli.command()
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    metavar="ID",
    help="ARM id where the role may be assigned: a subscription's or a resource group's. May be repeated.",
)
@click.option(
    "--public-ip/--no-public-ip", default=True, help="As export_worker_use_fip. [default: --public-ip]"
)
@click.option("--own-network/--existing-network", default=True, help="Without or with export_network.")
@shutdown_option
@pool_option
@click.option("--customer-keys", is_flag=True, help="For disks with customer-managed keys, the worker's too.")
@click.option(
    "--storage",
    type=click.Choice(["identity", "key"]),
    help="For Blob storage: reached as this identity, or with the account's key (storage_use_account_key).",
)
@click.option(
    "--mechanism",
    type=click.Choice(_MECHANISM["enum"]),
    default=_MECHANISM["default"],
    show_default=True,
    help="As replica_export_mechanism.",
)
@json_option
def role(
    scopes: tuple[str, ...],
    mechanism: str,
    public_ip: bool,
    own_network: bool,
    shutdown: bool,
    pool: bool,
    customer_keys: bool,
    storage: str | None,
    as_json: bool,
) -> None:
    """Print the custom role with the least permissions that the work needs. Works offline.

    \b
    coriolis-azure role --scope /subscriptions/ID > role.json && az role definition create --role-definition role.json
    """
    del as_json, mechanism  # it is JSON anyway, and there is one mechanism
    chosen = {permissions.OWN_NETWORK if own_network else permissions.GIVEN_NETWORK}
    features = (
        (public_ip, permissions.PUBLIC_IP),
        (shutdown, permissions.SHUTDOWN),
        (pool, permissions.POOL),
        (customer_keys, permissions.CUSTOMER_KEYS),
        (customer_keys, permissions.WORKER_KEY),
        (storage is not None, permissions.BLOB_STORAGE),
        (storage == "identity", permissions.BLOB_DATA),
        (storage == "key", permissions.ACCOUNT_KEY),
    )
    chosen |= {feature for wanted, feature in features if wanted}
    print_json(permissions.role(chosen, scopes or ("/subscriptions/00000000-0000-0000-0000-000000000000",)))


@cli.command()
@source_options
@click.argument("vm")
@click.option(
    "--to", required=True, metavar="DEST", help="A folder or file:// URL: one sparse raw image a disk."
)
@click.option("--shutdown", is_flag=True, help="Deallocate the VM before its disks are copied. It stays off.")
@click.option("--full", is_flag=True, help="Send everything, whatever the destination holds already.")
@click.option(
    "--adopt", is_flag=True, help="Take over images at DEST that no run has made; else they are refused."
)
@click.option(
    "--limit",
    metavar="RATE",
    callback=rate,
    help="The most to use of the network, all disks together: 50MiB/s.",
)
@json_option
def replicate(
    connection: Path,
    environment: Path,
    vm: str,
    to: str,
    shutdown: bool,
    full: bool,
    adopt: bool,
    limit: str | None,
    as_json: bool,
) -> None:
    """Copy all disks of a VM to DEST; run it again to send only what changed since.

    Everything that is made in Azure for it (snapshots, disks, a worker VM and its network) is deleted again,
    also when the run fails or is interrupted.
    """
    changes = {"bandwidth_limit": limit} if limit else {}
    with opened(connection, environment, as_json, **changes) as source:
        done = source.replicate(vm, to, shutdown=shutdown, full=full, adopt=adopt)
    if as_json:
        print_json(done.to_json())
    else:
        replication_table(done.vm, done).show()
    raise_left_behind(done.left_behind)


@cli.command()
@partial(source_options, required=False)
@click.argument("dest", metavar="DEST")
@json_option
def verify(connection: Path | None, environment: Path | None, dest: str, as_json: bool) -> None:
    """Read a destination again and compare it with what the last run to it has left there.

    Names the first chunk of each disk that is not what was replicated, images that are missing, and disks that are
    not of one run. Exit code 0 when all is as the last run left it, 5 when something is not, 2 when it could not be
    told of some disk: it is called "not verified" then. The settings are needed only for a destination in Azure,
    blob://...
    """
    from ..clock import Clock
    from ..replica import places, verification

    if connection and environment and dest.lower().startswith("blob:"):
        with opened(connection, environment, as_json) as source:
            verdicts = source.verify(dest)
    else:
        with watching(as_json) as report, places.open(dest, report, existing=True) as place:
            verdicts = verification.verify(place, report, Clock())
    if as_json:
        print_json([verdict.to_json() for verdict in verdicts])
    else:
        records = []
        for verdict in verdicts:
            size = "-" if verdict.size_bytes is None else amount(verdict.size_bytes)
            records.append((verdict.name, size, VERIFIED[verdict.verified], verdict.reason or "-"))
        Table(("disk", "size", "verified", "reason"), records).show()
    for verdict in verdicts:
        if verdict.verified is False and verdict.of_set:
            raise IncompleteReplica(f"{verdict.name}: {verdict.reason}", disk=verdict.name)
        if verdict.verified is False:
            remedy = "Replicate to it again with --full: everything is sent anew."
            raise CorruptChunk(f"{verdict.name}: {verdict.reason}", remedy=remedy, offset=verdict.bad_offset)
    if any(verdict.verified is None for verdict in verdicts):
        raise click.exceptions.Exit(InvalidInput.exit_code)


@cli.command()
@source_options
@click.option(
    "--older-than",
    default="2h",
    show_default=True,
    help="Age of a run's last sign of life: 90s, 15m, 2h, 0s.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option(
    "--volumes-older-than",
    help="Forget the orchestrator's volumes that no run has had to do with for so long: 90d.",
)
@json_option
def cleanup(
    connection: Path,
    environment: Path,
    older_than: str,
    dry_run: bool,
    volumes_older_than: str | None,
    as_json: bool,
) -> None:
    """Delete what runs that died have left in the resource group.

    Only resources with our tags are touched. A running transfer shows life every 15 minutes; do not go below
    that while others may be running. Runs of this host whose process is gone are deleted whatever their age.

    The records of the orchestrator's volumes are listed too. A transfer whose record is forgotten sends its volume as
    a whole once. If its first execution had failed, delete the transfer's disks before the next one.
    """
    age = timedelta(seconds=settings.duration(older_than))
    silent = timedelta(seconds=settings.duration(volumes_older_than)) if volumes_older_than else None
    with opened(connection, environment, as_json) as source:
        found, stayed = source.sweep(age, dry_run=dry_run)
        volumes = source.records().all()
        old, kept = source.forget(volumes, silent, dry_run=dry_run)
        untagged = source.untagged()
    stayed += kept
    if as_json:
        runs = [leftover.to_json() for leftover in found]
        listed = [{**volume.to_json(), "old": volume in old} for volume in volumes]
        print_json(
            {"dry_run": dry_run, "runs": runs, "volumes": listed, "left_behind": stayed, "untagged": untagged}
        )
    elif not found and not volumes and not untagged:
        out().print("Nothing to clean up.")
    else:
        records = []
        lost = {id.lower() for id in untagged}
        for leftover in found:
            for id in leftover.ids:
                if id.lower() in lost:
                    continue
                fate = "would be deleted" if dry_run else "STAYED" if id in stayed else "deleted"
                alive = names.stamp(leftover.alive) if leftover.alive else "unknown"
                records.append((leftover.run, leftover.instance, alive, fate, id))
        for volume in volumes:
            fate = "would be deleted" if dry_run else "STAYED" if volume.id in stayed else "deleted"
            alive = names.stamp(volume.alive) if volume.alive else "unknown"
            records.append(("-", volume.instance, alive, fate if volume in old else "kept", volume.id))
        for id in untagged:
            records.append(("-", "", "unknown", "NO TAGS", id))
        Table(("run", "VM", "last sign of life", "", "resource"), records).show()
        if untagged:
            show(err(), _UNTAGGED, "! ", "yellow")
    raise_left_behind(stayed)


@cli.command()
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Keep the sandbox and the images in this new folder."
)
@json_option
def demo(keep: Path | None, as_json: bool) -> None:
    """Show the whole story on a local Azure, with real bytes, verified. Needs no account and no root.

    A VM with an OS disk and two data disks is replicated, changed, and replicated again; every image is then
    compared with the VM's disks, and the list of Azure resources with the one before. Exit code 0 only if
    every comparison held.
    """
    from .demo import run

    with watching(as_json) as report:
        told = run(report, keep)
    if as_json:
        print_json(told.to_json())
    else:
        for title, replicated in (("First run", told.first), ("Second run", told.second)):
            replication_table(title, replicated).show()
        resources_table(told.resources_before, told.resources_after).show()
        outcomes = {True: Text("holds", "green"), False: Text("DOES NOT HOLD", "red")}
        Table(
            ("check", "result"), [(check, outcomes[held]) for check, held in told.checks.items()], "Checks"
        ).show()
    if not told.held:
        raise click.exceptions.Exit(1)
