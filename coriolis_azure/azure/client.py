"""A client for one Azure subscription: the operations this product needs, on top of Azure's official SDKs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from azure.core.polling import LROPoller
from azure.core.rest import HttpRequest
from azure.mgmt.compute import ComputeManagementClient
from azure.mgmt.resource.resources import ResourceManagementClient

from .. import __version__, errors
from ..clock import Clock
from ..events import Report, silent
from ..model import Json, at, canonical_location, must
from ..settings import Connection, Image
from . import documents, forms, host, names
from .answers import Answers, same_for_all
from .api_versions import ApiVersions
from .patience import Pages, Polling, Retries, whole
from .profiles import BLOB_VERSIONS, PROFILES
from .sas import Sas
from .sign_in import Credential, credential_for, profile_for
from .translation import translated
from .transport import SharedTransport, Transport, https, origin

if TYPE_CHECKING:
    from azure.mgmt.network import NetworkManagementClient

# The API versions of the requests that the SDKs in use have no operation for.
_SUBSCRIPTIONS_VERSION = "2022-12-01"
_PERMISSIONS_VERSION = "2022-04-01"
_LOCKS_VERSION = "2020-05-01"
_POLICY_VERSION = "2024-10-01"
_STORAGE_VERSION = "2023-05-01"
_NETWORK_VERSION = "2024-01-01"
# For asking a cloud which versions it offers: old enough for every cloud.
_PROVIDERS_VERSION = "2019-10-01"
# The SDK client of each kind of resource, and its operations there.
_OPERATIONS = {
    "vm": ("_compute", "virtual_machines"),
    "disk": ("_compute", "disks"),
    "snapshot": ("_compute", "snapshots"),
    "collection": ("_compute", "restore_point_collections"),
    "nic": ("_network", "network_interfaces"),
    "ip": ("_network", "public_ip_addresses"),
    "nsg": ("_network", "network_security_groups"),
    "vnet": ("_network", "virtual_networks"),
}
# Since this version, deleting a VM can delete its disks, and disks have a network access policy.
_MODERN_SINCE = "2021-12-01"


class Azure:
    """One Azure subscription, accessed with the identity of the connection settings.

    `transport` replaces the HTTPS connections of all SDK clients, `credential` the sign-in of the settings; `report`
    receives the waits. `is_modern` is false
    for an Azure Stack Hub, which rejects the properties of newer API versions. Methods raise an `errors.AzureError`,
    or DeadlinePassed: no wait is longer than OPERATION_SECONDS.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        transport: Transport | None = None,
        report: Report = silent,
        clock: Clock | None = None,
        credential: Credential | None = None,
    ) -> None:
        self.subscription = connection.subscription_id
        self.report = report
        self.transport = SharedTransport(transport or https(connection), clock or Clock())
        retries = partial(Retries, report)
        with translated("sign in to", connection.cloud_profile):
            self._profile = profile = profile_for(connection, self.transport)
            self.credential = credential or credential_for(
                connection, profile.authority, self.transport, retries
            )
        self.transport.profile = profile
        options: dict[str, Any] = {
            "base_url": profile.manager,
            "credential_scopes": [f"{profile.audience.rstrip('/')}/.default"],
            "transport": self.transport,
            "retry_policy": retries(),
            "auto_request_id": False,  # SharedTransport gives each request an id
            "user_agent": f"coriolis-azure/{__version__}",
        }
        self._versions = ApiVersions(
            {**PROFILES[connection.api_profile], **connection.api_versions}, self.offered_versions
        )
        options["per_call_policies"] = [self._versions]
        self._compute = ComputeManagementClient(self.credential, self.subscription, **options)
        self._resources = ResourceManagementClient(self.credential, self.subscription, **options)
        self._options = options
        self.answers = Answers(clock or Clock())
        self._skus: dict[str, list[Json]] = {}
        self.api_versions = self.transport.api_versions
        self.blob_version = BLOB_VERSIONS.get(connection.api_profile, "")

    @cached_property
    def _network(self) -> NetworkManagementClient:
        """Made where something is made or deleted: see `forms`."""
        from azure.mgmt.network import NetworkManagementClient

        return NetworkManagementClient(self.credential, self.subscription, **self._options)

    def _operations(self, kind: str) -> Any:
        client, operations = _OPERATIONS[kind]
        return getattr(getattr(self, client), operations)

    @property
    def is_modern(self) -> bool:
        """Whether this Azure accepts newer API versions, as far as its answers so far have shown."""
        return self._versions.newest("microsoft.compute/virtualmachines", _MODERN_SINCE) >= _MODERN_SINCE

    @cached_property
    def host_location(self) -> str:
        """The Azure location of this host; "" if it is elsewhere."""
        return host.location(self.transport)

    def close(self) -> None:
        """Close the connections."""
        self.transport.really_close()

    def now(self, clock: Clock) -> datetime:
        """The current time by Azure's clock: `clock`, corrected by the Date header of Azure's latest answer.

        Hosts compare the ages of each other's resources, so a host must not rely on its own clock.
        """
        return clock.now() + self.transport.skew

    def validate(self) -> None:
        """Check endpoint, identity and subscription with one harmless request."""
        with translated("read the subscription", self.subscription):
            _documents(islice(whole(self._resources.resource_groups.list(top=1)), 1))

    @same_for_all
    def group(self, name: str) -> Json:
        """The resource group `name`."""
        with translated("read the resource group", name):
            return _document(self._resources.resource_groups.get(name))

    def groups(self) -> list[Json]:
        """All resource groups that the identity can see."""
        with translated("list the resource groups of", self.subscription):
            return _named(_documents(self._resources.resource_groups.list()))

    def get(self, id: str, **options: str) -> Json:
        """The resource `id`, whose type is one of `names.TYPES`; `expand="instanceView"` adds a VM's state.

        Or a disk of a restore point.
        """
        with translated("read", id):
            if names.is_disk_point(id):
                return _complete(id, _document(self._compute.disk_restore_point.get(*_place(id))))
            kind = names.kind_of(id)
            if kind in forms.NETWORK:
                path = names.resource_id(self.subscription, names.group_of(id), kind, names.name_of(id))
                request = HttpRequest("GET", f"{quote(path)}?api-version={_NETWORK_VERSION}")
                return _complete(id, self._send("read", id, request, forms.NETWORK[kind]))
            operations = self._operations(kind)
            return _complete(id, _document(operations.get(names.group_of(id), names.name_of(id), **options)))

    def find(self, id: str) -> Json | None:
        """The resource `id`; None if it does not exist. A missing subscription is an error."""
        try:
            return self.get(id)
        except errors.NotFound as error:
            if error.code == "SubscriptionNotFound":
                raise
            return None

    def resources(self, kind: str, group: str) -> list[Json]:
        """All resources of one kind in a resource group."""
        if kind in forms.NETWORK:
            return self._networks(kind, f"/resourceGroups/{group}", group)
        operations = self._operations(kind)
        list_ = operations.list_by_resource_group if kind in {"disk", "snapshot"} else operations.list
        with translated(f"list {names.TYPES[kind]} in", group):
            return _located(_documents(list_(group)))

    def everywhere(self, kind: str) -> list[Json]:
        """All resources of one kind in the subscription."""
        if kind in forms.NETWORK:
            return self._networks(kind, "", self.subscription)
        operations = self._operations(kind)
        list_ = operations.list if kind in {"disk", "snapshot"} else operations.list_all
        with translated(f"list {names.TYPES[kind]} in", self.subscription):
            return _located(_documents(list_()))

    @same_for_all
    def locations(self) -> list[str]:
        """The locations in which this subscription can have VMs."""
        with translated("read the provider", "Microsoft.Compute"):
            provider = _document(self._resources.providers.get("Microsoft.Compute"))
        types = {entry.get("resourceType", "").lower(): entry for entry in provider.get("resourceTypes", [])}
        return sorted(
            canonical_location(place) for place in types.get("virtualmachines", {}).get("locations", [])
        )

    def offered_versions(self, namespace: str) -> dict[str, list[str]]:
        """The API versions that a resource provider offers, by lower-case type (`microsoft.compute/disks`)."""
        path = f"/subscriptions/{self.subscription}/providers/{namespace}"
        provider = self._read("the provider", path, _PROVIDERS_VERSION, forms.PROVIDER_TYPES)
        return {
            f"{namespace}/{entry['resourceType']}".lower(): entry.get("apiVersions", [])
            for entry in provider.get("resourceTypes", [])
            if "resourceType" in entry
        }

    @same_for_all
    def subscription_state(self) -> str:
        """Enabled, Warned, PastDue, Disabled, ...; in some of these states nothing can be created."""
        path = f"/subscriptions/{self.subscription}"
        subscription = self._read("the subscription", path, _SUBSCRIPTIONS_VERSION, forms.SUBSCRIPTION)
        return str(subscription.get("state", "unknown"))

    @same_for_all
    def permissions(self, scope: str) -> list[Json]:
        """The identity's permissions at `scope`, an ARM id: actions and notActions of each of its roles."""
        path = f"{scope}/providers/Microsoft.Authorization/permissions"
        return self._listed("read the permissions at", scope, path, _PERMISSIONS_VERSION, forms.PERMISSION)

    def policy_restrictions(self, group: str, content: Mapping[str, Any], version: str) -> Json:
        """What Azure Policy would say to creating `content`, a possibly partial resource, in `group`.

        `fieldRestrictions`: fields that it must have; `contentEvaluationResult`: policies that it violates.
        """
        path = f"/subscriptions/{self.subscription}/resourceGroups/{group}"
        body = {"resourceDetails": {"resourceContent": dict(content), "apiVersion": version}}
        request = HttpRequest(
            "POST",
            f"{path}/providers/Microsoft.PolicyInsights/checkPolicyRestrictions?api-version={_POLICY_VERSION}",
            json=body,
        )
        return self._send("ask Azure Policy about", path, request, forms.RESTRICTIONS)

    @same_for_all
    def locks(self, scope: str) -> list[Json]:
        """The management locks at `scope`, an ARM id, and below."""
        path = f"{scope}/providers/Microsoft.Authorization/locks"
        listed = self._listed("read the locks of", scope, path, _LOCKS_VERSION, forms.LOCK)
        return [lock for lock in listed if "id" in lock]

    @same_for_all
    def compute_usages(self, location: str) -> list[Json]:
        """Cores and VMs used in `location` against the quota: name, currentValue, limit."""
        with translated("read the compute quota of", location):
            return _documents(self._compute.usage.list(location))

    @same_for_all
    def network_usages(self, location: str) -> list[Json]:
        """Addresses, NICs and networks used in `location` against the quota: name, currentValue, limit."""
        path = f"/subscriptions/{self.subscription}/providers/Microsoft.Network/locations/{location}/usages"
        return self._listed("read the network quota of", location, path, _NETWORK_VERSION, forms.USAGE)

    @same_for_all
    def encryption_set(self, id: str) -> Json:
        """The disk encryption set `id`."""
        sets = self._compute.disk_encryption_sets
        with translated("read", id):
            return _document(sets.get(names.group_of(id), names.name_of(id)))

    @same_for_all
    def storage_accounts(self) -> list[Json]:
        """All storage accounts of the subscription, with their `primaryEndpoints`."""
        path = f"/subscriptions/{self.subscription}/providers/Microsoft.Storage/storageAccounts"
        listed = self._listed(
            "read the storage accounts of", self.subscription, path, _STORAGE_VERSION, forms.ACCOUNT
        )
        return [account for account in listed if "id" in account]

    @same_for_all
    def storage_account(self, id: str) -> Json:
        """The storage account `id`, with its `primaryEndpoints`."""
        return {**self._read("the storage account", id, _STORAGE_VERSION, forms.ACCOUNT), "id": id}

    def containers(self, id: str) -> list[Json]:
        """The blob containers of the storage account `id`."""
        path = f"{id}/blobServices/default/containers"
        listed = self._listed("read the containers of", id, path, _STORAGE_VERSION, forms.CONTAINER)
        return [container for container in listed if "name" in container]

    def storage_key(self, id: str) -> str:
        """A key of a storage account: a secret that gives access to everything in it."""
        with translated("read the keys of", id):
            url = f"{id}/listKeys?api-version={_STORAGE_VERSION}"
            response = self._resources.send_request(HttpRequest("POST", url))
            response.raise_for_status()
            keys = documents.understood(response.json(), forms.KEYS).get("keys", [])
            value = next((key["value"] for key in keys if "value" in key), "")
            if not value:
                raise errors.Unreadable("the answer holds no key")
            return str(value)

    def _read(self, noun: str, path: str, version: str, form: Json) -> Json:
        """Read a document that the SDKs in use have no operation for."""
        return self._send(f"read {noun}", path, HttpRequest("GET", f"{path}?api-version={version}"), form)

    def _send(self, verb: str, resource: str, request: HttpRequest, form: Json) -> Json:
        with translated(verb, resource):
            response = self._resources.send_request(request)
            response.raise_for_status()
            document: Json = documents.understood(response.json(), form)
            return document

    def _networks(self, kind: str, scope: str, place: str) -> list[Json]:
        """All resources of a kind of networks below `scope` in the subscription, of which `place` is the name."""
        path = f"/subscriptions/{self.subscription}{scope}/providers/{names.TYPES[kind]}"
        verb = f"list {names.TYPES[kind]} in"
        listed = self._listed(verb, place, path, _NETWORK_VERSION, forms.NETWORK[kind])
        with translated(verb, place):
            return _located(listed)

    def _listed(self, verb: str, resource: str, path: str, version: str, form: Json) -> list[Json]:
        """All entries of a listing, page by page, without the SDKs' operations."""
        entries: list[Json] = []
        pages, url = Pages(), f"{quote(path)}?api-version={version}"
        while url:
            page = self._send(verb, resource, HttpRequest("GET", url), {"value": [form], "nextLink": str})
            entries += page.get("value", [])
            url = page.get("nextLink", "")
            with translated(verb, resource):
                pages.turned(url)
        return entries

    def put(self, id: str, body: Mapping[str, Any], etag: str = "") -> Json:
        """Create or update `id`, wait for the operation to end, and return the resource.

        With an `etag`, only if the resource still has it; otherwise raises Conflict with status 412.
        """
        operations = self._operations(names.kind_of(id))
        options = {"headers": {"If-Match": etag}} if etag else {}
        if not hasattr(operations, "begin_create_or_update"):
            with translated("create", id):
                return _complete(id, _document(operations.create_or_update(*_place(id), body, **options)))
        begin = partial(operations.begin_create_or_update, **options)
        return _complete(id, self._completed("create", id, begin, body))

    def patch_vm(self, id: str, body: Mapping[str, Any], etag: str = "") -> Json:
        """Update parts of a VM. A list in `body` replaces the whole list. `etag`: see `put`."""
        options = {"headers": {"If-Match": etag}} if etag else {}
        return self._completed("update", id, partial(self._operations("vm").begin_update, **options), body)

    def patch_snapshot(self, id: str, body: Mapping[str, Any]) -> Json:
        """Update parts of a snapshot, and return it; `tags` in `body` replace all of its tags."""
        return self._completed("update", id, self._operations("snapshot").begin_update, body)

    def tag(self, id: str, tags: Mapping[str, str]) -> None:
        """Replace the tags of a resource."""
        operations, body = self._operations(names.kind_of(id)), {"tags": dict(tags)}
        if hasattr(operations, "begin_update"):
            self._completed("tag", id, operations.begin_update, body)
        else:
            update = getattr(operations, "update_tags", None) or operations.update
            with translated("tag", id):
                update(*_place(id), body)

    def grant_read(self, snapshot: str, seconds: int) -> Sas:
        """Let whoever has the URL read a snapshot, or a disk of a restore point, for so long.

        Granting again prolongs it.
        """
        wanted = {"access": "Read", "durationInSeconds": seconds}
        granted = self._completed("export", snapshot, self._exporting(snapshot).begin_grant_access, wanted)
        url = str(must(granted, "accessSAS"))
        if not self._profile.signs(url):
            raise errors.Unreadable(
                f"could not export {snapshot}: the signed URL leads to {origin(url)}, which does not belong to this "
                "cloud: nothing is sent there"
            )
        return Sas(url)

    def revoke_access(self, snapshot: str) -> None:
        """Make all URLs of a snapshot, or of a disk of a restore point, invalid. Does nothing if it does not exist."""
        try:
            self._completed("end the export of", snapshot, self._exporting(snapshot).begin_revoke_access)
        except errors.NotFound:
            return

    def _exporting(self, id: str) -> Any:
        return self._compute.disk_restore_point if names.is_disk_point(id) else self._operations("snapshot")

    def create_point(self, id: str, body: Mapping[str, Any]) -> Json:
        """Create the restore point `id` and wait until it is there. Azure's refusals of too many are not repeated."""
        begin = partial(self._compute.restore_points.begin_create, retry_status=0)
        return _complete(id, self._completed("create", id, begin, body))

    def close_points(self, collection: str) -> None:
        """Make all URLs of the restore points in a collection invalid."""
        for point in at(self.get(collection, expand="restorePoints"), "properties.restorePoints", []):
            with translated("list the disks of", point["id"]):
                disks = _documents(
                    self._compute.disk_restore_point.list_by_restore_point(*_place(point["id"]))
                )
            for disk in disks:
                self.revoke_access(must(disk, "id"))

    def delete(self, id: str) -> None:
        """Delete `id` and wait until it is gone. Does nothing if it does not exist. A VM is not shut down first."""
        operations, kind = self._operations(names.kind_of(id)), names.kind_of(id)
        options = {"force_deletion": True} if kind == "vm" else {}
        try:
            self._completed("delete", id, partial(operations.begin_delete, **options))
        except errors.NotFound:
            return

    def deallocate(self, id: str) -> None:
        """Shut a VM down, release its host, and wait until this is done."""
        self._completed("deallocate", id, self._operations("vm").begin_deallocate)

    def power_off(self, id: str) -> None:
        """Power a VM off without shutting it down, and wait until it is off; it keeps its host and addresses."""
        self._completed("power off", id, partial(self._operations("vm").begin_power_off, skip_shutdown=True))

    def start(self, id: str) -> None:
        """Start a VM that is deallocated or powered off, and wait until it runs."""
        self._completed("start", id, self._operations("vm").begin_start)

    @same_for_all
    def sizes(self, location: str) -> list[Json]:
        """The VM sizes of `location`, with capabilities and restrictions. Cached, as the answer has several MiB."""
        if location not in self._skus:
            with translated("list the VM sizes of", location):
                skus = self._compute.resource_skus.list(filter=f"location eq '{location}'")
                self._skus[location] = [
                    sku for sku in _named(_documents(skus)) if sku.get("resourceType") == "virtualMachines"
                ]
        return self._skus[location]

    @same_for_all
    def retired_sizes(self, location: str) -> list[Json]:
        """The VM sizes of the older listing, which still includes some that are no longer sold."""
        with translated("list the VM sizes of", location):
            return _documents(self._compute.virtual_machine_sizes.list(location))

    @same_for_all
    def image(self, location: str, image: Image) -> Json | None:
        """The marketplace's document for `image` in `location`; None if it is not offered.

        A `plan` in it means that the image has terms to accept.
        """
        images, names_ = self._compute.virtual_machine_images, (image.publisher, image.offer, image.sku)
        try:
            with translated("look up the image", str(image)):
                version = image.version
                if version == "latest":
                    newest = _documents(images.list(location, *names_, top=1, orderby="name desc"))
                    version = next((entry["name"] for entry in newest if "name" in entry), "")
                return _document(images.get(location, *names_, version)) if version else None
        except errors.NotFound:
            return None

    def _completed(self, verb: str, id: str, begin: Callable[..., LROPoller[Any]], *body: Any) -> Json:
        """Begin an operation on a resource, wait for it to end, and return its result."""
        with translated(verb, id):
            with _malformed_answers():
                polling = Polling(verb, id, self.report)
                poller = begin(*_place(id), *body, polling=polling)
            return _document(poller.result())


