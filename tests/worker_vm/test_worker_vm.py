"""A real worker: Debian with systemd, udev, cloud-init and OpenSSH, in QEMU, with exactly our user data.

Not part of the suite: `tox -e worker`. It takes minutes, most of them to build the images, which are kept.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import customer
import images
import pytest
from customer import Disk
from hypervisor import VM, Hypervisor
from qemu import BOOT_SECONDS, Machine, running

from coriolis_azure import errors, ssh, transfer, worker
from coriolis_azure.attachment import Attachment
from coriolis_azure.clock import Clock
from coriolis_azure.destinations import Image
from coriolis_azure.events import Copied, Event, Notice, Report, silent
from coriolis_azure.model import Worker

MIB = 1 << 20
CHUNK = MIB
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"

if images.missing():
    pytest.skip(f"not on this host: {', '.join(images.missing())}", allow_module_level=True)


@pytest.fixture(scope="module", params=list(images.SUITES))
def image(request: pytest.FixtureRequest) -> images.Image:
    return images.image(request.param)


@pytest.fixture(scope="module")
def disks(image: images.Image, tmp_path_factory: pytest.TempPathFactory) -> list[Disk]:
    """The customer's disks, which nothing may change."""
    return customer.disks(image, tmp_path_factory.mktemp("customer") / "disks")


@pytest.fixture
def machine(image: images.Image, tmp_path: Path) -> Iterator[Machine]:
    with running(Machine(image, tmp_path / "worker")) as machine:
        yield machine


def healthy(machine: Machine) -> None:
    """Nothing has failed while it booted, and its root is its own."""
    state = machine.run("systemctl is-system-running --wait || systemctl --failed --no-legend")
    assert state == "running", state
    assert machine.run("cat /etc/hostname") == "worker"
    root = machine.run("findmnt -no SOURCE /")
    place = machine.run(f"udevadm info -q property -n {root} | sed -n s/^ID_PATH=//p")
    assert place == f"pci-0000:00:{images.OWN_BUS}.0-scsi-0:0:0:0"


@pytest.mark.parametrize("port", [22, 2222])
def test_a_worker_comes_back_from_every_restart(image: images.Image, tmp_path: Path, port: int) -> None:
    """Reboot, reset, and what a pool does: deallocate and start. No unit may fail."""
    with running(Machine(image, tmp_path / "worker", port)) as machine:
        healthy(machine)
        assert machine.run("cloud-init status --wait") == "status: done"
        boots = {machine.run(BOOT_ID)}
        for restart in (machine.reboot, machine.reset):
            restart()
            healthy(machine)
            boots.add(machine.run(BOOT_ID))
        assert len(boots) == 3
        machine.stop()
        machine.start()
        healthy(machine)


def digest(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MIB):
            content.update(piece)
    return content.hexdigest()


def clones_of(disks: list[Disk], folder: Path) -> list[Disk]:
    folder.mkdir()
    return [Disk(d.name, d.lun, Path(shutil.copyfile(d.path, folder / d.path.name)), d.sector) for d in disks]


def attach(machine: Machine, clones: list[Disk]) -> None:
    for clone in clones:
        machine.attach(clone.lun, clone.path, sector=clone.sector)
    machine.see([clone.lun for clone in clones])


def detach(machine: Machine, clones: list[Disk]) -> None:
    for clone in clones:
        machine.detach(clone.lun)


def copied(
    machine: Machine,
    clone: Disk,
    to: Path,
    *,
    report: Report = silent,
    direct: bool = False,
    start: Callable[[ssh.Line], ssh.AgentStream] | None = None,
    rate: int = 0,
) -> transfer.Outcome:
    """Copy what is at the clone's LUN, as the product does it."""
    size = clone.path.stat().st_size
    job = transfer.Job(clone.name, worker._devices(clone.lun), size, wait=300)

    def agent(line: ssh.Line) -> ssh.AgentStream:
        line.connect()
        return line.agent()

    with ssh.Line(machine.worker, Clock(), report) as line, Image(to) as image:
        return transfer.copy(
            lambda: (start or agent)(line),
            job,
            image.known(clone.name, size, MIB, False),
            image,
            report,
            clock=Clock(),
            verify=True,
            pace=transfer.Pace(rate, Clock()) if rate else None,
            direct=transfer.Direct("127.0.0.1", machine.data_port, report) if direct else None,
        )


def untouched(machine: Machine) -> None:
    """Nothing of the worker's has taken a clone: no mount, no array, no mapping, no swap, no name."""
    places = machine.run("for disk in /sys/block/sd*; do readlink -f $disk; done").split()
    letters = [Path(place).name for place in places]
    own = [Path(place).name for place in places if f"0000:00:{images.OWN_BUS}.0/" in place]
    others = [letter for letter in letters if letter not in own]
    assert len(own) == 1
    assert others
    assert machine.run("cat /proc/mdstat | grep ^md || true") == ""
    assert machine.run("dmsetup ls") == "No devices found"
    assert len(machine.run("cat /proc/swaps").splitlines()) == 1
    assert (
        machine.run("ls -d /sys/block/sd*/holders/* /sys/block/sd*/sd*/holders/* 2>/dev/null || true") == ""
    )
    mounted = machine.run("grep ^/dev/sd /proc/mounts | cut -d' ' -f1").split()
    assert mounted
    assert all(source.startswith(f"/dev/{own[0]}") for source in mounted)
    named = machine.run("cd /dev/disk; for l in by-*/*; do readlink -f $l; done | sort -u").split()
    assert not [name for name in named if any(name.startswith(f"/dev/{other}") for other in others)]
    for other in others:
        assert machine.run(f"blockdev --getro /dev/{other}") == "1"


