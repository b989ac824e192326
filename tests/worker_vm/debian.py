"""A Debian disk image for a real worker, built from packages with mmdebstrap and kept in the user's cache.

It has what a marketplace image has that could touch a clone: LVM, md, multipath, btrfs, udisks. Its file systems are
found by label (`cloudimg-rootfs`, `UEFI`), as on Azure's own images. The udev rules of Azure's agent, which give data
disks their names, know Hyper-V's bus only: the image has rules that give the same names on QEMU's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SUITES = {"debian12": "bookworm", "debian13": "trixie"}
PROGRAMS = ("mmdebstrap", "qemu-system-x86_64", "mke2fs", "mkfs.vfat", "sfdisk", "genisoimage")
OWN_BUS, DATA_BUS = "04", "05"  # the PCI slots of the two SCSI controllers
LUNS = 16
NAME = "customer"  # the host name of a disk that boots by itself
_MIB = 1 << 20
_ROOT_MIB, _EFI_MIB = 1400, 40
_PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "linux-image-cloud-amd64", "initramfs-tools", "busybox", "zstd"),
    *("cloud-init", "openssh-server", "python3", "sudo", "netplan.io", "iproute2", "fdisk"),
    *("e2fsprogs", "lvm2", "mdadm", "btrfs-progs", "xfsprogs", "dosfstools", "multipath-tools", "udisks2"),
)
_OF_A_CUSTOMER = (
    *("systemd-sysv", "udev", "linux-image-cloud-amd64", "initramfs-tools", "zstd", "e2fsprogs"),
    "grub-efi-amd64-bin",
)
_GRUB = "/usr/lib/grub/x86_64-efi/monolithic/grubx64.efi"
# As on Azure's own images: GRUB on the EFI system partition, the kernel on the root, a console on the serial port.
_GRUB_CFG = """search --no-floppy --label cloudimg-rootfs --set=root
linux /boot/vmlinuz root=LABEL=cloudimg-rootfs ro console=ttyS0 panic=-1 mitigations=off
initrd /boot/initrd.img
boot
"""
_UNUSED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
# On Azure the data source takes the user from the VM's properties.
_USER = """
system_info:
  default_user:
    name: coriolis
    lock_passwd: true
    shell: /bin/bash
    sudo: ["ALL=(ALL) NOPASSWD:ALL"]
datasource_list: [NoCloud]
locale: false
"""
_HOSTS = "127.0.0.1 localhost\n127.0.1.1 worker\n"  # else each sudo complains that it cannot resolve its host
_FSTAB = "LABEL=cloudimg-rootfs / ext4 defaults 0 1\nLABEL=UEFI /boot/efi vfat umask=0077 0 1\n"
# Without KVM, beside other work, all takes longer.
_SLOW = "[Manager]\nDefaultDeviceTimeoutSec=300\nDefaultTimeoutStartSec=900\n"
# The second partition is the one with the EFI system's files; nothing boots from it here.
_TABLE = f"label: gpt\nstart=1MiB, size={_EFI_MIB}MiB, type=uefi\ntype=linux\n"


@dataclass(frozen=True)
class Image:
    """A worker's OS disk, and what QEMU boots it with."""

    disk: Path
    kernel: Path
    initrd: Path


