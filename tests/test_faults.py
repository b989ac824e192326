"""What goes wrong in Azure, switched on by rule, and what the product makes of it: it waits, asks again, chooses
anew, or says what is the matter; nothing is lost and nothing is left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import errors, sandbox
from coriolis_azure.azure import names, permissions
from coriolis_azure.events import Event, Notice
from coriolis_azure.run import resources
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.source import Source
from harness.clients import serving
from harness.clocks import Held
from harness.command_line import run as command
from harness.constants import GROUP, MIB
from harness.late_answers import Later

pytestmark = pytest.mark.slow

Image = Callable[..., Path]


@pytest.fixture
def clock() -> Later:
    """What is waited for here, by us and by the SDKs, passes at once; the sandbox's time passes with it."""
    return Later()


TWO_SLOTS = {"export_worker_size": "Standard_B1s"}  # data disks of a worker


@pytest.fixture
def replicate(azure: Sandbox, source: Source, image: Image, tmp_path: Path) -> Callable[[], None]:
    """Replicate a VM of two disks, see that every byte has arrived and that nothing is left, whatever goes wrong."""
    disks = [image("os"), image("data", MIB, seed=1)]
    azure.add_vm("web", disks[0], disks[1:])
    before = azure.resources()

    def act() -> None:
        try:
            assert source.replicate("web", tmp_path / "images").left_behind == ()
            for disk, name in zip(disks, ("os", "data-0"), strict=True):
                assert (tmp_path / f"images/{name}.raw").read_bytes() == disk.read_bytes()
        finally:
            assert azure.resources() == before

    return act


def put(source: Source, name: str = "n") -> dict[str, Any]:
    return source.azure.put(nsg(source, name), {"location": "westeurope", "properties": {}})


def nsg(source: Source, name: str = "n") -> str:
    return names.resource_id(source.azure.subscription, GROUP, "nsg", name)


# What passes by itself: the run does not even notice


@pytest.mark.parametrize(
    "rules",
    [
        [
            ("throttle", {"path": "/disks/", "seconds": 0.01, "times": 2}),
            ("throttle", {"path": "operations/", "seconds": 0.01, "times": 3}),
            ("throttle", {"method": "PATCH", "seconds": 0.01}),
            *(("server-error", {"path": "operations/", "status": status}) for status in (500, 503, 504)),
        ],
        [
            ("lost-answer", {"method": "PUT", "path": "/snapshots/"}),
            ("lost-answer", {"method": "DELETE", "path": "/networkInterfaces/"}),
            ("lost-request", {"method": "PUT", "path": "/networkInterfaces/"}),
            ("slow-operation", {"method": "PUT", "times": 8}),
            ("slow-operation", {"method": "DELETE", "times": 6}),
        ],
    ],
    ids=["throttled and failing gateways", "lost and slow"],
)
def test_a_run_gets_over_what_passes(
    azure: Sandbox, replicate: Callable[[], None], rules: list[tuple[str, dict[str, Any]]]
) -> None:
    for kind, given in rules:
        azure.faults.add(kind, **given)
    replicate()
    assert azure.faults.listed() == [], "every rule has struck"


def test_conflicts_with_others_are_waited_out_within_the_stated_time(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path
) -> None:
    """What lasts 180 seconds by Azure's word is over at the 37th time that we ask; we would ask for 240."""
    os_disk = image("os")
    azure.add_vm("web", os_disk, [image("d1", MIB), image("d2", MIB)])
    before, source = azure.resources(), connect(environment=TWO_SLOTS)
    for method, kind, status, code, times in (
        ("PATCH", "virtualMachines", 409, "AttachDiskWhileBeingDetached", 3),
        ("PATCH", "virtualMachines", 409, "OperationPreempted", 3),
        ("PATCH", "virtualMachines", 409, "Conflict", 3),
        ("DELETE", "networkInterfaces", 400, "NicReservedForAnotherVm", 30),
        ("DELETE", "networkInterfaces", 400, "NicInUse", 6),
        ("DELETE", "publicIPAddresses", 400, "PublicIPAddressCannotBeDeleted", 3),
        ("DELETE", "networkSecurityGroups", 400, "InUseNetworkSecurityGroupCannotBeDeleted", 3),
        ("DELETE", "virtualNetworks", 400, "InUseSubnetCannotBeDeleted", 3),
        ("DELETE", "disks", 409, "OperationNotAllowed", 3),
        ("DELETE", "snapshots", 429, "RetryableErrorDueToAnotherOperation", 3),
    ):
        path = f"/{kind}/coriolis"
        azure.faults.add(
            "refuse", method=method, path=path, status=status, code=code, times=times, seconds=0.001
        )
    azure.faults.add(
        "failed-operation", method="PATCH", path="/virtualMachines/coriolis", code="", message=""
    )
    assert source.replicate("web", tmp_path / "images").left_behind == ()
    assert (tmp_path / "images/os.raw").read_bytes() == os_disk.read_bytes()
    assert azure.resources() == before
    assert azure.faults.listed() == []


