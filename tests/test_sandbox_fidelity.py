"""What the sandbox says during a whole replication is what Azure's own documents and SDKs say it may say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import pytest

from coriolis_azure.azure import documents, names
from coriolis_azure.sandbox import Request, Response, Sandbox, VmSpec
from coriolis_azure.source import Source
from harness import openapi
from harness.real_azure import (
    OPENAPI,
    examples,
    exchanges,
    needs_openapi,
    needs_recordings,
    recordings,
    written,
)

pytestmark = pytest.mark.slow

# Disks are read through signed URLs, from a restore point.
DIRECT = {"replica_export_mechanism": "snapshots", "consistency": "crash"}
Said = tuple[str, str, int, Any, Mapping[str, str]]

# Newer than the documents at hand (2024), or told by recordings but by no document.
NEWER = re.compile(r"\.(etag|kind) is not known$")


def followed(headers: Any) -> frozenset[str]:
    """Which of the two headers an answer has by which an operation is followed."""
    return frozenset({name.lower() for name in headers} & {"azure-asyncoperation", "location"})


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> list[Said]:
    """Every answer of the resource manager to a check, a shutdown and three runs, and to some that are refused."""
    folder = tmp_path_factory.mktemp("traffic")
    said: list[Said] = []

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.path.startswith("/md-"):
            return response  # a disk's host, not the resource manager
        body = json.loads(response.body) if response.body else None
        headers = {name.lower(): value for name, value in response.headers.items()}
        said.append((request.method, request.path, response.status, body, headers))
        return response

    disk = folder / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    with Sandbox(folder / "azure") as sandbox:
        sandbox.add_vm("web", disk, [disk, disk], VmSpec(zone="2"))
        # A worker for two of the three disks: that of the last wave is deleted along with it, the others before.
        settings = sandbox.connection_info(), {**sandbox.environment(), "export_worker_size": "Standard_B1s"}
        with (
            Source(*settings, transport=sandbox.transport()) as source,
            Source(settings[0], {**settings[1], **DIRECT}, transport=sandbox.transport()) as direct,
        ):
            source.azure.groups()
            sandbox.intercept = look
            source.check("web")
            source.list_vms()
            source.replicate("web", folder / "images", shutdown=True)
            source.replicate("web", folder / "images")
            source.azure.start(source.inspect("web").id)
            direct.replicate("web", folder / "images")
            for kind in names.TYPES:
                source.azure.everywhere(kind)
                source.azure.find(names.resource_id(source.azure.subscription, "sandbox", kind, "absent"))
            sandbox.intercept = None
    return said


@needs_openapi
def test_every_answer_of_a_run_is_as_the_official_documents_say(traffic: list[Said]) -> None:
    checked: dict[str, int] = {}
    wrong = []
    for method, path, status, body, _ in traffic:
        found = openapi.faults(method, path, status, body)
        if found is not None:
            kind = f"{method} {'/'.join(path.split('/')[6:8]) or path.split('/')[4]}"
            checked[kind] = checked.get(kind, 0) + 1
            wrong += [f"{method} {path} {status}: {fault}" for fault in found if not NEWER.search(fault)]
    assert sorted(set(wrong)) == []
    for kind in names.TYPES.values():
        assert checked[f"GET {kind}"]
        assert checked[f"PUT {kind}"]
        assert checked[f"DELETE {kind}"]


_RESOURCE = re.compile(r".*/providers/(Microsoft\.\w+/\w+)/[^/]+(/\w+)?/?", re.IGNORECASE)
# 2017's public addresses and networks are older than what a client may ask for today.
_OLD = {"TestVirtualMachineDataDiskNegative.json"}


def kind_of(method: str, path: str) -> tuple[str, str]:
    """Method and type of a request to one resource, with the action where there is one; ("", "") for others."""
    found = _RESOURCE.fullmatch(path)
    if not found or "/locations/" in path.lower():
        return "", ""
    return method, f"{found[1]}{found[2] or ''}".lower()


@needs_recordings
def test_operations_begin_with_a_status_and_headers_that_azure_was_recorded_with(traffic: list[Said]) -> None:
    """Every kind of request of a run that is in any of the recordings, however often."""
    recorded: dict[tuple[str, str], set[tuple[int, frozenset[str]]]] = {}
    for name in set(recordings()) - _OLD:
        for exchange in exchanges(name):
            if exchange.is_arm:
                kind = kind_of(exchange.method, exchange.path)
                recorded.setdefault(kind, set()).add((exchange.status, followed(exchange.headers)))
    compared, wrong = set(), set()
    for method, path, status, _, headers in traffic:
        kind = kind_of(method, path)
        if kind[0] and kind in recorded:
            compared.add(kind)
            begun = followed(headers)
            if status < 400 and (status, begun) not in recorded[kind]:
                wrong.add((*kind, status, tuple(sorted(begun))))
    assert not wrong, sorted(wrong)
    assert len(compared) >= 10


def named(method: str, path: str) -> str:
    """A request as tests/data/operations.json calls it."""
    method, kind = kind_of(method, path)
    return f"{method} {kind}"


def test_operations_begin_with_the_status_headers_and_buckets_of_azures(traffic: list[Said]) -> None:
    """Those that are written down in tests/data; of buckets the ones that are known."""
    known = {each["request"].lower(): each for each in written("operations")}
    compared = set()
    for method, path, status, body, headers in traffic:
        each = known.get(named(method, path).lower())
        if each is None or status >= 400 or (method == "GET" and "operations" in path.lower()):
            continue
        compared.add(each["request"])
        assert status == each["status"], each
        assert followed(headers) == set(each["headers"]), each
        assert buckets_of(headers) >= set(each.get("buckets", ())), each
        if state := each.get("provisioningState"):
            assert body["properties"]["provisioningState"] == state, each
    assert {each["request"] for each in known.values()} - compared == {"DELETE resourceGroups"}


def test_what_is_absent_is_told_in_azures_words(traffic: list[Said]) -> None:
    (known,) = (each for each in written("refusals") if each["code"] == "ResourceNotFound")
    compared = set()
    for _, path, status, body, _ in traffic:
        if status == 404 and path.endswith("/absent"):
            *_, provider, kind, name = path.split("/")
            said = known["message"].format(type=f"{provider}/{kind}", name=name, group="sandbox")
            assert body == {"error": {"code": "ResourceNotFound", "message": said}}
            compared.add(kind)
    assert len(compared) == len(names.TYPES)


# What only Azure's own front doors tell, or the recorders have changed; they have put Retry-After into all answers.
NOBODYS = re.compile(
    r"(strict-transport-security|x-content-type-options|x-cache|x-msedge-ref|x-ms-served-by|x-ms-arm-service-request-id|x-ms-original-request-ids"
    r"|server|retry-after|cache-control|pragma|expires|date|vary|content-\w+|transfer-encoding|mise-correlation-id|connection)$"
)


def of_answer(status: int, headers: Mapping[str, str]) -> frozenset[str]:
    """The names of headers that a client might read; the buckets of the resource manager by their verbs alone."""
    named = {re.sub(r"-(global-)?(reads|writes|deletes)$", "", name.lower()) for name in headers}
    return frozenset(name for name in named if not NOBODYS.match(name))


@needs_recordings
def test_every_header_that_azure_always_sends_is_sent(traffic: list[Said]) -> None:
    """By method, type and status; the operations' URLs count as types."""
    always: dict[tuple[str, str, int], frozenset[str]] = {}
    for name in set(recordings()) - _OLD:
        for exchange in exchanges(name):
            if exchange.is_arm and (kind := asked_about(exchange.path)):
                key = (exchange.method, kind, exchange.status)
                sent = of_answer(exchange.status, exchange.headers)
                always[key] = always.get(key, sent) & sent
    compared, missing = set(), set()
    for method, path, status, _, headers in traffic:
        key = (method, asked_about(path), status)
        if key in always:
            compared.add(key)
            missing |= {(*key, name) for name in always[key] - of_answer(status, headers)}
    assert not missing, sorted(missing)
    assert len(compared) >= 15


