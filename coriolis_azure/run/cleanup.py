"""Leaves nothing behind: finishes runs, sweeps dead ones, and reports what could not be deleted.

The journal is the fast path, Azure's own listing the truth. Each resource provider is asked for its listing, since it
knows what exists now; the subscription-wide index lags behind by minutes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path

from ..azure import names
from ..azure.blobs import Container, Storage
from ..azure.client import Azure
from ..azure.context import Context
from ..azure.vhd_snapshots import tags_of
from ..clock import Clock
from ..errors import CoriolisAzureError, Denied, NotFound
from ..events import Notice, Report, Step, counted
from ..model import Json, Run
from ..threads import ordered
from . import attached_disks, journal, resources
from .shelves import Managed, left_open, vhds_of

LOG = logging.getLogger(__name__)

# A run shows life every quarter of an hour, so one that has been silent for two hours is dead.
DEAD_AFTER = timedelta(hours=2)
# One that is being deployed shows it every half minute, and deleting one is a matter of minutes.
_UNFINISHED_DEAD_AFTER = timedelta(minutes=10)


@dataclass(frozen=True)
class Leftover:
    """The resources of one run. `alive` is its last sign of life; None if somebody has rewritten the tags.

    `unfinished`: a process is deploying the run or deleting what it has made, or was when it died.
    """

    run: str
    instance: str
    alive: datetime | None
    ids: tuple[str, ...]
    unfinished: bool = False

    def to_json(self) -> Json:
        """Plain JSON values."""
        return {**asdict(self), "alive": names.stamp(self.alive) if self.alive else None}


def finish(context: Context, run: Run, known: Iterable[str], vhds: Iterable[str] = ()) -> list[str]:
    """Delete everything of `run`: its `known` ids, and what Azure lists with its tag.

    The baselines that it was reading when it died are closed. `vhds` are the URLs of its VM's VHDs: the VM may be gone
    while snapshots of them still exist. Returns the ids that could not be deleted. Idempotent. If the listing fails,
    the known ids are deleted first, then its AzureError is raised.
    """
    context.report(Step("clean up", run.id))
    azure, clock, storage = context.azure, context.clock, context.storage
    remaining = resources.delete(azure, known, clock, storage)
    documents = _documents(azure, run.group)
    leftovers = _by_run(_with_blobs(documents, storage, vhds))
    listed = [id for leftover in leftovers if leftover.run == run.id for id in leftover.ids]
    tried = {id.lower() for id in remaining}
    _mark_deleting(azure, _witnesses(documents, listed), clock)
    stuck = attached_disks.free(azure, listed, clock)
    rest = [id for id in listed if id.lower() not in tried]
    remaining += resources.delete(azure, rest, clock, storage, before=[*remaining, *stuck])
    others = {leftover.instance for leftover in leftovers if leftover.run != run.id}
    _close(context, [each for each in documents["snapshot"] if _is_about(each, run.instance)], others)
    reported = {id.lower() for id in remaining}
    return remaining + [id for id in _stripped(azure, run, documents) if id.lower() not in reported]


def _is_about(document: Json, instance: str) -> bool:
    return names.tags_of(document).get(names.INSTANCE_TAG) == instance[:256]


def _close(context: Context, snapshots: Iterable[Json], alive: Collection[str]) -> None:
    """Close the baselines that a run was reading when it died; `alive`: the VMs of runs that may be reading theirs."""
    for id in left_open(snapshots, alive):
        Managed(context).close(id)


def finish_several(context: Context, group: str, runs: Collection[str]) -> list[str]:
    """Delete what Azure still lists of runs that have ended, given by their ids; return what could not be deleted.

    One listing serves all of them. What has a name of one of the runs, but has lost our tags, is reported, too.
    """
    azure, clock, storage = context.azure, context.clock, context.storage
    documents = _documents(azure, group)
    of_runs = [each for each in _by_run(_with_blobs(documents, storage)) if each.run in runs]
    listed = [id for leftover in of_runs for id in leftover.ids]
    stuck = attached_disks.free(azure, listed, clock)
    remaining = resources.delete(azure, listed, clock, storage, before=stuck)
    untagged = [id for id in _untagged(documents) if names.run_of(names.name_of(id)) in runs]
    return remaining + [id for id in untagged if id not in remaining and azure.find(id) is not None]


def _witnesses(documents: Mapping[str, Sequence[Json]], listed: Sequence[str]) -> list[Json]:
    """What tells the state of a run: its security groups or, if no worker was made for it, what it reads."""
    kinds = ("nsg", "snapshot", "collection")
    of_run = [[each for each in documents[kind] if each["id"] in listed] for kind in kinds]
    return next(filter(None, of_run), [])


def _mark_deleting(azure: Azure, witnesses: Iterable[Json], clock: Clock) -> None:
    """Say on these resources that their run is being deleted, so that somebody goes on where a killed process died."""
    for document in witnesses:
        alive = names.stamp(azure.now(clock))
        step = {names.ALIVE_TAG: alive, names.STEP_TAG: names.DELETING}
        try:
            azure.tag(document["id"], names.retagged(document, step))
        except CoriolisAzureError as error:  # it is only needed if this process dies
            LOG.warning("could not mark %s as being deleted: %s", document["id"], error)


def _stripped(azure: Azure, run: Run, documents: Mapping[str, Sequence[Json]]) -> list[str]:
    """The ids of resources with a name of the run but without our tags: they are reported, not deleted."""
    prefix = names.resource(run.id, "")
    candidates = [id for id in _untagged(documents) if names.name_of(id).lower().startswith(prefix)]
    return [id for id in candidates if azure.find(id) is not None]


def sweep(
    context: Context, older_than: timedelta, folder: Path | None, *, dry_run: bool = False
) -> tuple[list[Leftover], list[str]]:
    """Delete the dead runs of the resource group; return them, and the ids that could not be deleted.

    A run is dead if its last sign of life is older than `older_than` (ten minutes if it is unfinished), or if its
    journal in `folder` belongs to a process that is gone. A run whose journal is locked is alive, whatever its age. If
    somebody has rewritten the tags that tell the age, only an `older_than` of zero deletes the run. Resources that have
    lost their tags are kept, and reported if a journal lists them whose process is not known to be alive. Baselines
    that a dead run was reading are closed. With `dry_run`, nothing is deleted or closed.
    """
    azure, clock, storage = context.azure, context.clock, context.storage
    group = context.environment.resource_group
    living = journal.living(folder) if folder else set()
    unheld = [
        (run.id, path, is_dead)
        for run, path, is_dead in (journal.unheld(folder) if folder else ())
        if run.subscription == azure.subscription and run.group.lower() == group.lower()
    ]
    dead = {run: path for run, path, is_dead in unheld if is_dead}
    vhds = [id.url for _, path, _ in unheld for id in journal.intended(path) if isinstance(id, names.BlobsId)]
    documents = _documents(azure, group)
    listed = _with_intended(azure, storage, _by_run(_with_blobs(documents, storage, vhds)), dead)
    now = azure.now(clock)  # only now has an answer told Azure's time
    swept = [
        leftover
        for leftover in listed
        if leftover.run not in living and (leftover.run in dead or _is_silent(leftover, now, older_than))
    ]
    _tell_ageless(
        context.report,
        [each.run for each in listed if each.run not in living and each not in swept and each.alive is None],
    )
    if dry_run:
        return swept, []
    ids = [id for leftover in swept for id in leftover.ids]
    stuck = attached_disks.free(azure, ids, clock)
    remaining = resources.delete(azure, ids, clock, storage, before=stuck)
    alive = {leftover.instance for leftover in listed if leftover not in swept}
    _close(context, documents["snapshot"], alive)
    incomplete = {leftover.run for leftover in swept if set(leftover.ids) & set(remaining)}
    for run, path in dead.items():
        if run not in incomplete:
            journal.remove(path)
    reported = {id.lower() for id in remaining}
    journaled = {id.lower() for id in journal.unfinished(folder)} if folder else set()
    remaining += [id for id in _untagged(documents) if id.lower() in journaled - reported]
    _tell(context.report, swept, remaining)
    return swept, remaining


def _tell_ageless(report: Report, runs: Sequence[str]) -> None:
    """Name the runs about whose age neither a journal nor their tags say anything: no clean-up by age deletes them."""
    if runs:
        remedy = "when no run is active, `coriolis-azure cleanup --older-than 0s` deletes what they have made"
        report(
            Notice(f"the tags that tell the age of these runs were rewritten: {', '.join(runs)}; {remedy}")
        )


def _tell(report: Report, swept: Iterable[Leftover], remaining: Sequence[str]) -> None:
    gone = [leftover.run for leftover in swept if set(leftover.ids).isdisjoint(remaining)]
    if gone:
        report(Notice(f"deleted what {counted(len(gone), 'dead run')} had left: {', '.join(gone)}"))
    if remaining:
        report(Notice(f"could not delete: {', '.join(remaining)}"))


def unfinished(azure: Azure, group: str, instance: str) -> dict[str, datetime | None]:
    """The unfinished runs of a VM, with their last signs of life."""
    kinds = ("vnet", "ip", "nsg", "snapshot", "collection")
    documents = [document for kind in kinds for document in _listed(azure, kind, group)]
    return {
        leftover.run: leftover.alive
        for leftover in _by_run(documents)
        if leftover.unfinished and leftover.instance == instance[:256]
    }


def of_pool(azure: Azure, group: str, pool: str) -> list[str]:
    """The ids of everything that carries the tag of `pool`."""
    listed = chain.from_iterable(_documents(azure, group).values())
    return [str(document["id"]) for document in listed if names.tags_of(document).get(names.POOL_TAG) == pool]


def _is_silent(leftover: Leftover, now: datetime, older_than: timedelta) -> bool:
    """Whether a run's last sign of life is old enough. Zero means any age; an unknown age is otherwise never enough."""
    if leftover.unfinished:
        older_than = min(older_than, _UNFINISHED_DEAD_AFTER)
    return not older_than or (leftover.alive is not None and leftover.alive <= now - older_than)


