"""Remedies, followed to the letter: what an error says to do is done, and the error is gone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from coriolis_azure import settings
from coriolis_azure.errors import CoriolisAzureError, CorruptChunk, InvalidInput, NotFound, Unsupported
from coriolis_azure.events import silent
from coriolis_azure.replica import places
from coriolis_azure.replica.folder import ImageFolder
from coriolis_azure.sandbox import Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.block_devices import command, loop, mounted
from harness.constants import GROUP, MIB
from harness.processes import PROCESSES, completed

Connect = Callable[..., Source]
Image = Callable[..., Path]


def quoted(remedy: str) -> list[str]:
    """What a remedy offers to write: `90s, 15m, 2h or 0s`, `as 50MiB/s`."""
    offered = re.search(r" as (.*)\.$", remedy)
    assert offered, remedy
    return re.split(r", | or ", offered[1])


# Settings


def test_a_duration_written_as_the_remedy_says_is_one() -> None:
    with pytest.raises(InvalidInput) as error:
        settings.duration("soon")
    assert [settings.duration(text) for text in quoted(error.value.remedy)] == [90, 900, 7200, 0]


def test_exclude_disks_takes_the_names_that_the_remedy_lists(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os"), [image("data", MIB)])
    source = connect({"exclude_disks": ["data-7"]})
    machine = source.inspect("web")
    with pytest.raises(InvalidInput) as error:
        source.chosen(machine)
    known = error.value.remedy.removeprefix("Its disks are ").removesuffix(".").split(", ")
    for name in known:
        source = connect({"exclude_disks": [name]})
        assert name not in [disk.name for disk in source.chosen(source.inspect("web"))]


def test_the_location_that_the_remedy_names_is_the_one(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os"))
    with pytest.raises(InvalidInput) as error:
        connect({"location": "eastus2"}).inspect("web")
    location = error.value.remedy.removeprefix("Set the location of the source environment to ").removesuffix(
        "."
    )
    assert connect({"location": location}).inspect("web").name == "web"


@pytest.mark.parametrize(
    ("wrong", "said", "right"),
    [
        (
            "atlantis",
            "Choose one of northeurope, westeurope, westus.",
            ["northeurope", "westeurope", "westus"],
        ),
        ("westeurop", "Did you mean westeurope?", ["westeurope"]),
        ("Europe West", "Did you mean westeurope?", ["westeurope"]),
    ],
)
def test_a_location_that_azure_does_not_have_is_told_with_those_it_has(
    azure: Sandbox, connect: Connect, image: Image, wrong: str, said: str, right: list[str]
) -> None:
    """Where nothing is found, and in a check: nobody need wonder where the VMs are."""
    azure.add_vm("web", image("os"))
    with pytest.raises(InvalidInput, match="is not a location where this subscription can have VMs") as error:
        connect({"location": wrong}).list_vms()
    assert error.value.remedy == said
    assert said in [finding.remedy for finding in connect({"location": wrong}).check(None).errors]
    for location in right:
        assert len(connect({"location": location}).list_vms()) == (location == "westeurope")


def test_a_location_may_be_given_by_the_name_that_people_see(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os"))
    assert connect({"location": "West US"}).list_vms() == []
    assert [vm["name"] for vm in connect({"location": "West Europe"}).list_vms()] == ["web"]
    assert not [
        error
        for error in connect({"location": "West Europe"}).check("web").errors
        if "location" in error.text
    ]


def test_where_the_locations_may_not_be_read_no_vms_are_no_vms(azure: Sandbox, connect: Connect) -> None:
    azure.permissions[:] = [
        {"actions": ["*"], "notActions": ["Microsoft.Resources/subscriptions/providers/read"]}
    ]
    assert connect({"location": "atlantis"}).list_vms() == []


def test_a_vm_that_the_remedy_lists_is_there(azure: Sandbox, source: Source, image: Image) -> None:
    azure.add_vm("web", image("os"))
    with pytest.raises(NotFound) as error:
        source.inspect("wbe")
    names = error.value.remedy.partition(f"VMs in {GROUP}: ")[2].removesuffix(".").split(", ")
    assert [source.inspect(name).name for name in names] == ["web"]


@pytest.mark.parametrize("name", ["we/b", "/subscriptions/x/web"])
def test_a_vm_is_found_by_its_name_and_by_its_arm_id(
    azure: Sandbox, source: Source, image: Image, name: str
) -> None:
    id = azure.add_vm("web", image("os"))
    with pytest.raises(InvalidInput, match="is not a valid VM name, and not an ARM id") as error:
        source.inspect(name)
    assert error.value.remedy == "Give the VM's name, or its ARM id in the subscription of the connection."
    assert source.inspect("web") == source.inspect(id)


# Disks that cannot be read


@pytest.mark.slow
@pytest.mark.parametrize("called", ["data-0", "old-1-data-0.vhd", "its URI"])
def test_a_vhd_that_cannot_be_read_is_left_out_with_exclude_disks(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, called: str
) -> None:
    azure.add_vm("old-1", image("os"), [image("data", MIB, seed=1)], VmSpec(unmanaged="sandboxstorage"))
    uri = connect().inspect("old-1").disks[1].id
    blob = azure.storage.blob("sandboxstorage/vhds/old-1-data-0.vhd")
    assert blob is not None
    azure.storage.overwrite(blob, blob.size - 512, bytes(512))
    with pytest.raises(Unsupported) as error:
        connect().replicate("old-1", tmp_path / "replica")
    assert "leave the disk out with exclude_disks" in error.value.remedy
    left_out = connect({"exclude_disks": [uri if called == "its URI" else called]})
    assert left_out.check("old-1").ok
    done = left_out.replicate("old-1", tmp_path / "replica")
    assert [disk.name for disk in done.disks] == ["os"]


# Places


def as_nobody(path: str, existing: bool) -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    with ImageFolder(Path(path), silent, existing=existing):
        pass


def refused(path: Path, existing: bool) -> InvalidInput | None:
    """How a user who is not root is refused a folder, if at all."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        error = pool.submit(as_nobody, str(path), existing).exception()
    assert error is None or isinstance(error, InvalidInput)
    return error


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder of root's that anybody may get to: pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_that_cannot_be_written_may_be_once_the_user_has_the_right(
    open_folder: Path, existing: bool
) -> None:
    place = open_folder / "replica"
    place.mkdir(mode=0o755)
    if existing:
        with ImageFolder(place, silent):
            pass
        (place / ".lock").chmod(0o600)
    error = refused(place, existing)
    if existing and error is None:
        return  # nothing need be written there to read it
    assert error is not None
    assert error.remedy == f"Give this user the right to read and write {place}, or give another folder."
    for path in (place, *place.iterdir()):
        os.chown(path, 65534, 65534)
    assert refused(place, existing) is None


