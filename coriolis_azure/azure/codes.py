"""Azure's error codes: the meaning of each, the error class it is translated to, and what users can do about it.

The table is pure data: nothing here looks at a message, a request or a clock. A code with several causes is marked
`vague`: its meaning lists them all, because only Azure's message, which is for people and not for programs, tells them
apart. HTTP status 429 means throttling whatever the code; `translation` decides that.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AzureError, Conflict, Denied, NotFound, OperationFailed, QuotaExceeded, Throttled


@dataclass(frozen=True)
class Code:
    """One of Azure's error codes. `waits`: the same request can succeed later without any intervention."""

    name: str
    kind: type[AzureError]
    meaning: str
    remedy: str
    waits: bool = False
    vague: bool = False

    def to_json(self) -> dict[str, Any]:
        """The code as `explain --json` prints it."""
        return {
            "code": self.name,
            "class": self.kind.__name__,
            "exit_code": self.kind.exit_code,
            "meaning": self.meaning,
            "remedy": self.remedy,
            "waits": self.waits,
            "vague": self.vague,
        }


_RETRY = "Run the command again in a few minutes."
_REPORT = "Report this as a fault of coriolis-azure, with the message and the request id."
_OTHER_SIZE = (
    "Set export_worker_size to a size of another family, or leave it unset: then one that the location offers is "
    "chosen."
)
_OTHER_IMAGE = (
    "Set export_worker_image to an image that the location offers, or leave it unset: then a current one is "
    "chosen."
)
_ADDRESSES = (
    "with the message and export_worker_allowed_addresses: they are validated before Azure sees them."
)
_UNDONE = "If the named resource still exists, delete it with `coriolis-azure cleanup`."
_USER_TO_APPLICATION = "Use a service principal in service_principal_credentials instead of a user."

# Codes with more than one cause.
_VAGUE = (
    Code(
        "OperationNotAllowed",
        Conflict,
        "One of three things. A quota is used up (cores in the location or in a size family, disks per VM). Or the "
        "resource is in use (a disk attached to a VM, a disk with an active SAS, a VM marked for deletion, a power "
        "change in progress). Or this resource or subscription does not support the operation at all. With status "
        "429, it is throttling.",
        "Read Azure's message. If it mentions a quota, ask for a higher quota or choose a smaller export_worker_size. "
        "If it names another resource or operation, wait for it or release the resource. If the operation is not "
        "supported, leave the VM or disk out.",
        waits=True,
        vague=True,
    ),
    Code(
        "Conflict",
        Conflict,
        "The request conflicted with something: most often with another operation on the same resource, otherwise "
        "with a name that is taken or a state that does not permit the change.",
        "Run the command again when the other operation has ended. If it repeats, look at the named resource: its "
        "state, or another resource of the same name, is in the way.",
        waits=True,
        vague=True,
    ),
    Code(
        "InvalidParameter",
        AzureError,
        "Azure does not accept a value in the request: a VM size that the location does not have, an invalid user "
        "name, key or LUN, a disk that would shrink, settings that exclude each other.",
        "Read which parameter Azure's message names. Correct the setting that it comes from, most likely "
        "export_worker_size or export_worker_image. If it comes from no setting, report it as a fault of "
        "coriolis-azure.",
        vague=True,
    ),
    Code(
        "BadRequest",
        AzureError,
        "Azure rejects the request, for instance because a disk is in another zone than the VM that it is to be "
        "attached to. The code may also wrap an error of another service.",
        "Read Azure's message. If it mentions zones, choose an export_worker_size that is offered in the zone of the "
        "disks. If it comes from no setting, report it as a fault of coriolis-azure.",
        vague=True,
    ),
    Code(
        "NotFound",
        NotFound,
        "A resource does not exist: the one requested, or one that the request refers to (the disk of a snapshot, the "
        "NIC of a VM, the publisher of an image). It may have just been deleted.",
        "Read which resource Azure's message names. Check its name, resource group and subscription. If somebody was "
        "replacing it, run the command again.",
        vague=True,
    ),
    Code(
        "AuthenticationFailed",
        Denied,
        "The service did not accept the credentials: a token that is missing, expired or meant for another cloud; in "
        "Blob storage, a SAS or account key that is wrong, expired or not yet valid.",
        "Check the credentials, the tenant and the cloud_profile. Check the clock of this host. Run the command again "
        "to get a new SAS.",
        vague=True,
    ),
    Code(
        "DeploymentFailed",
        OperationFailed,
        "A template deployment failed; its details contain the code of the resource that failed.",
        "Read the details of the deployment in the Azure portal. Explain the inner code with `coriolis-azure explain`.",
        vague=True,
    ),
    Code(
        "InvalidTemplateDeployment",
        AzureError,
        "The validation of a template deployment failed; its details contain the code of the cause, often a quota or "
        "a policy.",
        "Read the details in Azure's message. Explain the inner code with `coriolis-azure explain`.",
        vague=True,
    ),
    Code(
        "MultipleErrorsOccurred",
        OperationFailed,
        "Several things failed in one operation, or a gateway in front of the service did.",
        f"Read the details in Azure's message. {_RETRY}",
        waits=True,
        vague=True,
    ),
)

