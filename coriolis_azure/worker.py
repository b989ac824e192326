"""The worker: a temporary VM that reads clones.

It is booted before any clone is attached: a clone of an OS disk could otherwise become its boot disk. It never
mounts, assembles or writes to a clone; cloud-init tells LVM, md, multipath and udisks to keep their hands off.
Size and image are chosen from what the location offers today.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from . import channel, cloud_init, names, skus, ssh
from .clock import Clock
from .cloud import Azure
from .errors import AzureError, DeadlinePassed, InvalidInput, QuotaExceeded
from .events import Notice, Report, Step
from .model import Disk, Json, Machine, Worker, at, canonical_location, must
from .pipeline import ordered
from .resources import Resources, patiently
from .settings import Environment, Image

LOG = logging.getLogger(__name__)

USERNAME = "coriolis"
# How often a VM is asked for, each time with another size or image, when Azure has no room or no such image.
TRIES = 8
# A worker that reads faster than this is not chosen for its speed: the network to the destination is slower.
ENOUGH = 600_000_000
_QUOTA = {"OperationNotAllowed", "QuotaExceeded"}
_NO_IMAGE = {
    *(
        "PlatformImageNotFound",
        "ImageNotFound",
        "VMMarketplaceInvalidInput",
        "ResourcePurchaseValidationFailed",
    ),
    *("MarketplacePurchaseEligibilityFailed", "AccountSetupError"),
}
# Two vCPUs read as fast as such a size may; larger ones follow for machines with more or faster disks.
SIZES = tuple(
    f"Standard_{size}"
    for size in (
        *("D2s_v5", "D2as_v5", "D2s_v4", "D2s_v3", "DS2_v2", "F2s_v2", "B2ms"),
        *("D4s_v5", "D4as_v5", "D4s_v4", "D4s_v3", "D8s_v5", "D8as_v5", "D8s_v4", "D8s_v3"),
        *("D16s_v5", "D16as_v5", "D16s_v3", "D32s_v5", "D32as_v5", "D32s_v3"),
    )
)
IMAGES = (
    Image("Canonical", "ubuntu-24_04-lts", "server"),
    Image("Canonical", "0001-com-ubuntu-server-jammy", "22_04-lts-gen2"),
    Image("Debian", "debian-12", "12-gen2"),
    Image("Debian", "debian-13", "13-gen2"),
)
# Of less a Linux image may not boot. It counts only for sizes that nobody asked for.
_MEMORY_GIB = 2
_NETWORK, _SUBNET = "10.117.0.0/24", "10.117.0.0/26"


@dataclass(frozen=True)
class Size:
    """A VM size a worker may have; `slots` is how many clones it holds at once, `rate` what it reads: bytes a second.

    `rate`, `vcpus` and `memory_gib` are 0 where Azure does not tell them.
    """

    name: str
    slots: int
    rate: float = field(default=0, compare=False)
    vcpus: float = field(default=0, compare=False)
    memory_gib: float = field(default=0, compare=False)
    family: str = field(default="", compare=False)


@dataclass(frozen=True)
class Needs:
    """What a worker must be able to hold: that many disks, premium ones among them, in that zone ("" for none).

    `rate` is what these disks give together, in bytes a second.
    """

    disks: int = 1
    premium: bool = False
    zone: str = ""
    rate: int = 0
    host_encryption: bool = False


def needs(machine: Machine, disks: Sequence[Disk]) -> Needs:
    """What a worker must be able to hold to read these disks of `machine`."""
    premium = any(disk.sku.startswith(("Premium", "Ultra")) for disk in disks)
    rate = sum(disk.bytes_per_second for disk in disks)
    return Needs(len(disks), premium, machine.zones[0] if machine.zones else "", rate)


def launch(resources: Resources, needed: Needs, environment: Environment, report: Report) -> Worker:
    """Boot a worker; what was made is deleted again when a step fails.

    The worker may still be starting its SSH server: `ssh.connect` waits for it.
    """
    azure = resources.azure
    check_network(azure, environment)
    check_encryption(azure, environment)
    if environment.worker_is_open_to_all:
        report(
            Notice(
                "the worker's SSH port can be reached from everywhere (with a key made for this run): name this "
                "host's outgoing address in export_worker_allowed_addresses"
            )
        )
    choice = _choose(azure, needed, environment, report)  # what can be refused is, before anything is made
    private_key, public_key = ssh.client_key()
    host_private, host_public = ssh.host_key()
    custom_data = cloud_init.cloud_config(host_private, host_public, environment.export_worker_ssh_port)
    with resources.undone_on_error():
        nic = _network(resources, environment)
        body = partial(
            _vm,
            resources,
            environment=environment,
            nic=nic["id"],
            public_key=public_key,
            custom_data=custom_data,
        )
        vm, size = _booted(resources, needed, environment, report, body, choice)
        return Worker(
            vm=vm["id"],
            address=_address(resources, environment, nic),
            port=environment.export_worker_ssh_port,
            username=USERNAME,
            host_key=host_public,
            slots=size.slots,
            private_key=private_key,
        )


def _booted(
    resources: Resources,
    needed: Needs,
    environment: Environment,
    report: Report,
    body: Callable[[str, Image, str], Json],
    choice: tuple[Size, Image],
) -> tuple[Json, Size]:
    """The VM and its size. Where Azure refuses the choice it is asked again with another, `TRIES` times in all."""
    azure = resources.azure
    refused = _Refused()
    for attempt in range(TRIES):
        try:
            if refused.error is not None:
                choice = _choose(azure, needed, environment, report, refused)
        except InvalidInput:
            break  # nothing is left to try
        size, image = choice
        report(Step("boot worker", f"{size.name}, {image}"))
        disk = _os_disk(attempt)
        resources.expect("disk", disk)
        try:
            vm = resources.create("vm", "worker", body(size.name, image, disk))
        except AzureError as error:
            refused.note(error, size, image, report)
            if (error.facts.get("code") or "") in _QUOTA:
                refused.barred |= _as_large(azure, needed, environment, size, refused.sizes)
            resources.delete([resources.id("vm", "worker"), resources.id("disk", disk)])
        else:
            if not azure.is_modern:
                resources.adopt("disk", disk)
            return vm, size
    raise refused.summary()


@dataclass
class _Refused:
    """What Azure had no room for, or did not take, and the last of its errors."""

    tried: list[Size] = field(default_factory=list)
    images: set[Image] = field(default_factory=set)
    barred: set[str] = field(default_factory=set)
    error: AzureError | None = None

    @property
    def sizes(self) -> Barred:
        """The sizes that are not asked for again, and the families that are asked last."""
        names = {size.name.lower() for size in self.tried} | self.barred
        return Barred(frozenset(names), frozenset(size.family for size in self.tried if size.family))

    def note(self, error: AzureError, size: Size, image: Image, report: Report) -> None:
        """Take note of a refusal; raises the error where no other size and no other image could help."""
        code = error.facts.get("code") or ""
        refused = _refused(error, code)
        if not refused:
            raise error
        if refused == "image":
            report(Notice(f"Azure does not take the image {image} ({code})"))
            self.images.add(image)
        else:
            report(Notice(f"Azure has no room for a {size.name} now ({code})"))
            self.tried.append(size)
        self.error = error

    def summary(self) -> AzureError:
        """The last error, with all that was tried."""
        error = self.error or AzureError("no worker was asked for")
        tried = [size.name for size in self.tried] + [str(image) for image in self.images]
        return type(error)(f"{error.message} (tried {', '.join(tried)})", remedy=error.remedy, **error.facts)


@contextmanager
def attached(
    azure: Azure, worker: Worker, clones: Sequence[str], clock: Clock
) -> Iterator[list[tuple[str, ...]]]:
    """The clones on the worker while the block runs; gives, for each, the device names it may have there.

    All are attached in one request: Azure allows a VM about twelve changes in a row. A pool's worker may hold clones of
    another run, which an execution that was given up goes on with: they stay as they are.
    """
    luns: list[int] = []

    def added(held: list[Json]) -> list[Json]:
        others = _without(held, clones)  # an update that Azure has given up may have attached some
        used = {entry.get("lun") for entry in others}
        luns[:] = [lun for lun in range(len(others) + len(clones)) if lun not in used][: len(clones)]
        return [*others, *(_attached(azure, lun, clone) for lun, clone in zip(luns, clones, strict=True))]

    try:
        _change_disks(azure, worker.vm, added, clock)
        yield [_devices(lun) for lun in luns]
    except BaseException:
        try:
            detach(azure, worker.vm, clones, clock)
        except (
            AzureError,
            DeadlinePassed,
        ) as error:  # the first error is the one to tell; the worker's deletion detaches too
            LOG.warning("could not detach the clones: %s", error)
        raise
    detach(azure, worker.vm, clones, clock)


def emptied(azure: Azure, vm: str, report: Report, clock: Clock) -> bool:
    """Detach whatever data disks a worker of a pool has, after it was deallocated; whether it had any.

    They are clones of a run that died, and may be what the worker has booted from since.
    """
    disks = at(azure.get(vm), "properties.storageProfile.dataDisks", [])
    if not disks:
        return False
    name = names.name_of(vm)
    report(
        Notice(
            f"the worker {name} has {len(disks)} disk(s) of another run attached: it is stopped and rid of them"
        )
    )
    azure.deallocate(vm)
    _change_disks(azure, vm, lambda _: [], clock)
    return True


def detach(azure: Azure, vm: str, disks: Collection[str], clock: Clock) -> None:
    """Take these disks, and no others, from a VM."""
    _change_disks(azure, vm, lambda held: _without(held, disks), clock)


def _without(held: Sequence[Json], disks: Collection[str]) -> list[Json]:
    """The entries of a VM's data disks but those of `disks`."""
    leaving = {disk.lower() for disk in disks}
    return [entry for entry in held if str(at(entry, "managedDisk.id", "")).lower() not in leaving]


