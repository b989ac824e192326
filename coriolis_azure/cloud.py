"""The door to Azure: profiles, credentials, SDK clients, waiting for operations, and what Azure's errors mean.

Documents go in and out as the JSON that ARM speaks, so what is read here can be compared with Azure's own
documentation. Retries and polling are azure-core's; nothing here repeats them. Azure's errors are translated
here and nowhere else, by code (the table in `codes`) and status, never by message text.
"""

from __future__ import annotations

import json
import logging
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import requests
from azure.core import PipelineClient
from azure.core.credentials import TokenCredential
from azure.core.exceptions import (
    AzureError as SdkError,
)
from azure.core.exceptions import (
    ClientAuthenticationError,
    DecodeError,
    DeserializationError,
    HttpResponseError,
    ServiceRequestError,
    ServiceResponseError,
)
from azure.core.pipeline.transport import HttpTransport, RequestsTransport
from azure.core.polling import LROPoller
from azure.core.rest import HttpRequest
from azure.identity import (
    CertificateCredential,
    ClientSecretCredential,
    DefaultAzureCredential,
    UsernamePasswordCredential,
)
from azure.mgmt.compute import ComputeManagementClient
from azure.mgmt.network import NetworkManagementClient
from azure.mgmt.resource.resources import ResourceManagementClient
from requests.adapters import HTTPAdapter

from . import __version__, codes, documents, errors, names, tls
from .api_versions import ApiVersions
from .clock import Clock
from .events import Report, Wait, Waiting, silent
from .model import Json, must
from .settings import Connection, Image

LOG = logging.getLogger(__name__)

Transport = HttpTransport[Any, Any]

# Of what the given SDKs have no operation for.
_SUBSCRIPTIONS_VERSION = "2022-12-01"
_PERMISSIONS_VERSION = "2022-04-01"
_LOCKS_VERSION = "2020-05-01"
_POLICY_VERSION = "2024-10-01"
_STORAGE_VERSION = "2023-05-01"
# By which a cloud is asked for the versions that it offers: old enough for all.
_PROVIDERS_VERSION = "2019-10-01"
# The forms of their answers, as far as they are read.
_SUBSCRIPTION = {"state": str}
_PERMISSION = {"actions": [str], "notActions": [str]}
_LOCK = {"id": str, "name": str, "properties": {"level": str}}
_ACCOUNT = {"id": str, "name": str, "location": str, "properties": {"primaryEndpoints": {"blob": str}}}
_CONTAINER = {"name": str}
_PROVIDER_TYPES = {"resourceTypes": [{"resourceType": str, "apiVersions": [str]}]}
_KEYS = {"keys": [{"value": str}]}
_RESTRICTIONS = {
    "fieldRestrictions": [{"field": str, "restrictions": [{"result": str}]}],
    "contentEvaluationResult": {
        "policyEvaluations": [
            {
                "evaluationResult": str,
                "effectDetails": {"policyEffect": str},
                "policyInfo": {"policyAssignmentId": str},
            }
        ]
    },
}
_API_VERSION = re.compile(
    r"/resourceGroups/.*/providers/(?P<type>[\w.]+/\w+)(?=[/?]).*[?&]api-version=(?P<version>[\w-]+)",
    re.IGNORECASE,
)

# What the SDKs raise where no answer came at all; a sign-in that met one of these raises another error about it.
_NO_ANSWER = (ServiceRequestError, ServiceResponseError, requests.RequestException)
# Connections that are kept open to one host: blobs are written by many threads.
_CONNECTIONS = 64
# Seconds between two looks at an operation for which Azure sets no pace. A VM's operations may be asked for
# 15 times a minute before Azure throttles.
POLLING_SECONDS = 5
# How often a request that was throttled, or that a gateway failed, is repeated: azure-core's own three are over in six
# seconds, which an operation that runs on meanwhile should survive. Retry-After is obeyed.
_RETRIES = 6
# The longest that one operation may take. Azure itself gives up on a VM that does not start after about 25 minutes.
OPERATION_SECONDS = 45 * 60.0
_LONG_SECONDS = 10.0  # an operation that takes longer is told of

