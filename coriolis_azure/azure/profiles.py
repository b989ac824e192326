"""Azure's clouds and API profiles: sign-in authority, resource manager endpoint and supported API versions."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Profile:
    """A cloud: its sign-in authority, resource manager, token audience and Blob storage domains."""

    authority: str
    manager: str
    audience: str
    storage: tuple[str, ...]

    def owns(self, url: str) -> bool:
        """Whether a token may be sent to `url`: only over HTTPS, to the resource manager or Blob storage."""
        parts = urlsplit(url)
        host, manager = parts.hostname or "", urlsplit(self.manager).hostname or ""
        domains = [f".{name}" for name in (manager, *self.storage) if name]
        return parts.scheme == "https" and (host == manager or host.endswith(tuple(domains)))


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
    ),
    "AzureUSGovernment": Profile(
        "https://login.microsoftonline.us",
        "https://management.usgovcloudapi.net",
        "https://management.core.usgovcloudapi.net/",
        ("blob.core.usgovcloudapi.net",),
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
