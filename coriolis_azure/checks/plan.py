"""What a run would make, read and move, how long it may take and what it may cost, before anything is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from ..azure import names
from ..azure.context import Context
from ..events import amount, silent
from ..machine import choice, cloning
from ..machine.choice import Choice
from ..model import Disk, Json, Machine
from ..settings import DISK, SNAPSHOTS, WORKER
from ..worker import sizes
from .prices import Prices

_GIB = 1 << 30
_HOURS_OF_MONTH, _DAYS_OF_MONTH = 730, 30
# Bytes per second that one snapshot was seen to give.
_SNAPSHOT_RATE = 60 << 20
# Of a line about which nothing is said: 100 Mbit/s to 1 Gbit/s.
_UNKNOWN_LINE = (12_500_000, 125_000_000)
# Seconds that Azure's operations of a run take in all, with a worker and without one, and what each disk adds.
_WITH_WORKER, _WITHOUT_WORKER, _PER_DISK = (120, 420), (20, 120), (0, 15)
# Of an outage: until the VM is deallocated; then until its disks can be read, by a worker or from their snapshots.
_DEALLOCATION, _ATTACHING, _OPENING = (30, 180), (20, 180), (10, 60)
_WORKER_DISK_GIB, _WORKER_DISK = 30, "StandardSSD_LRS"


@dataclass(frozen=True)
class Range:
    """An estimate: at least `least` and at most `most`, as far as can be told before the run."""

    least: float
    most: float

    def __add__(self, other: Range) -> Range:
        return Range(self.least + other.least, self.most + other.most)

    def __mul__(self, factor: float) -> Range:
        return Range(self.least * factor, self.most * factor)


_NOTHING = Range(0, 0)


@dataclass(frozen=True)
class Held:
    """What a destination holds of a disk: bytes that are not zeros.

    `proved`: whether it has a baseline whose lists of changes can be relied on.
    """

    data_bytes: int
    proved: bool = False


@dataclass(frozen=True)
class DiskPlan:
    """How a disk would be read, why, and how many bytes would be read and moved."""

    name: str
    size_bytes: int
    mechanism: str
    reason: str
    read_bytes: Range
    moved_bytes: Range


@dataclass(frozen=True)
class Plan:
    """What a run of one VM would do. All amounts are estimates.

    `first`: whether nothing is known of what the destination holds. `creates`: the names of what the run would make, in
    which RUN stands for its id. `worker`: the size of the worker; "" if there is none. `seconds`: the duration of a
    run, `outage_seconds` that of the outage of a cutover. `costs`: those of one run by its parts, `monthly` what
    baselines cost while they are kept, both in `currency`; `prices` says where the prices come from. `assumed`: what
    the estimates rest on.
    """

    vm: str
    first: bool
    disks: tuple[DiskPlan, ...]
    worker: str
    creates: tuple[str, ...]
    read_bytes: Range
    moved_bytes: Range
    seconds: Range
    outage_seconds: Range
    costs: Mapping[str, Range]
    monthly: Range
    currency: str
    prices: str
    assumed: tuple[str, ...]

    @property
    def cost(self) -> Range:
        """The cost of one run in all."""
        return _sum(self.costs.values())

    def to_json(self) -> Json:
        """Plain JSON values; `estimate` says what they are."""
        return {"estimate": True, **asdict(self), "cost": asdict(self.cost)}


def plan(
    context: Context,
    machine: Machine,
    disks: Sequence[Disk],
    prices: Prices,
    held: Mapping[str, Held] | None = None,
    line: int = 0,
) -> Plan:
    """The plan of a run that copies `disks` of `machine`. Nothing is made.

    `held`: what the destination holds, by disk name; None if no destination is named. `line`: bytes per second to the
    destination; 0 if unknown. Raises InvalidInput if a disk needs a worker and none can be launched.
    """
    job = _Job(context, machine, disks, held or {})
    read, moved = _sum(each.read_bytes for each in job.plans), _sum(each.moved_bytes for each in job.plans)
    reading, moving = job.reading(), _seconds(moved, *_line(context, line))
    data = Range(max(reading.least, moving.least), max(reading.most, moving.most))
    overhead = Range(*_WITH_WORKER) if job.worker else Range(*_WITHOUT_WORKER)
    seconds = overhead + Range(*_PER_DISK) * len(disks) + data
    # After the shutdown, what has changed is left to move; a worker alone has to look at everything once more.
    looks_at_all = any(each.mechanism == WORKER for each in job.plans)
    last = Range(reading.least if looks_at_all else 0, data.most)
    ready = Range(*_ATTACHING) if job.worker else Range(*_OPENING)
    return Plan(
        vm=machine.name,
        first=not held,
        disks=job.plans,
        worker=job.worker.name if job.worker else "",
        creates=tuple(job.created()),
        read_bytes=read,
        moved_bytes=moved,
        seconds=seconds,
        outage_seconds=Range(*_DEALLOCATION) + ready + last,
        costs=job.costs(prices, seconds, moved),
        monthly=job.monthly(prices),
        currency=prices.currency,
        prices=f"{prices.date}: {prices.source}",
        assumed=tuple(_assumed(job.plans, held, line)),
    )


class _Job:
    """What is known of a run before it begins."""

    def __init__(
        self, context: Context, machine: Machine, disks: Sequence[Disk], held: Mapping[str, Held]
    ) -> None:
        self._context, self._machine, self._disks, self._held = context, machine, disks, held
        self._choices = choice.choose(context, disks, self._is_proved)
        self._by_worker = [disk for disk in disks if self._choices[disk.name].needs_worker]
        self._needs = sizes.needs(machine, self._by_worker, context.environment)
        self.worker = self._worker()
        self.plans = tuple(self._plan(disk, self._choices[disk.name]) for disk in disks)

    def _is_proved(self, disk: Disk) -> bool:
        return disk.name in self._held and self._held[disk.name].proved

    def _worker(self) -> sizes.Size | None:
        if not self._by_worker:
            return None
        return sizes.choose_size(self._context.azure, self._needs, self._context.environment, silent)

    def _plan(self, disk: Disk, chosen: Choice) -> DiskPlan:
        read = self._read(disk, chosen)
        return DiskPlan(
            disk.name, disk.size_bytes, chosen.mechanism, chosen.reason, read, Range(0, read.most)
        )

    def _read(self, disk: Disk, chosen: Choice) -> Range:
        """The bytes of a disk that a run reads."""
        size, held = disk.size_bytes, self._held.get(disk.name)
        proved = held is not None and held.proved
        if disk.unmanaged and chosen.mechanism == SNAPSHOTS:
            blob = self._context.storage.at(disk.id)
            listed = blob.pages(size).total if blob is not None else size
            return Range(0 if proved else listed, listed)
        if chosen.mechanism == WORKER or disk.unmanaged:
            return Range(size, size)
        least = held.data_bytes if held is not None and not proved else 0
        return Range(min(least, size), size)

    def reading(self) -> Range:
        """Seconds to read the disks: the slowest of those that are read directly, or all that the worker reads."""
        direct, by_worker = _NOTHING, _NOTHING
        for each in self.plans:
            if each.mechanism == SNAPSHOTS:
                took = _seconds(each.read_bytes, _SNAPSHOT_RATE / 2, _SNAPSHOT_RATE)
                direct = Range(max(direct.least, took.least), max(direct.most, took.most))
            else:
                by_worker += each.read_bytes
        disks = self._needs.rate or sizes.ENOUGH
        rate = min(disks, (self.worker.rate if self.worker else 0) or sizes.ENOUGH)
        took = _seconds(by_worker, rate / 2, rate)
        return Range(max(direct.least, took.least), max(direct.most, took.most))

    def created(self) -> list[str]:
        """The names of what the run makes."""
        settings, roles = self._context.environment, []
        if self.worker:
            roles += ["nsg", "nic", "worker", "worker-os-1"]
            roles += ["ip"] if settings.export_worker_use_fip else []
            roles += [] if settings.export_network else ["vnet"]
        managed = [disk for disk in self._disks if not disk.unmanaged]
        if managed and settings.consistency != DISK and self._machine.power_state != "deallocated":
            roles.append("points")
        else:
            roles += [f"snapshot-{disk.name}" for disk in managed]
        roles += [f"clone-{disk.name}" for disk in self._by_worker if not disk.unmanaged]
        blobs = [f"a snapshot of {disk.id}" for disk in self._disks if disk.unmanaged]
        return [*(names.resource("RUN", role) for role in sorted(roles)), *blobs]

    def costs(self, prices: Prices, seconds: Range, moved: Range) -> dict[str, Range]:
        """The costs of the run by its parts."""
        settings, hours, costs = self._context.environment, seconds * (1 / 3600), dict[str, Range]()
        if self.worker:
            costs["worker"] = hours * prices.worker_hour(self.worker.name, self.worker.vcpus)
            if settings.export_worker_use_fip:
                costs["public address"] = hours * prices.address_hour
            clones = [disk for disk in self._by_worker if not disk.unmanaged]
            gibs = [(cloning.clone_sku(disk), disk.size_bytes / _GIB) for disk in clones]
            month = sum(
                prices.disk_month(sku) * gib for sku, gib in [*gibs, (_WORKER_DISK, _WORKER_DISK_GIB)]
            )
            costs["disks"] = hours * (month / _HOURS_OF_MONTH)
        costs["snapshots"] = self._used() * (prices.snapshot_gib_month / _GIB / _DAYS_OF_MONTH)
        is_here = self._context.azure.host_location == settings.location
        costs["data out of Azure"] = _NOTHING if is_here else moved * (prices.egress_gib / _GIB)
        return costs

    def monthly(self, prices: Prices) -> Range:
        """What the baselines cost that the run leaves, for each month in which they are kept."""
        if not self._context.environment.keep_baseline:
            return _NOTHING
        return self._used() * (prices.snapshot_gib_month / _GIB)

    def _used(self) -> Range:
        """The bytes that the disks hold, for which Azure charges their snapshots."""
        held = [(disk, self._held[disk.name]) for disk in self._disks if disk.name in self._held]
        known = [min(each.data_bytes, disk.size_bytes) for disk, each in held]
        return Range(sum(known), sum(disk.size_bytes for disk in self._disks))


def _sum(ranges: Iterable[Range]) -> Range:
    return sum(ranges, _NOTHING)


def _seconds(total: Range, slow: float, fast: float) -> Range:
    """How long an amount takes at a rate in bytes per second, given as its least and its most."""
    return Range(total.least / fast, total.most / slow)


def _line(context: Context, line: int) -> tuple[float, float]:
    """The least and the most bytes per second that reach the destination."""
    slow, fast = (line, line) if line else _UNKNOWN_LINE
    limit = context.environment.bandwidth_limit
    return (min(slow, limit), min(fast, limit)) if limit else (slow, fast)


def _assumed(plans: Sequence[DiskPlan], held: Mapping[str, Held] | None, line: int) -> list[str]:
    """What the estimates rest on, for people."""
    assumed = ["What has changed is known only once the snapshots are taken: at most all of it."]
    if held is None:
        assumed.append(
            "This is the plan of a first run. For that of a later run, name the destination with --to."
        )
    elif not held:
        assumed.append("There is no replica at the destination yet, so everything that is not zero is moved.")
    if not line:
        assumed.append(
            "The line to the destination is assumed to carry 100 Mbit/s to 1 Gbit/s; --line says what it carries."
        )
    if any(each.mechanism == SNAPSHOTS for each in plans):
        assumed.append(f"One snapshot gives at most {amount(_SNAPSHOT_RATE)} a second.")
    return assumed
