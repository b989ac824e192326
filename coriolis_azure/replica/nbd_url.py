"""The URLs of NBD servers as destinations: one export for each disk of a VM.

    nbd://host:port/NAME?state=DIR                 over a network; nbds:// with TLS
    nbd+unix:///NAME?socket=PATH&state=DIR         over a Unix socket; nbds+unix:// with TLS

NAME is the name of the exports. `{vm}` in it stands for the name of the VM, `{disk}` for that of the disk; both may
be in PATH, too. A NAME without `{disk}` is followed by `-{disk}`; without a NAME it is `{vm}-{disk}`. DIR is the
folder of this host with the state of the replica. All other parameters are those of libnbd.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from ..errors import InvalidInput

SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_PARAMETERS = ("socket", "tls-certificates", "tls-psk-file", "tls-hostname", "tls-verify-peer")
_STATE = "state"
_PORT = 10809
_FORM = "Write it as nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH, see docs/howto/nbd.md."
_SAFE = "/{}"


def is_nbd(url: str) -> bool:
    """Whether the URL names an NBD server."""
    return url.partition("://")[0].lower() in SCHEMES and "://" in url


def with_state(url: str, state: str | Path | None) -> str:
    """The URL with the folder of its state. Raises InvalidInput if the URL has no use for one, or has another one."""
    if state is None:
        return url
    if not is_nbd(url):
        raise InvalidInput(
            f"{url or 'no destination'} takes no --state", remedy="Leave it out, or give nbd://..."
        )
    before, mark, query = url.partition("?")
    if any(key == _STATE for key, _ in parse_qsl(query, keep_blank_values=True)):
        raise InvalidInput(
            "the folder of the state is given twice", remedy="Leave --state out, or state= in the URL."
        )
    stated = urlencode({_STATE: os.fspath(state)}, quote_via=quote, safe="/")
    return f"{before}?{query}&{stated}" if mark and query else f"{before}?{stated}"


@dataclass(frozen=True)
class Exports:
    """The exports of one server, or of one socket for each disk. `name` and the socket may hold `{vm}` and `{disk}`."""

    scheme: str
    authority: str
    name: str
    parameters: tuple[tuple[str, str], ...]
    state: Path

    @classmethod
    def of(cls, url: str) -> Exports:
        """What the URL names. Raises InvalidInput if it is not valid, or has no folder for the state."""
        try:
            parts = urlsplit(url)
            given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
            _ = parts.port
        except ValueError as error:
            raise InvalidInput(f"{url} is not a valid URL: {error}", remedy=_FORM) from error
        scheme, parameters = parts.scheme.lower(), dict(given)
        unix = scheme.endswith("+unix")
        unknown = sorted(parameters.keys() - {*_PARAMETERS, _STATE})
        if unknown or len(parameters) != len(given) or parts.fragment:
            wrong = unknown[0] if unknown else "a parameter that is there twice, or a #"
            raise InvalidInput(
                f"{url}: {wrong} has no meaning here",
                remedy=f"Known are {', '.join(_PARAMETERS)} and {_STATE}.",
            )
        if unix != bool(parameters.get("socket")) or unix == bool(parts.hostname):
            raise InvalidInput(f"{url} does not name a server", remedy=_FORM)
        state = parameters.pop(_STATE, "")
        if not state:
            raise InvalidInput(
                f"{url} needs a folder of this host for the state of the replica",
                remedy="Give it with --state DIR, or as state=DIR in the URL: one for each replica, always the same.",
            )
        name = unquote(parts.path).removeprefix("/")
        found = cls(scheme, parts.netloc, _completed(name), tuple(sorted(parameters.items())), Path(state))
        for text in (found.name, parameters.get("socket", "")):
            if "\0" in text or set(re.findall(r"\{[^}]*\}?|\}", text)) - {"{vm}", "{disk}"}:
                raise InvalidInput(
                    f"{url}: only {{vm}} and {{disk}} may be in braces", remedy="Leave other braces out."
                )
        return found

    @property
    def needs_vm(self) -> bool:
        """Whether the name of the VM is part of it."""
        return any("{vm}" in text for text in (self.name, self._socket))

    @property
    def _socket(self) -> str:
        return dict(self.parameters).get("socket", "")

    def of_vm(self, vm: str) -> Exports:
        """The exports of this VM."""
        return self._filled("{vm}", vm)

    def below(self, vm: str) -> Exports:
        """Those of one of several VMs, whose state is in a folder of its own.

        Raises InvalidInput if all VMs would have the same.
        """
        if not self.needs_vm:
            raise InvalidInput(
                f"the exports of several VMs would have the same names: {self.name}",
                remedy="Write {vm} in the URL where the name of the VM belongs, or leave the name out.",
            )
        return replace(self.of_vm(vm), state=self.state / vm)

    def _filled(self, mark: str, text: str) -> Exports:
        parameters = [
            (key, value.replace(mark, text) if key == "socket" else value) for key, value in self.parameters
        ]
        return replace(self, name=self.name.replace(mark, text), parameters=tuple(parameters))

    def disk(self, name: str) -> Exports:
        """The export of this disk."""
        return self._filled("{disk}", name)

    @property
    def uri(self) -> str:
        """What libnbd connects to."""
        query = urlencode(self.parameters, quote_via=quote, safe=_SAFE)
        return f"{self.scheme}://{self.authority}/{quote(self.name, safe=_SAFE)}" + (
            f"?{query}" if query else ""
        )

    @property
    def url(self) -> str:
        """The URL with its state."""
        return with_state(self.uri, self.state)

    @property
    def server(self) -> str:
        """What tells one server from others."""
        parts = urlsplit(f"//{self.authority}")
        return self._socket or f"{parts.hostname}:{parts.port or _PORT}"

    @property
    def identity(self) -> str:
        """What tells one export from others, whether or not TLS is used."""
        return f"nbd {self.server} {self.name}"

    @property
    def is_far(self) -> bool:
        """Whether there is a network in between."""
        host = urlsplit(f"//{self.authority}").hostname or ""
        return not (self._socket or host in ("localhost", "::1") or host.startswith("127."))

    @property
    def is_in_clear(self) -> bool:
        """Whether the content goes over a network in the clear."""
        return self.is_far and not self.scheme.startswith("nbds")


def _completed(name: str) -> str:
    if not name:
        return "{vm}-{disk}"
    return name if "{disk}" in name else f"{name}-{{disk}}"
