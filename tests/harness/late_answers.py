"""A clock on which Azure's answers come late."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from harness.clocks import Held

NSG: dict[str, Any] = {"properties": {"securityRules": []}}


class Later(Held):
    """A held clock that says it is some hours later."""

    def __init__(self, hours: float = 0) -> None:
        super().__init__()
        self.ahead = timedelta(hours=hours)

    def now(self) -> datetime:
        return datetime.now(timezone.utc) + self.ahead
