"""Azure's codes: each is explained, and real answers become the right class through the real SDKs.

The bodies are Azure's own, from logs and documentation. Recordings of real exchanges are no part of this project;
the test that reads them is skipped where they are absent.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coriolis_azure import errors
from coriolis_azure.azure import codes, names
from coriolis_azure.run import resources
from coriolis_azure.sandbox import Request, Response, Sandbox
from coriolis_azure.source import Source
from harness import real_azure
from harness.command_line import run as command
from harness.constants import GROUP
from harness.late_answers import Later

ROOT = Path(__file__).parents[1]

# Each names a code of the table that a person can meet; the table may hold more.
EXPLAINED = """
    OperationNotAllowed Conflict InvalidParameter BadRequest NotFound ResourceNotFound ResourceGroupNotFound
    ParentResourceNotFound SkuNotAvailable QuotaExceeded AllocationFailed ZonalAllocationFailed
    OverconstrainedAllocationRequest OverconstrainedZonalAllocationRequest PlatformImageNotFound ImageNotFound
    MarketplacePurchaseEligibilityFailed AccountSetupError ResourcePurchaseValidationFailed
    VMMarketplaceInvalidInput RequestDisallowedByPolicy ScopeLocked AuthorizationFailed LinkedAuthorizationFailed
    InvalidResourceReference VirtualMachineMustHaveAtLeastOneNetworkInterface OSProvisioningTimedOut
    OSProvisioningClientError VMAgentStatusCommunicationError AttachDiskWhileBeingDetached ConflictingUserInput
    OperationPreempted PropertyChangeNotAllowed NicInUse NicReservedForAnotherVm PublicIPAddressCannotBeDeleted
    InUseSubnetCannotBeDeleted InUseNetworkSecurityGroupCannotBeDeleted PrivateIPAddressInUse RetryableError
    RetryableErrorDueToAnotherOperation IPv4BasicSkuPublicIpCountLimitReached PublicIPCountLimitReached
    SubscriptionRequestsThrottled TooManyRequests ServerTimeout MultipleErrorsOccurred PreconditionFailed
    MissingApiVersionParameter NoRegisteredProviderFound InvalidApiVersionParameter
    MissingSubscriptionRegistration InvalidResourceLocation InvalidTemplateDeployment NotAvailableForSubscription
    DiskRestorePointUsedByCustomer AcquireDiskLeaseFailed DiskBlobAlreadyInUseByAnotherDisk LeaseIdMissing
    SnapshotsPresent NoPendingCopyOperation KeyBasedAuthenticationNotPermitted AuthorizationFailure BlobNotFound
    AADSTS700016 AADSTS7000215 AADSTS90002 AADSTS50034 AADSTS50126
    DenyAssignmentAuthorizationFailed ResourceReadFailed
"""

# What a remedy's sentences may begin with, after a condition or not: the person is told to do something.
IMPERATIVES = """
    accept add allow ask check choose complete comply continue correct delete detach end explain find free get give
    have leave let look name read register remove rename report run satisfy set sign use wait try
