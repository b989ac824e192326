"""What Azure's SDKs raise becomes an error of ours, by Azure's code and never by its text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
from azure.core.exceptions import AzureError as SdkError
from azure.core.exceptions import (
    ClientAuthenticationError,
    DecodeError,
    DeserializationError,
    HttpResponseError,
    ServiceRequestError,
    ServiceResponseError,
)

from .. import errors
from ..model import Json
from . import codes
from .patience import seconds_in

# What the SDKs raise where no answer came at all; a sign-in that met one of these raises another error about it.
_NO_ANSWER = (ServiceRequestError, ServiceResponseError, requests.RequestException)

_BY_STATUS: dict[int, type[errors.AzureError]] = {
    200: errors.OperationFailed,
    401: errors.Denied,
    403: errors.Denied,
    404: errors.NotFound,
    409: errors.Conflict,
    412: errors.Conflict,
    429: errors.Throttled,
}


@contextmanager
def translated(verb: str, resource: str) -> Iterator[None]:
    """Foreign exceptions of the block become ours: here, and nowhere else. `blobs` uses it too."""
    try:
        yield
    except (errors.Unreadable, DeserializationError, json.JSONDecodeError) as error:
        raise _unreadable(verb, resource, error) from error
    except HttpResponseError as error:
        if isinstance(error, DecodeError) and (error.status_code or 0) < 400:
            raise _unreadable(verb, resource, error) from error
        if isinstance(error, ClientAuthenticationError) and isinstance(error.__context__, _NO_ANSWER):
            raise _unreachable(verb, resource, error.__context__) from error
        raise _error(verb, resource, error) from error
    except _NO_ANSWER as error:
        raise _unreachable(verb, resource, error) from error
    except SdkError as error:
        raise errors.AzureError(f"could not {verb} {resource}: {error.message}", resource=resource) from error


def _unreachable(verb: str, resource: str, error: BaseException) -> errors.CoriolisAzureError:
    limit = errors.exhausted(error)  # a socket that could not be opened says nothing of Azure
    if limit:
        return errors.HostExhausted(f"could not {verb} {resource}: {limit.message}", remedy=limit.remedy)
    text = f"could not {verb} {resource}: no answer from Azure: {error}"
    return errors.CloudUnreachable(text, resource=resource)


def _unreadable(verb: str, resource: str, error: Exception) -> errors.Unreadable:
    """An answer that is not what Azure would say: another service's, a proxy's, or of a form that nobody promised."""
    said = str(error).partition("\n")[0] or type(error).__name__
    return errors.Unreadable(
        f"could not {verb} {resource}: Azure's answer is not understood: {said}", resource=resource
    )


def _error(verb: str, resource: str, error: HttpResponseError) -> errors.AzureError:
    layers = _layers(error)
    chain = [str(layer["code"]) for layer in layers]
    status = error.status_code or 0
    entry = codes.cause(chain, status)
    kind = _kind(error, status, entry)
    code, message = (chain[-1] if chain else ""), _message(error, layers)
    headers = getattr(error.response, "headers", {})
    return kind(
        f"could not {verb} {resource}: {message if not code or code in message else f'{code}: {message}'}",
        remedy=entry.remedy if entry else None,
        code=code,
        status=status,
        resource=resource,
        target=layers[-1].get("target") if layers else None,
        retry_after=seconds_in(headers.get("Retry-After")),
        request_id=headers.get("x-ms-request-id"),
    )


def _kind(error: HttpResponseError, status: int, entry: codes.Code | None) -> type[errors.AzureError]:
    if status == 429:  # whatever the code: throttling comes as OperationNotAllowed, too
        return errors.Throttled
    if entry is not None:
        return entry.kind
    if isinstance(error, ClientAuthenticationError):
        return errors.Denied
    return _BY_STATUS.get(status, errors.AzureError)


def _layers(error: HttpResponseError) -> list[Json]:
    """The error documents of an answer, each with a `code`, from the outermost to the one that names the cause."""
    body = _body(error) or {}
    layers = list(_unwrapped(body))
    if layers:
        return layers
    if str(body.get("status")).lower() == "canceled":
        # So it is told, without a code, where a later request has taken the place of this one.
        return [{"code": "OperationPreempted"}]
    own = getattr(error, "error", None)  # what the SDK made of the answer
    code = (
        getattr(own, "code", None)
        or getattr(error.response, "headers", {}).get("x-ms-error-code")  # storage answers in XML
        or _sign_in_code(error)
    )
    return [{"code": code}] if code else []


def _unwrapped(document: Any) -> Iterator[Json]:
    """Errors within errors: wrapped in `error` or not, in `details`, or as JSON in the text of a message."""
    found = document.get("error", document) if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found.get("code"):
        return
    yield found
    details = found.get("details")
    coded = (each for each in (details if isinstance(details, list) else []) if _has_code(each))
    yield from _unwrapped(next(coded, None) or _parsed(found.get("message")))


def _message(error: HttpResponseError, layers: list[Json]) -> str:
    """The innermost message that is meant for people."""
    said = [text for layer in reversed(layers) if (text := layer.get("message")) and _parsed(text) is None]
    return " ".join(str(said[0]).split()) if said else error.message.partition("\n")[0]


def _body(error: HttpResponseError) -> Any:
    try:
        return _parsed(error.response.text()) if error.response is not None else None
    except AttributeError:  # the token endpoint's answers are of another kind
        return None


def _parsed(text: Any) -> Json | None:
    """The JSON object in a text; None where it is no such text."""
    try:
        document = json.loads(text)
    except (TypeError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _has_code(detail: Any) -> bool:
    return isinstance(detail, dict) and bool(detail.get("code"))


def _sign_in_code(error: HttpResponseError) -> str | None:
    """The sign-in service's code.

    The one code that is taken out of a message, for azure-identity passes it on in no other way; of a tenant that
    does not exist it hides even that in the exception it came from.
    """
    if not isinstance(error, ClientAuthenticationError):
        return None
    cause: BaseException | None = error
    while cause is not None:
        if code := re.search(r"AADSTS\d+", str(cause)):
            return code[0]
        cause = cause.__cause__ or cause.__context__
    return None
