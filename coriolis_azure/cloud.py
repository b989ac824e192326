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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from itertools import islice
from typing import Any, TypeVar
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
from azure.core.paging import ItemPaged
from azure.core.pipeline.policies import RetryPolicy
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
from azure.mgmt.core.polling.arm_polling import ARMPolling
from azure.mgmt.network import NetworkManagementClient
from azure.mgmt.resource.resources import ResourceManagementClient
from requests.adapters import HTTPAdapter

from . import __version__, codes, documents, errors, names, tls
from .api_versions import ApiVersions
from .clock import Clock, wait
from .events import Report, Wait, Waiting, silent
from .model import Json, canonical_location, must
from .settings import Connection, Image

LOG = logging.getLogger(__name__)

Transport = HttpTransport[Any, Any]
T = TypeVar("T")

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
# The longest that one request may take with all its repetitions: Azure's budgets of requests are filled within half
# an hour.
REQUEST_SECONDS = 30 * 60.0
# What no listing exceeds: a hundred thousand VMs come in some hundred pages.
LISTING_SECONDS, PAGES = 30 * 60.0, 10_000

# Microsoft's own public client, the one that the Azure CLI signs in as; user credentials need a client.
_PUBLIC_CLIENT = "04b07795-8ddb-461a-bbee-02f9e1bf7b46"


@dataclass(frozen=True)
class _Profile:
    """A cloud: who signs us in, its resource manager, the audience of tokens, and the domains of its Blob storage."""

    authority: str
    manager: str
    audience: str
    storage: tuple[str, ...]

    def owns(self, url: str) -> bool:
        """Whether a token may be sent to `url`: over HTTPS to the resource manager, or to Blob storage."""
        parts = urlsplit(url)
        host, manager = parts.hostname or "", urlsplit(self.manager).hostname or ""
        domains = [f".{name}" for name in (manager, *self.storage) if name]
        return parts.scheme == "https" and (host == manager or host.endswith(tuple(domains)))