"""


# The table


@pytest.mark.parametrize("name", EXPLAINED.split())
def test_every_code_that_azure_is_known_to_answer_is_explained(name: str) -> None:
    assert codes.find(name) is not None


def test_no_code_has_two_entries() -> None:
    known = [code.name.lower() for code in codes.CODES]
    assert len(known) == len(set(known))


@pytest.mark.parametrize("code", codes.CODES, ids=lambda code: code.name)
def test_a_remedy_tells_a_person_to_do_something(code: codes.Code) -> None:
    assert issubclass(code.kind, errors.AzureError)
    assert code.meaning[0].isupper()
    assert code.meaning.endswith(".")
    assert code.remedy.endswith(".")
    for sentence in code.remedy.removesuffix(".").split(". "):
        request = sentence.split(", ", 1)[1] if sentence.startswith(("If ", "For ")) else sentence
        request = request.removeprefix("Otherwise ")
        assert request.split()[0].rstrip(",").lower() in IMPERATIVES.split(), sentence


def test_codes_are_found_whatever_their_case_and_guessed_at_when_misspelt() -> None:
    assert codes.find("scopelocked") is codes.find("ScopeLocked") is not None
    assert codes.find("Sco") is None
    assert codes.nearest("SkuNotAvalable")[0] == "SkuNotAvailable"
    assert "AADSTS50034" in codes.nearest("50034")
    assert codes.nearest("") == []


@pytest.mark.parametrize(
    ("chain", "status", "found"),
    [
        (["MarketplacePurchaseEligibilityFailed", "BadRequest"], 400, "MarketplacePurchaseEligibilityFailed"),
        (["BadRequest", "AccountSetupError"], 400, "AccountSetupError"),
        (["InvalidTemplateDeployment", "QuotaExceeded"], 400, "QuotaExceeded"),
        (["OperationNotAllowed"], 409, "OperationNotAllowed"),
        (["OperationNotAllowed"], 429, None),
        (["OperationNotAllowed", "TooManyRequests"], 429, "TooManyRequests"),
        (["SkuNotAvailable", "NobodyKnowsThis"], 409, "SkuNotAvailable"),
        (["NobodyKnowsThis"], 409, None),
        ([], 0, None),
    ],
)
def test_the_innermost_clear_code_is_the_cause(chain: list[str], status: int, found: str | None) -> None:
    cause = codes.cause(chain, status)
    assert (cause.name if cause else None) == found


@pytest.mark.parametrize(
    ("name", "status", "helps"),
    [
        ("NicInUse", 400, True),
        ("NicReservedForAnotherVm", 400, True),
        ("Conflict", 409, True),
        ("OperationNotAllowed", 409, True),
        ("RetryableError", 429, True),
        ("AnotherOperationInProgress", 429, True),
        ("ScopeLocked", 409, False),
        ("AuthorizationFailed", 403, False),
        ("NobodyKnowsThis", 409, True),
        ("NobodyKnowsThis", 400, False),
        ("BadRequest", 429, True),
        ("", 0, False),
    ],
)
def test_what_passes_by_itself_is_waited_for(name: str, status: int, helps: bool) -> None:
    assert codes.waits(name, status) is helps


def test_the_table_is_a_value() -> None:
    """It looks at nothing: it imports no module that could tell it about a request, a file or the time."""
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse((ROOT / "coriolis_azure" / "azure" / "codes.py").read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"__future__", "difflib", "collections.abc", "dataclasses", "typing", "errors"}


# Real answers, through the real SDKs


@pytest.fixture
def refuse(azure: Sandbox, source: Source) -> Iterator[Callable[..., list[str]]]:
    """`refuse("PUT", status, body)`: from then on such requests are answered so; gives back the list of their paths."""
    source.azure.groups()  # sign in first

    def begin(method: str, status: int, body: Any, headers: dict[str, str] | None = None) -> list[str]:
        seen: list[str] = []

        def answer(request: Request, real: Callable[[Request], Response]) -> Response:
            if request.method != method:
                return real(request)
            seen.append(request.path)
            return Response.of(status, body, headers)

        azure.intercept = answer
        return seen

    yield begin
    azure.intercept = None


def nsg(source: Source) -> str:
    return names.resource_id(source.azure.subscription, GROUP, "nsg", "n")


def wrapped(code: str, message: str = "Azure's words.", **more: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, **more}}


def refusal(source: Source) -> errors.AzureError:
    with pytest.raises(errors.AzureError) as caught:
        source.azure.put(nsg(source), {"location": "westeurope", "properties": {}})
    return caught.value


POLICY = wrapped(
    "RequestDisallowedByPolicy",
    'Resource \'n\' was disallowed by policy. Policy identifiers: \'[{"policyAssignment":{"name":"x"}}]\'.',
    target="n",
    additionalInfo=[{"type": "PolicyViolation", "info": {}}],
)
LOCK = wrapped(
    "ScopeLocked", "The scope 'x' cannot perform delete operation because following scope(s) are locked: 'x'."
)
QUOTA = wrapped(
    "OperationNotAllowed",
    "Operation could not be completed as it results in exceeding approved Total Regional Cores quota.",
)
ZONE = wrapped("BadRequest", "Disk d cannot be attached to the VM because it is not in zone '3'.")


@pytest.mark.parametrize(
    ("status", "body", "kind", "code", "words"),
    [
        (409, wrapped("SkuNotAvailable"), errors.QuotaExceeded, "SkuNotAvailable", "export_worker_size"),
        (400, wrapped("SkuNotAvailable"), errors.QuotaExceeded, "SkuNotAvailable", "export_worker_size"),
        (409, QUOTA, errors.Conflict, "OperationNotAllowed", "higher quota"),
        (403, POLICY, errors.Denied, "RequestDisallowedByPolicy", "exemption"),
        (409, LOCK, errors.Conflict, "ScopeLocked", "remove it"),
        (403, wrapped("AuthorizationFailed"), errors.Denied, "AuthorizationFailed", "a role"),
        (400, wrapped("NicInUse", details=[]), errors.Conflict, "NicInUse", "VM is gone"),
        (
            400,
            wrapped("NicReservedForAnotherVm"),
            errors.Conflict,
            "NicReservedForAnotherVm",
            "three minutes",
        ),
        (400, ZONE, errors.AzureError, "BadRequest", "zone"),
        (
            404,
            wrapped("PlatformImageNotFound"),
            errors.NotFound,
            "PlatformImageNotFound",
            "export_worker_image",
        ),
        (409, wrapped("nicinuse"), errors.Conflict, "nicinuse", "VM is gone"),
        (418, wrapped("NobodyKnowsThis"), errors.AzureError, "NobodyKnowsThis", "Read Azure's message"),
        (403, wrapped("NobodyKnowsThis"), errors.Denied, "NobodyKnowsThis", "permission"),
        (409, wrapped("NobodyKnowsThis"), errors.Conflict, "NobodyKnowsThis", "Wait"),
    ],
)
def test_a_refusal_has_the_class_and_the_remedy_of_its_code(
    source: Source,
    refuse: Callable[..., list[str]],
    status: int,
    body: dict[str, Any],
    kind: type[errors.AzureError],
    code: str,
    words: str,
) -> None:
    refuse("PUT", status, body, {"x-ms-request-id": "r-1"})
    error = refusal(source)
    assert type(error) is kind
    if entry := codes.find(code):
        assert error.remedy == entry.remedy
        assert words in error.remedy
    else:
        assert error.remedy == kind.remedy
    told = {name: error.facts[name] for name in ("code", "status", "resource", "request_id")}
    assert told == {"code": code, "status": status, "resource": nsg(source), "request_id": "r-1"}
    assert body["error"]["message"] in str(error)


def test_an_error_that_is_json_in_the_text_of_a_message_is_unwrapped(
    source: Source, refuse: Callable[..., list[str]]
) -> None:
    inner = json.dumps(wrapped("AccountSetupError", "Complete your billing profile."))
    detail = {"code": "BadRequest", "message": inner}
    body = wrapped("MarketplacePurchaseEligibilityFailed", "See inner errors. ", details=[detail])
    refuse("PUT", 400, body)
    error = refusal(source)
    assert type(error) is errors.Denied
    assert error.facts["code"] == "AccountSetupError"
    assert str(error).endswith("AccountSetupError: Complete your billing profile.")


@pytest.mark.parametrize(
    "odd",
    [
        {"code": "BadRequest", "message": "{not json"},
        {"code": "BadRequest", "message": None},
        {"code": "BadRequest", "details": [None, 7, {"code": ""}]},
        {"code": "BadRequest", "message": "[1]", "details": {}},
        {"code": 7, "message": 8},
        {"code": None},
        {"message": "no code"},
        "text",
        None,
        [],
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_an_answer_of_no_known_form_is_still_an_error_of_ours(
    source: Source, refuse: Callable[..., list[str]], odd: Any, bare: bool
) -> None:
    refuse("PUT", 400, odd if bare else {"error": odd})
    error = refusal(source)
    assert type(error) is errors.AzureError
    assert error.facts["status"] == 400
    assert error.remedy


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("AllocationFailed", errors.QuotaExceeded),
        ("ZonalAllocationFailed", errors.QuotaExceeded),
        ("OSProvisioningTimedOut", errors.OperationFailed),
        ("InvalidParameter", errors.AzureError),
        ("NobodyKnowsThis", errors.OperationFailed),
    ],
)
def test_an_operation_that_failed_with_status_200_has_the_class_of_its_code(
    azure: Sandbox, source: Source, code: str, kind: type[errors.AzureError]
) -> None:
    begun: list[str] = []

    def fail(request: Request, answer: Callable[[Request], Response]) -> Response:
        if request.method == "PUT":
            response = answer(request)
            begun.append(response.headers["Azure-AsyncOperation"])
            return response
        if begun and request.url == begun[0]:
            return Response.of(200, {"status": "Failed", "name": "o", **wrapped(code)})
        return answer(request)

    azure.intercept = fail
    error = refusal(source)
    assert type(error) is kind
    assert (error.facts["status"], error.facts["code"]) == (200, code)


def test_throttling_without_the_wrapper_is_throttling_whatever_its_code(
    source: Source, refuse: Callable[..., list[str]]
) -> None:
    counted = json.dumps({"operationGroup": "HighCostGet", "allowedRequestCount": 300})
    body = {
        "code": "OperationNotAllowed",
        "message": "The server rejected the request because too many requests have been received.",
        "details": [{"code": "TooManyRequests", "target": "HighCostGet", "message": counted}],
    }
    seen = refuse("PUT", 429, body, {"retry-after-ms": "1"})
    error = refusal(source)
    assert type(error) is errors.Throttled
    assert (error.facts["code"], error.facts["target"]) == ("TooManyRequests", "HighCostGet")
    assert "too many requests have been received" in str(error)
    assert "allowedRequestCount" not in str(error)
    assert len(seen) > 1  # azure-core's own retries


@pytest.mark.parametrize(
    "code", ["OperationNotAllowed", "RetryableError", "SubscriptionRequestsThrottled", "New"]
)
def test_status_429_decides_and_the_time_to_wait_is_told(
    source: Source, refuse: Callable[..., list[str]], code: str
) -> None:
    refuse("PUT", 429, wrapped(code), {"Retry-After": "0.01"})
    error = refusal(source)
    assert type(error) is errors.Throttled
    assert error.facts["retry_after"] == 0.01
    assert "quota" not in error.remedy


def test_a_snapshot_of_a_missing_disk_is_told_as_the_missing_of_what_it_refers_to(source: Source) -> None:
    """404 on a PUT does not say that the resource to be made is missing."""
    disk = names.resource_id(source.azure.subscription, GROUP, "disk", "gone")
    snapshot = names.resource_id(source.azure.subscription, GROUP, "snapshot", "s")
    creation = {"createOption": "Copy", "sourceResourceId": disk}
    with pytest.raises(errors.NotFound) as caught:
        source.azure.put(snapshot, {"location": "westeurope", "properties": {"creationData": creation}})
    assert caught.value.facts["code"] == "NotFound"
    assert caught.value.facts["status"] == 404
    assert caught.value.remedy.startswith("Read which resource Azure's message names.")


def test_storage_tells_its_code_in_a_header(azure: Sandbox, source: Source) -> None:
    source.azure.groups()
    headers = {"Content-Type": "application/xml", "x-ms-error-code": "KeyBasedAuthenticationNotPermitted"}
    body = b"<?xml version='1.0'?><Error><Code>KeyBasedAuthenticationNotPermitted</Code></Error>"
    azure.intercept = lambda request, answer: Response(403, headers, body)
    error = refusal(source)
    assert type(error) is errors.Denied
    assert error.facts["code"] == "KeyBasedAuthenticationNotPermitted"
    assert "Storage Blob Data Contributor" in error.remedy


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"client_secret": "wrong"}, "AADSTS7000215"),
        ({"client_id": "11111111-1111-1111-1111-111111111111"}, "AADSTS700016"),
        ({"tenant": "nowhere"}, "AADSTS90002"),
    ],
)
def test_a_sign_in_that_fails_is_explained_by_the_sign_in_services_code(
    azure: Sandbox, connect: Callable[..., Source], settings: dict[str, str], code: str
) -> None:
    connection = azure.connection_info()
    for name, value in settings.items():
        (connection if name in connection else connection["service_principal_credentials"])[name] = value
    with pytest.raises(errors.Denied, match=code) as caught:
        connect(connection=connection).azure.validate()
    entry = codes.find(code)
    assert entry is not None
    assert caught.value.facts["code"] == code
    assert caught.value.remedy == entry.remedy
    assert "wrong" not in str(caught.value)


def recorded() -> list[tuple[int, Any]]:
    """Status and body of the resource manager's recorded refusals, one of each kind; none where there are no files."""
    found: dict[tuple[int, str], Any] = {}
    for recording in real_azure.recordings():
        for exchange in real_azure.exchanges(recording):
            if exchange.error and exchange.is_arm:
                found.setdefault((exchange.status, exchange.error[0]), exchange.body)
    return [(status, body) for (status, _), body in found.items()]