def free(azure: Azure, ids: Iterable[str], clock: Clock) -> None:
    """Take the disks among `ids`, which are to be deleted, from the workers of pools that hold them."""
    holders: dict[str, list[str]] = {}
    for id in ids:
        if not names.is_blob(id) and names.kind_of(id) == "disk":
            holder = (azure.find(id) or {}).get("managedBy")
            holders.setdefault(holder or "", []).append(id)
    holders.pop("", None)
    for vm, disks in holders.items():
        document = azure.find(vm)
        if document is not None and names.POOL_TAG in names.tags_of(document):
            detach(azure, vm, disks, clock)


def _attached(azure: Azure, lun: int, clone: str) -> Json:
    return {
        "lun": lun,
        "createOption": "Attach",
        "caching": "None",
        "managedDisk": {"id": clone},
        **_deleted_along(azure),
    }


def _change_disks(azure: Azure, vm: str, change: Callable[[list[Json]], list[Json]], clock: Clock) -> None:
    """Make of a VM's data disks what `change` says. What another operation on it holds up is waited out."""

    def once() -> None:
        document = azure.get(vm)
        held: list[Json] = at(document, "properties.storageProfile.dataDisks", [])
        entries = change(held)
        if entries != held:
            body = {"properties": {"storageProfile": {"dataDisks": entries}}}
            azure.patch_vm(vm, body, document.get("etag", ""))

    patiently(once, f"changing the disks of {vm}", clock, report=azure.report)


