"""The real SDK clients against the sandbox, through both of its fronts; `Clients` serves the other sandbox tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ResourceNotFoundError

from coriolis_azure.sandbox import Request, Response, Sandbox
from harness.clients import GROUP, HERE, Body, Clients, in_process, serving, vm_body


@pytest.fixture(params=["in-process", "https"])
def clients(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Clients]:
    if request.param == "in-process":
        with Sandbox(tmp_path / "azure") as azure, in_process(azure) as clients:
            yield clients
        return
    with serving(tmp_path / "azure") as info:
        clients = Clients(info)
        yield clients
        clients.close()


def test_disks_and_snapshots_come_and_go(clients: Clients) -> None:
    disk = clients.disk("d", tags={"mine": "yes"})
    snapshot = clients.copy("s", disk.id, snapshot=True, incremental=True)
    assert snapshot.creation_data.source_unique_id == disk.unique_id
    assert snapshot.disk_size_bytes == 1 << 30
    clients.compute.snapshots.begin_delete(GROUP, "s").result()
    clients.compute.disks.begin_delete(GROUP, "d").result()
    with pytest.raises(ResourceNotFoundError) as missing:
        clients.compute.disks.get(GROUP, "d")
    assert missing.value.error is not None
    assert missing.value.error.code == "ResourceNotFound"


def test_a_vm_lives_through_all_its_operations(clients: Clients) -> None:
    machines = clients.compute.virtual_machines
    made = machines.begin_create_or_update(GROUP, "vm", vm_body(clients.nic("nic").id)).result()
    assert made.provisioning_state == "Succeeded"
    disk = clients.disk("d")
    attach: Body = {"dataDisksToAttach": [{"diskId": disk.id, "lun": 3, "caching": "None"}]}
    machines.begin_attach_detach_data_disks(GROUP, "vm", attach).result()
    assert [each.lun for each in machines.get(GROUP, "vm").storage_profile.data_disks] == [3]
    bare: Body = {"properties": {"storageProfile": {"dataDisks": []}}}
    changed = machines.begin_update(GROUP, "vm", bare).result()
    assert changed.storage_profile.data_disks == []
    for verb, power in (
        ("begin_deallocate", "deallocated"),
        ("begin_start", "running"),
        ("begin_power_off", "stopped"),
        ("begin_restart", "running"),
    ):
        getattr(machines, verb)(GROUP, "vm").result()
        view = machines.get(GROUP, "vm", expand="instanceView").instance_view
        assert f"PowerState/{power}" in [status.code for status in view.statuses]
    machines.begin_delete(GROUP, "vm", force_deletion=True).result()
    assert list(machines.list(GROUP)) == []


def test_what_a_location_offers(clients: Clients) -> None:
    skus = list(clients.compute.resource_skus.list(filter="location eq 'northeurope'"))
    sizes = {each.name: each for each in skus if each.resource_type == "virtualMachines"}
    few = {one.name: one.value for one in sizes["Standard_D2s_v5"].capabilities or ()}
    assert (few["MaxDataDiskCount"], few["vCPUs"], few["MemoryGB"]) == ("4", "2", "8")
    restrictions = sizes["Standard_D2s_v3"].restrictions or []
    assert [each.reason_code for each in restrictions] == ["NotAvailableForSubscription"]
    assert "Standard_A1" not in sizes
    images = clients.compute.virtual_machine_images
    versions = images.list(HERE, "Canonical", "ubuntu-24_04-lts", "server", top=1, orderby="name desc")
    assert [each.name for each in versions] == ["24.04.202607220"]
    image = images.get(HERE, "debian", "debian-12", "12-gen2", "0.20260714.2350")
    assert image.hyper_v_generation == "V2"
    with pytest.raises(ResourceNotFoundError):
        images.list(HERE, "Canonical", "UbuntuServer", "16.04.0-LTS")
    assert any(
        each.name == "Standard_D2s_v5" for each in clients.compute.virtual_machine_sizes.list("westus")
    )
    assert {each.name.value for each in clients.compute.usage.list(HERE)} > {"cores", "virtualMachines"}
    assert list(clients.network.usages.list(HERE))


def test_resource_groups_and_lists(clients: Clients) -> None:
    groups = clients.resource.resource_groups
    assert groups.check_existence(GROUP)
    assert not groups.check_existence("other")
    groups.create_or_update("Other", {"location": HERE, "tags": {"a": "b"}})
    body: Body = {
        "location": HERE,
        "tags": {"run": "r1", "x": "y"},
        "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1},
    }
    clients.compute.disks.begin_create_or_update("other", "d", body).result()
    found = list(clients.resource.resources.list(filter="tagName eq 'run' and tagValue eq 'r1'"))
    assert [str(each.id).split("/")[4] for each in found] == ["OTHER"]
    assert not found[0].tags, "Azure leaves the tags out when it filters by tag name and value"
    (typed,) = clients.resource.resources.list(filter="resourceType eq 'Microsoft.Compute/disks'")
    assert typed.tags == {"run": "r1", "x": "y"}
    assert str(clients.compute.disks.get("OTHER", "d").id).split("/")[4] == "Other", (
        "ids keep their first spelling"
    )
    groups.begin_delete("other").result()
    assert not groups.check_existence("other")
    assert list(clients.resource.resources.list(filter="tagName eq 'run'")) == []


def test_wrong_credentials_are_named(clients: Clients) -> None:
    secret = clients.info["service_principal_credentials"]["client_secret"]
    for credential, code in (
        (clients.login("wrong"), "AADSTS7000215"),
        (clients.login(secret, client_id="11111111-1111-1111-1111-111111111111"), "AADSTS700016"),
        (clients.login(secret, tenant_id="11111111-1111-1111-1111-111111111111"), None),
    ):
        with pytest.raises(ClientAuthenticationError, match=code), credential:
            credential.get_token("https://management.azure.com/.default")


def test_requests_must_be_signed_and_versioned(clients: Clients) -> None:
    path = f"/subscriptions/{clients.subscription}/resourceGroups/{GROUP}"
    assert clients.send("GET", path + "?api-version=2026-04-01").status_code == 401
    answer = clients.send("GET", path + "?api-version=2026-04-01", Authorization="Bearer made-up")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "InvalidAuthenticationToken")
    for wrong, status, code in (
        (path + "?api-version=", 400, "MissingApiVersionParameter"),
        (path + "?api-version=tomorrow", 400, "InvalidApiVersionParameter"),
        ("/subscriptions/1?api-version=2026-04-01", 404, "SubscriptionNotFound"),
        (path + "/providers/Microsoft.Compute/gadgets/g?api-version=2026-04-01", 404, "InvalidResourceType"),
        (
            path + "/providers/Microsoft.Toys/gadgets/g?api-version=2026-04-01",
            404,
            "InvalidResourceNamespace",
        ),
    ):
        refusal = clients.arm("GET", clients.base + wrong)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (status, code)


def test_operation_urls_are_long_and_must_come_back_whole(clients: Clients) -> None:
    body = {"location": HERE, "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}}
    begun = clients.arm("PUT", clients.id("Microsoft.Compute/disks", "d"), body)
    url = begun.headers["Azure-AsyncOperation"]
    assert begun.status_code == 202
    assert len(url) > 4000
    assert clients.arm("GET", url.partition("&c=")[0]).status_code == 403
    assert clients.arm("GET", url).json()["status"] == "Succeeded"


def test_long_lists_come_in_pages(tmp_path: Path) -> None:
    with Sandbox(tmp_path / "azure") as azure, in_process(azure) as clients:
        for index in range(5):
            clients.disk(f"d{index}")
        azure._world.page_size = 2
        assert [each.name for each in clients.compute.disks.list()] == [f"d{index}" for index in range(5)]
        assert len([path for _, path in azure.requests if path.endswith("/disks")]) == 3


def test_an_interceptor_may_lose_a_request_before_or_after_azure_acted(tmp_path: Path) -> None:
    with Sandbox(tmp_path / "azure") as azure, in_process(azure) as clients:
        clients.disk("warm-up")

        def lost_before(request: Request, act: Any) -> Response:
            raise ConnectionError("lost")

        def lost_after(request: Request, act: Any) -> Response:
            act(request)
            raise ConnectionError("lost")

        for name, interceptor, exists in (("before", lost_before, False), ("after", lost_after, True)):
            azure.intercept = interceptor
            with pytest.raises(ConnectionError):
                clients.disk(name)
            azure.intercept = None
            assert (
                clients.id("Microsoft.Compute/disks", name) in [r["id"] for r in azure.resources()]
            ) is exists


def test_a_failed_operation_is_an_answer_with_status_200(clients: Clients) -> None:
    clients.disk("d", gib=2)
    shrink: Body = {
        "location": HERE,
        "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1},
    }
    with pytest.raises(HttpResponseError) as failure:
        clients.compute.disks.begin_create_or_update(GROUP, "d", shrink).result()
    assert failure.value.status_code == 200
    assert failure.value.error is not None
    assert failure.value.error.code == "InvalidParameter"
    assert clients.compute.disks.get(GROUP, "d").disk_size_gb == 2
