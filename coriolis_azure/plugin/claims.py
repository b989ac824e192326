"""Records what a volume holds and which run may write to it, because the volume itself cannot be read.

The orchestrator stores a volume's state, but only the one that a task returned, and only if its answer arrived. A task
may die, be cancelled at any moment, lose its answer, or keep writing after its execution was given up. So a *record*
that outlives every task names, for each volume, the state it holds and the run that may write to it:

* A state is trusted only if the record names exactly that state. If the record is missing, or names no state or
  another one, the whole volume is sent.
* A run first claims the record, removes the state's name before its first write, and adds the new state's name once
  everything is on the medium. Nothing ever has to be undone, so a task can end at any moment without leaving a state
  that is trusted but wrong.
* A claim is a lease. Its run renews it regularly, and writes only within LEASE_SECONDS of the last renewal. A run that
  takes over a record waits FENCE_SECONDS before it writes; by then the other run has either noticed or stopped because
  it could not ask. Each run uses only its own clock.

docs/reference/coriolis.md has the table of all cases.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from ..clock import Clock
from ..errors import CoriolisAzureError, DestinationFailed, VolumeTaken
from ..events import Report, Wait, silent
from ..model import Record
from ..threads import Lock

LOG = logging.getLogger(__name__)

RENEW_SECONDS = 30.0
LEASE_SECONDS = 120.0
# The lease, plus time for writes that were in flight when it ended.
FENCE_SECONDS = 150.0
# A run that cannot renew its claim waits this long for Azure, without writing, before it fails.
PAUSE_SECONDS = 900.0
_POLL_SECONDS = 5.0  # between looks at the records of other writers
_SLICE_SECONDS = 0.2  # between looks at what ends a wait
# A destination whose volumes are new each time would otherwise leave one record per run.
_RECORDS_PER_DISK = 4
_ID = re.compile(r"[0-9a-f]{16}")


class Records(Protocol):
    """A store of records that outlives every task and is shared by all hosts."""

    def find(self, id: str, /) -> Record | None:
        """The record `id`; None if there is none."""

    def of_disk(self, disk: str, /) -> list[Record]:
        """The records of all volumes that are copies of `disk`."""

    def update(self, id: str, change: Callable[[Record | None], Record], /) -> Record:
        """Replace a record by `change(record)`; after a concurrent update, `change` is applied to its result.

        The new record is durable on return and has a new `beat`.
        """

    def delete(self, id: str, /) -> object:
        """Delete a record, if it exists."""


@dataclass(frozen=True)
class Entry:
    """An entry of `volumes_info`: the disk's id, its name, and the stored state."""

    disk: str
    name: str
    state: Any


@dataclass(frozen=True)
class Claimant:
    """A run that claims volumes: its id, the store of records, and where and by which clock it reports."""

    run: str
    records: Records
    report: Report = silent
    clock: Clock = field(default_factory=Clock)

    def claim(self, entry: Entry, attempt: str) -> Claim:
        """A claim, not taken yet. A task may be done twice, so the run's id alone does not name who writes."""
        return Claim(self.records, f"{self.run}-{attempt}", entry, self.report, self.clock)


