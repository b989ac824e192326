"""What the orchestrator requires of the documents that a plugin returns, written down from its contract."""

from __future__ import annotations

from typing import Any

STRING = {"type": "string"}
INTEGER = {"type": "integer"}
IDENTIFIER = {"type": ["string", "number"]}
OS_TYPE = {"enum": ["bsd", "linux", "osx", "solaris", "windows", "other"]}


def object_of(
    required: dict[str, Any], optional: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required), **more}


def list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


VM_EXPORT_INFO = object_of(
    {
        "id": STRING,
        "name": STRING,
        "num_cpu": INTEGER,
        "memory_mb": INTEGER,
        "os_type": OS_TYPE,
        "nested_virtualization": {"type": "boolean"},
        "devices": object_of(
            {
                "disks": list_of(
                    object_of(
                        {"id": STRING, "size_bytes": INTEGER},
                        {
                            "format": {"enum": ["vmdk", "raw", "qcow", "qcow2", "vhd", "vhdx"]},
                            "unit_number": IDENTIFIER,
                            "controller_id": {"type": ["string", "number"]},
                            "storage_backend_identifier": STRING,
                            "allocation_type": {"enum": ["static", "dynamic"]},
                            "legacy_ids": list_of(STRING),
                            "shareable": {"type": "boolean"},
                        },
                    )
                ),
                "nics": list_of(
                    object_of(
                        # The orchestrator indexes the id although its own schema does not ask for it.
                        {"network_name": STRING, "id": STRING},
                        {
                            "mac_address": {"type": ["string", "null"]},
                            "network_id": STRING,
                            "name": STRING,
                            "ip_addresses": list_of(STRING),
                            "subnet_name": STRING,
                        },
                    )
                ),
                "controllers": list_of(
                    object_of({"type": STRING, "bus_number": IDENTIFIER, "id": IDENTIFIER})
                ),
                "cdroms": list_of(object_of({"unit_number": IDENTIFIER})),
                "floppies": list_of(object_of({"unit_number": IDENTIFIER})),
                "serial_ports": list_of(object_of({}, {"id": STRING})),
            }
        ),
    },
    {
        "instance_name": STRING,
        "hostname": STRING,
        "dynamic_memory_enabled": {"type": "boolean"},
        "secure_boot": {"type": "boolean"},
        "firmware_type": {"enum": ["BIOS", "EFI"]},
        "flavor_name": STRING,
        "public_ip_address": STRING,
    },
)

VM_INSTANCE_INFO = object_of(
    {"id": STRING, "name": STRING, "num_cpu": INTEGER, "memory_mb": INTEGER, "os_type": OS_TYPE},
    {"instance_name": STRING, "firmware_type": {"enum": ["BIOS", "EFI"]}, "flavor_name": STRING},
)

VM_NETWORK = object_of({"id": STRING, "name": STRING})

VM_STORAGE = object_of(
    {
        "storage_backends": list_of(
            object_of({"id": STRING, "name": STRING}, {"additional_provider_properties": {"type": "object"}})
            | {"additionalProperties": False}
        )
    },
    {"config_default": STRING},
    additionalProperties=False,
)

SOURCE_OPTIONS = list_of(
    object_of(
        {"name": STRING, "values": {"type": "array"}}, {"config_default": {}}, additionalProperties=False
    )
)

VOLUMES_INFO = list_of(object_of({"disk_id": STRING}, {"replica_state": {"type": "object"}}))

REPLICATION_WORKER_CONN_INFO = object_of(
    {"ip": STRING, "port": INTEGER, "username": STRING}, {"password": STRING, "pkey": STRING}
)
