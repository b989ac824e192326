"""The only way to create or delete resources in Azure: named, tagged, journaled, and rolled back if a step fails.

Whoever creates a resource journals it first, and deletes it. Nothing else deletes, and nothing without our tag is ever
deleted. The tags are part of the request that creates a resource, so that a resource is ours if and only if it carries
them, whenever the process dies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ..azure import codes, names
from ..azure.blobs import Blob, Container, Storage
from ..azure.client import Azure
from ..azure.vhd_snapshots import metadata_of
from ..clock import Clock, Scope, hurried, scope
from ..errors import AzureError, Conflict, CoriolisAzureError, DeadlinePassed, HostExhausted, NotFound
from ..events import Report, Wait, counted, silent
from ..model import Json, Run, at
from ..threads import Lock, every, ordered, settle
from .holders import holders
from .interrupts import Spare, shielded
from .journal import Journal

LOG = logging.getLogger(__name__)
T = TypeVar("T")

# For a while Azure refuses to delete what was in use a moment ago; the NIC of a VM that failed to start is reserved
# for 180 seconds.
PATIENCE_SECONDS = 240
DEPLOY_BEAT_SECONDS = 30.0
_PAUSE_SECONDS = 5
# Azure is eventually consistent: what has just been created may not be found at first.
_STALE_SECONDS = 30
# The order of deletion: what one of a stage holds belongs to a later stage, and those of a stage are deleted side by
# side. The security group is among the last, because its tags tell the state of the run.
_STAGES = (("vm", "snapshot", "collection"), ("disk", "nic"), ("ip", "nsg", "vnet"))
# Blobs have no tags: their metadata hold the same values, under names in which hyphens are not allowed.
RUN, _BY, _BASELINE = metadata_of(dict.fromkeys((names.RUN_TAG, names.BY_TAG, names.BASELINE_TAG), ""))


class Resources:
    """The temporary resources of one run."""

    def __init__(
        self,
        azure: Azure,
        run: Run,
        journal: Journal,
        tags: Mapping[str, str],
        clock: Clock,
        storage: Storage | None = None,
    ) -> None:
        self.azure = azure
        self.run = run
        self._journal = journal
        self._tags = tags
        self._clock = clock
        self._storage = storage
        self.spare = Spare()
        self._life, self._deploying = Lock(), ""
        self._undoing, self._blocks = Lock(), dict[Scope, list[str]]()

    def id(self, kind: str, role: str) -> str:
        """The id of the resource with this role; the same in every process."""
        name = names.resource(self.run.id, role)
        return names.resource_id(self.run.subscription, self.run.group, kind, name)

    def create(self, kind: str, role: str, body: Mapping[str, Any]) -> Json:
        """Create the resource with this role, wait until it exists, and return Azure's document."""
        id = self.id(kind, role)
        self._intend(id)
        complete = {**body, "location": self.run.location, "tags": self._tags_of(role)}

        def once() -> Json:
            LOG.info("create %s", id)
            return self.azure.put(id, complete)

        # If Azure has no capacity for a VM, another size is tried instead of waiting.
        return self._patiently(once, f"creating {id}", 0 if kind == "vm" else PATIENCE_SECONDS)

    def create_point(self, collection: str, body: Mapping[str, Any]) -> Json:
        """Create a restore point in a collection of this run, with which it is deleted; return Azure's document."""
        id = f"{collection}/restorePoints/point"
        act = partial(self.azure.create_point, id, body)
        return self._patiently(act, f"creating {id}", PATIENCE_SECONDS)

    def read(self, id: str) -> Json:
        """The current document of a resource that was created by this run."""
        return self._patiently(lambda: self.azure.get(id), f"reading {id}", _STALE_SECONDS)

    def _patiently(self, act: Callable[[], Json], action: str, patience: float) -> Json:
        stale = min(_STALE_SECONDS, patience)
        return patiently(act, action, self._clock, patience, self.azure.report, stale=stale)

    def intend(self, kind: str, role: str) -> None:
        """Journal a resource that Azure creates implicitly along with one of ours, such as a VM's OS disk."""
        self._intend(self.id(kind, role))

    def adopt(self, kind: str, role: str) -> None:
        """Tag a resource that Azure created implicitly and without our tags."""
        self.azure.tag(self.id(kind, role), self._tags_of(role))

    def _tags_of(self, role: str) -> dict[str, str]:
        tags = names.tags(self.run.id, role, self.run.instance, self.azure.now(self._clock), self._tags)
        if role == self._deploying:
            tags[names.STEP_TAG] = names.DEPLOYING
        if self.run.pool:
            tags[names.POOL_TAG] = self.run.pool
            del tags[names.RUN_TAG]
        return tags

    def delete(self, ids: Iterable[str]) -> list[str]:
        """Delete those of `ids` that are ours; return the ids that could not be deleted."""
        return delete(self.azure, ids, self._clock, self._storage)

    def outlives(self, id: str) -> None:
        """A resource of this run is not deleted with it: it no longer carries the run's tag."""
        self._journal.strike(id)

    def freeze(self, blob: Blob, role: str, tags: Mapping[str, str] | None = None) -> Blob:
        """Take a snapshot of a blob, with `tags` in addition to ours.

        What they say can never be changed. So one with BASELINE_TAG belongs to no run from its beginning: until
        `outlives` strikes it in the journal, that alone has it deleted with this run.
        """
        self._intend(names.BlobsId.of(blob.url, self.run.id))
        metadata = {**self._metadata(role), **metadata_of(tags or {})}
        if _BASELINE in metadata:
            metadata[_BY] = metadata.pop(RUN)
        return blob.take_snapshot(metadata)

    def copy_blob(self, source: Blob, container: Container, role: str) -> Blob:
        """Copy a blob to another container, inside Azure."""
        copy = container.blob(f"{names.resource(self.run.id, role)}.vhd")
        self._intend(names.BlobsId.of(copy.url, self.run.id))
        copy.copy_from(source, self._metadata(role), self._clock, self.azure.report)
        return copy

    def _metadata(self, role: str) -> dict[str, str]:
        tags = names.tags(self.run.id, role, self.run.instance, self.azure.now(self._clock), {})
        return metadata_of(tags)

    def _intend(self, id: str) -> None:
        """Journal a resource, and note it for the blocks of `undone_on_error` that create it."""
        self._journal.intend(id)
        work = scope()
        with self._undoing:
            for block, made in self._blocks.items():
                if work is not None and work.is_within(block):
                    made.append(id)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """If the block raises anything, an interrupt included, delete what it created; then raise the same error.

        What its threads created counts, and what other work of the run creates meanwhile does not.
        """
        block, made = Scope(scope()), list[str]()
        with self._undoing:
            self._blocks[block] = made
        try:
            with block.entered():
                yield
        except BaseException:
            self._undo(block, made)
            raise
        finally:
            with self._undoing:
                del self._blocks[block]

    def _undo(self, block: Scope, made: Sequence[str]) -> None:
        self.spare.give()
        try:
            with shielded(LOG.warning):
                settle(block)
                ids = [id for id in made if id in self._journal.ids]  # not what outlives the run
                for id in self.delete(reversed(ids)):
                    LOG.error("could not delete %s; `coriolis-azure cleanup` will try again", id)
        except BaseException as error:  # noqa: BLE001 - it must not replace the error that is being handled
            LOG.error("could not delete what was created: %s: %s", type(error).__name__, error)

    @contextmanager
    def deploying(self, witness: str = "nsg") -> Iterator[None]:
        """Tag the run as being deployed during the block, on the resource with the role `witness`, and show life often.

        Afterwards a run may be silent for long while it waits for its next task. The tag tells it from a run whose
        process died during the block, which `cleanup.unfinished` finds.
        """
        self._deploying = witness
        with every(DEPLOY_BEAT_SECONDS, self.show_life):
            yield
        with self._life:
            self._deploying = ""
            self._mark(self._witnesses())

    def show_life(self) -> None:
        """Mark the run as alive, so that no sweep mistakes a long transfer for a dead run.

        A failure is only logged: it must not end a transfer. If a resource cannot be tagged, because it is locked or a
        policy protects it, the next one is.
        """
        ids = self._witnesses()
        while ids:
            try:
                with self._life:
                    self._mark(ids)
                return
            except (AzureError, DeadlinePassed, HostExhausted) as error:
                LOG.warning("could not mark run %s as alive: %s", self.run.id, error)

    def _witnesses(self) -> list[str]:
        """The ids of what can carry a sign of life: of what the run may have made by now, the security group first."""
        made = [id for id in self._journal.ids if not isinstance(id, names.BlobsId)]
        return list(dict.fromkeys((self.id("nsg", "nsg"), *made)))

    def _mark(self, ids: list[str]) -> None:
        """Renew the tag with the last sign of life on the first of these that exists, and take those tried away."""
        while ids:
            id = ids.pop(0)
            document = self.azure.find(id)
            if document is not None:
                alive = {names.ALIVE_TAG: names.stamp(self.azure.now(self._clock))}
                done = "" if self._deploying else names.STEP_TAG
                self.azure.tag(id, names.retagged(document, alive, without=done))
                return


