"""The only way to create or delete in Azure: named, tagged, journaled, and undone when a step fails.

Who creates, journals; who journals, deletes; nothing else deletes; nothing without our tag is ever deleted. The
tags travel in the request that creates, so a resource is ours exactly if it carries them, whenever we die.
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
from ..clock import Clock, hurried
from ..errors import AzureError, Conflict, CoriolisAzureError, DeadlinePassed, HostExhausted, NotFound
from ..events import Report, Wait, counted, silent
from ..model import Json, Run
from ..threads import Lock, every, ordered
from .holders import holders
from .interrupts import Spare, shielded
from .journal import Journal

LOG = logging.getLogger(__name__)
T = TypeVar("T")

# Azure refuses to delete for a while what was in use a moment ago; a NIC of a VM that failed to start is
# reserved for 180 seconds.
PATIENCE_SECONDS = 240
DEPLOY_BEAT_SECONDS = 30.0
_PAUSE_SECONDS = 5
# What was made a moment ago may not be found yet by every server of Azure's.
_STALE_SECONDS = 30
# Blobs have no tags: the same words are in their metadata, whose names hold no hyphens.
RUN = names.RUN_TAG.replace("-", "_")


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
        self._life, self._deploying = Lock(), False

    def id(self, kind: str, role: str) -> str:
        """The id of the resource that plays `role`; the same in every process."""
        name = names.resource(self.run.id, role)
        return names.resource_id(self.run.subscription, self.run.group, kind, name)

    def create(self, kind: str, role: str, body: Mapping[str, Any]) -> Json:
        """Create the resource that plays `role` and wait until it is there; gives back Azure's document."""
        id = self.id(kind, role)
        self._journal.intend(id)
        whole = {**body, "location": self.run.location, "tags": self._tags_of(role)}

        def once() -> Json:
            LOG.info("create %s", id)
            return self.azure.put(id, whole)

        # A VM that Azure has no room for is asked for in another size.
        return self._patiently(once, f"creating {id}", 0 if kind == "vm" else PATIENCE_SECONDS)

    def read(self, id: str) -> Json:
        """What was made, as it is now."""
        return self._patiently(lambda: self.azure.get(id), f"reading {id}", _STALE_SECONDS)

    def _patiently(self, act: Callable[[], Json], what: str, patience: float) -> Json:
        stale = min(_STALE_SECONDS, patience)
        return patiently(act, what, self._clock, patience, self.azure.report, stale=stale)

    def intend(self, kind: str, role: str) -> None:
        """Journal what Azure is going to make along with another resource of ours, for instance a VM's OS disk."""
        self._journal.intend(self.id(kind, role))

    def adopt(self, kind: str, role: str) -> None:
        """Tag what was expected, where Azure does not pass on the tags of what it was made with."""
        self.azure.tag(self.id(kind, role), self._tags_of(role))

    def _tags_of(self, role: str) -> dict[str, str]:
        tags = names.tags(self.run.id, role, self.run.instance, self.azure.now(self._clock), self._tags)
        if self._deploying and role == "nsg":
            tags[names.STEP_TAG] = names.DEPLOYING
        if self.run.pool:
            tags[names.POOL_TAG] = self.run.pool
            del tags[names.RUN_TAG]
        return tags

    def delete(self, ids: Iterable[str]) -> list[str]:
        """Delete what is ours among `ids`; gives back the ids that Azure did not let go."""
        return delete(self.azure, ids, self._clock, self._storage)

    def freeze(self, blob: Blob, role: str) -> Blob:
        """A snapshot of a blob."""
        self._journal.intend(names.blobs_of(blob.url, self.run.id))
        return blob.take_snapshot(self._metadata(role))

    def copy_blob(self, source: Blob, container: Container, role: str) -> Blob:
        """A copy of a blob in another container; Azure moves the bytes."""
        copy = container.blob(f"{names.resource(self.run.id, role)}.vhd")
        self._journal.intend(names.blobs_of(copy.url, self.run.id))
        copy.copy_from(source, self._metadata(role), self._clock, self.azure.report)
        return copy

    def _metadata(self, role: str) -> dict[str, str]:
        tags = names.tags(self.run.id, role, self.run.instance, self.azure.now(self._clock), {})
        return {name.replace("-", "_"): value for name, value in tags.items()}

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Delete what the block created when it ends with any error, an interrupt included. That error is kept."""
        mark = len(self._journal.ids)
        try:
            yield
        except BaseException:
            self._undo(self._journal.ids[mark:])
            raise

    def _undo(self, ids: Sequence[str]) -> None:
        self.spare.give()
        try:
            with shielded(LOG.warning):
                for id in self.delete(reversed(ids)):
                    LOG.error("could not delete %s; `coriolis-azure cleanup` will try again", id)
        except BaseException as error:  # noqa: BLE001 - it must not replace the error that is being handled
            LOG.error("could not delete what was made: %s: %s", type(error).__name__, error)

    @contextmanager
    def deploying(self) -> Iterator[None]:
        """The block deploys the run, in this process, to its end; the run says so, and shows life often.

        Afterwards a run may be silent for long, as it waits for its next task: so one whose process died in the block
        is known from those. `cleanup.deploying` finds it.
        """
        self._deploying = True
        with every(DEPLOY_BEAT_SECONDS, self.show_life):
            yield
        with self._life:
            self._deploying = False
            self._mark()

    def show_life(self) -> None:
        """Mark the run as alive, so that no sweep takes a long transfer for a dead one.

        A failure is logged only, as a transfer is worth more.
        """
        try:
            with self._life:
                self._mark()
        except (AzureError, DeadlinePassed, HostExhausted) as error:
            LOG.warning("could not mark run %s as alive: %s", self.run.id, error)

    def _mark(self) -> None:
        """Put the sign of life, a tag, on one of the run's resources."""
        made = [id for id in self._journal.ids if not names.is_blob(id)]
        for id in (self.id("nsg", "nsg"), *made):
            document = self.azure.find(id)
            if document is not None:
                gone = {names.ALIVE_TAG} if self._deploying else {names.ALIVE_TAG, names.STEP_TAG}
                old = (document.get("tags") or {}).items()
                kept = {name: value for name, value in old if name.lower() not in gone}
                alive = names.stamp(self.azure.now(self._clock))
                self.azure.tag(id, {**kept, names.ALIVE_TAG: alive})
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
    """Delete what carries our tag among `ids`, users before what they use; gives back what stayed.

    Deleting goes on after a failure, so that one locked resource does not keep the others alive; but what is held by
    one that stayed, now or `before`, or by a stranger's, is not waited for. What is there without our tags stays.
    """
    known = list(ids)
    blobs = dict.fromkeys(id for id in known if names.is_blob(id))
    wanted = {id.lower(): id for id in known if id not in blobs}  # listings change the case of ids
    by_kind: dict[str, list[str]] = {kind: [] for kind in names.TYPES}
    for id in wanted.values():
        by_kind[names.kind_of(id)].append(id)
    deletion = _Deletion(azure, clock, wanted, {id.lower() for id in before})
    stayed: list[str] = []
    all_, tried = len(blobs) + len(wanted), 0
    waiting = Wait(azure.report, clock, f"the deletion of {counted(all_, 'resource')}")
    if all_ > 1:
        waiting.still(0)
    for of_kind in by_kind.values():
        for id, is_gone in zip(of_kind, ordered(deletion.done, of_kind, threads=4, ahead=8), strict=True):
            if not is_gone:
                stayed.append(id)
            tried += 1
            waiting.still(100 * tried / all_)
    return stayed + [id for id in blobs if not _blobs_deleted(storage, clock, id)]


