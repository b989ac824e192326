"""What the commands show: a table of each result.

Values from outside are cleaned when they are shown, see `output`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from ..azure import names
from ..errors import cleaned
from ..events import aged, amount, counted
from .output import Cell, Styled, Table, show

if TYPE_CHECKING:  # the commands import most of these only when they are used
    from ..azure.codes import Code
    from ..checks.finding import Finding
    from ..fleet import VmResult
    from ..model import Json, Machine
    from ..replica.survey import Surveyed
    from ..restoring import Restored
    from ..run.baselines import Listed
    from ..run.cleanup import Leftover
    from ..run.records import VolumeRecord

_VERIFIED = {True: "yes", None: "not verified", False: "NO"}
_COLOURS = {"fine": "green", "warning": "yellow", "error": "red"}


def codes_table(codes: Iterable[Code]) -> Table:
    records = [(code.name, code.kind.__name__, str(code.kind.exit_code), code.meaning) for code in codes]
    return Table(("code", "class", "exit", "meaning"), records)


def vms_table(vms: Iterable[Json]) -> Table:
    records = [
        (vm["name"], vm["size"], vm["os_type"], str(vm["disks"]), ", ".join(vm["zones"]) or "-") for vm in vms
    ]
    return Table(("name", "size", "OS", "disks", "zones"), records)


def findings_table(findings: Iterable[Finding]) -> Table:
    records = [
        (
            finding.step,
            Styled(finding.severity, _COLOURS[finding.severity]),
            finding.text,
            finding.remedy or "-",
        )
        for finding in findings
    ]
    return Table(("step", "", "result", "what to do"), records)


def show_machine(machine: Machine) -> None:
    where = cleaned(f" in {machine.group}, {machine.location}, {machine.power_state}")
    show(sys.stdout, where, cleaned(machine.name), "bold")
    firmware = f"{machine.firmware} with secure boot" if machine.secure_boot else machine.firmware
    click.echo(
        cleaned(
            f"{machine.size}: {counted(machine.vcpus, 'vCPU')}, {machine.memory_mb} MiB, {machine.os_type}, "
            f"{firmware}, hostname {machine.hostname or 'unknown'}"
        )
    )
    disks = [
        (
            disk.name,
            "-" if disk.lun is None else str(disk.lun),
            amount(disk.size_bytes),
            disk.sku,
            disk.caching,
            disk.id.rpartition("/")[2],
        )
        for disk in machine.disks
    ]
    Table(("disk", "LUN", "size", "SKU", "caching", "name"), disks, "Disks").show()
    nics = [
        (
            nic.name,
            nic.mac or "-",
            nic.network,
            ", ".join(nic.private_addresses) or "-",
            nic.public_address or "-",
        )
        for nic in machine.nics
    ]
    Table(("NIC", "MAC", "network", "private", "public"), nics, "NICs").show()
    for caveat in machine.caveats:
        show(sys.stdout, f"! {cleaned(caveat)}")


def replication_table(title: str, done: Any) -> Table:
    columns = ["disk", "size", "read", "sent", "zero", "same", "run", "verified", "mechanism", "reason"]
    records = []
    for disk in done.disks:
        sizes = (disk.size_bytes, disk.read_bytes, disk.sent_bytes, disk.zero_bytes, disk.skipped_bytes)
        run = "full" if disk.full else "changes"
        how = f"{disk.mechanism}: {disk.tier}"
        records.append((disk.name, *map(amount, sizes), run, _VERIFIED[disk.verified], how, disk.reason))
    if not any(disk.reason for disk in done.disks):  # by the worker, as always
        columns, records = columns[:-2], [record[:-2] for record in records]
    return Table(columns, records, f"{title}: as of {done.point}, {done.seconds:.1f} s")


def fleet_table(results: Iterable[VmResult]) -> Table:
    """One row for each VM, with all of its outcome."""
    records = []
    for each in results:
        done = each.replicated
        sent = amount(sum(disk.sent_bytes for disk in done.disks)) if done is not None else "-"
        left = counted(len(each.left_behind), "resource") + " left in Azure" if each.left_behind else ""
        if each.error is not None:
            outcome, remedy = Styled(each.error.message, "red"), each.error.remedy
        else:
            outcome, remedy = Styled(left or "done", "yellow" if left else "green"), "-"
        remedy = "Run `coriolis-azure cleanup`." if left and each.error is None else remedy
        records.append((each.vm, outcome, sent, f"{each.seconds:.1f}", remedy))
    return Table(("VM", "result", "sent", "seconds", "what to do"), records)


def cutover_table(done: Any) -> Table:
    records = []
    for title, run in zip(("while it ran", "again", "after the shutdown"), done.runs, strict=True):
        read, sent = (sum(getattr(disk, name) for disk in run.disks) for name in ("read_bytes", "sent_bytes"))
        records.append((title, run.point, amount(read), amount(sent), f"{run.seconds:.1f} s"))
    return Table(("run", "as of", "read", "sent", "took"), records, f"{done.vm}: cut over")


def verdict_table(verdicts: Any) -> Table:
    records = []
    for verdict in verdicts:
        size = "-" if verdict.size_bytes is None else amount(verdict.size_bytes)
        records.append((verdict.name, size, _VERIFIED[verdict.verified], verdict.reason or "-"))
    return Table(("disk", "size", "verified", "reason"), records)


def resources_table(before: list[Any], after: list[Any]) -> Table:
    types = {resource["id"]: resource["type"] for resource in (*before, *after)}
    listings = [{resource["id"] for resource in resources} for resources in (before, after)]
    records = [
        (f"{kind}/{id.rpartition('/')[2]}", *("exists" if id in listing else "-" for listing in listings))
        for id, kind in sorted(types.items())
    ]
    return Table(("Azure resource", "before", "after"), records, "Resources in Azure")


def status_table(found: Surveyed) -> Table:
    times = [(time, "kept: `restore` brings it back", "-") for time in found.points]
    if found.point is not None:
        times.append((found.point, "the newest", ", ".join(found.disks)))
    if found.unfinished is not None:
        times.append((found.unfinished, "an unfinished run", "-"))
    return Table(("point in time", "what it is", "disks"), times, found.vm)


_STATES = {
    "good": Styled("good", "green"),
    "running": Styled("run in progress", "cyan"),
    "unfinished": Styled("unfinished run", "yellow"),
    "incomplete": Styled("no replica yet", "yellow"),
    "damaged": Styled("damaged", "red"),
}


def replicas_table(found: Iterable[Surveyed], now: datetime) -> Table:
    records: list[tuple[Cell, ...]] = []
    for one in found:
        age = one.age(now)
        records.append(
            (
                one.name or one.vm_name,
                _STATES[one.state],
                one.point or "-",
                "-" if age is None else aged(age),
                "-" if one.size_bytes is None else amount(one.size_bytes),
                "-" if one.stored_bytes is None else amount(one.stored_bytes),
                str(len(one.points)),
                one.verified.time if one.verified else "-",
                f"{one.error}. {one.remedy}" if one.error else one.advice() or "-",
            )
        )
    columns = ("replica", "state", "point in time", "age", "size", "stored", "kept", "verified", "what to do")
    return Table(columns, records)


def restored_table(done: Restored) -> Table:
    records = [
        (disk.name, amount(disk.size_bytes), amount(disk.sent_bytes), _VERIFIED[disk.verified])
        for disk in done.disks
    ]
    return Table(("disk", "size", "restored", "verified"), records, f"As of {done.point}")


@dataclass(frozen=True)
class Cleaned:
    """What `cleanup` found, and what it deleted of that or, with `dry_run`, would delete.

    All of `leftovers` are to be deleted; of `volumes` only the `forgotten`, of `baselines` only the `retired` ones.
    `left_behind`: the ids of what could not be deleted. `untagged`: the ids of what was left alone without our tags.
    """

    dry_run: bool
    leftovers: Sequence[Leftover]
    volumes: Sequence[VolumeRecord]
    forgotten: Sequence[VolumeRecord]
    baselines: Sequence[Listed]
    retired: Sequence[Listed]
    left_behind: Sequence[str]
    untagged: Sequence[str]

    @property
    def found_nothing(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.leftovers or self.volumes or self.baselines or self.untagged)

    def to_json(self) -> Json:
        """Plain JSON values."""
        return {
            "dry_run": self.dry_run,
            "runs": [leftover.to_json() for leftover in self.leftovers],
            "volumes": [{**volume.to_json(), "old": volume in self.forgotten} for volume in self.volumes],
            "baselines": [{**each.to_json(), "old": each in self.retired} for each in self.baselines],
            "left_behind": self.left_behind,
            "untagged": self.untagged,
        }

    def table(self) -> Table:
        """One row per resource."""
        without_tags = {id.lower() for id in self.untagged}
        records = [
            (leftover.run, leftover.instance, _stamp(leftover.alive), self._fate(id), id)
            for leftover in self.leftovers
            for id in leftover.ids
            if id.lower() not in without_tags
        ]
        for volume in self.volumes:
            fate = self._fate(volume.id) if volume in self.forgotten else "kept"
            records.append(("-", volume.instance, _stamp(volume.alive), fate, volume.id))
        for each in self.baselines:
            until = f"until {each.until or 'it is deleted'}"
            fate = self._fate(each.id) if each in self.retired else until
            records.append(("-", each.instance, each.made, fate, each.id))
        records += [("-", "", "unknown", "NO TAGS", id) for id in self.untagged]
        return Table(("run", "VM", "last sign of life", "", "resource"), records)

    def _fate(self, id: str) -> str:
        return "would be deleted" if self.dry_run else "LEFT BEHIND" if id in self.left_behind else "deleted"


def _stamp(alive: datetime | None) -> str:
    return names.stamp(alive) if alive else "unknown"


def demo_checks_table(checks: Mapping[str, bool]) -> Table:
    results = {True: Styled("passed", "green"), False: Styled("FAILED", "red")}
    return Table(("check", "result"), [(check, results[held]) for check, held in checks.items()], "Checks")
