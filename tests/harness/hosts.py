"""Worker hosts of the orchestrator, and transfers whose tasks run on them in turn.

They share nothing but Azure, a destination, and what the orchestrator's database stores as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from coriolis_azure.plugin.provider import AzureExportProvider
from coriolis_azure.sandbox import Sandbox
from harness.conductor import TIMES
from harness.processes import Forked

Json = dict[str, Any]


class Host:
    """What a host has to itself, in a folder: homes, journals, temporary files. `tasks` counts what ran there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tasks: Counter[str] = Counter()
        folder.mkdir()

    def task(self, method: str, *arguments: Any) -> Forked:
        """One call of the plugin, in a process that has nothing but this host. It prints what it returns."""
        self.tasks[method] += 1
        return Forked(task, str(self.folder), json.dumps([method, arguments]))

    def lose_all(self) -> list[str]:
        """Nothing of what was put down here is left; the files that there were."""
        found = sorted(
            str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()
        )
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        return found


def task(host: str, text: str) -> None:
    """A process: one call of the plugin."""
    for name in ("HOME", "TMPDIR", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        place = Path(host) / name.lower()
        place.mkdir(exist_ok=True)
        os.environ[name] = str(place)
    os.chdir(host)
    tempfile.tempdir = None  # found anew
    for module, name, seconds in TIMES:
        setattr(module, name, seconds)
    method, arguments = json.loads(text)
    print(json.dumps(getattr(AzureExportProvider(None), method)(None, *arguments)))


class Transfer:
    """A transfer of one VM: `stored` is its row in the orchestrator's database."""

    def __init__(self, azure: Sandbox, connection: Json, vm: str, target: Json, **settings: Any) -> None:
        self.vm, self._azure = vm, azure
        self._connection, self._target = connection, json.loads(json.dumps(target))
        self.environment = {**azure.environment(), "chunk_size_kib": 128, **settings}
        info = self._call(None, "get_replica_instance_info", self.environment, vm)
        self.stored = json.dumps({"info": info, "entries": []})

    def of(self, name: str) -> Any:
        """A column of the row."""
        return json.loads(self.stored)[name]

    def store(self, **columns: Any) -> None:
        """Change columns of the row."""
        self.stored = json.dumps({**json.loads(self.stored), **columns})

    def _call(self, host: Host | None, method: str, *arguments: Any) -> Any:
        """A task on that host, to its end; where none is given, in this process, which takes a tenth of the time."""
        if host:
            return self._returned(host.task(method, self._connection, *arguments))
        return getattr(AzureExportProvider(None), method)(None, self._connection, *arguments)

    def _returned(self, task: Forked) -> Any:
        with task:
            out, errors = task.communicate(timeout=600)
        assert task.returncode == 0, f"{self.vm}: {errors}"
        return json.loads(out)

    def make_volumes(self, folder: Path) -> None:
        """What the destination does: a blank volume for each disk."""
        folder.mkdir()
        entries = []
        for number, disk in enumerate(self.of("info")["devices"]["disks"]):
            path = folder / f"volume-{number}"
            path.write_bytes(bytes(disk["size_bytes"]))
            entries.append({"disk_id": disk["id"], "volume_dev": str(path), "zeroed": True})
        self.store(entries=entries)

    def deploy(self, host: Host | None) -> None:
        """DEPLOY_TRANSFER_SOURCE_RESOURCES."""
        method = "deploy_replica_source_resources"
        self.store(deployed=self._call(host, method, self.of("info"), self.environment))

    def copying(self, host: Host, **settings: Any) -> Forked:
        """REPLICATE_DISKS, from its start."""
        deployed = self.of("deployed")
        return host.task(
            "replicate_disks",
            *(self._connection, {**self.environment, **settings}, self.vm, deployed["migr_resources"]),
            *(deployed["connection_info"], self._target, self.of("entries"), True),
        )

    def copy(self, host: Host) -> None:
        """REPLICATE_DISKS, to its end."""
        self.store(entries=self._returned(self.copying(host)))

    def undeploy(self, host: Host | None) -> None:
        """DELETE_TRANSFER_SOURCE_RESOURCES."""
        made = self.of("deployed")["migr_resources"]
        self._call(host, "delete_replica_source_resources", self.environment, made)

    def give_up(self) -> None:
        """DELETE_TRANSFER_DISKS, as far as it is the source's."""
        method = "delete_replica_source_snapshots"
        self.store(entries=self._call(None, method, self.environment, self.of("entries")))

    def volumes(self) -> list[Path]:
        """The volumes, in the order of the disks."""
        return [Path(entry["volume_dev"]) for entry in self.of("entries")]

    def wrong(self) -> list[str]:
        """The volumes that are not their disks."""
        disks = [self._azure.disk(entry["disk_id"]).path for entry in self.of("entries")]
        pairs = zip(self.volumes(), disks, strict=True)
        return [str(volume) for volume, disk in pairs if volume.read_bytes() != disk.read_bytes()]