@dataclass(frozen=True)
class Barred:
    """Sizes that Azure has no room for, by lower-cased name, and the families that they are of."""

    names: Set[str] = frozenset()
    families: Set[str] = frozenset()


def _choose(
    azure: Azure, needed: Needs, environment: Environment, report: Report, refused: _Refused | None = None
) -> tuple[Size, Image]:
    """A size and an image; none of those that Azure has `refused`."""
    refused = refused or _Refused()
    size = choose_size(azure, needed, environment, report, refused.sizes)
    return size, choose_image(azure, environment, report, frozenset(refused.images))


def choose_size(
    azure: Azure,
    needed: Needs,
    environment: Environment,
    report: Report,
    barred: Barred = Barred(),
) -> Size:
    """The size of the settings where the location and zone offer it, else the first of `SIZES` that suits the disks.

    That is: it holds all of them and reads as fast as they give, up to `ENOUGH`; else the fastest that holds all;
    else the one that holds most. Sizes outside `SIZES` come after them, those of a barred family last. InvalidInput
    when there is none that can be a worker.
    """
    offered = _offered(azure, environment.location, _with_settings(needed, environment))
    offered = {name: size for name, size in offered.items() if name not in barred.names}
    asked = environment.export_worker_size
    if asked.lower() in offered:
        return offered[asked.lower()]
    candidates = _preferred(offered, barred.families)
    if not candidates:
        zone = f" zone {needed.zone}" if needed.zone else ""
        raise InvalidInput(
            f"{environment.location}{zone} offers this subscription no VM size that can be a worker",
            remedy="Ask for access to a general purpose size (Dsv5, Dsv3, ...) in that location and zone.",
        )
    chosen = _suited(candidates, needed)
    if asked and asked.lower() not in barred.names:
        report(
            Notice(
                f"export_worker_size {asked} cannot be used in {environment.location} today (retired, restricted or "
                f"unfit): using {chosen.name} instead"
            )
        )
    return chosen