def is_ours(document: Json) -> bool:
    """Whether a resource carries one of our tags."""
    return not names.OURS.isdisjoint(names.tags_of(document))


def delete(
    azure: Azure,
    ids: Iterable[str],
    clock: Clock,
    storage: Storage | None = None,
    before: Iterable[str] = (),
) -> list[str]:
    """Delete those of `ids` that carry our tag, holders first; return the ids that could not be deleted.

    A failure does not stop the others, so that one locked resource does not keep them alive. There is no waiting for a
    resource whose holder could not be deleted, now or `before`, or is not ours. Resources without our tags are kept.
    """
    known = list(ids)
    blobs = dict.fromkeys(id for id in known if isinstance(id, names.BlobsId))
    wanted = {id.lower(): id for id in known if id not in blobs}  # listings change the case of ids
    stages = [[id for id in wanted.values() if names.kind_of(id) in kinds] for kinds in _STAGES]
    deletion = _Deletion(azure, clock, wanted, {id.lower() for id in before})
    remaining: list[str] = []
    total, tried = len(blobs) + len(wanted), 0
    waiting = Wait(azure.report, clock, f"the deletion of {counted(total, 'resource')}")
    if total > 1:
        waiting.still(0)
    for stage in stages:
        for id, is_gone in zip(stage, ordered(deletion.done, stage, threads=8, ahead=16), strict=True):
            if not is_gone:
                remaining.append(id)
            tried += 1
            waiting.still(100 * tried / total)
    return remaining + [id for id in blobs if not _blobs_deleted(storage, clock, id)]


