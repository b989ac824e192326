"""The command line. The only module that prints: data on stdout, progress and messages on stderr.

Each command is a function whose docstring is its help. `main` is where errors become words and exit codes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

from . import __version__, codes, permissions, settings
from .errors import AzureError, CleanupIncomplete, CoriolisAzureError, CorruptChunk, InvalidInput
from .events import Copied, Event, Notice, Report, Step, Waiting, json_lines

INTERRUPTED = 130
_WRAPPED = {"id", "resource", "code", "meaning", "reason"}  # columns of tables that may take several lines
EXIT_CODES = """\b
Exit codes: 0 done · 2 input · 3 Azure · 4 worker · 5 transfer · 6 deadline · 7 cleanup incomplete
            (the ids that stayed are listed) · 130 interrupted · 1 a fault of this program"""
_MECHANISM = settings.schema("source_environment")["properties"]["replica_export_mechanism"]
_VERIFIED = {True: "yes", None: "not verified", False: "NO"}

_out = Console()
_err = Console(stderr=True)
F = TypeVar("F", bound=Callable[..., Any])


class Terminated(KeyboardInterrupt):
    """The process was asked to end; handled like Ctrl-C, so that what was made is undone."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EXIT_CODES
)
@click.version_option(__version__, prog_name="coriolis-azure")
@click.option(
    "-v", "--verbose", count=True, help="Log to stderr; twice for debug output. Secrets are never logged."
)
def cli(verbose: int) -> None:
    """Take virtual machines out of Azure: once, or again and again, moving only what changed.

    \b
    New here?   coriolis-azure demo
    For real:   coriolis-azure check     -c connection.json -e environment.json web-1
                coriolis-azure inspect   -c connection.json -e environment.json web-1
                coriolis-azure replicate -c connection.json -e environment.json web-1 --to /srv/replicas/web-1

    What goes into the two files: coriolis-azure schema connection, coriolis-azure schema source-environment.
    """
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Azure's own request logging repeats every header; our lines say what matters.
    logging.getLogger("azure.core.pipeline.policies.http_logging_policy").setLevel(logging.WARNING)
    if not verbose:
        for name in ("paramiko", "azure.identity"):  # what they warn of becomes an error of ours, told once
            logging.getLogger(name).setLevel(logging.CRITICAL)


def json_option(command: F) -> F:
    """--json, on every command."""
    return click.option(
        "--json", "as_json", is_flag=True, help="One JSON document on stdout; events as JSON lines on stderr."
    )(command)


def source_options(command: F, *, required: bool = True) -> F:
    """-c and -e."""
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    connection = click.option(
        "-c",
        "--connection",
        type=file,
        required=required,
        envvar="CORIOLIS_AZURE_CONNECTION",
        show_envvar=True,
        help="JSON file: which Azure, and as whom. Keep it readable for you only.",
    )
    environment = click.option(
        "-e",
        "--environment",
        type=file,
        required=required,
        envvar="CORIOLIS_AZURE_ENVIRONMENT",
        show_envvar=True,
        help="JSON file: where the VMs are, and how the worker is made.",
    )
    return connection(environment(command))


@cli.command("schema")
@click.argument("name", type=click.Choice(["connection", "source-environment"]))
@json_option
def schema(name: str, as_json: bool) -> None:
    """Print the JSON schema of a settings file, with a description of every property."""
    del as_json  # it is JSON anyway
    files = {"connection": "connection_info", "source-environment": "source_environment"}
    _print_json(settings.schema(files[name]))


