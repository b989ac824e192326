"""The part of Azure that a worker's disks and power need, for one machine of QEMU: what is asked for really happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qemu import Machine

from coriolis_azure.events import silent

VM = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/virtualMachines/worker"


class Hypervisor:
    """Stands for `Azure`. The id of a disk is the path of its content, below which nothing else is said."""

    is_modern = True
    report = staticmethod(silent)

    def __init__(self, machine: Machine, sectors: dict[str, int] | None = None) -> None:
        self._machine, self._sectors = machine, sectors or {}
        self._entries: list[dict[str, Any]] = []
        self.acts: list[str] = []

    def get(self, id: str) -> dict[str, Any]:
        return {"id": id, "properties": {"storageProfile": {"dataDisks": list(self._entries)}}}

    def patch_vm(self, id: str, body: dict[str, Any], etag: str = "") -> None:
        wanted = {entry["lun"]: entry for entry in body["properties"]["storageProfile"]["dataDisks"]}
        held = {entry["lun"]: entry for entry in self._entries}
        for lun in held.keys() - wanted.keys():
            self._machine.detach(lun)
        for lun in sorted(wanted.keys() - held.keys()):
            path = Path(wanted[lun]["managedDisk"]["id"])
            self._machine.attach(lun, path, sector=self._sectors.get(path.stem, 512))
        self._entries = [wanted[lun] for lun in sorted(wanted)]

    def power_off(self, id: str) -> None:
        self.acts.append("power off")
        self._machine.stop(orderly=False)

    def deallocate(self, id: str) -> None:
        self.acts.append("deallocate")
        self._machine.stop()

    def start(self, id: str) -> None:
        self.acts.append("start")
        self._machine.start()
