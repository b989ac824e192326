"""Asks Azure what no document says: for somebody with a subscription and a day.

    python docs/ask_azure.py CONNECTION ENVIRONMENT --vm NAME [--yes] [--json FILE] [--pause SECONDS] [--only NAME ...]

CONNECTION and ENVIRONMENT are the JSON files that the command line takes. NAME is a running VM in the resource group of
ENVIRONMENT, one that writes to its OS disk now and then. It is only snapshotted and copied. Without --yes the script
tells what it would make and what that costs, and makes nothing.

With --yes it makes snapshots, disks and a restore point collection, all with the tag `coriolis-ask`, asks its
questions, prints a table, and deletes what it made, whatever happens. The table has no names, no ids and no URLs: send
it to us. If the script is killed, delete what has the tag:

    az resource list --tag coriolis-ask --query "[].id" -o tsv

The rights it needs: to read the VM; to read, write, delete and export (beginGetAccess, endGetAccess) snapshots and
disks; to read, write and delete restore point collections and their points; and, for the runs, the role that
`coriolis-azure role` prints. `Contributor` of the resource group has them. `--only` leaves out the others.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import requests
from azure.core.exceptions import HttpResponseError
from azure.mgmt.compute import ComputeManagementClient

from coriolis_azure.azure.client import Azure
from coriolis_azure.azure.names import RUN_TAG
from coriolis_azure.azure.sas import Sas, masked
from coriolis_azure.errors import CoriolisAzureError
from coriolis_azure.events import Event, Step
from coriolis_azure.plugin.provider import AzureExportProvider
from coriolis_azure.settings import Connection
from coriolis_azure.source import Source
from coriolis_azure.timeline import RunReport

TAG = "coriolis-ask"
HOUR = 3600
MIB = 1 << 20
VERSION = "2021-04-10"
# x-ms-versions to try, the oldest first.
VERSIONS = (
    "2019-07-07",
    "2020-10-02",
    VERSION,
    "2023-11-03",
    "2024-11-04",
    "2025-07-05",
    "2026-10-06",
    "2027-02-06",
)
COSTS = """\
It would make, in the resource group {group} in {location}, each with the tag {tag}:
  * up to 20 snapshots: of the OS disk of {vm}, and of empty disks
  * five empty disks for some minutes: 4 GiB (three), 4095 GiB, and 4 GiB of type PremiumV2_LRS; all others Standard_LRS
  * a restore point collection with two restore points of {vm}
  * what two runs of coriolis-azure make: snapshots and copies of all disks of {vm}, and a worker VM with its network
  * a second worker VM with its network, which is stopped and started once
It reads about a minute through each URL, some GiB in all. The runs copy all disks of {vm} to a temporary folder of this
host (TMPDIR), which needs space for what is not zero; `coriolis-azure plan` says what they would move and cost.
Estimate from list prices, without the runs: less than 1 USD; reading from outside Azure costs
about 0.09 USD a GiB more.
Nothing was made. Add --yes to do it."""


class Refused(Exception):
    """Azure's answer to a question is an error; the message is its status and code."""


@dataclass(frozen=True)
class Answer:
    """What Azure answered."""

    question: str
    answer: str
    seconds: float


@dataclass(frozen=True)
class Listing:
    """A list of pages, or of changes: how many ranges, what they have in common, and how long it took."""

    written: int
    cleared: int
    grain: int
    last: int
    body: bytes

    def __str__(self) -> str:
        return f"{self.written} written, {self.cleared} cleared, all multiples of {self.grain}, up to {self.last}"