@cli.command()
@click.argument("code", required=False)
@json_option
def explain(code: str | None, as_json: bool) -> None:
    """Say what an error code of Azure means and what to do about it; without CODE, list all. Works offline."""
    if code is None:
        if as_json:
            _print_json([each.to_json() for each in codes.CODES])
            return
        table = _table("code", "class", "exit", "meaning")
        for each in codes.CODES:
            table.add_row(each.name, each.kind.__name__, str(each.kind.exit_code), each.meaning)
        _out.print(table)
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
    _say(
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
    with _source(connection, environment, as_json) as source:
        vms = source.list_vms()
    if as_json:
        _print_json(vms)
        return
    table = _table("name", "size", "OS", "disks", "zones")
    for vm in vms:
        table.add_row(vm["name"], vm["size"], vm["os_type"], str(vm["disks"]), ", ".join(vm["zones"]) or "-")
    _out.print(table if vms else "There are no VMs in this resource group and location.")


@cli.command()
@source_options
@click.argument("vm")
@json_option
def inspect(connection: Path, environment: Path, vm: str, as_json: bool) -> None:
    """Show what is known of a VM: the export info that the orchestrator gets.

    VM is a name in the resource group, or an ARM id.
    """
    from .inspection import export_info

    with _source(connection, environment, as_json) as source:
        machine = source.inspect(vm)
    if as_json:
        _print_json(export_info(machine))
        return
    _out.print(f"[bold]{machine.name}[/] in {machine.group}, {machine.location}, {machine.power_state}")
    _out.print(
        f"{machine.size}: {machine.vcpus} vCPUs, {machine.memory_mb} MiB · {machine.os_type} · {machine.firmware}"
        f"{' with secure boot' if machine.secure_boot else ''} · hostname {machine.hostname or 'unknown'}"
    )
    disks = _table("disk", "LUN", "size", "SKU", "caching", "name", title="Disks")
    for disk in machine.disks:
        lun = "-" if disk.lun is None else str(disk.lun)
        disks.add_row(
            disk.name, lun, _size(disk.size_bytes), disk.sku, disk.caching, disk.id.rpartition("/")[2]
        )
    nics = _table("NIC", "MAC", "network", "private", "public", title="NICs")
    for nic in machine.nics:
        private = ", ".join(nic.private_addresses)
        nics.add_row(nic.name, nic.mac or "-", nic.network, private or "-", nic.public_address or "-")
    _out.print(disks, nics)
    for caveat in machine.caveats:
        _out.print(f"! {_plain(caveat)}", highlight=False)


@cli.command()
@source_options
@click.argument("vm", required=False)
@click.option("--shutdown/--no-shutdown", default=True, help="Whether runs may shut VMs down.")
@json_option
def check(connection: Path, environment: Path, vm: str | None, shutdown: bool, as_json: bool) -> None:
    """Ask everything that can be known before anything is made or shut down. Changes nothing.

    Credentials, permissions, locks, quota, the worker's size, image and network, and, of the VM that is named, what
    speaks against moving it. Exit code 0 when a run can be expected to work, 2 when something speaks against it, or
    when the identity lacks an action of the role that `coriolis-azure role` prints: then not everything can be known.
    """
    with _source(connection, environment, as_json) as source:
        checked = source.check(vm, strict=True, shutdown=shutdown)
    if as_json:
        _print_json(checked.to_json())
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("step", "", "result", "what to do"):
            table.add_column(column, no_wrap=column in {"step", ""}, overflow="fold")
        colours = {"fine": "green", "warning": "yellow", "error": "red"}
        for finding in checked.findings:
            severity = f"[{colours[finding.severity]}]{finding.severity}[/]"
            table.add_row(finding.step, severity, _plain(finding.text), _plain(finding.remedy) or "-")
        _out.print(table)
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
@click.option("--shutdown/--no-shutdown", default=True, help="Whether runs may shut VMs down.")
@click.option("--customer-keys", is_flag=True, help="For disks with customer-managed keys.")
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
        (customer_keys, permissions.CUSTOMER_KEYS),
        (storage is not None, permissions.BLOB_STORAGE),
        (storage == "identity", permissions.BLOB_DATA),
        (storage == "key", permissions.ACCOUNT_KEY),
    )
    chosen |= {feature for wanted, feature in features if wanted}
    _print_json(permissions.role(chosen, scopes or ("/subscriptions/00000000-0000-0000-0000-000000000000",)))


