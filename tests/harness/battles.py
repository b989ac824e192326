"""What the crash and the replica matrix are made of: a whole site with strangers in it, and processes that are struck.

The sandbox serves over HTTPS, SSH goes through a relay, and whatever replicates runs in a process of its own.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from coriolis_azure.azure import names
from coriolis_azure.clock import Clock
from coriolis_azure.replica import manifest as manifests
from coriolis_azure.replica.destinations import Persistent
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.run import cleanup
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.sandbox.server.https import Server
from coriolis_azure.source import Source
from harness.dying import FOR_GOOD
from harness.processes import PROCESSES, command
from harness.relay import Relay

MIB = 1 << 20
GROUP = "sandbox"
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


@contextmanager
def served(azure: Sandbox) -> Iterator[dict[str, Any]]:
    """The sandbox over HTTPS; the connection info to reach it."""
    server = Server(azure.handle, azure.directory, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="server")
    thread.start()
    try:
        yield azure.connection_info(server.url)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True)
class Strike:
    """A signal to whatever process runs then, at the n-th of something.

    `where`: "lost" and "arrived" count ARM requests, and strike before Azure acts or after; "ssh" counts pieces
    of SSH in both directions, "data" bytes from the worker.
    """

    where: str
    at: int
    number: signal.Signals

    def __str__(self) -> str:
        return f"{self.number.name} at {self.where} {self.at}"


class Site:
    """A sandbox with the VM `web` of two disks, and strangers that look like resources of ours. A context manager."""

    def __init__(self, folder: Path, sizes: tuple[int, ...] = (MIB, MIB // 2)) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.azure = Sandbox(folder / "azure")
        self.relay = Relay(self.azure, direct=True)
        self.relay.blocked = True  # strikes at SSH and data are counted on one way
        self._serving = served(self.azure)
        self.connection = self._serving.__enter__()
        self.environment = {**self.azure.environment(), "chunk_size_kib": 64}
        self.owner = Source(
            self.connection,
            self.environment,
            transport=self.azure.transport(),
        )
        self.owner.journals = None
        self.requests = 0
        self.struck = False
        self.stopped_at: list[int] = []  # the numbers of the requests by which a run has a VM deallocated
        self.ill: tuple[str, int] = ("", 0)
        self._strike: Strike | None = None
        self._since = {"ssh": 0, "data": 0}
        self._pid = 0
        self._lock = threading.Lock()
        self._started = threading.Event()
        self.azure.intercept = self._intercept
        contents = []
        for number, size in enumerate(sizes):
            contents.append(folder / f"content-{number}.raw")
            contents[-1].write_bytes(random.Random(number).randbytes(size))
        self.azure.add_vm("web", contents[0], contents[1:])
        self._strangers(contents[0])
        self.before = self.azure.resources()

    def _strangers(self, content: Path) -> None:
        """Our name prefix without our tags, tags that resemble ours, and another VM."""
        self.azure.add_vm("coriolis-web", content)
        for name, tags in (
            ("coriolis-0123456789ab-nsg", {}),
            ("coriolis-ba9876543210-nsg", {"coriolis-role": "nsg", "coriolis": "run"}),
            ("coriolis-nsg", {"Coriolis-Run-Of": "last year"}),
        ):
            id = names.resource_id(self.owner.azure.subscription, GROUP, "nsg", name)
            self.owner.azure.put(id, {"location": "westeurope", "tags": tags, "properties": {}})

    def run(self, work: Callable[..., None], *arguments: Any, strike: Strike | None = None) -> int:
        """Do `work` in a process of its own; its exit code, negative for a signal. Counts go on from the last run."""
        self._strike, self._pid = strike, 0
        if strike and not self.struck and strike.where in ("ssh", "data"):
            arm = self.relay.at_piece if strike.where == "ssh" else self.relay.at
            self.relay.quiet()
            done = self.relay.pieces if strike.where == "ssh" else self.relay.received
            arm(max(1, strike.at - (done - self._since[strike.where])), self._hit)
        self._started.clear()
        child = (str(self.folder), self.ill, work, arguments)
        process = PROCESSES.Process(target=_child, args=child)
        before = set(threading.enumerate())
        process.start()
        self._pid = process.pid or 0
        self._started.set()
        process.join()
        # What was under way when the process died still reaches Azure.
        deadline = time.monotonic() + 20
        for thread in set(threading.enumerate()) - before:
            if thread.name != "relay":
                thread.join(max(0, deadline - time.monotonic()))
        self._pid, self._strike = 0, None
        assert process.exitcode is not None
        return process.exitcode

    def reset(self) -> None:
        """The next strike counts from here."""
        self.requests, self.struck, self.stopped_at = 0, False, []
        self._since = {"ssh": self.relay.pieces, "data": self.relay.received}
        self.relay.quiet()

    def _hit(self) -> None:
        if self._strike is not None and not self.struck and self._pid:
            self.struck = True
            os.kill(self._pid, self._strike.number)

    def _intercept(self, request: Request, answer: Callable[[Request], Response]) -> Response:
        return self.relay(request, lambda request: self._arm(request, answer))

    def _arm(self, request: Request, answer: Callable[[Request], Response]) -> Response:
        if not request.path.startswith("/subscriptions") or self._strike is None:
            return answer(request)
        self._started.wait()
        with self._lock:
            number, self.requests = self.requests, self.requests + 1
        due = number == self._strike.at
        if due and self._strike.where == "lost":
            self._hit()
            if self._strike.number == signal.SIGKILL:
                raise ConnectionResetError
        response = answer(request)
        if request.path.endswith("/deallocate") and response.status < 300:
            self.stopped_at.append(number)
        if due and self._strike.where == "arrived":
            self._hit()
        return response

    def write(self, name: str, content: bytes) -> None:
        """Replace what a disk of the VM holds; more makes it grow."""
        path = self.folder / "content.raw"
        path.write_bytes(content)
        self.azure.write("web", _lun(name), path)

    def attach(self, name: str, content: bytes) -> None:
        """Give the VM a new data disk, of a MiB at least."""
        azure = self.owner.azure
        id = names.resource_id(azure.subscription, GROUP, "disk", f"web-{name}")
        small = self.owner.inspect("coriolis-web").disks[0].id  # an empty disk of Azure has a GiB at least
        creation = {"createOption": "Copy", "sourceResourceId": small}
        azure.put(id, {"location": "westeurope", "properties": {"creationData": creation}})
        self._set_disks([*self._attached(), {"lun": _lun(name), "managedDisk": {"id": id}}])
        self.write(name, content)
        self.before = self.azure.resources()

    def detach(self, name: str) -> None:
        """Take a data disk from the VM, and delete it."""
        (gone,) = (disk.id for disk in self.owner.inspect("web").disks if disk.name == name)
        self._set_disks([each for each in self._attached() if each["lun"] != _lun(name)])
        self.owner.azure.delete(gone)
        self.before = self.azure.resources()

    def _attached(self) -> list[dict[str, Any]]:
        disks = self.owner.inspect("web").disks
        return [{"lun": disk.lun, "managedDisk": {"id": disk.id}} for disk in disks if disk.lun is not None]

    def _set_disks(self, entries: list[dict[str, Any]]) -> None:
        entries = [{"createOption": "Attach", **entry} for entry in entries]
        vm = self.owner.inspect("web").id
        self.owner.azure.patch_vm(vm, {"properties": {"storageProfile": {"dataDisks": entries}}})

    def power(self, state: str) -> None:
        """The owner has the VM running, deallocated, or stopped from within."""
        vm, kinds = self.owner.inspect("web"), self.owner.azure._operations("vm")
        if vm.power_state != state:
            verb = {"running": "start", "deallocated": "deallocate", "stopped": "power_off"}[state]
            getattr(kinds, f"begin_{verb}")(names.group_of(vm.id), vm.name).result()

    def disks(self) -> dict[str, bytes]:
        """What the disks of the VM hold now, by name."""
        machine = self.owner.inspect("web")
        return {
            disk.name: self.azure.content("web", "os" if disk.lun is None else disk.lun).read_bytes()
            for disk in machine.disks
        }

    def left(self) -> list[str]:
        """What is in Azure now that was not there at first, and what is missing."""
        now = {row["id"]: row for row in self.azure.resources()}
        before = {row["id"]: row for row in self.before}
        return [id for id in now.keys() | before.keys() if now.get(id) != before.get(id)]

    def close(self) -> None:
        self.azure.intercept = None
        self.owner.close()
        self._serving.__exit__(None, None, None)
        self.relay.close()
        self.azure.close()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _lun(name: str) -> str | int:
    return "os" if name == "os" else int(name.removeprefix("data-"))


def _child(folder: str, ill: tuple[str, int], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """The beginning of every process that may be struck; `ill` is what does not work in it, and when."""
    os.environ["XDG_STATE_HOME"] = folder
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sink = os.open(folder + "/log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(sink, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    kind, at = ill
    if kind == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif kind == "error":
        _break_writes(at)
    elif kind == "uncommitted":
        _die_before_commit()
    elif kind == "slow":  # waits take a fiftieth of the time
        FOR_GOOD.setattr(Clock, "monotonic", lambda clock: 50 * time.monotonic())
        FOR_GOOD.setattr(Clock, "sleep", lambda clock, seconds: time.sleep(seconds / 50))
    work(*arguments)


def _break_writes(at: int) -> None:
    """The medium fails at the n-th write, and from then on."""
    pwrite, count = os.pwrite, itertools.count()

    def broken(fd: int, data: Any, offset: int) -> int:
        if next(count) >= at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwrite(fd, data, offset)

    os.pwrite = broken


def _die_before_commit() -> None:
    """The process dies when the content of the OS disk is at the destination and its manifest is not."""
    from coriolis_azure import transfer

    verified = transfer._Copy._verified

    def dying(copy: Any, manifest: Any) -> Any:
        if copy._progress.disk == "os":
            os.kill(os.getpid(), signal.SIGKILL)
        return verified(copy, manifest)

    FOR_GOOD.setattr(transfer._Copy, "_verified", dying)


# The two fronts


class CommandLine:
    """`coriolis-azure replicate` to a folder; the next run on this host cleans up after a dead one."""

    name = "command line"
    interrupted = 130
    shutdown = False  # whether the VM's owner wants it to be shut down for a run

    def __init__(self, site: Site) -> None:
        self.site = site
        self.to: Path | str = site.folder / "images"
        self._settings = []
        for flag, name in (("-c", "connection"), ("-e", "environment")):
            path = site.folder / f"{name}.json"
            path.write_text(json.dumps(getattr(site, name)))
            self._settings += [flag, str(path)]

    def replicate(
        self, strike: Strike | None = None, at: tuple[int, Callable[[], None]] | None = None
    ) -> int:
        """One run; its exit code. `at`: what happens once so many bytes have come from the worker."""
        self.site.reset()
        if at:
            self.site.relay.at(*at)
        line = ["replicate", *self._settings, "web", "--to", str(self.to), "--json"]
        line += ["--shutdown"] if self.shutdown else []
        return self.site.run(command, line, strike=strike)

    def clean(self) -> list[str]:
        """What the next run does first; ids that stayed."""
        journals = self.site.folder / "coriolis-azure"
        return cleanup.sweep(self.site.owner.context, cleanup.DEAD_AFTER, journals)[1]

    def images(self) -> dict[str, Path]:
        """The destination's files by disk."""
        return {path.stem: path for path in Path(self.to).glob("*.raw")}

    def ahead(self) -> list[str]:
        """The disks whose manifest says more than is at the destination, once somebody has opened it again."""
        if Path(self.to).is_dir():
            ImageFolder(Path(self.to)).close()
        return ahead(self.images())


