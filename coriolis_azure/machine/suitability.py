"""Decides whether a VM can be moved as it is, and lists the caveats of moving it.

Pure: rules over Azure's documents. Caveats are reported before anything is created.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..azure import names
from ..errors import Unsupported
from ..model import Json, at, must

# Publishers whose images are billed by the hour, except for those with a word of _FREE.
_VENDORS = {"redhat": "Red Hat", "suse": "SUSE"}
_FREE = ("byos", "opensuse")


def refuse(vm: Json, disks: Sequence[Json] = ()) -> None:
    """Raise Unsupported for a VM whose disks cannot be copied, or whose copies would be useless."""
    name = vm.get("name") or names.name_of(must(vm, "id"))
    os_disk = must(vm, "properties.storageProfile.osDisk")
    if os_disk.get("diffDiskSettings"):
        raise Unsupported(
            f"VM {name} has an ephemeral OS disk: it exists only on the host, so there is nothing to snapshot",
            remedy="Redeploy the VM with a managed OS disk, then run again.",
        )
    if security_type(vm, disks) == "ConfidentialVM":
        keys = at(os_disk, "managedDisk.securityProfile.securityEncryptionType", "confidential")
        why = (
            "its OS disk is encrypted with keys bound to its virtual TPM: a copy cannot be decrypted outside this VM"
            if keys == "DiskWithVMGuestState"
            else f"its OS disk depends on a guest state ({keys}) that cannot be copied or used by another VM"
        )
        raise Unsupported(
            f"VM {name} is a confidential VM: {why}",
            remedy="Recreate the machine as an ordinary VM, or move its data by other means.",
        )


def security_type(vm: Json, disks: Sequence[Json]) -> str:
    """`Standard`, `TrustedLaunch`, `ConfidentialVM`, or any other value of Azure's, from the VM or its disks.

    The values for disks start with ConfidentialVM too, one for each kind of encryption.
    """
    types = [at(vm, "properties.securityProfile.securityType", "")]
    types += [at(disk, "properties.securityProfile.securityType", "") for disk in disks]
    special = [type_ for type_ in types if not _is(type_, "", "Standard")]
    for type_ in special:
        if type_.lower().startswith("confidentialvm"):
            return "ConfidentialVM"
    return next(("TrustedLaunch" if _is(type_, "TrustedLaunch") else type_ for type_ in special), "Standard")


def leaving(entry: Json) -> bool:
    """Whether the data disk of a VM's disk entry is being detached."""
    return bool(entry.get("toBeDetached"))


def power_state(vm: Json) -> str:
    """`running`, `stopped` (in the guest, still billed), `deallocated`, ...; `unknown` if Azure does not tell."""
    return _status(vm, "PowerState") or "unknown"


def licence(vm: Json) -> str:
    """The `licenseType` of a VM; "" if it has none."""
    type_ = str(at(vm, "properties.licenseType", ""))
    return "" if _is(type_, "None") else type_


def _status(vm: Json, family: str) -> str:
    """The state of one family in the VM's instance view, in lower case; "" if there is none."""
    for status in at(vm, "properties.instanceView.statuses", []):
        prefix, _, state = at(status, "code", "").partition("/")
        if _is(prefix, family):
            return str(state).lower()
    return ""


def caveats(vm: Json, disks: Sequence[Json]) -> tuple[str, ...]:
    """What users should know before they move this VM, most important first."""
    return (
        *_encryption(vm, disks),
        *_consistency(vm, disks),
        *_state(vm),
        *_licences(vm, disks),
        *_platform(vm, disks),
    )


def _encryption(vm: Json, disks: Sequence[Json]) -> list[str]:
    notes = []
    inside = {
        disk.get("name", "")
        for disk in at(vm, "properties.instanceView.disks", [])
        if any(setting.get("enabled") for setting in disk.get("encryptionSettings") or [])
    }
    inside |= {_name(disk) for disk in disks if at(disk, "properties.encryptionSettingsCollection.enabled")}
    if not inside and _has_encryption_extension(vm):
        inside = {"its disks"}
    if inside:
        notes.append(
            f"Azure Disk Encryption is on for {_listed(inside)}: the encrypted content is copied as it is, and the "
            "machine will not boot elsewhere without its keys. Decrypt first, or have the keys at hand."
        )
    keyed = {_name(disk) for disk in disks if at(disk, "properties.encryption.diskEncryptionSetId")}
    if keyed:
        notes.append(
            f"{_with_verb(keyed, 'uses', 'use')} customer-managed keys: copies use the same disk encryption set, and "
            "the identity needs Microsoft.Compute/diskEncryptionSets/read. The replica itself is not encrypted."
        )
    if security_type(vm, disks) == "TrustedLaunch":
        notes.append(
            "Trusted Launch: the virtual TPM is not copied. Disks sealed to it (BitLocker, LUKS with TPM) ask for "
            "their recovery key at the first boot elsewhere."
        )
    return notes


def _has_encryption_extension(vm: Json) -> bool:
    """Whether Azure Disk Encryption is installed. It reports the state of the disks only while the VM runs."""
    extensions = [*at(vm, "resources", []), *at(vm, "properties.instanceView.extensions", [])]
    types = [
        at(extension, path, "") for extension in extensions for path in ("properties.type", "type", "name")
    ]
    enabled = at(vm, "properties.storageProfile.osDisk.encryptionSettings.enabled", default=False)
    return enabled or any("azurediskencryption" in type_.lower() for type_ in types)