@cli.command()
@source_options
@click.argument("vm")
@click.option(
    "--to", required=True, metavar="DEST", help="A folder or file:// URL: one sparse raw image a disk."
)
@click.option("--shutdown", is_flag=True, help="Deallocate the VM before its disks are copied. It stays off.")
@click.option("--full", is_flag=True, help="Send everything, whatever the destination holds already.")
@click.option("--limit", metavar="RATE", help="The most to use of the network, all disks together: 50MiB/s.")
@json_option
def replicate(
    connection: Path,
    environment: Path,
    vm: str,
    to: str,
    shutdown: bool,
    full: bool,
    limit: str | None,
    as_json: bool,
) -> None:
    """Copy all disks of a VM to DEST; run it again to send only what changed since.

    Everything that is made in Azure for it (snapshots, disks, a worker VM and its network) is deleted again,
    also when the run fails or is interrupted.
    """
    changes = {"bandwidth_limit": limit} if limit else {}
    with _source(connection, environment, as_json, **changes) as source:
        done = source.replicate(vm, to, shutdown=shutdown, full=full)
    if as_json:
        _print_json(done.to_json())
    else:
        _out.print(_replication_table(done.vm, done.disks, done.seconds))
    _raise_left_behind(done.left_behind)


@cli.command()
@partial(source_options, required=False)
@click.argument("dest", metavar="DEST")
@json_option
def verify(connection: Path | None, environment: Path | None, dest: str, as_json: bool) -> None:
    """Read a destination again and compare it with what the last run to it has left there.

    Names the first chunk of each disk that is not what was replicated. Exit code 0 when all of it is, 5 when
    something is not, 2 when it could not be told of some disk: it is called "not verified" then. The settings are
    needed only for a destination in Azure, blob://...
    """
    from . import destinations, verification
    from .clock import Clock

    if connection and environment and dest.lower().startswith("blob:"):
        with _source(connection, environment, as_json) as source:
            verdicts = source.verify(dest)
    else:
        with _watching(as_json) as report, destinations.open(dest, report, existing=True) as place:
            verdicts = verification.verify(place, report, Clock())
    if as_json:
        _print_json([verdict.to_json() for verdict in verdicts])
    else:
        table = _table("disk", "size", "verified", "reason")
        for verdict in verdicts:
            size = "-" if verdict.size_bytes is None else _size(verdict.size_bytes)
            table.add_row(verdict.name, size, _VERIFIED[verdict.verified], _plain(verdict.reason) or "-")
        _out.print(table)
    for verdict in verdicts:
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
@json_option
def cleanup(connection: Path, environment: Path, older_than: str, dry_run: bool, as_json: bool) -> None:
    """Delete what runs that died have left in the resource group.

    Only resources with our tags are touched. A running transfer shows life every 15 minutes; do not go below
    that while others may be running. Runs of this host whose process is gone are deleted whatever their age.
    """
    age = timedelta(seconds=settings.duration(older_than))
    with _source(connection, environment, as_json) as source:
        found, stayed = source.sweep(age, dry_run=dry_run)
    if as_json:
        runs = [leftover.to_json() for leftover in found]
        _print_json({"dry_run": dry_run, "runs": runs, "left_behind": stayed})
    elif not found:
        _out.print("Nothing to clean up.")
    else:
        table = _table("run", "VM", "last sign of life", "resource", "")
        for leftover in found:
            for id in leftover.ids:
                fate = "would be deleted" if dry_run else "STAYED" if id in stayed else "deleted"
                table.add_row(leftover.run, leftover.instance, str(leftover.alive or "unknown"), id, fate)
        _out.print(table)
    _raise_left_behind(stayed)


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

    with _watching(as_json) as report:
        told = run(report, keep)
    if as_json:
        _print_json(told.to_json())
    else:
        for title, replicated in (("First run", told.first), ("Second run", told.second)):
            _out.print(_replication_table(title, replicated.disks, replicated.seconds))
        _out.print(_resources_table(told.resources_before, told.resources_after))
        checks = _table("check", "result")
        for check, held in told.checks.items():
            checks.add_row(check, "[green]holds[/]" if held else "[red]DOES NOT HOLD[/]")
        _out.print(checks)
    if not told.held:
        raise click.exceptions.Exit(1)