# Microsoft's own public client, the one that the Azure CLI signs in as; user credentials need a client.
_PUBLIC_CLIENT = "04b07795-8ddb-461a-bbee-02f9e1bf7b46"

_CLOUDS = {
    "AzureCloud": (
        "https://login.microsoftonline.com",
        "https://management.azure.com",
        "https://management.azure.com",
    ),
    "AzureChinaCloud": (
        "https://login.chinacloudapi.cn",
        "https://management.chinacloudapi.cn",
        "https://management.core.chinacloudapi.cn/",
    ),
    "AzureUSGovernment": (
        "https://login.microsoftonline.us",
        "https://management.usgovcloudapi.net",
        "https://management.core.usgovcloudapi.net/",
    ),
}

# The API versions of Azure's profiles, by provider or type: what an Azure Stack Hub of that profile answers to.
_PROFILES: dict[str, dict[str, str]] = {
    "latest": {},
    "2020-09-01-hybrid": {
        "microsoft.compute": "2020-06-01",
        "microsoft.compute/disks": "2019-07-01",
        "microsoft.compute/snapshots": "2019-07-01",
        "microsoft.compute/skus": "2019-04-01",
        "microsoft.network": "2018-11-01",
        "microsoft.resources": "2019-10-01",
        "microsoft.storage": "2019-06-01",
    },
}
# That of its Blob storage, which is said in a header.
_BLOB_VERSIONS = {"2020-09-01-hybrid": "2019-07-07"}
# Since this version a VM takes its disks with it when it is deleted, and disks say who may reach them.
_MODERN_SINCE = "2021-12-01"

_BY_STATUS: dict[int, type[errors.AzureError]] = {
    200: errors.OperationFailed,
    401: errors.Denied,
    403: errors.Denied,
    404: errors.NotFound,
    409: errors.Conflict,
    412: errors.Conflict,
    429: errors.Throttled,
}


