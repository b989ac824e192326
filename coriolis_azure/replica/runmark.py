"""Which run a place belongs to, written there: what is left where a file system's locks do not reach other hosts.

A run puts its id into the mark when it begins and takes the mark away when it ends. It looks at the mark before it
notes a change, before it commits, and twice a second before it writes: where another id stands it ends itself.

A mark that is still there when a run begins is of a run that died, if that run was held out by the same lock: it was
of the same file, on the same mount, under the same kernel, and it did keep others out. Else it may be alive, on
another host or, where the file system has no locks, on this one. Then the new run waits until the other must have
looked, believes nothing of what is kept, and reads all of it again before it commits.
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

_SECONDS = 0.5  # between two looks at the mark
_FENCE_SECONDS = 4 * _SECONDS


class RunMark:
    """The mark at `path`, for a run that has locked the open file `lock`, or tried to."""

    def __init__(self, path: Path, lock: int) -> None:
        self._path = path
        self._id = _like_no_other()
        self._next = 0.0
        self.contested = False
        held = os.fstat(lock)
        start = kernel() if exclusive.keeps_out(lock) else _like_no_other()
        self._reach = [start, held.st_dev, held.st_ino]

    def take(self) -> None:
        """From now on the place is this run's. `contested`: another run may still be writing."""
        before = self._read()
        statefiles.replace(self._path, [json.dumps({"run": self._id, "lock": self._reach}).encode()])
        if before is not None and before.get("lock") != self._reach:
            self.contested = True
            time.sleep(_FENCE_SECONDS)
        self._next = time.monotonic() + _SECONDS

    def check(self, *, now: bool = False) -> None:
        """DestinationFailed when another run has taken the place; `now`: whenever the last look was."""
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
                f"another run has begun to write to {self._path.parent}; this one ends",
                remedy="Let one run at a time write there. The other run reads everything again.",
            )

    def end(self) -> None:
        """Take the mark away, if it is this run's."""
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
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def kernel() -> str:
    """Which start of which host this is."""
    return boot_id() or _like_no_other()


def _like_no_other() -> str:
    return secrets.token_hex(16)
