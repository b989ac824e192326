"""begin- and endGetAccess on the sandbox, and the hosts that their SAS name, with the official SDKs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from azure.core.exceptions import HttpResponseError

from coriolis_azure import vhd
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.sandbox.compute.inside import Inside
from harness.clients import GROUP, HERE, Clients, serving
from harness.exports import blob, grant, revoke, snapshot, vm_disk

SNAPSHOTS = "Microsoft.Compute/snapshots"
READ: Any = {"access": "Read", "durationInSeconds": 3600}


@pytest.fixture
def disk(azure: Sandbox, clients: Clients) -> Inside:
    disk = vm_disk(azure, clients)
    disk.write(4096, b"a" * 4096)
    return disk


def state(clients: Clients, name: str) -> Any:
    return clients.compute.snapshots.get(GROUP, name).disk_state


def refusal(act: Any) -> tuple[int, str]:
    """Status and code of what a host refuses."""
    with pytest.raises(HttpResponseError) as refused:
        act()
    error: Any = refused.value
    return error.status_code, str(getattr(error.error_code, "value", error.error_code))


def test_a_grant_opens_a_snapshot_and_its_revocation_closes_it_at_once(
    clients: Clients, disk: Inside
) -> None:
    snapshot(clients, "s", disk.id)
    assert state(clients, "s") == "Unattached"
    sas = grant(clients, "s")
    assert state(clients, "s") == "ActiveSAS"
    with blob(clients, sas) as client:
        assert client.download_blob(4096, 512).readall() == b"a" * 512
        revoke(clients, "s")
        assert state(clients, "s") == "Unattached"
        assert refusal(client.get_blob_properties)[0] == 403
        assert refusal(lambda: client.download_blob(0, 512)) == (403, "AuthenticationFailed")


def test_a_snapshot_of_a_family_and_a_disk_have_the_two_forms_of_sas(clients: Clients, disk: Inside) -> None:
    first, second = (snapshot(clients, name, disk.id) and grant(clients, name) for name in ("s1", "s2"))
    clients.copy("full", disk.id, snapshot=True)
    incremental = (
        r"snapshot=\d{4}-\d\d-\d\dT\d\d%3A\d\d%3A\d\d\.\d{7}Z&sv=[\d-]+&sr=bs&si=[0-9a-f]{64}&sig=\S+"
    )
    assert re.fullmatch(incremental, urlsplit(first).query)
    assert urlsplit(first).path == urlsplit(second).path
    assert re.fullmatch(r"/md-\w{12}/\w{12}/abcd", urlsplit(first).path)
    assert re.fullmatch(r"sv=[\d-]+&sr=b&si=[0-9a-f-]{36}&sig=\S+", urlsplit(grant(clients, "full")).query)
    of_disk = clients.compute.disks.begin_grant_access(GROUP, "d", READ).result().access_sas
    assert "sr=b&" in str(of_disk)
    assert clients.compute.disks.get(GROUP, "d").disk_state == "ActiveSAS"


def test_a_grant_is_an_operation_whose_result_is_wrapped_at_one_url_and_bare_at_the_other(
    clients: Clients, disk: Inside
) -> None:
    path = f"{snapshot(clients, 's', disk.id).id}/beginGetAccess"
    answer = clients.arm("POST", path, READ)
    assert (answer.status_code, answer.content) == (202, b"")
    wrapped = clients.arm("GET", answer.headers["Azure-AsyncOperation"]).json()
    bare = clients.arm("GET", answer.headers["Location"]).json()
    assert wrapped["properties"]["output"] == bare
    assert set(bare) == {"accessSAS"}
    assert clients.arm("POST", path, READ).status_code == 202  # prolongs it
    assert grant(clients, "s") == bare["accessSAS"]
    ended = clients.arm("POST", path.replace("begin", "end"))
    assert "properties" not in clients.arm("GET", ended.headers["Azure-AsyncOperation"]).json()
    assert clients.arm("GET", ended.headers["Location"]).content == b""


def test_a_snapshot_with_access_granted_is_not_deleted(clients: Clients, disk: Inside) -> None:
    path = snapshot(clients, "s", disk.id).id
    grant(clients, "s")
    status, code, message = clients.refused("DELETE", path)
    assert (status, code) == (409, "OperationNotAllowed")
    assert "active shared access signature" in message
    revoke(clients, "s")
    assert clients.arm("DELETE", path).status_code == 202


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"access": "Read"}, "InvalidParameter"),
        ({"access": "Read", "durationInSeconds": 5_184_001}, "InvalidParameter"),
        ({"access": "Read", "durationInSeconds": 0}, "InvalidParameter"),
        ({"access": "None", "durationInSeconds": 60}, "InvalidParameter"),
        ({"access": "Write", "durationInSeconds": 60}, "BadRequest"),
    ],
)
def test_a_grant_must_be_well_formed(clients: Clients, disk: Inside, body: dict[str, Any], code: str) -> None:
    path = f"{snapshot(clients, 's', disk.id).id}/beginGetAccess"
    assert clients.refused("POST", path, body)[:2] == (400, code)


def test_five_snapshots_of_a_family_are_open_at_a_time(clients: Clients, disk: Inside) -> None:
    for number in range(6):
        snapshot(clients, f"s{number}", disk.id)
    for number in range(5):
        grant(clients, f"s{number}")
    grant(clients, "s0")  # open already
    path = clients.id(SNAPSHOTS, "s5/beginGetAccess")
    assert clients.refused("POST", path, READ)[:2] == (409, "OperationNotAllowed")
    revoke(clients, "s1")
    grant(clients, "s5")


def test_a_closed_snapshot_is_opened_by_a_patch(clients: Clients, disk: Inside) -> None:
    path = snapshot(clients, "s", disk.id, networkAccessPolicy="DenyAll").id
    assert clients.refused("POST", f"{path}/beginGetAccess", READ)[:2] == (409, "OperationNotAllowed")
    body: Any = {"tags": {"kept": "yes"}, "properties": {"networkAccessPolicy": "AllowAll"}}
    changed = clients.compute.snapshots.begin_update(GROUP, "s", body).result()
    assert (changed.network_access_policy, changed.tags) == ("AllowAll", {"kept": "yes"})
    assert grant(clients, "s")


def test_access_needs_its_own_actions(azure: Sandbox, clients: Clients, disk: Inside) -> None:
    path = snapshot(clients, "s", disk.id).id
    for verb in ("beginGetAccess", "endGetAccess"):
        azure.permissions[:] = [{"actions": ["*"], "notActions": [f"{SNAPSHOTS}/{verb}/action"]}]
        status, code, message = clients.refused("POST", f"{path}/{verb}", READ)
        assert (status, code) == (403, "AuthorizationFailed")
        assert f"'{SNAPSHOTS}/{verb}/action'" in message


def test_a_disk_of_a_running_vm_is_not_exported(azure: Sandbox, clients: Clients, image: Any) -> None:
    azure.add_vm("vm", image("os"))
    path = azure.disk("vm").id
    assert clients.refused("POST", f"{path}/beginGetAccess", READ)[:2] == (409, "OperationNotAllowed")
    clients.compute.virtual_machines.begin_deallocate(GROUP, "vm").result()
    assert clients.arm("POST", f"{path}/beginGetAccess", READ).status_code == 202
    assert clients.refused("POST", clients.id("Microsoft.Compute/virtualMachines", "vm/start"))[0] == 409


def test_the_blob_is_a_fixed_vhd(clients: Clients, disk: Inside) -> None:
    snapshot(clients, "s", disk.id)
    with blob(clients, grant(clients, "s")) as client:
        properties: Any = client.get_blob_properties()
        assert properties.size == disk.size + 512
        assert properties.blob_type == "PageBlob"
        assert properties.copy.status == "success"
        tail = client.download_blob(disk.size - 512, 1024).readall()
        assert vhd.content_size(tail[512:], properties.size, "s") == disk.size
        assert tail[:512] == bytes(512)


def test_the_answers_to_a_reader_are_those_of_a_page_blob(clients: Clients, disk: Inside) -> None:
    snapshot(clients, "s", disk.id)
    sas, size = grant(clients, "s"), disk.size + 512
    part = clients.send("GET", sas, **{"x-ms-range": "bytes=4000-4199", "x-ms-version": "2021-04-10"})
    assert (part.status_code, part.content) == (206, bytes(96) + b"a" * 104)
    assert part.headers["Content-Range"] == f"bytes 4000-4199/{size}"
    assert part.headers["x-ms-version"] == "2021-04-10"
    last = clients.send("GET", sas, **{"Range": f"bytes={size - 512}-{size + 99}"})
    assert last.headers["Content-Range"] == f"bytes {size - 512}-{size - 1}/{size}"
    beyond = clients.send("GET", sas, **{"x-ms-range": f"bytes={size}-{size + 511}"})
    assert (beyond.status_code, beyond.headers["x-ms-error-code"]) == (416, "InvalidRange")
    head = clients.send("HEAD", sas)
    assert (head.headers["Content-Length"], head.content) == (str(size), b"")
    assert head.headers["x-ms-incremental-copy"] == "true"
    assert clients.send("PUT", sas).status_code == 403


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("If-Match", "{etag}", 206),
        ("If-Match", '"garbage"', 412),
        ("If-None-Match", "{etag}", 304),
        ("If-None-Match", '"garbage"', 206),
        ("If-Modified-Since", "{modified}", 304),
        ("If-Modified-Since", "Thu, 01 Jan 2015 00:00:00 GMT", 206),
        ("If-Unmodified-Since", "{modified}", 206),
        ("If-Unmodified-Since", "Thu, 01 Jan 2015 00:00:00 GMT", 412),
    ],
)
def test_conditions_are_honoured(
    clients: Clients, disk: Inside, header: str, value: str, status: int
) -> None:
    snapshot(clients, "s", disk.id)
    sas = grant(clients, "s")
    head = clients.send("HEAD", sas).headers
    given = value.format(etag=head["ETag"], modified=head["Last-Modified"])
    answer = clients.send("GET", sas, **{"Range": "bytes=0-511", header: given})
    assert answer.status_code == status
    assert answer.headers.get("x-ms-error-code") == (None if status == 206 else "ConditionNotMet")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sas: sas.replace("sig=", "sig=A"),
        lambda sas: re.sub(r"snapshot=[^&]+&", "", sas),
        lambda sas: re.sub(r"si=.", "si=g", sas),
        lambda sas: sas.replace("/md-", "/md-x"),
        lambda sas: sas.replace("abcd?", "abce?"),
    ],
)
def test_a_damaged_sas_is_refused(clients: Clients, disk: Inside, spoil: Any) -> None:
    snapshot(clients, "s", disk.id)
    answer = clients.send("GET", spoil(grant(clients, "s")))
    assert (answer.status_code, answer.headers["x-ms-error-code"]) == (403, "AuthenticationFailed")


def test_a_sas_survives_the_deletion_of_another_and_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path / "azure") as info:
        clients = Clients(info)
        disk = clients.disk("d")
        snapshot(clients, "s", disk.id)
        sas = grant(clients, "s")
        with blob(clients, sas) as client:
            assert client.download_blob(0, 512).readall() == bytes(512)
        clients.close()
    with serving(tmp_path / "azure") as info:
        clients = Clients(info)
        with blob(clients, sas) as client:
            assert client.get_blob_properties().size == (1 << 30) + 512
        clients.close()


# ---------------------------------------------------------------- who may reach it


def disk_access(clients: Clients) -> Any:
    body: Any = {"location": HERE}
    return clients.compute.disk_accesses.begin_create_or_update(GROUP, "gate", body).result()


def test_entra_mode_asks_for_a_token_for_disks_and_a_data_action(
    azure: Sandbox, clients: Clients, disk: Inside
) -> None:
    path = snapshot(clients, "s", disk.id, dataAccessAuthMode="AzureActiveDirectory").id
    sas = grant(clients, "s")
    plain = clients.send("GET", sas, Range="bytes=0-511")
    assert plain.status_code == 401
    assert 'resource_id="https://disk.azure.com/"' in plain.headers["WWW-Authenticate"]
    assert clients.info["tenant"] in plain.headers["WWW-Authenticate"]
    for scope in ("https://disk.azure.com/.default", "https://storage.azure.com/.default"):
        token = clients.credential.get_token(scope).token
        assert clients.send("GET", sas, Authorization=f"Bearer {token}").status_code == 401
    with blob(clients, sas, clients.credential) as client:  # the SDK follows the challenge
        assert client.download_blob(4096, 512).readall() == b"a" * 512
    azure.permissions[:] = [
        {"actions": ["*"], "dataActions": [f"{SNAPSHOTS}/download/action"], "scope": path}
    ]
    token = clients.credential.get_token("https://disk.azure.com//.default").token
    assert clients.send("GET", sas, Range="bytes=0-511", Authorization=f"Bearer {token}").status_code == 206
    azure.permissions[:] = [{"actions": ["*"], "dataActions": ["Microsoft.Compute/disks/download/action"]}]
    refused = clients.send("GET", sas, Range="bytes=0-511", Authorization=f"Bearer {token}")
    assert (refused.status_code, refused.headers["x-ms-error-code"]) == (
        403,
        "AuthorizationPermissionMismatch",
    )


def test_a_private_snapshot_is_read_from_its_network_only(
    azure: Sandbox, clients: Clients, disk: Inside
) -> None:
    gate = disk_access(clients)
    snapshot(clients, "s", disk.id, networkAccessPolicy="AllowPrivate", diskAccessId=gate.id)
    sas = grant(clients, "s")
    answer = clients.send("GET", sas, Range="bytes=0-511")
    assert (answer.status_code, answer.headers["x-ms-error-code"]) == (403, "AuthorizationFailure")
    azure.exporting.private_clients = True
    assert clients.send("GET", sas, Range="bytes=0-511").status_code == 206
    assert clients.refused("DELETE", gate.id)[:2] == (409, "OperationNotAllowed")
    revoke(clients, "s")
    clients.compute.snapshots.begin_delete(GROUP, "s").result()
    clients.compute.disk_accesses.begin_delete(GROUP, "gate").result()
    assert list(clients.compute.disk_accesses.list_by_resource_group(GROUP)) == []


def test_a_policy_and_a_disk_access_that_contradict_each_other_are_refused(
    clients: Clients, disk: Inside
) -> None:
    gate = disk_access(clients)
    path = snapshot(clients, "s", disk.id, networkAccessPolicy="AllowPrivate", diskAccessId=gate.id).id

    def patched(**properties: str) -> tuple[int, str]:
        return clients.refused("PATCH", path, {"properties": properties})[:2]

    assert patched(networkAccessPolicy="AllowAll") == (409, "ConflictingUserInput")
    assert patched(networkAccessPolicy="AllowPrivate", diskAccessId="") == (400, "InvalidParameter")
    assert patched(networkAccessPolicy="AllowPrivate", diskAccessId=disk.id) == (404, "NotFound")
    assert patched(networkAccessPolicy="Anything") == (400, "InvalidParameter")
    body: Any = {"properties": {"networkAccessPolicy": "DenyAll", "diskAccessId": ""}}
    changed = clients.compute.snapshots.begin_update(GROUP, "s", body).result()
    assert (changed.network_access_policy, changed.disk_access_id) == ("DenyAll", None)


def test_five_disks_are_exported_through_a_disk_access_at_a_time(clients: Clients, azure: Sandbox) -> None:
    gate = disk_access(clients)
    private: Any = {"properties": {"networkAccessPolicy": "AllowPrivate", "diskAccessId": gate.id}}
    for number in range(6):
        path = vm_disk(azure, clients, f"d{number}").id
        clients.compute.disks.begin_update(GROUP, f"d{number}", private).result()
        if number < 5:
            assert clients.arm("POST", f"{path}/beginGetAccess", READ).status_code == 202
    assert clients.refused("POST", f"{path}/beginGetAccess", READ)[:2] == (409, "OperationNotAllowed")


def test_a_disk_access_needs_to_be_readable(azure: Sandbox, clients: Clients, disk: Inside) -> None:
    gate = disk_access(clients)
    azure.permissions[:] = [{"actions": ["*"], "notActions": ["Microsoft.Compute/diskAccesses/read"]}]
    body = {"properties": {"networkAccessPolicy": "AllowPrivate", "diskAccessId": gate.id}}
    assert clients.refused("PATCH", disk.id, body)[:2] == (403, "LinkedAuthorizationFailed")


# ---------------------------------------------------------------- how many


def test_a_disk_has_so_many_snapshots_so_fast(azure: Sandbox, clients: Clients, disk: Inside) -> None:
    azure.exporting.snapshot_rate = 2
    for name in ("s1", "s2"):
        snapshot(clients, name, disk.id)
    creation = {"createOption": "Copy", "sourceResourceId": disk.id}
    body = {"location": HERE, "properties": {"creationData": creation, "incremental": True}}
    path = clients.id(SNAPSHOTS, "s3")
    assert clients.refused("PUT", path, body)[2].startswith("2 incremental snapshots of the disk were taken")
    azure.exporting.snapshot_rate, azure.exporting.most_snapshots = 0, 2
    assert clients.refused("PUT", path, body)[2].startswith("The disk has 2 incremental snapshots")
    clients.compute.snapshots.begin_delete(GROUP, "s1").result()
    assert clients.arm("PUT", path, body).status_code == 202


# ---------------------------------------------------------------- beside a recording of Azure

RECORDING = Path(__file__).parents[2] / "shared" / "azure-recordings" / "test_snapshot_access.yaml"


def recorded() -> list[tuple[str, dict[str, Any]]]:
    """The recorded exchanges from the first grant on: method and end of the path, and the response."""
    yaml = pytest.importorskip("yaml")
    if not RECORDING.exists():
        pytest.skip(f"the recording {RECORDING.name} is not on this machine")
    found = []
    for each in yaml.safe_load(RECORDING.read_text())["interactions"]:
        url = urlsplit(each["request"]["uri"])
        kind = "monitor" if "monitor=true" in url.query else url.path.rpartition("/")[2]
        found.append((f"{each['request']['method']} {kind}", each["response"]))
    start = next(number for number, (what, _) in enumerate(found) if what == "POST beginGetAccess")
    return found[start:]


def test_a_grant_has_the_shape_that_was_recorded(clients: Clients, disk: Inside) -> None:
    exchanges = recorded()
    path = f"{snapshot(clients, 's', disk.id).id}/beginGetAccess"
    answer = clients.arm("POST", path, READ)
    _, theirs = exchanges[0]
    assert (answer.status_code, answer.text) == (theirs["status"]["code"], theirs["body"]["string"])
    for header in ("azure-asyncoperation", "location"):
        assert re.search(r"/DiskOperations/[0-9a-f-]+\?p=", theirs["headers"][header][0])
        assert re.search(r"/DiskOperations/[0-9a-f-]+\?p=", answer.headers[header])
    remaining = "x-ms-ratelimit-remaining-resource"
    names = [
        re.findall(r"/(\w+);", text) for text in (theirs["headers"][remaining][0], answer.headers[remaining])
    ]
    assert names[0] == names[1]
    ours = clients.arm("GET", answer.headers["Azure-AsyncOperation"]).json()
    done = next(each for _, each in exchanges if '"Succeeded"' in each["body"]["string"])
    wrapped = json.loads(done["body"]["string"])
    assert set(ours) == set(wrapped)
    assert ours["properties"]["output"].keys() == wrapped["properties"]["output"].keys()
    bare = next(json.loads(each["body"]["string"]) for what, each in exchanges if what == "GET monitor")
    assert clients.arm("GET", answer.headers["Location"]).json().keys() == bare.keys()
    clients.copy("full", disk.id, snapshot=True)  # as in the recording
    sas = [dict(parse_qsl(urlsplit(url).query)) for url in (bare["accessSAS"], grant(clients, "full"))]
    assert sas[0].keys() == sas[1].keys()
    assert [sas[1][name] for name in ("sv", "sr")] == [sas[0][name] for name in ("sv", "sr")]