# Resources in use: for seconds to minutes, even after Azure has reported the deletion of the user.
_IN_USE = (
    Code(
        "NicInUse",
        Conflict,
        "A network interface cannot be deleted while a VM uses it; after the VM's deletion, Azure takes a while to "
        "notice.",
        "Wait until the VM is gone, then run `coriolis-azure cleanup`.",
        waits=True,
    ),
    Code(
        "NicReservedForAnotherVm",
        Conflict,
        "A VM failed to start, and Azure reserves its network interface for 180 seconds.",
        "Wait three minutes, then run `coriolis-azure cleanup`.",
        waits=True,
    ),
    Code(
        "PublicIPAddressCannotBeDeleted",
        Conflict,
        "A public IP address cannot be deleted while a network interface uses it.",
        "Wait until the network interface is gone, then run `coriolis-azure cleanup`.",
        waits=True,
    ),
    Code(
        "PublicIPAddressInUse",
        Conflict,
        "A public IP address already belongs to another network interface.",
        "Detach the address from the network interface that Azure's message names.",
        waits=True,
    ),
    Code(
        "InUseSubnetCannotBeDeleted",
        Conflict,
        "A subnet, or the network around it, cannot be deleted while a network interface is in it.",
        "Wait until the network interface is gone, then run `coriolis-azure cleanup`. Remove anything that others "
        "have put into the worker's network.",
        waits=True,
    ),
    Code(
        "InUseNetworkSecurityGroupCannotBeDeleted",
        Conflict,
        "A network security group cannot be deleted while a network interface or subnet uses it.",
        "Wait until the network interface is gone, then run `coriolis-azure cleanup`.",
        waits=True,
    ),
    Code(
        "PrivateIPAddressInUse",
        Conflict,
        "The requested private address belongs to another network interface in the subnet.",
        "Choose a free address, or release the one in use.",
    ),
    Code(
        "AttachDiskWhileBeingDetached",
        Conflict,
        "A disk cannot be attached because it is still being detached, or detaching it failed.",
        "Wait until the disk is detached. If it stays attached, detach it again in the Azure portal.",
        waits=True,
    ),
    Code(
        "ConflictingUserInput",
        Conflict,
        "A disk is already attached to another VM, a disk with the name of the new VM's OS disk already exists (that "
        "of a VM that failed to start stays for a while), or the request contradicts itself.",
        "Read Azure's message. If it names a VM that has the disk attached, detach it. If it says that the disk "
        "already exists, run `coriolis-azure cleanup`, then the command again.",
        vague=True,
    ),
    Code(
        "AcquireDiskLeaseFailed",
        Conflict,
        "The VHD blob of an unmanaged disk is leased by another VM or disk.",
        "Find the owner in the blob's metadata. Detach the disk from it, or break the lease if its owner is gone.",
    ),
    Code(
        "DiskBlobAlreadyInUseByAnotherDisk",
        Conflict,
        "The VHD blob already is the content of another disk.",
        "Find the owner in the blob's metadata. Choose another blob, or release this one.",
    ),
    Code(
        "DiskRestorePointUsedByCustomer",
        Conflict,
        "A restore point of a disk cannot be deleted while a SAS to it is active.",
        "End the access to the disk restore point (endGetAccess), then delete it.",
    ),
    Code(
        "RetryableError",
        Conflict,
        "The network service was busy with this or a related resource, and asks for a retry.",
        _RETRY,
        waits=True,
    ),
    Code(
        "RetryableErrorDueToAnotherOperation",
        Conflict,
        "Another operation has locked the network resource while it runs.",
        "Wait for the other operation, then run the command again.",
        waits=True,
    ),
    Code(
        "AnotherOperationInProgress",
        Conflict,
        "Another operation on the same network resource, or on one that depends on it, is still in progress.",
        "Wait for the other operation, then run the command again.",
        waits=True,
    ),
    Code(
        "ReferencedResourceNotProvisioned",
        Conflict,
        "A network resource that the request refers to is still being created, or its creation failed.",
        "Wait until the named resource is ready. If it has failed, delete it, then run the command again.",
        waits=True,
    ),
    Code(
        "CanceledAndSupersededDueToAnotherOperation",
        Conflict,
        "A later operation on the same network resource replaced this one.",
        "Let only one tool change the resource at a time, then run the command again.",
        waits=True,
    ),
    Code(
        "OperationPreempted",
        Conflict,
        "A later operation on the same VM replaced this one.",
        "Let only one tool change the VM at a time, then run the command again.",
        waits=True,
    ),
    Code(
        "PreconditionFailed",
        Conflict,
        "Somebody else changed the resource after it was read and before it was written.",
        "Run the command again.",
        waits=True,
    ),
    Code(
        "ResourceGroupBeingDeleted",
        Conflict,
        "The resource group is being deleted with everything in it.",
        "Find out who is deleting the resource group. Choose another resource_group, or run again when it is back.",
    ),
    Code(
        "PropertyChangeNotAllowed",
        Conflict,
        "The request would change a property of an existing resource that can only be set at its creation.",
        "If nobody needs the resource of that name, delete it, then run the command again.",
    ),
)

