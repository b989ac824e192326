"""A headless Chromium, driven through a pipe: what a page looks like to whoever opens it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.constants import DEADLINE

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)


def program() -> str | None:
    """Chromium, under one of its names; None where it is not installed."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
    return next(filter(None, found), None)


class Browser:
    """One page of a browser. `events`: all that it has told."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._rest, self._id = commands, answers, b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = ""
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The answer of the browser to a command."""
        self._id += 1
        session = {"sessionId": self._session} if getattr(self, "_session", "") else {}
        command = {"id": self._id, "method": method, "params": parameters, **session}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (answer := self._next()).get("id") != self._id:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + DEADLINE
        while b"\0" not in self._rest:
            assert time.monotonic() < until
            read = os.read(self._answers, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, page: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Show a file."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        """The value of an expression on the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def requested(self) -> list[str]:
        """The addresses that the page asked for."""
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[Any]:
        """What is in the console, and exceptions."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event["params"] for event in self.events if event.get("method") in kinds]

    def screenshot(self) -> bytes:
        """The whole page, as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])


@contextmanager
def opened(program: str) -> Iterator[Browser]:
    """A browser with a home of its own, which is gone at the end."""
    profile = tempfile.mkdtemp()
    (its_commands, commands), (answers, its_answers) = os.pipe(), os.pipe()
    line = f'exec "$@" 3<&{its_commands} 4>&{its_answers}'
    try:
        with subprocess.Popen(
            ["bash", "-c", line, "bash", program, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(its_commands, its_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            os.close(its_commands)
            os.close(its_answers)
            try:
                yield Browser(commands, answers)
            finally:
                with suppress(OSError):
                    os.write(commands, b'{"id":0,"method":"Browser.close"}\0')
                os.close(commands)
                os.close(answers)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
    finally:
        shutil.rmtree(profile, ignore_errors=True)
