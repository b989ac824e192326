"""The program's log on stderr: lines for people, or JSON lines among the events."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

from ..clock import rfc3339
from ..errors import cleaned


def start(verbose: int, *, as_json: bool) -> None:
    """Log warnings, with `verbose` 1 also steps, with 2 everything. Secrets are never logged."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else _Plain("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    # Azure's own request logging repeats every header; our log has what matters.
    logging.getLogger("azure.core.pipeline.policies.http_logging_policy").setLevel(logging.WARNING)
    for name in ("paramiko", "azure"):  # their warnings become errors of ours, which are shown once
        logging.getLogger(name).setLevel(logging.NOTSET if verbose else logging.CRITICAL)


def steps_are_logged() -> bool:
    """Whether steps are in the log, so that they need not be shown as well."""
    return logging.getLogger("coriolis_azure").isEnabledFor(logging.INFO)


class _Plain(logging.Formatter):
    """Lines in which foreign text cannot control the terminal; continuation lines are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return "\n    ".join(map(cleaned, super().format(record).splitlines()))

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        """The time in UTC."""
        del datefmt
        return rfc3339(datetime.fromtimestamp(record.created, timezone.utc))


class _Json(_Plain):
    """One JSON object per line: {"event": "log", ...}."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        document = {
            "event": "log",
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document)