class Azure:
    """One subscription of one Azure, seen as the identity of the connection settings.

    `transport` replaces the HTTPS connections of all SDK clients. `report` is told what is waited for. `is_modern` is
    false for an Azure Stack Hub, which refuses what newer versions know. Every verb raises an `errors.AzureError`.
    """

    def __init__(
        self, connection: Connection, *, transport: Transport | None = None, report: Report = silent
    ) -> None:
        self.subscription = connection.subscription_id
        self.report = report
        self.transport = _Shared(transport or https(connection), report)
        with translated("sign in to", connection.cloud_profile):
            authority, manager, audience = _profile(connection, self.transport)
            self.credential = _credential(connection, authority, self.transport)
        options: dict[str, Any] = {
            "base_url": manager,
            "credential_scopes": [f"{audience.rstrip('/')}/.default"],
            "transport": self.transport,
            "polling_interval": POLLING_SECONDS,
            "retry_status": _RETRIES,
            "user_agent": f"coriolis-azure/{__version__}",
        }
        self._versions = ApiVersions(
            {**_PROFILES[connection.api_profile], **connection.api_versions}, self.offered_versions
        )
        options["per_call_policies"] = [self._versions]
        self._compute = ComputeManagementClient(self.credential, self.subscription, **options)
        self._network = NetworkManagementClient(self.credential, self.subscription, **options)
        self._resources = ResourceManagementClient(self.credential, self.subscription, **options)
        self._kinds: dict[str, Any] = {
            "vm": self._compute.virtual_machines,
            "disk": self._compute.disks,
            "snapshot": self._compute.snapshots,
            "nic": self._network.network_interfaces,
            "ip": self._network.public_ip_addresses,
            "nsg": self._network.network_security_groups,
            "vnet": self._network.virtual_networks,
        }
        self._skus: dict[str, list[Json]] = {}
        self.api_versions = self.transport.api_versions
        self.blob_version = _BLOB_VERSIONS.get(connection.api_profile, "")

    @property
    def is_modern(self) -> bool:
        """Whether this Azure knows what came with newer API versions, as far as it has told by now."""
        return self._versions.newest("microsoft.compute/virtualmachines", _MODERN_SINCE) >= _MODERN_SINCE

    def close(self) -> None:
        """Close the connections."""
        self.transport.really_close()

    def validate(self) -> None:
        """Ask one harmless question, to learn whether endpoint, identity and subscription are right."""
        with translated("read the subscription", self.subscription):
            _documents(islice(self._resources.resource_groups.list(top=1), 1))

    def group(self, name: str) -> Json:
        """The resource group `name`."""
        with translated("read the resource group", name):
            return _document(self._resources.resource_groups.get(name))

    def groups(self) -> list[Json]:
        """All resource groups that the identity may see."""
        with translated("list the resource groups of", self.subscription):
            return _named(_documents(self._resources.resource_groups.list()))

    def get(self, id: str, **options: str) -> Json:
        """The resource `id` of one of `names.TYPES`; `expand="instanceView"` adds a VM's state."""
        with translated("read", id):
            operations = self._kinds[names.kind_of(id)]
            return _of(id, _document(operations.get(names.group_of(id), names.name_of(id), **options)))

    def find(self, id: str) -> Json | None:
        """The resource `id`, or None where there is none."""
        try:
            return self.get(id)
        except errors.NotFound:
            return None

    def resources(self, kind: str, group: str) -> list[Json]:
        """All resources of one kind in a resource group."""
        operations = self._kinds[kind]
        listed = operations.list_by_resource_group if kind in {"disk", "snapshot"} else operations.list
        with translated(f"list {names.TYPES[kind]} in", group):
            return _resources(listed(group))

    def everywhere(self, kind: str) -> list[Json]:
        """All resources of one kind in the subscription."""
        operations = self._kinds[kind]
        listed = operations.list if kind in {"disk", "snapshot"} else operations.list_all
        with translated(f"list {names.TYPES[kind]} in", self.subscription):
            return _resources(listed())

    def of_type(self, type_: str, group: str) -> list[Json]:
        """The resources of any type in a resource group, as the generic listing tells them: id, name, location."""
        with translated(f"list {type_} in", group):
            listed = self._resources.resources.list_by_resource_group(
                group, filter=f"resourceType eq '{type_}'"
            )
            return _named(_documents(listed))

    def locations(self) -> list[str]:
        """The locations in which this subscription may have VMs."""
        with translated("read the provider", "Microsoft.Compute"):
            provider = _document(self._resources.providers.get("Microsoft.Compute"))
        types = {entry.get("resourceType", "").lower(): entry for entry in provider.get("resourceTypes", [])}
        return sorted(
            names.location(place) for place in types.get("virtualmachines", {}).get("locations", [])
        )

    def offered_versions(self, namespace: str) -> dict[str, list[str]]:
        """The API versions that a resource provider offers, by lower-cased type (`microsoft.compute/disks`)."""
        path = f"/subscriptions/{self.subscription}/providers/{namespace}"
        provider = self._read("the provider", path, _PROVIDERS_VERSION, _PROVIDER_TYPES)
        return {
            f"{namespace}/{entry['resourceType']}".lower(): entry.get("apiVersions", [])
            for entry in provider.get("resourceTypes", [])
            if "resourceType" in entry
        }

    def subscription_state(self) -> str:
        """Enabled, Warned, PastDue, Disabled, ...; in some of them nothing can be made."""
        path = f"/subscriptions/{self.subscription}"
        told = self._read("the subscription", path, _SUBSCRIPTIONS_VERSION, _SUBSCRIPTION)
        return str(told.get("state", "unknown"))

    def permissions(self, scope: str) -> list[Json]:
        """What the identity may do at `scope`, an ARM id: actions and notActions of each of its roles."""
        path = f"{scope}/providers/Microsoft.Authorization/permissions"
        return self._listed("the permissions at", path, _PERMISSIONS_VERSION, _PERMISSION)

    def policy_restrictions(self, group: str, content: Mapping[str, Any], version: str) -> Json:
        """What Azure Policy would say to `content`, a resource that may be partial, were it made in `group`.

        `fieldRestrictions`: fields that it must have; `contentEvaluationResult`: policies that it does not comply with.
        """
        path = f"/subscriptions/{self.subscription}/resourceGroups/{group}"
        asked = {"resourceDetails": {"resourceContent": dict(content), "apiVersion": version}}
        request = HttpRequest(
            "POST",
            f"{path}/providers/Microsoft.PolicyInsights/checkPolicyRestrictions?api-version={_POLICY_VERSION}",
            json=asked,
        )
        return self._asked("ask Azure Policy about", path, request, _RESTRICTIONS)

    def locks(self, scope: str) -> list[Json]:
        """The locks at `scope`, an ARM id, and below."""
        path = f"{scope}/providers/Microsoft.Authorization/locks"
        listed = self._listed("the locks of", path, _LOCKS_VERSION, _LOCK)
        return [lock for lock in listed if "id" in lock]

    def compute_usages(self, location: str) -> list[Json]:
        """Cores and VMs in use in `location`, and the quota: name, currentValue, limit."""
        with translated("read the compute quota of", location):
            return _documents(self._compute.usage.list(location))

    def network_usages(self, location: str) -> list[Json]:
        """Addresses, NICs, networks in use in `location`, and the quota: name, currentValue, limit."""
        with translated("read the network quota of", location):
            return _documents(self._network.usages.list(location))

    def encryption_set(self, id: str) -> Json:
        """A disk encryption set."""
        sets = self._compute.disk_encryption_sets
        with translated("read", id):
            return _document(sets.get(names.group_of(id), names.name_of(id)))

    def storage_accounts(self) -> list[Json]:
        """All storage accounts of the subscription, with their `primaryEndpoints`."""
        path = f"/subscriptions/{self.subscription}/providers/Microsoft.Storage/storageAccounts"
        listed = self._listed("the storage accounts of", path, _STORAGE_VERSION, _ACCOUNT)
        return [account for account in listed if "id" in account]

    def storage_account(self, id: str) -> Json:
        """The storage account `id`, with its `primaryEndpoints`."""
        return {**self._read("the storage account", id, _STORAGE_VERSION, _ACCOUNT), "id": id}

    def containers(self, id: str) -> list[Json]:
        """The blob containers of the storage account `id`."""
        path = f"{id}/blobServices/default/containers"
        listed = self._listed("the containers of", path, _STORAGE_VERSION, _CONTAINER)
        return [container for container in listed if "name" in container]

    def storage_key(self, id: str) -> str:
        """A key of a storage account: a secret that opens all of it."""
        with translated("read the keys of", id):
            url = f"{id}/listKeys?api-version={_STORAGE_VERSION}"
            response = self._resources.send_request(HttpRequest("POST", url))
            response.raise_for_status()
            keys = documents.fitting(response.json(), _KEYS).get("keys", [])
            found = next((key["value"] for key in keys if "value" in key), "")
            if not found:
                raise errors.Unreadable("the answer holds no key")
            return str(found)

    def _read(self, what: str, path: str, version: str, form: Json) -> Json:
        """A document for which the given SDKs have no operation; `path` may be a next page's URL."""
        url = path if path.startswith("https:") else f"{path}?api-version={version}"
        scope = path.partition("/providers/Microsoft.Authorization")[0]
        return self._asked(f"read {what}", scope, HttpRequest("GET", url), form)

    def _asked(self, verb: str, resource: str, request: HttpRequest, form: Json) -> Json:
        with translated(verb, resource):
            response = self._resources.send_request(request)
            response.raise_for_status()
            document: Json = documents.fitting(response.json(), form)
            return document

    def _listed(self, what: str, path: str, version: str, form: Json) -> list[Json]:
        """All pages of a listing for which the given SDKs have no operation."""
        found: list[Json] = []
        while path:
            page = self._read(what, path, version, {"value": [form], "nextLink": str})
            found += page.get("value", [])
            path = page.get("nextLink", "")
        return found

    def put(self, id: str, body: Mapping[str, Any], etag: str = "") -> Json:
        """Create or change `id`; the resource as it is once Azure has settled.

        With an `etag`, only if that is still the resource's; a Conflict with the status 412 otherwise.
        """
        operations = self._kinds[names.kind_of(id)]
        options = {"headers": {"If-Match": etag}} if etag else {}
        made = self._settled(
            "create",
            id,
            lambda: operations.begin_create_or_update(names.group_of(id), names.name_of(id), body, **options),
        )
        return _of(id, made)

    def patch_vm(self, id: str, body: Mapping[str, Any], etag: str = "") -> Json:
        """Change parts of a VM. A list in `body` replaces the whole list. `etag`: see `put`."""
        vms = self._kinds["vm"]
        options = {"headers": {"If-Match": etag}} if etag else {}
        return self._settled(
            "update", id, lambda: vms.begin_update(names.group_of(id), names.name_of(id), body, **options)
        )

    def tag(self, id: str, tags: Mapping[str, str]) -> None:
        """Replace the tags of a resource."""
        operations, body = self._kinds[names.kind_of(id)], {"tags": dict(tags)}
        group, name = names.group_of(id), names.name_of(id)
        if hasattr(operations, "update_tags"):
            with translated("tag", id):
                operations.update_tags(group, name, body)
        else:
            self._settled("tag", id, lambda: operations.begin_update(group, name, body))

    def delete(self, id: str) -> None:
        """Delete `id` and wait until it is gone; one that is gone already is no error. A VM is not shut down first."""
        operations, kind = self._kinds[names.kind_of(id)], names.kind_of(id)
        options = {"force_deletion": True} if kind == "vm" else {}
        try:
            self._settled(
                "delete",
                id,
                lambda: operations.begin_delete(names.group_of(id), names.name_of(id), **options),
            )
        except errors.NotFound:
            return

    def deallocate(self, id: str) -> None:
        """Shut a VM down and give back its host; wait until it is done."""
        vms = self._kinds["vm"]
        self._settled("deallocate", id, lambda: vms.begin_deallocate(names.group_of(id), names.name_of(id)))

    def power_off(self, id: str) -> None:
        """Cut a VM's power; it keeps its host and addresses. Wait until it is done."""
        vms, group, name = self._kinds["vm"], names.group_of(id), names.name_of(id)
        self._settled("power off", id, lambda: vms.begin_power_off(group, name, skip_shutdown=True))

    def start(self, id: str) -> None:
        """Start a VM that is deallocated or powered off; wait until it runs."""
        vms = self._kinds["vm"]
        self._settled("start", id, lambda: vms.begin_start(names.group_of(id), names.name_of(id)))

    def sizes(self, location: str) -> list[Json]:
        """The VM sizes that `location` knows, with capabilities and restrictions. Several MB: asked once."""
        if location not in self._skus:
            with translated("list the VM sizes of", location):
                skus = self._compute.resource_skus.list(filter=f"location eq '{location}'")
                self._skus[location] = [
                    sku for sku in _named(_documents(skus)) if sku.get("resourceType") == "virtualMachines"
                ]
        return self._skus[location]

    def retired_sizes(self, location: str) -> list[Json]:
        """Sizes by the older listing, which still names some that are no longer sold."""
        with translated("list the VM sizes of", location):
            return _documents(self._compute.virtual_machine_sizes.list(location))

    def image(self, location: str, image: Image) -> Json | None:
        """What the marketplace of `location` tells of `image` today; None where it has none. A plan: it has terms."""
        images, names_ = self._compute.virtual_machine_images, (image.publisher, image.offer, image.sku)
        try:
            with translated("look up the image", str(image)):
                version = image.version
                if version == "latest":
                    newest = _documents(images.list(location, *names_, top=1, orderby="name desc"))
                    version = next((found["name"] for found in newest if "name" in found), "")
                return _document(images.get(location, *names_, version)) if version else None
        except errors.NotFound:
            return None

    def _settled(self, verb: str, id: str, begin: Callable[[], LROPoller[Any]]) -> Json:
        with translated(verb, id):
            with _understood():
                poller = begin()
                self._wait(poller, f"Azure to {verb} {names.name_of(id)}")
            if not poller.done():
                raise errors.DeadlinePassed(
                    f"Azure did not finish to {verb} {id} within {OPERATION_SECONDS / 60:.0f} minutes",
                    resource=id,
                )
            return _document(poller.result())

    def _wait(self, poller: LROPoller[Any], what: str) -> None:
        clock = Clock()
        waiting, until = (
            Wait(self.report, clock, what, OPERATION_SECONDS),
            clock.monotonic() + OPERATION_SECONDS,
        )
        poller.wait(_LONG_SECONDS)
        while not poller.done() and clock.monotonic() < until:
            waiting.still()
            poller.wait(_LONG_SECONDS)


