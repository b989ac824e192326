"""Builds the credential for Azure from the connection settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from azure.core import PipelineClient
from azure.core.credentials import TokenCredential
from azure.core.rest import HttpRequest
from azure.identity import (
    CertificateCredential,
    ClientSecretCredential,
    DefaultAzureCredential,
    UsernamePasswordCredential,
)

from ..model import Json
from ..settings import Connection
from .documents import understood
from .profiles import CLOUDS, Profile
from .transport import Transport

# The public client id of the Azure CLI: user credentials need a client.
_PUBLIC_CLIENT = "04b07795-8ddb-461a-bbee-02f9e1bf7b46"

# What is read of a cloud's metadata.
_METADATA = {"resourceManager": str, "authentication": {"loginEndpoint": str, "audiences": [str]}}

Credential = TokenCredential  # what a caller may bring instead


def profile_for(connection: Connection, transport: Transport) -> Profile:
    """The cloud of the settings. For a custom cloud, missing values are read from its resource manager."""
    if connection.cloud_profile != "CustomCloud":
        return CLOUDS[connection.cloud_profile]
    manager = connection.resource_manager.rstrip("/")
    authority = connection.endpoints.get("active_directory_url", "")
    audience = connection.endpoints.get("active_directory_resource_id", "")
    if not (authority and audience):
        client: PipelineClient[Any, Any] = PipelineClient(manager, transport=transport)
        answer = client.send_request(
            HttpRequest("GET", f"{manager}/metadata/endpoints?api-version=2019-05-01")
        )
        answer.raise_for_status()
        authentication = _authentication(answer.json(), manager)
        authority = authority or authentication.get("loginEndpoint", "")
        audience = audience or next(iter(authentication.get("audiences", [])), manager)
    # Its services share a domain, as in management.local.example and account.blob.local.example. An IP has none.
    host = urlsplit(manager).hostname or ""
    is_name = host.count(".") >= 2 and not host.replace(".", "").isdigit()
    domain = host.partition(".")[2] if is_name else ""
    suffix = connection.endpoints.get("storage_endpoint", "").rpartition("//")[2].strip("./")
    return Profile(authority.rstrip("/"), manager, audience, (domain, suffix))


def _authentication(metadata: Any, manager: str) -> Json:
    """How to sign in to the cloud of `manager`: its metadata are a document, or a list with one for each cloud."""
    clouds = understood(metadata if isinstance(metadata, list) else [metadata], [_METADATA])
    own = [cloud for cloud in clouds if cloud.get("resourceManager", "").rstrip("/") == manager]
    found: Json = [*own, *clouds, {}][0]
    authentication: Json = found.get("authentication", {})
    return authentication


def credential_for(
    connection: Connection, authority: str, transport: Transport, retries: Callable[..., Any]
) -> TokenCredential:
    """The azure-identity credential for the kind of secret that the settings hold."""
    options: dict[str, Any] = {
        "authority": authority,
        "transport": transport,
        "retry_policy_class": retries,
        "auto_request_id": False,  # as in `client`
    }
    if connection.cloud_profile == "CustomCloud":
        # The public cloud's directory of authorities does not know custom clouds.
        options["disable_instance_discovery"] = True
    if connection.username:
        return UsernamePasswordCredential(
            _PUBLIC_CLIENT, connection.username, connection.password, tenant_id=connection.tenant, **options
        )
    if connection.client_secret:
        return ClientSecretCredential(
            connection.tenant, connection.client_id, connection.client_secret, **options
        )
    if connection.client_id:
        password = connection.certificate_password or None
        return CertificateCredential(
            connection.tenant, connection.client_id, connection.certificate_path, password=password, **options
        )
    return DefaultAzureCredential(**options)