def untagged(azure: Azure, group: str) -> list[str]:
    """The ids of resources with a run's name but without our tags: they are reported, never deleted."""
    return sorted(_untagged(_documents(azure, group)))


def _untagged(documents: Mapping[str, Sequence[Json]]) -> list[str]:
    not_ours = [
        document for listed in documents.values() for document in listed if not resources.is_ours(document)
    ]
    ids = [str(document["id"]) for document in not_ours]
    return [id for id in ids if names.is_of_a_run(names.name_of(id))]


def leftovers(context: Context) -> list[Leftover]:
    """What runs have made in the resource group and in Blob storage, by run."""
    documents = _documents(context.azure, context.environment.resource_group)
    return _by_run(_with_blobs(documents, context.storage))


def _documents(azure: Azure, group: str) -> dict[str, list[Json]]:
    """All resources in `group` of the kinds that we create, by kind."""
    listed = ordered(lambda kind: _listed(azure, kind, group), names.TYPES, threads=4, ahead=8)
    return dict(zip(names.TYPES, listed, strict=True))


def _listed(azure: Azure, kind: str, group: str) -> list[Json]:
    """All resources of a kind in `group`. Who may not see restore points has made none."""
    if kind == "collection" and not azure.is_modern:
        return []
    try:
        return azure.resources(kind, group)
    except Denied:
        if kind != "collection":
            raise
        return []


