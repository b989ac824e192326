"""Whether a VM can be moved as it is: what is refused, and why; what is possible, but should be known before.

Pure: rules over the documents that Azure gives. A caveat is one sentence; nothing is made before it is told.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..azure import names
from ..errors import Unsupported
from ..model import Json, at, must

# Publishers whose images are paid for by the hour, but for these.
_VENDORS = {"redhat": "Red Hat", "suse": "SUSE"}
_FREE = ("byos", "opensuse")


def refuse(vm: Json, disks: Sequence[Json] = ()) -> None:
    """Raise Unsupported for a VM whose disks cannot be copied, or would be of no use."""
    name = vm.get("name") or names.name_of(must(vm, "id"))
    os_disk = must(vm, "properties.storageProfile.osDisk")
    if os_disk.get("diffDiskSettings"):
        raise Unsupported(
            f"VM {name} has an ephemeral OS disk: it lives on the host only, so there is nothing to snapshot",
            remedy="Redeploy the VM with a managed OS disk, then run again.",
        )
    if security_type(vm, disks) == "ConfidentialVM":
        keys = at(os_disk, "managedDisk.securityProfile.securityEncryptionType", "confidential")
        why = (
            "its OS disk is encrypted with keys bound to its virtual TPM: outside of this VM its bytes are of no use"
            if keys == "DiskWithVMGuestState"
            else f"its OS disk belongs to a guest state ({keys}) that cannot be copied, and is kept from other VMs"
        )
        raise Unsupported(
            f"VM {name} is a confidential VM: {why}",
            remedy="Recreate the machine as an ordinary VM, or move its data by other means.",
        )


def security_type(vm: Json, disks: Sequence[Json]) -> str:
    """`Standard`, `TrustedLaunch` or `ConfidentialVM`, else as Azure calls it; its disk tells it too.

    Disks have a kind of ConfidentialVM for each way in which they may be encrypted.
    """
    told = [at(vm, "properties.securityProfile.securityType", "")]
    told += [at(disk, "properties.securityProfile.securityType", "") for disk in disks]
    named = [text for text in told if not _is(text, "", "Standard")]
    for text in named:
        if text.lower().startswith("confidentialvm"):
            return "ConfidentialVM"
    return next(("TrustedLaunch" if _is(text, "TrustedLaunch") else text for text in named), "Standard")


def leaving(entry: Json) -> bool:
    """Whether a VM's entry for a data disk is of one that is being detached."""
    return bool(entry.get("toBeDetached"))


def power_state(vm: Json) -> str:
    """`running`, `stopped` (in the guest, still billed), `deallocated`, ...; `unknown` where Azure does not say."""
    return _status(vm, "PowerState") or "unknown"


def licence(vm: Json) -> str:
    """The `licenseType` of a VM; "" where it has none."""
    told = str(at(vm, "properties.licenseType", ""))
    return "" if _is(told, "None") else told


def _status(vm: Json, family: str) -> str:
    """What the VM's instance view says of one thing, in lower case; "" where it says nothing."""
    for status in at(vm, "properties.instanceView.statuses", []):
        of, _, state = at(status, "code", "").partition("/")
        if _is(of, family):
            return str(state).lower()
    return ""


def caveats(vm: Json, disks: Sequence[Json]) -> tuple[str, ...]:
    """What a person should know before moving this VM, most important first."""
    return (
        *_encryption(vm, disks),
        *_consistency(vm, disks),
        *_state(vm),
        *_licences(vm, disks),
        *_platform(vm, disks),
    )


def _encryption(vm: Json, disks: Sequence[Json]) -> list[str]:
    found = []
    inside = {
        disk.get("name", "")
        for disk in at(vm, "properties.instanceView.disks", [])
        if any(setting.get("enabled") for setting in disk.get("encryptionSettings") or [])
    }
    inside |= {_name(disk) for disk in disks if at(disk, "properties.encryptionSettingsCollection.enabled")}
    if not inside and _has_encryption_extension(vm):
        inside = {"its disks"}
    if inside:
        found.append(
            f"Azure Disk Encryption is on for {_listed(inside)}: the guest's own encryption is copied as it is, and "
            "the machine will not boot elsewhere without its keys. Decrypt first, or have the keys at hand."
        )
    keyed = {_name(disk) for disk in disks if at(disk, "properties.encryption.diskEncryptionSetId")}
    if keyed:
        found.append(
            f"{_saying(keyed, 'uses', 'use')} customer-managed keys: copies use the same disk encryption set, and the "
            "identity needs Microsoft.Compute/diskEncryptionSets/read. The replica itself is plain."
        )
    if security_type(vm, disks) == "TrustedLaunch":
        found.append(
            "Trusted Launch: the virtual TPM is not copied. What is sealed to it (BitLocker, LUKS with TPM) asks for "
            "its recovery key at the first boot elsewhere."
        )
    return found


def _has_encryption_extension(vm: Json) -> bool:
    """Whether Azure Disk Encryption is installed: it tells the disks' state only while the VM runs."""
    extensions = [*at(vm, "resources", []), *at(vm, "properties.instanceView.extensions", [])]
    told = [at(each, path, "") for each in extensions for path in ("properties.type", "type", "name")]
    inside = at(vm, "properties.storageProfile.osDisk.encryptionSettings.enabled", False)
    return inside or any("azurediskencryption" in text.lower() for text in told)