@dataclass(frozen=True)
class _Deletion:
    """The deletion of the resources `wanted`, by their lower-cased ids; `stayed` are those Azure did not let go."""

    azure: Azure
    clock: Clock
    wanted: Mapping[str, str]
    stayed: set[str]

    def done(self, id: str) -> bool:
        """Delete `id`, with patience where waiting can help; whether it is gone."""
        try:
            act = partial(self._try, id)
            patiently(act, f"deleting {id}", self.clock, PATIENCE_SECONDS, self.azure.report)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not keep the others alive
            _tell_undeleted(id, error)
            self.stayed.add(id.lower())
            return False
        return True

    def _try(self, id: str) -> None:
        """Delete `id` if it is there."""
        document = self.azure.find(id)
        if document is None:
            return
        if not is_ours(document):
            raise Conflict(
                f"{id} is still there without our tags, so it is left alone",
                remedy="Delete it by hand, or give it its tags back: somebody has taken them off.",
            )
        try:
            LOG.info("delete %s", id)
            self.azure.delete(id)
        except Conflict as error:
            if _may_pass(error):
                self._release(id, document)
            raise

    def _release(self, id: str, document: Json) -> None:
        """Look at what holds `id`, by its document: Conflict where that is not going to end.

        A holder that is to be deleted too is tried again: the answer that it was not there may have been stale.
        """
        for holder in holders(document):
            if holder.lower() in self.stayed:
                raise Conflict(f"it is held by {holder}, which could not be deleted", resource=id)
            if self._is_of_others(holder, id):
                raise Conflict(f"it is held by {holder}, which is not ours", resource=id)
            if holder.lower() in self.wanted:
                self._try(holder)

    def _is_of_others(self, holder: str, id: str) -> bool:
        """Whether what holds `id` is there and no run has made it. A run makes everything in one group."""
        if not names.is_of_our_kinds(holder) or names.scope_of(holder) != names.scope_of(id):
            return True
        document = self.azure.find(holder)
        return document is not None and not is_ours(document)


