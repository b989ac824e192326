"""What a test does to its process does not reach the next one."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator

import pytest

from coriolis_azure.cli import logs
from coriolis_azure.plugin import configuration
from harness.processes import Forked

CHANGED = (
    "",
    "azure",
    "azure.core.pipeline.policies.http_logging_policy",
    "azure.identity",
    "paramiko",
    "coriolis_azure.made.in.a.test",
)


@pytest.fixture(scope="module")
def _as_before() -> Iterator[None]:
    """Compares after the fixtures of the test have ended, as this one is of a wider scope."""
    before = [seen(name) for name in CHANGED]
    yield
    assert [seen(name) for name in CHANGED] == before
    assert not warnings_are_logged()


def seen(name: str) -> tuple[int, list[logging.Handler], bool]:
    logger = logging.getLogger(name)
    return logger.level, list(logger.handlers), logger.propagate


def warnings_are_logged() -> bool:
    return warnings.showwarning.__module__ == "logging"


@pytest.mark.usefixtures("_as_before")
def test_how_a_test_sets_loggers_does_not_reach_the_next_one() -> None:
    logging.getLogger("coriolis_azure.made.in.a.test").propagate = False
    logs.start(2, as_json=True)
    configuration.quiet()
    assert logging.root.level == logging.DEBUG
    assert logging.getLogger("azure").level == logging.WARNING
    assert warnings_are_logged()


def preloaded() -> None:
    """A process: what it has had before it does anything."""
    print(
        *(
            name
            for name in ("harness.preloaded", "coriolis_azure.cli.entry", "azure.mgmt.compute")
            if name in sys.modules
        )
    )


def test_processes_are_forked_from_one_that_has_imported_everything() -> None:
    with Forked(preloaded) as process:
        assert process.communicate(60) == (
            "harness.preloaded coriolis_azure.cli.entry azure.mgmt.compute\n",
            "",
        )
