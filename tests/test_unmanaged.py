"""VMs whose disks are VHD blobs: imported for the worker, or read directly; and nothing of it is left."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import AzureExportProvider, vhd
from coriolis_azure.azure.blobs import Container
from coriolis_azure.errors import Denied, NotFound, Unsupported
from coriolis_azure.events import Event, Notice, Waiting
from coriolis_azure.machine import unmanaged
from coriolis_azure.model import Machine, Run
from coriolis_azure.run import cleanup, journal
from coriolis_azure.run.journal import Journal
from coriolis_azure.run.resources import RUN
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.battles import served
from harness.late_answers import Later

MIB = 1 << 20
ACCOUNT = "oldstorage"
INTERIM = {"storage_account_name": "sandboxstorage", "storage_container_name": "interim"}


@pytest.fixture
def vm(azure: Sandbox, image: Callable[..., Path]) -> tuple[Path, Path]:
    """An old VM with two disks; the files they were made of."""
    files = image("os", 6 * MIB, 1), image("data", 3 * MIB + 512, 2)
    azure.add_vm("old-1", files[0], [files[1]], VmSpec(unmanaged=ACCOUNT))
    return files


def blob(azure: Sandbox, disk: str = "os") -> Any:
    found = azure.storage.blob(f"{ACCOUNT}/vhds/old-1-{disk}.vhd")
    assert found is not None
    return found


def same(folder: Path, files: tuple[Path, Path]) -> bool:
    """Whether the replica holds these files; a VHD is rounded up to a MiB with zeros."""
    for name, file in zip(("os", "data-0"), files, strict=True):
        data = file.read_bytes()
        replica = (folder / f"{name}.raw").read_bytes()
        if replica != data.ljust(vhd.rounded(len(data)), b"\0"):
            return False
    return True


def interim(azure: Sandbox) -> list[str]:
    """What of our runs is in Blob storage."""
    return [
        each.name
        for account in (ACCOUNT, "sandboxstorage", "faraway")
        for container in azure.storage.account(account).containers.values()
        for each in (*container.blobs.values(), *container.snapshots, *container.versions)
        if RUN in each.metadata
    ]


def notices(told: list[Event]) -> str:
    return "\n".join(event.text for event in told if isinstance(event, Notice))


def moved(azure: Sandbox, account: str, location: str) -> None:
    azure.storage.resource(account).document["location"] = location


def test_it_is_described_like_any_other(source: Source, vm: tuple[Path, Path]) -> None:
    machine = source.inspect("old-1")
    assert [(disk.name, disk.size_bytes) for disk in machine.disks] == [("os", 6 * MIB), ("data-0", 4 * MIB)]
    assert machine.disks[0].id.endswith("/oldstorage/vhds/old-1-os.vhd")
    assert machine.power_state == "deallocated"
    assert len({disk.unique_id for disk in machine.disks}) == 2
    assert source.inspect("old-1").disks == machine.disks


@pytest.mark.slow
def test_it_is_imported_and_read_by_the_worker(
    azure: Sandbox, source: Source, vm: tuple[Path, Path], told: list[Event], tmp_path: Path
) -> None:
    before = azure.resources()
    made = int(time.time())  # the second in which the blob was made, or a later one
    report = source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    assert report.left_behind == ()
    assert "os: the VHD is imported and read by the worker" in notices(told)
    assert azure.resources() == before
    assert interim(azure) == []
    assert blob(azure).leased() is not None
    changed = bytearray(vm[0].read_bytes())
    changed[5 * MIB :] = b"x" * MIB
    vm[0].write_bytes(changed)
    while int(time.time()) == made:  # Azure tells in seconds when a blob was made
        time.sleep(0.01)
    azure.write("old-1", "os", vm[0])
    again = source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    # The blob that was put in its place is another disk of that name.
    assert [disk.full for disk in again.disks] == [True, False]


@pytest.mark.slow
def test_what_cannot_be_imported_is_read_directly_without_a_worker(
    azure: Sandbox, source: Source, vm: tuple[Path, Path], told: list[Event], tmp_path: Path
) -> None:
    moved(azure, ACCOUNT, "northeurope")
    before = azure.resources()
    azure.requests.clear()
    source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    assert "read directly" in notices(told)
    assert "northeurope" in notices(told)
    assert not any("virtualMachines/coriolis" in path for method, path in azure.requests if method == "PUT")
    assert azure.resources() == before
    assert interim(azure) == []
    azure.storage.overwrite(blob(azure), 0, b"y" * 512)
    report = source.replicate("old-1", tmp_path / "replica")
    assert [disk.sent_bytes for disk in report.disks] == [65536, 0]
    assert (tmp_path / "replica" / "os.raw").read_bytes()[:512] == b"y" * 512


def test_pages_that_are_not_allocated_are_never_asked_for_and_listed_once(
    azure: Sandbox, source: Source, tmp_path: Path
) -> None:
    """The listing comes in pages itself: all of them count."""
    disk = tmp_path / "sparse.raw"
    with disk.open("wb") as file:
        for at in range(0, 64, 8):
            file.seek(at * MIB)
            file.write(bytes([at + 1]) * 4096)
        file.truncate(64 * MIB)
    azure.add_vm("old-1", disk, spec=VmSpec(unmanaged=ACCOUNT))
    moved(azure, ACCOUNT, "northeurope")
    azure.storage.page_ranges(3)
    asked: list[Request] = []

    def seen(request: Request, answer: Callable[[Request], Response]) -> Response:
        asked.append(request)
        return answer(request)

    azure.intercept = seen
    source.replicate("old-1", tmp_path / "replica")
    assert (tmp_path / "replica" / "os.raw").read_bytes() == disk.read_bytes()
    reads = [each for each in asked if each.method == "GET" and "snapshot" in each.query]
    listings = [each for each in reads if each.query.get("comp") == "pagelist"]
    assert len(listings) == 3  # nine ranges, the footer's among them
    assert len(reads) - len(listings) == 8


@pytest.mark.slow
def test_a_copy_is_imported_where_a_snapshot_cannot_be(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path], told: list[Event], tmp_path: Path
) -> None:
    azure.storage.refuse_snapshot_imports()
    source = connect(INTERIM)
    source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    assert "os: the VHD is imported" in notices(told)
    assert interim(azure) == []
    assert azure.storage.account("sandboxstorage").containers["interim"].blobs == {}


def test_a_copy_that_takes_long_is_told_of_with_its_share(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path], told: list[Event]
) -> None:
    source, looks = connect(INTERIM, clock=Later()), iter(("0/100", "0/100", "25/100", "50/100", ""))

    def slowly(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == "HEAD" and "/interim/coriolis-" in request.path and (share := next(looks, None)):
            slow = {"x-ms-copy-status": "pending", "x-ms-copy-progress": share}
            return Response(response.status, {**response.headers, **slow}, response.body)
        return response

    azure.intercept = slowly
    run = source.new_run(source.inspect("old-1"))
    resources = source.resources(run, Journal(run))
    frozen = unmanaged.freeze_all(resources, source.storage, source.inspect("old-1").disks)
    container = source.storage.interim()
    assert container is not None
    container.ensure()
    resources.copy_blob(frozen["os"], container, "copy-os")
    shares = [event.percent for event in told if isinstance(event, Waiting) and "to copy" in event.what]
    assert shares == [0, 25]  # every ten seconds, of looks every five
    azure.intercept = None
    assert source.finish(run) == []


@pytest.mark.slow
def test_without_a_container_a_refused_import_is_told_and_the_disk_read_directly(
    azure: Sandbox, source: Source, vm: tuple[Path, Path], told: list[Event], tmp_path: Path
) -> None:
    azure.storage.refuse_snapshot_imports()
    source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    assert "read directly, by this host, because Azure does not import it" in notices(told)
    assert interim(azure) == []


@pytest.mark.slow
def test_a_copy_brings_disks_of_another_location_to_the_worker(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path], told: list[Event], tmp_path: Path
) -> None:
    """Between accounts Azure copies with a signed URL, made with the identity's own key."""
    moved(azure, ACCOUNT, "northeurope")
    source = connect(INTERIM)
    source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    assert "os: the VHD is imported" in notices(told)
    assert interim(azure) == []