def patiently(
    act: Callable[[], T],
    what: str,
    clock: Clock,
    patience: float = PATIENCE_SECONDS,
    report: Report = silent,
    *,
    stale: float = 0,
) -> T:
    """What `act` gives. Where Azure says that it is busy and waiting can help, it is done again for `patience` seconds.

    For `stale` seconds it may also say that something is not there: not all of its servers know at once what was made.
    Raises the last AzureError. A lock, for one, is somebody's decision: no waiting lifts it.
    """
    waiting = Wait(report, clock, f"Azure to be ready for {what}", patience)
    while True:
        try:
            return act()
        except AzureError as error:
            # Asking before Azure permits it only prolongs throttling.
            pause = max(_PAUSE_SECONDS, error.retry_after)
            helps = _may_pass(error) or (isinstance(error, NotFound) and waiting.waited + pause <= stale)
            if not helps or hurried() or pause > waiting.left:
                raise
            LOG.info("%s has to wait, trying again: %s", what, error)
            waiting.pause(pause)


def _may_pass(error: AzureError) -> bool:
    """Whether the same request can succeed later."""
    return codes.waits(error.code, error.status)


def _tell_undeleted(id: str, error: Exception) -> None:
    unexpected = None if isinstance(error, CoriolisAzureError) else error
    LOG.error("could not delete %s: %s", id, error, exc_info=unexpected)


def made_of(storage: Storage | None, id: str) -> list[Blob]:
    """What a run has made of a blob (see `names.blobs_of`) and is there. Its metadata tell, as tags do elsewhere.

    NotFound where the account cannot be seen: nobody knows then.
    """
    url, run = names.url_and_run(id)
    blob = storage.at(url) if storage else None
    if blob is None:
        raise NotFound(
            f"{url} is in no storage account that the identity sees",
            remedy="Give the identity the role Reader on the account. If the account is deleted, so is the blob.",
        )
    container = blob.account.container(blob.container)
    try:
        return [
            container.blob(found.name, found.snapshot, found.version)
            for found in container.blobs(blob.name, past=True)
            if found.name == blob.name and found.metadata.get(RUN) == run
        ]
    except NotFound as error:
        if error.code in {"ContainerNotFound", "BlobNotFound"}:
            return []
        raise


def _blobs_deleted(storage: Storage | None, clock: Clock, id: str) -> bool:
    """Whether what a run has made of a blob and its snapshots is gone."""

    def try_it() -> None:
        for _ in range(2):  # a blob that is deleted becomes an earlier version, where the account keeps them
            for blob in made_of(storage, id):
                blob.delete()

    try:
        patiently(try_it, f"deleting {names.url_and_run(id)[0]}", clock)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not keep the others alive
        _tell_undeleted(id, error)
        return False
    return True
