"""What a volume holds, and who may write to it, where the volume itself cannot be read.

The orchestrator keeps a volume's state, but only what a task returned, and only if that answer arrived. A task may
die, be cancelled at any moment, lose its answer, or go on writing after its execution was given up. So a *record*
that outlives every task says of each volume which state it holds, and which run may write to it:

* A state is believed only if the record names exactly this state. A record that is missing, or names another state,
  or none, means that the volume is sent as a whole.
* A run claims the record before anything else, takes the name of the state out before its first write, and puts the
  name of the new state in once everything is on the medium. Nothing has to be taken back, so no moment at which a
  task can end leaves a state that is believed and wrong.
* A claim is a lease. Its run confirms it again and again, and does not write unless it was confirmed less than
  LEASE_SECONDS ago. A run that takes the record from another one begins to write FENCE_SECONDS later, when the other
  has either found out or stopped because it could not ask. Only one's own clock is used for either.

docs/coriolis.md has the table of all cases.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from ..clock import Clock
from ..errors import CoriolisAzureError, DestinationFailed, VolumeTaken
from ..events import Report, Waiting
from ..model import Record
from ..threads import Lock

LOG = logging.getLogger(__name__)

BEAT_SECONDS = 30.0
LEASE_SECONDS = 120.0
# A lease, and what was on its way to the volume when it ended.
FENCE_SECONDS = 150.0
# How long a run whose claim cannot be confirmed waits for Azure, without writing, before it fails.
PAUSE_SECONDS = 900.0
_LOOK_SECONDS, _PAUSE_SECONDS = 5.0, 0.2
# Destinations that hand their volumes over anew each time would leave a record a run.
_KEPT_OF_A_DISK = 4
_ID = re.compile(r"[0-9a-f]{16}")


class Records(Protocol):
    """Records that outlive every task and are the same on every host."""

    def find(self, id: str, /) -> Record | None:
        """The record `id`, None where there is none."""

    def of_disk(self, disk: str, /) -> list[Record]:
        """The records of all volumes that are copies of `disk`."""

    def update(self, id: str, change: Callable[[Record | None], Record], /) -> Record:
        """Change a record to what `change` makes of it, unless another does so meanwhile: then of what that made.

        Durable on return, with a new `beat`.
        """

    def delete(self, id: str, /) -> object:
        """Remove a record; harmless when there is none."""


@dataclass(frozen=True)
class Entry:
    """What an entry of `volumes_info` says: the id of the disk, which is called `name`, and the state it kept."""

    disk: str
    name: str
    state: Any


class Claim:
    """One run's claim on the volume of an entry, as `writer`, which no other attempt is called.

    `take` comes first, then `confirm`; `begin` before the first write, `hold` before each; `settle` after the last,
    `release` at any end. `beat` is called by another thread while the claim is open, `stop` by any.
    """

    def __init__(self, records: Records, writer: str, entry: Entry, report: Report, clock: Clock) -> None:
        self._records, self._report, self._clock = records, report, clock
        self._name, self._disk, self._writer = entry.name, digest(entry.disk.lower()), writer
        # The record and the state that the entry names, "" for none.
        self._known, self._state = record_of(entry.state), name_of_state(entry.state)
        self.id = self._known or secrets.token_hex(8)
        self.believed = False  # the volume holds exactly the caller's state
        self.untouched = False  # no run has had to do with a volume of this disk
        self.fenced: list[str] = []  # the runs that it was taken from, which may have left something
        self._exclusive_at = self._until = float("-inf")
        self._lock = Lock()
        self._open = self._active = self._stopped = False
        self._lingers = False  # what was sent may still be written when this run has ended
        self._told = False  # the record says something that must outlive this run
        self._late = False  # this run, held up by its host, has written after its lease had ended
        self._failure: CoriolisAzureError | None = None

    def take(self) -> None:
        """Claim the volume. VolumeTaken where another run, which may be writing to the same one, lives."""
        found: list[Record | None] = []

        def claimed(record: Record | None) -> Record:
            found.append(record)
            return Record(self.id, self._disk, record.holds if record else "", self._writer)

        asked = self._clock.monotonic()
        self._records.update(self.id, claimed)
        self._open, self._until = True, asked + LEASE_SECONDS
        record = found[-1]
        self.believed = bool(self._known) and record is not None and record.holds == self._state
        if not self._known:
            self._look_round()
            return
        others = [record.writer for record in found if record and record.writer not in ("", self._writer)]
        if others or None in found:  # a record that somebody has deleted may have named one
            self.fenced += others
            self._exclusive_at = self._clock.monotonic() + FENCE_SECONDS

    def outlast(self) -> None:
        """Return when the run that the claim was taken from has ended, or at least writes to the volume no more."""
        rest = self._exclusive_at - self._clock.monotonic()
        if rest > 0:
            self._report(Waiting(f"an earlier run that may still write to the volume of {self._name}", rest))
            self._wait_until(self._exclusive_at)

    def confirm(self) -> None:
        """Return when no other run writes to the volume any more, and this one still may."""
        self.outlast()
        self._active = True
        if self._until - self._clock.monotonic() < LEASE_SECONDS / 2:
            self._update(lambda mine: mine)

    def begin(self) -> None:
        """The volume is about to change: on return nothing vouches for it any more."""
        self._told = True
        self._update(lambda mine: replace(mine, holds=""))

    def hold(self) -> None:
        """Return when the volume may be written to now."""
        if self._failure is not None:
            raise self._failure
        if self._clock.monotonic() < self._until:
            return
        self._wait_until(
            self._clock.monotonic() + PAUSE_SECONDS, lambda: self._clock.monotonic() < self._until
        )
        if self._clock.monotonic() >= self._until:
            raise DestinationFailed(
                f"{self._name}: Azure could not be asked for {PAUSE_SECONDS / 60:.0f} minutes whether this run may "
                "still write",
                remedy="Look at the connection to Azure, then run again.",
                disk=self._name,
            )

    def wrote(self) -> None:
        """A write has ended, however long it took."""
        if self._clock.monotonic() > self._until + FENCE_SECONDS - LEASE_SECONDS:
            self._late = True

    def settle(self, state: str) -> None:
        """The volume holds `state` and is not written to any more. The claim stays until all of the run has ended."""
        self._told = True
        self._update(lambda mine: replace(mine, holds=state))
        self._active = False

    def linger(self) -> None:
        """What was sent may still be written when this run has ended: the next one has to outlast it."""
        self._lingers = True

    def release(self) -> None:
        """The run has ended, and nothing of it is left. Harmless when repeated.

        Where it fails, or what the run has sent lingers, the next run waits for a lease's time, and looks for what
        this one has left.
        """
        with self._lock:
            if not self._open or self._failure is not None:
                return
            self._open = False
            try:
                if self._lingers:
                    LOG.warning("what was sent to the volume of %s may still be written", self._name)
                elif self._known or self._told:
                    self._records.update(self.id, lambda found: replace(self._mine(found), writer=""))
                else:
                    self._records.delete(self.id)
            except CoriolisAzureError as error:
                LOG.warning("could not give up the claim on the volume of %s: %s", self._name, error)

    def beat(self) -> bool:
        """Confirm the claim where that is due; whether it is still this run's."""
        idle = not self._active and self._until - self._clock.monotonic() > LEASE_SECONDS / 2
        if self._open and not idle and self._failure is None:
            try:
                self._update(lambda mine: mine)
            except VolumeTaken as error:
                LOG.error("%s", error)
            except CoriolisAzureError as error:
                LOG.warning("the claim on the volume of %s cannot be confirmed now: %s", self._name, error)
        return self._failure is None

    def stop(self) -> None:
        """Whatever waits here ends soon."""
        self._stopped = True

    def _update(self, change: Callable[[Record], Record]) -> None:
        """Change this run's record; the lease begins anew. VolumeTaken where it is not this run's any more."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if not self._open:
                return
            asked = self._clock.monotonic()
            try:
                self._records.update(self.id, lambda found: change(self._mine(found)))
            except VolumeTaken as error:
                self._failure = error
                if self._late:  # perhaps into what the other run has written
                    self._records.update(self.id, lambda _: Record(self.id, self._disk))
                raise
            self._until, self._late = asked + LEASE_SECONDS, False

    def _mine(self, found: Record | None) -> Record:
        if found is None or found.writer != self._writer:
            raise self._taken("another run has taken its volume over" if found else "its record was deleted")
        return found

    def _look_round(self) -> None:
        """Where nothing tells which volume this is, no run may write to any volume of the disk."""
        others = [record for record in self._records.of_disk(self._disk) if record.id != self.id]
        self.untouched = not others
        try:
            self._outlast([record for record in others if record.writer])
        except BaseException:
            self._records.delete(self.id)
            self._open = False
            raise
        for record in sorted(others, key=lambda record: record.beat)[: 1 - _KEPT_OF_A_DISK]:
            self._records.delete(record.id)

    def _outlast(self, writing: list[Record]) -> None:
        """Return when these writers have ended: each says so, or shows no life for as long as a lease holds."""
        if not writing:
            return
        self._report(Waiting(f"another run that may be writing to the volume of {self._name}", FENCE_SECONDS))
        until = self._clock.monotonic() + FENCE_SECONDS
        while writing and self._clock.monotonic() < until:
            self._wait_until(self._clock.monotonic() + min(_LOOK_SECONDS, FENCE_SECONDS / 10))
            writing = [record for record in writing if self._writes(record, self._records.find(record.id))]
        for record in writing:
            self._records.update(record.id, partial(self._silenced, record))
            self.fenced.append(record.writer)

    def _writes(self, before: Record, now: Record | None) -> bool:
        """Whether the writer has not ended; VolumeTaken where it lives."""
        if now is None or not now.writer:
            return False
        if now.beat != before.beat:
            raise self._taken(f"the run {now.writer} is writing to a volume of this disk")
        return True

    def _silenced(self, before: Record, now: Record | None) -> Record:
        """The record without its writer, who finds that out before it writes again."""
        return replace(now or before, writer="") if self._writes(before, now) else replace(before, writer="")

    def _taken(self, why: str) -> VolumeTaken:
        return VolumeTaken(f"{self._name}: {why}", disk=self._name)

    def _wait_until(self, moment: float, over: Callable[[], bool] = lambda: False) -> None:
        """Wait for a moment, or for something else that ends it."""
        while not over() and self._clock.monotonic() < moment:
            if self._failure is not None:
                raise self._failure
            if self._stopped:
                raise DestinationFailed(f"{self._name} was given up", disk=self._name)
            self._clock.sleep(_PAUSE_SECONDS)


def record_of(state: Any) -> str:
    """The id of the record that a kept state names, "" where it names none."""
    id = state.get("record") if isinstance(state, dict) else None
    return id if isinstance(id, str) and _ID.fullmatch(id) else ""


def name_of_state(state: Any) -> str:
    """The name of a kept state; "" where it is none."""
    check = state.get("check") if isinstance(state, dict) else None
    return digest(check) if isinstance(check, str) else ""


def digest(text: str) -> str:
    """16 hex digits that stand for `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