@pytest.mark.parametrize("seen", ["journal", "listing"])
def test_what_a_dead_run_left_in_storage_is_found_and_deleted(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path], seen: str
) -> None:
    source = connect(INTERIM)
    machine = source.inspect("old-1")
    run = source.new_run(machine)
    journal = Journal(run)
    container = frozen_and_copied(source, machine, journal)
    container.blob("coriolis-of-somebody.vhd").put(b"not ours")
    assert len(interim(azure)) == 3
    found = cleanup.leftovers(source.context)
    assert [(each.run, each.instance, len(each.ids)) for each in found] == [(run.id, "old-1", 3)]
    if seen == "journal":
        assert source.finish(run, journal.ids) == []
    else:
        _, stayed = source.sweep(timedelta(0))
        assert stayed == []
    assert interim(azure) == []
    assert list(azure.storage.account("sandboxstorage").containers["interim"].blobs) == [
        "coriolis-of-somebody.vhd"
    ]


def frozen_and_copied(source: Source, machine: Machine, journal: Journal) -> Container:
    """What a run makes of a VM's VHDs: a snapshot of each, and an interim copy; where the copy is."""
    resources = source.resources(journal.run, journal)
    frozen = unmanaged.freeze_all(resources, source.storage, machine.disks)
    container = source.storage.interim()
    assert container is not None
    container.ensure()
    resources.copy_blob(frozen["os"], container, "copy-os")
    return container