class Plugin:
    """The plugin's calls, each in a process of its own, in the orchestrator's order; it cleans up after a dead one."""

    name = "plugin"
    interrupted = 1
    shutdown = False

    def __init__(self, site: Site, target: dict[str, Any] | None = None) -> None:
        self.site = site
        self.target = target or {"backend": "file_backup_writer", "connection_details": {}}
        self.entries: list[dict[str, Any]] = []
        self._deployed: Any = None
        (site.folder / "volumes").mkdir()

    def replicate(
        self, strike: Strike | None = None, at: tuple[int, Callable[[], None]] | None = None
    ) -> int:
        """One execution; the exit code of the first call that failed. A dead one is cleaned up as a task of its own."""
        site = self.site
        site.reset()
        if at:
            site.relay.at(*at)
        self._deployed = None
        info = self._volumes()
        code, deployed = self._call(strike, "deploy_replica_source_resources", info, site.environment)
        if code:
            return code
        made, reached = deployed["migr_resources"], deployed["connection_info"]
        copied = self._call(strike, "shutdown_instance", site.environment, "web")[0] if self.shutdown else 0
        if not copied:
            copied, entries = self._call(
                strike,
                "replicate_disks",
                *(site.environment, "web", made, reached, self.target, self.entries, True),
            )
            self.entries = self.entries if copied else entries
        deleted, _ = self._call(strike, "delete_replica_source_resources", site.environment, made)
        self._deployed = made if deleted else None
        return copied or deleted

    def clean(self) -> list[str]:
        """What is done next: the deleting is tried again; of a deployment that died only sweeps know."""
        if self._deployed:
            code, _ = self._call(
                None, "delete_replica_source_resources", self.site.environment, self._deployed
            )
            return self.site.left() if code else []
        return cleanup.sweep(self.site.owner.context, timedelta(0), None)[1]

    def images(self) -> dict[str, Path]:
        """The volumes by disk."""
        by_id = {entry["disk_id"].lower(): Path(entry["volume_dev"]) for entry in self.entries}
        return {disk.name: by_id[disk.id.lower()] for disk in self.site.owner.inspect("web").disks}

    def ahead(self) -> list[str]:
        """The disks whose manifest says more than is at the destination."""
        return ahead(self.images())

    def _call(self, strike: Strike | None, method: str, *arguments: Any) -> tuple[int, Any]:
        """A call in a process of its own; exit code and result."""
        answer = self.site.folder / "answer.json"
        answer.unlink(missing_ok=True)
        code = self.site.run(
            call, json.dumps([method, self.site.connection, arguments]), str(answer), strike=strike
        )
        return code, json.loads(answer.read_text()) if answer.exists() else None

    def _volumes(self) -> Any:
        """What the destination's plugin does: a blank volume for every new disk, none for one that is gone."""
        from coriolis_azure.machine.export_info import export_info

        info = export_info(self.site.owner.inspect("web"))
        known = {entry["disk_id"].lower(): entry for entry in self.entries}
        self.entries = []
        for disk in info["devices"]["disks"]:
            entry = known.get(disk["id"].lower())
            if entry is None:
                path = self.site.folder / "volumes" / f"{len(list((self.site.folder / 'volumes').iterdir()))}"
                path.touch()
                entry = {"disk_id": disk["id"], "volume_dev": str(path), "zeroed": True}
            if self.target["backend"] != "file_backup_writer":
                os.truncate(entry["volume_dev"], disk["size_bytes"])
            self.entries.append(entry)
        return info


