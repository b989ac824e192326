"""Waiting for what has to happen, and for threads."""

from __future__ import annotations

import threading
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


def together(tasks: list[Callable[[], object]]) -> None:
    """Run them side by side; whatever one raises is raised."""
    errors: list[BaseException] = []

    def caught(task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001  (raised again below)
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