def _preferred(offered: Mapping[str, Size], families: Set[str]) -> list[Size]:
    """The best sizes there are: of `SIZES` and of no barred family, else what comes next.

    A family that has no room for one size rarely has it for another: both run on the same machines.
    """
    listed = [offered[size.lower()] for size in SIZES if size.lower() in offered]
    others = sorted(
        (size for size in offered.values() if size not in listed),
        key=lambda size: (size.memory_gib < _MEMORY_GIB, size.vcpus, size.slots, size.name),
    )
    fresh = [[size for size in sizes if size.family not in families] for sizes in (listed, others)]
    return next((sizes for sizes in (*fresh, listed, others) if sizes), [])


def _suited(candidates: Sequence[Size], needed: Needs) -> Size:
    """The first of the candidates that suits the disks."""
    most = max(candidates, key=lambda size: size.slots)
    holding = [size for size in candidates if size.slots >= needed.disks] or [most]
    fast = [size for size in holding if size.rate >= min(needed.rate, ENOUGH)]
    return fast[0] if fast else max(holding, key=lambda size: size.rate)


def check_encryption(azure: Azure, environment: Environment) -> Json | None:
    """The disk encryption set of the settings, None without one; raises where the worker's disk cannot use it."""
    id = environment.export_worker_disk_encryption_set
    if not id:
        return None
    subscription = id.split("/")[2]
    if subscription.lower() != azure.subscription.lower():
        raise InvalidInput(
            f"export_worker_disk_encryption_set is in subscription {subscription}, the VMs are in {azure.subscription}",
            remedy="Choose a disk encryption set of the subscription of the VMs.",
        )
    found = azure.encryption_set(id)
    if canonical_location(must(found, "location")) != environment.location:
        raise InvalidInput(
            f"the disk encryption set {names.name_of(id)} is in {found['location']}, not in {environment.location}",
            remedy="Choose a disk encryption set in the location of the VMs.",
        )
    return found


def _refused(error: AzureError, code: str) -> str:
    """Whether another `size` or another `image` may be taken where this one was refused; "" where that is no help.

    What a location sells and what it has room for are two things; only trying tells. Azure says OperationNotAllowed
    for a used-up quota too, and a VM that is only being made conflicts with nothing else.
    """
    if code in _NO_IMAGE:
        return "image"
    unknown = code == "InvalidParameter" and "vmsize" in str(error.facts.get("target")).lower()
    return "size" if isinstance(error, QuotaExceeded) or code in _QUOTA or unknown else ""


def _as_large(azure: Azure, needed: Needs, environment: Environment, size: Size, barred: Barred) -> set[str]:
    """The sizes with as many vCPUs as one that a quota was too small for, if smaller ones of `SIZES` are left."""
    offered = _offered(azure, environment.location, _with_settings(needed, environment))
    ours = {name.lower() for name in SIZES} - barred.names
    smaller = {name for name, one in offered.items() if name in ours and one.vcpus < size.vcpus}
    return {name for name in offered if name not in smaller} if smaller else set()


