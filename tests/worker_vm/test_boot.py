"""A Linux VM is taken out of the sandbox, and what domain.xml says boots it to its login prompt.

Not part of the suite: `tox -e worker`. The image is made once and kept. Without KVM, the boot takes minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import debian
import pytest
from qemu import BOOT_SECONDS, CPU, accelerator

from coriolis_azure.replica.handed_off import DOMAIN
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from harness.constants import DEADLINE

CODE, VARIABLES = Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
MEMORY_MIB = 1024  # what this host can spare
LESSON = Path(__file__).parents[2] / "docs/tutorial/azure.md"

if debian.missing() or shutil.which("mcopy") is None or not CODE.exists():
    pytest.skip("not on this host: the programs of debian.py, mtools, or OVMF", allow_module_level=True)


def command(domain: Element, folder: Path) -> list[str]:
    """What libvirt makes of the domain, by hand: the same devices. The replica is written through an overlay."""
    system = domain.find("os")
    assert system is not None
    assert system.get("firmware") == "efi"
    variables = Path(shutil.copy(VARIABLES, folder / "variables.fd"))
    made = [
        *("qemu-system-x86_64", "-accel", accelerator(), "-cpu", CPU, "-nodefaults", "-display", "none"),
        *("-M", _attribute(system, "type", "machine"), "-smp", domain.findtext("vcpu", "")),
        *("-m", str(min(MEMORY_MIB, int(domain.findtext("memory", "0")) // 1024)), "-no-reboot"),
        *("-drive", f"if=pflash,format=raw,readonly=on,file={CODE}"),
        *("-drive", f"if=pflash,format=raw,file={variables}"),
        *(
            "-serial",
            f"file:{folder / 'console.log'}",
            "-rtc",
            f"base={_attribute(domain, 'clock', 'offset')}",
        ),
        *("-device", "virtio-rng-pci"),
    ]
    for controller in domain.iter("controller"):
        assert controller.attrib == {"type": "scsi", "index": "0", "model": "virtio-scsi"}
        made += ["-device", "virtio-scsi-pci,id=scsi0"]
    for number, disk in enumerate(domain.iter("disk")):
        overlay, format = folder / f"{number}.qcow2", _attribute(disk, "driver", "type")
        base = _attribute(disk, "source", "file")
        overlaid = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", base, str(overlay)]
        subprocess.run(overlaid, check=True)
        boot = ",bootindex=1" if disk.find("boot") is not None else ""
        made += ["-drive", f"if=none,id=disk{number},format=qcow2,cache=unsafe,file={overlay}"]
        target = _attribute(disk, "address", "target")
        made += ["-device", f"scsi-hd,bus=scsi0.0,scsi-id={target},lun=0,drive=disk{number}{boot}"]
    for number, nic in enumerate(domain.iter("interface")):
        model = {"virtio": "virtio-net-pci", "e1000e": "e1000e"}[_attribute(nic, "model", "type")]
        made += ["-netdev", f"user,id=net{number},restrict=on"]
        made += ["-device", f"{model},netdev=net{number},mac={_attribute(nic, 'mac', 'address')}"]
    return made


def _attribute(parent: Element, tag: str, name: str) -> str:
    found = parent.find(tag)
    assert found is not None
    return found.attrib[name]


@pytest.mark.parametrize("suite", list(debian.SUITES))
def test_a_replicated_linux_boots_to_its_login_prompt(
    azure: Sandbox, connect: Callable[..., Source], tmp_path: Path, suite: str
) -> None:
    azure.add_vm("web", debian.bootable(suite))
    source = connect(environment={"replica_export_mechanism": "snapshots"})
    source.replicate("web", tmp_path / "web")
    domain = ElementTree.parse(tmp_path / "web" / DOMAIN).getroot()
    console = tmp_path / "console.log"
    with subprocess.Popen(["nice", *command(domain, tmp_path)], stdin=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + BOOT_SECONDS
            while f"{debian.NAME} login:" not in _text(console):
                assert process.poll() is None, _text(console)[-6000:]
                assert time.monotonic() < until, _text(console)[-6000:]
                time.sleep(0.5)
        finally:
            process.kill()
    assert (tmp_path / "web/os.raw").stat().st_size == debian.bootable(suite).stat().st_size


def test_the_lesson_boots_a_replica_to_its_login_prompt(
    azure: Sandbox, connect: Callable[..., Source], tmp_path: Path
) -> None:
    """By the commands of the tutorial as they stand; in a session of its own, which ends with the test."""
    blocks = re.findall(r"```sh\n(.*?)```", LESSON.read_text(), re.DOTALL)
    (commands,) = [code for code in blocks if "qemu-system" in code]
    azure.add_vm("web-1", debian.bootable("debian12"))
    source = connect(environment={"replica_export_mechanism": "snapshots"})
    source.replicate("web-1", tmp_path / "replicas/web-1")
    console = tmp_path / "console.log"
    with console.open("wb") as told:
        shell = subprocess.Popen(
            ["nice", "bash", "-euc", commands],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
    assert shell.stdin is not None
    try:
        until = time.monotonic() + BOOT_SECONDS
        while f"{debian.NAME} login:" not in _text(console):
            assert shell.poll() is None, _text(console)[-6000:]
            assert time.monotonic() < until, _text(console)[-6000:]
            time.sleep(0.5)
        shell.communicate(b"\x01x", timeout=DEADLINE)
        assert shell.returncode == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)


def _text(console: Path) -> str:
    return console.read_text(errors="replace") if console.exists() else ""
