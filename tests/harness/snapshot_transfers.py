"""Transfers whose disks the plugin reads from snapshots: what the orchestrator does, through strict JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from coriolis_azure.azure import names
from coriolis_azure.plugin.provider import AzureExportProvider
from coriolis_azure.sandbox import Sandbox
from harness.constants import MIB

Json = dict[str, Any]
SIZE = 2 * MIB
CHUNK = 64 << 10
KEPT = {"replica_export_mechanism": "snapshots", "keep_baseline": True, "chunk_size_kib": CHUNK >> 10}
FILES: Json = {"backend": "file_backup_writer", "connection_details": {"ip": "127.0.0.1", "port": 22}}
NOT_READ = "lists no change there"  # what an execution tells that has relied on Azure's list


class Told:
    """The orchestrator's event handler: keeps the progress updates."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add_progress_update(self, message: str, **options: Any) -> Json:
        self.lines.append(message)
        return {"index": 0}

    def update_progress_update(self, *arguments: Any, **options: Any) -> None:
        pass

    def get_progress_update_identifier(self, progress_update: Json) -> int:
        return int(progress_update["index"])


def strict(value: Any) -> Any:
    """The value after the orchestrator's queue and database."""
    return json.loads(json.dumps(value, allow_nan=False))


class Place:
    """The sandbox with `web` of two disks, and the target of its transfers."""

    def __init__(self, azure: Sandbox, connection: Json, folder: Path, target: Json = FILES) -> None:
        self.azure, self.connection, self.folder, self.target = azure, connection, folder, strict(target)
        paths = [folder / "os.raw", folder / "data.raw"]
        for number, path in enumerate(paths):
            path.write_bytes(random.Random(number).randbytes(SIZE // 2) + bytes(SIZE // 2))
        azure.add_vm("web", paths[0], [paths[1]])
        self.info = self.call("get_replica_instance_info", azure.environment(), "web")[0]
        self.disks = [azure.disk(disk["id"]) for disk in self.info["devices"]["disks"]]
        self.before = azure.resources()

    def call(self, method: str, *arguments: Any) -> tuple[Any, list[str]]:
        """One call of a provider of its own: what it returns, and the progress updates."""
        told = Told()
        given = strict([self.connection, *arguments])
        returned = getattr(AzureExportProvider(told), method)(None, *given)
        return strict(returned), told.lines

    def write(self, disk: int, chunk: int, seed: int = 7) -> None:
        """Change 4 KiB in a chunk of a disk."""
        self.disks[disk].write(chunk * CHUNK + 8192, random.Random(seed).randbytes(4096))

    def left(self) -> list[str]:
        """The ids of what runs have made that still exists, but for the records of volumes."""
        known = {each["id"] for each in self.before}
        return sorted(
            each["id"].lower()
            for each in self.azure.resources()
            if each["id"] not in known and names.VOLUME_TAG not in (each.get("tags") or {})
        )


class Transfer:
    """A transfer of `web`: its settings, and what the orchestrator stores of its volumes."""

    def __init__(self, place: Place, name: str = "volumes", **environment: Any) -> None:
        self.place = place
        self.environment = {**place.azure.environment(), **KEPT, **environment}
        folder = place.folder / name
        folder.mkdir()
        self.entries: list[Json] = []
        for number, disk in enumerate(place.info["devices"]["disks"]):
            path = folder / f"volume-{number}"
            with path.open("wb") as file:
                if place.target["backend"] != "file_backup_writer":
                    file.truncate(SIZE)
            self.entries.append({"disk_id": disk["id"], "volume_dev": str(path), "zeroed": True})

    def begin(self) -> tuple[Json, Json]:
        """The tasks before the copying; what the deployment returns for the following ones."""
        place, environment = self.place, self.environment
        place.call("validate_replica_export_input", "web", environment)
        info, _ = place.call("get_replica_instance_info", environment, "web")
        deployed, _ = place.call("deploy_replica_source_resources", info, environment)
        return deployed["migr_resources"], deployed["connection_info"]

    def end(self, resources: Json) -> None:
        """The task after the copying, however that ended."""
        self.place.call("delete_replica_source_resources", self.environment, resources)

    def copying(self, resources: Json, reached: Json) -> tuple[Any, ...]:
        """The arguments of `replicate_disks`, but for the connection."""
        return self.environment, "web", resources, reached, self.place.target, self.entries, True

    def execute(self, *, stored: bool = True) -> list[str]:
        """One execution; the progress updates of its copying. `stored`: its result is not lost."""
        resources, reached = self.begin()
        try:
            entries, told = self.place.call("replicate_disks", *self.copying(resources, reached))
        finally:
            self.end(resources)
        if stored:
            self.entries = entries
        self.check()
        return told

    def check(self) -> None:
        """The volumes are right."""
        for number, (entry, disk) in enumerate(zip(self.entries, self.place.disks, strict=True)):
            assert Path(entry["volume_dev"]).read_bytes() == disk.path.read_bytes(), number

    def update(self, **settings: Any) -> None:
        """TRANSFER_UPDATE."""
        arguments = ("web", self.entries, self.environment, settings)
        self.entries, _ = self.place.call("check_update_source_environment_params", *arguments)
        self.environment |= settings

    def give_up(self) -> None:
        """DELETE_TRANSFER_DISKS, as far as it is the source's."""
        entries = self.place.call("delete_replica_source_snapshots", self.environment, self.entries)[0]
        assert [entry["disk_id"] for entry in entries] == [entry["disk_id"] for entry in self.entries]
        assert not any("replica_state" in entry for entry in entries)
        self.entries = entries

    def baselines(self) -> list[str]:
        """The ids of the baselines that the stored states name."""
        states = [entry["replica_state"] for entry in self.entries if "replica_state" in entry]
        return sorted(state["baseline"]["id"].lower() for state in states if "baseline" in state)


def copied(told: list[str], disk: str) -> str:
    """What was told of a copied disk."""
    (line,) = (line for line in told if line.startswith(f"copied {disk}"))
    return line