# The subscription's quota, or the location's capacity.
_CAPACITY = (
    Code(
        "SkuNotAvailable",
        QuotaExceeded,
        "The location or zone does not offer the VM size to this subscription now: no capacity, or a restriction.",
        _OTHER_SIZE,
    ),
    Code(
        "NotAvailableForSubscription",
        QuotaExceeded,
        "The size is restricted for this subscription in the location or zone; the list of sizes says so.",
        f"{_OTHER_SIZE} If it must be this one, ask Azure's support for access to it.",
    ),
    Code(
        "QuotaExceeded",
        QuotaExceeded,
        "The request exceeds a quota of the subscription in the location.",
        "Choose a smaller export_worker_size, delete what is no longer used, or ask for a higher quota.",
    ),
    Code(
        "AllocationFailed",
        QuotaExceeded,
        "The location has no capacity for the VM size at the moment. This can also happen when a deallocated VM is "
        "started.",
        f"{_OTHER_SIZE} If a VM of your own does not start, try again later.",
        waits=True,
    ),
    Code(
        "ZonalAllocationFailed",
        QuotaExceeded,
        "The zone has no capacity for the VM size at the moment.",
        f"{_OTHER_SIZE} If a VM of your own does not start, try again later.",
        waits=True,
    ),
    Code(
        "OverconstrainedAllocationRequest",
        QuotaExceeded,
        "No host in the location satisfies all requirements together: size, disks, network.",
        _OTHER_SIZE,
        waits=True,
    ),
    Code(
        "OverconstrainedZonalAllocationRequest",
        QuotaExceeded,
        "No host in the zone satisfies all requirements together: size, disks, network.",
        _OTHER_SIZE,
        waits=True,
    ),
    Code(
        "PublicIPCountLimitReached",
        QuotaExceeded,
        "The subscription's quota of public IP addresses in the location is used up.",
        "Delete unused addresses or ask for a higher quota. If this host can reach the worker's private address, set "
        "export_worker_use_fip to false.",
    ),
    Code(
        "IPv4StandardSkuPublicIpCountLimitReached",
        QuotaExceeded,
        "The subscription's quota of public IP addresses of the Standard SKU in the location is used up.",
        "Delete unused addresses or ask for a higher quota. If this host can reach the worker's private address, set "
        "export_worker_use_fip to false.",
    ),
    Code(
        "IPv4BasicSkuPublicIpCountLimitReached",
        QuotaExceeded,
        "A public IP address of the Basic SKU was requested; the SKU is retired, and new subscriptions cannot use it.",
        "If the cloud is no Azure Stack Hub, remove api_profile from custom_cloud_properties. If this host can reach "
        "the worker's private address, set export_worker_use_fip to false.",
    ),
    Code(
        "SubnetIsFull",
        QuotaExceeded,
        "The subnet has no free address for the worker.",
        "Set export_network to a subnet with free addresses, or leave it unset to have a network created.",
    ),
)

