"""What many tests name."""

from __future__ import annotations

MIB = 1 << 20
GROUP = "sandbox"
DEADLINE = 60.0  # seconds after which what has not happened never will, however busy the machine is
