"""The commands on the sandbox, a small Azure on this machine."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from .. import settings
from ..errors import InvalidInput
from ..events import counted
from .commands import cli
from .options import json_option, tags
from .output import Table, print_json, say


@cli.group()
def sandbox() -> None:
    """Run a small Azure on this machine, to try things out."""


_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port of the HTTPS server; by default any free one.",
)
@click.option(
    "--api-profile",
    default="latest",
    show_default=True,
    help="latest, or 2020-09-01-hybrid for an Azure Stack Hub.",
)
@click.option(
    "--pace",
    type=click.FloatRange(1, 10_000),
    default=60,
    show_default=True,
    help="How many times faster than real time request budgets refill and NICs of failed VMs are released. "
    "1 is Azure's own time.",
)
@json_option
def serve(directory: Path, port: int, api_profile: str, pace: float, as_json: bool) -> None:
    """Serve a local Azure in the foreground until Ctrl-C.

    Writes DIR/connection.json and DIR/environment.json, for -c and -e, then prints "ready".
    """
    from .. import sandbox as local

    def ready() -> None:
        click.echo(json.dumps({"ready": True}) if as_json else "ready")

    with contextlib.suppress(KeyboardInterrupt):
        local.serve(directory, port=port, api_profile=api_profile, pace=pace, ready=ready)


@sandbox.command("add-vm")
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.argument("name")
@click.option(
    "--os-disk", required=True, type=_FILE, help="A raw image whose size is a multiple of 512 bytes."
)
@click.option(
    "--data-disk", "data_disks", type=_FILE, multiple=True, help="A raw image; LUN 0, 1, ... in this order."
)
@click.option(
    "--unmanaged",
    is_flag=True,
    help="Make its disks VHD blobs in the storage account sandboxstorage, and deallocate it.",
)
@click.option("--size", default="Standard_D2s_v5", show_default=True)
@click.option("--os-type", type=click.Choice(["linux", "windows"]), default="linux", show_default=True)
@click.option(
    "--tag",
    "tagged",
    multiple=True,
    metavar="KEY=VALUE",
    callback=tags,
    help="A tag of the VM. May be repeated.",
)
@json_option
def add_vm(
    directory: Path,
    name: str,
    os_disk: Path,
    data_disks: tuple[Path, ...],
    unmanaged: bool,
    size: str,
    os_type: str,
    tagged: dict[str, str],
    as_json: bool,
) -> None:
    """Add a running VM whose disks are copies of raw image files."""
    from .. import sandbox as local

    account = "sandboxstorage" if unmanaged else ""
    spec = local.VmSpec(size=size, os_type=os_type, unmanaged=account, tags=tagged)
    id = local.add_vm(directory, name, os_disk, data_disks, spec)
    say({"id": id}, id, as_json=as_json)


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.argument("name")
@click.argument("disk")
@click.argument("file", type=_FILE)
@click.option(
    "--offset", type=click.IntRange(min=0), help="Write FILE there, and leave the rest of the disk as it is."
)
@json_option
def write(directory: Path, name: str, disk: str, file: Path, offset: int | None, as_json: bool) -> None:
    """Replace the content of a VM's disk. DISK is os, data-<lun>, or just the LUN of a data disk."""
    from .. import sandbox as local

    local.write(directory, name, _lun(disk), file, offset)
    say({"written": file.stat().st_size}, f"{counted(file.stat().st_size, 'byte')} written", as_json=as_json)


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.argument("name")
@click.argument("disk")
@click.argument("offset", type=click.IntRange(min=0))
@click.argument("length", type=click.IntRange(min=1))
@json_option
def clear(directory: Path, name: str, disk: str, offset: int, length: int, as_json: bool) -> None:
    """Clear a part of a VM's disk, as TRIM does.

    LENGTH bytes at OFFSET then read as zeros, and are not allocated.
    """
    from .. import sandbox as local

    local.clear(directory, name, _lun(disk), offset, length)
    say({"cleared": length}, f"{counted(length, 'byte')} cleared", as_json=as_json)


