"""The token endpoint: exchanges client credentials for random bearer tokens that expire."""

from __future__ import annotations

import hmac
import secrets
import threading
import time
import uuid
from urllib.parse import parse_qs

from coriolis_azure.sandbox.state import Identity
from coriolis_azure.sandbox.wire import ArmError, Json, Request, Response
from coriolis_azure.sandbox.world import now

LIFETIME = 3600


class Tokens:
    """Issues tokens and checks them. Thread-safe. Tokens end with the process."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._expiry: dict[str, float] = {}
        self._audiences: dict[str, str] = {}
        self._lock = threading.Lock()

    def answer(self, request: Request, tenant: str, rest: str) -> Response:
        """Answer a request below /{tenant}/."""
        if tenant.lower() not in {self._identity.tenant, "common", "organizations"}:
            return _refusal(
                400,
                "invalid_tenant",
                f"AADSTS90002: Tenant '{tenant}' not found. Check to make sure you have the correct tenant "
                "ID and are signing into the correct cloud.",
            )
        if request.method == "GET" and rest.endswith(".well-known/openid-configuration"):
            return Response.of(200, self._configuration(request.base, tenant))
        if request.method == "POST" and rest in {"oauth2/v2.0/token", "oauth2/token"}:
            return self._token(request)
        return _refusal(404, "not_found", "AADSTS900144: There is no such endpoint.")

    def check(self, authorization: str | None) -> None:
        """Accept a valid bearer token; otherwise 401."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise ArmError(
                401,
                "AuthenticationFailed",
                "Authentication failed. The 'Authorization' header is missing.",
            )
        with self._lock:
            expires = self._expiry.get(token)
        if expires is None:
            raise ArmError(401, "InvalidAuthenticationToken", "The access token is invalid.")
        if expires < time.monotonic():
            raise ArmError(401, "ExpiredAuthenticationToken", "The access token expiry is in the past.")

    def audience(self, authorization: str | None) -> str:
        """What a valid bearer token was made for, as the client wrote it; otherwise 401."""
        self.check(authorization)
        with self._lock:
            return self._audiences[(authorization or "").partition(" ")[2]]

    def _configuration(self, base: str, tenant: str) -> Json:
        return {
            "issuer": f"{base}/{tenant}/v2.0",
            "authorization_endpoint": f"{base}/{tenant}/oauth2/v2.0/authorize",
            "token_endpoint": f"{base}/{tenant}/oauth2/v2.0/token",
            "token_endpoint_auth_methods_supported": ["client_secret_post"],
            "response_types_supported": ["code", "id_token"],
            "scopes_supported": ["openid"],
            "tenant_region_scope": None,
        }

    def _token(self, request: Request) -> Response:
        form = {name: values[-1] for name, values in parse_qs(request.body.decode(errors="replace")).items()}
        if form.get("grant_type") != "client_credentials":
            return _refusal(
                400,
                "unsupported_grant_type",
                f"AADSTS70003: The app requested an unsupported grant type '{form.get('grant_type')}': the "
                "sandbox knows client_credentials with a client secret.",
            )
        client, secret = form.get("client_id", ""), form.get("client_secret", "")
        if client != self._identity.client_id:
            return _refusal(
                400,
                "unauthorized_client",
                f"AADSTS700016: Application with identifier '{client}' was not found in the directory "
                f"'{self._identity.tenant}'.",
            )
        if not hmac.compare_digest(secret.encode(), self._identity.client_secret.encode()):
            return _refusal(
                401,
                "invalid_client",
                "AADSTS7000215: Invalid client secret provided. Ensure the secret being sent in the "
                "request is the client secret value, not the client secret ID, for a secret added to app "
                f"'{client}'.",
            )
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._expiry[token] = time.monotonic() + LIFETIME
            self._audiences[token] = form.get("resource") or form.get("scope", "").removesuffix("/.default")
        answer = {
            "token_type": "Bearer",
            "expires_in": LIFETIME,
            "ext_expires_in": LIFETIME,
            "access_token": token,
        }
        return Response.of(200, answer)


def _refusal(status: int, error: str, description: str) -> Response:
    code = description.split(":", 1)[0].removeprefix("AADSTS")
    return Response.of(
        status,
        {
            "error": error,
            "error_description": f"{description} Trace ID: {uuid.uuid4()} Timestamp: {now()}",
            "error_codes": [int(code)],
            "timestamp": now(),
            "trace_id": str(uuid.uuid4()),
        },
    )
