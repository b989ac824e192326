"""Waiting for what has to happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from harness.constants import DEADLINE

Value = TypeVar("Value")


def eventually(condition: Callable[[], Value]) -> Value:
    """What `condition` gives once it is true."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.005)
    return value