def died(source: Source, vm: str = "old-1") -> tuple[Run, Path]:
    """A run that has snapshots of both VHDs and an interim copy, and died; with its journal."""
    machine = source.inspect(vm)
    run = source.new_run(machine)
    with Journal(run, journal.default_folder()) as kept:
        frozen_and_copied(source, machine, kept)
    return run, journal.default_folder() / f"{run.id}.journal"


def deleted(source: Source) -> None:
    """The VM is deleted; its VHDs stay, as in Azure."""
    source.azure.delete(source.inspect("old-1").id)


def vhd_detached(source: Source) -> None:
    vm = source.azure.get(source.inspect("old-1").id)
    source.azure.patch_vm(vm["id"], {"properties": {"storageProfile": {"dataDisks": []}}}, vm.get("etag", ""))


def nothing_happens(source: Source) -> None:
    """Only the settings are others."""


@pytest.mark.parametrize("what", [deleted, vhd_detached, nothing_happens])
def test_what_the_journal_of_a_dead_run_names_is_deleted_wherever_it_is(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path], what: Callable[[Source], None]
) -> None:
    """A listing looks at the VHDs of VMs that are there, and into the container of the settings."""
    run, kept = died(connect(INTERIM))
    assert len(interim(azure)) == 3
    source = connect()
    what(source)
    found, _ = source.sweep(timedelta(hours=2), dry_run=True)
    assert [(leftover.run, len(leftover.ids)) for leftover in found] == [(run.id, 3)]
    assert len(interim(azure)) == 3
    found, stayed = source.sweep(timedelta(hours=2))
    assert ([leftover.run for leftover in found], stayed) == ([run.id], [])
    assert interim(azure) == []
    assert not kept.exists()
    assert source.sweep(timedelta(0)) == ([], [])


def test_of_a_journal_of_another_boot_age_decides(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path]
) -> None:
    """The host lost its power, or shares its home and no locks: the run may live."""
    source = connect(INTERIM)
    _, kept = died(source)
    first, *rest = kept.read_text().splitlines()
    kept.write_text("\n".join([json.dumps({**json.loads(first), "boot": "another"}), *rest, ""]))
    deleted(source)
    source = connect()
    assert source.sweep(timedelta(hours=2)) == ([], [])
    assert len(interim(azure)) == 3
    assert source.sweep(timedelta(0))[1] == []
    assert interim(azure) == []


def test_what_has_gone_with_its_blob_or_container_is_nobodys_leftover(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path]
) -> None:
    source = connect(INTERIM)
    _, kept = died(source)
    deleted(source)
    vhds = azure.storage.account(ACCOUNT).containers["vhds"]
    vhds.blobs.clear()
    vhds.snapshots.clear()
    del azure.storage.account("sandboxstorage").containers["interim"]
    assert connect().sweep(timedelta(hours=2)) == ([], [])
    assert not kept.exists()