def check_network(azure: Azure, environment: Environment) -> Json | None:
    """The subnet of the settings, None for a network of our own; raises when it is not there or not in the location."""
    if not environment.export_network:
        return None
    subnet = subnet_id(azure.subscription, environment)
    vnet_id, _, name = subnet.partition("/subnets/")
    vnet = azure.get(vnet_id)
    if canonical_location(must(vnet, "location")) != environment.location:
        raise InvalidInput(
            f"the network {names.name_of(vnet_id)} is in {vnet['location']}, not in {environment.location}",
            remedy="Choose an export_network in the location of the VMs.",
        )
    subnets: dict[str, Json] = {
        found["name"]: {"properties": {}, **found, "id": f"{vnet_id}/subnets/{found['name']}"}
        for found in at(vnet, "properties.subnets", [])
        if "name" in found
    }
    for found, document in subnets.items():
        if found.lower() == name.lower():
            return document
    raise InvalidInput(
        f"the network {names.name_of(vnet_id)} has no subnet {name}",
        remedy=f"Choose one of its subnets: {', '.join(sorted(subnets)) or 'there are none'}.",
    )


def choose_image(
    azure: Azure, environment: Environment, report: Report, without: frozenset[Image] = frozenset()
) -> Image:
    """The image of the settings where it exists and has no terms, else the first of `IMAGES` that does.

    None of `without`, images that Azure did not take. InvalidInput when there is none.
    """
    asked = environment.export_worker_image
    why = ""
    if asked and asked not in without:
        found = azure.image(environment.location, asked)
        if found is not None and not at(found, "properties.plan"):
            return asked
        # We could buy it only in the name of its user.
        why = "has terms of its own (a plan)" if found else "does not exist"
    for image in IMAGES:
        if image not in without and azure.image(environment.location, image) is not None:
            if why:
                report(
                    Notice(
                        f"export_worker_image {asked} {why} in {environment.location} today: using {image} instead"
                    )
                )
            return image
    raise InvalidInput(
        f"none of the images that are known to work exists in {environment.location}",
        remedy="Set export_worker_image to a Linux image with cloud-init, Python 3 and sudo.",
    )


def sizes(azure: Azure, location: str) -> list[str]:
    """The sizes that can be a worker in `location` today, those of our list first."""
    offered = _offered(azure, location, Needs())
    ours = [offered.pop(size.lower()).name for size in SIZES if size.lower() in offered]
    return ours + sorted(size.name for size in offered.values())


def images(azure: Azure, location: str) -> list[Image]:
    """The images of our list that exist in `location` today."""
    return [image for image in IMAGES if azure.image(location, image) is not None]


def _with_settings(needed: Needs, environment: Environment) -> Needs:
    """What the disks need, and what the settings demand."""
    return replace(needed, host_encryption=environment.export_worker_encryption_at_host)


def _offered(azure: Azure, location: str, needed: Needs) -> dict[str, Size]:
    """The usable sizes of `location`, by lower-cased name."""
    found = (_usable(sku, location, needed) for sku in azure.sizes(location))
    return {size.name.lower(): size for size in found if size is not None}


def _usable(sku: Json, location: str, needed: Needs) -> Size | None:
    """The size as a worker, or None where it cannot be one."""
    told = skus.capabilities(sku)
    slots = int(skus.capability(sku, "MaxDataDiskCount"))
    zones = skus.zones_of(sku, location)
    fits = (
        slots > 0
        and told.get("CpuArchitectureType", "x64") == "x64"
        and "SCSI" in told.get("DiskControllerTypes", "SCSI")
        and "V2" in told.get("HyperVGenerations", "V1,V2")
        and (told.get("PremiumIO", "False") == "True" or not needed.premium)
        and (told.get("EncryptionAtHostSupported", "False") == "True" or not needed.host_encryption)
        and not told.get("ConfidentialComputingType")  # takes confidential VMs only
        and (not needed.zone or zones is None or needed.zone in zones)
        and not any(skus.bars(restriction, needed.zone) for restriction in sku.get("restrictions", []))
    )
    rate, vcpus, memory = (
        skus.capability(sku, name) for name in ("UncachedDiskBytesPerSecond", "vCPUs", "MemoryGB")
    )
    return Size(sku["name"], slots, rate, vcpus, memory, str(sku.get("family", ""))) if fits else None


