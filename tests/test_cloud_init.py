"""The worker's user data, and the udev rules that its script writes, on the device trees that Azure has.

`tox -e worker` boots a real worker with it.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from coriolis_azure.readers import keys
from coriolis_azure.worker import cloud_init

_SCSI0 = "f8b3781a-1e82-4818-a1c3-63d806ec15bb"
_SCSI1 = "f8b3781b-1e82-4818-a1c3-63d806ec15bb"
_GEN2 = "LNXSYSTM:00/LNXSYBUS:00/ACPI0004:00/VMBUS:00"
_GEN1 = "LNXSYSTM:00/LNXSYBUS:00/PNP0A03:00/device:07/VMBUS:01"
_IDE0, _IDE1 = ("00000000-0000-8899-0000-000000000000", "00000000-0001-8899-0000-000000000000")


def _scsi(bus: str, device: str, host: int, lun: int, name: str) -> str:
    return f"devices/{bus}/{device}/host{host}/target{host}:0:0/{host}:0:0:{lun}/block/{name}"


def _config(port: int = 22) -> dict[str, object]:
    private, public = keys.host_key()
    head, _, body = cloud_init.cloud_config(private, public, port).partition("\n")
    assert head == "#cloud-config"
    config: dict[str, object] = json.loads(body)
    assert config["ssh_keys"] == {"ed25519_private": private, "ed25519_public": public}
    return config


def _files(config: dict[str, object]) -> dict[str, str]:
    return {file["path"]: file["content"] for file in config["write_files"]}  # type: ignore[attr-defined]


def test_the_user_data_sets_host_key_and_port_and_keeps_lvm_away() -> None:
    files = _files(_config(2222))
    assert files["/etc/ssh/sshd_config.d/10-coriolis-azure.conf"] == "Port 2222\n"
    assert "global_filter" in files["/etc/lvm/lvmlocal.conf"]
    assert not any("sshd_config" in path for path in _files(_config(22)))


@pytest.mark.parametrize("by_socket", [True, False])
def test_another_port_is_taken_by_the_server_that_runs_and_no_other_is_started(
    tmp_path: Path, by_socket: bool
) -> None:
    """Debian starts ssh.service, Ubuntu ssh.socket; what this system lacks must not fail its boot."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/asked
case "$*" in
    *is-active*) exit {0 if by_socket else 3};;
    "restart ssh.socket") exit {0 if by_socket else 5};;
    restart*|start*) exit 5;;
esac
""")
    systemctl.chmod(0o755)
    script = _config(2222)["runcmd"][0]  # type: ignore[index]
    assert "runcmd" not in _config(22)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["sh", "-e", "-c", script], check=True, env={"PATH": path})
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[-1] == ("restart ssh.socket" if by_socket else "try-restart ssh.service")


class Guest:
    """A root folder with a device tree, in which the script of the first boot writes its rules."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.rules = root / "rules"
        (root / "bin").mkdir()
        (root / "bin/udevadm").symlink_to("/bin/true")
        (root / "sys/block").mkdir(parents=True)

    def add(self, device: str, nsid: int = 0) -> None:
        folder = self._root / "sys" / device
        folder.mkdir(parents=True)
        if nsid:
            (folder / "nsid").write_text(f"{nsid}\n")
        (self._root / "sys/block" / folder.name).symlink_to(folder)

    def boot(self) -> None:
        *command, rules = _config()["bootcmd"][-1]  # type: ignore[index]
        assert rules == "/etc/udev/rules.d/61-coriolis-azure.rules"
        command = [word.replace("/sys/block", str(self._root / "sys/block")) for word in command]
        path = f"{self._root / 'bin'}:{os.environ['PATH']}"
        subprocess.run([*command, str(self.rules)], check=True, env={"PATH": path})

    def hidden(self, device: str, nsid: int = 0) -> bool:
        """What the rules say of a device; udev's own match of DEVPATH and attributes is `fnmatch`."""
        for line in self.rules.read_text().splitlines():
            path, number = re.search('DEVPATH=="(.*?)"', line), re.search('ATTRS{nsid}=="(.*?)"', line)
            if path and fnmatch.fnmatchcase("/" + device, path[1]):
                return False
            if number and nsid and number[1] == str(nsid):
                return False
        return True


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def test_own_disks_are_known_whatever_their_letter_host_number_or_kernel(guest: Guest) -> None:
    guest.add(_scsi(_GEN2, _SCSI0, 0, 0, "sda"))
    guest.add(_scsi(_GEN2, _SCSI0, 0, 1, "sdb"))
    guest.boot()
    newer = _GEN2.replace("VMBUS:00", "MSFT1000:00")  # as kernels name the bus since 6.6
    for bus in (_GEN2, newer):
        assert not guest.hidden(_scsi(bus, _SCSI0, 3, 0, "sdc"))
        assert not guest.hidden(_scsi(bus, _SCSI0, 1, 0, "sdb/sdb1"))
        assert not guest.hidden(_scsi(bus, _SCSI0, 1, 1, "sda"))
        assert guest.hidden(_scsi(bus, _SCSI1, 0, 0, "sda"))
        assert guest.hidden(_scsi(bus, _SCSI1, 1, 1, "sdd/sdd2"))
        assert guest.hidden(_scsi(bus, _SCSI0, 0, 10, "sda"))
    # On every event but the last one: a disk that changes, or is found again, is hidden as one that is added.
    assert re.findall("ACTION.*", guest.rules.read_text()) == ['ACTION=="remove", GOTO="coriolis_end"']


def test_a_generation_1_worker_has_its_own_disks_on_the_ide_controllers(guest: Guest) -> None:
    guest.add(_scsi(_GEN1, _IDE0, 2, 0, "sda"))
    guest.add(_scsi(_GEN1, _IDE1, 3, 0, "sdb"))
    guest.boot()
    assert not guest.hidden(_scsi(_GEN1, _IDE0, 0, 0, "sdb/sdb1"))
    assert not guest.hidden(_scsi(_GEN1, _IDE1, 1, 0, "sda"))
    assert guest.hidden(_scsi(_GEN1, _SCSI1, 0, 0, "sda"))


def test_nvme_namespaces_are_known_by_their_number(guest: Guest) -> None:
    nvme = "devices/{}/{}/pci{}:00/{}:00:00.0/nvme/nvme{}/nvme{}n{}"
    guid = "80c97e1e-15c4-4c6d-93d1-e38402047b8d"
    guest.add(nvme.format(_GEN2, guid, "15c4", "15c4", 0, 0, 1), nsid=1)
    guest.boot()
    moved = nvme.format(_GEN2, "c05ba3a1-c05b-4c6d-93d1-e38402047b8d", "c05b", "c05b", 1, 1, 7)
    assert not guest.hidden(moved, nsid=1)
    assert guest.hidden(moved, nsid=2)


def test_the_rules_are_those_of_the_first_boot(guest: Guest) -> None:
    guest.add(_scsi(_GEN2, _SCSI0, 0, 0, "sda"))
    guest.boot()
    first = guest.rules.read_text()
    guest.add(_scsi(_GEN2, _SCSI1, 1, 0, "sdb"))
    guest.boot()
    assert guest.rules.read_text() == first