# Whether the last answer in this thread was "too many requests": what the SDK sleeps for then.
_throttled: ContextVar[bool] = ContextVar("throttled", default=False)


class _Shared(Transport):
    """One transport for all clients: closing a client leaves it open for the others. Tells of throttling."""

    def __init__(self, transport: Transport, report: Report) -> None:
        self._transport, self._report = transport, report
        # By lower-cased resource type, the API version with which it was asked for.
        self.api_versions: dict[str, str] = {}

    def send(self, request: Any, **options: Any) -> Any:
        asked = _API_VERSION.search(request.url)
        if asked:
            self.api_versions[asked["type"].lower()] = asked["version"]
        response = self._transport.send(request, **options)
        _throttled.set(response.status_code == HTTPStatus.TOO_MANY_REQUESTS)
        return response

    def sleep(self, duration: float) -> None:
        if _throttled.get():
            self._report(Waiting("Azure, which throttles our requests", duration))
        self._transport.sleep(duration)

    def open(self) -> None:
        self._transport.open()

    def close(self) -> None:
        """The clients' close: not ours to act upon."""

    def really_close(self) -> None:
        self._transport.close()

    def __enter__(self) -> _Shared:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy that stands between this host and Azure; its credentials, if any, are part of the URL."""

    url: str = field(repr=False)
    exceptions: tuple[str, ...] = ()

    def serves(self, host: str) -> bool:
        """Whether `host` is reached through it: it is none of the exceptions, nor within one."""
        return not any(host == name or host.endswith(f".{name}") for name in self.exceptions)


class _Trusting(HTTPAdapter):
    """HTTPS with certificates trusted besides the system's, through a proxy too."""

    def __init__(self, ca_bundle: str) -> None:
        self._context = ssl.create_default_context()
        self._context.sslsocket_class = tls.Socket
        try:
            self._context.load_verify_locations(ca_bundle)
        except OSError as error:  # as ssl.SSLError is
            raise errors.InvalidInput(
                f"connection_info: ca_bundle: {ca_bundle} holds no certificate that can be read: {error}",
                remedy="Give a file of certificates in PEM, which this user may read.",
            ) from error
        super().__init__(pool_maxsize=_CONNECTIONS)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options, ssl_context=self._context)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, **options, ssl_context=self._context)


