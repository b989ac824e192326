"""Many VMs at once: which, how many at a time, how often each is tried, and what became of each.

    with Fleet(connection_info, [source_environment]) as fleet:
        result = fleet.replicate(fleet.select(tags={"backup": "daily"}), "/srv/replicas")
        print({each.vm: each.error for each in result.vms})

Each VM is a run of its own, as with `Source.replicate`, and lies in a folder of its own below the destination. One that
fails does not stop the others.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .azure import codes, names
from .azure.sign_in import Credential
from .azure.transport import Transport
from .clock import Clock, Scope, scope
from .errors import (
    AzureError,
    Cancelled,
    CloudUnreachable,
    ConnectionLost,
    CoriolisAzureError,
    CorruptChunk,
    DeadlinePassed,
    DisksChanged,
    HostKeyChanged,
    IncompleteReplica,
    InvalidInput,
    NotFound,
    OperationFailed,
    StreamEnded,
    Throttled,
    WaitEnded,
    WorkerError,
    WorkerGone,
    WorkerRestarted,
    exhausted,
)
from .events import (
    BEGIN,
    DONE,
    FAILED,
    Notice,
    Report,
    Step,
    amount,
    counted,
    located,
    silent,
    span,
    unfailing,
)
from .machine import inspection, listing
from .model import Json, at, canonical_location
from .readers.rate_limiter import RateLimiter
from .replica import several
from .results import Replicated
from .run import cleanup, interrupts, resources
from .run.cleanup import DEAD_AFTER
from .source import Options, Shared, Source
from .threads import Lock, ordered
from .worker.shared import Workers

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOG = logging.getLogger(__name__)

# The most VMs at a time unless the caller says otherwise: what Azure lets one subscription begin is far above it, see
# docs/howto/fleet.md, but each VM needs threads, connections and memory of this host.
MOST = 16
_VMS_PER_CORE = 4
_MIB_PER_VM = 64
# The pause before a VM is tried again doubles from the first to the last of these, in seconds.
_PAUSE, _LONGEST_PAUSE = 30.0, 600.0
# A VM that has lost the worker that it shared gets so many others, besides all retries.
_WORKERS = 2
_LOST = (WorkerGone, WorkerRestarted, HostKeyChanged, ConnectionLost)
# How long what Azure answers the same for all VMs (quotas, locks, permissions) is not asked again.
_SAME_SECONDS = 300.0
_PASSING = (CloudUnreachable, DisksChanged, OperationFailed, Throttled)
_REPEATABLE = (WorkerError, StreamEnded, CorruptChunk, IncompleteReplica, DeadlinePassed)


@dataclass(frozen=True)
class FleetVm:
    """A VM that `Fleet.select` found. `name`: as Azure writes it. `environment`: the index of its source environment.

    `zone` is "" if it has none.
    """

    name: str
    id: str
    environment: int
    zone: str
    disks: int


@dataclass(frozen=True)
class VmResult:
    """What became of one VM: `replicated`, or the `error` of its last try. `to`: where its replica is."""

    vm: str
    id: str
    to: str
    tries: int
    seconds: float
    replicated: Replicated | None = None
    error: CoriolisAzureError | None = None

    @property
    def left_behind(self) -> tuple[str, ...]:
        """The ids of temporary resources of its last run that could not be deleted."""
        if self.replicated is not None:
            return self.replicated.left_behind
        return tuple(self.error.left_behind) if self.error is not None else ()

    def to_json(self) -> Json:
        """Plain JSON values: the document of the replication, or of the error."""
        about = {"vm": self.vm, "id": self.id, "to": self.to, "tries": self.tries}
        if self.error is not None:
            return {**about, "seconds": self.seconds, "error": self.error.to_json()}
        return {**about, **(self.replicated.to_json() if self.replicated is not None else {})}


@dataclass(frozen=True)
class FleetResult:
    """What became of all VMs, in the order of `Fleet.select`. `left_behind`: also of what the VMs shared."""

    vms: tuple[VmResult, ...]
    seconds: float
    left_behind: tuple[str, ...]

    @property
    def failed(self) -> tuple[VmResult, ...]:
        """Those that were not replicated."""
        return tuple(each for each in self.vms if each.error is not None)

    def to_json(self) -> Json:
        """Plain JSON values."""
        vms = [each.to_json() for each in self.vms]
        return {"vms": vms, "seconds": self.seconds, "left_behind": list(self.left_behind)}


class Fleet:
    """The VMs of one or several source environments of one Azure subscription. A context manager.

    Example: replicate all VMs with a tag, and tell what failed.

        from coriolis_azure import Fleet

        with Fleet(connection_info, [source_environment]) as fleet:
            vms = fleet.select(exclude=["test-1"])
            result = fleet.replicate(vms, "replicas", retries=2)
            for each in result.failed:
                print(each.vm, each.error.message, "What to do:", each.error.remedy)

    Each environment stands for a resource group and a location, with the settings for the VMs there. The other
    arguments are those of `Source`. `report` receives the events of all VMs, each with its VM, from several threads.
    """

    def __init__(
        self,
        connection_info: dict[str, Any],
        source_environments: Sequence[dict[str, Any]],
        *,
        report: Report = silent,
        clock: Clock | None = None,
        transport: Transport | None = None,
        credential: Credential | None = None,
    ) -> None:
        if not source_environments:
            raise InvalidInput("a fleet needs a source environment", remedy="Give at least one.")
        self._clock = clock or Clock()
        self._report = located(unfailing(report), self._clock)
        self._works: set[Scope] = set()  # as in Source
        self.sources = [
            Source(
                connection_info,
                environment,
                report=report,
                clock=self._clock,
                transport=transport,
                credential=credential,
            )
            for environment in source_environments
        ]
        for source in self.sources:
            source.azure.answers.seconds = _SAME_SECONDS

    def close(self) -> None:
        """Close the connections to Azure."""
        for source in self.sources:
            source.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self) -> None:
        """End all VMs in progress and begin no others, from any thread; later calls work as before.

        `replicate` returns once everything that was created is deleted; VMs that were not complete have Cancelled.
        """
        for work in list(self._works):
            work.cancel()

    def select(
        self,
        vms: Iterable[str] = (),
        *,
        tags: Mapping[str, str] | None = None,
        exclude: Collection[str] = (),
    ) -> tuple[FleetVm, ...]:
        """Find VMs in Azure: those named, those with all of `tags`, or else all; but none of `exclude`.

        `vms` and `exclude` are names in the resource groups of the environments, or ARM ids; case does not matter. A
        VM in another group, given by its ARM id, belongs to the first environment in its location. Workers of this
        product are no VMs to replicate. Raises InvalidInput if there is none, or NotFound for a name that no VM has.
        """
        wanted, tags = list(vms), tags or {}
        if wanted and tags:
            raise InvalidInput("VMs were chosen both by name and by tag", remedy="Choose them in one way.")
        found = self._listed()
        if wanted:
            chosen = [self._called(name, found) for name in wanted]
        else:
            chosen = [each for each in found if _has(each.document, tags)]
        chosen = list({each.vm.id.lower(): each for each in chosen}.values())
        if not chosen:
            raise _nobody(self.sources, tags, found)
        excluded = self._excluded(exclude, chosen)
        left = [each.vm for each in chosen if each.vm.id.lower() not in excluded]
        if not left:
            raise InvalidInput("every VM that was chosen is excluded", remedy="Exclude fewer VMs.")
        return tuple(left)

    def _listed(self) -> list[_Found]:
        """All VMs of the environments, each once, by environment and id."""
        found: dict[str, _Found] = {}
        for index, source in enumerate(self.sources):
            settings = source.environment
            place = {"resource_group": settings.resource_group, "location": settings.location}
            for document in listing.machines(source.azure, place):
                if not resources.is_ours(document):
                    found.setdefault(document["id"].lower(), _Found(_vm(document, index), document))
        return list(found.values())

    def _called(self, name: str, found: Sequence[_Found]) -> _Found:
        """The VM that a user refers to by its name or ARM id."""
        azure = self.sources[0].azure
        id = names.ArmId.parsed(inspection.vm_id(azure.subscription, "any", name))
        matching = [each for each in found if name.lower() in (each.vm.name.lower(), each.vm.id.lower())]
        if len(matching) > 1:
            ids = " or ".join(each.vm.id for each in matching)
            raise InvalidInput(
                f"{counted(len(matching), 'VM')} are called {name}",
                remedy=f"Give the ARM id of the one that you mean: {ids}.",
            )
        if matching:
            return matching[0]
        if names.ArmId.parsed(name) is None or id is None:
            near = difflib.get_close_matches(name.lower(), [each.vm.name for each in found], n=1)
            hint = f"Did you mean {near[0]}?" if near else "Run `coriolis-azure list` to see the VMs."
            raise NotFound(f"there is no VM {name}", remedy=hint)
        document = azure.get(str(id))
        location = canonical_location(document["location"])
        for index, source in enumerate(self.sources):
            if source.environment.location == location:
                return _Found(_vm(document, index), document)
        raise InvalidInput(
            f"the VM {document['name']} is in {location}, for which there is no source environment",
            remedy=f"Add a source environment with the location {location}.",
        )

    def _excluded(self, exclude: Collection[str], chosen: Sequence[_Found]) -> set[str]:
        """The lower-case ids of the VMs that are excluded."""
        excluded: set[str] = set()
        for name in exclude:
            ids = {
                each.vm.id.lower()
                for each in chosen
                if name.lower() in (each.vm.name.lower(), each.vm.id.lower())
            }
            if not ids:
                self._report(Notice(f"nothing to exclude: none of the VMs is called {name}"))
            excluded |= ids
        return excluded

    def replicate(
        self,
        vms: Sequence[FleetVm],
        to: str | Path,
        *,
        parallel: int | None = None,
        retries: int = 0,
        own_workers: bool = False,
        done: Callable[[VmResult], None] = lambda _: None,
        **options: Unpack[Options],
    ) -> FleetResult:
        """Replicate `vms` of `select` to the folder or URL `to`, each to a place of its own below it, by its name.

        `parallel`: how many at a time; None for `default_parallel`. `retries`: how often a VM is tried again after an
        error that may pass; what had arrived is kept. `own_workers`: boot a worker for each VM that needs one, for VMs
        that must not trust each other, instead of sharing them. `done` is called with the result of each VM as soon as
        it is known, in one thread at a time. `options`: shutdown, full, adopt and keep, as in `Source.replicate`.

        Raises InvalidInput, before anything is created, if two VMs would have the same place, or if another run is
        using `to`. What goes wrong with a VM is in its result. Ctrl-C ends all VMs, as `cancel` does; then
        KeyboardInterrupt is raised.
        """
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"replicate() got unexpected arguments: {', '.join(sorted(unknown))}")
        _refuse_alike(vms)
        began, work = self._clock.monotonic(), Scope(scope())
        results = _Results(unfailing_done(done))
        self._works.add(work)
        try:
            with (
                several.held(str(to), self.sources[0].storage) as place,
                work.entered(),
                self._ended_together(work),
            ):
                threads = min(len(vms), max(1, parallel or default_parallel()))
                tries = [_Try(vm, self.sources[vm.environment], place(vm.name), options) for vm in vms]
                for source in self.sources:
                    source.azure.answers.forget()
                self._report(Step("replicate", f"{counted(len(vms), 'VM')}, {threads} at a time"))
                self._sweep(vms)
                shared = _Together(self.sources, vms, threads, self._clock, own_workers=own_workers)

                def one(each: _Try) -> None:
                    try:
                        if not work.cancelled:  # before `ordered` notices
                            results.add(self._result(each, shared, retries, work))
                    finally:
                        shared.ended(each.vm)

                try:
                    list(ordered(one, tries, threads=threads, ahead=len(tries)))
                except WaitEnded:
                    if not work.cancelled:
                        raise
                finally:
                    left_behind = shared.close()
                for each in tries:
                    if each.vm.id not in results.by_id:
                        results.add(each.result(0, 0.0, error=Cancelled("it was cancelled before it began")))
        finally:
            self._works.discard(work)
        ended = [results.by_id[vm.id] for vm in vms]
        azure = self.sources[0].azure
        for result in ended:  # what was deleted in the end, after all, is not left behind
            left_behind += [id for id in result.left_behind if resources.may_exist(azure, id)]
        seconds = round(self._clock.monotonic() - began, 3)
        return FleetResult(tuple(ended), seconds, tuple(dict.fromkeys(left_behind)))

    def _ended_together(self, work: Scope) -> AbstractContextManager[None]:
        return interrupts.ended_together(work.cancel, lambda text: self._report(Notice(text)))

    def _sweep(self, vms: Iterable[FleetVm]) -> None:
        """Delete what dead runs have left, once in each resource group: it counts towards quotas."""
        used = {vm.environment for vm in vms}
        by_group = {self.sources[index].environment.resource_group.lower(): index for index in sorted(used)}
        for index in by_group.values():
            self.sources[index].sweep(DEAD_AFTER)

    def replicate_alone(
        self, vm: str, to: str | Path, *, retries: int = 0, **options: Unpack[Options]
    ) -> Replicated:
        """Replicate one VM to `to` itself, as `Source.replicate` does, trying again as `replicate` does."""
        source, name = self.sources[0], vm
        if len(self.sources) > 1:
            (chosen,) = self.select([vm])
            source, name = self.sources[chosen.environment], chosen.id
        _, outcome = self._tried(lambda: source.replicate_sharing(None, name, to, **options), source, retries)
        if isinstance(outcome, Replicated):
            return outcome
        raise outcome

    def _result(self, each: _Try, shared: _Together, retries: int, work: Scope) -> VmResult:
        """Replicate one VM, several times if need be; never raises an Exception."""
        began = self._clock.monotonic()
        with Scope(scope(), vm=each.vm.name).entered():
            self._report(Step(BEGIN, f"{each.vm.name} to {each.to}"))
            tries, outcome = self._tried(lambda: shared.replicate(each), each.source, retries, _WORKERS)
            seconds = self._clock.monotonic() - began
            if isinstance(outcome, Replicated):
                self._report(Step(DONE, f"{each.vm.name}: {_summary(outcome)}"))
                return each.result(tries, seconds, replicated=outcome)
            error = _known(outcome, work)
            self._report(Step(FAILED, f"{each.vm.name}: {error.message}"))
            return each.result(tries, seconds, error=error)

    def _tried(
        self, act: Callable[[], Replicated], source: Source, retries: int, workers: int = 0
    ) -> tuple[int, Replicated | Exception]:
        """Call `act` until it returns, or raises what does not pass; return how often, and what came of it.

        `workers`: how many further workers it gets if the one that it shares with others is lost.
        """
        tries = 0
        while True:
            tries += 1
            try:
                return tries, act()
            except Exception as error:  # noqa: BLE001 - even a bug of one VM's run must not stop the others
                if isinstance(error, _LOST) and workers:
                    workers, tries = workers - 1, tries - 1
                    self._report(Notice(f"{error}; trying again with another worker"))
                    continue
                if tries > retries or not may_pass(error) or not self._paused(source, error, tries):
                    return tries, error

    def _paused(self, source: Source, error: Exception, tries: int) -> bool:
        """Wait before a VM is tried again; return whether it is to be."""
        least = error.retry_after if isinstance(error, AzureError) else 0
        pause = max(least, min(_LONGEST_PAUSE, _PAUSE * 2.0 ** (tries - 1)))
        self._report(Notice(f"{error}; trying again in {span(pause)}"))
        try:
            self._clock.sleep(pause)
            if isinstance(error, CoriolisAzureError) and error.left_behind:
                source.sweep(DEAD_AFTER)
        except CoriolisAzureError as ended:
            LOG.info("it is not tried again: %s", ended)
            return False
        return True


@dataclass(frozen=True)
class _Found:
    vm: FleetVm
    document: Json


@dataclass(frozen=True)
class _Try:
    """A VM, where it goes, and how."""

    vm: FleetVm
    source: Source
    to: str
    options: Options

    def result(
        self,
        tries: int,
        seconds: float,
        *,
        replicated: Replicated | None = None,
        error: CoriolisAzureError | None = None,
    ) -> VmResult:
        return VmResult(self.vm.name, self.vm.id, self.to, tries, round(seconds, 3), replicated, error)


class _Together:
    """What the runs of a fleet share: workers, by environment and zone, and the bandwidth limit."""

    def __init__(
        self,
        sources: Sequence[Source],
        vms: Sequence[FleetVm],
        threads: int,
        clock: Clock,
        *,
        own_workers: bool,
    ) -> None:
        self._own_workers = own_workers
        self._sources = sources
        limits = [source.environment.bandwidth_limit for source in sources]
        lowest = min(filter(None, limits), default=0)
        self._limiter = RateLimiter(lowest, clock) if lowest else None
        self._left = Counter((vm.environment, vm.zone) for vm in vms)
        self._lock = Lock()
        expected: list[dict[str, tuple[int, int]]] = [{} for _ in sources]
        for environment, zone in self._left:
            disks = [vm.disks for vm in vms if (vm.environment, vm.zone) == (environment, zone)]
            most = sorted(disks, reverse=True)[:threads]
            expected[environment][zone] = (len(most), sum(most))
        self._workers = [
            Workers(source.context, source.journals, expected[index]) for index, source in enumerate(sources)
        ]
        self._runs: list[list[str]] = [[] for _ in sources]

    def replicate(self, each: _Try) -> Replicated:
        """Replicate a VM, with a shared worker if it needs one."""
        index = each.vm.environment
        with self._workers[index].borrowed() as launch:
            shared = Shared(None if self._own_workers else launch, self._limiter, self._runs[index])
            return each.source.replicate_sharing(shared, each.vm.id, each.to, **each.options)

    def ended(self, vm: FleetVm) -> None:
        """A VM has its result; delete the workers that no other VM can need."""
        place = vm.environment, vm.zone
        with self._lock:
            self._left[place] -= 1
            is_last = not self._left[place]
        if is_last:
            self._workers[vm.environment].close(vm.zone)

    def close(self) -> list[str]:
        """Delete all workers, and what is left of any run; return the ids of what could not be deleted."""
        left_behind = [id for workers in self._workers for id in workers.close()]
        for source, runs in zip(self._sources, self._runs, strict=True):
            if runs:
                left_behind += _finished(source, runs)
        return left_behind


def _finished(source: Source, runs: Collection[str]) -> list[str]:
    """Delete what Azure lists of these runs; return the ids of what could not be deleted. Raises no Exception."""
    context = source.context
    try:
        with interrupts.shielded(lambda text: context.report(Notice(text))):
            return cleanup.finish_several(context, source.environment.resource_group, runs)
    except Exception as error:
        level = logging.INFO if isinstance(error, CoriolisAzureError) else logging.ERROR
        LOG.log(level, "what the runs have left could not be looked for", exc_info=error)
        context.report(Notice(f"run `coriolis-azure cleanup`: {error}"))
        return []


class _Results:
    """The results so far, by the VM's id."""

    def __init__(self, done: Callable[[VmResult], None]) -> None:
        self.by_id: dict[str, VmResult] = {}
        self._done, self._lock = done, Lock()

    def add(self, result: VmResult) -> None:
        """Keep a result and tell it."""
        self.by_id[result.id] = result
        with self._lock:
            self._done(result)


