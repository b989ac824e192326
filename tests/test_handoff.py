"""What stands beside the images for other programs: machine.json, and a domain of libvirt that boots them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from coriolis_azure import handoff, vhd
from coriolis_azure.errors import Denied, InvalidInput
from coriolis_azure.events import Event, Notice
from coriolis_azure.machine import libvirt
from coriolis_azure.machine.export_info import export_info
from coriolis_azure.model import Disk, Image, Machine, Nic
from coriolis_azure.replica import places
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.replica.handed_off import DOMAIN, MACHINE, NAMES
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from harness.constants import MIB

POINT = "2026-11-29T15:00:57Z"
ID = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/virtualMachines/web"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
NETWORK = ElementTree.canonicalize(
    '<interface type="network"><mac address="00:0d:3a:01:02:ff"/><source network="default"/>'
    '<model type="virtio"/></interface>'
)


def disk(name: str, sector: int = 512) -> Disk:
    lun = None if name == "os" else int(name.partition("-")[2])
    return Disk(f"/disks/{name}", name, lun, MIB, name, "Premium_LRS", "None", sector_bytes=sector)


def nic(mac: str) -> Nic:
    return Nic("/nics/n", "n", mac, "net/sub", "/subnets/sub", ("10.0.0.4",), "", primary=True)


def machine(**changes: Any) -> Machine:
    made = Machine(
        *(
            ID,
            "web",
            "g",
            "westeurope",
            (),
            "Standard_D2s_v5",
            2,
            8192,
            "linux",
            "EFI",
            False,
            "web",
            "running",
        ),
        disks=(disk("os"), disk("data-1"), disk("data-5")),
        nics=(nic("00-0D-3A-01-02-FF"),),
    )
    return replace(made, **changes)


def domain(machine: Machine, images: dict[str, Image] | None = None, where: str = "/srv/web") -> Element:
    """Its domain, as libvirt accepts it where that is installed."""
    images = images or {disk.name: Image(f"{where}/{disk.name}.raw") for disk in machine.disks}
    text = libvirt.domain({**export_info(machine), "point": POINT}, images, where)
    if shutil.which("virt-xml-validate") and shutil.which("xmllint") and SCHEMA.exists():
        command = ["virt-xml-validate", "-", "domain"]
        checked = subprocess.run(command, input=text, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr.decode()
    return ElementTree.fromstring(text)


def memory_mib(domain: Element) -> float:
    """Its memory, as virt-v2v reads it too: in KiB, whatever the unit."""
    (memory,) = domain.findall("memory")
    assert memory.attrib == {"unit": "KiB"}
    return int(memory.text or "0") / 1024


def disks(domain: Element) -> list[tuple[Any, ...]]:
    """Of each disk: its image, its name, its bus, and the numbers of its controller, target and unit."""
    found = []
    for each in domain.findall("devices/disk"):
        image, target, address = each.find("source"), each.find("target"), each.find("address")
        assert image is not None
        assert target is not None
        assert address is not None
        numbers = [address.get(name) for name in ("controller", "target", "unit")]
        found.append((*image.attrib.values(), target.get("dev"), target.get("bus"), *numbers))
    return found


def test_a_linux_vm_of_generation_2_has_efi_without_secure_boot_and_virtio() -> None:
    found = domain(machine(secure_boot=True))
    system = found.find("os")
    assert system is not None
    assert system.get("firmware") == "efi"
    assert {each.get("name"): each.get("enabled") for each in system.iter("feature")} == {
        "enrolled-keys": "no",
        "secure-boot": "no",
    }
    assert ElementTree.tostring(system[0]).strip() == b'<type arch="x86_64" machine="q35">hvm</type>'
    assert disks(found) == [
        ("/srv/web/os.raw", "sda", "scsi", "0", "0", "0"),
        ("/srv/web/data-1.raw", "sdb", "scsi", "0", "1", "0"),
        ("/srv/web/data-5.raw", "sdc", "scsi", "0", "2", "0"),
    ]
    assert [each.find("boot") is not None for each in found.iter("disk")] == [True, False, False]
    assert {each.get("type") for each in found.iter("driver")} == {"raw"}
    interface = found.find("devices/interface")
    assert interface is not None
    assert ElementTree.canonicalize(ElementTree.tostring(interface), strip_text=True) == NETWORK
    assert (found.findtext("vcpu"), memory_mib(found)) == ("2", 8192)
    clock = found.find("clock")
    assert clock is not None
    assert clock.get("offset") == "utc"


def test_a_windows_vm_of_generation_1_has_bios_ahci_and_e1000e() -> None:
    many = (disk("os"), *(disk(f"data-{lun}", 4096 if lun in (3, 9) else 512) for lun in range(12)))
    found = domain(machine(os_type="windows", firmware="BIOS", disks=many))
    system = found.find("os")
    assert system is not None
    assert system.attrib == {}
    seen = disks(found)
    assert [each[1] for each in seen] == [f"sd{letter}" for letter in "abcdefghijklm"]
    ahci = [each[3:] for each in seen if each[2] == "sata"]
    assert ahci == [(str(at // 6), "0", str(at % 6)) for at in range(11)]
    assert [each[3:] for each in seen if each[2] == "scsi"] == [("0", "0", "0"), ("0", "1", "0")]
    assert [each.attrib for each in found.iter("controller")] == [
        {"type": "sata", "index": "0"},
        {"type": "sata", "index": "1"},
        {"type": "scsi", "index": "0", "model": "lsisas1068"},
    ]
    large = [each for each in found.iter("disk") if each.find("blockio") is not None]
    assert [each.attrib for each in found.iter("blockio")] == [
        {"logical_block_size": "4096", "physical_block_size": "4096"}
    ] * 2
    assert [each.find("source").get("file") for each in large] == [  # type: ignore[union-attr]
        "/srv/web/data-3.raw",
        "/srv/web/data-9.raw",
    ]
    assert [each.attrib for each in found.findall("devices/interface/model")] == [{"type": "e1000e"}]


def test_names_with_markup_stay_text_and_a_size_that_is_unknown_is_replaced() -> None:
    name = 'a</title><b>&"\u202e\x1b☃'
    odd = machine(name=name, vcpus=0, memory_mb=0, nics=(nic(""), nic("<mac/>"), nic("01-00-5E-00-00-01")))
    found = domain(odd, where="/srv/<&\"' x")
    assert found.findtext("title") == 'a</title><b>&"\\u202e\\x1b☃'
    assert found.findtext("name", "").startswith("a-title-b")
    assert disks(found)[0][0] == "/srv/<&\"' x/os.raw"
    assert len(found.findall("devices/interface")) == 3
    assert found.find("devices/interface/mac") is None
    assert (found.findtext("vcpu"), memory_mib(found)) == ("2", 4096)
    with pytest.raises(InvalidInput, match="cannot be written in XML"):
        domain(odd, {"os": Image("/srv/\udcff/os.raw")})


def test_each_replica_has_a_name_of_its_own_that_stays() -> None:
    def named(vm: Machine, where: str) -> tuple[str | None, str | None]:
        found = domain(vm, where=where)
        return found.findtext("name"), found.findtext("uuid")

    same = {named(machine(), "/srv/a"), named(machine(id=ID.upper(), memory_mb=1), "/srv/a")}
    others = {
        named(machine(id=f"{ID}2"), "/srv/a"),
        named(machine(), "/srv/b"),
        named(machine(name="WEB"), "/srv/c"),
    }
    assert len(same) == 1
    assert len(same | others) == 4


def test_devices_and_vhds_are_named_as_such_and_disks_without_an_image_are_left_out() -> None:
    images = {"os": Image("os.vhd", "vpc"), "data-1": Image("/dev/vg/web", is_device=True)}
    found = domain(machine(), images, "https://a.blob.core.windows.net/c/web")
    assert disks(found)[0][0] == f"/var/lib/libvirt/images/{found.findtext('name')}/os.vhd"
    assert disks(found)[1][0] == "/dev/vg/web"
    kinds = [(each.get("type"), each.find("driver").get("type")) for each in found.iter("disk")]  # type: ignore[union-attr]
    assert kinds == [("file", "vpc"), ("block", "raw")]
    assert (found.findtext("description") or "").endswith(f"as of {POINT}, without data-5")


def test_a_link_to_a_device_is_followed_to_the_name_that_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("/dev/disk/by-id/x")
    (tmp_path / "os.raw").symlink_to(tmp_path / "link")
    monkeypatch.setattr(Path, "is_block_device", lambda path: path.name == "os.raw")
    with ImageFolder(tmp_path, existing=True) as folder:
        assert folder.image("os") == Image("/dev/disk/by-id/x", is_device=True)
        assert folder.image("data-0") == Image(str(tmp_path / "data-0.raw"))


def test_what_cannot_be_written_is_a_notice(tmp_path: Path) -> None:
    told: list[Event] = []
    (tmp_path / DOMAIN).mkdir()
    with ImageFolder(tmp_path) as folder:
        handoff.write(folder, machine(), POINT, ["os"], told.append)
        handoff.write(object(), machine(), POINT, ["os"], told.append)
        (tmp_path / MACHINE).write_text("[" * 100_000)
        handoff.pass_on(folder, folder, POINT, ["os"], told.append)
    assert [type(event) for event in told] == [Notice, Notice]
    assert "domain.xml is not written, and what is there may be of an earlier point" in told[0].text  # type: ignore[union-attr]
    assert "are left out" in told[1].text  # type: ignore[union-attr]


def test_a_folder_whose_name_xml_cannot_hold_is_the_reason_without_a_domain(tmp_path: Path) -> None:
    told: list[Event] = []
    with ImageFolder(tmp_path / os.fsdecode(b"nu\xff")) as folder:
        handoff.write(folder, machine(), POINT, ["os"], told.append)
        assert folder.document(DOMAIN) is None
        assert folder.document(MACHINE) is not None
    assert "the name of this folder, which is not in UTF-8" in told[0].text  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "blobs"])
def test_they_stand_beside_the_images_of_the_last_good_point(
    azure: Sandbox,
    connect: Callable[..., Source],
    image: Callable[..., Path],
    told: list[Event],
    tmp_path: Path,
    kind: str,
) -> None:
    """A run that fails changes nothing; a restored replica has them for the newest point only."""
    azure.add_vm("web", image("os"), [image("data", MIB)])
    source = connect(environment={"replica_export_mechanism": "snapshots"})
    to, other = (
        (str(tmp_path / "web"), str(tmp_path / "other"))
        if kind == "folder"
        else ("blob://sandboxstorage/replicas/web", "blob://sandboxstorage/replicas/other")
    )

    def documents(place: str) -> list[bytes | None]:
        with places.open(place, print, source.storage, existing=True) as opened:
            return [opened.document(name) for name in NAMES]  # type: ignore[attr-defined]

    first = source.replicate("web", to, keep=1)
    text, xml = documents(to)
    assert text is not None
    assert xml is not None
    assert json.loads(text)["point"] == first.point
    assert json.loads(text)["name"] == "web"
    images = [Path(each[0]) for each in disks(ElementTree.fromstring(xml))]
    assert [path.stem for path in images] == ["os", "data-0"]
    if kind == "folder":
        assert all(path.is_file() for path in images)
        assert {stat.S_IMODE((tmp_path / "web" / name).stat().st_mode) for name in NAMES} == {0o600}
    azure.faults.add("refuse", method="PUT", path="/snapshots/", status=403, code="AuthorizationFailed")
    with pytest.raises(Denied):
        source.replicate("web", to)
    azure.faults.clear()
    assert documents(to) == [text, xml]
    second = source.replicate("web", to)
    while second.point == first.point:  # points are told to the second
        second = source.replicate("web", to)
    assert json.loads(documents(to)[0] or b"")["point"] == second.point
    assert source.status(to).disks == ("data-0", "os")
    assert all(verdict.verified for verdict in source.verify(to))

    source.restore(to, "latest", other)
    passed, domain = documents(other)
    assert passed == documents(to)[0]
    assert domain is not None
    assert domain != documents(to)[1]
    source.restore(to, first.point, f"{other}-2")
    assert documents(f"{other}-2") == [None, None]
    assert any("are left out" in event.text for event in told if isinstance(event, Notice))


CAN_START = os.geteuid() == 0 and all(map(shutil.which, ("virt-qemu-run", "qemu-system-x86_64", "unshare")))


@pytest.fixture(scope="module")
def driver() -> Iterator[Path]:
    """A folder for libvirt's QEMU driver, whose path is short enough for its sockets, and for images."""
    with tempfile.TemporaryDirectory(prefix="lv-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "etc").mkdir()
        (folder / "etc/qemu.conf").write_text(
            'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nnamespaces = []\ncgroup_controllers = []\n'
            'stdio_handler = "file"\n'
        )
        for file in (
            "passwd",
            "group",
        ):  # the driver looks up its user and group, even where it does not use them
            text = Path("/etc", file).read_text()
            (folder / file).write_text(f"{text}libvirt-qemu:x:64055:64055::/:/bin/false\nkvm:x:64056:\n")
        yield folder


@pytest.mark.slow
@pytest.mark.skipif(not CAN_START, reason="needs root, and libvirt's QEMU driver with QEMU")
@pytest.mark.parametrize(("system", "firmware"), [("linux", "EFI"), ("linux", "BIOS"), ("windows", "EFI")])
def test_qemu_starts_what_libvirt_makes_of_the_domain(driver: Path, system: str, firmware: str) -> None:
    """All but three things as we write it: no KVM and its processor, no network of libvirt's, less memory."""
    held = (disk("os"), disk("data-1", 4096 if system == "windows" else 512))
    for each in held:
        with (driver / f"{each.name}.raw").open("wb") as image:
            image.truncate(MIB)
    found = domain(machine(os_type=system, firmware=firmware, disks=held, memory_mb=256), where=str(driver))
    found.set("type", "qemu")
    for processor in found.iter("cpu"):
        processor.set("mode", "maximum")
    for interface in found.iter("interface"):
        interface.set("type", "user")
        interface.remove(*interface.findall("source"))
    (driver / "domain.xml").write_bytes(ElementTree.tostring(found))
    mounts = "mount --bind passwd /etc/passwd && mount --bind group /etc/group"
    with subprocess.Popen(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f"{mounts} && exec timeout 120 virt-qemu-run -v -r {driver} domain.xml",
        ],
        cwd=driver,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as running:
        assert running.stdout is not None
        told = []
        for line in running.stdout:
            told.append(line)
            if "guest running" in line:
                running.send_signal(signal.SIGINT)
    assert any("guest running" in line for line in told), "".join(told)
    assert running.returncode == 0


def commands() -> list[str]:
    """The commands of qemu-img that the page shows."""
    page = (Path(__file__).parent.parent / "docs/howto/handoff.md").read_text()
    found = [line.partition("#")[0].strip() for line in page.splitlines() if line.startswith("qemu-img ")]
    assert len(found) > 5
    return found


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
@pytest.mark.parametrize("command", commands())
def test_each_command_of_qemu_img_keeps_the_content(command: str, tmp_path: Path) -> None:
    content = bytes(MIB) + random.Random(1).randbytes(MIB) + bytes(MIB)
    (tmp_path / "os.raw").write_bytes(content)
    made = datetime(2026, 1, 1, tzinfo=timezone.utc)
    (tmp_path / "os.vhd").write_bytes(content + vhd.footer(len(content), uuid.UUID(int=1), made))
    subprocess.run(command.split(), cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    made_of_it = command.split()[-1]
    compared = ["qemu-img", "compare", "-f", "raw", "os.raw", made_of_it]
    subprocess.run(compared, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", made_of_it], cwd=tmp_path, check=True, capture_output=True
    )
    assert json.loads(told.stdout)["virtual-size"] == len(content)