class _Proxied(requests.Session):
    """A session that goes through `proxy`, whatever proxy the environment names."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__()
        self._proxy = proxy

    def merge_environment_settings(self, url: Any, *rest: Any, **options: Any) -> Any:
        merged: Any = super().merge_environment_settings(url, *rest, **options)
        through = self._proxy.serves(urlsplit(url).hostname or "")
        # Without an entry for the scheme there is no proxy, not even the environment's.
        return {**merged, "proxies": {"https": self._proxy.url, "http": self._proxy.url} if through else {}}


def https(connection: Connection, proxy: Proxy | None = None) -> Transport:
    """The HTTPS connections that the settings ask for, through `proxy` where one is given.

    Without one, the environment's (`HTTPS_PROXY`, `NO_PROXY`) is used, except for what is on this machine.
    """
    session = requests.Session()
    if proxy:
        session = _Proxied(proxy)
    elif urlsplit(connection.resource_manager).hostname in {"127.0.0.1", "localhost", "::1"}:
        session.trust_env = False
    verifies = not connection.allow_untrusted
    trusting = _Trusting(connection.ca_bundle) if connection.ca_bundle and verifies else None
    session.mount("https://", trusting or HTTPAdapter(pool_maxsize=_CONNECTIONS))
    transport: Transport = RequestsTransport(session=session, connection_verify=verifies)
    return transport


def _profile(connection: Connection, transport: Transport) -> tuple[str, str, str]:
    """Authority, resource manager and token audience."""
    if connection.cloud_profile != "CustomCloud":
        return _CLOUDS[connection.cloud_profile]
    manager = connection.resource_manager.rstrip("/")
    authority = connection.endpoints.get("active_directory_url", "")
    audience = connection.endpoints.get("active_directory_resource_id", "")
    if not (authority and audience):
        client: PipelineClient[Any, Any] = PipelineClient(manager, transport=transport)
        answer = client.send_request(
            HttpRequest("GET", f"{manager}/metadata/endpoints?api-version=2019-05-01")
        )
        answer.raise_for_status()
        told = answer.json().get("authentication", {})
        authority = authority or told.get("loginEndpoint", "")
        audience = audience or next(iter(told.get("audiences", [])), manager)
    return authority.rstrip("/"), manager, audience


def _credential(connection: Connection, authority: str, transport: Transport) -> TokenCredential:
    options: dict[str, Any] = {"authority": authority, "transport": transport}
    if connection.cloud_profile == "CustomCloud":
        # A custom cloud is unknown to the public cloud's directory of authorities.
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


def _document(model: Any) -> Json:
    """A model as ARM's own JSON, checked; {} for operations without a result."""
    if model is None:
        return {}
    if not hasattr(model, "as_dict"):
        raise errors.Unreadable("the answer is no document")
    return documents.understood(model.as_dict(), type(model))