@cli.group()
def sandbox() -> None:
    """A small Azure on this machine, to try things out and to test against."""


_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port of the HTTPS server; any free one unless set.",
)
@click.option(
    "--api-profile",
    default="latest",
    show_default=True,
    help="latest, or 2020-09-01-hybrid: an Azure Stack Hub.",
)
@click.option(
    "--pace",
    type=click.FloatRange(1, 10_000),
    default=60,
    show_default=True,
    help="Seconds of Azure's in one of yours: for request budgets, and the NICs of VMs that failed. "
    "1 keeps Azure's own time.",
)
@json_option
def serve(directory: Path, port: int, api_profile: str, pace: float, as_json: bool) -> None:
    """Serve a local Azure in the foreground, until Ctrl-C.

    Writes DIR/connection.json and DIR/environment.json, for -c and -e, then prints "ready".
    """
    from . import sandbox as local

    def ready() -> None:
        click.echo(json.dumps({"ready": True}) if as_json else "ready")

    with contextlib.suppress(KeyboardInterrupt):
        local.serve(directory, port=port, api_profile=api_profile, pace=pace, ready=ready)


@sandbox.command("add-vm")
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.argument("name")
@click.option(
    "--os-disk", required=True, type=_FILE, help="A raw image; its size is a multiple of 512 bytes."
)
@click.option("--data-disk", "data_disks", type=_FILE, multiple=True, help="At LUN 0, 1, ... as given.")
@click.option(
    "--unmanaged",
    is_flag=True,
    help="Its disks are VHD blobs in the storage account sandboxstorage, and it is deallocated.",
)
@click.option("--size", default="Standard_D2s_v5", show_default=True)
@click.option("--os-type", type=click.Choice(["linux", "windows"]), default="linux", show_default=True)
@json_option
def add_vm(
    directory: Path,
    name: str,
    os_disk: Path,
    data_disks: tuple[Path, ...],
    unmanaged: bool,
    size: str,
    os_type: str,
    as_json: bool,
) -> None:
    """Add a running VM whose disks are copies of raw image files."""
    from . import sandbox as local

    account = "sandboxstorage" if unmanaged else ""
    id = local.add_vm(directory, name, os_disk, data_disks, size=size, os_type=os_type, unmanaged=account)
    _say(as_json, {"id": id}, id)


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.argument("name")
@click.argument("disk")
@click.argument("file", type=_FILE)
@json_option
def write(directory: Path, name: str, disk: str, file: Path, as_json: bool) -> None:
    """Replace the content of a disk of a VM. DISK is os, or data-<lun>, or just the LUN of a data disk."""
    from . import sandbox as local

    lun = disk.removeprefix("data-")
    if disk != "os" and not (lun.isascii() and lun.isdecimal()):
        raise InvalidInput(f"{disk!r} names no disk", remedy="Write os, or data-0, data-1, ...")
    local.write(directory, name, disk if disk == "os" else int(lun), file)
    _say(as_json, {"written": file.stat().st_size}, f"{file.stat().st_size} bytes written")


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.argument("kind", required=False)
@click.option("--method", help="Of which requests: PUT, GET, ... Any, if not given.")
@click.option("--path", metavar="TEXT", help="With which text in their path, like /disks/ or operations.")
@click.option("--times", type=click.IntRange(min=0), help="How many are struck; 0 for all. [default: 1]")
@click.option("--after", type=click.IntRange(min=0), help="How many of them pass before.")
@click.option("--code", help="Azure's error code.")
@click.option("--status", type=int, help="The HTTP status.")
@click.option("--message", help="Azure's message.")
@click.option("--seconds", type=float, help="What a throttled client is told to wait.")
@click.option("--polls", type=int, help="How often a slow operation is asked about in vain.")
@click.option("--clear", is_flag=True, help="Switch all faults off.")
@json_option
def fault(directory: Path, kind: str | None, clear: bool, as_json: bool, **given: Any) -> None:
    """Switch a fault on by rule, list what is on, or clear it.

    KIND: throttle, server-error, lost-request, lost-answer, refuse, failed-operation, slow-operation, no-capacity,
    no-allocation, quota, policy, lock. Without KIND the rules that can still strike are listed.
    """
    from . import sandbox as local

    if clear:
        local.fault_rules(directory, clear=True)
    if kind:
        chosen = {name: value for name, value in given.items() if value is not None}
        local.fault(directory, kind, **chosen)
    rules = local.fault_rules(directory)
    if as_json:
        _print_json(rules)
        return
    table = _table("id", "kind", "requests", "after", "times", "error")
    for rule in rules:
        requests = f"{rule['method'] or 'any'} {rule['path']}"
        error = " ".join(str(rule[name]) for name in ("status", "code") if rule[name])
        table.add_row(
            rule["id"], rule["kind"], requests, str(rule["after"]), str(rule["times"] or "all"), error
        )
    _out.print(table)


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.argument("role", type=_FILE)
@json_option
def permit(directory: Path, role: Path, as_json: bool) -> None:
    """Give the sandbox's identity the permissions of ROLE, a role definition, and no others.

    `coriolis-azure role > role.json` prints the one that the steps need.
    """
    from . import sandbox as local

    definition = settings.read_json(role)
    local.permit(directory, definition if isinstance(definition, list) else [definition])
    _say(as_json, {"permitted": str(role)}, "permitted")


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@json_option
def resources(directory: Path, as_json: bool) -> None:
    """Print every ARM resource as JSON: id, type, tags."""
    from . import sandbox as local

    del as_json  # it is JSON anyway
    _print_json(local.resources(directory))