_THROTTLING = (
    Code(
        "TooManyRequests",
        Throttled,
        "The service received more requests than it allows. The target names the group of operations whose budget is "
        "used up, for instance HighCostGet for listings of disks and snapshots.",
        "Wait as long as Azure's answer says before the next request: earlier ones prolong the throttling. Run fewer "
        "transfers and fewer other tools on this subscription concurrently.",
        waits=True,
    ),
    Code(
        "SubscriptionRequestsThrottled",
        Throttled,
        "The subscription, or this identity in it, has sent more requests than the resource manager allows.",
        "Wait as long as Azure's answer says. Run fewer transfers and fewer other tools on this subscription "
        "concurrently, or give them identities of their own.",
        waits=True,
    ),
    Code(
        "ResourceCollectionRequestsThrottled",
        Throttled,
        "More requests for one kind of resource were sent than its provider allows.",
        "Wait as long as Azure's answer says. Run fewer transfers in this subscription concurrently.",
        waits=True,
    ),
    Code(
        "ServerBusy",
        Throttled,
        "The storage account is busy and accepts no more requests at the moment.",
        "Run fewer transfers on this storage account concurrently, or set bandwidth_limit.",
        waits=True,
    ),
)

# Locks, policies, permissions.
_REFUSED = (
    Code(
        "ScopeLocked",
        Conflict,
        "Somebody has put a management lock on the resource, its group or the subscription.",
        "Ask whoever set the lock to remove it, wait a few minutes until that takes effect, then run "
        "`coriolis-azure cleanup`.",
    ),
    Code(
        "RequestDisallowedByPolicy",
        Denied,
        "An Azure Policy of the subscription or resource group forbids the requested resource.",
        "Read which policy Azure's message names. Comply with it (tags for required tags, export_worker_size for "
        "permitted sizes, export_worker_use_fip if public IPs are forbidden), or ask its owner for an exemption.",
    ),
    Code(
        "AuthorizationFailed",
        Denied,
        "The identity lacks the permission for an action; Azure's message names the action and the scope.",
        "Give the identity a role with that action at that scope. If it is new, wait up to ten minutes.",
    ),
    Code(
        "DenyAssignmentAuthorizationFailed",
        Denied,
        "A deny assignment forbids the action, whatever roles the identity has. It belongs to a deployment stack, to a "
        "managed application, or to a resource group that another service manages.",
        "Ask the owner of the deny assignment that Azure's message names to exclude the identity. If it protects only "
        "one resource_group or export_network, choose another.",
    ),
    Code(
        "LinkedAuthorizationFailed",
        Denied,
        "The identity may change the resource, but may not use another resource that it refers to: join a subnet, read "
        "the source of a snapshot, use a disk encryption set.",
        "Give the identity the action that Azure's message names on the linked resource.",
    ),
    Code(
        "ReadOnlyDisabledSubscription",
        Denied,
        "The subscription is disabled: it can be read, but nothing in it can be changed.",
        "Ask the owner of the subscription to enable it again.",
    ),
    Code(
        "InvalidAuthenticationToken",
        Denied,
        "The resource manager does not accept the token: missing, damaged, or meant for another cloud or audience.",
        "Check cloud_profile and, of a CustomCloud, the endpoints and the audience (active_directory_resource_id).",
    ),
    Code(
        "InvalidAuthenticationTokenTenant",
        Denied,
        "The token is from a tenant other than the subscription's.",
        "Set tenant to the tenant of the subscription.",
    ),
    Code(
        "ExpiredAuthenticationToken",
        Denied,
        "The token had expired when it reached the resource manager.",
        "Check the clock of this host, then run the command again.",
    ),
    Code(
        "SubscriptionNotFound",
        NotFound,
        "The subscription does not exist in this cloud, or not in the identity's tenant.",
        "Check subscription_id, tenant and cloud_profile.",
    ),
    Code(
        "InvalidSubscriptionId",
        AzureError,
        "The subscription id is invalid: it must be a GUID.",
        "Correct subscription_id in the connection settings.",
    ),
    Code(
        "MissingSubscriptionRegistration",
        Conflict,
        "The subscription has not registered the resource provider (Microsoft.Compute, Microsoft.Network, ...).",
        "Register the provider once: `az provider register --namespace` with the name from Azure's message.",
    ),
)

