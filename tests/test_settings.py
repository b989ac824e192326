"""Settings say what is wrong with which property, and the documentation's own examples are right."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from coriolis_azure import settings
from coriolis_azure.errors import InvalidInput

CONNECTION = {
    "subscription_id": "00000000-0000-0000-0000-000000000000",
    "tenant": "contoso",
    "service_principal_credentials": {"client_id": "id", "client_secret": "s3cr3t-value"},
}
# What users copy from the orchestrator's documentation: both the size and the image are retired, and no storage
# account can have such a name.
DOCUMENTED = {
    "location": "westus",
    "resource_group": "coriolis-testgroup",
    "export_worker_size": "Standard_A1",
    "export_worker_image": {
        "publisher": "Canonical",
        "offer": "UbuntuServer",
        "sku": "16.04.0-LTS",
        "version": "latest",
    },
    "storage_account_name": "storage-account",
    "storage_container_name": "coriolis",
}


def faults(kind: Any, raw: Any) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        kind.from_json(raw)
    return caught.value.message.splitlines()


@pytest.mark.parametrize("name", ["connection_info", "source_environment"])
def test_schemas_are_valid_and_explain_every_property(name: str) -> None:
    schema = settings.schema(name)
    jsonschema.Draft7Validator.check_schema(schema)

    def explained(properties: dict[str, Any]) -> None:
        for key, rule in properties.items():
            assert rule.get("title"), key
            assert rule.get("description"), key
            explained(rule.get("properties", {}))

    explained(schema["properties"])


@pytest.mark.parametrize("group", ["a/b", " production ", "a?b", "100%"])
def test_what_cannot_be_the_name_of_a_resource_group_is_refused(group: str) -> None:
    assert "resource_group" in faults(settings.Environment, {**DOCUMENTED, "resource_group": group})[0]
    assert (
        "default_resource_group"
        in faults(settings.Connection, CONNECTION | {"default_resource_group": group})[0]
    )


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        ({"resource_group": "production\n"}, "resource_group"),
        ({"location": "west\0europe"}, "location"),
        ({"exclude_disks": ["a", "b\r\n"]}, "exclude_disks: 1"),
        ({"tags": {"owner\n": "me"}}, "tags"),
    ],
)
def test_control_characters_are_refused(raw: dict[str, Any], place: str) -> None:
    (fault,) = faults(settings.Environment, DOCUMENTED | raw)
    assert fault.startswith(f"source_environment: {place}: contains ")
    assert fault.endswith(", a control character")


@pytest.mark.parametrize(
    "tenant", [" ", "[/x]", "a b", "../..", "contoso/x", "\N{RIGHT-TO-LEFT OVERRIDE}abc"]
)
def test_a_tenant_that_no_identity_has_is_refused(tenant: str) -> None:
    (fault,) = faults(settings.Connection, CONNECTION | {"tenant": tenant})
    assert fault == "connection_info: tenant: must be written like contoso.onmicrosoft.com"


@pytest.mark.parametrize(
    "url",
    [
        "management.local",
        "http://management.local",
        "https://[::1",
        "https:///x",
        "https://h:99999",
        "ftp://x",
    ],
)
@pytest.mark.parametrize("endpoint", ["resource_manager_endpoint", "active_directory_url"])
def test_an_endpoint_that_is_no_https_address_is_refused(endpoint: str, url: str) -> None:
    endpoints = {"resource_manager_endpoint": "https://management.local", endpoint: url}
    custom = {"cloud_profile": "CustomCloud", "custom_cloud_properties": {"endpoints": endpoints}}
    (fault,) = faults(settings.Connection, CONNECTION | custom)
    assert fault.endswith(f"endpoints: {endpoint}: must be an HTTPS address")


@pytest.mark.parametrize("file", ["x" * 5000, "there/is/none"])
def test_a_ca_bundle_that_cannot_be_a_file_is_refused(file: str) -> None:
    (fault,) = faults(settings.Connection, CONNECTION | {"ca_bundle": file})
    assert fault == f"connection_info: ca_bundle: there is no file {file}"


@pytest.mark.parametrize("path", ["\0", "x" * 5000, "there/is/none"])
def test_a_path_that_cannot_be_is_nothing_to_warn_of(tmp_path: Path, path: str) -> None:
    key = {"service_principal_credentials": {"client_id": "id", "client_certificate_path": path}}
    assert settings.exposed(tmp_path / "connection.json", key) == []


@pytest.mark.parametrize("raw", [{"location": "\ud800"}, {"\udfff": 1}])
def test_half_a_character_is_refused(raw: dict[str, Any]) -> None:
    assert "is not a character" in faults(settings.Environment, DOCUMENTED | raw)[0]


def test_a_setting_that_a_file_names_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    file.write_text('{"location": "westus", "more": [{"a": 1, "a": 2}]}')
    with pytest.raises(InvalidInput, match="contains 'a' twice"):
        settings.read_json(file)


def test_the_documentations_example_is_accepted() -> None:
    environment = settings.Environment.from_json(DOCUMENTED)
    assert environment.export_worker_size == "Standard_A1"
    assert str(environment.export_worker_image) == "Canonical:UbuntuServer:16.04.0-LTS:latest"
    assert environment.export_worker_ssh_port == 22


def test_fields_that_a_form_sends_empty_are_left_out() -> None:
    cleared = {"default_resource_group": "", "ca_bundle": "", "secret_ref": ""}
    assert settings.Connection.from_json({**CONNECTION, **cleared}) == settings.Connection.from_json(
        CONNECTION
    )


def test_environment_and_schema_name_the_same_settings() -> None:
    assert {field.name for field in fields(settings.Environment)} == set(
        settings.schema("source_environment")["properties"]
    )


def test_every_fault_is_one_line_that_names_its_property() -> None:
    found = faults(
        settings.Environment,
        {"location": 5, "export_worker_ssh_port": 0, "colour": "red", "export_worker_image": {"offer": "x"}},
    )
    assert len(found) == 4
    assert found[0].startswith("source_environment: colour is not a known property; known are ")
    assert found[1] == "source_environment: export_worker_image: publisher, sku is missing"
    assert found[2] == "source_environment: export_worker_ssh_port: must be at least 1"
    assert found[3] == "source_environment: location: must be of type string, not integer"


def test_a_fault_never_repeats_a_value_that_may_be_a_secret() -> None:
    wrong = {
        **CONNECTION,
        "service_principal_credentials": {"client_id": 7, "client_secret": "s3cr3t-value", "x": 1},
    }
    assert "s3cr3t" not in "\n".join(faults(settings.Connection, wrong))
    assert "s3cr3t" not in repr(settings.Connection.from_json(CONNECTION))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"tenant": None}, "connection_info: tenant: must be of type string, not null"),
        (
            {"cloud_profile": "Mars"},
            "connection_info: cloud_profile: must be one of AzureCloud, AzureChinaCloud",
        ),
        (
            {"cloud_profile": "CustomCloud"},
            "connection_info: custom_cloud_properties: endpoints: resource_manager",
        ),
        (
            {"cloud_profile": "AzureGermanCloud"},
            "connection_info: cloud_profile: AzureGermanCloud was closed in October 2021",
        ),
        (
            {"custom_cloud_properties": {"api_versions": {"Microsoft.Compute": "new"}}},
            "connection_info: custom_cloud_properties: api_versions: Microsoft.Compute: must match",
        ),
        (
            {"service_principal_credentials": {"client_id": "x"}},
            "connection_info: service_principal_credentials: ",
        ),
        ({"ca_bundle": "/no/such/file"}, "connection_info: ca_bundle: there is no file /no/such/file"),
    ],
)
def test_a_wrong_connection_is_explained(change: dict[str, Any], line: str) -> None:
    assert faults(settings.Connection, {**CONNECTION, **change})[0].startswith(line)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"location": "w"}, "source_environment: resource_group: is required"),
        (
            {"location": "w", "resource_group": "g", "export_worker_use_fip": False},
            "source_environment: export_network",
        ),
        (
            {"location": "w", "resource_group": "g", "storage_account_name": "abc"},
            "source_environment: storage_account",
        ),
        (
            {"location": "w", "resource_group": "g", "tags": {"coriolis-run": "x"}},
            "source_environment: tags: ",
        ),
        (
            {"location": "w", "resource_group": "g", "bandwidth_limit": "fast"},
            "source_environment: bandwidth_limit",
        ),
    ],
)
def test_a_wrong_environment_is_explained(environment: dict[str, Any], line: str) -> None:
    assert faults(settings.Environment, environment)[0].startswith(line)


def test_the_connections_default_resource_group_is_used() -> None:
    assert (
        settings.Environment.from_json({"location": "West Europe"}, "fallback").resource_group == "fallback"
    )


def test_durations_and_rates() -> None:
    assert [settings.duration(text) for text in ("90s", "15m", "2h", "0s", "1d")] == [90, 900, 7200, 0, 86400]
    assert [settings.rate(text) for text in ("50MiB/s", "1.5KB/s", "7B/s")] == [50 << 20, 1500, 7]
    for wrong in ("2", "h", "-1s", "2 h"):
        with pytest.raises(InvalidInput):
            settings.duration(wrong)
    with pytest.raises(InvalidInput):
        settings.rate("0B/s")


@pytest.mark.parametrize("kind", [settings.Connection, settings.Environment])
@pytest.mark.parametrize("raw", [[1], None, "x"])
def test_what_is_no_object_is_refused_in_one_line(kind: Any, raw: Any) -> None:
    found = faults(kind, raw)
    assert len(found) == 1
    assert "must be of type object" in found[0]


@pytest.mark.parametrize(
    ("kind", "key", "meant"),
    [
        (settings.Environment, "storage_acount_name", "storage_account_name"),
        (settings.Environment, "exclude-disks", "exclude_disks"),
        (settings.Environment, "ExportWorkerSize", "export_worker_size"),
        (settings.Connection, "allow_untrused", "allow_untrusted"),
        (settings.Connection, "subscriptionId", "subscription_id"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(kind: Any, key: str, meant: str) -> None:
    given = {"location": "w", "resource_group": "g"} if kind is settings.Environment else CONNECTION
    (fault,) = faults(kind, {**given, key: "x"})
    assert fault.endswith(f": {key} is not a known property; did you mean {meant}?")


def test_a_setting_that_is_near_to_none_is_told_which_there_are() -> None:
    nested = {
        **CONNECTION,
        "service_principal_credentials": {"client_id": "x", "client_secret": "y", "quux": 1},
    }
    (fault,) = faults(settings.Connection, nested)
    assert "quux is not a known property; known are client_certificate_password, " in fault


@pytest.mark.parametrize(
    ("rate", "meant"),
    [("10", "10MiB/s"), ("10M", "10MiB/s"), ("1.5 GB", "1.5GiB/s"), ("10Mbps", "50MiB/s"), ("0", "50MiB/s")],
)
def test_a_rate_without_a_unit_says_what_may_be_meant(rate: str, meant: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        settings.rate(rate)
    assert caught.value.remedy == f"Write a rate with its unit, in bytes per second: {meant}."
    assert settings.rate(meant) > 0
    (fault,) = faults(settings.Environment, {"location": "w", "resource_group": "g", "bandwidth_limit": rate})
    assert fault == "source_environment: bandwidth_limit: must be written like 50MiB/s"


PLACE = {"location": "w", "resource_group": "g"}


@pytest.mark.parametrize(
    ("addresses", "fault"),
    [
        (["192.0.2.1", "2001:db8::1"], "2001:db8::1 is an IPv6 range, but the worker has an IPv4 address"),
        (["::/0"], "::/0 is an IPv6 range"),
        (["192.0.2.1", "VirtualNetwork"], "VirtualNetwork is a service tag: give it alone"),
        (["*", "192.0.2.1"], r"\* is a service tag"),
        (["192.168.0.0/34"], "192.168.0.0/34 is neither an IPv4 address nor a range such as 192.0.2.0/24"),
        (["20.20.20.20/16"], "an address within a range: write the range as 20.20.0.0/16"),
        (["office.example.com"], "office.example.com is neither an IPv4 address"),
        (["backup-host"], "backup-host is neither an IPv4 address"),
        (["Any"], "Any is neither an IPv4 address"),
        ([" 192.0.2.1"], "is neither an IPv4 address"),
        (["192.0.2.1-192.0.2.9"], "is neither an IPv4 address"),
        (["10.0.0.0/8", "192.0.2.1", "10.1.0.0/16"], "10.1.0.0/16 is part of 10.0.0.0/8: leave it out"),
        (["192.0.2.1", "192.0.2.1"], "192.0.2.1/32 is part of 192.0.2.1/32"),
    ],
)
def test_sources_that_a_security_rule_cannot_have_are_refused(addresses: list[str], fault: str) -> None:
    with pytest.raises(InvalidInput, match=f"export_worker_allowed_addresses: .*{fault}"):
        settings.Environment.from_json({**PLACE, "export_worker_allowed_addresses": addresses})


@pytest.mark.parametrize(
    "addresses",
    [
        *(["*"], ["Internet"], ["virtualnetwork"], ["AzureCloud.WestEurope"], ["0.0.0.0/0"]),
        ["192.0.2.1", "198.51.100.0/24", "203.0.113.7/32"],
    ],
)
def test_sources_that_azure_takes_are_accepted(addresses: list[str]) -> None:
    made = settings.Environment.from_json({**PLACE, "export_worker_allowed_addresses": addresses})
    assert made.export_worker_allowed_addresses == tuple(addresses)
