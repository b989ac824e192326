"""Manages the sandbox's guests: starts their processes, attaches disks, ends them.

Each guest has its own folder below DIR/guests. The sandbox and the guest share only that folder and two pipes. Disks
are links in the folder's `dev`, so attaching and detaching takes effect at once. The guest reports on stdout when it is
reachable, or why it is not; when its stdin ends, the sandbox is gone and the guest exits.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import string
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from coriolis_azure.sandbox.wire import Json

_GUEST_PROGRAM = Path(__file__).with_name("guest.py")
# Runs the program by its path: importing this package would triple its start-up time. paramiko imports invoke for
# commands in SSH's configuration files, which nobody needs here and which takes a third of that time.
_START = """\
import runpy, sys
sys.modules["invoke"] = None
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
_BOOT_SECONDS = 30.0


@dataclass(frozen=True)
class Boot:
    """The configuration of a guest. If customData is unreadable, `cloud_config` is a text that says why."""

    machine: str
    folder: str
    user: str
    keys: list[str]
    address: str | None
    controller: str
    rules: list[list[Json]]
    cloud_config: Json | str | None = field(default=None, repr=False)


@dataclass
class _Guest:
    boot: Boot
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    outcome: Json = field(default_factory=dict)
    settled: threading.Event = field(default_factory=threading.Event)


class Guests:
    """All guests of one sandbox, by the id of their VM."""

    def __init__(self, directory: Path, *, namespaces: bool) -> None:
        self._directory = directory
        self._namespaces = namespaces
        self._guests: dict[str, _Guest] = {}
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700, parents=True)

    def known(self, machine_id: str) -> bool:
        """Whether this VM has a guest now."""
        return machine_id.lower() in self._guests

    def booting(self, machine_id: str) -> bool:
        """Whether the VM's guest is neither reachable nor failed yet."""
        guest = self._guests.get(machine_id.lower())
        return guest is not None and not guest.settled.is_set()

    def wait(self, machine_id: str) -> None:
        """Wait until the VM's guest is no longer booting; return at once if there is none."""
        guest = self._guests.get(machine_id.lower())
        if guest is not None:
            guest.settled.wait(_BOOT_SECONDS)

    def failure(self, machine_id: str) -> str | None:
        """Why the VM's guest did not boot; None if it did or there is none."""
        guest = self._guests.get(machine_id.lower())
        return guest.outcome.get("error") if guest else None

    def prepare(self, boot: Boot) -> None:
        """Create the folder of a guest before it starts."""
        self.stop(boot.machine)
        folder = self._directory / boot.folder
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("dev/disk/azure", "bin", "home", "root"):
            (folder / name).mkdir(mode=0o755, parents=True)
        document = {
            "user": boot.user,
            "keys": boot.keys,
            "address": boot.address,
            "namespaces": self._namespaces,
            "python": sys.executable,
            "cloud_config": boot.cloud_config,
        }
        _write(folder / "guest.json", document)
        _write(folder / "rules.json", boot.rules)
        self._guests[boot.machine.lower()] = _Guest(boot, folder)

    def start(self, machine_id: str) -> None:
        """Start a prepared guest; `wait` tells when it is up."""
        guest = self._guests[machine_id.lower()]
        if guest.boot.address is None:  # unreachable from this machine, as in Azure without a public address
            guest.outcome = {"ready": False}
            guest.settled.set()
            return
        with (guest.folder / "guest.log").open("ab") as log:
            guest.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-c", _START, str(_GUEST_PROGRAM), str(guest.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        if guest.process.stdout is not None:
            threading.Thread(target=_listen, args=(guest, guest.process.stdout), daemon=True).start()

    def stop(self, machine_id: str) -> None:
        """End a guest, if there is one, with everything that runs in it."""
        guest = self._guests.pop(machine_id.lower(), None)
        if guest is None:
            return
        process = guest.process
        if process is not None:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        guest.settled.set()

    def forget(self, machine_id: str) -> None:
        """Stop the guest and remove its folder."""
        guest = self._guests.get(machine_id.lower())
        self.stop(machine_id)
        if guest is not None:
            shutil.rmtree(guest.folder, ignore_errors=True)

    def close(self) -> None:
        """End all guests."""
        for machine_id in list(self._guests):
            self.stop(machine_id)

    def allow(self, machine_id: str, rules: list[list[Json]]) -> None:
        """Replace the rules that decide which connections the guest accepts."""
        _write(self._guests[machine_id.lower()].folder / "rules.json", rules)

    def attach(self, machine_id: str, lun: int | None, content: Path) -> None:
        """Attach a disk to the guest at this LUN; None means the OS disk."""
        guest = self._guests[machine_id.lower()]
        dev = guest.folder / "dev"
        nvme = guest.boot.controller == "NVMe"
        device = _free_device(dev, nvme=nvme)
        device.symlink_to(content.absolute())
        link = _link(dev, lun, nvme=nvme)
        link.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(device, link.parent))

    def detach(self, machine_id: str, lun: int) -> None:
        """Detach the disk at this LUN, if the VM has a guest."""
        guest = self._guests.get(machine_id.lower())
        if guest is None:
            return
        link = _link(guest.folder / "dev", lun, nvme=guest.boot.controller == "NVMe")
        if link.is_symlink():
            device = link.parent / link.readlink()
            link.unlink()
            device.unlink(missing_ok=True)


def _listen(guest: _Guest, stdout: IO[bytes]) -> None:
    """Read the one line that a guest reports; the end of its output counts as a failure too."""
    with stdout:
        line = stdout.readline()
    try:
        guest.outcome = json.loads(line)
    except ValueError:
        tail = ""
        with contextlib.suppress(OSError):  # the folder may have been deleted with the VM
            tail = (guest.folder / "guest.log").read_text(errors="replace")[-500:]
        guest.outcome = {"error": f"the guest ended before it was reachable. {tail}".strip()}
    guest.settled.set()


def _free_device(dev: Path, *, nvme: bool) -> Path:
    """A random unused device name, so that its letter does not follow from the LUN."""
    if nvme:
        names = [f"nvme0n{number}" for number in range(1, 80)]
    else:
        letters = string.ascii_lowercase
        names = [f"sd{first}" for first in letters] + [
            f"sd{first}{second}" for first in "ab" for second in letters
        ]
    return dev / random.choice([name for name in names if not (dev / name).is_symlink()])  # noqa: S311


def _link(dev: Path, lun: int | None, *, nvme: bool) -> Path:
    azure = dev / "disk" / "azure"
    if lun is None:
        return azure / ("os" if nvme else "root")
    return azure / "data" / "by-lun" / str(lun) if nvme else azure / "scsi1" / f"lun{lun}"


def _write(path: Path, document: object) -> None:
    """Replace a file of the guest, readable only by its owner, because one has the host key."""
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(document))
    temporary.replace(path)
