"""What we mean to create, written down before we create it.

One file a run, one line an id, `fsync`ed before Azure is asked. The process that runs holds a lock on the file:
a journal that nobody holds belongs to a run that died, so the next one may finish it at once instead of waiting
until it looks old. That is believed only of journals that were locked, and begun since this kernel booted: hosts
that share a home need not share its locks, and a lock of an earlier boot may be there or not. Of all others age
decides. Ids are no secrets, and nothing else is in it. One that cannot be read (damaged, a newer version's, not ours)
is set aside under another name: what its run made carries tags, and is deleted once it looks dead.

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

from ..errors import InvalidInput, exhausted
from ..model import Run

LOG = logging.getLogger(__name__)
# What the first line says besides the run.
_HOST, _BOOT = "host", "boot"


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
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        with new.open(encoding="utf-8") as as_others:
            boot = _boot() if _held(as_others) else ""  # without a lock age alone tells who is dead
        self._append({**self.run.to_json(), _HOST: os.uname().nodename, _BOOT: boot})
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
    for run, path, is_dead in unheld(folder):
        if is_dead:
            yield run, path


def unheld(folder: Path) -> Iterator[tuple[Run, Path, bool]]:
    """The runs whose journals nobody is known to hold, with their paths and whether their process is gone for sure."""
    for path, lines, is_held in _journals(folder):
        if is_held:
            continue
        try:
            first = json.loads(lines.readline())
            boot = first.pop(_BOOT, "") if first.pop(_HOST, "") else ""
            run = Run.from_json(first)
        except (ValueError, TypeError, AttributeError, RecursionError):
            if is_held is False:
                _set_aside(path)
            continue
        yield run, path, is_held is False and bool(boot) and boot == _boot()


def _set_aside(path: Path) -> None:
    aside = path.with_suffix(".unreadable")
    with suppress(FileNotFoundError):  # another sweep has been quicker
        path.rename(aside)
    LOG.warning("the journal %s cannot be read; it is kept as %s", path, aside)


def living(folder: Path) -> set[str]:
    """The ids of the runs whose process holds its journal."""
    return {path.stem for path, _, is_held in _journals(folder) if is_held}


def unfinished(folder: Path) -> list[str]:
    """The ids in all journals that nobody is known to hold, whatever boot they are of."""
    return [id for path, _, is_held in _journals(folder) if not is_held for id in intended(path)]


def intended(path: Path) -> list[str]:
    """The ids that a journal names, oldest first; none where another sweep has done with it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except FileNotFoundError:
        return []
    ids = []
    for line in lines:
        # A line may be cut off: its process died while it wrote, and nothing was made of that name.
        with suppress(ValueError, TypeError, KeyError):
            ids.append(str(json.loads(line)["id"]))
    return ids


def _boot() -> str:
    """By what name the kernel calls its running since it booted; "" where it does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _journals(folder: Path) -> Iterator[tuple[Path, TextIO, bool | None]]:
    """The journals, each with its lines and whether somebody holds it; None where that cannot be told.

    They are asked for with a shared lock: over NFS an exclusive one needs leave to write.
    """
    for path in sorted(folder.glob("*.journal")):
        try:
            lines = path.open(encoding="utf-8")
        except FileNotFoundError:  # its run has just ended
            continue
        with lines:
            yield path, lines, _held(lines)


def _held(lines: TextIO) -> bool | None:
    try:
        fcntl.flock(lines, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
