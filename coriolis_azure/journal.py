"""What we mean to create, written down before we create it.

One file a run, one line an id, `fsync`ed before Azure is asked. The process that runs holds a lock on the file:
a journal that nobody holds belongs to a run that died, so the next one may finish it at once instead of waiting
until it looks old. Ids are no secrets, and nothing else is in it. One that cannot be read (damaged, a newer version's,
not ours) is set aside under another name: what its run made carries tags, and is deleted once it looks dead.

Plugin calls are spread over processes and hosts, so they keep no file; for them the tags are the record.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from .errors import InvalidInput, exhausted
from .model import Run

LOG = logging.getLogger(__name__)


class Journal:
    """The ids that a run intends to create, oldest first. A context manager; leaving it gives up the lock."""

    def __init__(self, run: Run, folder: Path | None = None) -> None:
        self.run = run
        self.ids: list[str] = []
        self._path = folder / f"{run.id}.journal" if folder else None
        self._descriptor = -1
        if self._path:
            try:
                self._begin(self._path)
            except OSError as error:
                self.close()
                with suppress(OSError):
                    self._path.with_suffix(".new").unlink()
                raise self._unwritable(error) from error

    def _begin(self, path: Path) -> None:
        """Make the journal: locked and with its first line before it has its name, so nobody takes it for dead."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        self._descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._append(self.run.to_json())
        new.rename(path)

    def intend(self, id: str) -> None:
        """Make durable that `id` is about to be created."""
        self.ids.append(id)
        try:
            self._append({"id": id})
        except OSError as error:
            raise self._unwritable(error) from error

    def done(self) -> None:
        """Nothing of the run is left: forget it."""
        if self._path:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give up the lock; what is written stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: dict[str, str]) -> None:
        if self._descriptor >= 0:
            left = (json.dumps(line) + "\n").encode()
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)

    def _unwritable(self, error: OSError) -> InvalidInput:
        full = exhausted(error)
        return InvalidInput(
            f"the journal {self._path} cannot be written: {error.strerror}",
            remedy=full.remedy if full else "Set XDG_STATE_HOME to a folder that this user may write to.",
        )


def default_folder() -> Path:
    """Where a user's journals are: $XDG_STATE_HOME/coriolis-azure, else ~/.local/state/coriolis-azure."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local" / "state") / "coriolis-azure"
    except RuntimeError as error:
        raise InvalidInput(
            "this user has no home folder, and there is no other place for the journals of runs",
            remedy="Set XDG_STATE_HOME to a folder that this user may write to.",
        ) from error


def abandoned(folder: Path) -> Iterator[tuple[Run, Path]]:
    """The runs whose process is gone, with the paths of their journals."""
    for path, lines in _journals(folder):
        if lines is not None:
            try:
                run = Run.from_json(json.loads(lines.readline()))
            except (ValueError, TypeError, RecursionError):
                aside = path.with_suffix(".unreadable")
                path.rename(aside)
                LOG.warning("the journal %s cannot be read; it is kept as %s", path, aside)
                continue
            yield run, path


def living(folder: Path) -> set[str]:
    """The ids of the runs whose process holds its journal."""
    return {path.stem for path, lines in _journals(folder) if lines is None}


def _journals(folder: Path) -> Iterator[tuple[Path, TextIO | None]]:
    """The journals, each with its lines where nobody holds it, and None where somebody does."""
    for path in sorted(folder.glob("*.journal")):
        try:
            lines = path.open(encoding="utf-8")
        except FileNotFoundError:  # its run has just ended
            continue
        with lines:
            try:
                fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield path, None
            else:
                yield path, lines
