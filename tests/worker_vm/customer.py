"""The disks of a machine that lost its power: clones that a Linux worker would like to repair, assemble and mount."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import debian
from qemu import Machine, running

# LVM, the two halves of an array, btrfs, XFS, swap, ext4 on sectors of 4096 bytes; the OS disk comes first.
_MIB = 1 << 20
_SIZES = {"lvm": 64, "md-a": 48, "md-b": 48, "btrfs": 160, "xfs": 320, "swap": 48, "4k": 64}
_SECTORS = {"4k": 4096}
# All file systems stay mounted, with a journal to be replayed, until the power is cut.
_FILL = """
set -ex
disk() { readlink -f /dev/disk/azure/scsi1/lun$1; }
used() { mkdir -p /mnt/$2; mount $1 /mnt/$2; cp /usr/bin/python3* /mnt/$2/; echo customer > /mnt/$2/owner; }
used $(disk 0)2 os
echo customer > /mnt/os/etc/hostname
pvcreate -q $(disk 1); vgcreate -q customer $(disk 1); lvcreate -q -n data -L 40M customer --yes
mkfs.ext4 -q -L data /dev/customer/data
used /dev/customer/data lvm
mdadm --create /dev/md7 --level=1 --raid-devices=2 --metadata=1.2 --run $(disk 2) $(disk 3) < /dev/null
mkfs.ext4 -q /dev/md7
used /dev/md7 md
mkfs.btrfs -q -L tree $(disk 4)
used $(disk 4) btrfs
mkfs.xfs -q -L xfs $(disk 5)
used $(disk 5) xfs
mkswap -L swap $(disk 6)
printf 'label: gpt\\nstart=256\\n' | sfdisk -q $(disk 7)
udevadm settle
mkfs.ext4 -q -b 4096 -L wide $(disk 7)1
used $(disk 7)1 wide
sync
for mount in /mnt/*; do echo more > $mount/more; done
sleep 1
"""


@dataclass(frozen=True)
class Disk:
    """A disk image at the LUN it had in the machine."""

    name: str
    lun: int
    path: Path
    sector: int = 512


def disks(image: debian.Image) -> list[Disk]:
    """The disks of a machine whose OS disk was made from the worker's own image: labels and UUIDs are the same."""
    recipe = [image.disk.parent.name, repr(_SIZES), repr(_SECTORS), _FILL]
    return _in(debian.kept("customer", recipe, lambda folder: _make(image, folder)))


def _in(folder: Path) -> list[Disk]:
    names = ["os", *_SIZES]
    return [
        Disk(name, lun, folder / f"{name}.raw", _SECTORS.get(name, 512)) for lun, name in enumerate(names)
    ]


def _make(image: debian.Image, folder: Path) -> None:
    debian.copy(image.disk, folder / "os.raw")
    for name, mib in _SIZES.items():
        with (folder / f"{name}.raw").open("wb") as file:
            file.truncate(mib * _MIB)
    with running(Machine(image, folder / "machine", config=_plain)) as machine:
        machine.connect().close()  # else it might boot from the copy, which has the same labels
        for disk in _in(folder):
            machine.attach(disk.lun, disk.path, sector=disk.sector)
        machine.see([disk.lun for disk in _in(folder)])
        machine.run(_FILL)
        machine.stop(orderly=False)
    shutil.rmtree(folder / "machine")


def _plain(host_private: str, host_public: str, port: int) -> str:
    """The user data of a machine that may do with its disks what it likes."""
    keys = {"ed25519_private": host_private, "ed25519_public": host_public}
    return "#cloud-config\n" + json.dumps({"ssh_keys": keys, "ssh_genkeytypes": ["ed25519"]})