def main() -> int:
    """Run the command line; the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _terminate)
    as_json = "--json" in sys.argv
    try:
        # What a command's Exit carries comes back as the result; a command itself has none.
        return cli.main(prog_name="coriolis-azure", standalone_mode=False) or 0
    except CoriolisAzureError as error:
        _tell_error(error, as_json)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _err.print("interrupted")
        return INTERRUPTED


def _terminate(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Terminated


def _tell_error(error: CoriolisAzureError, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"event": "error", **error.to_json()}, default=str), err=True)
    else:
        _err.print(f"[bold red]error:[/] {_plain(error.message)}", highlight=False, soft_wrap=True)
        _err.print(f"[bold]what to do:[/] {_plain(error.remedy)}", highlight=False, soft_wrap=True)
        if isinstance(error, AzureError) and error.reference:
            _err.print(f"[dim]Azure's answer: {_plain(error.reference)}[/]", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _source(connection: Path, environment: Path, as_json: bool, **changes: str) -> Iterator[Any]:
    """A Source of the two files, watched; `changes` replace settings of the environment."""
    from .source import Source  # the SDKs take a second to import: not for --help

    connection_info, source_environment = settings.read_json(connection), settings.read_json(environment)
    if changes and isinstance(source_environment, dict):
        source_environment = {**source_environment, **changes}
    with _watching(as_json) as report, Source(connection_info, source_environment, report=report) as source:
        yield source


@contextlib.contextmanager
def _watching(as_json: bool) -> Iterator[Report]:
    """A sink for events: JSON lines, bars on a terminal, a line now and then elsewhere."""
    if as_json:
        yield json_lines(sys.stderr)
    elif _err.is_terminal:
        bars = Bars()
        with bars.progress:
            yield bars.report
    else:
        yield Lines().report


_HELD_UP = {"": "", "source": "worker/line", "destination": "destination", "limit": "limit"}


class Bars:
    """Events on a terminal: a line for each step, a bar with rate and ETA for each disk, and what holds it up."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description:>7}"),
            BarColumn(),
            DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)),
            TransferSpeedColumn(table_column=Column(no_wrap=True)),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("sent {task.fields[sent]}"),
            TextColumn("[dim]{task.fields[held_up]}"),
            console=_err,
        )
        self._tasks: dict[str, TaskID] = {}

    def report(self, event: Event) -> None:
        """Show an event."""
        if not isinstance(event, Copied):
            self.progress.console.print(_line(event), highlight=False)
            return
        if event.disk not in self._tasks:
            self._tasks[event.disk] = self.progress.add_task(
                event.disk, total=event.total, sent="", held_up=""
            )
        task, sent, held_up = self._tasks[event.disk], _size(event.sent), _HELD_UP[event.held_up_by]
        self.progress.update(task, completed=event.done, total=event.total, sent=sent, held_up=held_up)
        if event.done == event.total:
            del self._tasks[event.disk]


