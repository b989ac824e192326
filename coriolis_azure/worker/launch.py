"""Launches a worker, the temporary VM that reads clones: tries sizes and images until Azure accepts one."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ..azure import names
from ..azure.client import Azure
from ..errors import AzureError, InvalidInput, QuotaExceeded
from ..events import Notice, Report, Step
from ..model import Json, Worker, canonical_location, must
from ..readers import keys
from ..run.attached_disks import deleted_along
from ..run.resources import Resources
from ..settings import Environment, Image
from . import cloud_init
from .images import choose_image
from .network import check_network, connect
from .sizes import Barred, Needs, Size, as_large, choose_size

USERNAME = "coriolis"
# The most attempts to create the VM, each with another size or image, if Azure lacks capacity or the image.
TRIES = 8
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


def launch(resources: Resources, needed: Needs, environment: Environment, report: Report) -> Worker:
    """Boot a worker. If a step fails, what was created is deleted.

    The SSH server may still be starting: `ssh.connect` waits for it.
    """
    azure = resources.azure
    check_network(azure, environment)
    check_encryption(azure, environment)
    if environment.worker_is_open_to_all:
        report(
            Notice(
                "the worker's SSH port can be reached from anywhere (signing in needs a key made for this run): set "
                "export_worker_allowed_addresses to the outgoing address of this host"
            )
        )
    choice = _choose(azure, needed, environment, report)  # fails, if it must, before anything is created
    private_key, public_key = keys.client_key()
    host_private, host_public = keys.host_key()
    custom_data = cloud_init.cloud_config(host_private, host_public, environment.export_worker_ssh_port)
    with resources.undone_on_error():
        nic, address = connect(resources, environment)
        body = partial(_vm, resources, environment, _Guest(nic["id"], public_key, custom_data))
        vm, size = _booted(resources, needed, environment, report, body, choice)
        return Worker(
            vm=vm["id"],
            address=address,
            port=environment.export_worker_ssh_port,
            username=USERNAME,
            host_key=host_public,
            slots=size.slots,
            private_key=private_key,
            rate=size.rate,
        )


def _booted(
    resources: Resources,
    needed: Needs,
    environment: Environment,
    report: Report,
    body: Callable[[str, Image, str], Json],
    choice: tuple[Size, Image],
) -> tuple[Json, Size]:
    """Create the VM and return it with its size. If Azure rejects the choice, make another, up to `TRIES` times."""
    azure = resources.azure
    rejected = _Rejected()
    for attempt in range(TRIES):
        try:
            if rejected.error is not None:
                choice = _choose(azure, needed, environment, report, rejected)
        except InvalidInput:
            break  # nothing is left to try
        size, image = choice
        report(Step("boot worker", f"{size.name}, {image}"))
        disk = _os_disk(attempt)
        resources.intend("disk", disk)
        try:
            vm = resources.create("vm", "worker", body(size.name, image, disk))
        except AzureError as error:
            rejected.note(error, size, image, report)
            if error.code in _QUOTA:
                rejected.barred |= as_large(azure, needed, environment, size, rejected.sizes)
            resources.delete([resources.id("vm", "worker"), resources.id("disk", disk)])
        else:
            if not azure.is_modern:
                resources.adopt("disk", disk)
            return vm, size
    raise rejected.summary()


@dataclass
class _Rejected:
    """The sizes and images that Azure has rejected, and its last error."""

    tried: list[Size] = field(default_factory=list)
    images: set[Image] = field(default_factory=set)
    barred: set[str] = field(default_factory=set)
    error: AzureError | None = None

    @property
    def sizes(self) -> Barred:
        """The sizes not to try again, and the families to try last."""
        names = {size.name.lower() for size in self.tried} | self.barred
        return Barred(frozenset(names), frozenset(size.family for size in self.tried if size.family))

    def note(self, error: AzureError, size: Size, image: Image, report: Report) -> None:
        """Record a rejection. Raises the error if no other size or image could help."""
        code = error.code
        culprit = _culprit(error, code)
        if not culprit:
            raise error
        if culprit == "image":
            report(Notice(f"Azure does not accept the image {image} ({code})"))
            self.images.add(image)
        else:
            report(Notice(f"Azure has no capacity for a {size.name} at the moment ({code})"))
            self.tried.append(size)
        self.error = error

    def summary(self) -> AzureError:
        """The last error, with everything that was tried."""
        error = self.error or AzureError("no worker was requested")
        tried = [size.name for size in self.tried] + [str(image) for image in self.images]
        return error.reworded(f"{error.message} (tried {', '.join(tried)})")


def _choose(
    azure: Azure, needed: Needs, environment: Environment, report: Report, rejected: _Rejected | None = None
) -> tuple[Size, Image]:
    """A size and an image, neither of which Azure has `rejected`."""
    rejected = rejected or _Rejected()
    size = choose_size(azure, needed, environment, report, rejected.sizes)
    return size, choose_image(azure, environment, report, frozenset(rejected.images))


def check_encryption(azure: Azure, environment: Environment) -> Json | None:
    """The disk encryption set of the settings; None if they name none.

    Raises InvalidInput if the worker's disk cannot use it.
    """
    id = environment.export_worker_disk_encryption_set
    if not id:
        return None
    subscription = id.split("/")[2]
    if subscription.lower() != azure.subscription.lower():
        raise InvalidInput(
            f"export_worker_disk_encryption_set is in subscription {subscription}, the VMs are in {azure.subscription}",
            remedy="Choose a disk encryption set of the subscription of the VMs.",
        )
    document = azure.encryption_set(id)
    if canonical_location(must(document, "location")) != environment.location:
        raise InvalidInput(
            f"the disk encryption set {names.name_of(id)} is in {document['location']}, not in {environment.location}",
            remedy="Choose a disk encryption set in the location of the VMs.",
        )
    return document


def _culprit(error: AzureError, code: str) -> str:
    """What to replace after a rejection: `size` or `image`; "" if neither would help.

    A location may list a size that it has no capacity for: only trying tells. Azure also reports a used-up quota as
    OperationNotAllowed, and for a VM that is being created the code means nothing else.
    """
    if code in _NO_IMAGE:
        return "image"
    unknown = code == "InvalidParameter" and "vmsize" in error.target.lower()
    return "size" if isinstance(error, QuotaExceeded) or code in _QUOTA or unknown else ""


def ids(resources: Resources) -> list[str]:
    """The ids of everything that `launch` and `network` create. Names are derived, so none need to be stored."""
    roles = {"vm": "worker", "nic": "nic", "ip": "ip", "nsg": "nsg", "vnet": "vnet"}
    disks = [resources.id("disk", _os_disk(attempt)) for attempt in range(TRIES)]
    return disks + [resources.id(kind, role) for kind, role in roles.items()]


def _os_disk(attempt: int) -> str:
    """The role of the worker's OS disk in an attempt: the disk of a VM that failed may stay for a while."""
    return f"worker-os-{attempt + 1}"