def _documents(listed: Iterable[Any]) -> list[Json]:
    """All documents of a listing, checked."""
    with _understood():
        models = list(listed)
    return [_document(model) for model in models]


def _of(id: str, document: Json) -> Json:
    """The document of the resource `id`: what every resource has is there, whatever Azure has left out."""
    return {"id": id, "name": names.name_of(id), "properties": {}, **document}


def _resources(listed: Iterable[Any]) -> list[Json]:
    """All resources of a listing; Unreadable for one of which not even id and location are told."""
    return [
        _of(must(document, "id"), {**document, "location": must(document, "location")})
        for document in _documents(listed)
    ]


def _named(documents: list[Json]) -> list[Json]:
    """Those that have a name: the others cannot be spoken of."""
    return [document for document in documents if document.get("name")]


@contextmanager
def _understood() -> Iterator[None]:
    """How the SDKs fail on an answer of another form becomes an error that says so: only for calls of theirs."""
    try:
        yield
    except (AttributeError, TypeError, KeyError) as error:
        raise errors.Unreadable(f"the answer does not have the form that Azure promises ({error})") from error


@contextmanager
def translated(verb: str, resource: str) -> Iterator[None]:
    """Foreign exceptions of the block become ours: here, and nowhere else. `storage` uses it too."""
    try:
        yield
    except (errors.Unreadable, DeserializationError, json.JSONDecodeError) as error:
        raise _unreadable(verb, resource, error) from error
    except HttpResponseError as error:
        if isinstance(error, DecodeError) and (error.status_code or 0) < 400:
            raise _unreadable(verb, resource, error) from error
        if isinstance(error, ClientAuthenticationError) and isinstance(error.__context__, _NO_ANSWER):
            raise _unreachable(verb, resource, error.__context__) from error
        raise _error(verb, resource, error) from error
    except _NO_ANSWER as error:
        raise _unreachable(verb, resource, error) from error
    except SdkError as error:
        raise errors.AzureError(f"could not {verb} {resource}: {error.message}", resource=resource) from error


