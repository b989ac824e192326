"""Nothing is left behind: finish a run, sweep old runs, say what stayed.

The journal is the fast path, Azure's own listing the truth. A listing is asked of each resource provider, which
knows what exists now; the subscription-wide index lags behind by minutes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path

from ..azure import names
from ..azure.blobs import Container, Storage
from ..azure.client import Azure
from ..azure.context import Context
from ..errors import CoriolisAzureError, NotFound
from ..model import Json, Run, at
from ..threads import ordered
from . import attached_disks, journal, resources

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leftover:
    """The resources of one run: `alive` is its last sign of life, None where somebody rewrote the tags."""

    run: str
    instance: str
    alive: datetime | None
    ids: tuple[str, ...]

    def to_json(self) -> Json:
        """Plain JSON values."""
        return {**asdict(self), "alive": names.stamp(self.alive) if self.alive else None}


def finish(context: Context, run: Run, known: Iterable[str], vhds: Iterable[str] = ()) -> list[str]:
    """Delete everything of `run`: the ids it is `known` to have made, and what Azure lists with its tag.

    `vhds`: the URLs of VHDs of its VM, which may be gone by now while their snapshots are there. Gives back the ids
    that stayed. May be called again and again. The known ids are deleted even where Azure does not list; then the
    AzureError of the listing is raised afterwards.
    """
    azure, clock, storage = context.azure, context.clock, context.storage
    stayed = resources.delete(azure, known, clock, storage)
    documents = _documents(azure, run.group)
    found = _by_run(documents, storage, vhds)
    listed = [id for leftover in found if leftover.run == run.id for id in leftover.ids]
    tried = {id.lower() for id in stayed}
    attached_disks.free(azure, listed, clock)
    rest = [id for id in listed if id.lower() not in tried]
    stayed += resources.delete(azure, rest, clock, storage, before=stayed)
    told = {id.lower() for id in stayed}
    return stayed + [id for id in _stripped(azure, run, documents) if id.lower() not in told]


def _stripped(azure: Azure, run: Run, documents: Mapping[str, Sequence[Json]]) -> list[str]:
    """What is called as the run calls what it makes, and carries no tag of ours: it is told, and not deleted."""
    prefix = names.resource(run.id, "")
    candidates = [id for id in _untagged(documents) if names.name_of(id).lower().startswith(prefix)]
    return [id for id in candidates if azure.find(id) is not None]


def sweep(
    context: Context, older_than: timedelta, folder: Path | None, *, dry_run: bool = False
) -> tuple[list[Leftover], list[str]]:
    """Delete the runs of the resource group that are dead; gives back what was found and the ids that stayed.

    Dead is a run whose last sign of life is older than `older_than`, and at once one whose journal in `folder`
    belongs to a process that is gone. One whose journal is held lives, whatever its age. Where somebody has
    rewritten the tags that tell the age, only an `older_than` of zero deletes. What has lost its tags stays, and is
    told while a journal names it whose process is not known to live. With `dry_run` nothing is deleted.
    """
    azure, clock, storage = context.azure, context.clock, context.storage
    group = context.environment.resource_group
    known_here = folder is not None and folder.is_dir()
    living = journal.living(folder) if folder and known_here else set()
    unheld = [
        (run.id, path, is_dead)
        for run, path, is_dead in (journal.unheld(folder) if folder and known_here else ())
        if run.subscription == azure.subscription and run.group.lower() == group.lower()
    ]
    dead = {run: path for run, path, is_dead in unheld if is_dead}
    vhds = [
        names.url_and_run(id)[0]
        for _, path, _ in unheld
        for id in journal.intended(path)
        if names.is_blob(id)
    ]
    documents = _documents(azure, group)
    listed = _with_intended(azure, storage, _by_run(documents, storage, vhds), dead)
    before = azure.now(clock) - older_than  # only now Azure has told the time
    found = [
        leftover
        for leftover in listed
        if leftover.run not in living and (leftover.run in dead or _silent(leftover, before, older_than))
    ]
    if dry_run:
        return found, []
    attached_disks.free(azure, [id for leftover in found for id in leftover.ids], clock)
    stayed = resources.delete(azure, [id for leftover in found for id in leftover.ids], clock, storage)
    unfinished = {leftover.run for leftover in found if set(leftover.ids) & set(stayed)}
    for run, path in dead.items():
        if run not in unfinished:
            path.unlink(missing_ok=True)
    told = {id.lower() for id in stayed}
    named = {id.lower() for id in journal.unfinished(folder)} if folder and known_here else set()
    return found, stayed + [id for id in _untagged(documents) if id.lower() in named - told]


def deploying(azure: Azure, group: str, instance: str) -> dict[str, str]:
    """The runs for a VM that one process is deploying, or was when it died, each with its last sign of life."""
    found: dict[str, str] = {}
    for document in azure.resources("nsg", group):
        tags = names.tags_of(document)
        if tags.get(names.STEP_TAG) == names.DEPLOYING and tags.get(names.INSTANCE_TAG) == instance[:256]:
            found[tags.get(names.RUN_TAG, "")] = tags.get(names.ALIVE_TAG, "")
    found.pop("", None)
    return found


def _silent(leftover: Leftover, before: datetime, older_than: timedelta) -> bool:
    """Whether a run has shown no life for so long. Zero means any; else an unknown age is never enough."""
    return not older_than or (leftover.alive is not None and leftover.alive <= before)


def untagged(azure: Azure, group: str) -> list[str]:
    """What is called as a run calls what it makes, and carries no tag of ours: told, never deleted."""
    return sorted(_untagged(_documents(azure, group)))


def _untagged(documents: Mapping[str, Sequence[Json]]) -> list[str]:
    strange = [
        document for listed in documents.values() for document in listed if not resources.is_ours(document)
    ]
    ids = [str(document["id"]) for document in strange]
    return [id for id in ids if names.is_of_a_run(names.name_of(id))]


def leftovers(context: Context) -> list[Leftover]:
    """All resources in the resource group that carry our tags, by run; and what runs have made in Blob storage."""
    return _by_run(_documents(context.azure, context.environment.resource_group), context.storage)


def _documents(azure: Azure, group: str) -> dict[str, list[Json]]:
    """All resources in `group` of the kinds that we make, by kind."""
    listed = ordered(lambda kind: azure.resources(kind, group), names.TYPES, threads=4, ahead=8)
    return dict(zip(names.TYPES, listed, strict=True))


def _by_run(
    documents: Mapping[str, Sequence[Json]], storage: Storage, vhds: Iterable[str] = ()
) -> list[Leftover]:
    """What carries our tags, by run. `vhds`: where to look besides the VHDs of VMs that are there."""
    runs: dict[str, list[Json]] = {}
    blobs = list(_blobs(storage, [*_vhds_of(documents["vm"]), *vhds]))
    for document in (*chain.from_iterable(documents.values()), *blobs):
        run = names.tags_of(document).get(names.RUN_TAG)
        if run is not None:
            runs.setdefault(run.lower(), []).append(document)
    return [_leftover(run, of_run) for run, of_run in sorted(runs.items())]


def _with_intended(
    azure: Azure, storage: Storage, listed: list[Leftover], dead: Mapping[str, Path]
) -> list[Leftover]:
    """What is listed, and what the journals of dead runs name besides.

    Somebody may have taken the tags off that. A blob may be where nobody looks: its VM is gone, or the settings name
    another container.
    """
    found = {leftover.run: leftover for leftover in listed}
    for run, path in dead.items():
        leftover = found.get(run, Leftover(run, "", None, ()))
        told = {id.lower() for id in leftover.ids}
        intended = [id for id in journal.intended(path) if id.lower() not in told]
        there = tuple(id for id in dict.fromkeys(intended) if _is_there(azure, storage, id))
        if there:
            found[run] = replace(leftover, ids=leftover.ids + there)
    return list(found.values())


def _is_there(azure: Azure, storage: Storage, id: str) -> bool:
    """Whether what a journal names is there. A blob that cannot be looked at may be: deleting it tells why."""
    if not names.is_blob(id):
        return azure.find(id) is not None
    try:
        return bool(resources.made_of(storage, id))
    except CoriolisAzureError:
        return True


def _blobs(storage: Storage, vhds: Iterable[str]) -> Iterator[Json]:
    """What runs have made in Blob storage, told as resources are: copies, and snapshots of the VHDs at these URLs."""
    for container, prefix in _places(storage, vhds):
        try:
            for found in container.blobs(prefix, past=True):
                if resources.RUN in found.metadata:
                    tags = {name.replace("_", "-"): value for name, value in found.metadata.items()}
                    url = container.blob(found.name).url
                    yield {"id": names.blobs_of(url, tags[names.RUN_TAG]), "tags": tags}
        except NotFound:
            continue  # the container is made when it is needed
        except CoriolisAzureError as error:
            LOG.warning("cannot look for what dead runs have left: %s", error)


def _vhds_of(vms: Iterable[Json]) -> list[str]:
    """The URLs of the VHDs that VMs have as disks."""
    return [
        str(uri)
        for vm in vms
        for entry in (
            at(vm, "properties.storageProfile.osDisk", {}),
            *at(vm, "properties.storageProfile.dataDisks", []),
        )
        if (uri := at(entry, "vhd.uri"))
    ]


def _places(storage: Storage, vhds: Iterable[str]) -> Iterator[tuple[Container, str]]:
    """Where a run may have left a blob: the container, and how its name begins."""
    try:
        container = storage.interim()
        if container is not None:
            yield container, names.resource("", "").rstrip("-")
        for blob in map(storage.at, dict.fromkeys(vhds)):
            if blob is not None:
                yield blob.account.container(blob.container), blob.name
    except CoriolisAzureError as error:
        LOG.warning("cannot look for what dead runs have left: %s", error)


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
    )
