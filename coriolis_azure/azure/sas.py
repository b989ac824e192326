"""URLs that give access to whoever has them, and how they are kept out of messages and logs."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

# The signature is the secret; without it the other parameters are worth nothing.
_SIGNATURE = re.compile(r"(?i)\b(sig=)[^&\s'\"<>)]+")


@dataclass(frozen=True, repr=False)
class Sas:
    """A URL with a signature that gives access to a blob for a while. It is shown as its host."""

    url: str

    def __repr__(self) -> str:
        return f"Sas({urlsplit(self.url).hostname})"


def masked(text: str) -> str:
    """The text without signatures."""
    return _SIGNATURE.sub(r"\1...", text)


class _Masking(logging.Filter):
    """Takes signatures out of what is logged."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        if "sig=" in (text := record.getMessage()).lower():
            record.msg, record.args = masked(text), None
        return True


# At DEBUG it logs the path and query of each request, whoever configures the logging of this process.
logging.getLogger("urllib3.connectionpool").addFilter(_Masking())
