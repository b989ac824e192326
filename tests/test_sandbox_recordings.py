"""The sandbox's answers beside recordings of real Azure: status codes, operation headers, document fields.

The recordings are no part of this project; where they are absent these tests are skipped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness.clients import HERE, Clients, vm_body

RECORDINGS = Path(__file__).parents[2] / "shared" / "azure-recordings"
FORCED_DELETE = "canForceDeleteVirtualMachine.json"
ZONED = "canCreateZonedVirtualMachineWithExplicitZoneForRelatedResources.json"
# Fields of real documents that the sandbox does not imitate.
LEFT_OUT = {
    "dhcpOptions",
    "enableVmProtection",
    "internalDomainNameSuffix",
    "dnsSettings",
    "tier",
    "requireGuestProvisionSignal",
    "isArmResource",
}


def exchanges(name: str) -> list[dict[str, Any]]:
    path = RECORDINGS / name
    if not path.exists():
        pytest.skip(f"the recording {name} is not on this machine")
    records: list[dict[str, Any]] = json.loads(path.read_text())["networkCallRecords"]
    return records


def first(name: str, method: str, path: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of the first recorded exchange whose path matches."""
    for record in exchanges(name):
        if record["Method"] == method and re.search(path, record["Uri"], re.IGNORECASE):
            answer = {key.lower(): value for key, value in record["Response"].items()}
            text = answer.pop("body", "")
            return int(answer.pop("statuscode")), answer, json.loads(text) if text else None
    pytest.fail(f"no {method} {path} in {name}")


def follows(headers: Any) -> set[str]:
    """Which of the two operation headers an answer has."""
    return {name for name in ("azure-asyncoperation", "location") if name in {key.lower() for key in headers}}


def network_body() -> dict[str, Any]:
    subnet = {"name": "s", "properties": {"addressPrefix": "10.0.0.0/28"}}
    return {
        "location": HERE,
        "properties": {"addressSpace": {"addressPrefixes": ["10.0.0.0/28"]}, "subnets": [subnet]},
    }


def requests_of(clients: Clients, kind: str) -> tuple[str, str, Any]:
    """A request like the recorded one: method, path, body."""
    disk = {"tags": {"a": "b"}, "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}}
    address = {"sku": {"name": "Standard"}, "properties": {"publicIPAllocationMethod": "Static"}}
    made: dict[str, tuple[str, str, Any]] = {
        "network": ("PUT", "Microsoft.Network/virtualNetworks/v", network_body()),
        "address": ("PUT", "Microsoft.Network/publicIPAddresses/p", {"location": HERE, **address}),
        "disk": ("PUT", "Microsoft.Compute/disks/d", {"location": HERE, **disk}),
    }
    if kind == "vm":
        return "PUT", clients.id("Microsoft.Compute/virtualMachines", "vm"), vm_body(clients.nic("n").id)
    if kind == "vm-delete":
        clients.arm(
            "PUT", clients.id("Microsoft.Compute/virtualMachines", "vm"), vm_body(clients.nic("n").id)
        )
        return "DELETE", clients.id("Microsoft.Compute/virtualMachines", "vm") + "?forceDeletion=true", None
    if kind == "group-delete":
        return "DELETE", clients.group, None
    method, path, body = made[kind]
    return method, f"{clients.group}/providers/{path}", body


@pytest.mark.parametrize(
    ("kind", "recording", "path"),
    [
        ("network", FORCED_DELETE, r"/virtualNetworks/[^/?]+\?"),
        ("address", ZONED, r"/publicIPAddresses/[^/?]+\?"),
        ("disk", ZONED, r"/disks/[^/?]+\?"),
        ("vm", FORCED_DELETE, r"/virtualMachines/[^/?]+\?"),
        ("vm-delete", FORCED_DELETE, r"/virtualMachines/[^/?]+\?"),
        ("group-delete", FORCED_DELETE, r"/resourcegroups/[^/?]+\?"),
    ],
)
def test_operations_begin_as_azures_do(clients: Clients, kind: str, recording: str, path: str) -> None:
    method, url, body = requests_of(clients, kind)
    status, headers, document = first(recording, method, path)
    answer = clients.arm(method, url, body)
    assert answer.status_code == status
    assert follows(answer.headers) == follows(headers)
    if document is None:
        assert answer.content == b""
    else:
        assert set(document) - {"zones"} <= set(answer.json())
        missing = set(document["properties"]) - set(answer.json()["properties"]) - LEFT_OUT
        assert not missing
        states = document["properties"]["provisioningState"], answer.json()["properties"]["provisioningState"]
        assert states[0] == states[1]


@pytest.mark.parametrize(
    ("recording", "path", "ours"),
    [
        (FORCED_DELETE, r"/virtualMachines/[^/?]+\?", "vm"),
        (ZONED, r"/disks/[^/?]+\?", "disk"),
    ],
)
def test_finished_documents_have_azures_fields(
    clients: Clients, recording: str, path: str, ours: str
) -> None:
    _, _, document = first(recording, "GET", path)
    method, url, body = requests_of(clients, ours)
    begun = clients.arm(method, url, body)
    for _ in range(2):
        clients.arm("GET", begun.headers["Azure-AsyncOperation"])
    mine = clients.arm("GET", url).json()
    assert set(document) - {"zones"} <= set(mine)
    assert not set(document["properties"]) - set(mine["properties"]) - LEFT_OUT
    assert mine["properties"]["provisioningState"] == document["properties"]["provisioningState"]


def test_what_is_not_there_is_missed_in_azures_words(clients: Clients) -> None:
    recorded = next(
        json.loads(record["Response"]["Body"])
        for record in exchanges(FORCED_DELETE)
        if record["Method"] == "GET" and str(record["Response"]["StatusCode"]) == "404"
    )
    mine = clients.arm("GET", clients.id("Microsoft.Compute/virtualMachines", "javavm")).json()
    names = re.compile(r"under resource group '[^']+'")
    assert mine["error"]["code"] == recorded["error"]["code"]
    assert names.sub("", mine["error"]["message"]) == names.sub("", recorded["error"]["message"])
