"""A `Machine` in the orchestrator's format, from which destination plugins make a VM."""

from __future__ import annotations

from ..model import Disk, Json, Machine, Nic
from .inspection import os_family


def export_info(machine: Machine) -> Json:
    """The machine as the orchestrator's vm_export_info, without nulls and with all six device lists."""
    info: Json = {
        "id": machine.id,
        "name": machine.name,
        "instance_name": machine.name,
        "num_cpu": machine.vcpus,
        "memory_mb": machine.memory_mb,
        "os_type": os_family(machine.os_type),
        "nested_virtualization": False,
        "dynamic_memory_enabled": False,
        "firmware_type": machine.firmware,
        "secure_boot": machine.secure_boot,
        "security_type": machine.security,
        "flavor_name": machine.size,
        "location": machine.location,
        "zones": list(machine.zones),
        "resource_group": machine.group,
        "power_state": machine.power_state,
        "devices": {
            "disks": [_exported_disk(disk) for disk in machine.disks],
            "nics": [_exported_nic(nic) for nic in machine.nics],
            "controllers": [{"id": "scsi0", "type": "SCSI", "bus_number": 0}],
            "cdroms": [],
            "floppies": [],
            "serial_ports": [],
        },
    }
    if machine.plan:
        info["marketplace_plan"] = machine.plan
    if machine.licence:
        info["license_type"] = machine.licence
    if machine.caveats:
        info["caveats"] = list(machine.caveats)
    if machine.hostname:
        info["hostname"] = machine.hostname
    public = next((nic.public_address for nic in machine.nics if nic.public_address), "")
    if public:
        info["public_ip_address"] = public
    return info


def _exported_disk(disk: Disk) -> Json:
    exported: Json = {
        "id": disk.id,
        "name": disk.name,
        "size_bytes": disk.size_bytes,
        "unit_number": 0 if disk.lun is None else disk.lun + 1,
        "controller_id": "scsi0",
        "storage_backend_identifier": disk.sku,
        "caching": disk.caching,
        "shareable": disk.shareable,
        "sector_bytes": disk.sector_bytes,
        "zones": list(disk.zones),
    }
    return exported if disk.lun is None else {**exported, "lun": disk.lun}


def _exported_nic(nic: Nic) -> Json:
    return {
        "id": nic.id,
        "name": nic.name,
        "mac_address": nic.mac.replace("-", ":").lower() or None,
        "network_name": nic.network,
        "network_id": nic.subnet_id,
        "subnet_name": nic.network.rpartition("/")[2],
        "ip_addresses": list(nic.private_addresses),
        **({"public_ip_address": nic.public_address} if nic.public_address else {}),
    }
