"""Azure's clouds and API profiles: sign-in authority, resource manager endpoint and supported API versions."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What every reader of URLs takes for this host and port. They disagree about userinfo, backslashes and whitespace.
_PLACE = re.compile(
    r"https://(?P<host>[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?(?=[/?#]|\Z)",
    re.ASCII | re.IGNORECASE,
)
_HTTPS = 443


@dataclass(frozen=True)
class Profile:
    """A cloud: its sign-in authority, resource manager, token audience and Blob storage domains.

    `signed`: further domains, in which it lets snapshots be read.
    """

    authority: str
    manager: str
    audience: str
    storage: tuple[str, ...]
    signed: tuple[str, ...] = ()

    def owns(self, url: str) -> bool:
        """Whether a token may be sent to `url`: only over HTTPS, to the resource manager or Blob storage."""
        return self._has(url, self.storage)

    def signs(self, url: str) -> bool:
        """Whether `url` may be one that this cloud has signed, so that it may be sent there."""
        return self._has(url, (*self.storage, *self.signed))

    def _has(self, url: str, within: tuple[str, ...]) -> bool:
        (host, port), (manager, own_port) = _place(url), _place(self.manager)
        domains = tuple(f".{name.lower()}" for name in (manager, *within) if name)
        if not host or not (host == manager or host.endswith(domains)):
            return False
        return port == own_port or (port == _HTTPS and host != manager)


def _place(url: str) -> tuple[str, int]:
    """The host, in lower case, and the port of a URL; no host if it has not the plain form."""
    found = _PLACE.match(url)
    return (found["host"].lower(), int(found["port"] or _HTTPS)) if found else ("", 0)


CLOUDS = {
    "AzureCloud": Profile(
        "https://login.microsoftonline.com",
        "https://management.azure.com",
        "https://management.azure.com",
        ("blob.core.windows.net", "blob.storage.azure.net"),
    ),
    "AzureChinaCloud": Profile(
        "https://login.chinacloudapi.cn",
        "https://management.chinacloudapi.cn",
        "https://management.core.chinacloudapi.cn/",
        ("blob.core.chinacloudapi.cn",),
        ("chinacloudapi.cn", "azure.cn"),
    ),
    "AzureUSGovernment": Profile(
        "https://login.microsoftonline.us",
        "https://management.usgovcloudapi.net",
        "https://management.core.usgovcloudapi.net/",
        ("blob.core.usgovcloudapi.net",),
        ("usgovcloudapi.net", "azure.us"),  # which hosts of these is not documented
    ),
}

# The API versions of Azure's profiles, by provider or type, as an Azure Stack Hub with that profile supports them.
PROFILES: dict[str, dict[str, str]] = {
    "latest": {},
    "2020-09-01-hybrid": {
        "microsoft.compute": "2020-06-01",
        "microsoft.compute/disks": "2019-07-01",
        "microsoft.compute/snapshots": "2019-07-01",
        "microsoft.compute/skus": "2019-04-01",
        "microsoft.network": "2018-11-01",
        "microsoft.resources": "2019-10-01",
        "microsoft.storage": "2019-06-01",
    },
}
# The version for Blob storage, which is sent in a header.
BLOB_VERSIONS = {"2020-09-01-hybrid": "2019-07-07"}
