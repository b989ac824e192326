"""The records of volumes as files: another thread, another process, another run sees them, as in Azure."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

from coriolis_azure.model import Record


class RecordFiles:
    """A claims.Records in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.updates = 0
        folder.mkdir(exist_ok=True)

    def find(self, id: str) -> Record | None:
        path = self.folder / id
        return Record(**json.loads(path.read_text())) if path.exists() else None

    def all(self) -> list[Record]:
        return [record for path in sorted(self.folder.glob("[0-9a-f]*")) if (record := self.find(path.name))]

    def of_disk(self, disk: str) -> list[Record]:
        return [record for record in self.all() if record.disk == disk]

    def update(self, id: str, change: Callable[[Record | None], Record]) -> Record:
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.find(id)
            self.updates += 1
            beat = str(int(before.beat if before else 0) + 1)
            made = Record(**{**change(before).to_json(), "beat": beat})
            new = self.folder / f".{id}"
            new.write_text(json.dumps(made.to_json()))
            new.rename(self.folder / id)
            return made

    def delete(self, id: str) -> None:
        (self.folder / id).unlink(missing_ok=True)