def call(text: str, answer: str) -> None:
    """A process: one call of the plugin."""
    from coriolis_azure.plugin.provider import AzureExportProvider

    method, connection, arguments = json.loads(text)
    given = getattr(AzureExportProvider(None), method)(None, connection, *arguments)
    new = Path(answer + ".new")
    new.write_text(json.dumps(given))
    new.rename(answer)


# The crash matrix


@dataclass
class Crashes:
    """The figures of a crash matrix."""

    strikes: int = 0
    hit: int = 0
    cleaned: int = 0
    leaks: int = 0
    power_changed: int = 0
    manifests_ahead: int = 0
    wrong: list[str] = field(default_factory=list)


def measure(front: CommandLine | Plugin) -> tuple[int, int, int]:
    """A run that nothing strikes: how many ARM requests, pieces of SSH and bytes of data it has."""
    received, pieces = front.site.relay.received, front.site.relay.pieces
    assert front.replicate(Strike("lost", -1, signal.SIGKILL)) == 0, (front.site.folder / "log").read_text()
    assert not front.site.left()
    return front.site.requests, front.site.relay.pieces - pieces, front.site.relay.received - received


def around_shutdown(front: CommandLine | Plugin) -> list[Strike]:
    """Strikes at the requests before the one that has the VM deallocated, at it, and after it."""
    front.shutdown = True
    front.site.power("running")
    measure(front)
    front.shutdown = False
    (at,) = front.site.stopped_at
    assert front.site.owner.inspect("web").power_state == "deallocated"
    lost = [Strike("lost", at + step, signal.SIGKILL) for step in (0, -1, 1)]
    return [*lost, *(Strike("arrived", at + step, number) for step in (0, -1, 1, 2) for number in SIGNALS)]