# Resources that a request refers to and that do not exist, or not yet.
_MISSING = (
    Code(
        "ResourceNotFound",
        NotFound,
        "The resource does not exist in the given resource group and subscription.",
        "Check the name, resource_group and subscription_id.",
    ),
    Code(
        "ResourceGroupNotFound",
        NotFound,
        "The resource group does not exist in the subscription, or the identity cannot see it.",
        "Check resource_group (or default_resource_group) and subscription_id.",
    ),
    Code(
        "ParentResourceNotFound",
        NotFound,
        "The parent of the resource does not exist.",
        "Check the name, resource_group and subscription_id.",
    ),
    Code(
        "InvalidResourceReference",
        NotFound,
        "The request refers to a resource that does not exist, or that is in another location.",
        "Check that the resource that Azure's message names, most likely export_network, exists in the same location.",
    ),
    Code(
        "InvalidResourceLocation",
        Conflict,
        "A resource of that name already exists in another location.",
        "Delete or rename the resource of that name, or correct location.",
    ),
    Code(
        "LocationNotAvailableForResourceType",
        AzureError,
        "The location does not exist in this cloud, or does not offer this kind of resource.",
        "Correct location: `az account list-locations` lists the valid ones.",
    ),
    Code(
        "InvalidAvailabilityZone",
        AzureError,
        "The location does not have that availability zone, or not for this kind of resource.",
        f"{_OTHER_SIZE} If it repeats, report it as a fault of coriolis-azure.",
    ),
    Code(
        "NoRegisteredProviderFound",
        AzureError,
        "The cloud does not offer that kind of resource in that API version and location.",
        "Check location and cloud_profile. For an older or private cloud, set api_profile or api_versions in "
        "custom_cloud_properties.",
    ),
    Code(
        "InvalidApiVersionParameter",
        AzureError,
        "The cloud does not support the requested API version; older and private clouds lag behind.",
        "Set api_profile or api_versions in custom_cloud_properties to a version that Azure's message lists.",
    ),
    Code(
        "MissingApiVersionParameter",
        AzureError,
        "The request arrived without an API version, which a proxy may have removed.",
        f"Check the proxy between this host and Azure. {_REPORT}",
    ),
)

_IMAGES = (
    Code(
        "PlatformImageNotFound",
        NotFound,
        "The marketplace of the location does not have the image, or no longer has it.",
        _OTHER_IMAGE,
    ),
    Code("ImageNotFound", NotFound, "The image does not exist, or no longer exists.", _OTHER_IMAGE),
    Code(
        "MarketplacePurchaseEligibilityFailed",
        Denied,
        "The subscription may not buy the plan of the marketplace image; the details contain the reason.",
        f"{_OTHER_IMAGE} If it must be this one, accept the plan's terms, and check the subscription's payment method "
        "and country.",
    ),
    Code(
        "AccountSetupError",
        Denied,
        "The billing account of the subscription is not set up for purchases in the marketplace.",
        f"{_OTHER_IMAGE} If it must be this one, complete the billing account's data.",
    ),
    Code(
        "ResourcePurchaseValidationFailed",
        Denied,
        "The plan of the marketplace image cannot be bought: it does not exist, is withdrawn, or its terms have not "
        "been accepted.",
        f"{_OTHER_IMAGE} If it must be this one, accept the plan's terms.",
    ),
    Code(
        "VMMarketplaceInvalidInput",
        AzureError,
        "The image or disk for a new VM has a marketplace plan, and the request did not name the plan.",
        f"{_OTHER_IMAGE} If you create a VM from a copied disk yourself, name the plan of the source in the request.",
    ),
)

# Azure accepted a VM, but it did not start.
_PROVISIONING = (
    Code(
        "OSProvisioningTimedOut",
        OperationFailed,
        "The system on the VM did not report ready within Azure's time limit; the VM exists and is billed.",
        f"{_OTHER_IMAGE} {_UNDONE}",
    ),
    Code(
        "OSProvisioningClientError",
        OperationFailed,
        "The system on the VM reported that its provisioning failed; the VM exists and is billed.",
        f"{_OTHER_IMAGE} {_UNDONE}",
    ),
    Code(
        "OSProvisioningInternalError",
        OperationFailed,
        "The provisioning of the VM failed on Azure's side; the VM exists and is billed.",
        f"{_RETRY} {_UNDONE}",
        waits=True,
    ),
    Code(
        "VMStartTimedOut",
        OperationFailed,
        "The VM did not start within Azure's time limit; it exists and may still start.",
        f"{_RETRY} {_UNDONE}",
        waits=True,
    ),
    Code(
        "VMAgentStatusCommunicationError",
        OperationFailed,
        "The Azure agent in the VM does not report: it is not running, or cannot reach Azure's address 168.63.129.16.",
        f"{_OTHER_IMAGE} Check firewalls and routes of export_network. {_UNDONE}",
    ),
    Code(
        "VirtualMachineMustHaveAtLeastOneNetworkInterface",
        AzureError,
        "The request for a VM contained no network interface.",
        _REPORT,
    ),
)