def _unreachable(verb: str, resource: str, error: BaseException) -> errors.CloudUnreachable:
    text = f"could not {verb} {resource}: no answer from Azure: {error}"
    return errors.CloudUnreachable(text, resource=resource)


def _unreadable(verb: str, resource: str, error: Exception) -> errors.Unreadable:
    """An answer that is not what Azure would say: another service's, a proxy's, or of a form that nobody promised."""
    said = str(error).partition("\n")[0] or type(error).__name__
    return errors.Unreadable(
        f"could not {verb} {resource}: Azure's answer is not understood: {said}", resource=resource
    )


def _error(verb: str, resource: str, error: HttpResponseError) -> errors.AzureError:
    layers = _layers(error)
    chain = [str(layer["code"]) for layer in layers]
    status = error.status_code or 0
    entry = codes.cause(chain, status)
    kind = _kind(error, status, entry)
    code, message = (chain[-1] if chain else ""), _message(error, layers)
    headers = getattr(error.response, "headers", {})
    return kind(
        f"could not {verb} {resource}: {message if not code or code in message else f'{code}: {message}'}",
        remedy=entry.remedy if entry else None,
        code=code,
        status=status,
        resource=resource,
        target=layers[-1].get("target") if layers else None,
        retry_after=_seconds(headers.get("Retry-After")),
        request_id=headers.get("x-ms-request-id"),
    )


