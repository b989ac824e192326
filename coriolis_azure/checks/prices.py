"""What Azure charges: the table in this package, or a file that replaces it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..settings import checked, read_json

_OURS = Path(__file__).with_name("prices.json")


@dataclass(frozen=True)
class Prices:
    """Prices in one currency, without taxes: `schemas/prices.json` says of what. `date`: when they held."""

    date: str
    currency: str
    source: str
    vcpu_hour: float
    size_hour: Mapping[str, float]
    address_hour: float
    disk_gib_month: Mapping[str, float]
    snapshot_gib_month: float
    egress_gib: float

    @classmethod
    def read(cls, file: str | Path | None = None) -> Prices:
        """The prices in `file`; without one, those of this package. Raises InvalidInput for a file that is wrong."""
        return cls(**checked("prices", read_json(Path(file or _OURS))))

    def worker_hour(self, size: str, vcpus: float) -> float:
        """The price of a worker for an hour."""
        known = {name.lower(): price for name, price in self.size_hour.items()}
        return known.get(size.lower(), self.vcpu_hour * vcpus)

    def disk_month(self, sku: str) -> float:
        """The price of a GiB of a disk for a month."""
        return self.disk_gib_month.get(sku, self.disk_gib_month["Premium_LRS"])