def _place(id: str) -> tuple[str, ...]:
    """The arguments with which the SDKs name a resource, or a child of one."""
    return (names.group_of(id), *names.path_of(id))


def _document(model: Any) -> Json:
    """A model as ARM's own JSON, validated; {} for operations without a result."""
    if model is None:
        return {}
    if not hasattr(model, "as_dict"):
        raise errors.Unreadable("the answer is not a document")
    document: Json = documents.understood(model.as_dict(), type(model))
    return document


def _documents(listed: Iterable[Any]) -> list[Json]:
    """All documents of a listing, validated."""
    with _malformed_answers():
        models = list(whole(listed))
    return [_document(model) for model in models]


def _complete(id: str, document: Json) -> Json:
    """The document of the resource `id`, with defaults for what Azure may leave out but every resource has."""
    return {"id": id, "name": names.name_of(id), "properties": {}, **document}


def _located(listed: list[Json]) -> list[Json]:
    """Resources of a listing. Raises Unreadable if one lacks its id or location."""
    return [
        _complete(must(document, "id"), {**document, "location": must(document, "location")})
        for document in listed
    ]


def _named(documents: list[Json]) -> list[Json]:
    """The documents that have a name; the others cannot be referred to."""
    return [document for document in documents if document.get("name")]


@contextmanager
def _malformed_answers() -> Iterator[None]:
    """Turn the SDKs' failures on a malformed answer into Unreadable. Wrap only calls into the SDKs with it."""
    try:
        yield
    except (AttributeError, TypeError, KeyError) as error:
        raise errors.Unreadable(
            f"the answer does not have the form that Azure documents ({error})"
        ) from error
