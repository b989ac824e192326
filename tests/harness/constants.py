"""What many tests name."""

from __future__ import annotations

MIB = 1 << 20
GROUP = "sandbox"
