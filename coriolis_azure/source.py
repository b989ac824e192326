"""The Python API: the use cases of one VM in one Azure subscription, as one class.

    with Source(connection_info, source_environment) as source:
        print(source.list_vms())
        report = source.replicate("web-1", "/srv/replicas/web-1")

`replicate` does everything. Its steps are public too, for callers like the orchestrator that spread them over
processes: `prepare`, `deallocate`, `copy`, `finish`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import unquote

from . import handoff, restoring, results, transfer
from .azure import names, permissions
from .azure.client import Azure
from .azure.context import Context
from .azure.sign_in import Credential
from .azure.transport import Transport
from .checks import plan as reckoning
from .checks import preflight
from .checks.finding import Checked
from .checks.plan import Held, Plan
from .checks.prices import Prices
from .clock import Clock, Scope, scope
from .errors import AzureError, Cancelled, CoriolisAzureError, InvalidInput, NoReplica
from .events import Copied, Event, Notice, Report, Step, located, silent, unfailing
from .machine import inspection, listing
from .mechanisms.target import Shared as Shared
from .mechanisms.target import Target
from .model import Disk, Json, Machine, Run, Worker
from .replica import contents, destinations, history, places, sets, status, verification
from .replica.container import BlobFolder
from .replica.destinations import Folder
from .replica.status import Status
from .restoring import Restored
from .results import DiskReport, Replicated
from .run import attached_disks, cleanup, lifetime, stalled
from .run.baselines import Baselines, Listed, Owned, Owner, expired, listed, owned
from .run.cleanup import DEAD_AFTER
from .run.journal import Journal, default_folder
from .run.records import Records, VolumeRecord
from .run.resources import Resources, delete
from .settings import SNAPSHOTS, Connection, Environment
from .timeline import Recorder, RunReport

LOG = logging.getLogger(__name__)


def _ignore(report: RunReport) -> None:
    del report


if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

    # Imported in functions: the libraries for SSH and blobs take long to import, and `list` needs neither.
    from .mechanisms.copying import Boot


class Options(TypedDict, total=False):
    """What `Source.replicate` and `Fleet.replicate` can be asked for; see there."""

    shutdown: bool
    full: bool
    adopt: bool
    keep: int | None


class Source:
    """One Azure subscription and one source environment. A context manager.

    Example: replicate a VM, once or repeatedly, and handle what may go wrong.

        from coriolis_azure import Source, errors

        with Source(connection_info, source_environment, report=print) as source:
            try:
                report = source.replicate("web-1", "replicas/web-1", keep=7)
            except errors.Throttled as error:
                print(f"Azure is busy; try again in {error.retry_after:.0f} seconds")
            except errors.CoriolisAzureError as error:
                print(error.message, "What to do:", error.remedy)
            else:
                print(report.point, {disk.name: disk.sent_bytes for disk in report.disks})

    `connection_info` and `source_environment` have the content of `connection.json` and `environment.json`. `report`
    receives events, each with the VM, the disk and the time; an error that it raises is logged and stops nothing.
    `credential` replaces the sign-in of the connection settings; `transport` and `clock` replace HTTPS and time.
    Raises InvalidInput if a setting is wrong.

    `journals` is the folder with the journals of this host's runs, by which the next run notices at once that a run has
    died. None, for callers that do not stay until a run is finished, writes no journal.

    `on_report` is called at the end of each `replicate` with what that run did, even if it failed. What it raises is
    logged.

    All calls may raise the AzureErrors of `errors`. Any thread, or a signal handler, may `cancel` calls in progress.
    """

    def __init__(
        self,
        connection_info: dict[str, Any],
        source_environment: dict[str, Any],
        *,
        report: Report = silent,
        clock: Clock | None = None,
        transport: Transport | None = None,
        credential: Credential | None = None,
    ) -> None:
        connection = Connection.from_json(connection_info)
        environment = Environment.from_json(source_environment, connection.default_resource_group)
        clock = clock or Clock()
        self._recorders: set[Recorder] = set()  # copied and changed as `_works` is
        report = located(self._recorded(unfailing(report)), clock)
        self.azure = Azure(connection, transport=transport, report=report, clock=clock, credential=credential)
        self.context = Context.of(self.azure, environment, clock, report)
        self.environment, self.storage = environment, self.context.storage
        self.journals: Path | None = default_folder()
        self.on_report: Callable[[RunReport], None] = _ignore
        # Without a lock, so that a signal handler may `cancel`: each operation on a set is atomic, copying it too.
        self._works: set[Scope] = set()
        if connection.allow_untrusted:
            report(
                Notice(
                    "allow_untrusted: certificates are not verified, so anybody may receive the credentials"
                )
            )

    def _recorded(self, sink: Report) -> Report:
        """A sink that passes events to the recorders of the runs in progress, too."""

        def report(event: Event) -> None:
            for recorder in list(self._recorders):
                recorder(event)
            sink(event)

        return report

    @contextmanager
    def _recording(self, vm: str) -> Iterator[Recorder]:
        """Record the run of the block, and pass its report on."""
        recorder = Recorder(vm, self.context.clock)
        self._recorders.add(recorder)
        try:
            yield recorder
        except BaseException as error:
            recorder.failed(error)
            raise
        finally:
            self._recorders.discard(recorder)
            try:
                self.on_report(recorder.report())
            except Exception:
                LOG.exception("the report of a run was not taken")

    def close(self) -> None:
        """Close the connections to Azure."""
        self.azure.close()

    def cancel(self) -> None:
        """End all calls in progress, from any thread; later calls work as before.

        `replicate`, `restore` and `verify` raise Cancelled once everything that they created is deleted; requests and
        operations in progress in Azure are waited for. The next run uses what had arrived at the destination.
        """
        for work in list(self._works):
            work.cancel()

    @contextmanager
    def _work(self, vm: str = "") -> Iterator[None]:
        """Make the block end when `cancel` is called; its events are about `vm`."""
        work = Scope(scope(), vm=vm)
        self._works.add(work)
        try:
            with work.entered():
                yield
        except CoriolisAzureError as error:
            if not work.cancelled:
                raise
            raise Cancelled("the work was cancelled", left_behind=error.left_behind or None) from error
        finally:
            self._works.discard(work)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def list_vms(self) -> list[Json]:
        """The VMs of the resource group in the location, sorted by name.

        Each has `name`, `id`, `size`, `os_type`, `disks` (their number) and `zones`. Raises NotFound if the resource
        group does not exist.
        """
        group, location = self.environment.resource_group, self.environment.location
        self.azure.group(group)
        here = listing.machines(self.azure, {"resource_group": group, "location": location})
        return [inspection.summary(vm) for vm in here]

    def inspect(self, vm: str) -> Machine:
        """The VM `vm`, a name or an ARM id, as Azure describes it now. Raises InvalidInput, NotFound or Unsupported."""
        self.context.report(Step("inspect", vm.rpartition("/")[2]))
        group, location = self.environment.resource_group, self.environment.location
        return inspection.read(self.azure, group, location, vm, self.storage, self.environment.exclude_disks)

    def deallocate(self, machine: Machine) -> None:
        """Deallocate the VM and wait until that is done. No other method does so unless it is asked to."""
        self.context.report(Step("shut down", machine.name))
        self.azure.deallocate(machine.id)

    def chosen(self, machine: Machine) -> tuple[Disk, ...]:
        """The disks that `exclude_disks` does not exclude. Raises InvalidInput if it names no disk of the VM."""
        return inspection.chosen(machine, self.environment.exclude_disks)

    def replicate(
        self,
        vm: str,
        to: str | Path | Folder,
        *,
        shutdown: bool = False,
        full: bool = False,
        adopt: bool = False,
        keep: int | None = None,
    ) -> Replicated:
        """Replicate `vm`, a name or an ARM id, to the destination `to`: a path, a URL or an object of your own.

        If `to` holds an earlier replica of the VM, only what changed is sent. `shutdown`: deallocate the VM once
        everything is ready to copy. `full`: send everything, whatever the destination holds. `adopt`: take over images
        that no run has made. `keep`: the number of earlier points in time to keep there from now on, for `restore`;
        None for as many as before.

        Everything created in Azure is deleted, also after an error; what could not be deleted is in `left_behind`, of
        the result or of the error. Raises InvalidInput or Unsupported before anything is created; later AzureError
        (DisksChanged if the VM's disks changed), WorkerError, TransferError, DeadlinePassed or Cancelled. After an
        error, the replica is what it was before.
        """
        return self.replicate_sharing(None, vm, to, shutdown=shutdown, full=full, adopt=adopt, keep=keep)

    def replicate_sharing(
        self, shared: Shared | None, vm: str, to: str | Path | Folder, **options: Unpack[Options]
    ) -> Replicated:
        """As `replicate`, as one of several runs that share something; None shares nothing. For `Fleet`."""
        from .mechanisms import copying

        shutdown, full = options.get("shutdown", False), options.get("full", False)
        adopt, keep = options.get("adopt", False), options.get("keep")
        now, short = self.context.clock.monotonic, vm.rpartition("/")[2]
        began, started, down = now(), names.stamp(self.context.clock.now()), None
        with self._recording(short) as recorder, self._work(short):
            machine = self.inspect(vm)
            disks = self.chosen(machine)
            self._tell_caveats(machine)
            if shared is None:
                self.sweep(DEAD_AFTER)  # first, because leftovers of dead runs count towards quotas
            shares_worker = shared is not None and shared.launch is not None
            preflight.refuse(self.context, machine, disks, shares_worker=shares_worker)
            with self._opened(to, machine.name, adopt=adopt) as folder:
                folder.reserve([disk.name for disk in disks])
                if isinstance(folder, destinations.Measured):
                    folder.refuse_small({disk.name: disk.size_bytes for disk in disks})
                folder.claim(machine.id)
                folder.tell_removed([disk.name for disk in machine.disks])
                with history.kept(folder, recorder, self.context.report):
                    with (
                        self._told_if_off(machine) as shut_down,
                        self._run(machine, shared) as (resources, left_behind),
                    ):
                        launch = shared.launch if shared is not None else None
                        boot: Boot = partial(
                            copying.launch_worker, self.context, resources, machine, disks, folder, launch
                        )
                        if shutdown:  # only once everything else is there, for a short outage
                            boot = partial(_given, boot())
                            down = now()
                            shut_down()
                        baselines = Baselines(self.context, resources)
                        target = Target(
                            self.context,
                            folder,
                            baselines,
                            full=full,
                            shared=shared,
                            deletes_worker=launch is None,
                        )
                        copying_began = now()
                        point, outcomes = self._copied(target, resources, boot, machine, disks, keep)
                        complete = now()
                    for disk, outcome in zip(disks, outcomes, strict=True):
                        recorder.disk_ended(disk.name, outcome.ended)
                    done = Replicated(
                        vm=machine.name,
                        mechanism=self.environment.replica_export_mechanism,
                        disks=results.of_disks(disks, outcomes, target.read),
                        started=started,
                        point=point,
                        seconds=round(now() - began, 3),
                        copy_seconds=round(complete - copying_began - target.idle_seconds, 3),
                        outage_seconds=round(complete - down, 3) if down is not None else None,
                        left_behind=tuple(left_behind),
                    )
                    maps = {disk.name: outcome.map for disk, outcome in zip(disks, outcomes, strict=True)}
                    recorder.succeeded(done.to_json(), maps)
        return done

    def _opened(self, to: str | Path | Folder, vm: str, *, adopt: bool) -> Folder:
        if isinstance(to, str | Path):
            return places.open(str(to), self.context.report, self.storage, adopt=adopt, vm=vm)
        return to

    def _copied(
        self,
        target: Target,
        resources: Resources,
        boot: Boot,
        machine: Machine,
        disks: Sequence[Disk],
        keep: int | None,
    ) -> tuple[str, list[transfer.Outcome]]:
        """Copy the disks and, at a Place, publish them together; return the point in time and the outcomes."""
        for disk in disks:  # so that progress bars know the total from the start
            self.context.report(Copied(disk.name, 0, disk.size_bytes, 0))
        begun = self.begun(resources.run, machine, [disk.name for disk in disks])
        place = target.folder if isinstance(target.folder, destinations.Place) else None
        record = None
        if place is not None:
            keeps = self.environment.keep_baseline
            record = sets.begin(place, machine.id, begun, keep, keep_baseline=keeps)
            target.baselines.own(_owners(record, disks))

        def publish(outcomes: Sequence[transfer.Outcome]) -> None:
            if place is not None and record is not None:
                roots = [outcome.manifest.root() for outcome in outcomes]
                sets.complete(place, record, dict(zip(begun.disks, roots, strict=True)))
                handoff.write(place, machine, begun.time, begun.disks, self.context.report)

        return begun.time, _copied_and(publish, target, resources, boot, machine, disks)

    def begun(self, run: Run, machine: Machine, disks: Sequence[str]) -> sets.Begun:
        """What a run records before it copies these disks."""
        left_out = tuple(disk.name for disk in machine.disks if disk.name not in disks)
        return sets.Begun(run.id, names.stamp(self.context.clock.now()), tuple(disks), left_out)

    def prepare(self, vm: str) -> tuple[Run, Worker | None]:
        """Begin a run for `vm`, for callers that `copy` and `finish` in other processes.

        If disks are going to be read by a worker, it is booted and left running. What dead runs have left, and
        baselines whose end date has passed, are deleted first. If this fails, nothing of the new run is left behind.
        """
        from .mechanisms import copying

        machine = self.inspect(vm)
        disks = self.chosen(machine)
        self.sweep(DEAD_AFTER)
        self.retire(self.baselines())
        preflight.refuse(self.context, machine, disks)
        watch = stalled.Watch(self.context, machine.name)
        run = self.new_run(machine)
        resources = self.resources(run, Journal(run))
        with resources.undone_on_error(), resources.deploying():
            worker = copying.launch_worker(self.context, resources, machine, disks)
            self.delete_leftovers(run, watch.stalled())
        return run, worker

    def copy(
        self,
        run: Run,
        worker: Worker | None,
        machine: Machine,
        disks: Sequence[Disk],
        folder: destinations.Folder,
        publish: Callable[[Sequence[transfer.Outcome]], None] = lambda _: None,
    ) -> tuple[DiskReport, ...]:
        """Snapshot and copy disks of `machine` for a run of `prepare`, with its worker or that of a pool, if any.

        However this ends, the snapshots and clones are deleted, except for those that become baselines, and the worker
        stays. `publish` is called once everything is copied, before the older baselines are deleted. Raises
        DisksChanged if the VM has other disks by now.
        """
        folder.reserve([disk.name for disk in disks])
        if self.environment.replica_export_mechanism == SNAPSHOTS:
            worker = None  # a pool has one, whether it is needed or not
        if worker and attached_disks.emptied(self.azure, worker.vm, self.context.report, self.context.clock):
            self.azure.start(worker.vm)
        journal = Journal(run)
        resources = self.resources(run, journal)
        owners = folder.owners() if isinstance(folder, Owned) else {}
        target = Target(self.context, folder, Baselines(self.context, resources, owners))
        with resources.undone_on_error(), lifetime.alive(resources):
            outcomes = _copied_and(publish, target, resources, partial(_given, worker), machine, disks)
        for id in resources.delete(journal.ids):
            self.context.report(
                Notice(f"could not delete {id}; it is deleted with the run's other resources")
            )
        return results.of_disks(disks, outcomes, target.read)

    def delete_leftovers(self, run: Run, dead: Iterable[str], vhds: Sequence[str] = ()) -> None:
        """Delete what the `dead` runs, given by their ids, have left of their work for the VM of `run`.

        `vhds`: see `finish`.
        """
        for id in dead:
            left_behind = self.finish(replace(run, id=id), vhds=vhds) if id != run.id else []
            if left_behind:
                self.context.report(
                    Notice(f"could not delete what the dead run {id} has left: {', '.join(left_behind)}")
                )

    def in_container(self, machine: Machine) -> BlobFolder:
        """Open the place of the machine's replica in the container of the settings, created if it is missing.

        Raises InvalidInput if the settings name no container, or if the place is in use or another machine's.
        """
        folder = self._blob_folder(machine.name)
        try:
            folder.claim(machine.id)
            folder.tell_removed([disk.name for disk in machine.disks])
        except BaseException:
            folder.close()
            raise
        return folder

    def remove(self, vhds: Iterable[str]) -> None:
        """Delete VHDs of replicas opened by `in_container`, given by their URLs; one that is gone is no error."""
        container = self.storage.interim()
        by_place: dict[str, list[str]] = {}
        for url in vhds:
            if container is None or not url.startswith(f"{container.url}/"):
                raise InvalidInput(
                    f"{url} is not in the container of the settings",
                    remedy="Name its storage account and container in the source environment.",
                )
            place, _, name = unquote(url.removeprefix(f"{container.url}/")).rpartition("/")
            by_place.setdefault(place, []).append(name.removesuffix(".vhd"))
        if container is None or not container.exists():
            return
        for place, disks in by_place.items():
            with self._blob_folder(place) as folder:
                folder.remove(disks)

    def _blob_folder(self, prefix: str) -> BlobFolder:
        settings = self.environment
        if not settings.storage_account_name:
            raise InvalidInput(
                "the settings name no container in Blob storage",
                remedy="Set storage_account_name and storage_container_name in the source environment.",
            )
        return BlobFolder(
            self.storage,
            settings.storage_account_name,
            settings.storage_container_name,
            prefix,
            self.context.report,
        )

    def records(self, run: Run | None = None) -> Records:
        """The records of volumes in the resource group; new ones are created for `run`."""
        nobody = Run(
            "", self.azure.subscription, self.environment.resource_group, self.environment.location, "", ""
        )
        return Records(self.azure, run or nobody, self.environment.tags, self.context.clock)

    def forget(
        self, volumes: Iterable[VolumeRecord], older_than: timedelta | None, *, dry_run: bool = False
    ) -> tuple[list[VolumeRecord], list[str]]:
        """Delete the records that no run has used for `older_than`; None deletes none.

        Returns those records, and the ids of the ones that could not be deleted. `dry_run`: delete nothing.
        """
        if older_than is None:
            return [], []
        before = self.azure.now(self.context.clock) - older_than
        old = [volume for volume in volumes if volume.alive is not None and volume.alive <= before]
        left_behind = (
            [] if dry_run else [id for volume in old for id in self.records().delete(volume.record.id)]
        )
        return old, left_behind

    def check(
        self,
        vm: str | None = None,
        *,
        strict: bool = False,
        shutdown: bool = True,
        pool: bool = True,
        volumes: bool = False,
    ) -> Checked:
        """Check everything that can be known before anything is created or shut down; return all findings.

        Without `vm`, only the connection and the environment are checked. `strict`: see `preflight.check`. `shutdown`
        and `pool`: whether runs may shut down the VM, and use workers of an orchestrator's pool. `volumes`: whether
        they may write to volumes of the orchestrator.
        """
        wanted = {
            permissions.SHUTDOWN: shutdown,
            permissions.POOL: pool,
            permissions.VOLUMES: volumes,
        }
        may_use = {feature for feature, may in wanted.items() if may}
        return preflight.check(self.context, vm, strict=strict, may_use=may_use)

    def plan(
        self, vm: str, to: str | Path | None = None, *, prices: Prices | None = None, line: int = 0
    ) -> Plan:
        """What a run of `vm` would make, read and move, how long it may take, and what it may cost.

        Nothing is made. `to`: the destination, whose replica tells what a later run has to move; it need not exist yet.
        `prices`: those to reckon with, instead of the package's. `line`: bytes per second to the destination; 0 if
        unknown. `check` tells whether the run is permitted. Raises what `inspect` raises, InvalidInput if the
        destination holds the replica of another VM, or if no worker can be launched that a disk needs.
        """
        machine = self.inspect(vm)
        disks = self.chosen(machine)
        held = self._held(to, machine, disks) if to is not None else None
        return reckoning.plan(self.context, machine, disks, prices or Prices.read(), held, line)

    def _held(self, to: str | Path, machine: Machine, disks: Sequence[Disk]) -> dict[str, Held]:
        from .mechanisms import copying

        try:
            with places.open(str(to), self.context.report, self.storage, existing=True) as place:
                data = contents.data_bytes(place, machine.id)
                return {
                    disk.name: Held(data[disk.name], copying.is_proved(place, disk))
                    for disk in disks
                    if disk.name in data
                }
        except NoReplica:
            return {}

    def finish(self, run: Run, known: Sequence[str] = (), vhds: Sequence[str] = ()) -> list[str]:
        """Delete everything of `run`; return the ids of what could not be deleted.

        `known`: ids of its resources, in addition to those that Azure lists. `vhds`: the URLs of disks that are VHDs,
        in case their VM no longer exists.
        """
        return cleanup.finish(self.context, run, known, vhds)

    def sweep(
        self, older_than: timedelta, *, dry_run: bool = False
    ) -> tuple[list[cleanup.Leftover], list[str]]:
        """Delete what dead runs have left; return what was found, and the ids of what could not be deleted.

        `older_than`: the age of a run's last sign of life from which it counts as dead. `dry_run`: delete nothing.
        """
        return cleanup.sweep(self.context, older_than, self.journals, dry_run=dry_run)

    def baselines(self) -> list[Listed]:
        """The snapshots that runs have kept for the next ones, by VM and disk."""
        return listed(self.context)

    def retire(
        self, baselines: Iterable[Listed], *, every: bool = False, dry_run: bool = False
    ) -> tuple[list[Listed], list[str]]:
        """Delete those whose end date has passed, or `every` one; gives back those, and the ids that stayed.

        A run whose baseline is gone reads the whole disk once.
        """
        old = list(baselines) if every else expired(self.context, baselines)
        ids = [each.id for each in old]
        clock = self.context.clock
        return old, [] if dry_run else delete(self.azure, ids, clock, self.storage)

    def disown(self, owners: Sequence[Owner]) -> list[str]:
        """Delete the baselines of volumes that are given up; return the ids of what could not be deleted."""
        return delete(self.azure, owned(self.context, owners), self.context.clock, self.storage)

    def untagged(self) -> list[str]:
        """The ids of resources with the names of ours but without our tags, which clean-up leaves alone."""
        return cleanup.untagged(self.azure, self.environment.resource_group)

    def verify(self, at: str | Path) -> list[verification.Verdict]:
        """Read every disk at the destination `at` and compare it with its manifest; return a verdict for each.

        The images are not changed. Raises NoReplica if there is none at `at`.
        """
        with self._work():
            return verification.verify_at(str(at), self.context.report, self.storage, self.context.clock)

    def status(self, at: str | Path) -> Status:
        """The replica at the destination `at`: its VM, disks, point in time, and the earlier points that are kept.

        Raises NoReplica if there is none at `at`.
        """
        with places.open(str(at), self.context.report, self.storage, existing=True) as place:
            return status.status(place)

    def restore(self, at: str | Path, point: str, to: str | Path) -> Restored:
        """Make a new replica at `to` from a point in time of the one at `at`; see `restoring.restore`.

        `point`: the time of a point, as `status` gives it, or "latest".
        """
        report, storage = self.context.report, self.storage
        with self._work(), places.open(str(at), report, storage, existing=True) as place:
            return restoring.restore(
                place, point, lambda: places.open(str(to), report, storage), report, self.context.clock
            )

    def new_run(self, machine: Machine) -> Run:
        """A new run for `machine`; nothing is created."""
        return Run(
            id=names.new_run(),
            subscription=self.azure.subscription,
            group=self.environment.resource_group,
            location=self.environment.location,
            zone=machine.zones[0] if machine.zones else "",
            instance=machine.name,
        )

    def resources(self, run: Run, journal: Journal) -> Resources:
        """What creates and deletes resources for `run`."""
        return Resources(self.azure, run, journal, self.environment.tags, self.context.clock, self.storage)

    @contextmanager
    def _run(self, machine: Machine, shared: Shared | None) -> Iterator[tuple[Resources, list[str]]]:
        """A run with a journal, and the list of what could not be deleted at its end. See `lifetime.temporary`."""
        run = self.new_run(machine)
        if shared is not None:
            shared.runs.append(run.id)
        with Journal(run, self.journals) as journal:
            resources = self.resources(run, journal)
            alone = shared is None
            with (
                Scope(scope()).entered() as work,
                lifetime.temporary(self.context, resources, journal, listed=alone, work=work) as left_behind,
            ):
                yield resources, left_behind

    @contextmanager
    def _told_if_off(self, machine: Machine) -> Iterator[Callable[[], None]]:
        """Yield what deallocates the VM. If the block fails after that, report that the VM stays off."""
        state = ""

        def shut_down() -> None:
            nonlocal state
            state = "may be off"  # if the wait for it is interrupted
            try:
                self.deallocate(machine)
            except AzureError as error:
                state = "" if 400 <= error.status < 500 else state
                raise
            state = "is off"

        try:
            yield shut_down
        except BaseException:
            if state and machine.power_state != "deallocated":
                text = f"{machine.name} {state}, and nothing starts it: replicate again, or start it in Azure"
                self.context.report(Notice(text))
            raise

    def _tell_caveats(self, machine: Machine) -> None:
        for caveat in machine.caveats:
            self.context.report(Notice(caveat))


def _owners(record: sets.Record, disks: Sequence[Disk]) -> dict[str, Owner]:
    """Whose baselines those of a replica's disks are, by disk name; none if no run has kept any."""
    if not record.stream:
        return {}
    return {disk.name: Owner(disk.id, f"{record.stream}-{disk.name}") for disk in disks}


def _given(worker: Worker | None) -> Worker | None:
    return worker


def _copied_and(
    publish: Callable[[Sequence[transfer.Outcome]], None],
    target: Target,
    resources: Resources,
    boot: Boot,
    machine: Machine,
    disks: Sequence[Disk],
) -> list[transfer.Outcome]:
    """Copy the disks and `publish` what arrived; keep their snapshots as baselines, and delete the older ones."""
    from .mechanisms import copying

    outcomes = copying.copy(target, resources, boot, machine, disks)
    target.baselines.keep()  # before anything names them: what nothing names is deleted by the next run
    publish(outcomes)
    target.baselines.retire()
    return outcomes