_SERVER = (
    Code(
        "ResourceReadFailed",
        AzureError,
        "Azure could not read a resource within its own time limit, most often one that the request refers to.",
        f"{_RETRY} If it repeats, give Azure's support the request id.",
        waits=True,
    ),
    Code(
        "InternalServerError",
        AzureError,
        "Something failed inside Azure.",
        f"{_RETRY} If it repeats, give Azure's support the request id.",
        waits=True,
    ),
    Code(
        "InternalOperationError",
        OperationFailed,
        "An operation failed inside Azure.",
        f"{_RETRY} If it repeats, give Azure's support the request id.",
        waits=True,
    ),
    Code(
        "InternalExecutionError",
        OperationFailed,
        "An operation on a VM or disk failed inside Azure.",
        f"{_RETRY} If it repeats, give Azure's support the request id.",
        waits=True,
    ),
    Code(
        "NetworkingInternalOperationError",
        OperationFailed,
        "The network part of an operation on a VM failed inside Azure.",
        f"{_RETRY} If it repeats, give Azure's support the request id.",
        waits=True,
    ),
    Code(
        "InternalError",
        AzureError,
        "The storage service had an internal error.",
        f"{_RETRY} If it repeats, give Azure's support the request id.",
        waits=True,
    ),
    Code(
        "ServerTimeout",
        AzureError,
        "An Azure service did not answer its gateway in time; the request may have been carried out.",
        _RETRY,
        waits=True,
    ),
    Code(
        "GatewayTimeout",
        AzureError,
        "An Azure service did not answer the resource manager in time; the request may have been carried out.",
        _RETRY,
        waits=True,
    ),
    Code(
        "ServiceUnavailable",
        AzureError,
        "An Azure service accepts no requests at the moment.",
        f"{_RETRY} If it repeats, look at Azure's status page.",
        waits=True,
    ),
    Code(
        "OperationTimedOut",
        AzureError,
        "The storage service did not finish the request in time; the request may have been carried out.",
        _RETRY,
        waits=True,
    ),
)

# Storage: unmanaged disks, SAS URLs, page blobs.
_STORAGE = (
    Code(
        "KeyBasedAuthenticationNotPermitted",
        Denied,
        "The storage account accepts neither account keys nor SAS signed with them (allowSharedKeyAccess is false).",
        "Set storage_use_account_key to false, and give the identity the role Storage Blob Data Contributor on the "
        "account. If that is not possible, allow shared keys there.",
    ),
    Code(
        "AuthorizationFailure",
        Denied,
        "The storage account's firewall blocks this host, or the SAS does not permit the request.",
        "Allow this host's address or network in the account's firewall. Check that public network access is set as "
        "intended.",
    ),
    Code(
        "AuthorizationPermissionMismatch",
        Denied,
        "The identity or SAS is valid, but lacks the permission for this operation on the blob or container.",
        "Give the identity the role Storage Blob Data Contributor on the account or container.",
    ),
    Code(
        "PublicAccessNotPermitted",
        Denied,
        "The request arrived without credentials, and the storage account permits no anonymous access.",
        "Check the credentials, and that nothing between this host and Azure removes the Authorization header.",
    ),
    Code(
        "BlobImmutableDueToPolicy",
        Conflict,
        "An immutability policy or a legal hold keeps the blob from being changed or deleted.",
        "Choose a container without an immutability policy: every run changes the replica.",
    ),
    Code(
        "BlobArchived",
        Conflict,
        "The blob is in the archive tier, perhaps by a lifecycle rule of the account: it cannot be read there.",
        "Set its tier to Hot (az storage blob set-tier) and wait, which takes hours; then run again. Leave "
        "these blobs out of the rule.",
    ),
    Code(
        "BlobBeingRehydrated",
        Conflict,
        "The blob is on its way out of the archive tier, which takes hours.",
        "Wait until its archive status is empty (az storage blob show), then run again.",
    ),
    Code(
        "LeaseAlreadyPresent",
        Conflict,
        "Somebody else holds a lease on the blob: another run, or a VM that uses it as a disk.",
        "Wait for the other run to end, or choose another prefix.",
    ),
    Code(
        "InvalidVhd",
        AzureError,
        "The blob is not a fixed VHD of whole MiB, so no managed disk can be created from it.",
        "If it is a replica whose last run failed, run replicate again. Otherwise choose another VHD.",
    ),
    Code(
        "BlobTypeNotSupported",
        AzureError,
        "The storage account does not support blobs of this type: premium accounts have either page blobs or block "
        "blobs.",
        "Choose an account of kind StorageV2 with standard performance.",
    ),
    Code(
        "CannotVerifyCopySource",
        Denied,
        "Azure could not read the blob to copy: it is missing, or the source account blocks Azure services.",
        "Check that the source account's firewall allows Azure services, and that the identity may read its blobs.",
    ),
    Code(
        "LeaseIdMissing",
        Conflict,
        "The blob is leased, like that of every attached unmanaged disk: it can be read, but not changed or deleted.",
        "Detach the disk from its VM, or choose another blob.",
    ),
    Code(
        "SnapshotsPresent",
        Conflict,
        "A blob cannot be deleted without its snapshots.",
        "If nobody needs the blob's snapshots, delete them too.",
    ),
    Code(
        "NoPendingCopyOperation",
        Conflict,
        "The copy to abort has already ended.",
        "Look at the state of the copy. If it succeeded, continue.",
    ),
    Code(
        "BlobNotFound",
        NotFound,
        "The blob does not exist, or not yet, such as the console log of a VM that has just been created.",
        "Check storage_account_name, storage_container_name and the blob's name. If Azure has yet to create the blob, "
        "run the command again.",
    ),
    Code(
        "ContainerNotFound",
        NotFound,
        "The container does not exist in the storage account.",
        "Check storage_account_name and storage_container_name.",
    ),
    Code(
        "ContainerBeingDeleted",
        Conflict,
        "A container of that name is being deleted, which takes at least half a minute.",
        "Run the command again in a minute.",
        waits=True,
    ),
)

