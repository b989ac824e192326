"""The parts of a VM (size, image, OS profile, NICs, disks), checked as Azure checks them."""

from __future__ import annotations

import base64
import binascii
import copy
import uuid

from coriolis_azure.sandbox import catalog
from coriolis_azure.sandbox.compute import disks
from coriolis_azure.sandbox.network.interfaces import nic_in_use
from coriolis_azure.sandbox.relations import (
    DISKS,
    INTERFACES,
    disk_entries,
    machine_of_disk,
    machine_of_interface,
    reference,
    same,
)
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.wire import ArmError, Json, bad_request, invalid
from coriolis_azure.sandbox.world import World

_RESERVED_NAMES = (
    *("1", "123", "a", "admin", "admin1", "admin2", "administrator", "backup", "console", "david", "guest"),
    *("john", "owner", "root", "server", "sql", "support", "sys", "test", "test1", "test2", "test3"),
    *("user", "user1", "user2", "user3", "user4", "user5", "video"),
)
_KEY_TYPES = ("ssh-rsa ", "ssh-ed25519 ")


def checked_size(
    requested: Json, location: str, machine_id: str = "", zones: list[str] | None = None
) -> catalog.Size:
    """The size in the request; refused if it is unknown or unavailable in the location or the zones."""
    name = str((requested.get("hardwareProfile") or {}).get("vmSize") or "")
    if not name:
        raise invalid("Required parameter 'hardwareProfile.vmSize' is missing (null).", "vmSize")
    size = catalog.SIZES.get(name.lower())
    if size is None:
        offered = ",".join(
            candidate.name for candidate in catalog.SIZES.values() if location not in candidate.closed_in
        )
        raise invalid(
            f"The requested VM size {name} is not available in the current region. The sizes available in "
            f"the current region are: {offered}. Find out more on the available VM sizes in each region at "
            "https://aka.ms/azure-regions.",
            "vmSize",
        )
    if location in size.closed_in:
        raise ArmError(
            409,
            "SkuNotAvailable",
            "The requested VM size for resource 'Following SKUs have failed for Capacity Restrictions: "
            f"{size.name}' is currently not available in location '{location}'. Please try another size or "
            "deploy to a different location or different zone. See https://aka.ms/azureskunotavailable for "
            "details.",
        )
    if zones and not set(zones) <= set(size.zones(location)):
        raise ArmError(
            409,
            "SkuNotAvailable",
            f"The requested size for resource '{machine_id}' is currently not available in location '{location}' "
            f"zones '{','.join(zones)}' for subscription '{machine_id.split('/')[2]}'. Please try another size or "
            "deploy to a different location or zones. See https://aka.ms/azureskunotavailable for details.",
        )
    return size


def checked_interfaces(world: World, machine_id: str, location: str, requested: Json) -> list[Json]:
    """The references to the NICs; refused if one is missing, in another location or in use."""
    profile = requested.get("networkProfile") or {}
    if profile.get("networkInterfaceConfigurations"):
        raise bad_request("The sandbox does not imitate networkInterfaceConfigurations: make the NIC first.")
    entries = profile.get("networkInterfaces") or []
    name = machine_id.rpartition("/")[2]
    if not entries:
        raise ArmError(
            400,
            "VirtualMachineMustHaveAtLeastOneNetworkInterface",
            f"Virtual machine {name} must have at least one network interface.",
        )
    references = []
    for entry in entries:
        interface = world.state.find(str(entry.get("id") or ""))
        if interface is None or interface.type != INTERFACES:
            raise ArmError(404, "NotFound", f"Resource {entry.get('id')} not found.")
        if not same(interface.location, location):
            raise ArmError(
                400,
                "InvalidResourceReference",
                f"Resource {interface.id} referenced by resource {machine_id} was not found. Please make "
                "sure that the referenced resource exists, and that both resources are in the same region.",
            )
        user = machine_of_interface(world.state, interface.id)
        if user is not None:
            raise nic_in_use(interface, user)
        world.not_reserved(interface.id, machine_id)
        references.append(
            {"id": interface.id, **({"properties": entry["properties"]} if "properties" in entry else {})}
        )
    if (
        len(references) > 1
        and sum(bool((entry.get("properties") or {}).get("primary")) for entry in references) != 1
    ):
        raise ArmError(
            400,
            "VirtualMachineMustHaveOneNetworkInterfaceAsPrimary",
            f"Virtual machine {name} must have one network interface set as the primary.",
        )
    return references