@dataclass(frozen=True)
class _Deletion:
    """The deletion of the resources `wanted`, by lower-case id; `remaining` collects those that failed."""

    azure: Azure
    clock: Clock
    wanted: Mapping[str, str]
    remaining: set[str]

    def done(self, id: str) -> bool:
        """Delete `id`, retrying while waiting can help; return whether it is gone."""
        try:
            act = partial(self._try, id)
            patiently(act, f"deleting {id}", self.clock, PATIENCE_SECONDS, self.azure.report)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not keep the others alive
            _log_undeleted(id, error)
            self.remaining.add(id.lower())
            return False
        return True

    def _try(self, id: str) -> None:
        """Delete `id` if it exists."""
        document = self.azure.find(id)
        if document is None:
            return
        if not is_ours(document):
            raise Conflict(
                f"{id} still exists but has lost our tags, so it is left alone",
                remedy="Somebody has removed its tags: delete it by hand, or restore them.",
            )
        try:
            LOG.info("delete %s", id)
            if is_open(document):
                self.azure.revoke_access(id)  # of a run that died: Azure deletes nothing that can be read
            self._delete(id)
        except Conflict as error:
            if _may_pass(error):
                self._release(id, document)
            raise

    def _delete(self, id: str) -> None:
        try:
            self.azure.delete(id)
        except Conflict as error:
            if error.code != "DiskRestorePointUsedByCustomer":
                raise
            self.azure.close_points(id)  # of a run that died
            self.azure.delete(id)

    def _release(self, id: str, document: Json) -> None:
        """Look for holders of `id` in its document. Raises Conflict if one of them is going to stay.

        A holder that is to be deleted too is tried again: the answer that it did not exist may have been stale.
        """
        for holder in holders(document):
            if holder.lower() in self.remaining:
                raise Conflict(f"it is held by {holder}, which stays", resource=id)
            if self._is_of_others(holder, id):
                raise Conflict(f"it is held by {holder}, which is not ours", resource=id)
            if holder.lower() in self.wanted:
                self._try(holder)

    def _is_of_others(self, holder: str, id: str) -> bool:
        """Whether the holder of `id` exists and was not created by a run. A run uses a single resource group."""
        if not names.is_of_our_kinds(holder) or names.scope_of(holder) != names.scope_of(id):
            return True
        document = self.azure.find(holder)
        return document is not None and not is_ours(document)