def _with_blobs(
    documents: Mapping[str, Sequence[Json]], storage: Storage, vhds: Iterable[str] = ()
) -> list[Json]:
    """All documents, and those of blobs. `vhds` are searched in addition to the VHDs of existing VMs."""
    blobs = _blobs(storage, [*vhds_of(documents["vm"]), *vhds])
    return [*chain.from_iterable(documents.values()), *blobs]


def _by_run(documents: Iterable[Json]) -> list[Leftover]:
    """The resources that runs have made, by run. Of a pool: the workers and the network that were not completed.

    A tag tells that a run has made a resource; its name tells which, even if somebody has rewritten the tag.
    """
    runs: dict[str, list[Json]] = {}
    for document in documents:
        tags = names.tags_of(document)
        name, run = names.name_of(document["id"]), tags.get(names.RUN_TAG)
        if (run is None and names.POOL_TAG in tags) or (run is not None and names.is_of_a_run(name)):
            run = names.run_of(name)
        if run is not None:
            runs.setdefault(run.lower(), []).append(document)
    found = [_leftover(run, of_run) for run, of_run in sorted(runs.items())]
    return [leftover for leftover in found if leftover.unfinished or not _is_pools(runs[leftover.run])]


def _is_pools(documents: Iterable[Json]) -> bool:
    return any(names.POOL_TAG in names.tags_of(document) for document in documents)