def test_recorded_refusals_become_the_right_class(source: Source, refuse: Callable[..., list[str]]) -> None:
    answers = recorded()
    if not answers:
        pytest.skip("the recordings are not on this machine")
    kinds = {404: errors.NotFound, 409: errors.Conflict}
    for status, body in answers:
        refuse("PUT", status, body)
        error = refusal(source)
        assert type(error) is kinds[status]
        assert error.facts["code"] == body["error"]["code"]
        entry = codes.find(body["error"]["code"])
        assert entry is not None
        assert error.remedy == entry.remedy


# Deleting


@pytest.mark.parametrize(
    ("status", "code", "headers", "retried"),
    [
        (400, "PublicIPAddressCannotBeDeleted", {}, True),
        (409, "AnotherOperationInProgress", {}, True),
        (429, "RetryableError", {"retry-after-ms": "1"}, True),
        (409, "MissingPermissionsOfANewKind", {}, True),
        (403, "AuthorizationFailed", {}, False),
        (409, "ScopeLocked", {}, False),
    ],
)
def test_deleting_waits_for_what_passes(
    azure: Sandbox, source: Source, status: int, code: str, headers: dict[str, str], retried: bool
) -> None:
    tags = names.tags("r", "nsg", "vm", Later().now(), {})
    source.azure.put(nsg(source), {"location": "westeurope", "tags": tags, "properties": {}})
    refused: list[str] = []

    def answer(request: Request, real: Callable[[Request], Response]) -> Response:
        if request.method == "DELETE" and len(refused) < 6:
            refused.append(request.path)
            return Response.of(status, wrapped(code), headers)
        return real(request)

    azure.intercept = answer
    clock = Later()
    stayed = resources.delete(source.azure, [nsg(source)], clock)
    assert (stayed == []) is retried


