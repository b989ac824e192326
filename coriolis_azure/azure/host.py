"""Where this host is: Azure's metadata service answers only VMs in Azure, at an address that nobody else has."""

from __future__ import annotations

from azure.core.exceptions import AzureError as SdkError
from azure.core.rest import HttpRequest

from ..model import canonical_location
from .transport import SharedTransport

ADDRESS = "169.254.169.254"
_LOCATION = f"http://{ADDRESS}/metadata/instance/compute/location?api-version=2021-02-01&format=text"
_SECONDS = 1.0


def location(transport: SharedTransport) -> str:
    """The Azure location of this host; "" if it is elsewhere."""
    request = HttpRequest("GET", _LOCATION, headers={"Metadata": "true"})
    try:
        response = transport.send(
            request,
            connection_timeout=_SECONDS,
            read_timeout=_SECONDS,
            proxies={"no_proxy": ADDRESS},  # a proxy would answer for itself
        )
        text = response.read().decode("ascii", "replace") if response.status_code == 200 else ""
    except SdkError:
        return ""
    return canonical_location(text) if text.isalnum() else ""