def test_clones_are_read_and_nothing_else_happens_to_them(
    machine: Machine, disks: list[Disk], tmp_path: Path
) -> None:
    """The same labels and UUIDs as the worker's own disk, LVM, md, btrfs, XFS, swap, sectors of 4096 bytes."""
    clones = clones_of(disks, tmp_path / "clones")
    before = {clone.name: digest(clone.path) for clone in clones}
    attach(machine, clones)
    untouched(machine)
    for number, clone in enumerate(clones):
        told: list[Event] = []
        outcome = copied(
            machine, clone, tmp_path / f"{clone.name}.raw", report=told.append, direct=number % 2 == 0
        )
        assert outcome.full
        assert digest(tmp_path / f"{clone.name}.raw") == before[clone.name]
        assert not [event for event in told if isinstance(event, Notice)]
    untouched(machine)
    healthy(machine)
    detach(machine, clones)
    assert {clone.name: digest(clone.path) for clone in clones} == before

    # A later run, the disks in another order, over the other channel.
    for clone in clones:
        with clone.path.open("r+b") as file:
            for offset in (0, clone.path.stat().st_size - 4096):
                file.seek(offset)
                file.write(clone.name.encode() * 100)
    later = [
        Disk(clone.name, len(clones) - clone.lun, clone.path, clone.sector) for clone in reversed(clones)
    ]
    before = {clone.name: digest(clone.path) for clone in clones}
    attach(machine, later)
    for number, clone in enumerate(later):
        outcome = copied(machine, clone, tmp_path / f"{clone.name}.raw", direct=number % 2 == 0)
        assert 0 < outcome.sent_bytes <= 4 * 4096
        assert digest(tmp_path / f"{clone.name}.raw") == before[clone.name]
    detach(machine, later)
    assert {clone.name: digest(clone.path) for clone in clones} == before


def test_a_worker_that_boots_again_in_mid_copy_gets_new_clones(
    machine: Machine, disks: list[Disk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come up from the clone, write to it and answer with our key; the replica is right all the same."""
    monkeypatch.setattr(ssh, "RECONNECT_SECONDS", BOOT_SECONDS)  # a boot without KVM takes minutes
    monkeypatch.setattr(ssh, "READY_SECONDS", BOOT_SECONDS)
    (snapshot,) = [disk for disk in disks if disk.name == "os"]
    made: list[Path] = []
    told: list[Event] = []
    reader = Worker(**{**vars(machine.worker), "vm": VM})
    azure = Hypervisor(machine)

    def make(before: int) -> list[str]:
        made.append(tmp_path / f"clone-{before}.raw")
        return [str(shutil.copyfile(snapshot.path, made[-1]))]

    def reset_once(event: Event) -> None:
        told.append(event)
        if isinstance(event, Copied) and event.done > 100 * MIB and machine.resets == 0:
            machine.reset()

    machine.connect().close()
    with Attachment(azure, reader, make, lambda ids: None, Clock(), told.append) as attachment:  # type: ignore[arg-type]
        copied(machine, snapshot, tmp_path / "os.raw", report=reset_once, start=attachment.agent)
    assert digest(tmp_path / "os.raw") == digest(snapshot.path)
    assert azure.acts == ["power off", "start"]
    assert any("made anew" in event.text for event in told if isinstance(event, Notice))
    assert digest(made[1]) == digest(snapshot.path)
    healthy(machine)


def test_a_clone_that_fails_or_is_pulled_out_is_named_with_the_place(
    machine: Machine, disks: list[Disk], tmp_path: Path
) -> None:
    (clone,) = clones_of([disk for disk in disks if disk.name == "xfs"], tmp_path / "clones")
    with clone.path.open("r+b") as file:
        for offset in range(0, 64 * MIB, MIB):
            file.seek(offset)
            file.write(bytes([1 + offset // MIB]) * MIB)
    machine.attach(0, clone.path, fails_at=20 * MIB)
    machine.see([0])
    with pytest.raises(errors.AgentFailed, match=r"xfs: .*lun0 at offset 2") as caught:
        copied(machine, Disk("xfs", 0, clone.path), tmp_path / "fails.raw")
    assert (caught.value.facts["disk"], caught.value.facts["offset"] // MIB) == ("xfs", 20)
    machine.detach(0)

    machine.attach(1, clone.path)
    machine.see([1])

    def pull_out(event: Event) -> None:
        if isinstance(event, Copied) and event.done > 8 * MIB and 1 in machine.attached:
            machine.detach(1)

    with pytest.raises(errors.AgentFailed, match=r"xfs: .*lun1 at offset") as caught:
        copied(machine, Disk("xfs", 1, clone.path), tmp_path / "gone.raw", report=pull_out, rate=4 * MIB)
    assert caught.value.facts["disk"] == "xfs"
    assert caught.value.facts["offset"] is not None
    healthy(machine)
