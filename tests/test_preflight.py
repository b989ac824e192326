"""What `check` finds before anything is made, and the permissions that a run needs: the table holds both ways."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coriolis_azure import errors
from coriolis_azure.azure import names, permissions
from coriolis_azure.checks.finding import Checked
from coriolis_azure.plugin.provider import AzureExportProvider
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness.battles import served
from harness.constants import GROUP, MIB
from harness.plugin_errors import raised
from harness.processes import completed

ROOT = Path(__file__).parent.parent
Image = Callable[..., Path]
Connect = Callable[..., Source]

CALLERS = {permissions.SHUTDOWN, permissions.POOL}
ALL = {permissions.WORKER, permissions.PUBLIC_IP, permissions.OWN_NETWORK} | CALLERS
# This host is the only one that may come in: no warning is left.
QUIET = {"export_worker_allowed_addresses": ["192.0.2.1"]}


def texts(checked: Checked, severity: str) -> str:
    return "\n".join(finding.text for finding in checked.findings if finding.severity == severity)


def changed(azure: Sandbox, suffix: str, change: Callable[[Any], None]) -> None:
    """Answers to a GET of a path with this end are changed on their way."""

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if (
            request.method == "GET"
            and request.path.lower().endswith(suffix.lower())
            and response.status == 200
        ):
            document = json.loads(response.body)
            change(document)
            return replace(response, body=json.dumps(document).encode())
        return response

    azure.intercept = look


def allow(azure: Sandbox, *actions: str, but: tuple[str, ...] = ()) -> None:
    azure.permissions[:] = [{"actions": list(actions), "notActions": list(but)}]


def test_a_good_setup_has_no_errors_and_nothing_is_written(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os"))
    before, asked = azure.resources(), len(azure.requests)
    checked = connect(QUIET).check("web")
    assert checked.ok
    assert texts(checked, "warning") == ""
    assert checked.checked_machine().name == "web"
    assert {finding.step for finding in checked.findings} >= {
        "connect",
        "inspect",
        "permissions",
        "worker",
        "copy",
    }
    made = [(method, path) for method, path in list(azure.requests)[asked:] if method != "GET"]
    assert all(path.endswith(("/token", "/checkPolicyRestrictions")) for _, path in made)
    assert azure.resources() == before


def test_without_a_vm_connection_and_environment_are_checked(source: Source) -> None:
    checked = source.check()
    assert checked.ok
    assert checked.machine is None
    assert "reached from anywhere" in texts(checked, "warning")


def test_a_baseline_that_the_mechanism_does_not_keep_is_a_warning(connect: Connect) -> None:
    for mechanism, warned in (("worker", True), ("hybrid", False), ("snapshots", False)):
        settings = {**QUIET, "keep_baseline": True, "replica_export_mechanism": mechanism}
        told = texts(connect(settings).check(), "warning")
        assert ("keep_baseline has no effect" in told) == warned, mechanism


def test_every_error_is_found_at_once_each_with_a_remedy(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os"))
    azure.quotas["cores"] = (100, 100)
    azure.quotas["PublicIPAddresses"] = (10, 10)
    checked = connect({"exclude_disks": ["data-9"], "export_network": "sandbox-vnet/none"}).check("web")
    found = texts(checked, "error")
    for words in (
        "has no disk data-9",
        "no subnet none",
        "0 left of the quota of vCPUs of the location",
        "PublicIPAddresses",
    ):
        assert words in found
    assert all(finding.remedy for finding in checked.errors)
    with pytest.raises(errors.InvalidInput, match="has no disk data-9") as caught:
        checked.checked_machine()
    assert caught.value.message.count("\n") == len(checked.errors) - 1


def test_a_used_up_family_is_a_warning_since_another_size_is_tried(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os"))
    azure.quotas["standardDSv5Family"] = (9, 10)
    checked = connect(QUIET).check("web")
    assert checked.ok
    assert "1 vCPU left of the quota of standardDSv5Family" in texts(checked, "warning")


def test_an_unlimited_quota_is_enough(azure: Sandbox, connect: Connect) -> None:
    azure.quotas["cores"] = (500, -1)
    assert connect(QUIET).check().ok


@pytest.mark.parametrize(
    ("level", "words"), [("CanNotDelete", "forbids deleting"), ("ReadOnly", "forbids creating")]
)
@pytest.mark.parametrize("scope", ["", f"/resourceGroups/{GROUP}"])
def test_locks_are_errors(azure: Sandbox, connect: Connect, level: str, words: str, scope: str) -> None:
    source = connect(QUIET)
    lock(source, azure, f"/subscriptions/{source.azure.subscription}{scope}", level)
    assert f"the lock keep ({level})" in texts(source.check(), "error")
    assert words in texts(source.check(), "error")


@pytest.mark.slow
def test_locks_on_others_things_are_none_of_ours(azure: Sandbox, connect: Connect, image: Image) -> None:
    azure.add_vm("web", image("os"))
    azure.add_vm("other", image("os"))
    source = connect(QUIET)
    lock(source, azure, source.inspect("other").id, "ReadOnly")
    assert texts(source.check("web"), "warning") == ""
    lock(source, azure, source.inspect("web").disks[0].id, "CanNotDelete")
    assert texts(source.check("web"), "warning") == ""
    lock(source, azure, source.inspect("web").disks[0].id, "ReadOnly")
    assert "may forbid reading the disk" in texts(source.check("web"), "warning")


def lock(source: Source, azure: Sandbox, scope: str, level: str) -> None:
    """A lock as somebody else puts it: with a request of their own."""
    body = json.dumps({"properties": {"level": level}}).encode()
    token = source.azure.credential.get_token("https://management.azure.com/.default").token
    url = f"https://x.invalid{scope}/providers/Microsoft.Authorization/locks/keep?api-version=2020-05-01"
    assert azure.handle(Request("PUT", url, {"Authorization": f"Bearer {token}"}, body)).status < 300


def test_wrong_credentials_are_one_finding_and_no_more_is_asked(azure: Sandbox, connect: Connect) -> None:
    principal = {**azure.connection_info()["service_principal_credentials"], "client_secret": "wrong"}
    checked = connect(QUIET, {"service_principal_credentials": principal}).check("web")
    assert ["AADSTS7000215" in finding.text for finding in checked.findings] == [True]


@pytest.mark.parametrize(
    ("vm", "environment", "words"),
    [
        ("nobody", {}, "no VM nobody"),
        ("web", {"resource_group": "elsewhere"}, "elsewhere"),
        ("web", {"location": "westus"}, "not in westus"),
        ("web", {"location": "atlantis"}, "atlantis is not a location"),
        ("web", {"export_network": "sandbox-vnet"}, "does not name a subnet"),
    ],
)
def test_wrong_names_are_findings(
    azure: Sandbox, connect: Connect, image: Image, vm: str, environment: dict[str, str], words: str
) -> None:
    azure.add_vm("web", image("os"))
    assert words in texts(connect({**QUIET, **environment}).check(vm), "error")


def test_disks_in_waves_and_the_time_that_a_full_read_takes(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("big", image("os"), [image(f"d{n}", MIB) for n in range(5)], VmSpec(size="Standard_D8s_v5"))
    told = texts(connect({**QUIET, "export_worker_size": "Standard_D2s_v5"}).check("big"), "fine")
    assert "6 disks, of which the worker can attach 4 at a time: copied in 2 waves" in told
    assert "Standard_D2s_v5 reads 81.1 MiB/s: 1 min" in told
    fewer = connect({**QUIET, "export_worker_size": "Standard_D2s_v5", "exclude_disks": ["os", "data-0"]})
    assert "waves" not in texts(fewer.check("big"), "fine")


def test_a_size_that_the_zone_lacks_is_told_with_the_zones_that_have_it(
    azure: Sandbox, connect: Connect, image: Callable[..., Path]
) -> None:
    azure.add_vm("web", image("os"), spec=VmSpec(zone="3"))
    checked = connect({**QUIET, "export_worker_size": "Standard_D2as_v5"}).check("web")
    assert "(sold in zones 1, 2, not in zone 3)" in texts(checked, "warning")
    assert "size Standard_D2s_v5 is offered in westeurope, zone 3" in texts(checked, "fine")


@pytest.mark.parametrize(
    ("size", "why"),
    [("Standard_A1", "does not have it"), ("Standard_D2ps_v5", "Arm64"), ("Standard_D2s_v6", "NVMe")],
)
def test_a_size_that_is_replaced_is_told_with_the_reason(connect: Connect, size: str, why: str) -> None:
    checked = connect({**QUIET, "export_worker_size": size}).check()
    assert checked.ok
    assert f"export_worker_size {size} cannot be used" in texts(checked, "warning")
    assert why in texts(checked, "warning")


@pytest.mark.parametrize(
    ("state", "severity"), [("ReadyToUpload", "error"), ("Frozen", "warning"), ("ActiveSAS", "warning")]
)
def test_states_of_disks(azure: Sandbox, connect: Connect, image: Image, state: str, severity: str) -> None:
    azure.add_vm("web", image("os"))
    changed(azure, "/disks/web-os", lambda disk: disk["properties"].update(diskState=state))
    assert "os (web-os)" in texts(connect(QUIET).check("web"), severity)


@pytest.mark.parametrize("sku", ["UltraSSD_LRS", "PremiumV2_LRS"])
@pytest.mark.parametrize("zone", [None, "1"])
def test_copies_of_disks_with_large_sectors_need_a_zone(
    azure: Sandbox, connect: Connect, image: Image, sku: str, zone: str | None
) -> None:
    azure.add_vm("web", image("os"), [image("data")], VmSpec(zone=zone))

    def large(disk: Any) -> None:
        disk["sku"]["name"] = sku
        disk["properties"]["creationData"]["logicalSectorSize"] = 4096

    changed(azure, "/disks/web-data-0", large)
    checked = connect(QUIET).check("web")
    assert checked.ok
    assert "in each run Azure copies its snapshot in the background" in texts(checked, "warning")
    assert ("can only be attached within a zone" in texts(checked, "warning")) is (zone is None)


@pytest.mark.parametrize("sku", ["StandardSSD_ZRS", "Premium_ZRS"])
def test_zone_redundant_disks_have_quotas_of_their_own(
    azure: Sandbox, connect: Connect, image: Image, sku: str
) -> None:
    azure.add_vm("web", image("os"), [image("data", MIB)], VmSpec(data_sku=sku))
    name = f"{sku.replace('_', '')}DiskCount"
    azure.quotas[name] = (100, 100)
    told = texts(connect(QUIET).check("web"), "error")
    assert f"0 left of the quota of {name} in westeurope, but a run needs 1 at once" in told


@pytest.mark.parametrize(
    ("quota", "left", "words"),
    [
        (
            "PremiumDiskCount",
            0,
            "0 left of the quota of PremiumDiskCount in westeurope, but a run needs 1 at once",
        ),
        (
            "StandardSSDDiskCount",
            4,
            "4 left of the quota of StandardSSDDiskCount in westeurope, but a run needs 5 at once",
        ),
        (
            "StandardSnapshotCount",
            6,
            "6 left of the quota of StandardSnapshotCount in westeurope, but a run needs 7 at once",
        ),
        ("PremiumDiskCount", 1, ""),
        ("StandardSSDDiskCount", 5, ""),
        ("StandardSnapshotCount", 7, ""),
    ],
)
def test_the_quota_of_disks_must_last_for_what_a_wave_needs(
    azure: Sandbox, connect: Connect, image: Image, quota: str, left: int, words: str
) -> None:
    """Seven disks, of which the worker holds four: it has one of its own."""
    azure.add_vm("web", image("os"), [image("data", MIB)] * 6, VmSpec(size="Standard_D8s_v5"))
    azure.quotas[quota] = (100 - left, 100)
    checked = connect({**QUIET, "export_worker_size": "Standard_D2s_v5"}).check("web")
    assert words in texts(checked, "error")
    assert checked.ok is not bool(words)


@pytest.mark.parametrize(
    ("change", "severity", "words"),
    [
        (
            {"ipConfigurations": [{"id": str(n)} for n in range(3)], "addressPrefix": "10.0.0.0/29"},
            "error",
            "no free",
        ),
        ({"ipConfigurations": [{"id": "1"}], "addressPrefix": "10.0.0.0/29"}, "fine", "has 2 free addresses"),
        (
            {"addressPrefix": None, "addressPrefixes": ["10.0.0.0/28", "fd00::/64"]},
            "fine",
            "has 11 free addresses",
        ),
        (
            {"delegations": [{"properties": {"serviceName": "Microsoft.Sql"}}]},
            "error",
            "delegated to Microsoft.Sql",
        ),
        ({"networkSecurityGroup": {"id": "/x/guard"}}, "warning", "firewall of its own (guard)"),
    ],
)
def test_the_subnet_of_the_settings(
    azure: Sandbox, connect: Connect, change: dict[str, Any], severity: str, words: str
) -> None:
    def narrow(network: Any) -> None:
        network["properties"]["subnets"][0]["properties"].update({"ipConfigurations": [], **change})

    changed(azure, "/virtualNetworks/sandbox-vnet", narrow)
    assert words in texts(connect({**QUIET, "export_network": "sandbox-vnet/default"}).check(), severity)


def test_an_older_azure_is_a_warning(azure: Sandbox, connect: Connect) -> None:
    def old(provider: Any) -> None:
        for kind in provider["resourceTypes"]:
            if kind["resourceType"] == "snapshots":
                kind["apiVersions"] = ["2019-07-01"]

    changed(azure, "/providers/Microsoft.Compute", old)
    checked = connect(QUIET).check()
    assert checked.ok
    assert "microsoft.compute/snapshots" in texts(checked, "warning")


def test_a_disabled_subscription_is_an_error(azure: Sandbox, connect: Connect) -> None:
    source = connect(QUIET)
    changed(azure, f"/subscriptions/{source.azure.subscription}", lambda told: told.update(state="Disabled"))
    assert "the subscription is Disabled" in texts(source.check(), "error")


# Permissions


@pytest.mark.parametrize(
    ("entries", "held"),
    [
        ([{"actions": ["*"]}], True),
        ([{"actions": ["microsoft.compute/DISKS/*"]}], True),
        ([{"actions": ["*/read"]}], False),
        ([{"actions": ["Microsoft.Compute/*/write"]}], True),
        ([{"actions": ["*"], "notActions": ["Microsoft.Compute/disks/*"]}], False),
        ([{"actions": ["*"], "notActions": ["*/write"]}, {"actions": ["*/disks/write"]}], True),
        ([{"actions": None, "notActions": None}], False),
        ([{"actions": ["Microsoft.Compute/disks/writ"]}], False),
        ([], False),
    ],
)
def test_what_a_list_of_permissions_allows(entries: list[dict[str, Any]], held: bool) -> None:
    """A role's notActions take away from that role only; * crosses slashes; case does not count."""
    action = permissions.Action("clone", "Microsoft.Compute/disks/write", "")
    assert permissions.granted(entries, action) is held
    as_data = [{f"data{name.capitalize()}": names for name, names in entry.items()} for entry in entries]
    assert not permissions.granted(as_data, action)


