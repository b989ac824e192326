"""The memory that a function takes, measured in a process of its own: here, threads of other tests allocate too."""

from __future__ import annotations

import multiprocessing
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def peak(function: Callable[..., Any], *args: Any) -> int:
    """The most bytes that Python held at once on behalf of this call.

    The function is a module's, and its arguments can be pickled. What it raises is raised here, so it may assert.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_traced, function, *args).result()


def _traced(function: Callable[..., Any], *args: Any) -> int:
    tracemalloc.start()
    function(*args)
    return tracemalloc.get_traced_memory()[1]