def test_what_is_in_an_account_that_cannot_be_seen_is_told_and_not_forgotten(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    source = connect(INTERIM)
    run, kept = died(source)
    deleted(source)
    account = azure.storage.resource(ACCOUNT).document
    account["name"] = "another"
    for _ in range(2):
        _, stayed = connect().sweep(timedelta(hours=2))
        assert [id.rpartition("/")[2] for id in sorted(stayed)] == [
            f"old-1-data-0.vhd#{run.id}",
            f"old-1-os.vhd#{run.id}",
        ]
        assert "in no storage account that the identity can see" in caplog.text
    account["name"] = ACCOUNT
    assert connect().sweep(timedelta(hours=2))[1] == []
    assert interim(azure) == []
    assert not kept.exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", [deleted, vhd_detached])
def test_the_orchestrators_clean_up_finds_snapshots_of_disks_that_the_vm_has_no_more(
    azure: Sandbox, vm: tuple[Path, Path], what: Callable[[Source], None]
) -> None:
    """Its tasks keep no journal: what `deploy` returns names the VHDs."""
    provider, environment = AzureExportProvider(), azure.environment()
    with served(azure) as connection, Source(connection, environment) as source:
        info = provider.get_replica_instance_info(None, connection, environment, "old-1")
        deployed = provider.deploy_replica_source_resources(None, connection, info, environment)
        made = json.loads(json.dumps(deployed["migr_resources"]))
        run = Run.from_json(made["run"])
        machine = source.inspect("old-1")
        unmanaged.freeze_all(source.resources(run, Journal(run)), source.storage, machine.disks)
        what(source)
        provider.delete_replica_source_resources(None, connection, environment, made)
    assert interim(azure) == []


@pytest.mark.slow
def test_a_failure_leaves_nothing(
    azure: Sandbox, source: Source, vm: tuple[Path, Path], tmp_path: Path
) -> None:
    moved(azure, ACCOUNT, "northeurope")
    before = azure.resources()

    def broken(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "GET" and "snapshot" in request.query and request.query.get("comp") is None:
            return Response(403, {"x-ms-error-code": "AuthorizationFailure"})
        return answer(request)

    azure.intercept = broken
    with pytest.raises(Denied, match="AuthorizationFailure") as error:
        source.replicate("old-1", tmp_path / "replica")
    assert "firewall" in error.value.remedy
    azure.intercept = None
    assert azure.resources() == before
    assert interim(azure) == []


@pytest.mark.slow
def test_a_vhd_of_another_maker_is_read(
    azure: Sandbox, source: Source, vm: tuple[Path, Path], tmp_path: Path
) -> None:
    """qemu-img's, as people upload them: it has its own creator, versions and geometry in the footer."""
    program = shutil.which("qemu-img")
    if program is None:
        pytest.skip("qemu-img is not installed (Debian: qemu-utils)")
    raw, made = tmp_path / "raw", tmp_path / "made.vhd"
    raw.write_bytes(random.Random(3).randbytes(2 * MIB) + bytes(4 * MIB))
    options = ("-O", "vpc", "-o", "subformat=fixed,force_size")
    subprocess.run([program, "convert", "-f", "raw", *options, raw, made], check=True)
    ours = azure.storage.content(blob(azure))
    azure.storage.overwrite(blob(azure), 0, made.read_bytes())
    assert len(azure.storage.content(blob(azure))) == len(ours)
    source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", (raw, vm[1]))


def footerless(azure: Sandbox) -> None:
    azure.storage.overwrite(blob(azure), 6 * MIB, bytes(512))


def damaged(azure: Sandbox) -> None:
    azure.storage.overwrite(blob(azure), 6 * MIB, azure.storage.content(blob(azure))[-512:-1] + b"x")


def of_another_size(azure: Sandbox) -> None:
    import uuid
    from datetime import datetime, timezone

    wrong = vhd.footer(7 * MIB, uuid.uuid4(), datetime.now(timezone.utc))
    azure.storage.overwrite(blob(azure), 6 * MIB, wrong)


def dynamic(azure: Sandbox) -> None:
    footer = bytearray(azure.storage.content(blob(azure))[-512:])
    footer[63] = 3
    footer[64:68] = bytes(4)
    footer[64:68] = (~sum(footer) & 0xFFFFFFFF).to_bytes(4, "big")
    azure.storage.overwrite(blob(azure), 6 * MIB, bytes(footer))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (footerless, "does not end with a VHD footer"),
        (damaged, "the checksum does not match"),
        (of_another_size, "gives a size of 7340032 bytes"),
        (dynamic, "a dynamic VHD, not a fixed one"),
    ],
)
def test_a_blob_that_is_no_fixed_vhd_is_refused_before_anything_is_made(
    azure: Sandbox,
    source: Source,
    vm: tuple[Path, Path],
    tmp_path: Path,
    spoil: Callable[[Sandbox], None],
    words: str,
) -> None:
    spoil(azure)
    before = azure.resources()
    with pytest.raises(Unsupported, match=words) as error:
        source.replicate("old-1", tmp_path / "replica")
    assert "old-1-os.vhd" in str(error.value)
    assert "exclude_disks" in error.value.remedy
    assert azure.resources() == before
    assert interim(azure) == []
    assert not (tmp_path / "replica").exists()


def test_a_vhd_that_is_gone_is_named(azure: Sandbox, source: Source, vm: tuple[Path, Path]) -> None:
    del azure.storage.account(ACCOUNT).containers["vhds"].blobs["old-1-data-0.vhd"]
    with pytest.raises(NotFound, match=r"old-1-data-0\.vhd does not exist"):
        source.inspect("old-1")