def default_parallel() -> int:
    """How many VMs at a time suit this host: four a core and one for each 64 MiB of free memory, up to `MOST`."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MOST, _VMS_PER_CORE * cores, _free_mib() // _MIB_PER_VM))


def may_pass(error: Exception) -> bool:
    """Whether waiting, or trying again, can help against an error."""
    if isinstance(error, HostKeyChanged | WaitEnded):
        return False
    if isinstance(error, AzureError):
        return isinstance(error, _PASSING) or codes.waits(error.code, error.status)
    return isinstance(error, _REPEATABLE)


def unfailing_done(done: Callable[[VmResult], None]) -> Callable[[VmResult], None]:
    """`done`, whose errors are logged and stop nothing."""

    def told(result: VmResult) -> None:
        try:
            done(result)
        except Exception as error:  # noqa: BLE001 - a caller's function may raise anything
            LOG.warning("cannot tell the result of %s: %s: %s", result.vm, type(error).__name__, error)

    return told


def _known(raised: Exception, work: Scope) -> CoriolisAzureError:
    """The error of a VM's result. A bug is logged with its traceback, as the VM's result has no room for it."""
    if isinstance(raised, WaitEnded) and work.cancelled:
        return Cancelled("the work was cancelled")
    if isinstance(raised, CoriolisAzureError):
        return raised
    limit = exhausted(raised)
    if limit is None:
        LOG.error("a fault of coriolis-azure", exc_info=raised)
    return limit or CoriolisAzureError(f"{type(raised).__name__}: {raised}")


def _summary(replicated: Replicated) -> str:
    sent = sum(disk.sent_bytes for disk in replicated.disks)
    return f"{amount(sent)} sent in {span(replicated.seconds)}"


def _free_mib() -> int:
    """The memory that programs may still take, in MiB; plenty if the kernel does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 1 << 20