def test_a_folder_that_is_not_there_or_no_folder_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as error:
        ImageFolder(tmp_path / "none", silent, existing=True)
    assert error.value.remedy == "Give an existing folder."
    (tmp_path / "none").mkdir()
    ImageFolder(tmp_path / "none", silent, existing=True).close()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(InvalidInput, match="cannot be used as a destination") as error:
            ImageFolder(path, silent)
        assert error.value.remedy.startswith("Give a folder: a file of that name")


def test_a_folder_in_a_damaged_file_system_is_used_once_that_is_repaired(tmp_path: Path) -> None:
    medium = tmp_path / "medium"
    with medium.open("wb") as file:
        file.truncate(8 << 20)
    with loop(medium) as device:
        command("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "fs") as at:
            (at / "web").mkdir()
        command("debugfs", "-w", "-R", "sif /web block[0] 0", device)
        with mounted(device, tmp_path / "fs") as at, pytest.raises(InvalidInput) as error:
            ImageFolder(at / "web", silent)
        assert "(fsck)" in error.value.remedy
        subprocess.run(["fsck.ext4", "-fy", str(device)], stdout=subprocess.DEVNULL, check=False)
        with mounted(device, tmp_path / "fs") as at:
            ImageFolder(at / "web", silent).close()


def test_a_folder_of_another_vm_is_taken_once_its_note_is_removed(tmp_path: Path) -> None:
    with ImageFolder(tmp_path, silent) as folder:
        folder.claim("/vms/one")
    with ImageFolder(tmp_path, silent) as folder:
        with pytest.raises(InvalidInput) as error:
            folder.claim("/vms/two")
        note = error.value.remedy.rpartition("remove ")[2].removesuffix(".")
        Path(note).unlink()
        folder.claim("/vms/two")


def test_a_folder_in_use_is_free_when_the_other_run_has_ended(tmp_path: Path) -> None:
    with ImageFolder(tmp_path, silent), pytest.raises(InvalidInput) as error:
        ImageFolder(tmp_path, silent)
    assert error.value.remedy == "Wait until it ends, or give another folder."
    ImageFolder(tmp_path, silent).close()


@pytest.mark.parametrize("url", ["ftp://host/x", "file://host/x"])
def test_a_destination_written_as_the_remedy_says_is_one(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidInput) as error:
        places.open(url, silent)
    assert "file://" in error.value.remedy
    for good in (str(tmp_path), f"file://{tmp_path}"):
        places.open(good, silent).close()


@pytest.mark.slow
def test_a_replica_that_is_not_there_is_after_a_run(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    (tmp_path / "replica").mkdir()
    with pytest.raises(InvalidInput, match="there is no replica") as error:
        source.verify(tmp_path / "replica")
    assert error.value.remedy.startswith("Replicate a VM to it first.")
    source.replicate("web", tmp_path / "replica")
    assert all(verdict.verified for verdict in source.verify(tmp_path / "replica"))


@pytest.mark.slow
def test_a_replica_that_differs_is_right_after_a_full_run(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    """What `verify` says to do is done: --full."""
    images = tmp_path / "images"
    azure.add_vm("web", image("os"))
    source.replicate("web", images)
    with (images / "os.raw").open("r+b") as stranger:
        stranger.write(b"x" * 4096)
    done = completed(["verify", str(images)])
    assert done.returncode == CorruptChunk.exit_code
    assert "with --full" in done.stderr
    source.replicate("web", images, full=True)
    assert completed(["verify", str(images)]).returncode == 0


# The network


@pytest.mark.slow
def test_a_subnet_that_the_remedy_lists_and_the_ways_to_write_it(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os"))
    with pytest.raises(InvalidInput) as error:
        connect({"export_network": "sandbox-vnet/none"}).check("web").checked_machine()
    listed = error.value.remedy.partition("Choose one of its subnets: ")[2].partition(".")[0].split(", ")
    assert listed
    for subnet in listed:
        assert connect({"export_network": f"sandbox-vnet/{subnet}"}).check("web").ok
    with pytest.raises(InvalidInput) as error:
        connect({"export_network": "sandbox-vnet"}).check("web").checked_machine()
    assert "Write it as vnet/subnet, or as the ARM id of a subnet." in error.value.remedy


# This host


@pytest.mark.slow
def test_a_journal_that_cannot_be_kept_is_kept_where_xdg_state_home_says(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    azure.add_vm("web", image("os"))
    (tmp_path / "no-folder").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "no-folder"))
    with pytest.raises(CoriolisAzureError) as error:
        connect().replicate("web", tmp_path / "images")
    assert error.value.remedy == "Set XDG_STATE_HOME to a folder that this user may write to."
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    connect().replicate("web", tmp_path / "images")


def test_codes_that_explain_offers_are_explained() -> None:
    offered = completed(["explain", "QuotaExceded", "--json"]).stderr
    codes = json.loads(offered)["remedy"].removeprefix("Try ").partition(";")[0].split(" or ")
    for code in codes:
        assert completed(["explain", code]).returncode == 0
    assert completed(["explain"]).returncode == 0


@pytest.mark.parametrize("line", [["replicate"], ["sandbox", "add-vm"], ["nonsense"], ["list", "--bogus"]])
def test_the_help_that_a_usage_error_names_is_there(line: list[str]) -> None:
    told = completed(line).stderr
    named = re.search(r"Run `coriolis-azure (.*--help)`", told)
    assert named
    assert completed(named[1].split()).stdout.startswith("Usage: coriolis-azure")