def _consistency(vm: Json, disks: Sequence[Json]) -> list[str]:
    found = []
    going = {
        at(entry, "name") or f"LUN {at(entry, 'lun', '?')}"
        for entry in at(vm, "properties.storageProfile.dataDisks", [])
        if leaving(entry)
    }
    if going:
        found.append(f"{_saying(going, 'is being', 'are being')} detached from the VM: that is not copied.")
    shared = {_name(disk) for disk in disks if at(disk, "properties.maxShares", 1) > 1}
    if shared:
        found.append(
            f"{_saying(shared, 'is', 'are')} shared between machines: a copy is only as consistent as their cluster. "
            "Stop the cluster's writes for the last run."
        )
    if len(disks) > 1 and power_state(vm) == "running":
        found.append(
            "Several disks of a running machine: their snapshots are taken at nearly, not exactly, one moment. "
            "Shut it down for the last run."
        )
    if power_state(vm) == "stopped":
        found.append("The VM is stopped but not deallocated: it is still billed for.")
    return found


def _state(vm: Json) -> list[str]:
    found = []
    if _status(vm, "HibernationState") == "hibernated":
        found.append(
            "The VM is hibernated: the content of its memory is on the OS disk and will be in the replica. "
            "Start the VM and shut it down before the last run."
        )
    if _status(vm, "OSState") == "generalized":
        found.append(
            "The VM is generalized: its system is prepared as an image, so the replica's first boot is a first set-up."
        )
    if _is(at(vm, "properties.provisioningState", ""), "Failed"):
        found.append(
            "Azure's last operation on the VM failed: what Azure tells of it may be wrong. Reapply the VM "
            "(`az vm reapply`) and compare its disks before the last run."
        )
    return found


def _licences(vm: Json, disks: Sequence[Json]) -> list[str]:
    """What of the software's licences is paid for through Azure, and stays there."""
    found, told = [], licence(vm)
    if vm.get("plan"):
        found.append(
            f"The machine was made from the marketplace offer {at(vm, 'plan.product', '?')}: its licence may not "
            "cover running it elsewhere."
        )
    if _is(told, "Windows_Server", "Windows_Client") or told.upper().endswith("_BYOS"):
        return found  # a licence of the customer's own goes where the customer goes
    system = at(vm, "properties.storageProfile.osDisk.osType", "")
    if told:
        found.append(
            f"The licence {told} is paid for through Azure: the machine needs one of its own elsewhere."
        )
    elif _is(system, "Windows"):
        found.append(
            "Its Windows is licensed through Azure: the machine needs a licence of its own elsewhere."
        )
    elif vendor := _subscribed(vm, disks):
        found.append(
            f"Its {vendor} subscription is paid for through Azure: elsewhere the machine needs one of its own to get "
            "updates."
        )
    return found


def _subscribed(vm: Json, disks: Sequence[Json]) -> str:
    """Whose subscription came with the image that the machine was made from; "" where none did."""
    image = at(vm, "properties.storageProfile.imageReference", {})
    told = " ".join(str(at(image, part, "")) for part in ("publisher", "offer", "sku"))
    sources = [at(disk, "properties.creationData.imageReference.id", "") for disk in disks]
    for source in (text.lower() for text in (told, *sources)):
        if any(word in source for word in _FREE):
            continue
        for publisher, vendor in _VENDORS.items():
            if source.startswith(f"{publisher} ") or f"/publishers/{publisher}/" in source:
                return vendor
    return ""


def _platform(vm: Json, disks: Sequence[Json]) -> list[str]:
    found = []
    large = {_name(disk) for disk in disks if at(disk, "properties.creationData.logicalSectorSize") == 4096}
    if large:
        found.append(
            f"{_saying(large, 'has', 'have')} sectors of 4096 bytes: partitions are not found on a destination with "
            "sectors of 512 bytes."
        )
    accelerated = {
        at(entry, "name") or f"LUN {at(entry, 'lun', 'of the OS disk')}"
        for entry in (
            at(vm, "properties.storageProfile.osDisk", {}),
            *at(vm, "properties.storageProfile.dataDisks", []),
        )
        if at(entry, "writeAcceleratorEnabled", False)
    }
    if accelerated:
        found.append(
            f"{_saying(accelerated, 'uses', 'use')} Write Accelerator, of which Azure does not promise to take "
            "snapshots: turn it off for the runs if it refuses."
        )
    if edge := at(vm, "extendedLocation.name", ""):
        found.append(
            f"The machine is in the edge zone {edge}, where workers are not made: copies may be refused."
        )
    if _is(at(vm, "properties.priority", ""), "Spot", "SpotPlus", "Low"):
        found.append("The VM is a Spot VM: Azure may evict it at any time; its disks stay.")
    if _is(at(vm, "properties.storageProfile.diskControllerType", ""), "NVMe"):
        found.append(
            "The machine sees its disks as NVMe: its fstab must not name /dev/nvme devices elsewhere."
        )
    return found


def _is(text: str, *values: str) -> bool:
    """Whether a text of Azure's is one of these values: their case is not always the same."""
    return text.lower() in {value.lower() for value in values}


def _name(disk: Json) -> str:
    return disk.get("name") or names.name_of(disk.get("id", ""))


def _listed(found: set[str]) -> str:
    return ", ".join(sorted(found))


def _saying(found: set[str], one: str, several: str) -> str:
    """The names with the verb that goes with them."""
    return f"{_listed(found)} {one if len(found) == 1 else several}"
