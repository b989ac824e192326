"""Many VMs at once: which are chosen, what one failure does to the others, and what every one of them leaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import Fleet, FleetVm, VmResult, errors
from coriolis_azure.clock import Clock
from coriolis_azure.events import BEGIN, Event, Notice, Step
from coriolis_azure.fleet import default_parallel, may_pass
from coriolis_azure.run import attached_disks
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from coriolis_azure.threads import ordered
from harness.block_devices import mounted
from harness.clients import HERE, Body, Clients, vm_body
from harness.clocks import Held
from harness.constants import DEADLINE
from harness.waiting import eventually

Image = Callable[..., Path]
Connect = Callable[..., Fleet]

DIRECT = {"replica_export_mechanism": "snapshots"}


@pytest.fixture
def clock() -> Clock:
    return Held()


@pytest.fixture
def fleets(azure: Sandbox, told: list[Event], clock: Clock) -> Iterator[Connect]:
    """Fleets on the sandbox, of one environment or of those given."""
    opened: list[Fleet] = []

    def make(*environments: dict[str, Any]) -> Fleet:
        fleet = Fleet(
            azure.connection_info(),
            [{**azure.environment(), **DIRECT, **changes} for changes in environments or ({},)],
            report=told.append,
            transport=azure.transport(),
            clock=clock,
        )
        opened.append(fleet)
        return fleet

    yield make
    for fleet in opened:
        fleet.close()


@pytest.fixture
def vms(azure: Sandbox, image: Image) -> Callable[..., list[Path]]:
    """Make small VMs with these names; gives the images of their disks."""

    def make(*names: str) -> list[Path]:
        images = [image(name, 96 << 10, seed) for seed, name in enumerate(names)]
        for name, path in zip(names, images, strict=True):
            azure.add_vm(name, path)
        return images

    return make


def named(chosen: Sequence[FleetVm]) -> list[str]:
    return [vm.name for vm in chosen]


def tag(source: Source, vm: str, **tags: str) -> None:
    source.azure.tag(source.inspect(vm).id, tags)


def elsewhere(clients: Clients, name: str, location: str = HERE) -> str:
    """The id of a VM of this name in a resource group of its own."""
    clients.resource.resource_groups.create_or_update("annex", {"location": location})
    nic = clients.nic(f"{name}-annex").id
    body: Body = {**vm_body(nic), "location": location}
    return str(clients.compute.virtual_machines.begin_create_or_update("annex", name, body).result().id)


# which


def test_vms_are_chosen_by_name_by_tag_or_all_but_some(
    fleets: Connect, vms: Callable[..., list[Path]], told: list[Event]
) -> None:
    vms("db", "web-1", "web-2")
    fleet = fleets()
    tag(fleet.sources[0], "web-1", Backup="daily", site="a")
    tag(fleet.sources[0], "web-2", backup="daily")

    assert named(fleet.select()) == ["db", "web-1", "web-2"]
    assert named(fleet.select(exclude=["DB"])) == ["web-1", "web-2"]
    assert named(fleet.select(tags={"BACKUP": "daily"})) == ["web-1", "web-2"]
    assert named(fleet.select(tags={"backup": "daily", "site": "a"})) == ["web-1"]
    assert named(fleet.select(["WEB-2", "web-2", fleet.select()[0].id])) == ["web-2", "db"]
    assert named(fleet.select(exclude=["wbe"])) == ["db", "web-1", "web-2"]
    assert "nothing to exclude: none of the VMs is called wbe" in [
        event.text for event in told if isinstance(event, Notice)
    ]


@pytest.mark.parametrize(
    ("asked", "kind", "says"),
    [
        ({"tags": {"backup": "weekly"}}, errors.InvalidInput, "has the tag backup=weekly"),
        ({"vms": ["wbe"]}, errors.NotFound, "there is no VM wbe"),
        ({"vms": ["w" * 65]}, errors.NotFound, "there is no VM"),
        ({"vms": ["a/b"]}, errors.InvalidInput, "not a valid VM name"),
        ({"exclude": ["web"]}, errors.InvalidInput, "every VM that was chosen is excluded"),
        ({"vms": ["web"], "tags": {"a": "b"}}, errors.InvalidInput, "by name and by tag"),
    ],
    ids=["a tag nobody has", "a name nobody has", "too long", "no name", "none is left", "both"],
)
def test_a_choice_of_nothing_says_what_is_wrong(
    fleets: Connect, vms: Callable[..., list[Path]], asked: Any, kind: type[Exception], says: str
) -> None:
    vms("web")
    fleet = fleets()
    tag(fleet.sources[0], "web", backup="daily")
    with pytest.raises(kind, match=says) as error:
        fleet.select(**asked)
    if "has the tag" in says:
        assert isinstance(error.value, errors.InvalidInput)
        assert error.value.remedy == "VMs there have backup=daily."


def test_two_vms_of_one_name_in_two_groups_are_refused_before_anything_is_made(
    azure: Sandbox, clients: Clients, fleets: Connect, vms: Callable[..., list[Path]], tmp_path: Path
) -> None:
    vms("web")
    elsewhere(clients, "WEB")
    fleet = fleets({}, {"resource_group": "annex"})
    both = fleet.select()
    other = both[1].id
    assert [vm.environment for vm in both] == [0, 1]
    before = len(azure.requests)
    with pytest.raises(errors.InvalidInput, match="have the same name") as error:
        fleet.replicate(both, tmp_path / "dest")
    assert len(azure.requests) == before
    assert not (tmp_path / "dest").exists()
    assert f"--exclude {other}" in error.value.remedy
    assert named(fleet.select(exclude=[other])) == ["web"]
    with pytest.raises(errors.InvalidInput, match="2 VMs are called web"):
        fleet.select(["web"])
    assert named(fleets().select([other])) == ["WEB"]


# replicating


def test_each_vm_has_a_folder_and_only_what_failed_is_missing(
    azure: Sandbox, fleets: Connect, vms: Callable[..., list[Path]], told: list[Event], tmp_path: Path
) -> None:
    long = "v" * 64
    images = vms("db", "web-1", "web-2", long)
    (tmp_path / "dest/WEB-1").mkdir(parents=True)  # as Azure wrote it once
    (tmp_path / "dest/web-2").mkdir()
    (tmp_path / "dest/web-2/.vm").write_text("/subscriptions/another/virtualMachines/web-2\n")
    before, results = azure.resources(), list[VmResult]()
    fleet = fleets()
    done = fleet.replicate(fleet.select(), tmp_path / "dest", parallel=3, done=results.append)

    assert [(each.vm, each.error is None) for each in done.vms] == [
        ("db", True),
        (long, True),
        ("web-1", True),
        ("web-2", False),
    ]
    for name, path in zip(("db", "WEB-1", long), (images[0], images[1], images[3]), strict=True):
        assert (tmp_path / "dest" / name / "os.raw").read_bytes() == path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "dest").iterdir()) == sorted(
        [".lock", "db", "WEB-1", "web-2", long]
    )
    (failed,) = done.failed
    assert isinstance(failed.error, errors.InvalidInput)
    assert "holds the replica of another VM: /subscriptions/another" in failed.error.message
    assert {each.vm for each in results} == {each.vm for each in done.vms}
    assert done.to_json()["vms"][3]["error"]["error"] == "InvalidInput"
    assert done.to_json()["vms"][0]["disks"][0]["verified"] is True
    assert azure.resources() == before
    assert {event.vm for event in told if isinstance(event, Step) and event.name == "copy"} == {
        "db",
        "web-1",
        long,
    }
    again = fleet.replicate(fleet.select(["db"]), tmp_path / "dest")
    assert again.vms[0].replicated is not None
    assert again.vms[0].replicated.disks[0].sent_bytes == 0


def test_a_destination_in_use_and_one_of_a_single_vm_are_refused(
    fleets: Connect, vms: Callable[..., list[Path]], tmp_path: Path
) -> None:
    vms("db", "web")
    fleet, refused = fleets(), list[errors.CoriolisAzureError]()
    chosen = fleet.select()

    def second(result: VmResult) -> None:
        if result.vm == "db":
            with pytest.raises(errors.InvalidInput, match="another run is using") as error:
                fleet.replicate(chosen, tmp_path / "dest")
            refused.append(error.value)

    assert not fleet.replicate(chosen, tmp_path / "dest", parallel=1, done=second).failed
    assert len(refused) == 1
    with pytest.raises(errors.InvalidInput, match="is the place of one VM"):
        fleet.replicate(chosen, tmp_path / "dest/db")


def test_what_may_pass_is_tried_again_and_nothing_else(
    azure: Sandbox, fleets: Connect, vms: Callable[..., list[Path]], told: list[Event], tmp_path: Path
) -> None:
    vms("db", "web")
    azure.faults.add("refuse", path="/virtualMachines/db", times=2, code="RetryableError")
    azure.faults.add("refuse", path="/virtualMachines/web", status=403, code="AuthorizationFailed")
    fleet = fleets()
    done = fleet.replicate(fleet.select(), tmp_path / "dest", retries=3)
    told_again = [event.text for event in told if isinstance(event, Notice) and "trying again" in event.text]
    db, web = done.vms
    assert db.error is None
    assert isinstance(web.error, errors.Denied)
    assert web.tries == 1
    assert (db.tries, len(told_again)) == (3, 2)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (errors.Throttled("busy"), True),
        (errors.DisksChanged("new disk"), True),
        (errors.ConnectionLost("gone"), True),
        (errors.WorkerGone("gone"), True),
        (errors.DeadlinePassed("late"), True),
        (errors.HostKeyChanged("who is that"), False),
        (errors.WaitEnded("cancelled"), False),
        (errors.Cancelled("cancelled"), False),
        (errors.Denied("no", code="AuthorizationFailed", status=403), False),
        (errors.NotFound("gone", code="ResourceNotFound", status=404), False),
        (errors.HostExhausted("full"), False),
        (errors.DestinationFailed("full"), False),
        (errors.CleanupIncomplete("left"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_what_may_pass(error: errors.CoriolisAzureError, passes: bool) -> None:
    assert may_pass(error) == passes


def test_a_full_disk_ends_the_vm_it_meets_and_no_other(
    azure: Sandbox, fleets: Connect, vms: Callable[..., list[Path]], tmp_path: Path
) -> None:
    images = vms("db", "web", "zoo")
    before, fleet = azure.resources(), fleets()
    (tmp_path / "dest").mkdir()
    with mounted("tmpfs", tmp_path / "dest/web", "-t", "tmpfs", "-o", "size=64k"):
        done = fleet.replicate(fleet.select(), tmp_path / "dest", parallel=2)
    assert [each.vm for each in done.failed] == ["web"]
    for name, path in (("db", images[0]), ("zoo", images[2])):
        assert (tmp_path / "dest" / name / "os.raw").read_bytes() == path.read_bytes()
    assert azure.resources() == before


def test_a_bug_in_the_run_of_one_vm_does_not_stop_the_others(
    fleets: Connect,
    vms: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vms("db", "web")
    fleet, right = fleets(), Source.inspect

    def wrong(source: Source, vm: str) -> Any:
        if vm.endswith("/db"):
            raise KeyError("properties")
        return right(source, vm)

    monkeypatch.setattr(Source, "inspect", wrong)
    done = fleet.replicate(fleet.select(), tmp_path / "dest")
    assert [each.error and each.error.message for each in done.vms] == ["KeyError: 'properties'", None]
    assert "KeyError" in caplog.text


def test_what_has_not_begun_when_all_is_cancelled_never_begins(
    fleets: Connect, vms: Callable[..., list[Path]], told: list[Event], tmp_path: Path
) -> None:
    vms("a", "b")
    fleet = fleets()
    done = fleet.replicate(fleet.select(), tmp_path / "dest", parallel=1, done=lambda result: fleet.cancel())
    assert [each.tries for each in done.vms] == [1, 0]
    assert isinstance(done.vms[1].error, errors.Cancelled)
    assert [event.vm for event in told if isinstance(event, Step) and event.name == BEGIN] == ["a"]


def test_cancelling_ends_all_leaves_nothing_and_begins_no_other(
    azure: Sandbox, fleets: Connect, vms: Callable[..., list[Path]], tmp_path: Path
) -> None:
    vms("a", "b", "c")
    before, fleet, both = azure.resources(), fleets(), threading.Barrier(2, timeout=DEADLINE)

    def meet(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.method == "PUT" and "/snapshots/" in request.path and not fleet_is_cancelled:
            both.wait()
            fleet_is_cancelled.append(True)
            fleet.cancel()
        return response

    fleet_is_cancelled: list[bool] = []
    azure.intercept = meet
    done = fleet.replicate(fleet.select(), tmp_path / "dest", parallel=2)
    azure.intercept = None
    assert [type(each.error) for each in done.vms] == [errors.Cancelled] * 3
    assert [each.tries for each in done.vms] == [1, 1, 0]
    assert azure.resources() == before
    assert not fleet.replicate(fleet.select(), tmp_path / "dest").failed


def test_the_default_suits_the_host() -> None:
    assert 1 <= default_parallel() <= 16


# shared workers

WORKER = {"replica_export_mechanism": "worker"}


def booted(azure: Sandbox) -> int:
    """How many VMs were created."""
    return len({path for method, path in azure.requests if method == "PUT" and "/virtualMachines/" in path})


def test_changes_of_one_vm_go_together_and_none_fails_because_of_another(
    azure: Sandbox, source: Source, clients: Clients, image: Image, clock: Clock
) -> None:
    vm = azure.add_vm("worker", image("worker", 96 << 10))
    good = [clients.disk(name).id for name in ("one", "two", "three")]
    wrong = good[0].replace("/one", "/none")
    asked: list[int] = []

    def attach(disk: str) -> str:
        def added(held: list[Any]) -> list[Any]:
            entry = {"createOption": "Attach", "managedDisk": {"id": disk}}
            return [*held, {**entry, "lun": len(held)}]

        try:
            attached_disks.change(source.azure, vm, added, clock)
        except errors.NotFound:
            return "refused"
        return "attached"

    def others_wait(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PATCH":
            if not asked:
                begun.set()
                queue = attached_disks._queues[vm.lower()]
                eventually(lambda: len(queue.waiting) == 3)
            disks = json.loads(request.body)["properties"]["storageProfile"]["dataDisks"]
            asked.append(len(disks))
        return answer(request)

    begun = threading.Event()
    azure.intercept = others_wait

    def later(disk: str) -> str:
        if disk != good[0]:
            assert begun.wait(DEADLINE)
        return attach(disk)

    ends = list(ordered(later, [*good, wrong], threads=4, ahead=4))
    assert ends == ["attached", "attached", "attached", "refused"]
    assert asked[:2] == [
        1,
        4,
    ]  # the first alone; then the three that waited, in vain, for one of them is wrong
    assert len(asked) == 5
    attached = source.azure.get(vm)["properties"]["storageProfile"]["dataDisks"]
    assert {entry["managedDisk"]["id"].lower() for entry in attached} == {id.lower() for id in good}


@pytest.mark.slow
class TestSharedWorkers:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.mark.parametrize(("names", "own", "workers"), [("abcd", False, 1), ("ab", True, 2)])
    def test_one_worker_reads_the_disks_of_all_unless_each_is_to_have_its_own(
        self,
        azure: Sandbox,
        fleets: Connect,
        vms: Callable[..., list[Path]],
        tmp_path: Path,
        names: str,
        own: bool,
        workers: int,
    ) -> None:
        images = vms(*names)
        before, made, fleet = azure.resources(), booted(azure), fleets(WORKER)
        done = fleet.replicate(fleet.select(), tmp_path / "dest", parallel=3, own_workers=own)
        assert [each.error for each in done.vms] == [None] * len(names)
        for name, path in zip(names, images, strict=True):
            assert (tmp_path / "dest" / name / "os.raw").read_bytes() == path.read_bytes()
        assert booted(azure) == made + workers
        assert azure.resources() == before
        assert not list((tmp_path / "state").rglob("*.journal"))

    @pytest.mark.parametrize("lost", ["deleted", "restarted"])
    def test_whoever_uses_a_worker_that_is_lost_gets_another(
        self,
        azure: Sandbox,
        source: Source,
        fleets: Connect,
        vms: Callable[..., list[Path]],
        tmp_path: Path,
        lost: str,
    ) -> None:
        images, before, ended = vms("a", "b", "c"), azure.resources(), list[str]()

        def lose(request: Request, answer: Callable[[Request], Response]) -> Response:
            if request.method == "PATCH" and "/virtualMachines/" in request.path and not ended:
                ended.append(request.path)
                if lost == "deleted":
                    source.azure.delete(request.path)
                else:
                    source.azure.power_off(request.path)
                    source.azure.start(request.path)
            return answer(request)

        azure.intercept = lose
        fleet = fleets(WORKER)
        done = fleet.replicate(fleet.select(), tmp_path / "dest", parallel=2)
        azure.intercept = None
        assert [each.error for each in done.vms] == [None] * 3
        for name, path in zip("abc", images, strict=True):
            assert (tmp_path / "dest" / name / "os.raw").read_bytes() == path.read_bytes()
        assert booted(azure) == 2
        assert done.left_behind == ()
        assert azure.resources() == before
