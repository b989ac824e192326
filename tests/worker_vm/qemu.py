"""A worker as a virtual machine of QEMU: two SCSI controllers as on Azure, disks that come and go while it runs.

Everything stays on this machine's loopback: the guest's network is QEMU's own, restricted to the forwarded ports.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import debian

from coriolis_azure import errors
from coriolis_azure.clock import Clock
from coriolis_azure.events import silent
from coriolis_azure.model import Worker
from coriolis_azure.readers import keys as ssh_keys
from coriolis_azure.readers import ssh
from coriolis_azure.worker.cloud_init import cloud_config
from coriolis_azure.worker.launch import USERNAME

DATA_PORTS = 2  # of the direct channel, one for each disk that is copied at a time
BOOT_SECONDS = 900.0  # without KVM, beside other work
_GUEST_ADDRESS = "10.0.2.15"
_MEMORY_MIB = 1024
# Without what makes translated code slow: pages by five levels, and the kernel's way to clear one byte by byte.
# Without cmpxchg16b too, on which each allocation in the kernel would rest: under QEMU 7.2 a kernel 6.12 died of a
# double fault right behind it, with an address in its flags.
CPU = "max,la57=off,erms=off,fsrm=off,cx16=off"
_KERNEL = "root=LABEL=cloudimg-rootfs ro console=ttyS0 net.ifnames=0 panic=-1 mitigations=off"


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(20000 + os.getpid() % 4000 * 8, 60000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


@functools.cache
def accelerator() -> str:
    """KVM where it really runs a guest: inside of other virtual machines it may be there and do nothing."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    # mov al, 1; out 0xf4, al: a boot sector that ends QEMU with status 3.
    code = bytes.fromhex("b001e6f4").ljust(510, b"\0") + b"\x55\xaa"
    with tempfile.NamedTemporaryFile() as sector:
        sector.write(code)
        sector.flush()
        machine = ("qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "kvm", "-cpu", "max")
        disk = ("-drive", f"format=raw,file={sector.name}", "-device", "isa-debug-exit,iobase=0xf4,iosize=1")
        with suppress(subprocess.TimeoutExpired):
            ended = subprocess.run([*machine, *disk], capture_output=True, timeout=15, check=False)
            return "kvm" if ended.returncode == 3 else "tcg"
    return "tcg"


class Machine:
    """A worker that is powered on and off; its OS disk and its seed stay. A context manager, which powers it off.

    `ssh_port` is the one that its SSH server is told to use by `config`, its user data. `boots` counts how often it was
    powered on.
    """

    def __init__(
        self,
        image: debian.Image,
        folder: Path,
        ssh_port: int = 22,
        config: Callable[[str, str, int], str] = cloud_config,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._image = folder, image
        self.disk = folder / "os.qcow2"
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image.disk), str(self.disk))
        private, public = ssh_keys.client_key()
        host_private, host_public = ssh_keys.host_key()
        self._seed(public, config(host_private, host_public, ssh_port))
        first = free_ports(1 + DATA_PORTS)
        self.data_port, self.ssh_port = first + 1, ssh_port
        self.worker = Worker("vm", "127.0.0.1", first, USERNAME, host_public, debian.LUNS, private)
        self.attached: dict[int, tuple[Path, int]] = {}
        self.boots = self.resets = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: _Qmp | None = None
        self._connection: ssh.Connection | None = None
        self._numbers = itertools.count()
        self._nodes: dict[int, str] = {}

    # power

    def start(self, *more: str) -> None:
        """Power it on. Whatever is attached is there from the beginning."""
        control = self.folder / "qmp"
        control.unlink(missing_ok=True)
        self.boots += 1
        forwards = [(self.worker.port, self.ssh_port)]
        forwards += [(self.data_port + slot, self.data_port + slot) for slot in range(DATA_PORTS)]
        hosts = ",".join(f"hostfwd=tcp:127.0.0.1:{port}-{_GUEST_ADDRESS}:{to}" for port, to in forwards)
        command = [
            *("qemu-system-x86_64", "-M", "q35", "-accel", accelerator(), "-cpu", CPU),
            *("-smp", "2", "-m", str(_MEMORY_MIB), "-nodefaults", "-display", "none"),
            *("-action", "reboot=shutdown"),
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)),
            *("-append", _KERNEL),
            *("-serial", f"file:{self.folder / f'console-{self.boots}.log'}"),
            *("-qmp", f"unix:{control},server=on,wait=off"),
            *("-device", f"virtio-scsi-pci,id=own,addr=0x{debian.OWN_BUS}"),
            *("-device", f"virtio-scsi-pci,id=data,addr=0x{debian.DATA_BUS}"),
            *("-drive", f"if=none,id=os,format=qcow2,discard=unmap,cache=unsafe,file={self.disk}"),
            *("-device", "scsi-hd,bus=own.0,lun=0,drive=os"),
            *("-drive", f"if=none,id=seed,format=raw,readonly=on,file={self.folder / 'seed.iso'}"),
            *("-device", "scsi-cd,bus=own.0,lun=2,drive=seed"),
            *("-netdev", f"user,id=net,restrict=on,{hosts}"),
            *("-device", "virtio-net-pci,netdev=net,addr=0x06"),
            *("-device", "virtio-rng-pci,addr=0x07", *more),
        ]
        with (self.folder / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._qmp = _Qmp(control, self._process)
        for lun, (path, sector) in sorted(self.attached.items()):
            self.attach(lun, path, sector=sector)

    @property
    def is_running(self) -> bool:
        """Whether it is powered on; where its kernel has died QEMU has ended."""
        return self._process is not None and self._process.poll() is None

    def revive(self) -> None:
        """Power it on, with nothing attached, where it is not running."""
        if not self.is_running:
            self.stop(orderly=False)
            self.attached.clear()
            self.start()

    def stop(self, orderly: bool = True) -> None:
        """Power it off, as Azure does where it deallocates; else cut the power."""
        process, self._process = self._process, None
        self._hang_up()
        if process is None or self._qmp is None:
            return
        with suppress(OSError):
            self._qmp.ask("system_powerdown" if orderly else "quit")
        try:
            process.wait(BOOT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            self._qmp.close()

    def reset(self) -> None:
        """Restart it without a warning. QEMU itself would take minutes for it where it translates the code."""
        self.resets += 1
        self.stop(orderly=False)
        self.start()

    def reboot(self) -> None:
        """Have the system inside reboot."""
        self.resets += 1
        with suppress(AssertionError, errors.CoriolisAzureError):
            self.run("systemctl --no-block reboot")
        assert self._process is not None
        self._process.wait(BOOT_SECONDS)
        self.stop(orderly=False)
        self.start()

    def pause(self, paused: bool) -> None:
        """Let its processors stand still, or go on."""
        self._control.ask("stop" if paused else "cont")

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self._hang_up()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._qmp is not None:
            self._qmp.close()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # disks

    def attach(self, lun: int, path: Path, *, sector: int = 512, fails_at: int | None = None) -> None:
        """Plug in the raw disk `path`; reading at the byte `fails_at` gives an I/O error."""
        self.attached[lun] = path, sector
        if self._process is None:
            return  # it is there when the machine is powered on
        node = self._nodes[lun] = f"disk{next(self._numbers)}"
        file: dict[str, Any] = {"driver": "file", "filename": str(path), "locking": "off"}
        if fails_at is not None:
            fault = {"event": "read_aio", "errno": 5, "sector": fails_at // 512, "immediately": False}
            file = {"driver": "blkdebug", "image": file, "inject-error": [{**fault, "once": False}]}
        raw: dict[str, Any] = {"driver": "raw", "node-name": node, "file": file}
        self._control.ask("blockdev-add", **raw)
        sectors: dict[str, Any] = {"logical_block_size": sector, "physical_block_size": max(sector, 512)}
        self._control.ask(
            *("device_add",),
            **{"driver": "scsi-hd", "id": node, "drive": node, "bus": "data.0", "lun": lun, **sectors},
        )

    def detach(self, lun: int) -> None:
        """Pull a disk out. It is gone when this returns."""
        del self.attached[lun]
        if not self.is_running:
            return
        node = self._nodes.pop(lun)
        self._control.ask("device_del", id=node)
        self._control.heard("DEVICE_DELETED", "device", node)
        self._control.ask("blockdev-del", **{"node-name": node})

    @property
    def _control(self) -> _Qmp:
        assert self._qmp is not None, "it is not powered on"
        return self._qmp

    # inside

    def connect(self, patience: float = BOOT_SECONDS) -> ssh.Connection:
        """A connection to it; waits until it is up."""
        assert self.is_running, f"it is not running: {self.console()[-6000:]}"
        try:
            return ssh.connect(self.worker, Clock(), silent, patience)
        except Exception:
            print(self.console()[-6000:])
            raise

    def run(self, command: str, patience: float = 300.0) -> str:
        """The output of a command that root runs; AssertionError where it fails."""
        output = bytearray()
        as_root = f"sudo -n sh -c {_quoted(command)} 2>&1"
        if self._connection is None:  # it is kept: to sign in takes seconds where code is translated
            self._connection = self.connect()
        with self._connection.start(as_root, patience) as program:
            while piece := program.receive(1 << 16):
                output += piece
            status = program.status(patience)
        text = output.decode(errors="replace").strip()
        assert status == 0, f"{command}: {status}: {text}"
        return text

    def see(self, luns: list[int]) -> None:
        """Wait until it sees disks at these LUNs."""
        links = " ".join(f"/dev/disk/azure/scsi1/lun{lun}" for lun in luns)
        self.run(f"for link in {links}; do until [ -e $link ]; do sleep 0.1; done; done; udevadm settle")

    def console(self) -> str:
        """What its console shows since it was powered on."""
        return (self.folder / f"console-{self.boots}.log").read_text(errors="replace")

    def _seed(self, public: str, user_data: str) -> None:
        folder = self.folder / "seed"
        folder.mkdir()
        keys = {"instance-id": "worker-1", "local-hostname": "worker", "public-keys": [public]}
        (folder / "meta-data").write_text(json.dumps(keys))
        (folder / "user-data").write_text(user_data)
        files = [str(folder / "meta-data"), str(folder / "user-data")]
        iso = str(self.folder / "seed.iso")
        _run("genisoimage", "-quiet", "-output", iso, "-volid", "cidata", "-joliet", "-rock", *files)
        shutil.rmtree(folder)


class _Qmp:
    """The control socket of a QEMU."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        until = time.monotonic() + 30
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.02)
        self._socket.settimeout(120)
        self._lines = self._socket.makefile("rb")
        self._events: list[dict[str, Any]] = []
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, execute: str, **arguments: Any) -> Any:
        """The answer to a command; AssertionError where QEMU refuses it."""
        words: dict[str, Any] = {"execute": execute, **({"arguments": arguments} if arguments else {})}
        self._socket.sendall(json.dumps(words).encode())
        while "event" in (said := next(self._said())):
            self._events.append(said)
        assert "return" in said, f"{execute}: {said}"
        return said["return"]

    def heard(self, event: str, key: str, value: str) -> None:
        """Wait for an event whose `key` is `value`."""

        def wanted(said: dict[str, Any]) -> bool:
            return said.get("event") == event and said.get("data", {}).get(key) == value

        if not any(map(wanted, self._events)):
            next(said for said in self._said() if wanted(said))
        self._events.clear()

    def _said(self) -> Iterator[dict[str, Any]]:
        while line := self._lines.readline():
            yield json.loads(line)
        raise ConnectionError("QEMU has ended")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextmanager
def running(machine: Machine) -> Iterator[Machine]:
    """The machine, powered on, while the block runs."""
    with machine:
        machine.start()
        yield machine


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