class Trial:
    """What the questions need: resources that are deleted at the end, and requests to the hosts of snapshots."""

    def __init__(self, azure: Azure, compute: ComputeManagementClient, task: argparse.Namespace) -> None:
        self._compute, self._azure = compute, azure
        self.connection: dict[str, Any] = json.loads(task.connection.read_text())
        self.environment: dict[str, Any] = json.loads(task.environment.read_text())
        self.group, self.location = self.environment["resource_group"], self.environment["location"]
        self._made: list[tuple[str, str]] = []  # kind, name
        self._name = f"{TAG}-{secrets.token_hex(3)}"
        self._lock = threading.Lock()
        self._http = requests.Session()
        self._trusted = self.connection.get("ca_bundle") or True
        self.pause = task.pause
        self.vm = azure.get(
            f"/subscriptions/{azure.subscription}/resourceGroups/{self.group}/providers/Microsoft.Compute/"
            f"virtualMachines/{task.vm}"
        )
        self.os_disk = str(self.vm["properties"]["storageProfile"]["osDisk"]["managedDisk"]["id"])

    # What is made

    def disk(self, gib: int = 4, sku: str = "Standard_LRS", **top: Any) -> str:
        """An empty disk; its id."""
        body = {
            "sku": {"name": sku},
            "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": gib},
        }
        return self._put("disks", {**body, **top})

    def snapshot(self, disk: str, *, incremental: bool = True) -> str:
        """A snapshot of a disk; its id."""
        creation = {"createOption": "Copy", "sourceResourceId": disk}
        return self._put("snapshots", {"properties": {"creationData": creation, "incremental": incremental}})

    def _put(self, kind: str, body: dict[str, Any]) -> str:
        with self._lock:
            name = f"{self._name}-{len(self._made)}"
            self._made.append((kind, name))
        operations = getattr(self._compute, kind)
        document = {"location": self.location, "tags": {TAG: self._name}, **body}
        with refusals():
            return str(
                operations.begin_create_or_update(self.group, name, document, polling_interval=1).result().id
            )

    def change(self, kind: str, id: str, body: dict[str, Any]) -> None:
        """Change a resource."""
        with refusals():
            getattr(self._compute, kind).begin_update(self.group, id.rpartition("/")[2], body).result()

    def collection(self) -> str:
        """A restore point collection of the VM; its name."""
        with self._lock:
            name = f"{self._name}-{len(self._made)}"
            self._made.append(("restore_point_collections", name))
        body = {
            "location": self.location,
            "tags": {TAG: self._name},
            "properties": {"source": {"id": self.vm["id"]}},
        }
        with refusals():
            self._compute.restore_point_collections.create_or_update(self.group, name, body)  # type: ignore[call-overload]
        return name

    def point(self, collection: str, name: str) -> list[str]:
        """A restore point; the names of its disks, the OS disk's first."""
        with refusals():
            body: Any = {"properties": {"consistencyMode": "CrashConsistent"}}
            points = self._compute.restore_points
            points.begin_create(self.group, collection, name, body, polling_interval=1).result()
            disks = self._compute.disk_restore_point.list_by_restore_point(self.group, collection, name)
            return [str(disk.name) for disk in disks]

    @contextmanager
    def point_grant(self, collection: str, point: str, disk: str) -> Iterator[Sas]:
        """Access to a disk of a restore point."""
        operations = self._compute.disk_restore_point
        with refusals():
            body: Any = {"access": "Read", "durationInSeconds": HOUR}
            place = (self.group, collection, point, disk)
            url = operations.begin_grant_access(*place, body, polling_interval=1).result().access_sas
        try:
            yield Sas(str(url))
        finally:
            operations.begin_revoke_access(*place).result()

    @contextmanager
    def grant(self, snapshot: str) -> Iterator[Sas]:
        """Access to a snapshot, for the block."""
        with refusals():
            sas = self._azure.grant_read(snapshot, HOUR)
        try:
            yield sas
        finally:
            self.revoke(snapshot)

    def revoke(self, snapshot: str) -> None:
        """End the access to a snapshot."""
        with refusals():
            self._azure.revoke_access(snapshot)

    def tags_of_the_worker(self) -> str:
        """Whether the OS disk of a running worker has the tags of its VM; without their values."""
        for machine in self._compute.virtual_machines.list(self.group):
            if (
                RUN_TAG in (machine.tags or {})
                and machine.storage_profile
                and machine.storage_profile.os_disk
            ):
                disk = self._compute.disks.get(self.group, str(machine.storage_profile.os_disk.name))
                of_disk, of_machine = set(disk.tags or {}), set(machine.tags or {})
                return f"has {len(of_disk & of_machine)} of the {len(of_machine)} tags of its VM"
        return "no worker was found"

    def delete(self, id: str) -> None:
        """Delete a disk or snapshot."""
        with refusals():
            self._azure.delete(id)

    def clean(self) -> list[str]:
        """Delete all that was made, the latest first; return the names of what stays."""
        left = []
        for kind, name in reversed(self._made):
            operations = getattr(self._compute, kind)
            try:
                if kind == "snapshots":
                    operations.begin_revoke_access(self.group, name).result()
                operations.begin_delete(self.group, name).result()
            except HttpResponseError as error:
                if error.status_code != 404:
                    left.append(f"{kind} {name}: {error.status_code}")
        return left

    # Requests to the hosts of snapshots

    def ask(self, url: str, **headers: str) -> requests.Response:
        """The answer to a GET. Raises Refused."""
        answer = self._http.get(
            url, headers={"x-ms-version": VERSION, **headers}, timeout=300, verify=self._trusted
        )
        if answer.status_code >= 300:
            raise Refused(f"{answer.status_code} {answer.headers.get('x-ms-error-code', '')}".strip())
        return answer

    def listed(self, sas: Sas, older: Sas | None = None, version: str = VERSION) -> Listing:
        """The allocated pages, or what has changed since `older`: the first 10,000 ranges."""
        previous = {"x-ms-previous-snapshot-url": older.url} if older else {}
        body = self.ask(f"{sas.url}&comp=pagelist", **{"x-ms-version": version}, **previous).content
        root = ElementTree.fromstring(body.decode("utf-8-sig"))  # noqa: S314  (Azure's own answer)
        grain = last = 0
        for row in root:
            if row.tag in {"PageRange", "ClearRange"}:
                start, end = int(row.findtext("Start") or 0), int(row.findtext("End") or 0) + 1
                grain, last = gcd(grain, gcd(start, end)), max(last, end)
        return Listing(len(root.findall("PageRange")), len(root.findall("ClearRange")), grain, last, body)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn the errors of the block into Refused."""
    try:
        yield
    except HttpResponseError as error:
        raise Refused(f"{error.status_code} {getattr(error.error, 'code', '')}".strip()) from error
    except CoriolisAzureError as error:
        code = f"{getattr(error, 'status', '')} {getattr(error, 'code', '')}".strip()
        raise Refused(code or type(error).__name__) from error


# The questions. Each yields what it asks and a function whose result, or error, is the answer.

Question = tuple[str, Callable[[], object]]


def grants(trial: Trial) -> Iterator[Question]:
    """What a grant does, and what stands in the way of a deletion."""
    disk = trial.disk()
    snapshot = trial.snapshot(disk)
    with trial.grant(snapshot) as first:
        with trial.grant(snapshot) as second:
            yield "a second grant gives the same URL", lambda: first.url == second.url
        yield (
            "a read after the second grant was ended",
            lambda: len(trial.ask(first.url, **_range(0, 4096)).content),
        )
    with trial.grant(snapshot) as sas:
        yield "deleting a snapshot that is granted", lambda: trial.delete(snapshot)
        yield "a read after that", lambda: len(trial.ask(sas.url, **_range(0, 4096)).content)
    with ExitStack() as granted:
        for _ in range(5):
            granted.enter_context(trial.grant(trial.snapshot(disk)))
        sixth = trial.snapshot(disk)
        yield "a sixth grant in a family", lambda: granted.enter_context(trial.grant(sixth)) and "granted"


def changes(trial: Trial) -> Iterator[Question]:
    """What a list of changes says, and when there is none."""
    older = trial.snapshot(trial.os_disk)
    time.sleep(trial.pause)
    newer, full = trial.snapshot(trial.os_disk), trial.snapshot(trial.os_disk, incremental=False)
    other = trial.snapshot(trial.disk())
    with trial.grant(older) as old, trial.grant(newer) as new:
        yield "the allocated pages", lambda: trial.listed(new)
        yield f"what changed in {trial.pause:.0f} s", lambda: trial.listed(new, old)
        yield "what changed from a snapshot to itself", lambda: trial.listed(new, new)
        yield "the older one asked about the newer", lambda: trial.listed(old, new)
        for version in VERSIONS:
            yield f"the list in version {version}", partial(trial.listed, new, old, version)
        with trial.grant(full) as sas:
            yield "changes since a full snapshot", lambda: trial.listed(new, sas)
        with trial.grant(other) as sas:
            yield "changes since a snapshot of another disk", lambda: trial.listed(new, sas)
    with trial.grant(older) as old, trial.grant(newer) as new:
        trial.revoke(older)
        yield "deleting an older snapshot while a newer one is granted", lambda: trial.delete(older)
        yield "a read right after that", lambda: len(trial.ask(new.url, **_range(0, MIB)).content)
        yield "changes since the deleted snapshot", lambda: trial.listed(new, old)


def sizes(trial: Trial) -> Iterator[Question]:
    """Lists across a change of the disk."""
    for what, gib, sku, body in (
        ("grew beyond 4 TiB", 4095, "Standard_LRS", {"properties": {"diskSizeGB": 4097}}),
        ("became StandardSSD_LRS", 4, "Standard_LRS", {"sku": {"name": "StandardSSD_LRS"}}),
    ):
        disk = trial.disk(gib, sku)
        older = trial.snapshot(disk)

        def compared(disk: str = disk, older: str = older, body: dict[str, Any] = body) -> Listing:
            trial.change("disks", disk, body)
            newer = trial.snapshot(disk)
            with trial.grant(older) as old, trial.grant(newer) as new:
                return trial.listed(new, old)

        yield f"changes of a disk that {what}", compared


def modern(trial: Trial) -> Iterator[Question]:
    """A disk whose snapshots are copied in the background."""

    def granted() -> str:
        snapshot = trial.snapshot(trial.disk(4, "PremiumV2_LRS", zones=["1"]))
        with trial.grant(snapshot) as sas:
            return str(trial.listed(sas))

    yield "the pages of a snapshot of a Premium SSD v2 disk, at once", granted


def points(trial: Trial) -> Iterator[Question]:
    """Restore points, and the differences between them."""
    collection = trial.collection()
    first = trial.point(collection, "first")[0]
    time.sleep(trial.pause)
    second = trial.point(collection, "second")[0]
    with (
        trial.point_grant(collection, "first", first) as old,
        trial.point_grant(collection, "second", second) as new,
    ):
        yield "the pages of the OS disk of a restore point", lambda: trial.listed(new)
        yield "what changed between two restore points", lambda: trial.listed(new, old)


def runs(trial: Trial) -> Iterator[Question]:
    """A first run and a later one with a worker: how long the steps take, and what tags the worker's OS disk has."""
    reports: list[RunReport] = []
    tags: list[str] = []

    def told(event: Event) -> None:
        if isinstance(event, Step) and event.name == "copy":
            tags.append(trial.tags_of_the_worker())

    with tempfile.TemporaryDirectory(prefix=TAG) as folder:
        environment = {**trial.environment, "replica_export_mechanism": "worker", "keep_baseline": False}
        with Source(trial.connection, environment, report=told) as source:
            source.on_report = reports.append

            def replicated() -> str:
                with refusals():
                    source.replicate(str(trial.vm["name"]), folder)
                report = reports[-1]
                steps = ", ".join(f"{step.name} {step.end - step.begin:.0f} s" for step in report.steps)
                left = len(report.left_behind)
                return f"{report.sent_bytes / MIB:.0f} MiB in {report.seconds:.0f} s: {steps}; {left} left behind"

            yield "a first run", replicated
            yield "a later run", replicated
            yield "the OS disk of its worker", lambda: tags[-1]