_CLOUDS = {
    "AzureCloud": _Profile(
        "https://login.microsoftonline.com",
        "https://management.azure.com",
        "https://management.azure.com",
        ("blob.core.windows.net", "blob.storage.azure.net"),
    ),
    "AzureChinaCloud": _Profile(
        "https://login.chinacloudapi.cn",
        "https://management.chinacloudapi.cn",
        "https://management.core.chinacloudapi.cn/",
        ("blob.core.chinacloudapi.cn",),
    ),
    "AzureUSGovernment": _Profile(
        "https://login.microsoftonline.us",
        "https://management.usgovcloudapi.net",
        "https://management.core.usgovcloudapi.net/",
        ("blob.core.usgovcloudapi.net",),
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

    `transport` replaces the HTTPS connections of all SDK clients; `report` is told what is waited for. `is_modern` is
    false for an Azure Stack Hub, which refuses what newer versions know. Every verb raises an `errors.AzureError`, or
    DeadlinePassed: nothing is waited for longer than OPERATION_SECONDS.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        transport: Transport | None = None,
        report: Report = silent,
        clock: Clock | None = None,
    ) -> None:
        self.subscription = connection.subscription_id
        self.report = report
        self.transport = _Shared(transport or https(connection), clock or Clock())
        retries = partial(_Retries, report)
        with translated("sign in to", connection.cloud_profile):
            profile = _profile(connection, self.transport)
            self.credential = _credential(connection, profile.authority, self.transport, retries)
        self.transport.profile = profile
        options: dict[str, Any] = {
            "base_url": profile.manager,
            "credential_scopes": [f"{profile.audience.rstrip('/')}/.default"],
            "transport": self.transport,
            "retry_policy": retries(),
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

    def now(self, clock: Clock) -> datetime:
        """This moment by Azure's clock: what `clock` says, put right by the date of Azure's latest answer.

        Hosts compare the ages of each other's resources, so one whose clock is wrong must not go by it.
        """
        return clock.now() + self.transport.skew

    def validate(self) -> None:
        """Ask one harmless question, to learn whether endpoint, identity and subscription are right."""
        with translated("read the subscription", self.subscription):
            _documents(islice(whole(self._resources.resource_groups.list(top=1)), 1))

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
        """The resource `id`, or None where there is none. That there is no subscription is an error."""
        try:
            return self.get(id)
        except errors.NotFound as error:
            if error.facts.get("code") == "SubscriptionNotFound":
                raise
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

    def locations(self) -> list[str]:
        """The locations in which this subscription may have VMs."""
        with translated("read the provider", "Microsoft.Compute"):
            provider = _document(self._resources.providers.get("Microsoft.Compute"))
        types = {entry.get("resourceType", "").lower(): entry for entry in provider.get("resourceTypes", [])}
        return sorted(
            canonical_location(place) for place in types.get("virtualmachines", {}).get("locations", [])
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
        pages = _Pages()
        while path:
            page = self._read(what, path, version, {"value": [form], "nextLink": str})
            found += page.get("value", [])
            path = page.get("nextLink", "")
            with translated("list", what):
                pages.turned(path)
        return found

    def put(self, id: str, body: Mapping[str, Any], etag: str = "") -> Json:
        """Create or change `id`; the resource as it is once Azure has settled.

        With an `etag`, only if that is still the resource's; a Conflict with the status 412 otherwise.
        """
        operations = self._kinds[names.kind_of(id)]
        options = {"headers": {"If-Match": etag}} if etag else {}
        begin = partial(operations.begin_create_or_update, **options)
        return _of(id, self._settled("create", id, begin, body))

    def patch_vm(self, id: str, body: Mapping[str, Any], etag: str = "") -> Json:
        """Change parts of a VM. A list in `body` replaces the whole list. `etag`: see `put`."""
        options = {"headers": {"If-Match": etag}} if etag else {}
        return self._settled("update", id, partial(self._kinds["vm"].begin_update, **options), body)

    def tag(self, id: str, tags: Mapping[str, str]) -> None:
        """Replace the tags of a resource."""
        operations, body = self._kinds[names.kind_of(id)], {"tags": dict(tags)}
        if hasattr(operations, "update_tags"):
            with translated("tag", id):
                operations.update_tags(names.group_of(id), names.name_of(id), body)
        else:
            self._settled("tag", id, operations.begin_update, body)

    def delete(self, id: str) -> None:
        """Delete `id` and wait until it is gone; one that is gone already is no error. A VM is not shut down first."""
        operations, kind = self._kinds[names.kind_of(id)], names.kind_of(id)
        options = {"force_deletion": True} if kind == "vm" else {}
        try:
            self._settled("delete", id, partial(operations.begin_delete, **options))
        except errors.NotFound:
            return

    def deallocate(self, id: str) -> None:
        """Shut a VM down and give back its host; wait until it is done."""
        self._settled("deallocate", id, self._kinds["vm"].begin_deallocate)

    def power_off(self, id: str) -> None:
        """Cut a VM's power; it keeps its host and addresses. Wait until it is done."""
        self._settled("power off", id, partial(self._kinds["vm"].begin_power_off, skip_shutdown=True))

    def start(self, id: str) -> None:
        """Start a VM that is deallocated or powered off; wait until it runs."""
        self._settled("start", id, self._kinds["vm"].begin_start)

    def sizes(self, location: str) -> list[Json]:
        """The VM sizes that `location` knows, with capabilities and restrictions. Several MiB: asked once."""
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

    def _settled(self, verb: str, id: str, begin: Callable[..., LROPoller[Any]], *body: Any) -> Json:
        """Begin an operation on a resource and see it through."""
        with translated(verb, id):
            with _understood():
                polling = _Polling(verb, id, self.report)
                poller = begin(names.group_of(id), names.name_of(id), *body, polling=polling)
            return _document(poller.result())


class _Retries(RetryPolicy[Any, Any]):
    """azure-core's retries, which obey Retry-After, for REQUEST_SECONDS at most. Throttling is told.

    Where Azure asks for more, its answer is the result: a retry before that only prolongs throttling.
    """

    def __init__(self, report: Report, **options: Any) -> None:
        super().__init__(**{"retry_status": _RETRIES, **options})
        self._report = report

    def configure_retries(self, options: dict[str, Any]) -> dict[str, Any]:
        """What is known of one request and its repetitions."""
        return {**super().configure_retries(options), "begun": time.monotonic(), "waited": 0.0}

    def increment(self, settings: dict[str, Any], response: Any = None, error: Any = None) -> bool:
        """Count a failure; whether the request is repeated."""
        again = super().increment(settings, response, error)
        if error is not None and errors.exhausted(error):
            return False
        return (
            again and _spent(settings) + self._pause(settings, None if error else response) <= REQUEST_SECONDS
        )

    def sleep(self, settings: dict[str, Any], transport: Any, response: Any = None) -> None:
        """Wait before a repetition."""
        pause = self._pause(settings, response)
        if response is not None and response.http_response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
            self._report(Waiting("Azure, which throttles our requests", pause))
        super().sleep(settings, transport, response)
        settings["waited"] += pause

    def _pause(self, settings: dict[str, Any], response: Any) -> float:
        asked = self.get_retry_after(response) if response is not None else None
        return asked or self.get_backoff_time(settings)


def _spent(settings: dict[str, Any]) -> float:
    """Seconds since a request was first sent: by the clock, or by what was waited where time is held."""
    return max(time.monotonic() - float(settings["begun"]), float(settings["waited"]))


class _Polling(ARMPolling):
    """azure-core's polling, on the calling thread, for OPERATION_SECONDS at most.

    The SDKs' pollers use threads of their own, and a process that has none left must be able to clean up.
    """

    def __init__(self, verb: str, id: str, report: Report) -> None:
        super().__init__(timeout=POLLING_SECONDS)
        self._what, self._id = f"{verb} {id}", id
        self._begun, self._waited = time.monotonic(), 0.0
        self._waiting = Wait(report, Clock(), f"Azure to {verb} {names.name_of(id)}", OPERATION_SECONDS)

    def initialize(self, client: Any, initial_response: Any, deserialization_callback: Any) -> None:
        """Read the first answer and see the operation through: the poller then has nothing left to do."""
        super().initialize(client, initial_response, deserialization_callback)
        if not self.finished():
            self.run()

    def _delay(self) -> None:
        spent = max(time.monotonic() - self._begun, self._waited)
        left = OPERATION_SECONDS - spent
        if left <= 0:
            raise errors.DeadlinePassed(
                f"Azure did not finish to {self._what} within {OPERATION_SECONDS / 60:.0f} minutes",
                resource=self._id,
            )
        pause = min(self._extract_delay(), left)
        if spent + pause > _LONG_SECONDS:
            self._waiting.still()
        self._sleep(pause)
        self._waited += pause


class _Pages:
    """The pages of one listing: one that goes in a circle, or on for ever, is ended."""

    def __init__(self) -> None:
        self._links: set[str] = set()
        self._until = time.monotonic() + LISTING_SECONDS

    def turned(self, link: str | None) -> None:
        """After a page: `link` is where the next one is."""
        if not link:
            return
        if link in self._links or len(self._links) >= PAGES:
            raise errors.Unreadable(
                f"a listing does not end: {len(self._links) + 1} pages, and still a next one"
            )
        if time.monotonic() > self._until:
            raise errors.DeadlinePassed(f"a listing did not end within {LISTING_SECONDS / 60:.0f} minutes")
        self._links.add(link)


def whole(listed: Iterable[T]) -> Iterator[T]:
    """What an SDK lists, page by page, if it ends."""
    if not isinstance(listed, ItemPaged):
        yield from listed
        return
    pages, turn = listed.by_page(), _Pages()
    for page in pages:
        yield from page
        turn.turned(getattr(pages, "continuation_token", None))


class _Shared(Transport):
    """One transport for all clients: closing a client leaves it open for the others.

    Whatever an answer names as the place to go on (a next page, an operation, an account), what proves who we are
    goes to no other hosts than those of the cloud's profile.
    """

    def __init__(self, transport: Transport, clock: Clock) -> None:
        self._transport, self._clock = transport, clock
        self.profile: _Profile | None = None
        self.skew = timedelta(0)  # how far Azure's clock is ahead of this host's
        # By lower-cased resource type, the API version with which it was asked for.
        self.api_versions: dict[str, str] = {}

    def send(self, request: Any, **options: Any) -> Any:
        asked = _API_VERSION.search(request.url)
        if asked:
            self.api_versions[asked["type"].lower()] = asked["version"]
        if "Authorization" in request.headers and not (self.profile and self.profile.owns(request.url)):
            parts = urlsplit(request.url)
            raise errors.Unreadable(
                f"{parts.scheme}://{parts.hostname} is not of this cloud: no credentials are sent there"
            )
        response = self._transport.send(request, **options)
        date = _date(response.headers.get("Date"))
        if date is not None:
            self.skew = date - self._clock.now()
        return response

    def sleep(self, duration: float) -> None:
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
    transport: Transport = _Https(session=session, connection_verify=verifies)
    return transport


class _Https(RequestsTransport):  # type: ignore[misc]  # its module is untyped
    """HTTPS; what azure-core waits for can be called off."""

    def sleep(self, duration: float) -> None:
        """Wait before a request is repeated, or between two looks at an operation."""
        wait(duration)


def _profile(connection: Connection, transport: Transport) -> _Profile:
    """The cloud of the settings. What a custom one does not say is asked of its resource manager."""
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
    # Its services share a domain: management.local.example and account.blob.local.example. An address has none.
    host = urlsplit(manager).hostname or ""
    is_name = host.count(".") >= 2 and not host.replace(".", "").isdigit()
    domain = host.partition(".")[2] if is_name else ""
    suffix = connection.endpoints.get("storage_endpoint", "").rpartition("//")[2].strip("./")
    return _Profile(authority.rstrip("/"), manager, audience, (domain, suffix))


def _credential(
    connection: Connection, authority: str, transport: Transport, retries: Callable[..., Any]
) -> TokenCredential:
    options: dict[str, Any] = {"authority": authority, "transport": transport, "retry_policy_class": retries}
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
        models = list(whole(listed))
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


def _unreachable(verb: str, resource: str, error: BaseException) -> errors.CoriolisAzureError:
    limit = errors.exhausted(error)  # a socket that could not be opened says nothing of Azure
    if limit:
        return errors.HostExhausted(f"could not {verb} {resource}: {limit.message}", remedy=limit.remedy)
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


def _date(header: str | None) -> datetime | None:
    """The moment that a Date header names; None without one, or where it is no date."""
    try:
        found = parsedate_to_datetime(header) if header else None
    except ValueError:
        return None
    return found if found is not None and found.tzinfo else None


def _seconds(header: str | None) -> float | None:
    """The seconds of a Retry-After header; None without one, or where it is a date."""
    try:
        return float(header) if header else None
    except ValueError:
        return None