def _network(resources: Resources, environment: Environment) -> Json:
    """The worker's NIC, and what it needs; the NIC's document."""
    parts = [lambda: resources.create("nsg", "nsg", _nsg(environment))]
    if environment.export_worker_use_fip:
        parts.append(lambda: resources.create("ip", "ip", _ip(resources.azure)))
    if not environment.export_network:
        parts.append(lambda: resources.create("vnet", "vnet", _vnet()))
    list(ordered(lambda make: make(), parts, threads=3, ahead=3))
    configuration: Json = {
        "subnet": {"id": _subnet(resources, environment)},
        "privateIPAllocationMethod": "Dynamic",
    }
    if environment.export_worker_use_fip:
        configuration["publicIPAddress"] = {"id": resources.id("ip", "ip")}
    return resources.create(
        "nic",
        "nic",
        {
            "properties": {
                "ipConfigurations": [{"name": "worker", "properties": configuration}],
                "networkSecurityGroup": {"id": resources.id("nsg", "nsg")},
            }
        },
    )


def _subnet(resources: Resources, environment: Environment) -> str:
    """The ARM id of the worker's subnet."""
    if not environment.export_network:
        return resources.id("vnet", "vnet") + "/subnets/worker"
    return subnet_id(resources.run.subscription, environment)


def subnet_id(subscription: str, environment: Environment) -> str:
    """The ARM id of the subnet that the settings name."""
    asked = environment.export_network
    if asked.startswith("/"):
        return _own_subnet(subscription, asked)
    network, slash, subnet = asked.partition("/")
    if not slash:
        raise InvalidInput(
            f"export_network {asked!r} names no subnet",
            remedy="Write it as vnet/subnet, or as a subnet's ARM id.",
        )
    return names.resource_id(subscription, environment.resource_group, "vnet", network) + f"/subnets/{subnet}"


_SUBNET_ID = re.compile(
    r"/subscriptions/([^/]+)/resourceGroups/[^/]+/providers/Microsoft\.Network/virtualNetworks/[^/]+/subnets/[^/]+",
    re.IGNORECASE,
)


def _own_subnet(subscription: str, id: str) -> str:
    """`id` if it is a subnet's, of this subscription: Azure connects a VM to networks of its own subscription only."""
    found = _SUBNET_ID.fullmatch(id)
    if not found:
        raise InvalidInput(
            f"export_network {id} is not the ARM id of a subnet",
            remedy="Write it as vnet/subnet, or as the whole ARM id of a subnet.",
        )
    if found[1].lower() != subscription.lower():
        raise InvalidInput(
            f"export_network is in subscription {found[1]}, the VMs are in {subscription}: Azure connects a VM only "
            "to networks of its own subscription",
            remedy="Choose a subnet of the subscription of the VMs; its network may be peered with the other one.",
        )
    return id


def _address(resources: Resources, environment: Environment, nic: Json) -> str:
    if environment.export_worker_use_fip:
        return str(must(resources.read(resources.id("ip", "ip")), "properties.ipAddress"))
    configurations = must(nic, "properties.ipConfigurations")
    return str(must(configurations[0], "properties.privateIPAddress"))


def _nsg(environment: Environment) -> Json:
    rule = {
        "access": "Allow",
        "direction": "Inbound",
        "sourcePortRange": "*",
        "destinationAddressPrefix": "*",
    }
    allowed = environment.export_worker_allowed_addresses
    source: Json = (
        {"sourceAddressPrefix": allowed[0]} if len(allowed) == 1 else {"sourceAddressPrefixes": list(allowed)}
    )
    ssh_only = {
        **rule,
        **source,
        "protocol": "Tcp",
        "priority": 100,
        "destinationPortRange": str(environment.export_worker_ssh_port),
    }
    rules = [{"name": "ssh", "properties": ssh_only}]
    first = environment.export_worker_data_port
    if first:
        ports = {"priority": 110, "destinationPortRange": f"{first}-{first + channel.PORTS - 1}"}
        rules.append({"name": "data", "properties": {**ssh_only, **ports}})
    # Azure's own rules would let the whole virtual network in.
    nothing_else = {
        **rule,
        "access": "Deny",
        "protocol": "*",
        "priority": 4096,
        "sourceAddressPrefix": "*",
        "destinationPortRange": "*",
    }
    rules.append({"name": "nothing-else", "properties": nothing_else})
    return {"properties": {"securityRules": rules}}


