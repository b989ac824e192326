"""The fixtures: a sandbox Azure, raw images for its disks, and a Source that reaches it without sockets."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis
import pytest

from coriolis_azure.clock import Clock
from coriolis_azure.events import Event
from coriolis_azure.sandbox import Sandbox
from coriolis_azure.sandbox.sandbox import PACE
from coriolis_azure.source import Source
from harness import keys, replicas
from harness.clients import Clients, in_process
from harness.command_line import served, settings  # noqa: F401 - fixtures
from harness.constants import MIB

# How long a machine takes under load says nothing about a property.
hypothesis.settings.register_profile(
    "under load", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("under load")

# The orchestrator, where it is installed. What it warns of while it is imported is not ours to mend.
with warnings.catch_warnings(), suppress(ImportError):
    warnings.simplefilter("ignore")
    for _module in ("schemas", "tasks.base", "osmorphing.manager", "api.v1.views.minion_pool_view"):
        importlib.import_module(f"coriolis.{_module}")


keys.take_turns()


# A shell that puts the tests into the background has them ignore Ctrl-C, and what they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What the SDKs are made of stays: the collector need not go through it again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals of tests stay in the test's folder; settings of the person who tests stay out."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("CORIOLIS_AZURE_CONNECTION", "CORIOLIS_AZURE_ENVIRONMENT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """A test's settings of loggers end with it: the command line and the plugin set them for their whole process."""
    before = {logger: settings_of(logger) for logger in loggers()}
    yield
    logging.captureWarnings(False)
    untouched = settings_of(logging.Logger("untouched"))
    for logger in loggers():
        level, handlers, filters, logger.propagate, logger.disabled = before.get(logger, untouched)
        if logger.level != level:
            logger.setLevel(level)  # which empties the caches of all loggers
        logger.handlers[:], logger.filters[:] = handlers, filters


def loggers() -> list[logging.Logger]:
    """The root logger and all that have been asked for by name."""
    named = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in named if isinstance(logger, logging.Logger))]


def settings_of(logger: logging.Logger) -> tuple[int, list[logging.Handler], list[Any], bool, bool]:
    """All that can be set on a logger."""
    return logger.level, list(logger.handlers), list(logger.filters), logger.propagate, logger.disabled


@pytest.fixture
def clock() -> Clock:
    """The clock of the sandbox and of all sources; a module may have a held one."""
    return Clock()


@pytest.fixture
def azure(tmp_path: Path, clock: Clock) -> Iterator[Sandbox]:
    """A sandbox Azure of this test's own. On a held clock its time is Azure's own."""
    with Sandbox(tmp_path / "azure", clock=clock, pace=PACE if type(clock) is Clock else 1) as sandbox:
        yield sandbox


@pytest.fixture
def clients(azure: Sandbox) -> Iterator[Clients]:
    """The official SDKs' clients on that sandbox, in this process."""
    with in_process(azure) as clients:
        yield clients


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., Path]:
    """Make raw images: `image(name, size, seed)` is random data with a zero middle."""

    def make(name: str, size: int = 3 * MIB, seed: int = 0) -> Path:
        path = tmp_path / f"{name}.raw"
        third = size // 3
        rng = random.Random(seed)
        path.write_bytes(rng.randbytes(third) + bytes(third) + rng.randbytes(size - 2 * third))
        return path

    return make


@pytest.fixture
def told() -> list[Event]:
    """What `source` reported."""
    return []


@pytest.fixture
def connect(azure: Sandbox, told: list[Event], clock: Clock) -> Iterator[Callable[..., Source]]:
    """Sources on the sandbox: `connect(environment={...}, connection={...})` changes the settings."""
    opened: list[Source] = []

    def make(
        environment: dict[str, Any] | None = None,
        connection: dict[str, Any] | None = None,
        clock: Clock = clock,
    ) -> Source:
        source = Source(
            {**azure.connection_info(), **(connection or {})},
            {**azure.environment(), **(environment or {})},
            report=told.append,
            transport=azure.transport(),
            clock=clock,
        )
        opened.append(source)
        return source

    yield make
    for source in opened:
        source.close()


@pytest.fixture
def source(connect: Callable[..., Source]) -> Source:
    """A Source on the sandbox with the sandbox's own settings."""
    return connect()


@pytest.fixture(scope="session")
def azurite() -> Iterator[replicas.AzuriteOnly]:
    """Azurite's Blob storage: one for all tests, which are skipped where it is not installed."""
    program = replicas.azurite_program()
    if program is None:
        pytest.skip("Azurite is not installed: npm install azurite, on the PATH or in $AZURITE_HOME")
    with replicas.azurite(program) as server:
        yield server


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where that can be had: for tests with thousands of fsyncs whose durability is imitated."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)