# Malformed or invalid requests.
_REQUEST = (
    Code(
        "InvalidRequestContent",
        AzureError,
        "The request's body is invalid: a property has the wrong type or is unknown in this API version.",
        _REPORT,
    ),
    Code(
        "InvalidRequestFormat",
        AzureError,
        "The network service cannot parse the request's body.",
        "Check export_network and export_worker_allowed_addresses. If they are correct, report it as a fault of "
        "coriolis-azure.",
    ),
    Code(
        "SecurityRuleInvalidAddressPrefix",
        AzureError,
        "A network security rule contains an invalid address or range, or an unknown service tag.",
        "Correct export_worker_allowed_addresses: IP addresses, ranges such as 192.0.2.0/24, or one service tag.",
    ),
    *(
        Code(name, AzureError, meaning, f"Report this as a fault of coriolis-azure, {_ADDRESSES}")
        for name, meaning in (
            (
                "SecurityRuleParameterContainsUnsupportedValue",
                "A list of addresses in a network security rule contains a service tag.",
            ),
            (
                "ResourceCannotContainAddressPrefixesFromDifferentAddressFamilies",
                "A network security rule mixes IPv4 and IPv6 addresses.",
            ),
            (
                "OverlappingSubnetsNotPermittedInSecurityRule",
                "Two ranges in a network security rule overlap.",
            ),
        )
    ),
    Code(
        "InvalidTagNameCharacters",
        AzureError,
        "The name of a tag contains a forbidden character: < > % & \\ ? or /.",
        "Rename the tag in the tags setting.",
    ),
)


def _sign_in(number: int, meaning: str, remedy: str, *, waits: bool = False) -> Code:
    return Code(f"AADSTS{number}", Denied, meaning, remedy, waits)