def patiently(
    act: Callable[[], T],
    action: str,
    clock: Clock,
    patience: float = PATIENCE_SECONDS,
    report: Report = silent,
    *,
    stale: float = 0,
) -> T:
    """Return the result of `act`, retrying for `patience` seconds while Azure is busy.

    For `stale` seconds, NotFound is retried too: Azure is eventually consistent. Raises the last AzureError. A
    management lock, for example, is not waited for: it is somebody's decision.
    """
    waiting = Wait(report, clock, f"Azure to be ready for {action}", patience)
    while True:
        try:
            return act()
        except AzureError as error:
            # Retrying before Azure permits it only prolongs throttling.
            pause = max(_PAUSE_SECONDS, error.retry_after)
            retry = _may_pass(error) or (isinstance(error, NotFound) and waiting.waited + pause <= stale)
            if not retry or hurried() or pause > waiting.left:
                raise
            LOG.info("%s has to wait, trying again: %s", action, error)
            waiting.pause(pause)


def may_exist(azure: Azure, id: str) -> bool:
    """Whether a resource exists, as far as Azure tells; what is in Blob storage may."""
    if isinstance(id, names.BlobsId):
        return True
    try:
        return azure.find(id) is not None
    except (AzureError, DeadlinePassed):
        return True


def is_open(document: Json) -> bool:
    """Whether a disk or snapshot can be read through a URL."""
    return str(at(document, "properties.diskState") or "").startswith("ActiveSAS")


def end_access(azure: Azure, snapshot: str, clock: Clock) -> None:
    """Make all URLs of a snapshot invalid, retrying while waiting can help."""
    act = partial(azure.revoke_access, snapshot)
    patiently(act, f"ending the access to {snapshot}", clock, PATIENCE_SECONDS, azure.report)


def _may_pass(error: AzureError) -> bool:
    """Whether the same request can succeed later."""
    return codes.waits(error.code, error.status)


def _log_undeleted(id: str, error: Exception) -> None:
    unexpected = None if isinstance(error, CoriolisAzureError) else error
    said = str(error) if str(id) in str(error) else f"could not delete {id}: {error}"
    LOG.error("%s", said, exc_info=unexpected)


def made_of(storage: Storage | None, id: names.BlobsId) -> list[Blob]:
    """The existing blobs that a run created from a blob, identified by their metadata.

    Raises NotFound if the account cannot be seen, since then nobody knows.
    """
    blob = storage.at(id.url) if storage else None
    if blob is None:
        raise NotFound(
            f"{id.url} is in no storage account that the identity can see",
            remedy="Give the identity the role Reader on the account. If the account is deleted, so is the blob.",
        )
    container = blob.account.container(blob.container)
    try:
        return [
            container.blob(listed.name, listed.snapshot, listed.version)
            for listed in container.blobs(blob.name, past=True)
            if listed.name == blob.name and id.run in (listed.metadata.get(RUN), listed.metadata.get(_BY))
        ]
    except NotFound as error:
        if error.code in {"ContainerNotFound", "BlobNotFound"}:
            return []
        raise


def _blobs_deleted(storage: Storage | None, clock: Clock, id: names.BlobsId) -> bool:
    """Delete what a run created from a blob; return whether all of it is gone."""

    def once() -> None:
        for _ in range(2):  # in an account with versioning, deleting a blob turns it into a previous version
            for blob in made_of(storage, id):
                blob.delete()

    try:
        patiently(once, f"deleting {id.url}", clock)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not keep the others alive
        _log_undeleted(id, error)
        return False
    return True
