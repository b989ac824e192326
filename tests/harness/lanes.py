"""What the fast lane leaves out."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case of a parametrised test, of which a similar one is in the fast lane."""
    return pytest.param(*values, marks=pytest.mark.slow)