def checked_image(storage: Json, size: catalog.Size) -> tuple[catalog.Image, str] | None:
    """The image and its exact version; None for a VM made from an existing OS disk."""
    image_reference = storage.get("imageReference")
    if (storage.get("osDisk") or {}).get("createOption") == "Attach":
        return None
    if not image_reference:
        raise invalid(
            "Required parameter 'storageProfile.imageReference' is missing (null).", "imageReference"
        )
    names = [str(image_reference.get(key) or "") for key in ("publisher", "offer", "sku", "version")]
    image = catalog.image(*names[:3])
    versions = image.versions if image else ()
    version = versions[-1] if versions and names[3].lower() == "latest" else names[3]
    if image is None or version not in versions:
        raise ArmError(
            404,
            "PlatformImageNotFound",
            f"The platform image '{':'.join(names)}' is not available. Verify that all fields in the "
            "storage profile are correct. For more details about storage profile information, please refer "
            "to https://aka.ms/storageprofile",
            "imageReference",
        )
    if image.architecture != size.architecture:
        raise bad_request(
            f"Cannot create a VM of size '{size.name}' because this VM size only supports a CPU "
            f"Architecture of '{size.architecture}', but an image or disk given has CPU Architecture "
            f"'{image.architecture}'. This check can be suppressed by using an image or disk of the same "
            "architecture."
        )
    bootable(size, image.generation)
    return image, version


def bootable(size: catalog.Size, generation: str) -> None:
    """Refuse a disk of a generation that the size cannot boot."""
    if generation not in size.generations.split(","):
        raise bad_request(
            f"The selected VM size '{size.name}' cannot boot Hypervisor Generation '{generation[1:]}'. If "
            "this was a Create operation please check that the Hypervisor Generation of the Image matches "
            "the Hypervisor Generation of the selected VM Size."
        )


def checked_controller(storage: Json, size: catalog.Size) -> str:
    """The disk controller, SCSI or NVMe; refused if the size does not have it."""
    offered = [controller.strip() for controller in size.controllers.split(",")]
    controller = storage.get("diskControllerType") or offered[0]
    if controller not in offered:
        raise invalid(
            f"The VM size '{size.name}' is not supported with disk controller type '{controller}'.",
            "diskControllerType",
        )
    return str(controller)


def set_os_profile(machine: Resource, requested: Json, image: tuple[catalog.Image, str] | None) -> None:
    """Check the OS profile and store what Azure shows of it; customData is stored hidden."""
    profile = requested.get("osProfile")
    if image is None:
        if profile:
            raise invalid("Parameter 'osProfile' is not allowed.", "osProfile")
        return
    if not profile:
        raise invalid("Required parameter 'osProfile' is missing (null).", "osProfile")
    name = str(profile.get("computerName") or machine.name)
    limit = 15 if image[0].os_type == "Windows" else 64
    if len(name) > limit:
        raise invalid(
            f"{image[0].os_type} host name cannot exceed {limit} characters in length or contain the "
            "following characters: ` ~ ! @ # $ % ^ & * ( ) = + _ [ ] { } \\ | ; : ' \" , < > / ?.",
            "computerName",
        )
    user = str(profile.get("adminUsername") or "")
    if not user or user.lower() in _RESERVED_NAMES or user.endswith(".") or len(user) > 64:
        raise invalid("The Admin Username specified is not allowed.", "adminUsername")
    linux = copy.deepcopy(profile.get("linuxConfiguration") or {})
    keys = (linux.get("ssh") or {}).get("publicKeys") or []
    for key in keys:
        _checked_key(key, user)
    if not keys and not profile.get("adminPassword"):
        raise invalid(
            "Authentication using either SSH or by user name and password must be enabled in Linux profile.",
            "linuxConfiguration",
        )
    custom = profile.get("customData")
    if custom is not None:
        _checked_custom_data(custom)
        machine.hidden["customData"] = custom
    visible = {key: value for key, value in profile.items() if key not in {"customData", "adminPassword"}}
    machine.properties["osProfile"] = {
        **copy.deepcopy(visible),
        "computerName": name,
        "secrets": [],
        "allowExtensionOperations": True,
        "requireGuestProvisionSignal": True,
    }
    machine.hidden["guest"] = image[0].os_type == "Linux" and bool(keys)