def _with_intended(
    azure: Azure, storage: Storage, listed: list[Leftover], dead: Mapping[str, Path]
) -> list[Leftover]:
    """The listed resources, and whatever else the journals of dead runs name and still exists.

    Such a resource may have lost its tags, or it is a blob that no listing covers: its VM is gone, or the settings now
    name another container.
    """
    by_run = {leftover.run: leftover for leftover in listed}
    for run, path in dead.items():
        leftover = by_run.get(run, Leftover(run, "", None, ()))
        listed_ids = {id.lower() for id in leftover.ids}
        unlisted = [id for id in journal.intended(path) if id.lower() not in listed_ids]
        existing = tuple(id for id in dict.fromkeys(unlisted) if _exists(azure, storage, id))
        if existing:
            by_run[run] = replace(leftover, ids=leftover.ids + existing)
    return list(by_run.values())


def _exists(azure: Azure, storage: Storage, id: str) -> bool:
    """Whether a journaled id exists. A blob that cannot be read counts as existing: deleting it tells the reason."""
    if not isinstance(id, names.BlobsId):
        return azure.find(id) is not None
    try:
        return bool(resources.made_of(storage, id))
    except CoriolisAzureError:
        return True


def _blobs(storage: Storage, vhds: Iterable[str]) -> Iterator[Json]:
    """Yield what runs have created in Blob storage, as documents: copies, and snapshots of the VHDs at these URLs."""
    for container, prefix in _places(storage, vhds):
        try:
            for blob in container.blobs(prefix, past=True):
                if resources.RUN in blob.metadata:
                    tags = tags_of(blob.metadata)
                    url = container.blob(blob.name).url
                    yield {"id": names.BlobsId.of(url, tags[names.RUN_TAG]), "tags": tags}
        except NotFound:
            continue  # the container is created when it is needed
        except CoriolisAzureError as error:
            LOG.warning("cannot look for blobs of dead runs: %s", error)


def _places(storage: Storage, vhds: Iterable[str]) -> Iterator[tuple[Container, str]]:
    """Yield each container in which a run may have left a blob, with the prefix of the blob's name."""
    try:
        container = storage.interim()
        if container is not None:
            yield container, names.resource("", "").rstrip("-")
        for blob in map(storage.at, dict.fromkeys(vhds)):
            if blob is not None:
                yield blob.account.container(blob.container), blob.name
    except CoriolisAzureError as error:
        LOG.warning("cannot look for blobs of dead runs: %s", error)


def _leftover(run: str, documents: list[Json]) -> Leftover:
    tags = [names.tags_of(document) for document in documents]
    signs = [
        sign
        for tag in tags
        for name in (names.MADE_TAG, names.ALIVE_TAG)
        if (sign := names.moment(tag.get(name, ""))) is not None
    ]
    return Leftover(
        run=run,
        instance=next((tag[names.INSTANCE_TAG] for tag in tags if names.INSTANCE_TAG in tag), ""),
        alive=max(signs, default=None),
        ids=tuple(sorted({document["id"] for document in documents})),
        unfinished=_is_unfinished(documents),
    )


def _is_unfinished(documents: Sequence[Json]) -> bool:
    """Whether a run's security group says that it is being deployed or deleted, or does not exist yet or any more.

    Without a worker, its snapshots or restore points say that it is being deleted. The address and the network are made
    along with it. The network that a pool shares says it itself.
    """
    if any(names.STEP_TAG in names.tags_of(document) for document in documents):
        return True
    ids = [document["id"] for document in documents]
    kinds = {"blob" if isinstance(id, names.BlobsId) else names.kind_of(id) for id in ids}
    return kinds <= ({"ip"} if _is_pools(documents) else {"ip", "vnet"})
