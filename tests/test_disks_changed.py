"""A VM whose disks are changed after a run has read it: the run ends before it makes anything of the wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from coriolis_azure.errors import DisksChanged, NotFound
from coriolis_azure.model import Json
from coriolis_azure.replica import places
from coriolis_azure.sandbox import Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.constants import MIB

Image = Callable[..., Path]
Change = Callable[[Source], None]


@pytest.fixture
def disks(azure: Sandbox, source: Source, image: Image) -> list[Path]:
    """Those of the VM web, and a spare one, which the VM other has given up."""
    files = [image(name, MIB, seed) for seed, name in enumerate(("os", "data", "spare"))]
    azure.add_vm("web", files[0], [files[1]])
    azure.add_vm("other", image("x", MIB, 9), [files[2]])
    has(source, "other", {})
    return files


def has(source: Source, vm: str, luns: dict[int, str]) -> None:
    """The VM gets these data disks, by name, and no others."""
    machine = source.inspect(vm)
    folder = machine.disks[0].id.rpartition("/")[0]
    attached = [
        {"lun": lun, "createOption": "Attach", "managedDisk": {"id": f"{folder}/{name}"}}
        for lun, name in luns.items()
    ]
    body = {"properties": {"storageProfile": {"dataDisks": attached}}}
    source.azure.patch_vm(machine.id, body, source.azure.get(machine.id)["etag"])


def swapped(source: Source) -> None:
    has(source, "web", {})
    has(source, "web", {0: "other-data-0"})


def attached(source: Source) -> None:
    has(source, "web", {0: "web-data-0", 3: "other-data-0"})


def detached(source: Source) -> None:
    has(source, "web", {})


def moved_to_another_lun(source: Source) -> None:
    has(source, "web", {})
    has(source, "web", {1: "web-data-0"})


def made_anew(source: Source) -> None:
    machine = source.inspect("web")
    has(source, "web", {})
    source.azure.delete(machine.disks[1].id)
    copied = {"createOption": "Copy", "sourceResourceId": machine.disks[0].id}
    source.azure.put(
        machine.disks[1].id, {"location": machine.location, "properties": {"creationData": copied}}
    )
    has(source, "web", {0: "web-data-0"})


def resized(source: Source, azure: Sandbox, image: Image) -> None:
    azure.write("web", 0, image("larger", 2 * MIB, 1))


def deleted(source: Source) -> None:
    source.azure.delete(source.inspect("web").id)


def restarted(source: Source) -> None:
    source.azure.deallocate(source.inspect("web").id)
    source.azure.start(source.inspect("web").id)


def after_the_checks(source: Source, change: Change) -> None:
    """The change happens once, when the next run has read the VM and checks the quotas."""
    asked, left = source.azure.compute_usages, [change]

    def usages(location: str) -> list[Json]:
        if left:
            left.pop()(source)
        return asked(location)

    setattr(source.azure, "compute_usages", usages)  # noqa: B010 - a method


CHANGES: dict[Change, tuple[str, list[str]]] = {
    swapped: ("data-0 is now other-data-0; it was web-data-0", ["data-0"]),
    attached: ("data-3 (other-data-0) was attached", ["data-3"]),
    detached: ("data-0 (web-data-0) was detached", ["data-0"]),
    moved_to_another_lun: (
        "data-0 (web-data-0) was detached; data-1 (web-data-0) was attached",
        ["data-0", "data-1"],
    ),
    made_anew: ("data-0 (web-data-0) was deleted and created again", ["data-0"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_the_run_ends_before_anything_is_made_of_a_disk(
    azure: Sandbox, source: Source, disks: list[Path], tmp_path: Path, change: Change
) -> None:
    mine = {resource["id"] for resource in azure.resources()}
    after_the_checks(source, change)
    words, names = CHANGES[change]
    azure.requests.clear()
    with pytest.raises(DisksChanged) as error:
        source.replicate("web", tmp_path / "images")
    assert words in error.value.message
    assert error.value.facts["disks"] == names
    assert not [path for _, path in azure.requests if "/snapshots/coriolis" in path]
    assert {resource["id"] for resource in azure.resources()} == mine


@pytest.mark.slow
def test_the_replica_stays_as_it_was_and_the_next_run_takes_the_other_disk(
    source: Source, disks: list[Path], tmp_path: Path
) -> None:
    """As the remedy says."""
    data, to = tmp_path / "images/data-0.raw", tmp_path / "images"
    source.replicate("web", to)
    after_the_checks(source, swapped)
    with pytest.raises(DisksChanged):
        source.replicate("web", to)
    assert data.read_bytes() == disks[1].read_bytes()
    source.replicate("web", to)
    assert data.read_bytes() == disks[2].read_bytes()


@pytest.mark.slow
def test_a_disk_that_grew_is_told_by_its_sizes(
    azure: Sandbox, source: Source, disks: list[Path], image: Image, tmp_path: Path
) -> None:
    after_the_checks(source, partial(resized, azure=azure, image=image))
    with pytest.raises(DisksChanged, match=r"data-0 .* now has 2097152 bytes; it had 1048576"):
        source.replicate("web", tmp_path / "images")


@pytest.mark.slow
def test_a_vm_that_was_deleted_is_named(
    azure: Sandbox, source: Source, disks: list[Path], tmp_path: Path
) -> None:
    after_the_checks(source, deleted)
    with pytest.raises(NotFound, match="no VM web"):
        source.replicate("web", tmp_path / "images")
    assert not [resource for resource in azure.resources() if "coriolis" in resource["id"]]


@pytest.mark.slow
def test_a_restart_of_the_vm_changes_nothing(source: Source, disks: list[Path], tmp_path: Path) -> None:
    after_the_checks(source, restarted)
    report = source.replicate("web", tmp_path / "images")
    assert [disk.verified for disk in report.disks] == [True, True]


@pytest.mark.slow
def test_disks_that_are_left_out_may_come_and_go(
    connect: Callable[..., Source], disks: list[Path], tmp_path: Path
) -> None:
    source = connect({"exclude_disks": ["web-data-0"]})
    after_the_checks(source, detached)
    report = source.replicate("web", tmp_path / "images")
    assert [disk.name for disk in report.disks] == ["os"]


@pytest.mark.slow
def test_a_vhd_that_was_swapped_is_seen_too(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("old", image("os", MIB), [image("data", MIB, 1)], VmSpec(unmanaged="oldstorage"))
    for blob in azure.storage.account("oldstorage").containers["vhds"].blobs.values():
        blob.made = "Thu, 01 Jan 2026 00:00:00 GMT"  # Azure tells it in whole seconds
    after_the_checks(source, lambda source: azure.write("old", 0, image("new", MIB, 2)))
    with pytest.raises(DisksChanged, match="created again"):
        source.replicate("old", tmp_path / "images")
    assert azure.storage.account("oldstorage").containers["vhds"].snapshots == []


@pytest.mark.slow
def test_a_step_of_its_own_looks_again_before_it_copies(
    azure: Sandbox, source: Source, disks: list[Path], tmp_path: Path
) -> None:
    """As the orchestrator's task does, whose worker may have to be started first."""
    run, worker = source.prepare("web")
    machine = source.inspect("web")
    swapped(source)
    with (
        places.open(str(tmp_path / "images"), source.context.report, source.storage) as folder,
        pytest.raises(DisksChanged),
    ):
        source.copy(run, worker, machine, machine.disks, folder)
    assert source.finish(run) == []