def asked_about(path: str) -> str:
    """The type of a resource, of a listing, or of an operation's URL; "" for other paths."""
    operation = re.search(
        r"/providers/(Microsoft\.\w+)/locations/[^/]+/(\w*operations|operationresults)/", path, re.I
    )
    if operation:
        return f"{operation[1]}/{operation[2]}".lower()
    found = re.fullmatch(r".*/providers/(Microsoft\.\w+/\w+)(/[^/]+)?", path, re.I)
    return f"{found[1]}{'' if found[2] else ' list'}".lower() if found and "/locations/" not in path else ""


@needs_recordings
def test_the_buckets_of_disks_are_called_as_azure_calls_them(traffic: list[Said]) -> None:
    recorded: dict[tuple[str, str], set[str]] = {}
    for name in set(recordings()) - _OLD:
        for exchange in exchanges(name):
            if exchange.is_arm and re.search("disk|snapshot", asked_about(exchange.path)):
                recorded.setdefault((exchange.method, asked_about(exchange.path)), set()).update(
                    buckets_of(exchange.headers)
                )
    compared = 0
    for method, path, status, _, headers in traffic:
        key = (method, asked_about(path))
        if status < 400 and recorded.get(key):
            compared += 1
            assert buckets_of(headers) <= recorded[key], key
    assert compared > 10