@dataclass(frozen=True)
class _Guest:
    """What does not depend on the worker's size and image: its NIC's id, our key, and the cloud-init configuration."""

    nic: str
    public_key: str
    custom_data: str = field(repr=False)


def _vm(
    resources: Resources, environment: Environment, guest: _Guest, size: str, image: Image, disk: str
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
                    **deleted_along(azure),
                },
            },
            "osProfile": {
                "computerName": name,
                "adminUsername": USERNAME,
                "customData": base64.b64encode(guest.custom_data.encode()).decode(),
                "linuxConfiguration": {
                    "disablePasswordAuthentication": True,
                    "ssh": {
                        "publicKeys": [
                            {"path": f"/home/{USERNAME}/.ssh/authorized_keys", "keyData": guest.public_key}
                        ]
                    },
                },
            },
            "networkProfile": {"networkInterfaces": [{"id": guest.nic, "properties": {"primary": True}}]},
        }
    }
    if environment.export_worker_encryption_at_host:
        body["properties"]["securityProfile"] = {"encryptionAtHost": True}
    return {**body, "zones": [run.zone]} if run.zone else body


def _os_disk_of(azure: Azure, environment: Environment) -> Json:
    """The storage type and encryption of the worker's own disk."""
    parameters: Json = {"storageAccountType": "StandardSSD_LRS" if azure.is_modern else "Standard_LRS"}
    if environment.export_worker_disk_encryption_set:
        parameters["diskEncryptionSet"] = {"id": environment.export_worker_disk_encryption_set}
    return parameters