def missing() -> list[str]:
    """The programs that an image and its machine need and this host has not."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def image(name: str) -> Image:
    """The image `name` of SUITES, built unless it is in the cache already."""
    recipe = [name, *_PACKAGES, *_UNUSED, _TABLE, _hook(Path("root"), Path("folder"))]
    folder = kept(name, recipe, lambda new: _build(SUITES[name], new))
    return Image(folder / "disk.raw", folder / "vmlinuz", folder / "initrd.img")


def bootable(name: str) -> Path:
    """An OS disk of the suite `name` that boots by itself, by EFI."""
    recipe = [
        name,
        *_OF_A_CUSTOMER,
        *_UNUSED,
        _TABLE,
        _GRUB_CFG,
        _customer_hook(Path("root"), Path("folder")),
    ]
    folder = kept(f"{name}-bootable", recipe, lambda new: _build_bootable(SUITES[name], new))
    return folder / "disk.raw"


def kept(name: str, recipe: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The folder of the cache that `make` has filled by this recipe."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coriolis-azure" / "worker-vm"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}"
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as new:
                make(Path(new))
                Path(new).rename(folder)
                Path(new).mkdir()  # for the context manager to remove
    return folder


def copy(path: Path, to: Path) -> Path:
    """Copy a disk, leaving out what is zero; gives `to`."""
    subprocess.run(["cp", "--sparse=always", str(path), str(to)], check=True)
    return to


def _build(suite: str, folder: Path) -> None:
    """Build disk, kernel and initrd of a suite into `folder`."""
    _bootstrap(suite, folder, _PACKAGES, _hook(folder / "root.raw", folder))
    _empty_efi(folder)
    _assemble(folder)


def _build_bootable(suite: str, folder: Path) -> None:
    """Build a disk that boots by itself into `folder`."""
    _bootstrap(suite, folder, _OF_A_CUSTOMER, _customer_hook(folder / "root.raw", folder))
    _empty_efi(folder)
    efi, cfg, grub = folder / "efi.raw", folder / "grub.cfg", folder / "grubx64.efi"
    cfg.write_text(_GRUB_CFG)
    subprocess.run(["mmd", "-i", str(efi), "::EFI", "::EFI/BOOT", "::EFI/debian"], check=True)
    for file, place in ((grub, "EFI/BOOT/BOOTX64.EFI"), (cfg, "EFI/debian/grub.cfg")):
        subprocess.run(["mcopy", "-i", str(efi), str(file), f"::{place}"], check=True)
        file.unlink()
    _assemble(folder)


def _bootstrap(suite: str, folder: Path, packages: Sequence[str], script: str) -> None:
    """Install the packages into a tree, on which the hook `script` works."""
    hook = folder / "hook.sh"
    hook.write_text(script)
    excluded = [f"--dpkgopt=path-exclude={pattern}" for pattern in _UNUSED]
    subprocess.run(
        [
            *("mmdebstrap", "--variant=minbase", f"--include={','.join(packages)}"),
            *('--aptopt=APT::Install-Recommends "false"', *excluded),
            *(f'--customize-hook=sh {hook} "$1"', "--format=null", suite),
        ],
        check=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
    )
    hook.unlink()


def _empty_efi(folder: Path) -> None:
    efi = folder / "efi.raw"
    _sized(efi, _EFI_MIB)
    subprocess.run(["/sbin/mkfs.vfat", "-n", "UEFI", str(efi)], check=True, stdout=subprocess.DEVNULL)


def _assemble(folder: Path) -> None:
    """Make `disk.raw` of the two file systems."""
    root, efi, disk = folder / "root.raw", folder / "efi.raw", folder / "disk.raw"
    _sized(disk, _EFI_MIB + _ROOT_MIB + 2)
    subprocess.run(["/sbin/sfdisk", "--quiet", str(disk)], input=_TABLE.encode(), check=True)
    _put(disk, efi, _MIB)
    _put(disk, root, (1 + _EFI_MIB) * _MIB)
    for path in (root, efi):
        path.unlink()


def _hook(root: Path, folder: Path) -> str:
    """The shell script that turns the tree "$1" into a file system and copies the kernel out of it."""
    files = {
        "/etc/fstab": _FSTAB,
        "/etc/hosts": _HOSTS,
        "/etc/cloud/cloud.cfg.d/90-test.cfg": _USER,
        "/etc/udev/rules.d/66-azure-storage.rules": _links(),
        "/etc/hostname": "worker\n",
        "/etc/systemd/system.conf.d/slow.conf": _SLOW,
    }
    written = "\n".join(f"cat > \"$1{path}\" <<'END'\n{text}END" for path, text in files.items())
    return f"""set -e
mkdir -p "$1/boot/efi" "$1/etc/systemd/system.conf.d"
{written}
rm -f "$1"/etc/ssh/ssh_host_* "$1/etc/machine-id"
touch "$1/etc/machine-id"
chroot "$1" systemctl enable systemd-networkd
cp "$1"/boot/vmlinuz-* {folder}/vmlinuz
cp "$1"/boot/initrd.img-* {folder}/initrd.img
cp -a --one-file-system "$1" {folder}/tree
truncate -s {_ROOT_MIB - 1}M {root}
/sbin/mke2fs -q -F -t ext4 -L cloudimg-rootfs -d {folder}/tree {root}
rm -rf {folder}/tree
"""


def _customer_hook(root: Path, folder: Path) -> str:
    """The script for a disk that boots by itself; it copies GRUB out of the tree "$1"."""
    return f"""set -e
mkdir -p "$1/boot/efi" "$1/etc/systemd/system.conf.d"
printf '{_FSTAB}' > "$1/etc/fstab"
printf '{_SLOW}' > "$1/etc/systemd/system.conf.d/slow.conf"
echo {NAME} > "$1/etc/hostname"
ln -s "$(basename "$1"/boot/vmlinuz-*)" "$1/boot/vmlinuz"
ln -s "$(basename "$1"/boot/initrd.img-*)" "$1/boot/initrd.img"
cp "$1{_GRUB}" {folder}/grubx64.efi
cp -a --one-file-system "$1" {folder}/tree
truncate -s {_ROOT_MIB - 1}M {root}
/sbin/mke2fs -q -F -t ext4 -L cloudimg-rootfs -d {folder}/tree {root}
rm -rf {folder}/tree
"""


def _links() -> str:
    """The links of Azure's udev rules, for the data disks of QEMU's second controller."""
    path = f"pci-0000:00:{DATA_BUS}.0-scsi-0:0:0"
    one = 'SUBSYSTEM=="block", ENV{{DEVTYPE}}=="disk", ENV{{ID_PATH}}=="{}:{}", SYMLINK+="disk/azure/scsi1/lun{}"\n'
    return "".join(one.format(path, lun, lun) for lun in range(LUNS))


def _sized(path: Path, mib: int) -> None:
    with path.open("wb") as file:
        file.truncate(mib * _MIB)


def _put(disk: Path, part: Path, offset: int) -> None:
    """Copy `part` into `disk` at `offset`, leaving out what is zero."""
    with disk.open("r+b") as to, part.open("rb") as source:
        at = offset
        while piece := source.read(_MIB):
            if piece.count(0) != len(piece):
                to.seek(at)
                to.write(piece)
            at += len(piece)