# The page and the command


def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_errors", ROOT / "docs" / "make_errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current() -> None:
    """If not: `python -m docs.make_errors`."""
    written = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    assert written == page().page()
    for code in codes.CODES:
        assert f"| `{code.name}`" in written
    for kind in (errors.CoriolisAzureError, errors.Throttled, errors.CleanupIncomplete):
        assert f"| `{kind.__name__}` | {kind.exit_code} |" in written


def test_explain_tells_one_code_to_people_and_to_machines() -> None:
    told = command("explain", "scopelocked").stdout
    assert "ScopeLocked: Conflict, exit code 3" in told
    assert "what to do: Ask whoever set the lock" in told
    document = json.loads(command("explain", "ScopeLocked", "--json").stdout)
    entry = codes.find("ScopeLocked")
    assert entry is not None
    assert document == entry.to_json()


def test_explain_lists_all() -> None:
    listed = json.loads(command("explain", "--json").stdout)
    assert [each["code"] for each in listed] == [code.name for code in codes.CODES]
    assert "ScopeLocked" in command("explain").stdout


def test_explain_guesses_at_an_unknown_code() -> None:
    failed = command("explain", "SkuNotAvailabel", check=2)
    assert "SkuNotAvailable" in failed.stderr
    assert failed.stdout == ""
    assert "Traceback" not in command("explain", "", check=2).stderr
