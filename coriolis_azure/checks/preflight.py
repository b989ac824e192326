"""Everything that can be known before anything is created or shut down: all findings at once, each with its remedy.

Nothing is written in Azure. Every question is asked even where others fail; only without a sign-in are those to Azure
left out, as all would get the same answer. What is asked for the check's sake alone (permissions, locks, quota, API
versions) is a warning where it cannot be known: the work may be possible all the same.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Literal, TypeVar

from ..azure import names, permissions, skus
from ..azure.blobs import Storage
from ..azure.client import Azure
from ..errors import CoriolisAzureError, Denied, InvalidInput
from ..events import Event, Notice, Report, Step, amount
from ..machine import cloning, inspection, listing
from ..model import Disk, Json, Machine, at
from ..run import cleanup
from ..settings import Environment
from ..worker import images, launch, sizes
from ..worker import network as worker_network

Severity = Literal["error", "warning", "fine"]
T = TypeVar("T")

# Azure keeps five addresses of every subnet for itself.
_RESERVED_ADDRESSES = 5
_UNLIMITED = 1 << 60
# Azure Policy wants to know the version that a resource is written in; what is asked here is the same in all.
_ANY_VERSION = "2024-07-01"
# The names that locations use for the quota of public addresses; a Standard address counts in each.
_ADDRESS_QUOTAS = (
    *("PublicIPAddresses", "StaticPublicIPAddresses"),
    *("StandardSkuPublicIpAddresses", "IPv4StandardSkuPublicIpAddresses"),
)
_UPLOADING = {"ReadyToUpload", "ActiveUpload"}
_HIBERNATED = {"Frozen", "ActiveSASFrozen"}
_EXPORTING = {"ActiveSAS", "ActiveSASFrozen"}
_NEED = {permissions.SHUTDOWN: "runs that shut the VM down need", permissions.POOL: "a pool of workers needs"}


@dataclass(frozen=True)
class Finding:
    """What a step of a run would meet. `remedy` is empty where nothing is to be done."""

    step: str
    severity: Severity
    text: str
    remedy: str = ""

    @property
    def told(self) -> str:
        """The text and the remedy as sentences."""
        return f"{self.text.removesuffix('.')}. {self.remedy}".strip()

    def to_json(self) -> Json:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Checked:
    """All findings; the machine, where one was named and could be read."""

    findings: tuple[Finding, ...]
    machine: Machine | None = None

    @property
    def errors(self) -> list[Finding]:
        """The findings with which a run would fail."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against a run."""
        return not self.errors

    def require(self) -> None:
        """InvalidInput with all errors and remedies, if there are any."""
        if not self.ok:
            raise InvalidInput(
                [finding.text for finding in self.errors],
                remedy=" ".join(dict.fromkeys(finding.remedy for finding in self.errors)) or None,
            )

    def checked_machine(self) -> Machine:
        """The machine, if nothing speaks against its run; else InvalidInput."""
        self.require()
        if self.machine is None:
            raise InvalidInput("no VM was named")
        return self.machine

    def to_json(self) -> Json:
        """Plain JSON values."""
        return {"findings": [finding.to_json() for finding in self.findings], "ok": self.ok}


def check(
    azure: Azure,
    environment: Environment,
    vm: str | None,
    report: Report,
    storage: Storage | None = None,
    *,
    strict: bool = False,
    uses: Collection[str] = (),
    may_use: Collection[str] = (permissions.SHUTDOWN, permissions.POOL),
) -> Checked:
    """Check connection and environment, and the VM `vm` (a name or an ARM id) where one is named.

    A missing permission without which runs do their work all the same is a warning, and an error where the check is
    `strict`: then nothing may be missing of what `permissions.role` holds.

    `uses` and `may_use`: features of `permissions` that the caller chooses, or may choose later.
    """
    asked = _Questions(azure, environment, report, storage, strict=strict, uses=uses, may_use=may_use)
    if asked.connection():
        asked.subscription()
        asked.group()
        asked.location()
        asked.container()
        if vm is not None:
            asked.vm(vm)
        asked.permitted()
        asked.locks()
        asked.policy()
        size = asked.size()
        if size is not None:
            asked.capacity(size)
        asked.image()
        asked.encryption()
        asked.network()
        asked.network_quota()
        asked.leftovers()
        asked.api_versions()
    asked.exposure()
    return Checked(tuple(asked.findings), asked.machine)