class Claim:
    """One run's claim on the volume of an entry. `writer` is unique to this attempt.

    Call `acquire` first, then `activate`; `invalidate` before the first write, `wait_for_lease` before each and
    `write_ended` after it, `commit` after the last, and `release` in any case. Another thread calls `renew` while the
    claim is open; any thread may call `stop`.
    """

    def __init__(self, records: Records, writer: str, entry: Entry, report: Report, clock: Clock) -> None:
        self._records, self._report, self._clock = records, report, clock
        self._name, self._disk, self._writer = entry.name, digest(entry.disk.lower()), writer
        # The record and the state that the entry names; "" if it names none.
        self._known, self._state = record_id(entry.state), state_name(entry.state)
        self.id = self._known or secrets.token_hex(8)
        self.current = False  # whether the volume holds exactly the entry's state
        self.first_use = False  # whether no run has ever used a volume of this disk
        self.fenced: list[str] = []  # the runs that the claim was taken from; they may have left resources
        self._fenced_at = -math.inf  # when other runs have stopped writing
        self._until = -math.inf  # when the lease ends
        self._lock = Lock()
        # `_lock` makes changes of the record and of the lease one step. The flags are only polled.
        self._open = self._active = self._stopped = False
        self._in_flight = False  # data sent may still be written after this run has ended
        self._keep_record = False  # the record has information that must outlive this run
        self._late = False  # this run was delayed by its host and wrote after its lease had ended
        self._failure: CoriolisAzureError | None = None

    def acquire(self) -> None:
        """Claim the volume. VolumeTaken if another run is alive that may be writing to it."""
        previous: list[Record | None] = []  # one per attempt of the update

        def claimed(record: Record | None) -> Record:
            previous.append(record)
            return Record(self.id, self._disk, record.holds if record else "", self._writer)

        requested_at = self._clock.monotonic()
        self._records.update(self.id, claimed)
        self._open, self._until = True, requested_at + LEASE_SECONDS
        record = previous[-1]
        self.current = bool(self._known) and record is not None and record.holds == self._state
        if not self._known:
            self._wait_for_other_volumes()
            return
        others = [record.writer for record in previous if record and record.writer not in ("", self._writer)]
        if others or None in previous:  # a record that was deleted may have named a writer
            self.fenced += others
            self._fenced_at = self._clock.monotonic() + FENCE_SECONDS

    def wait_for_fence(self) -> None:
        """Wait until the run that the claim was taken from has ended or at least no longer writes to the volume."""
        rest = self._fenced_at - self._clock.monotonic()
        if rest > 0:
            self._pause(self._waiting("an earlier run that may still write to the volume", rest), rest)

    def activate(self) -> None:
        """Wait until no other run writes to the volume, and renew the lease if needed."""
        self.wait_for_fence()
        self._active = True
        if self._until - self._clock.monotonic() < LEASE_SECONDS / 2:
            self._update(lambda mine: mine)

    def invalidate(self) -> None:
        """Record that the volume's content is unknown, before the first write."""
        self._keep_record = True
        self._update(lambda mine: replace(mine, holds=""))

    def wait_for_lease(self) -> None:
        """Wait until the volume may be written to."""
        if self._failure is not None:
            raise self._failure
        if self._clock.monotonic() < self._until:
            return
        # Every writing thread waits here, so it is not reported.
        waiting = Wait(silent, self._clock, "the lease", PAUSE_SECONDS)
        self._pause(waiting, PAUSE_SECONDS, lambda: self._clock.monotonic() < self._until)
        if self._clock.monotonic() >= self._until:
            raise DestinationFailed(
                f"{self._name}: Azure could not be reached for {PAUSE_SECONDS / 60:.0f} minutes to confirm that this "
                "run may still write",
                remedy="Check the connection to Azure, then run again.",
                disk=self._name,
            )

    def write_ended(self) -> None:
        """Note that a write has ended, possibly after the lease."""
        if self._clock.monotonic() > self._until + FENCE_SECONDS - LEASE_SECONDS:
            self._late = True

    def commit(self, state: str) -> None:
        """Record that the volume holds `state` and has no more writes. The claim stays until the whole run ends."""
        self._keep_record = True
        self._update(lambda mine: replace(mine, holds=state))
        self._active = False

    def note_in_flight(self) -> None:
        """Note that data in flight may still be written after this run: the next run has to wait for that."""
        self._in_flight = True

    def release(self) -> None:
        """Give up the claim, because nothing of the run is left. May be repeated.

        If this fails, or if data in flight lingers, the next run waits until the lease must have ended and looks for
        resources that this one has left.
        """
        with self._lock:
            if not self._open or self._failure is not None:
                return
            self._open = False
            try:
                if self._in_flight:
                    LOG.warning("data sent to the volume of %s may still be written", self._name)
                elif self._known or self._keep_record:
                    self._records.update(self.id, lambda record: replace(self._own(record), writer=""))
                else:
                    self._records.delete(self.id)
            except CoriolisAzureError as error:
                LOG.warning("could not give up the claim on the volume of %s: %s", self._name, error)

    def renew(self) -> bool:
        """Renew the claim if that is due; False once it is no longer this run's."""
        idle = not self._active and self._until - self._clock.monotonic() > LEASE_SECONDS / 2
        if self._open and not idle and self._failure is None:
            try:
                self._update(lambda mine: mine)
            except VolumeTaken as error:
                LOG.error("%s", error)
            except CoriolisAzureError as error:
                LOG.warning("the claim on the volume of %s cannot be renewed now: %s", self._name, error)
        return self._failure is None

    def stop(self) -> None:
        """Make pending waits end soon."""
        self._stopped = True

    def _update(self, change: Callable[[Record], Record]) -> None:
        """Change this run's record, which renews the lease. VolumeTaken if it is no longer this run's."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if not self._open:
                return
            requested_at = self._clock.monotonic()
            try:
                self._records.update(self.id, lambda record: change(self._own(record)))
            except VolumeTaken as error:
                self._failure = error
                if self._late:  # our last write may have overwritten the other run's data
                    self._records.update(self.id, lambda _: Record(self.id, self._disk))
                raise
            self._until, self._late = requested_at + LEASE_SECONDS, False

    def _own(self, record: Record | None) -> Record:
        if record is None or record.writer != self._writer:
            raise self._taken("another run has taken over its volume" if record else "its record was deleted")
        return record

    def _wait_for_other_volumes(self) -> None:
        """Make sure that no run writes to any volume of the disk, because we do not know which volume is ours."""
        others = [record for record in self._records.of_disk(self._disk) if record.id != self.id]
        self.first_use = not others
        try:
            self._fence([record for record in others if record.writer])
        except BaseException:
            self._records.delete(self.id)
            self._open = False
            raise
        for record in sorted(others, key=lambda record: record.beat)[: 1 - _RECORDS_PER_DISK]:
            self._records.delete(record.id)

    def _fence(self, writing: list[Record]) -> None:
        """Wait until these writers have ended: each gives up its record or does not renew it for a lease's time."""
        if not writing:
            return
        waiting = self._waiting("another run that may be writing to the volume", FENCE_SECONDS)
        while writing and waiting.left > 0:
            self._pause(waiting, min(_POLL_SECONDS, FENCE_SECONDS / 10))
            writing = [record for record in writing if self._may_write(record, self._records.find(record.id))]
        for record in writing:
            self._records.update(record.id, partial(self._without_writer, record))
            self.fenced.append(record.writer)

    def _may_write(self, before: Record, now: Record | None) -> bool:
        """Whether the writer may still write; VolumeTaken if it has renewed its lease."""
        if now is None or not now.writer:
            return False
        if now.beat != before.beat:
            raise self._taken(f"the run {now.writer} is writing to a volume of this disk")
        return True

    def _without_writer(self, before: Record, now: Record | None) -> Record:
        """The record without its writer, which notices that before it writes again. VolumeTaken as in `_may_write`."""
        self._may_write(before, now)
        return replace(now or before, writer="")

    def _taken(self, reason: str) -> VolumeTaken:
        return VolumeTaken(f"{self._name}: {reason}", disk=self._name)

    def _waiting(self, what: str, seconds: float) -> Wait:
        return Wait(self._report, self._clock, f"{what} of {self._name}", seconds)

    def _pause(self, waiting: Wait, seconds: float, over: Callable[[], bool] = lambda: False) -> None:
        """Wait for `seconds`, or until `over` returns true. Raises if the claim is lost or stopped meanwhile."""
        until = self._clock.monotonic() + seconds
        while not over() and self._clock.monotonic() < until:
            if self._failure is not None:
                raise self._failure
            if self._stopped:
                raise DestinationFailed(f"{self._name} was cancelled", disk=self._name)
            waiting.pause(_SLICE_SECONDS)


def record_id(state: Any) -> str:
    """The id of the record that a stored state names; "" if it names none."""
    id = state.get("record") if isinstance(state, dict) else None
    return id if isinstance(id, str) and _ID.fullmatch(id) else ""


def state_name(state: Any) -> str:
    """The name of a stored state; "" if it is not a valid one."""
    check = state.get("check") if isinstance(state, dict) else None
    return digest(check) if isinstance(check, str) else ""


def digest(text: str) -> str:
    """A digest of `text`: 16 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
