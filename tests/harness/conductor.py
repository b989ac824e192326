"""What the orchestrator is for a plugin: a conductor that stores what tasks return, services that run them.

A service is a process, and starts one for each task. Everything goes through strict JSON. The conductor stores a task's
result only if the service lives to pass it on and nobody has given the task up meanwhile.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coriolis_azure.plugin import claims
from coriolis_azure.plugin.provider import AzureExportProvider
from coriolis_azure.run import resources, stalled
from harness.constants import MIB
from harness.processes import Forked
from harness.waiting import eventually

# Of claims and deployments, short enough to wait for.
TIMES = (
    (claims, "RENEW_SECONDS", 0.3),
    (claims, "LEASE_SECONDS", 2.0),
    (claims, "FENCE_SECONDS", 3.0),
    (resources, "DEPLOY_BEAT_SECONDS", 1.0),
    (stalled, "STALLED_SECONDS", 4.0),
)


class Handler:
    """The orchestrator's event handler, as far as the plugin uses it."""

    def add_progress_update(self, message: str, **options: Any) -> dict[str, int]:
        print(message, flush=True)
        return {"index": 0}

    def update_progress_update(self, *arguments: Any, **options: Any) -> None:
        pass

    def get_progress_update_identifier(self, progress_update: dict[str, int]) -> int:
        return progress_update["index"]

    def add_event(self, text: str, level: str = "") -> None:
        print(text, flush=True)


def service(text: str) -> None:
    """A process: it starts the task's, tells its id, and passes on what comes back."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=task, args=(text, results))
    process.start()
    print(json.dumps({"pid": process.pid}), flush=True)
    result = None
    while result is None:
        alive = process.is_alive()
        try:
            result = results.get(timeout=0.05)
        except queue.Empty:
            if not alive:
                break
    process.join()
    print(json.dumps(result or {"cancelled": process.exitcode}), flush=True)


def task(text: str, results: Any) -> None:
    """A process: one call of the plugin."""
    for module, name, seconds in TIMES:
        setattr(module, name, seconds)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    method, arguments = json.loads(text)
    try:
        returned = getattr(AzureExportProvider(Handler()), method)(None, *arguments)
        results.put({"returned": json.loads(json.dumps(returned))})
    except Exception as error:  # noqa: BLE001 - as the orchestrator does
        results.put({"error": f"{type(error).__name__}: {error}"})


class Task:
    """One task, from its start. A context manager that waits for its end."""

    def __init__(self, method: str, *arguments: Any) -> None:
        self._service = Forked(service, json.dumps([method, arguments]))
        self.pid: int = json.loads(self._service.stdout.readline())["pid"]
        self._told: list[str] = []

    def signal(self, number: int) -> None:
        """To the task's process."""
        os.kill(self.pid, number)

    def kill_service(self) -> None:
        """The service is gone; the task's process is not."""
        self._service.kill()

    def lives(self) -> bool:
        """Whether the task's process still runs."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    def says(self, words: str) -> bool:
        """Whether the task tells of this before it ends; waits for either."""
        for line in self._service.stdout:
            self._told.append(line)
            if words in line:
                return True
        return False

    def wait_for_end(self) -> None:
        """Until the task's process has ended, whatever has become of its service."""
        eventually(lambda: not self.lives())

    def result(self) -> dict[str, Any]:
        """{"returned": ...}, {"error": ...}, {"cancelled": ...}; {} where the service is gone. Waits for the end."""
        out, self.errors = self._service.communicate(timeout=120)
        last = [line for line in (*self._told, *out.splitlines()) if line.strip()][-1:]
        found: dict[str, Any] = json.loads(last[0]) if last and last[0].startswith("{") else {}
        return {} if "pid" in found else found

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *error: object) -> None:
        if self.lives() and error[0]:
            os.kill(self.pid, signal.SIGKILL)
        self._service.__exit__(*error)


class Transfer:
    """A transfer of the VM `web` to volumes in `folder`, through a pool's worker or one of its own."""

    def __init__(self, connection: Any, environment: Any, target: Any, folder: Path, worker: Any) -> None:
        self.connection, self.environment, self.worker = connection, dict(environment), worker
        self.target = json.loads(json.dumps(target))
        self.info = self.here("get_replica_instance_info", self.connection, self.environment, "web")
        folder.mkdir()
        self.entries: list[dict[str, Any]] = []
        for number, disk in enumerate(self.info["devices"]["disks"]):
            path = folder / f"volume-{number}"
            with path.open("wb") as file:
                file.truncate(disk["size_bytes"] + MIB)
            self.entries.append({"disk_id": disk["id"], "volume_dev": str(path), "zeroed": True})
        self.deploy: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda entries: entries

    def here(self, method: str, *arguments: Any) -> Any:
        """A call that a test is not about, in this process."""
        through = json.loads(json.dumps(arguments))
        return json.loads(json.dumps(getattr(AzureExportProvider(None), method)(None, *through)))

    def start(self, worker: Any = None, **environment: Any) -> Task:
        """REPLICATE_DISKS; what the destination has deployed before it is stored."""
        self.entries = json.loads(json.dumps(self.deploy(self.entries)))
        resources, reached = worker or self.worker
        settings = {**self.environment, **environment}
        return Task(
            "replicate_disks",
            *(self.connection, settings, "web", resources, reached, self.target, self.entries, True),
        )

    def store(self, task: Task) -> None:
        """The task is completed: its result is kept."""
        result = task.result()
        assert "returned" in result, f"{result} {task.errors}"
        self.entries = result["returned"]

    def execute(self, worker: Any = None, **environment: Any) -> None:
        """A good execution."""
        with self.start(worker, **environment) as task:
            self.store(task)

    def update(self, **settings: Any) -> None:
        """TRANSFER_UPDATE."""
        update = ("web", self.entries, self.environment, settings)
        self.entries = self.here("check_update_source_environment_params", self.connection, *update)
        self.environment |= settings

    def content(self, number: int) -> bytes:
        """What a volume holds, without what it is larger by."""
        return Path(self.entries[number]["volume_dev"]).read_bytes()[:-MIB]