# Microsoft Entra, the sign-in service. Its codes are numbers with the prefix AADSTS.
_SIGN_IN = (
    _sign_in(
        90002,
        "The tenant does not exist in this cloud.",
        "Check tenant, and that cloud_profile is the cloud of the tenant.",
    ),
    _sign_in(
        900023,
        "The value of tenant is neither an id nor a domain name.",
        "Set tenant to the tenant's id (a GUID) or to one of its domain names.",
    ),
    _sign_in(
        700016,
        "The application (client_id) does not exist in the tenant.",
        "Check client_id and tenant. If the application belongs to another tenant, have it added to this one.",
    ),
    _sign_in(
        7000112,
        "The application is disabled in the tenant.",
        "Ask an administrator of the tenant to enable the application.",
    ),
    _sign_in(
        7000215,
        "The client secret is wrong; often the secret's id was given instead of its value.",
        "Set client_secret in service_principal_credentials to the value of a current secret of the application, not "
        "to its id.",
    ),
    _sign_in(
        7000222,
        "The client secret has expired.",
        "Set client_secret in service_principal_credentials to the value of a new secret of the application.",
    ),
    _sign_in(
        7000218,
        "The application must authenticate, and the request contained neither a secret nor a certificate.",
        "Give client_secret or client_certificate_path in service_principal_credentials.",
    ),
    _sign_in(
        700027,
        "The certificate does not belong to the application, or has expired.",
        "Add the certificate to the application, or use one of its own. Check the clock of this host.",
    ),
    _sign_in(
        700024,
        "The clock of this host is wrong, and so is the time in the application's assertion.",
        "Set the clock of this host.",
    ),
    _sign_in(
        500011,
        "The tenant does not know the service that the token is for: the audience belongs to another cloud.",
        "Check cloud_profile and, of a CustomCloud, active_directory_resource_id.",
    ),
    _sign_in(
        65001,
        "Nobody has consented to the application acting for this user.",
        f"Have an administrator of the tenant consent. {_USER_TO_APPLICATION}",
    ),
    _sign_in(
        50034,
        "The user does not exist in the tenant.",
        "Check username in user_credentials, and tenant.",
    ),
    _sign_in(50126, "The user name or the password is wrong.", "Correct user_credentials."),
    _sign_in(
        50053,
        "The user is locked out for a while after too many wrong passwords, or the address is blocked.",
        "Correct user_credentials before the next attempt. Wait until the lockout ends.",
        waits=True,
    ),
    _sign_in(
        50055,
        "The user's password has expired.",
        f"Sign in to the Azure portal once to set a new one. {_USER_TO_APPLICATION}",
    ),
    _sign_in(50057, "The user is disabled.", "Ask an administrator of the tenant to enable the user."),
    _sign_in(
        50076,
        "The user must use multi-factor authentication, which requires a person.",
        _USER_TO_APPLICATION,
    ),
    _sign_in(
        50079,
        "The user must enrol in multi-factor authentication, which requires a person.",
        _USER_TO_APPLICATION,
    ),
    _sign_in(
        53003,
        "A conditional access policy of the tenant forbids this sign-in, for instance from this network.",
        "Ask an administrator of the tenant which policy it is. Sign in from a permitted network, or have the identity "
        "excluded.",
    ),
    _sign_in(
        70003,
        "The tenant does not permit this way of signing in.",
        f"Give client_secret or client_certificate_path. {_USER_TO_APPLICATION}",
    ),
)

CODES: tuple[Code, ...] = (
    *_VAGUE,
    *_IN_USE,
    *_CAPACITY,
    *_THROTTLING,
    *_REFUSED,
    *_MISSING,
    *_IMAGES,
    *_PROVISIONING,
    *_SERVER,
    *_STORAGE,
    *_REQUEST,
    *_SIGN_IN,
)
_BY_NAME = {code.name.lower(): code for code in CODES}

_THROTTLED = 429
# Statuses that may be temporary.
_TEMPORARY = {409, 412, _THROTTLED}


def find(name: str) -> Code | None:
    """The entry for a code, ignoring case; None if it is not in the table."""
    return _BY_NAME.get(name.lower())


def nearest(name: str) -> list[str]:
    """The names of known codes that resemble `name`, most similar first."""
    lowered = name.lower()
    containing = [known for known in _BY_NAME if lowered and lowered in known]
    similar = difflib.get_close_matches(lowered, _BY_NAME, n=3, cutoff=0.5)
    return [_BY_NAME[known].name for known in dict.fromkeys([*similar, *containing][:5])]


def cause(names: Sequence[str], status: int) -> Code | None:
    """The entry that explains an answer best; `names` are its codes from the outermost to the innermost.

    This is the innermost known code, unless it is vague and one around it is not.
    """
    known = [code for name in reversed(names) if (code := find(name)) is not None]
    clear = [code for code in known if not code.vague]
    if status == _THROTTLED:  # the vague entries do not describe throttling
        return next(iter(clear), None)
    return next(iter(clear + known), None)


def waits(name: str, status: int) -> bool:
    """Whether the same request can succeed later without intervention. For an unknown code, the status decides."""
    code = find(name)
    if status == _THROTTLED or code is None:
        return status in _TEMPORARY
    return code.waits