def _ip(azure: Azure) -> Json:
    properties = {"publicIPAllocationMethod": "Static"}
    return {"sku": {"name": "Standard" if azure.is_modern else "Basic"}, "properties": properties}


def network(resources: Resources) -> str:
    """A network for several workers; the ARM id of its subnet."""
    resources.create("vnet", "vnet", _vnet())
    return resources.id("vnet", "vnet") + "/subnets/worker"


def ids(resources: Resources) -> list[str]:
    """The ids of all that `launch` and `network` make: names are derived, so nothing needs to be remembered."""
    roles = {"vm": "worker", "nic": "nic", "ip": "ip", "nsg": "nsg", "vnet": "vnet"}
    disks = [resources.id("disk", _os_disk(attempt)) for attempt in range(TRIES)]
    return disks + [resources.id(kind, role) for kind, role in roles.items()]


def _os_disk(attempt: int) -> str:
    """The role of the worker's OS disk, another at each try: the disk of a VM that failed may stay for a while."""
    return f"worker-os-{attempt + 1}"


def _vnet() -> Json:
    return {
        "properties": {
            "addressSpace": {"addressPrefixes": [_NETWORK]},
            "subnets": [{"name": "worker", "properties": {"addressPrefix": _SUBNET}}],
        }
    }


def _deleted_along(azure: Azure) -> Json:
    """That a disk goes with its VM, where Azure knows of that."""
    return {"deleteOption": "Delete"} if azure.is_modern else {}


def _vm(
    resources: Resources,
    size: str,
    image: Image,
    disk: str,
    *,
    environment: Environment,
    nic: str,
    public_key: str,
    custom_data: str,
) -> Json:
    azure, run = resources.azure, resources.run
    name = names.resource(run.id, "worker")
    body: Json = {
        "properties": {
            "hardwareProfile": {"vmSize": size},
            "storageProfile": {
                "imageReference": {
                    "publisher": image.publisher,
                    "offer": image.offer,
                    "sku": image.sku,
                    "version": image.version,
                },
                "osDisk": {
                    "name": names.resource(run.id, disk),
                    "createOption": "FromImage",
                    "caching": "ReadWrite",
                    "managedDisk": _os_disk_of(azure, environment),
                    **_deleted_along(azure),
                },
            },
            "osProfile": {
                "computerName": name,
                "adminUsername": USERNAME,
                "customData": base64.b64encode(custom_data.encode()).decode(),
                "linuxConfiguration": {
                    "disablePasswordAuthentication": True,
                    "ssh": {
                        "publicKeys": [
                            {"path": f"/home/{USERNAME}/.ssh/authorized_keys", "keyData": public_key}
                        ]
                    },
                },
            },
            "networkProfile": {"networkInterfaces": [{"id": nic, "properties": {"primary": True}}]},
        }
    }
    if environment.export_worker_encryption_at_host:
        body["properties"]["securityProfile"] = {"encryptionAtHost": True}
    return {**body, "zones": [run.zone]} if run.zone else body


def _os_disk_of(azure: Azure, environment: Environment) -> Json:
    """How the worker's own disk is kept: its type, and whose key encrypts it."""
    kept: Json = {"storageAccountType": "StandardSSD_LRS" if azure.is_modern else "Standard_LRS"}
    if environment.export_worker_disk_encryption_set:
        kept["diskEncryptionSet"] = {"id": environment.export_worker_disk_encryption_set}
    return kept


def _devices(lun: int) -> tuple[str, ...]:
    """The names that udev gives to the disk at `lun`: older images, newer ones."""
    return (f"/dev/disk/azure/scsi1/lun{lun}", f"/dev/disk/azure/data/by-lun/{lun}")
