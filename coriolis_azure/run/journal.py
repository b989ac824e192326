"""A write-ahead journal of what a run intends to create.

There is one file per run and one line per id, which is `fsync`ed before the request to Azure. The running process
holds a lock on the file: an unlocked journal belongs to a dead run, which the next run may finish at once instead of
waiting until it looks old. This is trusted only if the journal was locked and started since this kernel booted, on the
file system as it is mounted here: hosts that share a home directory, and containers that each mount it, need not share
its locks, and a lock from an earlier boot proves nothing. Otherwise, age decides. Journals hold ids and no secrets. An
unreadable journal (damaged, from a newer version, not ours) is renamed: its run's resources carry tags, and are deleted
once they look dead.

Plugin calls are spread over processes and hosts, so they keep no journal file; for them, the tags are the record.
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

from ..azure.names import BlobsId, is_of_our_kinds
from ..clock import boot_id
from ..errors import InvalidInput, exhausted
from ..model import Run

LOG = logging.getLogger(__name__)
# Keys of the first line besides those of the run. _BOOT is the boot and the mount that share the locks of the file.
_HOST, _BOOT = "host", "boot"
# Keys of the other lines: an ARM id, or a BlobsId; an id that is none of the run any more.
_ID, _BLOBS, _STRUCK = "id", "blobs", "struck"


class Journal:
    """The ids that a run intends to create, oldest first. A context manager that releases the lock at the end."""

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
        """Create the journal: lock it and write its first line before renaming it, so that it never looks dead."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        self._descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        with new.open(encoding="utf-8") as probe:
            # If locks do not work here, only age tells that a run is dead.
            boot = _reach(probe) if _held(probe) else ""
        self._append({**self.run.to_json(), _HOST: os.uname().nodename, _BOOT: boot})
        new.rename(path)

    def intend(self, id: str) -> None:
        """Record durably that `id` is about to be created."""
        self.ids.append(id)
        try:
            self._append({_BLOBS if isinstance(id, BlobsId) else _ID: id})
        except OSError as error:
            raise self._unwritable(error) from error

    def strike(self, id: str) -> None:
        """Record durably that `id` is not deleted with the run."""
        self.ids = [each for each in self.ids if each != id]
        try:
            self._append({_STRUCK: id})
        except OSError as error:
            raise self._unwritable(error) from error

    def done(self) -> None:
        """Delete the journal: nothing of the run is left."""
        if self._path:
            remove(self._path)

    def close(self) -> None:
        """Release the lock; the file is kept."""
        if self._descriptor >= 0:
            with suppress(OSError):  # the kernel frees it even if the file system is gone
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
            rest = (json.dumps(line) + "\n").encode()
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)

    def _unwritable(self, error: OSError) -> InvalidInput:
        full = exhausted(error)
        return InvalidInput(
            f"the journal {self._path} cannot be written: {error.strerror}",
            remedy=full.remedy if full else "Set XDG_STATE_HOME to a folder that this user may write to.",
        )


def default_folder() -> Path:
    """The folder of a user's journals: $XDG_STATE_HOME/coriolis-azure, else ~/.local/state/coriolis-azure."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:  # the XDG Base Directory Specification says to ignore a relative path
        return (state if state.is_absolute() else Path.home() / ".local" / "state") / "coriolis-azure"
    except RuntimeError as error:
        raise InvalidInput(
            "this user has no home folder for the journals of runs",
            remedy="Set XDG_STATE_HOME to a folder that this user may write to.",
        ) from error


def abandoned(folder: Path) -> Iterator[tuple[Run, Path]]:
    """Yield the runs whose process is gone, with the paths of their journals."""
    for run, path, is_dead in unheld(folder):
        if is_dead:
            yield run, path


def unheld(folder: Path) -> Iterator[tuple[Run, Path, bool]]:
    """Yield the runs whose journals are not known to be locked, with their paths and whether they are surely dead."""
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
        if is_held is False and not all(
            isinstance(id, BlobsId) or is_of_our_kinds(id) for id in intended(path)
        ):
            _set_aside(path)
            continue
        yield run, path, is_held is False and bool(boot) and boot == _reach(lines)


def _reach(file: TextIO) -> str:
    """The boot of this host and the mounted file system: all who have both in common see each other's locks."""
    boot = boot_id()
    return f"{boot} {os.fstat(file.fileno()).st_dev}" if boot else ""


def remove(path: Path) -> None:
    """Delete the journal of a run of which nothing is left. A failure is only logged: one that stays does no harm."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        LOG.warning("the journal %s cannot be deleted: %s", path, error.strerror)


def _set_aside(path: Path) -> None:
    aside = path.with_suffix(".unreadable")
    try:
        path.rename(aside)
    except OSError as error:  # another sweep was faster, or the folder belongs to somebody else
        LOG.info("the journal %s cannot be set aside: %s", path, error.strerror)
        return
    LOG.warning("the journal %s cannot be read; it is kept as %s", path, aside)


def living(folder: Path) -> set[str]:
    """The ids of the runs whose journals are locked."""
    return {path.stem for path, _, is_held in _journals(folder) if is_held}


def unfinished(folder: Path) -> list[str]:
    """The ids in all journals that are not known to be locked, from whatever boot."""
    return [id for path, _, is_held in _journals(folder) if not is_held for id in intended(path)]


def intended(path: Path) -> list[str]:
    """The ids in a journal but for the struck ones, oldest first; none if another sweep has deleted the file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except FileNotFoundError:
        return []
    ids: list[str] = []
    for line in lines:
        # A line may be truncated: its process died while writing it, before it created anything.
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            document = json.loads(line)
            if _STRUCK in document:
                ids = [each for each in ids if each != document[_STRUCK]]
            else:
                ids.append(_read(document))
    return ids


def _read(line: dict[str, str]) -> str:
    """The id in a line of a journal. Earlier versions wrote both kinds under the same key."""
    if _BLOBS in line or "#" in str(line[_ID]):
        return BlobsId(line.get(_BLOBS) or line[_ID])
    return str(line[_ID])


def _journals(folder: Path) -> Iterator[tuple[Path, TextIO, bool | None]]:
    """Yield the journals, each with its lines and whether it is locked; None if that is unknown.

    A shared lock is used to find out: over NFS, an exclusive one needs write access. What cannot be opened, such as
    the journal of another user, is left alone: the age of its run decides.
    """
    for path in _files(folder):
        try:
            lines = path.open(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # its run has just ended
            continue
        except OSError as error:
            LOG.warning("the journal %s cannot be read: %s", path, error.strerror)
            continue
        with lines:
            yield path, lines, _held(lines)


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.glob("*.journal") if path.is_file())
    except OSError as error:
        LOG.warning("the journals in %s cannot be read: %s", folder, error.strerror)
        return []


def _held(lines: TextIO) -> bool | None:
    """Whether another open file holds a lock on this one; None if that is unknown."""
    try:
        fcntl.flock(lines, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
