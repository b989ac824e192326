"""The sandbox: a small Azure on this machine, usable in this process or over HTTPS (see `server.local`).

One function, `Sandbox.handle`, answers all requests. `faults` makes requests fail by rule. Tests may also wrap it in a
function (`intercept`) that sees, delays, loses or repeats requests; the product does not know about it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from coriolis_azure import errors, formats
from coriolis_azure.clock import Clock
from coriolis_azure.sandbox import profiles
from coriolis_azure.sandbox.catalog import DISK_SKUS, FILLED_LATER, VmSpec
from coriolis_azure.sandbox.compute import boots, disks, machines
from coriolis_azure.sandbox.compute.inside import Inside
from coriolis_azure.sandbox.faults import Fault, Faults, failure
from coriolis_azure.sandbox.identity import permissions
from coriolis_azure.sandbox.identity.tokens import Tokens
from coriolis_azure.sandbox.relations import DISKS, MACHINES, STORAGE, disk_entries
from coriolis_azure.sandbox.resource_manager import arm, groups, policies
from coriolis_azure.sandbox.server.certificates import authority_file
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.storage import accounts, blobs, managed, strikes, vhd_machines
from coriolis_azure.sandbox.wire import ArmError, Json, Request, Response
from coriolis_azure.sandbox.world import INSIDE, World

Next = Callable[[Request], Response]

GROUP = "sandbox"
LOCATION = "westeurope"
NETWORK = "sandbox-vnet"
SUBNET_PREFIX = "127.80.0.0/16"
WORKER_SSH_PORT = 22022
# Operations here take seconds instead of minutes, so what Azure counts by the minute is sped up as much.
PACE = 60.0
_NAME_LENGTH = 64  # most characters of a VM's name
STORAGE_ACCOUNT = "sandboxstorage"
_LINUX = VmSpec()


class Sandbox:
    """One sandbox in its directory, which can have only one at a time. Closing it ends its guests.

    `api_profile` makes it an older Azure (see `profiles`). In one second of `clock`, `pace` seconds of Azure's time
    pass; request budgets (see `budgets`) and reservations of NICs use that time. A client's waits on `transport` use
    the same clock.

    Raises InvalidInput if the directory is in use or unusable.
    """

    def __init__(
        self,
        directory: Path,
        *,
        namespaces: bool = True,
        api_profile: str = "latest",
        clock: Clock | None = None,
        pace: float = PACE,
    ) -> None:
        self.directory = directory.absolute()
        self.intercept: Callable[[Request, Next], Response] | None = None
        self.requests: deque[tuple[str, str]] = deque(maxlen=100_000)
        self.faults = Faults()
        self._lock = threading.RLock()
        self._closed = False
        profiles.known(api_profile)
        self._hold = _held(self.directory)
        try:
            self._world = World(
                self.directory,
                arm.VIEWS,
                arm.EFFECTS,
                namespaces=namespaces,
                clock=clock or Clock(),
                pace=pace,
            )
            self._world.api_profile = api_profile
            self._tokens = Tokens(self._world.state.identity)
            # Tests may change these: the identity's roles, required tags, quotas, request budgets, rules of exports.
            self.permissions = self._world.permissions
            self.required_tags = self._world.required_tags
            self.quotas = self._world.quotas
            self.budgets = self._world.budgets
            self.exporting = self._world.exporting
            self._open()
        except BaseException:
            os.close(self._hold)
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        identity = self._world.state.identity
        group_id = f"/subscriptions/{identity.subscription}/resourceGroups/{GROUP}"
        if not self._world.state.resources:
            groups.new_group(self._world, group_id, LOCATION, {})
            network = {
                "location": LOCATION,
                "properties": {
                    "addressSpace": {"addressPrefixes": [SUBNET_PREFIX]},
                    "subnets": [{"name": "default", "properties": {"addressPrefix": SUBNET_PREFIX}}],
                },
            }
            self._ask("PUT", f"{group_id}/providers/Microsoft.Network/virtualNetworks/{NETWORK}", network)
            accounts.new_account(self._world, f"{group_id}/providers/{STORAGE}/{STORAGE_ACCOUNT}", LOCATION)
        self._world.finish_all()
        boots.boot_all(self._world)
        self._world.state.save()

    def close(self) -> None:
        """End all guests and release the directory. Its resources are kept."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._world.guests.close()
            self._world.state.save()
            self._world.blobs.save()
            self._world.contents.save_pages()
            os.close(self._hold)

    # requests

    def handle(self, request: Request) -> Response:
        """Answer one request. Thread-safe."""
        self.requests.append((request.method, request.path))
        intercept = self.intercept
        return intercept(request, self._answer) if intercept else self._answer(request)

    def _answer(self, request: Request) -> Response:
        try:
            response = self._dispatch(request)
        except ArmError as error:
            response = error.response(**_of_network(request, error))
        except errors.CoriolisAzureError as error:
            document = {"code": type(error).__name__, "message": error.message, "remedy": error.remedy}
            response = Response.of(400, {"error": document})
        if response.status == 409:
            with self._lock:
                machines.refused(self._world, request)
        identity = str(uuid.uuid4())
        response.headers.setdefault("x-ms-request-id", identity)
        response.headers.setdefault("x-ms-correlation-request-id", identity)
        if etag := _etag(request, response):
            response.headers["ETag"] = etag
        response.headers.setdefault("x-ms-routing-request-id", f"SANDBOX:{identity}")
        if b'"ResourceNotFound"' in response.body or b'"ResourceGroupNotFound"' in response.body:
            response.headers["x-ms-failure-cause"] = "gateway"
        return response

    def _dispatch(self, request: Request) -> Response:
        first, _, rest = request.path.strip("/").partition("/")
        if first == "metadata" and rest == "endpoints":
            return Response.of(200, self._endpoints(request.base))
        if first == "sandbox":
            self._tokens.check(request.header("Authorization"))
            return self._administer(request, rest)
        return self.faults.around(request, self._asked, self._strike)

    def _asked(self, request: Request) -> Response:
        """The answer of Blob storage, the sign-in service or the resource manager."""
        from_storage = blobs.answer(self._world, self._tokens, request)
        if from_storage is None:
            from_storage = managed.answer(self._world, self._lock, self._tokens, request)
        if from_storage is not None:
            return from_storage
        first, _, rest = request.path.strip("/").partition("/")
        if first.lower() != "subscriptions" and rest:
            return self._tokens.answer(request, first, rest)
        self._tokens.check(request.header("Authorization"))
        return self._manage(request)

    def _manage(self, request: Request) -> Response:
        operation = arm.operation_of(self._world, request.path)
        if operation is not None and operation.polls == 0 and operation.ended is None:
            # The last poll waits for the VM's boot, before the lock is taken, so that no other request waits.
            self._world.guests.wait(operation.target)
        with self._lock:
            if self._closed:
                raise ArmError(503, "ServerUnavailable", "The sandbox is closing.")
            self._world.finish_overdue()
            profiles.check(self._world.api_profile, request)
            permissions.check(self._world, request)
            policies.check(self._world, request)
            try:
                return self._world.budgets.around(
                    request, operation.target if operation else "", partial(arm.answer, self._world)
                )
            finally:
                if request.method != "GET" and "microsoft.network" in request.path.lower():
                    boots.refresh_guests(self._world)
                self._world.state.save()

    def _strike(self, url: str, fault: Fault) -> None:
        """Make the operation at `url` fail or take longer, or what is exported there behave otherwise."""
        if fault.kind == "slow-read":
            self._world.clock.sleep(fault.seconds)
            return
        with self._lock:
            if fault.kind in strikes.STRIKES:
                strikes.STRIKES[fault.kind](self._world, Request("GET", url), fault)
                return
            operation = arm.operation_of(self._world, Request("GET", url).path)
            if operation is not None and operation.ended is None:
                operation.fault = failure(fault)
                operation.polls += 0 if operation.fault else fault.polls

    def _endpoints(self, base: str) -> list[Json]:
        """What the resource manager tells a client about this cloud."""
        return [
            {
                "name": "Sandbox",
                "portal": base,
                "authentication": {
                    "loginEndpoint": base,
                    "audiences": ["https://management.azure.com/"],
                    "tenant": self._world.state.identity.tenant,
                    "identityProvider": "AAD",
                },
                "resourceManager": base,
                "suffixes": {"storage": "core.sandbox.invalid"},
            }
        ]

    def _ask(self, method: str, resource_id: str, body: Json | None = None) -> Json:
        """Make a request of our own and finish it; InvalidInput if it is refused."""
        content = b"" if body is None else json.dumps(body).encode()
        request = Request(method, f"{INSIDE}{resource_id}?api-version=2026-04-01", body=content)
        try:
            response = arm.answer(self._world, request)
        except ArmError as error:
            raise errors.InvalidInput(error.message, code=error.code) from None
        self._world.finish_all()
        document: Json = json.loads(response.body or b"{}")
        return document

    # for people and tests

    def add_vm(
        self,
        name: str,
        os_disk: Path,
        data_disks: Sequence[Path] = (),
        spec: VmSpec = _LINUX,
    ) -> str:
        """Make a running VM whose disks are copies of raw files; return its id. InvalidInput if that is impossible."""
        _check_name(name)
        group_id = f"/subscriptions/{self._world.state.identity.subscription}/resourceGroups/{GROUP}"
        vm_id = f"{group_id}/providers/{MACHINES}/{name}"
        files = [Path(os_disk), *map(Path, data_disks)]
        for file in files:
            _checked_raw(file)
        with self._lock:
            if self._world.state.find(vm_id) is not None:
                raise errors.InvalidInput(
                    f"VM {name!r} already exists in the sandbox",
                    remedy="Choose another name; nothing was created.",
                )
            before = set(self._world.state.resources)
            contents: list[str] = []
            try:
                if spec.unmanaged:
                    vhd_machines.new_machine(self._world, vm_id, LOCATION, spec, files)
                else:
                    contents += (self._world.contents.copied(file) for file in files)
                    self._build_vm(group_id, name, spec, contents)
            except BaseException:
                resources = list(self._world.state.resources.items())
                for resource in [resource for key, resource in resources if key not in before]:
                    self._world.state.remove(resource)
                for content in contents:
                    self._world.contents.remove(content)
                raise
            finally:
                self._world.state.save()
        return vm_id

    def _build_vm(self, group_id: str, name: str, spec: VmSpec, contents: list[str]) -> None:
        provider = f"{group_id}/providers/Microsoft.Network"
        top: Json = {"location": LOCATION, **({"zones": [spec.zone]} if spec.zone else {})}
        firewall = self._ask("PUT", f"{provider}/networkSecurityGroups/{name}-nsg", {"location": LOCATION})
        address = self._ask(
            "PUT",
            f"{provider}/publicIPAddresses/{name}-ip",
            {**top, "sku": {"name": "Standard"}, "properties": {"publicIPAllocationMethod": "Static"}},
        )
        inner = {
            "subnet": {"id": f"{provider}/virtualNetworks/{NETWORK}/subnets/default"},
            "publicIPAddress": {"id": address["id"]},
        }
        interface = self._ask(
            "PUT",
            f"{provider}/networkInterfaces/{name}-nic",
            {
                "location": LOCATION,
                "properties": {
                    "ipConfigurations": [{"name": "ipconfig1", "properties": inner}],
                    "networkSecurityGroup": {"id": firewall["id"]},
                },
            },
        )
        os_disk, *data_disks = [
            self._build_disk(f"{group_id}/providers/Microsoft.Compute/disks/{name}", spec, index, content)
            for index, content in enumerate(contents)
        ]
        attached = [
            {"lun": lun, "createOption": "Attach", "caching": "ReadOnly", "managedDisk": {"id": disk.id}}
            for lun, disk in enumerate(data_disks)
        ]
        os_entry = {"createOption": "Attach", "osType": spec.system, "managedDisk": {"id": os_disk.id}}
        properties = {
            "hardwareProfile": {"vmSize": spec.size},
            "storageProfile": {"osDisk": os_entry, "dataDisks": attached},
            "networkProfile": {"networkInterfaces": [{"id": interface["id"]}]},
        }
        self._ask(
            "PUT",
            f"{group_id}/providers/{MACHINES}/{name}",
            {**top, "tags": spec.tags, "properties": properties},
        )
        machine = self._machine(name)
        kind = "linuxConfiguration" if spec.system == "Linux" else "windowsConfiguration"
        machine.properties["osProfile"] = {"computerName": name, "adminUsername": "azureuser", kind: {}}

    def _build_disk(self, prefix: str, spec: VmSpec, index: int, content: str) -> Resource:
        """Disk `index` of a new VM, 0 being that of the OS. `prefix`: what the ids of its disks begin with."""
        creation: Json = {"creationData": {"createOption": "FromImage" if index == 0 else "Empty"}}
        if index and spec.data_sku in FILLED_LATER:
            creation["creationData"]["logicalSectorSize"] = 512
        if index == 0:
            creation |= {"osType": spec.system, "hyperVGeneration": "V2"}
            creation["supportedCapabilities"] = {"architecture": "x64", "diskControllerTypes": "SCSI, NVMe"}
        suffix, sku, tier = (
            ("os", "Premium_LRS", "Premium")
            if index == 0
            else (f"data-{index - 1}", spec.data_sku, DISK_SKUS[spec.data_sku])
        )
        top: Json = {"sku": {"name": sku, "tier": tier}, **({"zones": [spec.zone]} if spec.zone else {})}
        return disks.new_disk(self._world, f"{prefix}-{suffix}", LOCATION, content, creation, **top)

    def write(self, name: str, disk: str | int, file: Path) -> None:
        """Replace the content of a VM's disk ("os" or a LUN); a larger file grows the disk.

        InvalidInput for an unknown VM or disk, and for a smaller file.
        """
        file = Path(file)
        size = _checked_raw(file)
        with self._lock:
            self._world.finish_all()
            machine = self._machine(name)
            vhd = self._vhd(machine, disk)
            if vhd is not None:
                metadata = vhd_machines.image(self._world, vhd).metadata
                vhd_machines.put_image(self._world, vhd, file, metadata)
                return
            managed = self._disk(machine, disk)
            old = managed.hidden["content"]
            if size < self._world.contents.size(old):
                raise errors.InvalidInput(
                    f"{file} has {size} bytes, disk {disk} of VM {name!r} has "
                    f"{self._world.contents.size(old)}",
                    remedy="Use a file at least as large as the disk: Azure's disks cannot shrink.",
                )
            managed.hidden["content"] = self._world.contents.copied(file)
            self._world.release_content(old)
            self._world.state.save()

    def resources(self) -> list[Json]:
        """Every resource with id, type and tags, sorted, without anything that changes by itself."""
        with self._lock:
            self._world.finish_all()
            self._world.state.save()
            rows = [
                {
                    "id": resource.id,
                    "type": resource.type,
                    "tags": dict(sorted((resource.document.get("tags") or {}).items())),
                }
                for resource in groups.tracked(self._world)
            ]
        return sorted(rows, key=lambda row: str(row["id"]).lower())

    def content(self, name: str, disk: str | int) -> Path:
        """The file with the present bytes of a VM's disk. Do not write to it."""
        with self._lock:
            machine = self._machine(name)
            vhd = self._vhd(machine, disk)
            if vhd is not None:
                return self._world.blobs.contents.path(vhd_machines.image(self._world, vhd).file)
            return self._world.contents.path(self._disk(machine, disk).hidden["content"])

    def disk(self, name: str, disk: str | int = "os") -> Inside:
        """A managed disk of a VM ("os" or a LUN), or the one with this ARM id, to read and write as the VM would."""
        with self._lock:
            resource = self._world.state.find(name)
            if resource is None or resource.type != DISKS:
                resource = self._disk(self._machine(name), disk)
            return Inside(self._world, self._lock, resource)

    @property
    def storage(self) -> accounts.Inside:
        """The contents of the storage accounts, for tests to read and change, bypassing all rules."""
        return accounts.Inside(self._world)

    def _machine(self, name: str) -> Resource:
        """The one VM with this name or ARM id."""
        vms = list(self._world.state.of_type(MACHINES))
        matching = [vm for vm in vms if name.lower() in (vm.name.lower(), vm.id.lower())]
        if not matching:
            names = ", ".join(vm.name for vm in vms) or "none"
            raise errors.InvalidInput(f"VM {name!r} does not exist in the sandbox; its VMs are: {names}")
        if len(matching) > 1:
            ids = " or ".join(vm.id for vm in matching)
            raise errors.InvalidInput(
                f"{len(matching)} VMs of the sandbox have the name {name!r}",
                remedy=f"Give the ARM id of the one you mean: {ids}.",
            )
        return matching[0]

    def _vhd(self, machine: Resource, disk: str | int) -> str | None:
        """The VHD blob of a VM's disk, as account/container/name; None if it is a managed disk."""
        entries = [entry for entry in disk_entries(machine) if str(entry.get("lun", "os")) == str(disk)]
        return str(entries[0]["vhd"]["uri"]) if entries and "vhd" in entries[0] else None

    def _disk(self, machine: Resource, disk: str | int) -> Resource:
        for entry in disk_entries(machine):
            if str(entry.get("lun", "os")) == str(disk) and "managedDisk" in entry:
                managed = self._world.state.find(entry["managedDisk"]["id"])
                if managed is not None:
                    return managed
        luns = ", ".join(
            str(entry.get("lun", "os")) for entry in disk_entries(machine) if "managedDisk" in entry
        )
        raise errors.InvalidInput(
            f"VM {machine.name!r} has no managed disk {disk!r}; it has: {luns or 'none'}"
        )

    def _administer(self, request: Request, action: str) -> Response:
        """The routes through which `server.local` controls a sandbox that is being served."""
        body: dict[str, Any] = json.loads(request.body or b"{}")
        if (request.method, action) == ("GET", "resources"):
            return Response.of(200, self.resources())
        if (request.method, action) == ("POST", "vms"):
            body["os_disk"] = Path(body["os_disk"])
            body["data_disks"] = [Path(file) for file in body["data_disks"]]
            body["spec"] = VmSpec(**body["spec"])
            return Response.of(200, {"id": self.add_vm(**body)})
        if (request.method, action) == ("POST", "write"):
            if body["offset"] is None:
                self.write(body["name"], body["disk"], Path(body["file"]))
            else:
                self.disk(body["name"], body["disk"]).write(body["offset"], Path(body["file"]).read_bytes())
            return Response.of(200, {})
        if (request.method, action) == ("POST", "clear"):
            self.disk(body["name"], body["disk"]).clear(body["offset"], body["length"])
            return Response.of(200, {})
        if action == "faults" and request.method == "POST":
            return Response.of(200, self.faults.add(body.pop("kind", ""), **body).to_json())
        if action == "faults" and request.method == "DELETE":
            self.faults.clear()
        if action == "faults":
            return Response.of(200, self.faults.listed())
        if (request.method, action) == ("PUT", "roles"):
            self.permissions[:] = _checked_roles(body.get("roles"))
            return Response.of(200, {})
        raise ArmError(404, "NotFound", f"The sandbox has no {request.method} /sandbox/{action}.")

    # settings

    def transport(self) -> Any:
        """A transport for Azure's SDK clients and credentials that calls this sandbox without sockets."""
        from coriolis_azure.sandbox.server.transport import in_process

        return in_process(self.handle, self._world.clock.sleep)

    def connection_info(self, base: str = INSIDE) -> Json:
        """The connection settings of this sandbox at the URL `base`."""
        self._world.base = base
        identity = self._world.state.identity
        return {
            "subscription_id": identity.subscription,
            "tenant": identity.tenant,
            "service_principal_credentials": {
                "client_id": identity.client_id,
                "client_secret": identity.client_secret,
            },
            "default_resource_group": GROUP,
            "cloud_profile": "CustomCloud",
            "custom_cloud_properties": {
                "endpoints": {
                    "active_directory_url": base,
                    "resource_manager_endpoint": base,
                    "management_endpoint": "https://management.azure.com/",
                    "active_directory_resource_id": "https://management.azure.com/",
                },
                "suffixes": {"storage_endpoint": "core.sandbox.invalid"},
                "api_profile": self._world.api_profile,
            },
            "ca_bundle": str(authority_file(self.directory)),
        }

    def environment(self) -> Json:
        """The source environment of this sandbox."""
        return {"location": LOCATION, "resource_group": GROUP, "export_worker_ssh_port": WORKER_SSH_PORT}


