"""Marks a place with the id of the run that owns it, for file systems whose locks do not reach other hosts.

A run writes its id into the mark when it begins, and removes the mark when it ends. It checks the mark before it
records a change, before it commits, and twice a second while it writes; if the mark has another id, the run ends.

If a run finds a mark when it begins, the run of that mark died if the same lock would have kept it out: a lock on the
same file, on the same mount, under the same kernel, that does keep others out. Otherwise it may be alive, on another
host or, on a file system without locks, on this one. Then the new run waits until the other one must have checked the
mark, trusts nothing that is stored, and reads everything again before it commits.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from ..clock import boot_id
from ..errors import DestinationFailed, InvalidInput, exhausted_remedy
from . import exclusive, statefiles

_SECONDS = 0.5  # between checks of the mark
_FENCE_SECONDS = 4 * _SECONDS


class RunMark:
    """The mark at `path`, for a run that has locked the open file `lock` or has tried to."""

    def __init__(self, path: Path, lock: int) -> None:
        self._path = path
        self._id = _unique()
        self._next = 0.0
        self.contested = False
        held = os.fstat(lock)
        start = kernel() if exclusive.keeps_out(lock) else _unique()
        self._reach = [start, held.st_dev, held.st_ino]

    def take(self) -> None:
        """Take the place for this run. Sets `contested` if another run may still be writing."""
        before = self._read()
        statefiles.replace(self._path, [json.dumps({"run": self._id, "lock": self._reach}).encode()])
        if before is not None and before.get("lock") != self._reach:
            self.contested = True
            time.sleep(_FENCE_SECONDS)
        self._next = time.monotonic() + _SECONDS

    def check(self, *, now: bool = False) -> None:
        """Raise DestinationFailed if another run has taken the place. `now`: check even if no check is due."""
        moment = time.monotonic()
        if not now and moment < self._next:
            return
        self._next = moment + _SECONDS
        try:
            ours = self._is_ours()
        except OSError as error:
            raise DestinationFailed(
                f"{self._path} cannot be read: {error.strerror}", remedy=exhausted_remedy(error)
            ) from error
        if not ours:
            raise DestinationFailed(
                f"another run has begun to write to {self._path.parent}, so this one ends",
                remedy="Let one run at a time write there. The other run reads everything again.",
            )

    def end(self) -> None:
        """Remove the mark if it is this run's."""
        with suppress(OSError, InvalidInput):
            if self._is_ours():
                statefiles.remove(self._path)

    def _is_ours(self) -> bool:
        found = self._read()
        return found is not None and found.get("run") == self._id

    def _read(self) -> dict[str, object] | None:
        try:
            found = json.loads(statefiles.read(self._path))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def kernel() -> str:
    """An id of this boot of this host; unique to each call if the kernel tells none."""
    return boot_id() or _unique()


def _unique() -> str:
    return secrets.token_hex(16)
