"""Chooses the API version for each resource type.

A version from the settings or the profile takes precedence over the SDK's own. If a cloud rejects the SDK's version
(sovereign and private clouds lag behind), it is asked which versions it offers, and the newest one that is not newer
than the SDK's is used.
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

# The error codes with which a cloud rejects an API version.
_REJECTIONS = re.compile(
    rb'"code"\s*:\s*"(NoRegisteredProviderFound|InvalidApiVersionParameter|InvalidResourceType)"'
)
_OPERATION = re.compile(r"/(\w*operations|operationresults)/[^/]+$", re.IGNORECASE)
_PROVIDER = re.compile(r".*/providers/(Microsoft\.\w+)/(\w+)(?:/[^/]+/(\w+))?", re.IGNORECASE)
_VERSION = re.compile(r"(?<=api-version=)[\w-]+", re.IGNORECASE)


class ApiVersions(HTTPPolicy[Any, Any]):
    """A pipeline policy that sends each request with an API version the cloud offers.

    `settings` maps a resource provider or type to a version. `offered` fetches the versions that a resource provider
    offers, keyed by lower-case type.
    """

    def __init__(
        self, settings: Mapping[str, str], offered: Callable[[str], Mapping[str, list[str]]]
    ) -> None:
        super().__init__()
        self._settings = {name.lower(): version for name, version in settings.items()}
        self._fetch_offered = offered
        # By namespace: filled only after the cloud has rejected a version of it.
        self._offered: dict[str, Mapping[str, list[str]]] = {}

    def newest(self, type_: str, default: str) -> str:
        """The newest usable version of a type; `default` if the cloud has rejected none."""
        offered = self._offered.get(_namespace(type_), {}).get(type_, [])
        return self._configured(type_) or max(offered, default=default)

    def send(self, request: PipelineRequest[Any]) -> PipelineResponse[Any, Any]:
        """Send a request; if its version is rejected, send it once more with one the cloud offers."""
        url = request.http_request.url
        type_ = _type(url)
        requested = _VERSION.search(url)
        if not type_ or not requested:
            return self.next.send(request)
        request.http_request.url = self._versioned(url, type_, requested[0])
        response = self.next.send(request)
        if self._is_first_rejection(type_, response):
            self._learn(_namespace(type_))
            better = self._versioned(url, type_, requested[0])
            if better != request.http_request.url:
                LOG.info("retrying %s with another API version: %s", type_, better)
                request.http_request.url = better
                return self.next.send(request)
        return response

    def _versioned(self, url: str, type_: str, requested: str) -> str:
        """`url`, which may be that of a later page, with the version to use for its type."""
        version = self._configured(type_) or self._chosen(type_, requested)
        return _VERSION.sub(version, url)

    def _configured(self, type_: str) -> str:
        return self._settings.get(type_, self._settings.get(_namespace(type_), ""))

    def _chosen(self, type_: str, requested: str) -> str:
        """`requested` if it is offered or nothing is known, else the newest older version, else the oldest one."""
        by_type = self._offered.get(_namespace(type_), {})
        offered = by_type.get(type_) or by_type.get(f"{_namespace(type_)}/locations", [])
        final = [version for version in offered if len(version) == len("2024-01-01")]  # no previews
        if requested in offered or not final:
            return requested
        return max((version for version in final if version < requested), default=min(final))

    def _is_first_rejection(self, type_: str, response: PipelineResponse[Any, Any]) -> bool:
        """Whether an answer rejects the version of a provider whose versions have not been fetched yet."""
        answer = response.http_response
        if (
            answer.status_code not in {400, 404}
            or self._configured(type_)
            or _namespace(type_) in self._offered
        ):
            return False
        return bool(_REJECTIONS.search(answer.read()))

    def _learn(self, namespace: str) -> None:
        self._offered[namespace] = {}  # set first: this request may be rejected too
        try:
            self._offered[namespace] = self._fetch_offered(namespace)
        except CoriolisAzureError as error:
            LOG.warning("cannot find out which API versions %s offers: %s", namespace, error)


def _type(url: str) -> str:
    """The lower-case resource type in a URL; "" for the URL of an operation, which is used exactly as Azure gave it."""
    path = url.partition("?")[0]
    if _OPERATION.search(path):
        return ""
    match = _PROVIDER.match(path)
    if not match:
        return "microsoft.resources/resourcegroups"
    namespace, kind, inner = (part.lower() if part else "" for part in match.groups())
    return f"{namespace}/{kind}/{inner}" if kind == "locations" and inner else f"{namespace}/{kind}"


def _namespace(type_: str) -> str:
    return type_.partition("/")[0]