def _kind(error: HttpResponseError, status: int, entry: codes.Code | None) -> type[errors.AzureError]:
    if status == 429:  # whatever the code: throttling comes as OperationNotAllowed, too
        return errors.Throttled
    if entry is not None:
        return entry.kind
    if isinstance(error, ClientAuthenticationError):
        return errors.Denied
    return _BY_STATUS.get(status, errors.AzureError)


def _layers(error: HttpResponseError) -> list[Json]:
    """The error documents of an answer, each with a `code`, from the outermost to the one that names the cause."""
    body = _body(error) or {}
    layers = list(_unwrapped(body))
    if layers:
        return layers
    if str(body.get("status")).lower() == "canceled":
        # So it is told, without a code, where a later request has taken the place of this one.
        return [{"code": "OperationPreempted"}]
    own = getattr(error, "error", None)  # what the SDK made of the answer
    code = (
        getattr(own, "code", None)
        or getattr(error.response, "headers", {}).get("x-ms-error-code")  # storage answers in XML
        or _sign_in_code(error)
    )
    return [{"code": code}] if code else []


def _unwrapped(document: Any) -> Iterator[Json]:
    """Errors within errors: wrapped in `error` or not, in `details`, or as JSON in the text of a message."""
    found = document.get("error", document) if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found.get("code"):
        return
    yield found
    details = found.get("details")
    coded = (each for each in (details if isinstance(details, list) else []) if _has_code(each))
    yield from _unwrapped(next(coded, None) or _parsed(found.get("message")))


def _message(error: HttpResponseError, layers: list[Json]) -> str:
    """The innermost message that is meant for people."""
    said = [text for layer in reversed(layers) if (text := layer.get("message")) and _parsed(text) is None]
    return " ".join(str(said[0]).split()) if said else error.message.partition("\n")[0]


def _body(error: HttpResponseError) -> Any:
    try:
        return _parsed(error.response.text()) if error.response is not None else None
    except AttributeError:  # the token endpoint's answers are of another kind
        return None


def _parsed(text: Any) -> Json | None:
    """The JSON object in a text; None where it is no such text."""
    try:
        document = json.loads(text)
    except (TypeError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _has_code(detail: Any) -> bool:
    return isinstance(detail, dict) and bool(detail.get("code"))


def _sign_in_code(error: HttpResponseError) -> str | None:
    """The sign-in service's code.

    The one code that is taken out of a message, for azure-identity passes it on in no other way; of a tenant that
    does not exist it hides even that in the exception it came from.
    """
    if not isinstance(error, ClientAuthenticationError):
        return None
    cause: BaseException | None = error
    while cause is not None:
        if code := re.search(r"AADSTS\d+", str(cause)):
            return code[0]
        cause = cause.__cause__ or cause.__context__
    return None


def _seconds(header: str | None) -> float | None:
    """The seconds of a Retry-After header; None without one, or where it is a date."""
    try:
        return float(header) if header else None
    except ValueError:
        return None