# Azure, and the sandbox, tell everybody what they may do.
ASKED = [each for each in permissions.needed(ALL) if each.name != "Microsoft.Authorization/permissions/read"]


@pytest.mark.slow
@pytest.mark.parametrize("action", ASKED, ids=lambda action: action.name)
def test_a_missing_action_is_named(
    azure: Sandbox, connect: Connect, image: Image, action: permissions.Action
) -> None:
    azure.add_vm("web", image("os"))
    allow(azure, *(each for each in permissions.role(ALL, ["/"])["Actions"] if each != action.name))
    checked = connect(QUIET).check("web")
    lax = action.optional or action.feature in CALLERS
    assert action.name in texts(checked, "warning" if lax else "error")
    assert checked.ok is lax
    strict = connect(QUIET).check("web", strict=True)
    assert action.name in texts(strict, "error")
    assert not strict.ok


def test_a_strict_check_is_satisfied_by_the_role_and_by_nothing_less(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os"))
    allow(azure, *permissions.role(ALL - CALLERS, ["/"])["Actions"])
    source = connect(QUIET)
    assert source.check("web", strict=True, shutdown=False, pool=False).ok
    for chosen in ({"pool": False}, {"shutdown": False}):
        lacking = source.check("web", strict=True, **chosen)
        assert "virtualMachines/deallocate/action" in texts(lacking, "error")


@pytest.mark.slow
def test_tags_that_a_policy_demands_are_known_beforehand(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    azure.required_tags.append("cost-center")
    checked = connect(QUIET).check("web")
    (finding,) = checked.errors
    assert "required-tags" in finding.text
    assert "Microsoft.Compute/snapshots" in finding.text
    assert "cost-center" in finding.remedy
    before = azure.resources()
    with pytest.raises(errors.Denied, match="RequestDisallowedByPolicy"):
        connect(QUIET).replicate("web", tmp_path / "images")
    assert azure.resources() == before
    tagged = connect({"tags": {"Cost-Center": "42"}})
    assert tagged.check("web").ok
    assert tagged.replicate("web", tmp_path / "images").left_behind == ()


@pytest.mark.slow
def test_the_role_is_enough_for_the_whole_job(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path
) -> None:
    """The sandbox denies everything else, linked actions included."""
    os_disk = image("os")
    azure.add_vm("web", os_disk)
    before = azure.resources()
    allow(azure, *permissions.role(ALL, ["/"])["Actions"])
    source = connect(QUIET | {"export_worker_allowed_addresses": ["*"]})
    assert source.check("web").ok
    report = source.replicate("web", tmp_path / "images", shutdown=True)
    assert report.left_behind == ()
    assert (tmp_path / "images/os.raw").read_bytes() == os_disk.read_bytes()
    assert azure.resources() == before


@pytest.mark.slow
def test_the_role_for_a_given_network_is_enough_and_smaller(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    actions = permissions.role({permissions.WORKER, permissions.GIVEN_NETWORK}, ["/"])["Actions"]
    assert not any(
        action.endswith(("virtualNetworks/write", "publicIPAddresses/write")) for action in actions
    )
    allow(azure, *actions)
    source = connect({"export_network": "sandbox-vnet/default", "export_worker_use_fip": False})
    assert source.check("web").ok
    assert source.replicate("web", tmp_path / "images").left_behind == ()


IN_STORAGE = {"storage_account_name": "sandboxstorage", "storage_container_name": "replicas"}
FOR_STORAGE = ALL | {permissions.BLOB_STORAGE, permissions.BLOB_DATA}


@pytest.mark.slow
def test_the_role_for_blob_storage_is_enough(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path
) -> None:
    azure.add_vm("web", image("os"))
    role = permissions.role(FOR_STORAGE, ["/"])
    azure.permissions[:] = [{"actions": role["Actions"], "dataActions": role["DataActions"]}]
    source = connect(QUIET | IN_STORAGE | {"export_worker_allowed_addresses": ["*"]})
    assert source.check("web", strict=True).ok
    for full in (False, False, True):
        done = source.replicate("web", "blob://sandboxstorage/replicas/web", full=full)
        assert done.left_behind == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "action",
    [action for action in permissions.needed(FOR_STORAGE) if action.feature in FOR_STORAGE - ALL],
    ids=lambda action: action.name,
)
def test_a_missing_action_for_blob_storage_is_named(
    azure: Sandbox, connect: Connect, image: Image, action: permissions.Action
) -> None:
    azure.add_vm("web", image("os"))
    role = permissions.role(FOR_STORAGE, ["/"])
    azure.permissions[:] = [
        {
            "actions": [name for name in role["Actions"] if name != action.name],
            "dataActions": [name for name in role["DataActions"] if name != action.name],
        }
    ]
    checked = connect(QUIET | IN_STORAGE).check("web")
    assert action.name in texts(checked, "warning" if action.optional else "error")
    assert checked.ok is action.optional


@pytest.mark.slow
@pytest.mark.parametrize(
    "linked",
    [
        "Microsoft.Compute/disks/beginGetAccess/action",
        "Microsoft.Compute/snapshots/beginGetAccess/action",
        "Microsoft.Network/virtualNetworks/subnets/join/action",
        "Microsoft.Network/networkInterfaces/join/action",
    ],
)
def test_azure_asks_for_linked_actions(
    azure: Sandbox, source: Source, image: Image, tmp_path: Path, linked: str
) -> None:
    azure.add_vm("web", image("os"))
    before = azure.resources()
    allow(azure, "*", but=(linked,))
    with pytest.raises(errors.Denied, match=linked):
        source.replicate("web", tmp_path / "images")
    assert azure.resources() == before


def test_permissions_that_cannot_be_read_are_a_warning(azure: Sandbox, connect: Connect) -> None:
    def refuse(request: Request, answer: Callable[[Request], Response]) -> Response:
        if "Microsoft.Authorization" in request.path:
            body = b'{"error": {"code": "AuthorizationFailed", "message": "No."}}'
            return Response(403, {"Content-Type": "application/json"}, body)
        return answer(request)

    azure.intercept = refuse
    checked = connect(QUIET).check()
    assert checked.ok
    assert "could not read the permissions" in texts(checked, "warning")
    assert "could not read the locks" in texts(checked, "warning")


def test_actions_of_the_subscription_are_asked_for_there(azure: Sandbox, connect: Connect) -> None:
    """A role that is assigned to the resource group does not reach the subscription."""
    source = connect(QUIET)
    path = f"/subscriptions/{source.azure.subscription}/providers/Microsoft.Authorization/permissions"
    changed(azure, path, lambda told: told.update(value=[]))
    found = source.check().errors
    assert {"Microsoft.Compute/skus/read" in finding.text for finding in found} == {True, False}
    assert all("on the subscription" in finding.text for finding in found)


def test_long_lists_are_read_to_their_end(azure: Sandbox, source: Source) -> None:
    """By nextLink, with Azure's own URL."""
    second = {"value": [{"actions": ["b"]}]}

    def pages(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.path.endswith("/permissions"):
            more = "page=2" not in request.url
            first = {"value": [{"actions": ["a"]}], "nextLink": f"{request.url}&page=2"}
            return Response.of(200, first if more else second)
        return answer(request)

    azure.intercept = pages
    scope = f"/subscriptions/{source.azure.subscription}"
    assert [each["actions"] for each in source.azure.permissions(scope)] == [["a"], ["b"]]


def test_the_page_of_permissions_is_current() -> None:
    """If not: `python -m docs.make_permissions`."""
    spec = importlib.util.spec_from_file_location("make_permissions", ROOT / "docs" / "make_permissions.py")
    assert spec
    assert spec.loader
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (ROOT / "docs" / "reference" / "permissions.md").read_text(encoding="utf-8") == maker.page()


# The fronts


class Listener:
    """Takes what the orchestrator's event handler takes, and keeps what it shows."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add_progress_update(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.slow
def test_the_plugin_tells_warnings_and_raises_all_errors(azure: Sandbox, image: Image) -> None:
    azure.add_vm("web", image("os"))
    listener = Listener()
    provider = AzureExportProvider(listener)
    with served(azure) as connection:
        info = provider.validate_replica_export_input(None, connection, "web", azure.environment())
        assert info["name"] == "web"
        assert any("reached from anywhere" in line for line in listener.lines)
        allow(azure, "*", but=("Microsoft.Compute/snapshots/*",))
        with pytest.raises(raised(errors.InvalidInput), match="snapshots/write") as caught:
            provider.validate_replica_export_input(None, connection, "web", azure.environment())
    assert "snapshots/delete" in str(caught.value)
    assert "coriolis-azure role" in str(caught.value)


@pytest.mark.slow
def test_the_command_checks_with_an_exit_code(azure: Sandbox, image: Image, tmp_path: Path) -> None:
    azure.add_vm("web", image("os"))
    with served(azure) as connection:
        files = []
        for option, document in (("-c", connection), ("-e", azure.environment())):
            file = tmp_path / f"{option}.json"
            file.write_text(json.dumps(document))
            files += [option, str(file)]
        command = [sys.executable, "-m", "coriolis_azure", "check", *files]
        people = subprocess.run([*command, "web"], capture_output=True, text=True)
        assert (people.returncode, "fine" in people.stdout, "error" in people.stdout) == (0, True, False)
        machines = subprocess.run([*command, "nobody", "--json"], capture_output=True, text=True)
    told = json.loads(machines.stdout)
    assert (machines.returncode, told["ok"]) == (2, False)
    assert ["no VM nobody" in each["text"] for each in told["findings"] if each["severity"] == "error"] == [
        True
    ]


@pytest.mark.parametrize(
    "scope",
    [
        *(
            "",
            "x",
            "/",
            "/subscriptions/",
            "/subscriptions/a/resourceGroups/",
            "/subscriptions/a/providers/x/y/z",
        ),
        "/subscriptions/a/resourceGroups/b/providers/Microsoft.Compute/disks/d",
    ],
)
def test_a_scope_that_a_role_cannot_have_is_refused(scope: str) -> None:
    done = completed(["role", "--scope", "/subscriptions/one", "--scope", scope])
    assert done.returncode == errors.InvalidInput.exit_code
    assert done.stdout == ""
    assert "what to do: Write /subscriptions/ID" in done.stderr


@pytest.mark.parametrize(
    "scope",
    [
        "/subscriptions/00000000-0000-0000-0000-000000000000",
        "/subscriptions/a/resourcegroups/My_Group(1).x",
        "/providers/Microsoft.Management/managementGroups/all",
    ],
)
def test_a_scope_that_azure_takes_is_printed_as_it_is(scope: str) -> None:
    assert json.loads(completed(["role", "--scope", scope]).stdout)["AssignableScopes"] == [scope]


def test_the_command_prints_a_role_that_az_takes() -> None:
    command = [
        sys.executable,
        "-m",
        "coriolis_azure",
        "role",
        "--no-public-ip",
        "--existing-network",
        "--no-shutdown",
        "--no-pool",
        *("--mechanism", "azure_worker"),
    ]
    done = subprocess.run(
        [*command, "--scope", "/subscriptions/one"], capture_output=True, text=True, check=True
    )
    printed = json.loads(done.stdout)
    assert printed["AssignableScopes"] == ["/subscriptions/one"]
    assert (
        printed["Actions"]
        == permissions.role({permissions.WORKER, permissions.GIVEN_NETWORK}, ["/"])["Actions"]
    )
    assert printed["DataActions"] == []
    assert set(printed) == {
        *("Name", "IsCustom", "Description", "Actions", "NotActions", "DataActions", "NotDataActions"),
        "AssignableScopes",
    }
    kinds = {action.rpartition("/")[0] for action in printed["Actions"] if action.endswith("/delete")}
    assert kinds == {names.TYPES[kind] for kind in ("vm", "disk", "snapshot", "nic", "nsg")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "type_", ["EncryptionAtRestWithCustomerKey", "EncryptionAtRestWithPlatformAndCustomerKeys"]
)
def test_copies_are_encrypted_as_their_source_is(
    azure: Sandbox, connect: Connect, image: Image, tmp_path: Path, type_: str
) -> None:
    azure.add_vm("web", image("os"))
    group = f"/subscriptions/{azure.connection_info()['subscription_id']}/resourceGroups/{GROUP}"
    encryption = {
        "type": type_,
        "diskEncryptionSetId": f"{group}/providers/Microsoft.Compute/diskEncryptionSets/d",
    }
    made: dict[str, Any] = {}

    def keyed(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.path.endswith("/diskEncryptionSets/d"):
            return Response.of(200, {"id": request.path, "name": "d", "location": "westeurope"})
        if request.method == "PUT" and request.path.endswith("-os"):
            made[request.path.split("/")[-2]] = json.loads(request.body)["properties"].get("encryption")
        response = answer(request)
        if request.method == "GET" and request.path.endswith("/disks/web-os"):
            document = json.loads(response.body)
            document["properties"]["encryption"] = encryption
            return Response.of(200, document)
        return response

    azure.intercept = keyed
    source = connect(QUIET | {"export_worker_allowed_addresses": ["*"]})
    checked = source.check("web")
    assert checked.ok
    assert "disk encryption set d can be read" in texts(checked, "fine")
    assert "customer-managed keys" in texts(checked, "warning")
    source.replicate("web", tmp_path / "images")
    assert made == {"snapshots": encryption, "disks": encryption}


def with_set(azure: Sandbox, location: str) -> str:
    """The id of a disk encryption set that is there, in `location`."""
    group = f"/subscriptions/{azure.connection_info()['subscription_id']}/resourceGroups/{GROUP}"

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.path.endswith("/diskEncryptionSets/d"):
            return Response.of(200, {"id": request.path, "name": "d", "location": location})
        return answer(request)

    azure.intercept = look
    return f"{group}/providers/Microsoft.Compute/diskEncryptionSets/d"


@pytest.mark.slow
def test_the_workers_own_disk_and_host_are_encrypted_as_policies_demand(
    azure: Sandbox, connect: Connect, image: Image
) -> None:
    azure.add_vm("web", image("os"))
    set_id = with_set(azure, "westeurope")
    allow(azure, *permissions.role(ALL | {permissions.WORKER_KEY}, ["/"])["Actions"])
    source = connect(
        QUIET
        | {"export_worker_encryption_at_host": True, "export_worker_disk_encryption_set": set_id}
        | {"export_worker_allowed_addresses": ["*"]}
    )
    checked = source.check("web")
    assert checked.ok
    assert "disk encryption set d can be read, for the worker's own disk" in texts(checked, "fine")
    run, reader = source.prepare("web")
    assert reader is not None
    vm = source.azure.get(reader.vm)
    assert vm["properties"]["securityProfile"] == {"encryptionAtHost": True}
    disk = source.azure.get(vm["properties"]["storageProfile"]["osDisk"]["managedDisk"]["id"])
    assert disk["properties"]["encryption"] == {
        "type": "EncryptionAtRestWithCustomerKey",
        "diskEncryptionSetId": set_id,
    }
    assert source.finish(run) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"location": "northeurope"}, "the disk encryption set d is in northeurope, not in westeurope"),
        ({"subscription": "0f0f"}, "export_worker_disk_encryption_set is in subscription 0f0f"),
        ({"name": "gone"}, "could not read"),
    ],
)
def test_a_disk_encryption_set_that_the_worker_cannot_use_is_refused_before_anything_is_made(
    azure: Sandbox, connect: Connect, image: Image, change: dict[str, str], words: str
) -> None:
    azure.add_vm("web", image("os"))
    set_id = with_set(azure, change.get("location", "westeurope"))
    if "subscription" in change:
        set_id = set_id.replace(set_id.split("/")[2], change["subscription"])
    set_id = set_id.removesuffix("/d") + f"/{change.get('name', 'd')}"
    before = azure.resources()
    source = connect(QUIET | {"export_worker_disk_encryption_set": set_id})
    assert words in texts(source.check("web"), "error")
    with pytest.raises(errors.CoriolisAzureError, match=words):
        source.prepare("web")
    assert azure.resources() == before


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            "/subscriptions/0f0f0f0f-0000-0000-0000-000000000000/resourceGroups/sandbox/providers/Microsoft.Network"
            "/virtualNetworks/net/subnets/default",
            "export_network is in subscription 0f0f0f0f-0000-0000-0000-000000000000, the VMs are in",
        ),
        ("/subscriptions/x/resourceGroups/net", "does not name a subnet"),
        ("net/subnets/default", "does not name a subnet"),
        (
            "/subscriptions/x/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/n",
            "not the ARM id of a subnet",
        ),
    ],
)
def test_a_network_of_another_subscription_is_refused_before_anything_is_made(
    azure: Sandbox, connect: Connect, image: Image, network: str, words: str
) -> None:
    """Azure connects a VM to networks of its own subscription only."""
    azure.add_vm("web", image("os"))
    before = azure.resources()
    source = connect({**QUIET, "export_network": network})
    assert words in texts(source.check("web"), "error")
    with pytest.raises(errors.InvalidInput, match=words):
        source.prepare("web")
    assert azure.resources() == before
