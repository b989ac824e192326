"""Which cloud, as whom, with which API versions, over which connections."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from azure.identity import ClientSecretCredential, UsernamePasswordCredential

from coriolis_azure import errors
from coriolis_azure.azure import client, transport
from coriolis_azure.azure.patience import seconds_in
from coriolis_azure.cli import logs
from coriolis_azure.events import Event, Notice
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.settings import Connection
from coriolis_azure.source import Source
from harness.battles import served

TENANT = {"subscription_id": "s", "tenant": "11111111-1111-4111-8111-111111111111"}
PRINCIPAL = {"service_principal_credentials": {"client_id": "id", "client_secret": "secret"}}
USER = {"user_credentials": {"username": "me@example.org", "password": "secret"}}


# Microsoft advises against it, as no second factor can be asked for; the orchestrator's form offers it.
@pytest.mark.filterwarnings("ignore:UsernamePasswordCredential:DeprecationWarning")
@pytest.mark.parametrize(
    ("credentials", "kind"),
    [
        (PRINCIPAL, ClientSecretCredential),
        (USER, UsernamePasswordCredential),
        (PRINCIPAL | USER, UsernamePasswordCredential),
    ],
)
def test_user_credentials_win_where_both_are_given(azure: Sandbox, credentials: Any, kind: type) -> None:
    found = client.Azure(Connection.from_json({**TENANT, **credentials}), transport=azure.transport())
    assert type(found.credential) is kind


@pytest.mark.parametrize(
    ("profile", "authority", "manager"),
    [
        ("AzureCloud", "https://login.microsoftonline.com", "https://management.azure.com"),
        ("AzureChinaCloud", "https://login.chinacloudapi.cn", "https://management.chinacloudapi.cn"),
        ("AzureUSGovernment", "https://login.microsoftonline.us", "https://management.usgovcloudapi.net"),
    ],
)
def test_each_cloud_has_its_own_sign_in_and_its_own_manager(
    azure: Sandbox, profile: str, authority: str, manager: str
) -> None:
    asked: list[str] = []

    def refuse(request: Request, answer: Callable[[Request], Response]) -> Response:
        asked.append(request.base)
        if request.path.endswith("openid-configuration"):
            names = ("issuer", "authorization_endpoint", "token_endpoint")
            return Response.of(200, {name: f"{request.base}/{TENANT['tenant']}/{name}" for name in names})
        if request.path.endswith("/token_endpoint"):
            return Response.of(200, {"token_type": "Bearer", "expires_in": 3600, "access_token": "t"})
        return Response.of(403, {"error": {"code": "AuthorizationFailed", "message": "No."}})

    azure.intercept = refuse
    settings = Connection.from_json({**TENANT, **PRINCIPAL, "cloud_profile": profile})
    found = client.Azure(settings, transport=azure.transport())
    with pytest.raises(errors.Denied, match="AuthorizationFailed"):
        found.validate()
    assert authority in asked
    assert asked[-1] == manager


@pytest.mark.slow
def test_an_azure_stack_hub_is_spoken_to_in_its_own_versions(
    tmp_path: Path, image: Callable[..., Path]
) -> None:
    """A whole check and run. The sandbox refuses every newer version and every property that came with one."""
    os_disk = image("os")
    with Sandbox(tmp_path / "azure", api_profile="2020-09-01-hybrid") as azure:
        azure.add_vm("web", os_disk)
        before, environment = azure.resources(), {**azure.environment(), **STACK}
        with Source(azure.connection_info(), environment, transport=azure.transport()) as source:
            assert source.check("web").ok
            assert not [f.text for f in source.check("web").findings if "API version" in f.text]
            assert source.replicate("web", tmp_path / "images", shutdown=True).left_behind == ()
        assert (tmp_path / "images/os.raw").read_bytes() == os_disk.read_bytes()
        assert azure.resources() == before


STACK = {"export_network": "sandbox-vnet/default", "export_worker_use_fip": False}


@pytest.mark.slow
def test_versions_that_a_cloud_refuses_give_way_to_those_that_it_offers(
    tmp_path: Path, image: Callable[..., Path]
) -> None:
    """Nobody has told that this Azure is years behind: it is asked what it offers, once for each provider."""
    os_disk, refused, questions = image("os"), [], []
    with Sandbox(tmp_path / "azure", api_profile="2020-09-01-hybrid") as azure:
        azure.add_vm("web", os_disk)
        before = azure.resources()
        connection = azure.connection_info()
        del connection["custom_cloud_properties"]["api_profile"]

        def look(request: Request, answer: Callable[[Request], Response]) -> Response:
            response = answer(request)
            if b"NoRegisteredProviderFound" in response.body:
                refused.append(request.path.split("/providers/")[-1])
            if re.fullmatch(r"/subscriptions/[^/]+/providers/[^/]+", request.path):
                questions.append((request.path.rpartition("/")[2], request.query["api-version"]))
            return response

        azure.intercept = look
        with Source(connection, {**azure.environment(), **STACK}, transport=azure.transport()) as source:
            assert source.replicate("web", tmp_path / "images", shutdown=True).left_behind == ()
            assert not source.azure.is_modern
            assert source.check("web").ok
        assert (tmp_path / "images/os.raw").read_bytes() == os_disk.read_bytes()
        assert azure.resources() == before
    assert 2 <= len(refused) <= 4
    assert {("Microsoft.Compute", "2019-10-01"), ("Microsoft.Network", "2019-10-01")} <= set(questions)


def test_a_cloud_that_does_not_tell_its_versions_gives_its_own_refusal(
    tmp_path: Path, image: Callable[..., Path]
) -> None:
    with Sandbox(tmp_path / "azure", api_profile="2020-09-01-hybrid") as azure:
        azure.add_vm("web", image("os"))
        connection = azure.connection_info()
        del connection["custom_cloud_properties"]["api_profile"]

        def question(request: Request, answer: Callable[[Request], Response]) -> Response:
            if re.fullmatch(r"/subscriptions/[^/]+/providers/[^/]+", request.path):
                return Response.of(403, {"error": {"code": "AuthorizationFailed", "message": "No."}})
            return answer(request)

        azure.intercept = question
        with (
            Source(connection, azure.environment(), transport=azure.transport()) as source,
            pytest.raises(errors.AzureError, match="NoRegisteredProviderFound") as caught,
        ):
            source.inspect("web")
        assert "api_profile" in caught.value.remedy


def test_single_versions_can_be_set_over_those_of_a_profile(
    azure: Sandbox, connect: Callable[..., Source]
) -> None:
    versions: set[str] = set()

    def look(request: Request, answer: Callable[[Request], Response]) -> Response:
        if "/networkInterfaces" in request.path:
            versions.add(request.query["api-version"])
        return answer(request)

    custom = azure.connection_info()["custom_cloud_properties"]
    profile = {"api_profile": "2020-09-01-hybrid", "api_versions": {"Microsoft.Network": "2018-11-02"}}
    source = connect(connection={"custom_cloud_properties": {**custom, **profile}})
    azure.intercept = look
    source.azure.resources("nic", "sandbox")
    assert versions == {"2018-11-02"}


@pytest.mark.slow
@pytest.mark.parametrize("trusts", ["the system's authorities", "another cloud's authority"])
def test_a_cloud_that_nobody_vouches_for_hears_nothing(azure: Sandbox, tmp_path: Path, trusts: str) -> None:
    """Neither a secret nor a question: the certificate is refused before."""
    with served(azure) as info:
        del info["ca_bundle"]
        if trusts == "another cloud's authority":
            with Sandbox(tmp_path / "other") as other:
                info["ca_bundle"] = other.connection_info()["ca_bundle"]
        found = client.Azure(Connection.from_json(info))
        with pytest.raises(errors.CloudUnreachable, match="CERTIFICATE_VERIFY_FAILED") as caught:
            found.validate()
        found.close()
    assert "CA bundle" in caught.value.remedy
    assert list(azure.requests) == []


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAA==\n", bytes(100)])
def test_a_bundle_without_certificates_is_named(azure: Sandbox, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bundle.pem").write_bytes(content)
    info = {**azure.connection_info(), "ca_bundle": str(tmp_path / "bundle.pem")}
    with pytest.raises(errors.InvalidInput, match=r"bundle\.pem holds no readable certificate"):
        client.Azure(Connection.from_json(info))


def test_certificates_are_read_once_for_all_connections(azure: Sandbox, tmp_path: Path) -> None:
    trusted = tmp_path / "trusted.pem"
    with served(azure) as info, requests.Session() as session:
        shutil.copy(info["ca_bundle"], trusted)
        adapter = transport._Adapter()
        session.mount("https://", adapter)
        url = info["custom_cloud_properties"]["endpoints"]["resource_manager_endpoint"]
        for _ in range(2):
            assert session.get(f"{url}/metadata/endpoints", verify=str(trusted)).status_code
            trusted.unlink(missing_ok=True)
            adapter.poolmanager.clear()


def test_a_bundle_of_the_environment_that_is_not_there_is_named(tmp_path: Path) -> None:
    with requests.Session() as session:
        session.mount("https://", transport._Adapter())
        with pytest.raises(errors.InvalidInput, match=r"REQUESTS_CA_BUNDLE.*gone\.pem holds no readable"):
            session.get("https://localhost:1", verify=str(tmp_path / "gone.pem"))


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
@pytest.mark.parametrize("also_a_bundle", [False, True])
def test_allow_untrusted_and_nothing_else_takes_any_cloud_and_says_so(
    azure: Sandbox, told: list[Event], also_a_bundle: bool
) -> None:
    with served(azure) as info:
        info["allow_untrusted"] = True
        if not also_a_bundle:
            del info["ca_bundle"]
        with Source(info, azure.environment(), report=told.append) as source:
            assert source.list_vms() == []
    assert any("allow_untrusted" in event.text for event in told if isinstance(event, Notice))


def test_the_hosts_that_a_proxy_is_not_for() -> None:
    proxy = transport.Proxy("http://user:secret@proxy:3128", ("10.0.0.5", "example.org"))
    assert proxy.serves("management.azure.com")
    assert proxy.serves("notexample.org")
    assert not proxy.serves("10.0.0.5")
    assert not proxy.serves("stack.example.org")
    assert "secret" not in repr(proxy)


@pytest.mark.parametrize("form", [list, dict])
def test_a_custom_cloud_is_asked_how_to_sign_in(azure: Sandbox, form: type) -> None:
    """Clouds answer with a list of clouds or, as an Azure Stack Hub, with a document."""
    info = azure.connection_info()
    endpoints = info["custom_cloud_properties"]["endpoints"]
    for name in ("active_directory_url", "active_directory_resource_id"):
        del endpoints[name]

    def answered(request: Request, answer: Callable[[Request], Response]) -> Response:
        response = answer(request)
        if request.path != "/metadata/endpoints":
            return response
        (own,) = json.loads(response.body)
        other = {**own, "resourceManager": "https://elsewhere", "authentication": {"loginEndpoint": "x"}}
        return Response.of(200, own if form is dict else [other, own])

    azure.intercept = answered
    with Source(info, azure.environment(), transport=azure.transport()) as source:
        assert source.list_vms() == []


def test_metadata_without_a_form_are_no_bug(azure: Sandbox) -> None:
    info = azure.connection_info()
    del info["custom_cloud_properties"]["endpoints"]["active_directory_url"]
    azure.intercept = lambda request, answer: Response.of(200, [{"authentication": []}])
    with pytest.raises(errors.Unreadable):
        Source(info, azure.environment(), transport=azure.transport())


@pytest.mark.parametrize("link", ["https://[::1", "https://evil.example:x/"])
def test_a_link_to_the_next_page_that_is_no_address_is_an_error_of_ours(
    azure: Sandbox, source: Source, link: str
) -> None:
    source.azure.groups()  # sign in
    azure.intercept = lambda request, answer: Response.of(200, {"value": [], "nextLink": link})
    with pytest.raises(errors.AzureError):
        source.list_vms()


DEEP = b'{"error":' * 100_000
PAGE = b"<html><body>Blocked by the proxy</body></html>"


@pytest.mark.parametrize(
    ("status", "kind", "body", "said"),
    [
        (200, "application/json", DEEP, "cannot understand Azure's answer"),
        (200, "application/json", b"[" * 100_000 + b"]" * 100_000, "cannot understand Azure's answer"),
        (403, "application/json", DEEP, "cannot understand Azure's answer"),
        (403, "text/plain", DEEP, "Operation returned an invalid status"),
        (200, "text/html", PAGE, "cannot understand Azure's answer"),
        (403, "text/html; charset=utf-8", PAGE, "the answer is a web page and not Azure's"),
    ],
)
def test_what_a_proxy_answers_in_azures_place_is_an_error_that_is_shown_once(
    azure: Sandbox,
    source: Source,
    capsys: pytest.CaptureFixture[str],
    status: int,
    kind: str,
    body: bytes,
    said: str,
) -> None:
    source.azure.groups()  # sign in
    logs.start(0, as_json=False)
    azure.intercept = lambda request, answer: Response(status, {"Content-Type": kind}, body)
    with pytest.raises(errors.AzureError, match=said) as error:
        source.list_vms()
    azure.intercept = None
    assert "proxy" in error.value.remedy or kind == "text/plain"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e999", "soon"])
def test_a_retry_after_that_is_no_number_is_none(seconds: str) -> None:
    assert seconds_in(seconds) is None