def _checked_key(key: Json, user: str) -> None:
    path = f"/home/{user}/.ssh/authorized_keys"
    if key.get("path") != path:
        raise invalid(
            f"Destination path for Ssh public keys is currently limited to its default value {path} due to "
            "a known issue in Linux provisioning agent.",
            "linuxConfiguration.ssh.publicKeys.path",
        )
    if not str(key.get("keyData") or "").startswith(_KEY_TYPES):
        raise invalid(
            "The value of parameter linuxConfiguration.ssh.publicKeys.keyData is invalid.",
            "linuxConfiguration.ssh.publicKeys.keyData",
        )


def _checked_custom_data(text: object) -> None:
    try:
        data = base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError):
        raise invalid("Custom data in OSProfile must be in Base64 encoding.", "customData") from None
    if len(data) > 65535:
        raise invalid(
            "Custom data in OSProfile must be in Base64 encoding and with a maximum length of 87380 "
            "characters.",
            "customData",
        )


def make_os_disk(
    world: World,
    machine: Resource,
    size: catalog.Size,
    storage: Json,
    image: tuple[catalog.Image, str] | None,
) -> Json:
    """The entry of the OS disk: an existing disk, or one made from the image."""
    requested = storage.get("osDisk") or {}
    options = {
        "caching": requested.get("caching", "ReadWrite"),
        "deleteOption": requested.get("deleteOption", "Detach"),
    }
    if image is None:
        disk = free_disk(world, machine, size, reference(requested, "managedDisk"))
        os_type = requested.get("osType") or disk.properties.get("osType")
        if not os_type:
            raise invalid("Required parameter 'osDisk.osType' is missing (null).", "osDisk.osType")
        bootable(size, disk.properties.get("hyperVGeneration", "V1"))
        entry = {
            "osType": os_type,
            "name": disk.name,
            "createOption": "Attach",
            "managedDisk": {"id": disk.id},
        }
        return entry | options
    source, version = image
    image_reference = storage["imageReference"]
    machine.properties["storageProfile"]["imageReference"] = {**image_reference, "exactVersion": version}
    gib = requested.get("diskSizeGB") or source.disk_gib
    if gib < source.disk_gib:
        raise bad_request(
            f"The specified disk size {gib} GB is smaller than the size of the corresponding disk in the VM "
            f"image: {source.disk_gib} GB. This is not allowed. Please choose equal or greater size or do "
            "not specify an explicit size."
        )
    name = requested.get("name") or f"{machine.name}_OsDisk_1_{uuid.uuid4().hex}"
    properties = {
        "creationData": {
            "createOption": "FromImage",
            "imageReference": {"id": _image_id(machine, source, version)},
        },
        "osType": source.os_type,
        "hyperVGeneration": source.generation,
        "supportedCapabilities": {"architecture": source.architecture, "diskControllerTypes": "SCSI, NVMe"},
    }
    disk = implicit_disk(world, machine, size, {**requested, "name": name, "diskSizeGB": gib}, properties)
    if machine.document["tags"]:  # as recorded: 68 of 68 such disks have their VM's tags
        disk.document["tags"] = dict(machine.document["tags"])
    entry = {
        "osType": source.os_type,
        "name": disk.name,
        "createOption": "FromImage",
        "managedDisk": {"id": disk.id},
    }
    return entry | options


def _image_id(machine: Resource, source: catalog.Image, version: str) -> str:
    subscription = machine.id.split("/")[2]
    place = f"/Subscriptions/{subscription}/Providers/Microsoft.Compute/Locations/{machine.location}"
    image = f"Publishers/{source.publisher}/ArtifactTypes/VMImage/Offers/{source.offer}/Skus/{source.sku}"
    return f"{place}/{image}/Versions/{version}"