def buckets_of(headers: Mapping[str, str]) -> set[str]:
    """The names of the provider's buckets that an answer tells of."""
    told = {name.lower(): value for name, value in headers.items()}.get(BUCKETS, "")
    return {each.partition(";")[0].partition("/")[2] for each in told.split(",") if each}


BUCKETS = "x-ms-ratelimit-remaining-resource"


@needs_recordings
def test_refusals_that_were_recorded_are_worded_by_the_sandbox_as_by_azure(traffic: list[Said]) -> None:
    """What is absent, in every recording: the same status, code and words, names aside."""
    names_ = re.compile(r"'[^']*'")
    said = {
        (status, body["error"]["code"], names_.sub("", body["error"]["message"]))
        for _, path, status, body, _ in traffic
        if status == 404 and "absent" in path
    }
    recorded = {
        (exchange.status, exchange.error[0], names_.sub("", exchange.error[1]))
        for name in set(recordings()) - _OLD
        for exchange in exchanges(name)
        if exchange.status == 404 and exchange.is_arm and exchange.error[0] == "ResourceNotFound"
    }
    assert said == recorded


def test_every_document_of_a_run_is_known_to_the_sdks_in_all_its_parts(traffic: list[Said]) -> None:
    from azure.mgmt.compute import models as compute
    from azure.mgmt.network import models as network

    models: dict[str, type] = {
        "vm": compute.VirtualMachine,
        "disk": compute.Disk,
        "snapshot": compute.Snapshot,
        "collection": compute.RestorePointCollection,
        "nic": network.NetworkInterface,
        "ip": network.PublicIPAddress,
        "nsg": network.NetworkSecurityGroup,
        "vnet": network.VirtualNetwork,
    }
    seen, unknown = set(), set()
    for _, _, status, body, _ in traffic:
        for document in body.get("value", [body]) if isinstance(body, dict) and status < 300 else ():
            kind = (
                names.KINDS.get(str(document.get("type", "")).lower()) if isinstance(document, dict) else None
            )
            if kind:
                seen.add(kind)
                assert documents.understood(document, models[kind])
                unknown |= set(_unknown(document, models[kind], kind))
    assert seen == set(names.TYPES)
    # Told by recordings of real Azure, by no document and no SDK.
    assert unknown <= {"nic.kind"}


def _unknown(document: Any, model: Any, where: str) -> Iterator[str]:
    """The properties that a model does not have."""
    fields = documents._fields(model)
    if isinstance(document, list):
        for item in document:
            yield from _unknown(item, model, where)
    if not fields or not isinstance(document, dict):
        return
    exact = dict(fields.values())
    for name, value in document.items():
        if name not in exact:
            yield f"{where}.{name}"
            continue
        inner = [part for part in (exact[name], *get_args(exact[name])) if documents._fields(part)]
        inner += [
            part for each in get_args(exact[name]) for part in get_args(each) if documents._fields(part)
        ]
        for part in inner[:1]:
            yield from _unknown(value, part, f"{where}.{name}")


@needs_openapi
def test_the_checker_holds_the_documents_own_examples_for_good_and_finds_what_is_wrong() -> None:
    group = "/subscriptions/s/resourceGroups/g/providers"
    vm = f"{group}/Microsoft.Compute/virtualMachines/v"
    good = next(document for _, document in examples("VirtualMachine_Get"))
    assert openapi.faults("GET", vm, 200, good) == []
    assert openapi.faults("PUT", vm, 202, good) == ["status 202 is none of 200, 201, default"]
    spoilt = {**good, "location": 7, "properties": {**good["properties"], "colour": "red"}}
    assert sorted(openapi.faults("GET", vm, 200, spoilt) or ()) == [
        ".location: 7 is not of type string",
        ".properties.colour is not known",
    ]
    assert openapi.faults("GET", f"{group}/Microsoft.Compute/gadgets/g", 200, {}) is None
    assert OPENAPI.is_dir()