def crash(
    front: CommandLine | Plugin,
    strike: Strike,
    figures: Crashes,
    chance: random.Random,
    power: str = "running",
    shutdown: bool = False,
) -> None:
    """One run that is struck, what is done after it, and what must hold then.

    `power`: what the VM's owner has made of it before. With `shutdown` they want it deallocated for the run.
    """
    site = front.site
    figures.strikes += 1
    site.power(power)
    front.shutdown = shutdown
    for name, content in site.disks().items():
        half = len(content) // 2
        site.write(name, content[:half] + chance.randbytes(len(content) - half))
    code = front.replicate(strike)
    front.shutdown = False
    figures.hit += site.struck
    if not site.struck:
        codes = {0}
    elif strike.number == signal.SIGKILL:
        codes = {0, -signal.SIGKILL}
    else:
        codes = {0, front.interrupted, -strike.number}
    wrong = [] if code in codes else [f"exit code {code}"]
    if site.left():
        figures.cleaned += 1
        if strike.number != signal.SIGKILL and isinstance(front, CommandLine):
            wrong.append("an interrupted run did not undo itself")
        wrong += [f"stayed: {id}" for id in front.clean()]
    if left := site.left():
        figures.leaks += 1
        wrong.append(f"left or touched: {left}")
    # Deallocated if Azure was told so while the owner wanted it, else as it was; and told no more than once.
    chosen = "deallocated" if shutdown and site.stopped_at else power
    found = [site.owner.inspect(vm).power_state for vm in ("web", "coriolis-web")]
    if found != [chosen, "running"] or len(site.stopped_at) > shutdown:
        figures.power_changed += 1
        wrong.append(
            f"the VM and the stranger are {found}, after {len(site.stopped_at)} requests to shut down"
        )
    if front.ahead():
        figures.manifests_ahead += 1
        wrong.append("a manifest says more than is there")
    if wrong:
        log = (site.folder / "log").read_text()[-2000:]
        run = f"{front.name}, {power}{', to be shut down' if shutdown else ''}, {strike}"
        figures.wrong.append(f"{run}: {'; '.join(wrong)}\n{log}")


def ahead(images: dict[str, Path]) -> list[str]:
    """The images beside which a manifest says more than they hold."""
    from harness.images import Image

    found = []
    for name, path in images.items():
        if path.exists():
            with Image(path) as image:
                if not honest(image):
                    found.append(name)
    return found


def honest(image: Persistent) -> bool:
    """Whether an image holds all that its manifest says of it."""
    from coriolis_azure import errors
    from coriolis_azure.replica import comparison

    try:
        manifest = image.stored()
    except errors.InvalidInput:
        return True
    known = (i for i in range(manifest.count) if manifest.digest(i) != manifests.UNKNOWN)
    return not list(comparison.differing(image, manifest, known))