def pools(trial: Trial) -> Iterator[Question]:
    """A worker of a pool: how long it takes to boot, to stop, to start and to be deleted."""
    provider, pool = AzureExportProvider(), secrets.token_hex(8)
    place = (None, trial.connection, trial.environment)
    with refusals():
        shared = provider.set_up_pool_shared_resources(*place, pool)
    workers: list[dict[str, Any]] = []

    def each(action: Callable[[Any, dict[str, Any], dict[str, Any]], None]) -> None:
        with refusals():
            action(None, trial.connection, workers[-1]["minion_provider_properties"])

    def booted() -> None:
        with refusals():
            workers.append(provider.create_minion(*place, pool, "linux", shared, secrets.token_hex(8)))

    try:
        yield "a worker of a pool boots", booted
        if workers:
            yield "it stops", lambda: each(provider.shutdown_minion)
            yield "it starts", lambda: each(provider.start_minion)
            yield "it is deleted", lambda: each(provider.delete_minion)
    finally:
        with refusals():
            provider.tear_down_pool_shared_resources(*place, shared)


def rates(trial: Trial) -> Iterator[Question]:
    """How much one URL serves, and two."""
    snapshots = [trial.snapshot(trial.os_disk), trial.snapshot(trial.os_disk)]
    size = int(trial._azure.get(snapshots[0])["properties"]["diskSizeBytes"])
    with trial.grant(snapshots[0]) as one, trial.grant(snapshots[1]) as two:
        for length, unit in ((MIB, "reads of 1 MiB"), (4096, "reads of 4 KiB")):
            for threads in (1, 8, 32):
                yield (
                    f"{unit}, {threads} at a time",
                    partial(_rate, trial, [one], threads, length, size),
                )
            yield (
                f"{unit}, 16 at a time of each of two URLs",
                partial(_rate, trial, [one, two], 32, length, size),
            )


