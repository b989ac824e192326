"""Translates the exceptions of Azure's SDKs into ours, by Azure's error code and never by its text."""

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
from .sas import masked

# What the SDKs raise if no answer came at all. A failed sign-in hides one of these behind its own exception.
_NO_ANSWER = (ServiceRequestError, ServiceResponseError, requests.RequestException)

# An error of Azure is JSON or, of its storage, XML.
_PAGE = "the answer is a web page and not Azure's"
_PAGE_REMEDY = (
    "Check that no proxy, firewall or portal answers in Azure's place, and that the endpoint is Azure's. If that is "
    "not the cause, run the command again in a few minutes."
)

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
    """Translate the SDK exceptions of the block into ours. The only place where this is done."""
    try:
        yield
    except (errors.Unreadable, DeserializationError, ValueError, RecursionError) as error:
        raise _unreadable(verb, resource, error) from error
    except HttpResponseError as error:
        if isinstance(error, DecodeError) and (error.status_code or 0) < 400:
            raise _unreadable(verb, resource, error) from error
        if isinstance(error, ClientAuthenticationError) and isinstance(error.__context__, _NO_ANSWER):
            raise _unreachable(verb, resource, error.__context__) from error
        raise _error(verb, resource, error) from error
    except _NO_ANSWER as error:
        raise _unreachable(verb, resource, error) from error
    except TypeError as error:  # the storage library's, about an error whose document has no message
        if (refusal := _behind(error)) is None:
            raise
        raise _error(verb, resource, refusal) from error
    except SdkError as error:
        raise errors.AzureError(
            f"could not {verb} {resource}: {masked(error.message)}", resource=resource
        ) from error


def _behind(error: BaseException) -> HttpResponseError | None:
    """The answer of Azure that was being handled when the error was raised."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, HttpResponseError):
        cause = cause.__context__
    return cause


def _unreachable(verb: str, resource: str, error: BaseException) -> errors.CoriolisAzureError:
    limit = errors.exhausted(error)  # failing to open a socket says nothing about Azure
    if limit:
        return errors.HostExhausted(
            f"could not {verb} {resource}: {masked(limit.message)}", remedy=limit.remedy
        )
    text = f"could not {verb} {resource}: no answer from Azure: {masked(str(error))}"
    return errors.CloudUnreachable(text, resource=resource)


def _unreadable(verb: str, resource: str, error: Exception) -> errors.Unreadable:
    """For an answer that Azure would not give: from another service or a proxy, or of an undocumented form."""
    reason = masked(str(error)).partition("\n")[0] or type(error).__name__
    return errors.Unreadable(
        f"could not {verb} {resource}: cannot understand Azure's answer: {reason}", resource=resource
    )


def _error(verb: str, resource: str, error: HttpResponseError) -> errors.AzureError:
    layers = _layers(error)
    chain = [str(layer["code"]) for layer in layers]
    status = error.status_code or 0
    entry = codes.cause(chain, status)
    kind = _kind(error, status, entry)
    headers = getattr(error.response, "headers", {})
    is_page = not chain and str(headers.get("Content-Type")).lower().startswith("text/html")
    code, message = (chain[-1] if chain else ""), _PAGE if is_page else _message(error, layers)
    return kind(
        f"could not {verb} {resource}: {message if not code or code in message else f'{code}: {message}'}",
        remedy=entry.remedy if entry else _PAGE_REMEDY if is_page else None,
        code=code,
        status=status,
        resource=resource,
        target=layers[-1].get("target") if layers else None,
        retry_after=seconds_in(headers.get("Retry-After")),
        request_id=headers.get("x-ms-request-id"),
    )


def _kind(error: HttpResponseError, status: int, entry: codes.Code | None) -> type[errors.AzureError]:
    if status == 429:  # whatever the code: Azure also throttles with OperationNotAllowed
        return errors.Throttled
    if entry is not None:
        return entry.kind
    if isinstance(error, ClientAuthenticationError):
        return errors.Denied
    return _BY_STATUS.get(status, errors.AzureError)


def _layers(error: HttpResponseError) -> list[Json]:
    """The error documents of an answer, each with a `code`, from the outermost to the innermost, the cause."""
    body = _body(error) or {}
    layers = list(_unwrapped(body))
    if layers:
        return layers
    if str(body.get("status")).lower() == "canceled":
        # Azure reports this, without a code, if a later request replaced this one.
        return [{"code": "OperationPreempted"}]
    parsed = getattr(error, "error", None)  # the error that the SDK has parsed
    code = (
        getattr(parsed, "code", None)
        or getattr(error.response, "headers", {}).get("x-ms-error-code")  # storage answers in XML
        or _sign_in_code(error)
    )
    return [{"code": code}] if code else []


def _unwrapped(document: Any) -> Iterator[Json]:
    """Yield nested errors, outermost first: in `error` or bare, in `details`, or as JSON in a message."""
    error = document.get("error", document) if isinstance(document, dict) else None
    if not isinstance(error, dict) or not error.get("code"):
        return
    yield error
    details = error.get("details")
    coded = (detail for detail in (details if isinstance(details, list) else []) if _has_code(detail))
    yield from _unwrapped(next(coded, None) or _parsed(error.get("message")))


def _message(error: HttpResponseError, layers: list[Json]) -> str:
    """The innermost message that is text for people."""
    texts = [text for layer in reversed(layers) if (text := layer.get("message")) and _parsed(text) is None]
    return masked(" ".join(str(texts[0]).split()) if texts else error.message.partition("\n")[0])


def _body(error: HttpResponseError) -> Any:
    try:
        return _parsed(error.response.text()) if error.response is not None else None
    except AttributeError:  # answers of the token endpoint have another class
        return None


def _parsed(text: Any) -> Json | None:
    """The JSON object in a text; None if it is anything else."""
    try:
        document = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _has_code(detail: Any) -> bool:
    return isinstance(detail, dict) and bool(detail.get("code"))


def _sign_in_code(error: HttpResponseError) -> str | None:
    """The error code of the sign-in service.

    The only code that is parsed out of a message, since azure-identity passes it on in no other way. For a tenant
    that does not exist, even the message is only in the exception's cause.
    """
    if not isinstance(error, ClientAuthenticationError):
        return None
    cause: BaseException | None = error
    while cause is not None:
        if code := re.search(r"AADSTS\d+", str(cause)):
            return code[0]
        cause = cause.__cause__ or cause.__context__
    return None
