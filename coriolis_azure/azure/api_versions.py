"""In which API version each type of resource is asked for.

A version of the settings or of a profile counts first, then the SDK's own. Where a cloud refuses that (sovereign and
private clouds lag behind), it is asked what it offers, and the newest version that is no newer than the SDK's is taken.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from azure.core.pipeline import PipelineRequest, PipelineResponse
from azure.core.pipeline.policies import HTTPPolicy

from ..errors import CoriolisAzureError

LOG = logging.getLogger(__name__)

# How a cloud says that it does not have a version.
_REFUSALS = re.compile(
    rb'"code"\s*:\s*"(NoRegisteredProviderFound|InvalidApiVersionParameter|InvalidResourceType)"'
)
_OPERATION = re.compile(r"/(\w*operations|operationresults)/[^/]+$", re.IGNORECASE)
_PROVIDER = re.compile(r".*/providers/(Microsoft\.\w+)/(\w+)(?:/[^/]+/(\w+))?", re.IGNORECASE)
_VERSION = re.compile(r"(?<=api-version=)[\w-]+", re.IGNORECASE)


class ApiVersions(HTTPPolicy[Any, Any]):
    """Sends each request with a version that the cloud offers. `offered` asks for those of a resource provider.

    `settings` are versions by resource provider or type. What `offered` gives is by lower-cased type.
    """

    def __init__(
        self, settings: Mapping[str, str], offered: Callable[[str], Mapping[str, list[str]]]
    ) -> None:
        super().__init__()
        self._settings = {name.lower(): version for name, version in settings.items()}
        self._ask = offered
        # By namespace, what a cloud offers that has refused a version.
        self._offered: dict[str, Mapping[str, list[str]]] = {}

    def newest(self, type_: str, default: str) -> str:
        """The newest version of a type that can be used; `default` where the cloud has refused none."""
        offered = self._offered.get(_namespace(type_), {}).get(type_, [])
        return self._set(type_) or max(offered, default=default)

    def send(self, request: PipelineRequest[Any]) -> PipelineResponse[Any, Any]:
        """Send a request, and where its version is refused once more in one that the cloud offers."""
        url = request.http_request.url
        type_ = _type(url)
        asked = _VERSION.search(url)
        if not type_ or not asked:
            return self.next.send(request)
        request.http_request.url = self._versioned(url, type_, asked[0])
        response = self.next.send(request)
        if self._is_news(type_, response):
            self._learn(_namespace(type_))
            better = self._versioned(url, type_, asked[0])
            if better != request.http_request.url:
                LOG.info("asking for %s in another version: %s", type_, better)
                request.http_request.url = better
                return self.next.send(request)
        return response

    def _versioned(self, url: str, type_: str, asked: str) -> str:
        """The URL of a first or next page in the version for its type."""
        version = self._set(type_) or self._chosen(type_, asked)
        return _VERSION.sub(version, url)

    def _set(self, type_: str) -> str:
        return self._settings.get(type_, self._settings.get(_namespace(type_), ""))

    def _chosen(self, type_: str, asked: str) -> str:
        """The newest offered version that the SDK can know, else the oldest one; `asked` where that is offered."""
        told = self._offered.get(_namespace(type_), {})
        offered = told.get(type_) or told.get(f"{_namespace(type_)}/locations", [])
        final = [version for version in offered if len(version) == len("2024-01-01")]  # no previews
        if asked in offered or not final:
            return asked
        return max((version for version in final if version < asked), default=min(final))

    def _is_news(self, type_: str, response: PipelineResponse[Any, Any]) -> bool:
        """Whether an answer refuses a version, of a provider that has not been asked yet."""
        answer = response.http_response
        if answer.status_code not in {400, 404} or self._set(type_) or _namespace(type_) in self._offered:
            return False
        return bool(_REFUSALS.search(answer.read()))

    def _learn(self, namespace: str) -> None:
        self._offered[namespace] = {}  # the question itself may be refused
        try:
            self._offered[namespace] = self._ask(namespace)
        except CoriolisAzureError as error:
            LOG.warning("the API versions that %s offers are not known: %s", namespace, error)


def _type(url: str) -> str:
    """The lower-cased type that a URL is about; "" for an operation's, which is used as Azure gave it."""
    path = url.partition("?")[0]
    if _OPERATION.search(path):
        return ""
    found = _PROVIDER.match(path)
    if not found:
        return "microsoft.resources/resourcegroups"
    namespace, kind, inner = (part.lower() if part else "" for part in found.groups())
    return f"{namespace}/{kind}/{inner}" if kind == "locations" and inner else f"{namespace}/{kind}"


def _namespace(type_: str) -> str:
    return type_.partition("/")[0]