def _held(directory: Path) -> int:
    """Lock the directory and return the descriptor that holds the lock. InvalidInput if it is unavailable."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        hold = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise errors.InvalidInput(
            f"{directory} cannot be the directory of a sandbox: {error.strerror}",
            remedy="Name a directory that can be created and written to.",
        ) from None
    try:
        fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(hold)
        raise errors.InvalidInput(
            f"another sandbox is using {directory}", remedy="Stop it first, or name another directory."
        ) from None
    return hold


def _checked_roles(roles: Any) -> list[Json]:
    """Convert role definitions to the form of the permissions list; InvalidInput for an invalid one."""
    checked = []
    for definition in roles if isinstance(roles, list) else [roles]:
        fields = (
            {str(key).lower(): value for key, value in definition.items()}
            if isinstance(definition, dict)
            else {}
        )
        kinds = ("actions", "notActions", "dataActions", "notDataActions")
        role = {kind: fields.get(kind.lower()) or [] for kind in kinds}
        if not role["actions"] or not all(
            isinstance(actions, list) and all(isinstance(action, str) for action in actions)
            for actions in role.values()
        ):
            raise errors.InvalidInput(
                "a role definition must have Actions, a list of names",
                remedy="Use the output of `coriolis-azure role`.",
            )
        checked.append(role)
    return checked


def _etag(request: Request, response: Response) -> str:
    """The ETag of a network resource, which Azure also sends as a header; "" for other answers."""
    if "/providers/microsoft.network/" not in request.path.lower() or b'"etag"' not in response.body:
        return ""
    return str(json.loads(response.body).get("etag", ""))


def _of_network(request: Request, error: ArmError) -> Json:
    """The extra fields of the network provider's refusals; those of the gateway in front of it have none."""
    own = "/providers/microsoft.network/" in request.path.lower() and error.status == 400
    return {"details": []} if own else {}