def _lun(disk: str) -> str | int:
    """ "os", or the LUN of a data disk."""
    lun = disk.removeprefix("data-")
    if disk != "os" and not (lun.isascii() and lun.isdecimal()):
        raise InvalidInput(f"{disk!r} is not the name of a disk", remedy="Write os, or data-0, data-1, ...")
    return "os" if disk == "os" else int(lun)


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.argument("kind", required=False)
@click.option("--method", help="Only requests with this method: PUT, GET, ... Any by default.")
@click.option("--path", metavar="TEXT", help="Only requests with this text in the path: /disks/, operations.")
@click.option(
    "--times", type=click.IntRange(min=0), help="How many requests it affects; 0 for all. [default: 1]"
)
@click.option("--after", type=click.IntRange(min=0), help="How many requests pass first.")
@click.option("--code", help="Azure's error code.")
@click.option("--status", type=int, help="The HTTP status.")
@click.option("--message", help="Azure's message.")
@click.option(
    "--seconds", type=float, help="How long a throttled client is told to wait; how long a fault lasts."
)
@click.option("--polls", type=int, help="How many polls a slow operation takes.")
@click.option(
    "--about",
    type=click.Choice(["read", "list", "difference"]),
    help="Of requests to exported disks only those that read, list pages, or list the difference to a snapshot.",
)
@click.option(
    "--ranges", type=click.IntRange(min=0), help="How many ranges list-timeout still lists in a window."
)
@click.option("--clear", is_flag=True, help="Remove all rules.")
@json_option
def fault(directory: Path, kind: str | None, clear: bool, as_json: bool, **details: Any) -> None:
    """Add a fault rule, list the active rules, or remove all.

    KIND: throttle, server-error, lost-request, lost-answer, refuse, failed-operation, slow-operation, no-capacity,
    no-allocation, quota, policy, lock.

    Of exported disks: network-policy, family-merging, sas-expired, slow-read, server-busy, list-timeout,
    header-ignored, window-ignored, list-cut, range-left-out, ranges-unsorted, ranges-overlapping, ranges-beyond-end,
    ranges-unaligned, footer-counted, wrong-length, wrong-version, broken-body.

    Without KIND the active rules are listed.
    """
    from .. import sandbox as local

    if clear:
        local.fault_rules(directory, clear=True)
    if kind:
        chosen = {name: value for name, value in details.items() if value is not None}
        local.fault(directory, kind, **chosen)
    rules = local.fault_rules(directory)
    if as_json:
        print_json(rules)
        return
    records = []
    for rule in rules:
        requests = f"{rule['method'] or 'any'} {rule['path']}"
        error = " ".join(str(rule[name]) for name in ("status", "code") if rule[name])
        times = str(rule["times"] or "all")
        records.append((rule["id"], rule["kind"], requests, str(rule["after"]), times, error))
    Table(("id", "kind", "requests", "after", "times", "error"), records).show()


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@click.argument("role", type=_FILE)
@json_option
def permit(directory: Path, role: Path, as_json: bool) -> None:
    """Restrict the sandbox's identity to the permissions of a role.

    ROLE is a file with a role definition. `coriolis-azure role > role.json` writes the role that runs need.
    """
    from .. import sandbox as local

    definition = settings.read_json(role)
    local.permit(directory, definition if isinstance(definition, list) else [definition])
    say({"permitted": str(role)}, "permitted", as_json=as_json)


@sandbox.command()
@click.argument("directory", metavar="DIR", type=_FOLDER)
@json_option
def resources(directory: Path, as_json: bool) -> None:
    """Print every ARM resource as JSON: id, type, tags."""
    from .. import sandbox as local

    del as_json  # always JSON
    print_json(local.resources(directory))
