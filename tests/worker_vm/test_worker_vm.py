"""A real worker: Debian with systemd, udev, cloud-init and OpenSSH, in QEMU, with exactly our user data.

Not part of the suite: `tox -e worker`. The images and the customer's disks are made once and kept: ten minutes for each
suite. After that boots are what takes time: without KVM two to eight minutes each. The tests of a suite share one
worker, and one that restarts it leaves it running for the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import customer
import debian
import pytest
from customer import Disk
from hypervisor import VM, Hypervisor
from qemu import BOOT_SECONDS, Machine, running

from coriolis_azure import errors, transfer
from coriolis_azure.clock import Clock
from coriolis_azure.events import Copied, Event, Notice, Report, silent
from coriolis_azure.model import Worker
from coriolis_azure.readers import channel, rate_limiter, ssh
from coriolis_azure.readers.conversation import Job
from coriolis_azure.run import attached_disks
from coriolis_azure.worker.attachment import Attachment
from harness.copies import by_agent
from harness.images import Image

MIB = 1 << 20
CHUNK = MIB
PORTS = {"debian12": 22, "debian13": 2222}  # of the SSH server
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
_LATE = """
mkdir -p /etc/systemd/system/ssh.service.d
printf '[Service]\\nExecStartPre=/bin/sleep 60\\n' > /etc/systemd/system/ssh.service.d/late.conf
sync
"""

if debian.missing():
    pytest.skip(f"not on this host: {', '.join(debian.missing())}", allow_module_level=True)


@pytest.fixture(scope="module", params=list(debian.SUITES))
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def image(suite: str) -> debian.Image:
    return debian.image(suite)


@pytest.fixture(scope="module")
def disks(image: debian.Image) -> list[Disk]:
    """The customer's disks, which nothing may change."""
    return customer.disks(image)