def implicit_disk(
    world: World, machine: Resource, size: catalog.Size, requested: Json, properties: Json
) -> Resource:
    """Make a disk along with the VM. `requested`: the VM's entry for it, with name and size."""
    name, gib = str(requested["name"]), int(requested["diskSizeGB"])
    sku = implicit_sku(world, machine, size, name, requested)
    top: Json = {"sku": {"name": sku, "tier": catalog.DISK_SKUS[sku]}}
    if "zones" in machine.document and not sku.endswith("_ZRS"):
        top["zones"] = list(machine.document["zones"])
    key = reference(requested.get("managedDisk") or {}, "diskEncryptionSet")
    if key:
        encryption = {"type": "EncryptionAtRestWithCustomerKey", "diskEncryptionSetId": key}
        properties = {**properties, "encryption": encryption}
    content = world.contents.zeros(gib * disks.GIB)
    return disks.new_disk(world, _disk_id(machine, name), machine.location, content, properties, **top)


def _disk_id(machine: Resource, name: str) -> str:
    return f"{machine.id.rpartition('/providers/')[0]}/providers/{DISKS}/{name}"


def implicit_sku(world: World, machine: Resource, size: catalog.Size, name: str, requested: Json) -> str:
    """The SKU of a disk to be made along with the VM; refused if the name is taken or the size lacks the SKU."""
    disk_id = _disk_id(machine, name)
    if world.state.find(disk_id) is not None or world.reserved(disk_id):
        raise ArmError(
            409,
            "ConflictingUserInput",
            f"Disk {name} already exists in resource group {machine.id.split('/')[4]}. Only "
            "CreateOption.Attach is supported.",
        )
    sku = str((requested.get("managedDisk") or {}).get("storageAccountType") or "")
    sku = sku or ("Premium_LRS" if size.premium else "Standard_LRS")
    if sku not in catalog.DISK_SKUS:
        raise invalid(
            f"The value '{sku}' of parameter storageAccountType is not supported here.", "managedDisk"
        )
    premium_allowed(size, sku, name)
    return sku


def free_disk(world: World, machine: Resource, size: catalog.Size, disk_id: str | None) -> Resource:
    """The disk, if it can be attached to this VM; otherwise refused as Azure does."""
    disk = world.state.find(disk_id or "")
    if disk is None or disk.type != DISKS:
        raise ArmError(404, "NotFound", f"Disk {(disk_id or '').rpartition('/')[2]} is not found.")
    owner = machine_of_disk(world.state, disk.id)
    if owner is not None:
        entry = next(
            candidate
            for candidate in disk_entries(owner)
            if same(reference(candidate, "managedDisk"), disk.id)
        )
        if entry.get("toBeDetached"):
            raise ArmError(
                409,
                "AttachDiskWhileBeingDetached",
                f"Cannot attach data disk '{disk.name}' to VM '{machine.name}' because the disk is "
                "currently being detached or the last detach operation failed. Please wait until the disk "
                "is completely detached and then try again or delete/detach the disk explicitly again.",
            )
        raise ArmError(
            409,
            "ConflictingUserInput",
            f"Disk '{disk.id}' cannot be attached as the disk is already owned by VM '{owner.id}'.",
        )
    if not same(disk.location, machine.location):
        raise bad_request(
            f"Disk {disk.id} cannot be attached to the VM because it is in location '{disk.location}' and "
            f"the VM is in location '{machine.location}'."
        )
    _same_zone(machine, disk)
    premium_allowed(size, disk.document["sku"]["name"], disk.name)
    return disk


def _same_zone(machine: Resource, disk: Resource) -> None:
    if str(disk.document["sku"]["name"]).endswith("_ZRS"):
        return
    vm_zone = (machine.document.get("zones") or [""])[0]
    disk_zone = (disk.document.get("zones") or [""])[0]
    if vm_zone == disk_zone:
        return
    if not disk_zone:
        raise bad_request(
            f"Disk {disk.id} cannot be attached to the VM because it is not in zone '{vm_zone}'."
        )
    raise bad_request(
        f"Disk {disk.id} cannot be attached to the VM because it is not in the same zone as the VM. VM "
        f"zone: '{vm_zone}'. Disk zone: '{disk_zone}'."
    )


def premium_allowed(size: catalog.Size, sku: str, name: str) -> None:
    """Refuse a premium disk on a size that does not support it."""
    if catalog.DISK_SKUS[sku] == "Premium" and not size.premium:
        raise invalid(
            f"Requested operation cannot be performed because the VM size {size.name} does not support the "
            f"storage account type {sku} of disk '{name}'. Consider updating the VM to a size that supports "
            "Premium storage."
        )