def _vm(document: Json, environment: int) -> FleetVm:
    zones = document.get("zones") or [""]
    disks = 1 + len(at(document, "properties.storageProfile.dataDisks", None) or [])
    return FleetVm(str(document["name"]), str(document["id"]), environment, str(zones[0]), disks)


def _has(document: Json, tags: Mapping[str, str]) -> bool:
    """Whether a resource has all of these tags. The case of a tag's name does not matter, that of its value does."""
    present = {key.lower(): value for key, value in (document.get("tags") or {}).items()}
    return all(present.get(key.lower()) == value for key, value in tags.items())


def _nobody(sources: Sequence[Source], tags: Mapping[str, str], found: Sequence[_Found]) -> InvalidInput:
    """The error for a choice that no VM belongs to."""
    places = ", ".join(
        f"{source.environment.resource_group} ({source.environment.location})" for source in sources
    )
    if not tags:
        return InvalidInput(
            f"there are no VMs in {places}", remedy="Name another resource group or location."
        )
    wanted = ", ".join(f"{key}={value}" for key, value in tags.items())
    keys = {key.lower() for key in tags}
    there = sorted(
        {
            f"{key}={value}"
            for each in found
            for key, value in (each.document.get("tags") or {}).items()
            if key.lower() in keys
        }
    )
    hint = f"VMs there have {', '.join(there[:10])}." if there else "Give a tag that VMs there have."
    return InvalidInput(f"no VM in {places} has the tag {wanted}", remedy=hint)


def _refuse_alike(vms: Iterable[FleetVm]) -> None:
    """Raise InvalidInput if two VMs would have the same folder, on a file system that ignores case, too."""
    by_name: dict[str, list[FleetVm]] = {}
    for vm in vms:
        by_name.setdefault(vm.name.lower(), []).append(vm)
    for alike in by_name.values():
        if len(alike) > 1:
            ids = " and ".join(vm.id for vm in alike)
            raise InvalidInput(
                f"{ids} have the same name, and so the same place at the destination",
                remedy=f"Exclude one of them (--exclude {alike[-1].id}), and replicate it to another destination.",
            )
