"""Dying at any request of a whole run leaks nothing: another process cleans, and strangers are untouched.

A real process runs the replication over HTTPS. At its n-th ARM request it is killed, before Azure acts or after.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import MIB

from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.sandbox.server import Server
from coriolis_azure.source import Source

# A process that is forked from one that has the SDKs imported starts at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["coriolis_azure.source"])
SHARDS = 6


def replicate(connection: dict[str, Any], environment: dict[str, Any], to: str) -> None:
    """What the victim does."""
    with Source(connection, environment, keep_journal=False) as source:
        source.replicate("web", to)


class Killer:
    """Kills a process at its n-th ARM request; counts them all."""

    def __init__(self, at: int, *, arrives: bool) -> None:
        self.count = 0
        self._at, self._arrives = at, arrives
        self._lock = threading.Lock()
        self.pid = 0

    def __call__(self, request: Request, answer: Callable[[Request], Response]) -> Response:
        if not request.path.startswith("/subscriptions"):
            return answer(request)
        with self._lock:
            number, self.count = self.count, self.count + 1
        if number == self._at and not self._arrives:
            os.kill(self.pid, signal.SIGKILL)
            raise ConnectionResetError
        response = answer(request)
        if number == self._at:
            os.kill(self.pid, signal.SIGKILL)
        return response


@contextmanager
def served(azure: Sandbox) -> Iterator[dict[str, Any]]:
    """The sandbox over HTTPS; the connection info to reach it."""
    server = Server(azure.handle, azure.directory, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="server")
    thread.start()
    try:
        yield azure.connection_info(server.url)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_until_killed(azure: Sandbox, killer: Killer, to: Path) -> int | None:
    """Run the victim to its end; its exit code."""
    with served(azure) as connection:
        victim = PROCESSES.Process(target=replicate, args=(connection, azure.environment(), str(to)))
        before = set(threading.enumerate())
        started = threading.Event()

        def wait_for_pid(request: Request, answer: Callable[[Request], Response]) -> Response:
            started.wait()
            return killer(request, answer)

        azure.intercept = wait_for_pid
        victim.start()
        killer.pid = victim.pid or 0
        started.set()
        victim.join()
        # What was under way when the victim died still reaches Azure.
        deadline = time.monotonic() + 20
        for handler in set(threading.enumerate()) - before:
            handler.join(max(0, deadline - time.monotonic()))
        azure.intercept = None
        return victim.exitcode


@pytest.fixture
def web(azure: Sandbox, image: Callable[..., Path]) -> Sandbox:
    """A sandbox with a VM of two small disks."""
    azure.add_vm("web", image("os", MIB), [image("data", MIB // 2, seed=2)])
    return azure


@pytest.mark.parametrize("arrives", [False, True], ids=["lost", "arrived"])
@pytest.mark.parametrize("shard", range(SHARDS))
def test_dying_at_any_request_leaks_nothing(
    web: Sandbox, source: Source, tmp_path: Path, shard: int, arrives: bool
) -> None:
    before = web.resources()
    kills = 0
    for at in range(shard, 1000, SHARDS):
        to = tmp_path / f"images-{at}"
        killer = Killer(at, arrives=arrives)
        code = run_until_killed(web, killer, to)
        found, stayed = source.sweep(timedelta(0))
        assert stayed == []
        assert web.resources() == before, f"request {at}: left {found}"
        assert source.inspect("web").power_state == "running"
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 10, "the run had fewer requests than any whole run has"