def test_an_account_that_the_identity_does_not_see_is_named(
    azure: Sandbox, source: Source, vm: tuple[Path, Path]
) -> None:
    azure.storage.resource(ACCOUNT).document["name"] = "another"
    with pytest.raises(NotFound, match="no storage account") as error:
        source.inspect("old-1")
    assert "Reader" in error.value.remedy


@pytest.mark.slow
def test_a_vhd_in_an_account_of_another_resource_group_is_found(
    azure: Sandbox, source: Source, vm: tuple[Path, Path], told: list[Event], tmp_path: Path
) -> None:
    resource = azure.storage.resource(ACCOUNT)
    azure._world.state.remove(resource)
    resource.document["id"] = resource.id.replace(
        "/resourceGroups/sandbox/", "/resourceGroups/storage-of-old/"
    )
    azure._world.state.add(resource)
    before = azure.resources()
    source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    assert "os: the VHD is imported" in notices(told)
    assert azure.resources() == before
    assert interim(azure) == []


def keeping(azure: Sandbox, **kept: bool) -> None:
    """Both accounts keep what is deleted or replaced."""
    for name in (ACCOUNT, "sandboxstorage"):
        for what, on in kept.items():
            setattr(azure.storage.account(name), what, on)


@pytest.mark.slow
def test_soft_deleted_snapshots_and_copies_are_not_taken_for_leftovers(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path], tmp_path: Path
) -> None:
    keeping(azure, soft_delete=True)
    azure.storage.refuse_snapshot_imports()
    source = connect(INTERIM)
    report = source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    assert report.left_behind == ()
    assert len(azure.storage.account(ACCOUNT).containers["vhds"].deleted) == 2
    assert len(azure.storage.account("sandboxstorage").containers["interim"].deleted) == 2
    assert source.sweep(timedelta(0)) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("soft_delete", [False, True])
def test_no_version_of_an_interim_copy_stays_where_versions_are_kept(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path], tmp_path: Path, soft_delete: bool
) -> None:
    """A version costs as much as the blob and ends with no retention. That of the VHD itself is not ours."""
    keeping(azure, versioning=True, soft_delete=soft_delete)
    azure.storage.refuse_snapshot_imports()
    source = connect(INTERIM)
    report = source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    assert report.left_behind == ()
    assert interim(azure) == []
    assert azure.storage.account("sandboxstorage").containers["interim"].versions == []
    source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    assert source.sweep(timedelta(0)) == ([], [])


@pytest.mark.slow
def test_a_version_that_may_not_be_deleted_is_told_and_found_again(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path], tmp_path: Path
) -> None:
    """Storage Blob Data Contributor may delete blobs, and not their versions."""
    keeping(azure, versioning=True)
    azure.storage.refuse_snapshot_imports()
    right = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs/deleteBlobVersion/action"
    azure.permissions[:] = [{"actions": ["*"], "dataActions": ["*"], "notDataActions": [right]}]
    source = connect(INTERIM)
    report = source.replicate("old-1", tmp_path / "replica")
    assert same(tmp_path / "replica", vm)
    assert len(report.left_behind) == 2
    assert all("/interim/coriolis-" in id for id in report.left_behind)
    azure.permissions[:] = [{"actions": ["*"], "dataActions": ["*"]}]
    found, stayed = source.sweep(timedelta(0))
    assert (len(found), stayed) == (1, [])
    assert interim(azure) == []


def test_a_copy_that_a_stranger_has_leased_is_told_and_not_waited_for(
    azure: Sandbox, connect: Callable[..., Source], vm: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Later()
    names = {"storage_account_name": "sandboxstorage", "storage_container_name": "interim"}
    source = connect(names, clock=clock)
    container = source.storage.interim()
    assert container is not None
    container.ensure()
    run = source.new_run(source.inspect("old-1"))
    resources = source.resources(run, Journal(run))
    frozen = unmanaged.freeze_all(resources, source.storage, source.inspect("old-1").disks)
    copy = resources.copy_blob(frozen["os"], container, "copy-os")
    stranger = container.blob(copy.name)
    stranger.lease(60)
    begun = clock.monotonic()
    (left,) = source.finish(run)
    assert left.startswith(copy.url)
    assert clock.monotonic() - begun < 60
    assert "LeaseIdMissing" in caplog.text
    stranger.release()
    assert source.finish(run) == []
    assert interim(azure) == []
