"""The plugin reads snapshots: no worker, and from the third execution on only what has changed.

Each call goes through strict JSON, into a provider of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure.azure import names
from coriolis_azure.plugin.provider import AzureExportProvider
from coriolis_azure.sandbox import Sandbox
from harness.battles import served
from harness.constants import MIB
from harness.writer_targets import HttpsTarget, SshTarget

pytestmark = pytest.mark.slow

SIZE = 2 * MIB
CHUNK = 64 << 10
KEPT = {"replica_export_mechanism": "snapshots", "keep_baseline": True, "chunk_size_kib": CHUNK >> 10}
FILES = {"backend": "file_backup_writer", "connection_details": {"ip": "127.0.0.1", "port": 22}}
Json = dict[str, Any]


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
    """The sandbox with `web` of two disks, and a target."""

    def __init__(self, azure: Sandbox, connection: Json, folder: Path, target: Json) -> None:
        self.azure, self.connection, self.folder, self.target = azure, connection, folder, strict(target)
        paths = [folder / "os.raw", folder / "data.raw"]
        for number, path in enumerate(paths):
            path.write_bytes(random.Random(number).randbytes(SIZE // 2) + bytes(SIZE // 2))
        azure.add_vm("web", paths[0], [paths[1]])
        self.info = self.call("get_replica_instance_info", azure.environment(), "web")[0]
        self.disks = [azure.disk(disk["id"]) for disk in self.info["devices"]["disks"]]
        self.before = azure.resources()

    def call(self, method: str, *arguments: Any) -> tuple[Any, list[str]]:
        """One call of the plugin: what it returns, and the progress updates."""
        told = Told()
        returned = getattr(AzureExportProvider(told), method)(None, *strict([self.connection, *arguments]))
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

    def execute(self, *, stored: bool = True) -> list[str]:
        """One execution, in the orchestrator's order; the progress updates of copying. `stored`: nothing is lost."""
        place, environment = self.place, self.environment
        place.call("validate_replica_export_input", "web", environment)
        info, _ = place.call("get_replica_instance_info", environment, "web")
        deployed, _ = place.call("deploy_replica_source_resources", info, environment)
        resources, reached = deployed["migr_resources"], deployed["connection_info"]
        arguments = (environment, "web", resources, reached, place.target, self.entries, True)
        try:
            entries, told = place.call("replicate_disks", *arguments)
        finally:
            place.call("delete_replica_source_resources", environment, resources)
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

    def baselines(self) -> list[str]:
        """The ids of the baselines that the stored states name."""
        return sorted(entry["replica_state"]["baseline"]["id"].lower() for entry in self.entries)


def copied(told: list[str], disk: str) -> str:
    """What was told of a copied disk."""
    (line,) = (line for line in told if line.startswith(f"copied {disk}"))
    return line


@pytest.fixture(params=["file", "ssh", "https"])
def place(request: pytest.FixtureRequest, azure: Sandbox, tmp_path: Path) -> Iterator[Place]:
    target: SshTarget | HttpsTarget | None = None
    if request.param != "file":
        target = (SshTarget if request.param == "ssh" else HttpsTarget)(tmp_path / "receiver")
    try:
        with served(azure) as connection:
            yield Place(azure, connection, tmp_path, target.info if target else FILES)
    finally:
        azure.intercept = None
        if target:
            target.close()


ON_FILES = pytest.mark.parametrize("place", ["file"], indirect=True)
OVER_SSH = pytest.mark.parametrize("place", ["ssh"], indirect=True)


def test_the_third_execution_reads_only_what_changed(place: Place) -> None:
    transfer = Transfer(place)
    for execution in range(4):
        told = transfer.execute()
        assert place.left() == transfer.baselines()
        line = copied(told, "os")
        assert ("lists no change there" in line) == (execution > 1), line
        if execution > 1:  # the changed chunk, and one in 32 of the others
            assert "os: 128 KiB read, 64 KiB sent" in line, line
        place.write(0, 12 + execution, execution)
        place.write(1, 20 + execution)
    transfer.execute()