@pytest.mark.parametrize(
    ("locked", "stays"),
    [
        ("snapshots", ["snapshots"]),
        # With the worker stays what it uses, which is not waited for either.
        (
            "virtualMachines",
            [
                *("virtualMachines", "networkInterfaces", "disks", "disks"),
                *("networkSecurityGroups", "publicIPAddresses", "virtualNetworks"),
            ],
        ),
    ],
)
def test_a_lock_is_not_waited_for_and_what_stays_is_told(
    azure: Sandbox,
    connect: Callable[..., Source],
    image: Image,
    tmp_path: Path,
    locked: str,
    stays: list[str],
) -> None:
    azure.add_vm("web", image("os"))
    azure.faults.add("lock", path=f"/{locked}/coriolis", times=0)
    clock = Held()
    report = connect(clock=clock).replicate("web", tmp_path / "images")
    assert [id.split("/")[-2] for id in report.left_behind] == stays
    assert clock.monotonic() < resources.PATIENCE_SECONDS
    azure.faults.clear()
    assert connect(clock=Later(hours=3)).sweep(timedelta(hours=2))[1] == []
    assert not any("coriolis" in resource["id"] for resource in azure.resources())


# What Azure refuses for good


@pytest.mark.parametrize(
    ("kind", "given", "raised", "code"),
    [
        ("policy", {"path": "/networkSecurityGroups/"}, errors.Denied, "RequestDisallowedByPolicy"),
        ("policy", {"path": "/snapshots/"}, errors.Denied, "RequestDisallowedByPolicy"),
        (
            "failed-operation",
            {"method": "PUT", "path": "/disks/", "code": "InternalExecutionError", "times": 0},
            errors.OperationFailed,
            "InternalExecutionError",
        ),
        (
            "failed-operation",
            {"method": "PUT", "path": "/virtualMachines/", "code": "OSProvisioningTimedOut"},
            errors.OperationFailed,
            "OSProvisioningTimedOut",
        ),
        ("no-capacity", {"times": 0}, errors.QuotaExceeded, "SkuNotAvailable"),
        ("no-allocation", {"times": 0}, errors.QuotaExceeded, "AllocationFailed"),
        ("quota", {"times": 0}, errors.Conflict, "OperationNotAllowed"),
        (
            "refuse",
            {
                "method": "PUT",
                "path": "/virtualMachines/",
                "status": 400,
                "code": "VMMarketplaceInvalidInput",
                "times": 0,
            },
            errors.AzureError,
            "VMMarketplaceInvalidInput",
        ),
    ],
)
def test_what_cannot_be_got_over_is_explained_and_nothing_is_left(
    azure: Sandbox,
    replicate: Callable[[], None],
    kind: str,
    given: dict[str, Any],
    raised: type[errors.AzureError],
    code: str,
) -> None:
    azure.faults.add(kind, **given)
    with pytest.raises(raised) as caught:
        replicate()
    assert caught.value.facts["code"] == code
    assert caught.value.remedy


def test_an_operation_that_another_request_pushed_aside_is_an_error_of_ours(
    azure: Sandbox, source: Source
) -> None:
    """Azure tells it as Canceled, with status 200 and an empty code."""
    azure.faults.add("failed-operation", method="PUT", code="", message="")
    with pytest.raises(errors.Conflict, match="could not create") as caught:
        put(source)
    assert caught.value.facts["code"] == "OperationPreempted"


# Where there is no room


@pytest.mark.parametrize(
    "refusals",
    [
        [
            ("no-capacity", "SkuNotAvailable"),
            ("no-allocation", "AllocationFailed"),
            ("quota", "QuotaExceeded"),
        ],
        [("no-allocation", "ZonalAllocationFailed"), ("quota", "OperationNotAllowed")],
        [
            ("no-allocation", "OverconstrainedAllocationRequest"),
            ("no-allocation", "OverconstrainedZonalAllocationRequest"),
        ],
    ],
)
def test_a_size_without_room_gives_way_to_another_within_the_run(
    azure: Sandbox, source: Source, image: Image, told: list[Event], refusals: list[tuple[str, str]]
) -> None:
    azure.add_vm("web", image("os"))
    before = azure.resources()
    for kind, code in refusals:
        azure.faults.add(kind, code=code, path="/virtualMachines/coriolis")
    run, _ = source.prepare("web")
    said = " ".join(event.text for event in told if isinstance(event, Notice))
    assert all(code in said for _, code in refusals)
    assert source.finish(run) == []
    assert azure.resources() == before


# The rules


def test_rules_are_counted_listed_and_cleared(azure: Sandbox, source: Source) -> None:
    put(source)
    azure.faults.add("refuse", method="PUT", code="ScopeLocked", after=1, times=2)
    put(source)
    for left in (1, 0):
        with pytest.raises(errors.Conflict, match="ScopeLocked"):
            put(source)
        assert [rule["times"] for rule in azure.faults.listed()] == [left] * bool(left)
    azure.faults.add("refuse", times=0)
    azure.faults.clear()
    put(source)