class Lines:
    """Events where nobody looks at a terminal: a line for each step, and for each disk every few seconds."""

    _SECONDS = 5.0

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def report(self, event: Event) -> None:
        """Show an event."""
        if not isinstance(event, Copied):
            click.echo(_line(event), err=True)
            return
        now = time.monotonic()
        began = self._started.setdefault(event.disk, now)
        if event.done < event.total and now - self._told.get(event.disk, began) < self._SECONDS:
            return
        self._told[event.disk] = now
        rate = event.done / max(now - began, 0.001)
        eta = (event.total - event.done) / rate if rate else 0
        click.echo(
            f"  {event.disk}: {_size(event.done)} of {_size(event.total)}, {_size(event.sent)} sent, "
            f"{_size(rate)}/s, ETA {timedelta(seconds=round(eta))}"
            + (f", held up by {_HELD_UP[event.held_up_by]}" if event.held_up_by else ""),
            err=True,
        )
        if event.done == event.total:
            del self._started[event.disk], self._told[event.disk]


def _line(event: Event) -> str:
    match event:
        case Step(name, target):
            return f"→ {name}" + (f": {target}" if target else "")
        case Waiting(what, seconds):
            return f"  waiting for {what} (up to {timedelta(seconds=round(seconds))})"
        case Notice(text):
            return f"! {text}"
    return str(event)


def _replication_table(title: str, disks: Any, seconds: float) -> Table:
    table = _table(
        "disk", "size", "read", "sent", "zero", "same", "run", "verified", title=f"{title}: {seconds:.1f} s"
    )
    for disk in disks:
        sizes = (disk.size_bytes, disk.read_bytes, disk.sent_bytes, disk.zero_bytes, disk.skipped_bytes)
        table.add_row(
            disk.name, *map(_size, sizes), "full" if disk.full else "changes", _VERIFIED[disk.verified]
        )
    return table


def _resources_table(before: list[Any], after: list[Any]) -> Table:
    table = _table("Azure resource", "before", "after")
    ids = {resource["id"]: resource["type"] for resource in (*before, *after)}
    held = [{resource["id"] for resource in resources} for resources in (before, after)]
    for id, type_ in sorted(ids.items()):
        table.add_row(
            f"{type_}/{id.rpartition('/')[2]}", *("there" if id in ids_then else "-" for ids_then in held)
        )
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for column in columns:
        table.add_column(column, no_wrap=column not in _WRAPPED, overflow="fold")
    return table


def _raise_left_behind(ids: Any) -> None:
    if ids:
        raise CleanupIncomplete(f"could not delete: {', '.join(ids)}", left_behind=list(ids))


def _say(as_json: bool, document: Any, text: str) -> None:
    if as_json:
        _print_json(document)
    else:
        click.echo(text)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def _size(count: float) -> str:
    """Bytes as people read them: three digits are enough."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.3g} {units[power]}"


def _plain(text: str) -> str:
    """Text as it is: names in brackets are not markup."""
    return text.replace("[", r"\[")