def refuse(
    azure: Azure, environment: Environment, machine: Machine, disks: tuple[Disk, ...], report: Report
) -> None:
    """InvalidInput where it is certain that a run of `machine` would fail after it has made something.

    What `inspection` and `worker.launch` refuse in time is not asked again. Permissions and policies are for `check`:
    a role may be given on a single resource, and Azure Policy is asked about resources that are not complete.
    """
    asked = _Questions(azure, environment, report, None, strict=False, uses=(), may_use=())
    asked.machine, asked.disks = machine, disks
    asked.subscription()
    asked.locks()
    size = asked.size()
    if size is not None:
        asked.capacity(size)
    asked.network()
    asked.network_quota()
    Checked(tuple(asked.findings)).require()


class _Questions:
    """The questions, in the order of a run's steps, and what was found."""

    def __init__(
        self,
        azure: Azure,
        environment: Environment,
        report: Report,
        storage: Storage | None,
        *,
        strict: bool,
        uses: Collection[str],
        may_use: Collection[str],
    ) -> None:
        self._storage, self._strict = storage, strict
        self._uses, self._may_use = uses, may_use
        self._azure, self._environment, self._report = azure, environment, report
        self._scope = f"/subscriptions/{azure.subscription}"
        self._group = f"{self._scope}/resourceGroups/{environment.resource_group}"
        self._held: dict[str, list[Json] | None] = {}
        self.findings: list[Finding] = []
        self.machine: Machine | None = None
        self.disks: tuple[Disk, ...] = ()

    # The connection

    def connection(self) -> bool:
        """Whether Azure knows us; without that no other question has an answer of its own."""
        try:
            self._azure.validate()
        except Denied as error:
            self._failed("connect", error)
            return error.facts.get("status") == 403
        except CoriolisAzureError as error:
            self._failed("connect", error)
            return False
        self._fine("connect", f"signed in, subscription {self._azure.subscription} answers")
        return True

    def subscription(self) -> None:
        """The subscription's state: in some nothing can be made."""
        state = self._asked("connect", self._azure.subscription_state, optional=True)
        if state in {"Disabled", "Deleted", "Expired"}:
            self._error(
                "connect",
                f"the subscription is {state}: nothing can be made in it",
                "Enable the subscription again.",
            )
        elif state in {"Warned", "PastDue"}:
            self._warn(
                "connect", f"the subscription is {state}", "Settle its bills before Azure disables it."
            )

    def group(self) -> None:
        """The resource group."""
        name = self._environment.resource_group
        if self._asked("connect", lambda: self._azure.group(name)):
            self._fine("connect", f"resource group {name} exists")

    def location(self) -> None:
        """Whether the subscription may have VMs in the location."""
        offered = self._asked("connect", self._azure.locations, optional=True) or ()
        self._asked("connect", lambda: listing.check_location(self._environment.location, offered))

    def permitted(self) -> None:
        """The actions of each step, each where it must be allowed."""
        chosen = permissions.features(self._environment).union(self._uses, self._may_use)
        if any(disk.encryption_set for disk in self.disks):
            chosen.add(permissions.CUSTOMER_KEYS)
        places = self._places()
        lacking: dict[tuple[str, str], tuple[permissions.Action, list[str]]] = {}
        everything = True
        # Two steps may need the same action: the one that cannot do without it counts.
        for action in sorted(permissions.needed(chosen), key=self._lax, reverse=True):
            allowed = {scopes[-1]: self._allowed(action, scopes) for scopes in places.get(action.scope, ())}
            everything = everything and all(allowed.values())
            if denied := [scope for scope, answer in allowed.items() if answer is False]:
                lacking[action.name, action.scope] = (action, denied)
        for action, denied in lacking.values():
            self._missing(action, denied)
        if everything:
            self._fine("permissions", "the identity may do everything that the steps need")

    def _places(self) -> dict[str, list[tuple[str, ...]]]:
        """The resources on which each kind of actions must be allowed, each after the wider scopes to ask first."""
        environment, machine = self._environment, self.machine
        places: dict[str, list[tuple[str, ...]]] = {
            permissions.GROUP: [(self._group,)],
            permissions.SUBSCRIPTION: [(self._scope,)],
        }
        if machine is None:
            places |= {permissions.VM: [(self._group,)], permissions.DISK: [(self._group,)]}
        else:
            managed = [disk.id for disk in self.disks if not disk.unmanaged]
            places[permissions.VM] = [self._and_group(machine.id)]
            places[permissions.DISK] = [self._and_group(id) for id in managed]
            keys = sorted({disk.encryption_set for disk in self.disks if disk.encryption_set})
            places[permissions.DISK_KEYS] = [(id,) for id in keys]
        subnet = self._subnet_id() if environment.export_network else None
        if subnet:
            network = subnet.partition("/subnets/")[0]
            places |= {permissions.NETWORK: [(network,)], permissions.SUBNET: [(network, subnet)]}
        if environment.export_worker_disk_encryption_set:
            places[permissions.ENCRYPTION_SET] = [(environment.export_worker_disk_encryption_set,)]
        if environment.storage_account_name:
            account = f"{self._group}/providers/Microsoft.Storage/storageAccounts/{environment.storage_account_name}"
            container = f"{account}/blobServices/default/containers/{environment.storage_container_name}"
            places |= {permissions.ACCOUNT: [(account,)], permissions.CONTAINER: [(account, container)]}
        return places

    def _and_group(self, id: str) -> tuple[str, str]:
        """A resource after its group, where most roles are assigned: many disks need one question only."""
        group = id.partition("/providers/")[0]
        return self._group if names.same(group, self._group) else group, id

    def _allowed(self, action: permissions.Action, scopes: Sequence[str]) -> bool | None:
        """Whether a role at one of the scopes allows an action; None where Azure does not tell."""
        known = True
        for scope in scopes:
            held = self._roles(scope)
            if held is not None and permissions.granted(held, action):
                return True
            known = known and held is not None
        return False if known else None

    def _roles(self, scope: str) -> list[Json] | None:
        """What the identity may do at a scope, asked once; None where Azure does not tell."""
        if scope not in self._held:
            self._held[scope] = self._asked(
                "permissions", partial(self._azure.permissions, scope), optional=True
            )
        return self._held[scope]

    def _lax(self, action: permissions.Action) -> bool:
        """Whether there are runs that do their work without an action."""
        return action.optional or action.feature in self._may_use

    def _missing(self, action: permissions.Action, scopes: Sequence[str]) -> None:
        remedy = (
            f"Give the identity {action.name} on {' and '.join(scopes)} (`coriolis-azure role` prints a role "
            "with all)."
        )
        text = f"the identity lacks {action.name} on the {action.scope}: {action.why}"
        if self.machine is None and action.scope in permissions.OF_THE_VM:
            text = f"the identity lacks {action.name} on the resource group: {action.why}"
            self._warn(action.step, f"{text}. It may have it on a VM that is named", remedy)
        elif self._strict or not self._lax(action):
            self._error(action.step, text, remedy)
        elif action.optional:
            self._warn(action.step, f"{text}. Runs work without", remedy)
        else:
            self._warn(action.step, f"{text}. Only {_NEED[action.feature]} it", remedy)

    def locks(self) -> None:
        """Locks that would stop a run, or its cleanup."""
        found: dict[str, Json] = {}
        for scope in (self._group, self._scope):
            listed = self._asked("clean up", partial(self._azure.locks, scope), optional=True)
            found |= {lock["id"].lower(): lock for lock in listed or ()}
        for lock in found.values():
            self._lock(lock)

    def policy(self) -> None:
        """What Azure Policy would refuse of what a run makes; an older Azure has no such question."""
        if not self._azure.is_modern:
            return
        kinds = {"snapshot": "snapshot-os", "disk": "clone-os", "nsg": "nsg", "nic": "nic", "vm": "worker"}
        if self._environment.export_worker_use_fip:
            kinds["ip"] = "ip"
        if not self._environment.export_network:
            kinds["vnet"] = "vnet"
        refused: dict[str, list[str]] = {}
        fields: set[str] = set()
        for kind, role in kinds.items():
            told = self._asked("worker", partial(self._restrictions, kind, role), optional=True)
            if told is None:
                return
            for policy in _refusing(told):
                refused.setdefault(policy, []).append(names.TYPES[kind])
            fields |= {
                str(at(each, "field", "")) for each in at(told, "fieldRestrictions", []) if _demanded(each)
            }
        tags = sorted(field.partition(".")[2] for field in fields if field.startswith("tags."))
        for policy, types in refused.items():
            self._error(
                "worker",
                f"Azure Policy refuses {', '.join(types)} as they would be made: {policy}",
                f"Give the tags {', '.join(tags)} in the tags of the source environment."
                if tags
                else "Set tags, network or size as the policy demands, or have the resource group exempted from it.",
            )

    def _restrictions(self, kind: str, role: str) -> Json:
        run = "0" * 8
        content = {
            "type": names.TYPES[kind],
            "name": names.resource(run, role),
            "location": self._environment.location,
            "tags": names.tags(run, role, "", datetime.now(timezone.utc), self._environment.tags),
        }
        if kind == "vm" and self._environment.export_worker_encryption_at_host:
            content["properties"] = {"securityProfile": {"encryptionAtHost": True}}
        version = self._azure.api_versions.get(names.TYPES[kind].lower(), _ANY_VERSION)
        return self._azure.policy_restrictions(self._environment.resource_group, content, version)

    def _lock(self, lock: Json) -> None:
        """A finding for a lock over what a run makes, or over what it uses."""
        scope = lock["id"].partition("/providers/Microsoft.Authorization/locks")[0]
        level, name = at(lock, "properties.level", "?"), lock.get("name", "?")
        told = f"the lock {name} ({level}) on {scope}"
        remedy = "Ask its owner to remove the lock for the time of the runs. It is never removed by us."
        if names.same(scope, self._group) or names.same(scope, self._scope):
            if level == "ReadOnly":
                self._error("worker", f"{told} forbids to make anything", remedy)
            else:
                self._error("clean up", f"{told} forbids to delete what a run makes", remedy)
            return
        used = [self.machine.id, *(disk.id for disk in self.disks)] if self.machine else []
        if self._environment.export_network:
            used.append((self._subnet_id() or "-").partition("/subnets/")[0])
        if level == "ReadOnly" and any(names.same(scope, id) for id in used):
            self._warn("snapshot", f"{told} may forbid to use it: to read a disk, shut down or join", remedy)

    def container(self) -> None:
        """The container of the settings, where they name one."""
        storage = self._storage
        if storage is None or not self._environment.storage_account_name:
            return
        container = self._asked("storage", storage.interim)
        exists = self._asked("storage", container.exists) if container is not None else None
        if container is not None and exists is not None:
            self._fine("storage", f"{container.url} {'is there' if exists else 'is made when it is needed'}")

    # The machine

    def vm(self, vm: str) -> None:
        """The VM, its disks, and what a person should know before moving it."""
        self._report(Step("inspect", vm))
        group, here = self._environment.resource_group, self._environment.location
        excluded = self._environment.exclude_disks
        self.machine = self._asked(
            "inspect", lambda: inspection.read(self._azure, group, here, vm, self._storage, excluded)
        )
        if self.machine is None:
            return
        machine = self.machine
        for caveat in machine.caveats:
            self._warn("inspect", caveat)
        chosen = self._asked("inspect", lambda: inspection.chosen(machine, excluded))
        self.disks = chosen if chosen is not None else machine.disks
        if chosen is not None:
            total = sum(disk.size_bytes for disk in chosen)
            out = f", {len(machine.disks) - len(chosen)} left out" if len(chosen) < len(machine.disks) else ""
            self._fine("inspect", f"VM {machine.name}: {len(chosen)} disk(s), {amount(total)} in all{out}")
        for disk in self.disks:
            if disk.unmanaged:
                self._fine("snapshot", f"{disk.name} is a VHD blob: {disk.id}")
                continue
            document = self._asked("snapshot", partial(self._azure.get, disk.id))
            if document is not None:
                self._disk(disk, document)
        for id in sorted({disk.encryption_set for disk in self.disks if disk.encryption_set}):
            if self._asked("clone", partial(self._azure.encryption_set, id)):
                self._fine("clone", f"disk encryption set {names.name_of(id)} can be read")

    def _disk(self, disk: Disk, document: Json) -> None:
        """What a disk's state and access settings mean for its snapshot and its clone."""
        state = at(document, "properties.diskState", "")
        told = f"{disk.name} ({names.name_of(disk.id)})"
        if state in _UPLOADING:
            self._error(
                "snapshot",
                f"{told} is waiting for an upload ({state}): it cannot be snapshotted",
                "End the upload, or leave the disk out with exclude_disks.",
            )
        if state in _HIBERNATED:
            self._warn(
                "snapshot",
                f"{told} belongs to a hibernated VM: the guest's memory is not copied",
                "Start the VM and shut it down, for a replica that boots cleanly.",
            )
        if state in _EXPORTING:
            self._warn(
                "snapshot",
                f"{told} is being exported by somebody (it has an active shared access signature)",
                "Wait until that has ended or revoke the access; until then the VM cannot be started.",
            )
        if cloning.copied_in_background(disk):
            self._warn(
                "snapshot",
                f"{told} is of the type {disk.sku}: in each run Azure copies its snapshot in the background before it "
                f"can be used, about {_duration(cloning.background_seconds(disk))} if the disk is full and Azure "
                f"copies {amount(cloning.BACKGROUND_RATE)}/s (an estimate: it promises no rate)",
                "Plan the run with that time, or leave the disk out with exclude_disks.",
            )
        if cloning.clone_sku(disk) == "PremiumV2_LRS" and self.machine and not self.machine.zones:
            self._warn(
                "clone",
                f"{told} has sectors of 4096 bytes, and no zone: its copy is a Premium SSD v2 disk, which in most "
                "locations can be attached within a zone only",
                "Leave the disk out with exclude_disks if the run fails when it attaches the copy.",
            )
        access = at(document, "properties.networkAccessPolicy", "AllowAll")
        if access != "AllowAll" or at(document, "properties.dataAccessAuthMode", "None") != "None":
            self._fine("snapshot", f"{told} may not be exported ({access}); the worker reads it all the same")

    # The worker

    def size(self) -> Json | None:
        """The size that the worker would get, told with rounds and throughput; its description."""
        needed = sizes.needs(self.machine, self.disks) if self.machine else sizes.Needs()
        told: list[Event] = []
        here = self._environment.location
        size = self._asked(
            "worker", lambda: sizes.choose_size(self._azure, needed, self._environment, told.append)
        )
        if size is None:
            return None
        if told:
            why = _why_not(self._azure, self._environment, needed.zone)
            self._warn(
                "worker", f"{_texts(told)} ({why})", "Set export_worker_size to a size that can be used."
            )
        zone = f", zone {needed.zone}" if needed.zone else ""
        self._fine("worker", f"size {size.name} is offered in {here}{zone}")
        if len(self.disks) > size.slots:
            rounds = -(-len(self.disks) // size.slots)
            self._fine(
                "copy", f"{len(self.disks)} disks, the worker holds {size.slots}: copied in {rounds} rounds"
            )
        sku = next(sku for sku in self._azure.sizes(here) if sku["name"] == size.name)
        rate = skus.capability(sku, "UncachedDiskBytesPerSecond")
        total = sum(disk.size_bytes for disk in self.disks)
        if rate and total:
            self._fine(
                "copy",
                f"{size.name} reads {amount(rate)}/s: {_duration(total / rate)} for a full read of {amount(total)}",
            )
        return sku

    def capacity(self, sku: Json) -> None:
        """The cores that the quota leaves."""
        left = self._left(lambda: self._azure.compute_usages(self._environment.location))
        if left is None:
            return
        cores = int(skus.capability(sku, "vCPUs")) or 1
        remedy = "Free some, ask for a higher quota, or choose a smaller export_worker_size."
        for name, what in (("cores", "vCPUs of the location"), ("virtualMachines", "VMs of the location")):
            wanted = 1 if name == "virtualMachines" else cores
            if left.get(name.lower(), _UNLIMITED) < wanted:
                rest = left[name.lower()]
                # Where some cores are left, a run tries smaller sizes.
                tell = self._warn if rest > 0 else self._error
                tell("worker", f"the quota of {what} leaves {rest}, the worker needs {wanted}", remedy)
        for name, wanted in self._disks_needed(int(skus.capability(sku, "MaxDataDiskCount"))).items():
            if left.get(name.lower(), _UNLIMITED) < wanted:
                rest = left[name.lower()]
                self._error(
                    "clone",
                    f"the quota of {name} in {self._environment.location} leaves {rest}, a run needs {wanted} at once",
                    "Delete unused disks and snapshots, ask for a higher quota, or leave disks out with exclude_disks.",
                )
        family = str(sku.get("family", ""))
        rest = left.get(family.lower(), _UNLIMITED)
        if rest < cores:
            self._warn(
                "worker",
                f"the quota of {family} leaves {rest} vCPUs, {sku['name']} needs {cores}: another size will be tried",
                "Ask for a higher quota, or choose an export_worker_size of another family.",
            )

    def _disks_needed(self, slots: int) -> dict[str, int]:
        """How many disks and snapshots a run has at once, by the names of their quotas: clones are made in rounds."""
        managed = [disk for disk in self.disks if not disk.unmanaged]
        kinds = [cloning.clone_sku(disk).removesuffix("_LRS").replace("_", "") for disk in managed]
        needed = {f"{kind}DiskCount": min(kinds.count(kind), slots) for kind in kinds}
        own = "StandardSSDDiskCount" if self._azure.is_modern else "StandardDiskCount"
        needed[own] = needed.get(own, 0) + 1  # the worker's own
        return {**needed, "StandardSnapshotCount": len(managed)} if managed else needed

    def image(self) -> None:
        """The worker's image."""
        told: list[Event] = []
        image = self._asked(
            "worker", lambda: images.choose_image(self._azure, self._environment, told.append)
        )
        if told:
            self._warn("worker", _texts(told), "Set export_worker_image to an image that exists.")
        if image is not None:
            self._fine("worker", f"image {image} exists")

    def encryption(self) -> None:
        """The disk encryption set of the settings: there, in the location."""
        found = self._asked("worker", lambda: launch.check_encryption(self._azure, self._environment))
        if found:
            name = names.name_of(self._environment.export_worker_disk_encryption_set)
            self._fine("worker", f"disk encryption set {name} can be read, for the worker's own disk")

    def network(self) -> None:
        """The subnet of the settings: there, with room for a NIC."""
        if not self._environment.export_network:
            return
        subnet = self._asked("worker", lambda: worker_network.check_network(self._azure, self._environment))
        if subnet is None:
            return
        name = names.network_of(subnet["id"])
        services = [
            at(one, "properties.serviceName", "?") for one in at(subnet, "properties.delegations", [])
        ]
        if services:
            self._error(
                "worker",
                f"subnet {name} is delegated to {', '.join(services)}: no VM can be in it",
                "Choose an export_network that is not delegated.",
            )
        free = _free(subnet)
        if free < 1:
            # Of a subnet with IPv6, Azure does not tell which of its NICs take an IPv4 address.
            tell = self._warn if _has_ipv6(subnet) else self._error
            tell("worker", f"subnet {name} has no free address", "Choose a larger export_network.")
        else:
            self._fine("worker", f"subnet {name} has {free} free addresses")
        firewall = at(subnet, "properties.networkSecurityGroup.id")
        if firewall:
            port = self._environment.export_worker_ssh_port
            self._warn(
                "worker",
                f"subnet {name} has a firewall of its own ({names.name_of(firewall)}), besides the worker's",
                f"See that its rules let this host reach TCP port {port}.",
            )

    def network_quota(self) -> None:
        """The addresses, NICs and networks that the quota leaves."""
        left = self._left(lambda: self._azure.network_usages(self._environment.location))
        if left is None:
            return
        wanted = ["NetworkInterfaces", "NetworkSecurityGroups"]
        if self._environment.export_worker_use_fip:
            wanted += _ADDRESS_QUOTAS
        if not self._environment.export_network:
            wanted.append("VirtualNetworks")
        for name in wanted:
            if left.get(name.lower(), _UNLIMITED) < 1:
                self._error(
                    "worker",
                    f"the quota of {name} in {self._environment.location} is used up",
                    "Delete some, or ask for a higher quota; an export_network and no public IP need less.",
                )

    def exposure(self) -> None:
        """Who may reach the worker."""
        if self._environment.worker_is_open_to_all:
            self._warn(
                "worker",
                "the worker's SSH port can be reached from anywhere (with a key only)",
                "Set export_worker_allowed_addresses to the outgoing address of this host.",
            )

    # The rest

    def leftovers(self) -> None:
        """What other runs have in the group."""
        group = self._environment.resource_group
        found = self._asked("clean up", lambda: cleanup.leftovers(self._azure, group, self._storage))
        if found:
            runs = ", ".join(leftover.run for leftover in found)
            self._fine(
                "clean up",
                f"resources of {len(found)} other run(s) are there ({runs}): of runs under way, or dead ones that "
                "the next run removes",
            )

    def api_versions(self) -> None:
        """Whether this Azure offers the API versions that we ask with. An Azure Stack may be older."""
        for namespace in ("Microsoft.Compute", "Microsoft.Network"):
            offered = self._asked(
                "connect",
                partial(self._azure.offered_versions, namespace),
                optional=True,
            )
            for type_, version in sorted(self._azure.api_versions.items()):
                if version not in (offered or {}).get(type_, [version]):
                    newest = max((offered or {})[type_], default="none")
                    self._warn(
                        "connect",
                        f"this Azure does not offer {type_} with API version {version}; its newest is {newest}",
                        "Set api_profile or api_versions in custom_cloud_properties of the connection.",
                    )

    # Tools

    def _asked(self, step: str, question: Callable[[], T], *, optional: bool = False) -> T | None:
        """The answer; None where there is none, which is then a finding."""
        try:
            return question()
        except CoriolisAzureError as error:
            self._failed(step, error, "warning" if optional else "error")
            return None

    def _failed(self, step: str, error: CoriolisAzureError, severity: Severity = "error") -> None:
        finding = Finding(step, severity, error.message, error.remedy)
        if finding not in self.findings:
            self.findings.append(finding)

    def _left(self, usages: Callable[[], list[Json]]) -> dict[str, int] | None:
        """What the quota leaves, by lower-cased name."""
        listed = self._asked("worker", usages, optional=True)
        if listed is None:
            return None
        return {
            str(at(usage, "name.value", "")).lower(): usage["limit"] - usage["currentValue"]
            for usage in listed
            # A negative limit is none.
            if usage.get("limit", -1) >= 0 and "currentValue" in usage
        }

    def _subnet_id(self) -> str | None:
        """The ARM id of the subnet of the settings; None where they name none. `network` tells that."""
        try:
            return worker_network.subnet_id(self._azure.subscription, self._environment)
        except InvalidInput:
            return None

    def _error(self, step: str, text: str, remedy: str) -> None:
        self.findings.append(Finding(step, "error", text, remedy))

    def _warn(self, step: str, text: str, remedy: str = "") -> None:
        self.findings.append(Finding(step, "warning", text, remedy))

    def _fine(self, step: str, text: str) -> None:
        self.findings.append(Finding(step, "fine", text))


def _refusing(told: Json) -> list[str]:
    """The policies that would refuse a resource, by Azure's answer; those that only audit or change are none."""
    found = []
    for each in at(told, "contentEvaluationResult.policyEvaluations", []):
        effect = str(at(each, "effectDetails.policyEffect", "deny")).lower()
        if at(each, "evaluationResult") == "NonCompliant" and effect == "deny":
            found.append(
                names.name_of(str(at(each, "policyInfo.policyAssignmentId", "a policy without a name")))
            )
    return found


def _demanded(field: Json) -> bool:
    """Whether a policy demands that a resource has this field."""
    return any(at(each, "result") == "Required" for each in at(field, "restrictions", []))


def _why_not(azure: Azure, environment: Environment, zone: str) -> str:
    """Why the size of the settings cannot be a worker."""
    asked = environment.export_worker_size.lower()
    sku = next((sku for sku in azure.sizes(environment.location) if sku["name"].lower() == asked), None)
    if sku is None:
        return f"{environment.location} does not have it"
    barred = [
        f"{restriction.get('reasonCode', 'restricted')} in {_places(restriction)}"
        for restriction in sku.get("restrictions", [])
        if restriction.get("type") != "Zone" or zone in at(restriction, "restrictionInfo.zones", [])
    ]
    zones = skus.zones_of(sku, environment.location)
    if zone and zones is not None and zone not in zones:
        barred.append(f"sold in {_zones(zones)}, not in zone {zone}")
    told = skus.capabilities(sku)
    return ", ".join(barred) or (
        f"processor {told.get('CpuArchitectureType', 'x64')}, disks {told.get('DiskControllerTypes', 'SCSI')}, "
        f"premium disks {told.get('PremiumIO', 'False')}, generations {told.get('HyperVGenerations', 'V1,V2')}"
    )


def _places(restriction: Json) -> str:
    zones = at(restriction, "restrictionInfo.zones", [])
    return _zones(zones) if zones else ", ".join(restriction.get("values", [])) or "this location"


def _zones(zones: Iterable[str]) -> str:
    """Zones in words; "no zone" for none."""
    return f"zones {', '.join(sorted(zones))}" if zones else "no zone"


def _free(subnet: Json) -> int:
    """The IPv4 addresses that a subnet has left."""
    room = sum(one.num_addresses - _RESERVED_ADDRESSES for one in _ranges(subnet) if one.version == 4)
    return max(0, room - len(subnet["properties"].get("ipConfigurations") or ()))


def _has_ipv6(subnet: Json) -> bool:
    return any(one.version == 6 for one in _ranges(subnet))


def _ranges(subnet: Json) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    properties = subnet["properties"]
    prefixes: Sequence[str] = properties.get("addressPrefixes") or [
        properties.get("addressPrefix") or "0.0.0.0/32"
    ]
    return [found for prefix in prefixes if (found := _range(prefix)) is not None]


def _range(prefix: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(prefix, strict=False)
    except ValueError:
        return None


def _texts(told: Iterable[Event]) -> str:
    return "; ".join(event.text for event in told if isinstance(event, Notice))


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