@pytest.mark.parametrize(
    ("kind", "given"),
    [("meteor", {}), ("throttle", {"times": "x"}), ("throttle", {"colour": 1}), ("throttle", {"path": 7})],
)
def test_what_is_no_rule_is_refused(azure: Sandbox, kind: str, given: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidInput):
        azure.faults.add(kind, **given)


def test_throttling_is_told_as_azure_tells_it(azure: Sandbox, source: Source) -> None:
    """The compute provider leaves out the `error` around its 429; Retry-After counts seconds."""
    source.azure.groups()
    azure.faults.add("throttle", path="/disks/", times=0, seconds=0.001)
    with pytest.raises(errors.Throttled) as compute:
        source.azure.get(names.resource_id(source.azure.subscription, GROUP, "disk", "d"))
    assert (compute.value.facts["code"], compute.value.facts["status"]) == ("TooManyRequests", 429)
    azure.faults.add("throttle", path="/networkSecurityGroups/", times=0, seconds=0.001)
    with pytest.raises(errors.Throttled) as network:
        source.azure.get(nsg(source))
    assert network.value.facts["code"] == "SubscriptionRequestsThrottled"


def test_all_disks_of_a_wave_are_attached_and_detached_in_one_request_each(
    azure: Sandbox, connect: Callable[..., Source], image: Image, tmp_path: Path
) -> None:
    """Azure allows a VM about a dozen changes in a row, and four more a minute. The last wave goes with the worker."""
    azure.add_vm("web", image("os"), [image(f"d{n}", MIB) for n in range(3)])
    before = azure.resources()
    connect(environment=TWO_SLOTS).replicate("web", tmp_path / "images")
    requests = [(method, path) for method, path in azure.requests if "/coriolis" in path]
    changes = [path for method, path in requests if method == "PATCH" and "/virtualMachines/" in path]
    deleted = [path for method, path in requests if method == "DELETE" and "clone" in path]
    assert (len(changes), len(deleted)) == (3, 2)
    assert azure.resources() == before


def test_faults_and_permissions_are_set_from_the_command_line(tmp_path: Path) -> None:
    """Another process serves the sandbox; the rule reaches it over the sandbox's own HTTP interface."""
    folder = tmp_path / "azure"
    with serving(folder) as connection:
        environment = folder / "environment.json"
        listed = json.loads(
            command(
                *("sandbox", "fault", str(folder), "refuse", "--method", "GET", "--path", "/virtualMachines"),
                *("--code", "ScopeLocked", "--status", "409", "--json"),
            ).stdout
        )
        assert [(rule["kind"], rule["code"], rule["times"]) for rule in listed] == [
            ("refuse", "ScopeLocked", 1)
        ]
        assert "ScopeLocked" in command("sandbox", "fault", str(folder)).stdout
        with Source(connection, json.loads(environment.read_text())) as source:
            with pytest.raises(errors.Conflict, match="ScopeLocked"):
                source.list_vms()
            assert source.list_vms() == []
            sandbox.fault(folder, "server-error", times=0)
            assert command("sandbox", "fault", str(folder), "--clear", "--json").stdout.strip() == "[]"
            assert source.list_vms() == []
            role = tmp_path / "role.json"
            role.write_text(
                json.dumps({"Actions": ["Microsoft.Resources/subscriptions/resourceGroups/read"]})
            )
            command("sandbox", "permit", str(folder), str(role))
            with pytest.raises(errors.Denied, match="virtualMachines/read"):
                source.list_vms()
            role.write_text(json.dumps(permissions.role(set(), ["/"])))
            command("sandbox", "permit", str(folder), str(role))
            assert source.list_vms() == []
            full = permissions.role({permissions.BLOB_STORAGE, permissions.BLOB_DATA}, ["/"])
            role.write_text(json.dumps(full))
            command("sandbox", "permit", str(folder), str(role))
            (held,) = source.azure.permissions(f"/subscriptions/{source.azure.subscription}")
            assert held["dataActions"] == full["DataActions"] != []
            role.write_text("{}")
            assert "Actions" in command("sandbox", "permit", str(folder), str(role), check=2).stderr
        source_files = ("-c", str(folder / "connection.json"), "-e", str(environment))
        sandbox.fault(folder, "refuse", path="/virtualMachines", code="ScopeLocked")
        role.write_text(json.dumps(permissions.role(set(), ["/"])))
        command("sandbox", "permit", str(folder), str(role))
        told = command("inspect", *source_files, "web", check=3).stderr
        assert "ScopeLocked" in told
        assert "Azure's answer: HTTP 409, request id " in told
        assert "meteor" in command("sandbox", "fault", str(folder), "meteor", check=2).stderr