def _consistency(vm: Json, disks: Sequence[Json]) -> list[str]:
    notes = []
    going = {
        at(entry, "name") or f"LUN {at(entry, 'lun', '?')}"
        for entry in at(vm, "properties.storageProfile.dataDisks", [])
        if leaving(entry)
    }
    if going:
        notes.append(f"{_with_verb(going, 'is being', 'are being')} detached from the VM and not copied.")
    shared = {_name(disk) for disk in disks if at(disk, "properties.maxShares", 1) > 1}
    if shared:
        notes.append(
            f"{_with_verb(shared, 'is', 'are')} shared between VMs: a copy may contain writes in progress from any "
            "of them. Stop the cluster's writes for the last run."
        )
    if len(disks) > 1 and power_state(vm) == "running":
        notes.append(
            "The VM is running and has several disks: unless consistency is crash or application, their snapshots are "
            "taken at nearly, but not exactly, the same time. Shut it down for the last run."
        )
    if power_state(vm) == "stopped":
        notes.append("The VM is stopped but not deallocated: it is still billed.")
    return notes


def _state(vm: Json) -> list[str]:
    notes = []
    if _status(vm, "HibernationState") == "hibernated":
        notes.append(
            "The VM is hibernated: its OS disk, and so the replica, holds the content of its memory. Start the VM and "
            "shut it down before the last run."
        )
    if _status(vm, "OSState") == "generalized":
        notes.append(
            "The VM is generalized: its system is prepared as an image, so the replica's first boot runs the setup."
        )
    if _is(at(vm, "properties.provisioningState", ""), "Failed"):
        notes.append(
            "Azure's last operation on the VM failed: Azure's description of it may be wrong. Reapply the VM "
            "(`az vm reapply`) and compare its disks before the last run."
        )
    return notes


def _licences(vm: Json, disks: Sequence[Json]) -> list[str]:
    """Caveats about software licences that are paid for through Azure and stay there."""
    notes, type_ = [], licence(vm)
    if vm.get("plan"):
        notes.append(
            f"The VM was created from the marketplace offer {at(vm, 'plan.product', '?')}: its licence may not cover "
            "running it elsewhere."
        )
    if _is(type_, "Windows_Server", "Windows_Client") or type_.upper().endswith("_BYOS"):
        return notes  # the customer's own licence, which can be used elsewhere
    system = at(vm, "properties.storageProfile.osDisk.osType", "")
    if type_:
        notes.append(
            f"The licence {type_} is paid for through Azure: elsewhere the machine needs a licence of its own."
        )
    elif _is(system, "Windows"):
        notes.append(
            "Its Windows is licensed through Azure: elsewhere the machine needs a licence of its own."
        )
    elif vendor := _subscription_vendor(vm, disks):
        notes.append(
            f"Its {vendor} subscription is paid for through Azure: elsewhere the machine needs its own to get updates."
        )
    return notes


def _subscription_vendor(vm: Json, disks: Sequence[Json]) -> str:
    """The vendor whose subscription came with the VM's image; "" if none did."""
    image = at(vm, "properties.storageProfile.imageReference", {})
    reference = " ".join(str(at(image, part, "")) for part in ("publisher", "offer", "sku"))
    sources = [at(disk, "properties.creationData.imageReference.id", "") for disk in disks]
    for source in (text.lower() for text in (reference, *sources)):
        if any(word in source for word in _FREE):
            continue
        for publisher, vendor in _VENDORS.items():
            if source.startswith(f"{publisher} ") or f"/publishers/{publisher}/" in source:
                return vendor
    return ""


def _platform(vm: Json, disks: Sequence[Json]) -> list[str]:
    notes = []
    large = {_name(disk) for disk in disks if at(disk, "properties.creationData.logicalSectorSize") == 4096}
    if large:
        notes.append(
            f"{_with_verb(large, 'has', 'have')} 4096-byte sectors: the partitions will not be found on a destination "
            "with 512-byte sectors."
        )
    accelerated = {
        at(entry, "name") or f"LUN {at(entry, 'lun', 'of the OS disk')}"
        for entry in (
            at(vm, "properties.storageProfile.osDisk", {}),
            *at(vm, "properties.storageProfile.dataDisks", []),
        )
        if at(entry, "writeAcceleratorEnabled", default=False)
    }
    if accelerated:
        notes.append(
            f"{_with_verb(accelerated, 'uses', 'use')} Write Accelerator: Azure may not be able to take a snapshot. "
            "Turn it off for the runs if that fails."
        )
    if edge := at(vm, "extendedLocation.name", ""):
        notes.append(
            f"The VM is in the edge zone {edge}, where no worker can be created: Azure may refuse to copy its disks."
        )
    if _is(at(vm, "properties.priority", ""), "Spot", "SpotPlus", "Low"):
        notes.append("The VM is a Spot VM: Azure may evict it at any time; its disks stay.")
    if _is(at(vm, "properties.storageProfile.diskControllerType", ""), "NVMe"):
        notes.append(
            "The VM sees its disks as NVMe devices: its fstab must not contain /dev/nvme names when it runs elsewhere."
        )
    return notes


def _is(text: str, *values: str) -> bool:
    """Whether a value of Azure's is one of these, ignoring case, which varies."""
    return text.lower() in {value.lower() for value in values}


def _name(disk: Json) -> str:
    return disk.get("name") or names.name_of(disk.get("id", ""))


def _listed(disks: set[str]) -> str:
    return ", ".join(sorted(disks))


def _with_verb(disks: set[str], singular: str, plural: str) -> str:
    """The names of `disks`, followed by the verb in the right number."""
    return f"{_listed(disks)} {singular if len(disks) == 1 else plural}"