def _check_name(name: str) -> None:
    """InvalidInput for a name that Azure refuses for a VM, or for the NIC and disks named after it."""
    if len(name) > _NAME_LENGTH or not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_])?", name):
        raise errors.InvalidInput(
            f"{name!r} cannot be the name of a VM in Azure",
            remedy=f"Use up to {_NAME_LENGTH} letters, digits, hyphens, underscores and periods; begin with a letter "
            "or digit, and do not end with a hyphen or period.",
        )


def _checked_raw(file: Path) -> int:
    """The size of a raw disk file; InvalidInput if it cannot be a disk."""
    try:
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            raise errors.InvalidInput(f"{file} is not a file")
        with file.open("rb") as content:
            head = content.read(formats.HEAD)
            content.seek(max(0, size - formats.TAIL))
            tail = content.read()
    except OSError as error:
        raise errors.InvalidInput(f"{file} cannot be read: {error.strerror}") from None
    if wrapped := formats.wrapped(head, tail):
        raise errors.InvalidInput(
            f"{file} is a {wrapped} image, not a raw one", remedy=formats.remedy(wrapped)
        )
    if size == 0 or size % 512:
        raise errors.InvalidInput(
            f"{file} has {size} bytes, which is not a multiple of 512",
            remedy="Use a raw disk image whose size is a multiple of 512 bytes.",
        )
    return size