@pytest.fixture(scope="module")
def running_worker(
    suite: str, image: debian.Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """One worker for all tests of a suite: each boot takes minutes without KVM."""
    folder = tmp_path_factory.mktemp("vm") / "worker"
    with running(Machine(image, folder, PORTS[suite])) as machine:
        yield machine


@pytest.fixture
def machine(running_worker: Machine) -> Iterator[Machine]:
    """It, running, with nothing attached before and after."""
    running_worker.revive()  # one that died in a test before fails only that one
    yield running_worker
    for lun in list(running_worker.attached):
        running_worker.detach(lun)


@pytest.fixture(autouse=True)
def minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A boot without KVM takes minutes, and so does all else beside other work."""
    monkeypatch.setattr(ssh, "RECONNECT_SECONDS", BOOT_SECONDS)
    monkeypatch.setattr(ssh, "READY_SECONDS", BOOT_SECONDS)


def healthy(machine: Machine) -> None:
    """Nothing has failed while it booted, and its root is its own."""
    state = machine.run("systemctl is-system-running --wait || systemctl --failed --no-legend", BOOT_SECONDS)
    assert state == "running", state
    root = machine.run(
        "udevadm info -q property -n $(findmnt -no SOURCE /) | grep ^ID_PATH=; cat /etc/hostname"
    )
    assert root == f"ID_PATH=pci-0000:00:{debian.OWN_BUS}.0-scsi-0:0:0:0\nworker"


def test_the_first_boot_ends_well_while_it_is_connected_to(machine: Machine) -> None:
    """It is asked for from its power-on, as a run does it, and shows our host key when it answers."""
    healthy(machine)
    assert machine.run("cloud-init status --wait") == "status: done"


def digest(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MIB):
            content.update(piece)
    return content.hexdigest()


def clones_of(disks: list[Disk], folder: Path) -> list[Disk]:
    folder.mkdir()
    return [Disk(d.name, d.lun, debian.copy(d.path, folder / d.path.name), d.sector) for d in disks]


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
    job = Job(attached_disks.devices(clone.lun), size, wait=300)

    def agent(line: ssh.Line) -> ssh.AgentStream:
        line.connect()
        return line.agent()

    with ssh.Line(machine.worker, Clock(), report) as line, Image(to) as image:
        return by_agent(
            lambda: (start or agent)(line),
            job,
            image.known(clone.name, size, MIB, full=False),
            image,
            report,
            disk=clone.name,
            limiter=rate_limiter.RateLimiter(rate, Clock()) if rate else None,
            direct=channel.Direct("127.0.0.1", machine.data_port, report) if direct else None,
        )


_TRACES = r"""
cd /sys/block; for disk in sd*; do echo "disk $disk $(readlink -f $disk)"; done
grep ^md /proc/mdstat | sed 's/^/array /'
dmsetup ls | grep -v '^No devices' | sed 's/^/mapping /'
sed '1d; s/^/swap /' /proc/swaps
ls -d sd*/holders/* sd*/sd*/holders/* 2>/dev/null | sed 's/^/holder /'
grep ^/dev/sd /proc/mounts | sed 's/^/mount /'
cd /dev/disk; for link in by-*/*; do echo "name $(readlink -f $link) $link"; done
cd /dev; for device in sd*; do echo "read-only $device $(blockdev --getro $device)"; done
"""


def untouched(machine: Machine) -> None:
    """Nothing of the worker's has taken a clone: no mount, no array, no mapping, no swap, no name."""
    traces: dict[str, list[list[str]]] = {}
    for line in machine.run(_TRACES).splitlines():
        kind, *words = line.split()
        traces.setdefault(kind, []).append(words)
    (own,) = [disk for disk, place in traces.pop("disk") if f"0000:00:{debian.OWN_BUS}.0/" in place]
    mounts, names, modes = traces.pop("mount"), traces.pop("name"), traces.pop("read-only")
    assert traces == {}
    assert all(mount[0].startswith(f"/dev/{own}") for mount in mounts)
    assert [name for device, name in names if device.startswith("/dev/sd") and own not in device] == []
    others = [(device, mode) for device, mode in modes if not device.startswith(own)]
    assert {mode for _, mode in others} == {"1"}, modes


def test_clones_are_read_and_nothing_else_happens_to_them(
    machine: Machine, disks: list[Disk], tmp_path: Path
) -> None:
    """The same labels and UUIDs as the worker's own disk, LVM, md, btrfs, XFS, swap, sectors of 4096 bytes."""
    clones = clones_of(disks, tmp_path / "clones")
    before = {clone.name: digest(clone.path) for clone in clones}
    attach(machine, clones)
    untouched(machine)
    small = [
        clone for clone in clones if clone.name != "os"
    ]  # another test copies that one, which takes minutes
    for number, clone in enumerate(small):
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
    for number, clone in enumerate(clone for clone in later if clone.name != "os"):
        outcome = copied(machine, clone, tmp_path / f"{clone.name}.raw", direct=number % 2 != 0)
        assert 0 < outcome.sent_bytes <= 4 * 4096
        assert digest(tmp_path / f"{clone.name}.raw") == before[clone.name]
    detach(machine, later)
    assert {clone.name: digest(clone.path) for clone in clones} == before


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

    with pytest.raises(errors.AgentFailed, match=r"xfs: .*lun1 (ends )?at offset") as caught:
        copied(machine, Disk("xfs", 1, clone.path), tmp_path / "gone.raw", report=pull_out, rate=4 * MIB)
    assert caught.value.facts["disk"] == "xfs"
    assert caught.value.facts["offset"] is not None
    healthy(machine)


def test_a_pool_worker_comes_back_with_its_ssh_server_late_and_reads_what_changed(
    machine: Machine, disks: list[Disk], tmp_path: Path
) -> None:
    """Deallocated and started; its SSH server takes a minute longer than the rest."""
    (clone,) = clones_of([disk for disk in disks if disk.name == "xfs"], tmp_path / "clones")
    attach(machine, [clone])
    assert copied(machine, clone, tmp_path / "xfs.raw").full
    detach(machine, [clone])
    boot = machine.run(BOOT_ID)
    machine.run(_LATE)
    machine.stop()
    machine.start()
    healthy(machine)
    assert machine.run(BOOT_ID) != boot
    names = ("InactiveExitTimestampMonotonic", "ExecMainStartTimestampMonotonic")
    begun, answering = (int(machine.run(f"systemctl show ssh.service -P {name}")) for name in names)
    assert answering - begun > 50_000_000  # microseconds
    machine.run("rm -r /etc/systemd/system/ssh.service.d; sync")
    with clone.path.open("r+b") as file:
        file.seek(100 * MIB)
        file.write(b"changed")
    attach(machine, [clone])
    untouched(machine)
    outcome = copied(machine, clone, tmp_path / "xfs.raw", direct=True)
    assert 0 < outcome.sent_bytes <= 4096
    assert digest(tmp_path / "xfs.raw") == digest(clone.path)


def test_a_worker_that_boots_again_in_mid_copy_gets_new_clones(
    machine: Machine, disks: list[Disk], tmp_path: Path
) -> None:
    """It may come up from the clone, write to it and answer with our key; the replica is right all the same."""
    (snapshot,) = [disk for disk in disks if disk.name == "os"]
    made: list[Path] = []
    told: list[Event] = []
    reader = Worker(**{**vars(machine.worker), "vm": VM})
    azure = Hypervisor(machine)

    def make(before: int) -> list[str]:
        made.append(tmp_path / f"clone-{before}.raw")
        return [str(debian.copy(snapshot.path, made[-1]))]

    def reset_once(event: Event) -> None:
        told.append(event)
        if isinstance(event, Copied) and event.done > 100 * MIB and machine.resets == 0:
            machine.reset()

    machine.connect().close()
    with Attachment(azure, reader, make, lambda ids: None, Clock(), told.append) as attachment:  # type: ignore[arg-type]
        start = attachment.agent
        copied(machine, snapshot, tmp_path / "os.raw", report=reset_once, direct=True, start=start)
    assert digest(tmp_path / "os.raw") == digest(snapshot.path)
    assert azure.acts == ["power off", "start"]
    assert any("recreated" in event.text for event in told if isinstance(event, Notice))
    assert digest(made[1]) == digest(snapshot.path)
    healthy(machine)


def test_a_worker_comes_back_from_a_reboot(machine: Machine) -> None:
    """No unit may fail, and its SSH server may not fall back to another port."""
    boot = machine.run(BOOT_ID)
    machine.reboot()
    healthy(machine)
    assert machine.run(BOOT_ID) != boot
    ports = machine.run("ss -Hltn | sed -E 's/.*:([0-9]+) .*/\\1/' | sort -u")
    assert str(machine.ssh_port) in ports.split()
    assert machine.ssh_port == 22 or "22" not in ports.split()