def _rate(trial: Trial, urls: Sequence[Sas], threads: int, length: int, size: int) -> str:
    until, lock, seen = time.monotonic() + min(15.0, trial.pause), threading.Lock(), {"reads": 0, "busy": 0}

    def read(number: int) -> None:
        at = number * length
        while time.monotonic() < until:
            try:
                trial.ask(
                    urls[number % len(urls)].url, **_range(at % max(size - length, 1) // 512 * 512, length)
                )
                with lock:
                    seen["reads"] += 1
            except Refused:
                with lock:
                    seen["busy"] += 1
            at += threads * length

    begun = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    seconds = time.monotonic() - begun
    each = seen["reads"] / seconds
    return f"{each:.0f} a second, {each * length / MIB:.0f} MiB a second; {seen['busy']} refused"


def _range(start: int, length: int) -> dict[str, str]:
    return {"x-ms-range": f"bytes={start}-{start + length - 1}"}


CHAPTERS: dict[str, Callable[[Trial], Iterator[Question]]] = {
    "grants": grants,
    "changes": changes,
    "sizes": sizes,
    "modern": modern,
    "points": points,
    "rates": rates,
    "runs": runs,
    "pools": pools,
}


@dataclass
class Table:
    """The answers so far."""

    rows: list[Answer] = field(default_factory=list)

    def ask(self, question: str, answer: Callable[[], object]) -> None:
        """Ask one question, and print its row."""
        begun = time.monotonic()
        try:
            found = answer()
            text = "done" if found is None else str(found)
        except Refused as error:
            text = str(error)
        except requests.RequestException as error:
            text = type(error).__name__  # its message has the URL
        row = Answer(question, text, round(time.monotonic() - begun, 1))
        self.rows.append(row)
        print(f"{row.question:58} {row.seconds:6.1f} s  {row.answer}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask; return 0 if all that was made is gone again, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("connection", type=Path)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--vm", required=True, help="a running VM that writes to its OS disk")
    parser.add_argument("--yes", action="store_true", help="make what is needed")
    parser.add_argument("--json", type=Path, help="write the answers to this file")
    parser.add_argument("--pause", type=float, default=60.0, help="seconds between two snapshots of the VM")
    parser.add_argument(
        "--only", action="append", choices=CHAPTERS, help="these questions only; may be repeated"
    )
    task = parser.parse_args(arguments)
    connection = Connection.from_json(json.loads(task.connection.read_text()))
    azure = Azure(connection)
    profile: Any = azure.transport.profile
    options: Any = {
        "base_url": profile.manager,
        "credential_scopes": [f"{profile.audience.rstrip('/')}/.default"],
        "transport": azure.transport,
    }
    compute = ComputeManagementClient(azure.credential, azure.subscription, **options)
    trial = Trial(azure, compute, task)
    if not task.yes:
        print(COSTS.format(group=trial.group, location=trial.location, tag=TAG, vm=task.vm))
        return 0
    table = Table()
    try:
        for chapter in task.only or CHAPTERS:
            try:
                for question, answer in CHAPTERS[chapter](trial):
                    table.ask(question, answer)
            except (Refused, CoriolisAzureError) as error:
                table.ask(f"{chapter} could not go on", partial(masked, str(error)))
    finally:
        left = trial.clean()
        print("All that was made is deleted." if not left else "STILL THERE:\n  " + "\n  ".join(left))
        if task.json:
            task.json.write_text(json.dumps([vars(row) for row in table.rows], indent=2) + "\n")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
