"""Azure's error codes: what each means, which of our errors it becomes, and what a person can do about it.

The table is a value: nothing here looks at a message, a request or a clock. A code that stands for several causes
is marked `vague`: its meaning names them all, because only Azure's message, which people read and programs do not,
tells them apart. HTTP status 429 means throttling whatever the code says; that is decided where errors are made.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AzureError, Conflict, Denied, NotFound, OperationFailed, QuotaExceeded, Throttled


@dataclass(frozen=True)
class Code:
    """One of Azure's codes. `waits`: the same request can succeed later, without anybody changing anything."""

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


_RETRY = "Run the command again in some minutes."
_REPORT = "Report this as a fault of coriolis-azure, with the message and the request id."
_OTHER_SIZE = (
    "Set export_worker_size to a size of another family, or leave it unset so that one that the location sells is "
    "chosen."
)
_OTHER_IMAGE = (
    "Set export_worker_image to an image that the location offers. Leave it unset, and a current one is chosen "
    "instead."
)
_ADDRESSES = "with the message and export_worker_allowed_addresses: they are checked before Azure is asked."
_UNDONE = (
    "Look whether the named resource still exists, and remove it with `coriolis-azure cleanup` if it does."
)
_USER_TO_APPLICATION = "Use a service principal in service_principal_credentials instead of a user."

# Codes with more than one cause.
_VAGUE = (
    Code(
        "OperationNotAllowed",
        Conflict,
        "One of three: a quota (cores of the location or of a size's family, disks a VM may have) is used up; or the "
        "resource is in use (a disk attached to a VM, a disk with an active SAS, a VM marked for deletion, a power "
        "change under way); or the operation is not possible for this resource or subscription at all. With status "
        "429 it is none of them, but throttling.",
        "Read Azure's message. Ask for a higher quota or choose a smaller export_worker_size if it speaks of a quota. "
        "Wait, or release the resource, if it names a user or another operation. Leave the VM or disk out if it says "
        "that the operation is not supported.",
        waits=True,
        vague=True,
    ),
    Code(
        "Conflict",
        Conflict,
        "The request collided with something: most often another operation on the same resource at the same time, "
        "else a name that is taken or a state that does not permit the change.",
        "Run the command again when the other operation has ended. Look at the named resource if it repeats: its "
        "state, or a stranger of the same name, is in the way.",
        waits=True,
        vague=True,
    ),
    Code(
        "InvalidParameter",
        AzureError,
        "A value in the request does not suit Azure: a VM size that the location does not have, a user name, key or "
        "LUN that is not permitted, a disk that would shrink, settings that exclude each other.",
        "Read which parameter Azure's message names. Correct the setting that it comes from, export_worker_size and "
        "export_worker_image first. Report it as a fault of coriolis-azure if no setting is behind it.",
        vague=True,
    ),
    Code(
        "BadRequest",
        AzureError,
        "Azure refuses the request as it is, for instance because a disk is in another zone than the VM that it is "
        "to be attached to; the code is also put around the error of another service.",
        "Read Azure's message. Choose an export_worker_size that the zone of the disks offers if it speaks of zones. "
        "Report it as a fault of coriolis-azure if no setting is behind it.",
        vague=True,
    ),
    Code(
        "NotFound",
        NotFound,
        "Something is not there: the resource itself, or one that the request refers to (the disk of a snapshot, the "
        "NIC of a VM, the publisher of an image), which may have been deleted a moment ago.",
        "Read which resource Azure's message names. Check its name, resource group and subscription. Run the command "
        "again if it was being replaced meanwhile.",
        vague=True,
    ),
    Code(
        "AuthenticationFailed",
        Denied,
        "The service did not accept the proof of identity: a token that is missing, expired or meant for another "
        "cloud, or, from storage, a signature (SAS) or account key that is wrong, expired or not yet valid.",
        "Check the credentials, the tenant and the cloud_profile. Check the clock of this host. Run the command again "
        "to get a new SAS.",
        vague=True,
    ),
    Code(
        "DeploymentFailed",
        OperationFailed,
        "A template deployment failed; its details hold the code of the resource that did.",
        "Read the details of the deployment in the Azure portal. Explain the inner code with `coriolis-azure explain`.",
        vague=True,
    ),
    Code(
        "InvalidTemplateDeployment",
        AzureError,
        "The check before a template deployment failed; its details hold the code of the cause, often a quota or a "
        "policy.",
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

# Used by somebody else at the moment: seconds to minutes, also after the deletion of the user was reported as done.
_IN_USE = (
    Code(
        "NicInUse",
        Conflict,
        "A network interface cannot be deleted while a VM has it; for a while after the VM's deletion Azure still "
        "believes so.",
        f"Wait until the VM is gone, then run `coriolis-azure cleanup`. {_UNDONE}",
        waits=True,
    ),
    Code(
        "NicReservedForAnotherVm",
        Conflict,
        "A VM failed to start, and Azure keeps its network interface for it for 180 seconds.",
        "Wait three minutes, then run `coriolis-azure cleanup`.",
        waits=True,
    ),
    Code(
        "PublicIPAddressCannotBeDeleted",
        Conflict,
        "A public IP address cannot be deleted while a network interface has it.",
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
        "Wait until the network interface is gone, then run `coriolis-azure cleanup`. Remove what others have put "
        "into the worker's network.",
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
        "The private address asked for belongs to another network interface of the subnet.",
        "Choose a free address, or release the one in use.",
    ),
    Code(
        "AttachDiskWhileBeingDetached",
        Conflict,
        "A disk cannot be attached because its detaching has not ended, or failed.",
        "Wait until the disk is detached. Detach it again in the Azure portal if it stays.",
        waits=True,
    ),
    Code(
        "ConflictingUserInput",
        Conflict,
        "A disk belongs to another VM already, a disk of the name that a new VM's OS disk is to have exists already "
        "(that of a VM that failed to start stays for a while), or the request contradicts itself.",
        "Read Azure's message. Detach the disk if it names a VM that has it. Run `coriolis-azure cleanup`, then the "
        "command again, if it says that the disk already exists.",
        vague=True,
    ),
    Code(
        "AcquireDiskLeaseFailed",
        Conflict,
        "The VHD blob of an unmanaged disk is leased by another VM or disk.",
        "Find the owner in the blob's metadata. Detach the disk from it, or break a lease that has no owner any more.",
    ),
    Code(
        "DiskBlobAlreadyInUseByAnotherDisk",
        Conflict,
        "The VHD blob is the content of another disk already.",
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
        "The network service was busy with this or a neighbouring resource, and asks for another try.",
        _RETRY,
        waits=True,
    ),
    Code(
        "RetryableErrorDueToAnotherOperation",
        Conflict,
        "Another operation has locked the network resource for its duration.",
        "Wait for the other operation, then run the command again.",
        waits=True,
    ),
    Code(
        "AnotherOperationInProgress",
        Conflict,
        "Another operation on the same network resource, or on one that depends on it, has not ended.",
        "Wait for the other operation, then run the command again.",
        waits=True,
    ),
    Code(
        "ReferencedResourceNotProvisioned",
        Conflict,
        "A network resource that the request refers to is not finished, or its creation failed.",
        "Wait until the named resource is ready. Delete it if it has failed, then run the command again.",
        waits=True,
    ),
    Code(
        "CanceledAndSupersededDueToAnotherOperation",
        Conflict,
        "A later operation on the same network resource took the place of this one.",
        "Let only one tool change the resource at a time, then run the command again.",
        waits=True,
    ),
    Code(
        "OperationPreempted",
        Conflict,
        "A later operation on the same VM took the place of this one.",
        "Let only one tool change the VM at a time, then run the command again.",
        waits=True,
    ),
    Code(
        "PreconditionFailed",
        Conflict,
        "The resource was changed by somebody else between reading and writing it.",
        "Run the command again.",
        waits=True,
    ),
    Code(
        "ResourceGroupBeingDeleted",
        Conflict,
        "The resource group is being deleted with everything in it.",
        "Find out who deletes the resource group. Choose another resource_group, or run again when it is back.",
    ),
    Code(
        "PropertyChangeNotAllowed",
        Conflict,
        "A property of an existing resource was to be changed that can be set only when the resource is made.",
        "Delete or rename the resource of that name if it is a leftover, then run the command again.",
    ),
)

# The subscription's quota, or what the location has to sell.
_CAPACITY = (
    Code(
        "SkuNotAvailable",
        QuotaExceeded,
        "The location or zone does not sell the VM size to this subscription now: no capacity, or a restriction.",
        _OTHER_SIZE,
    ),
    Code(
        "NotAvailableForSubscription",
        QuotaExceeded,
        "The size is restricted for this subscription in the location or zone; the list of sizes says so.",
        f"{_OTHER_SIZE} Ask Azure's support for access to the size if it must be this one.",
    ),
    Code(
        "QuotaExceeded",
        QuotaExceeded,
        "The request needs more of something than the subscription may have in the location.",
        "Choose a smaller export_worker_size, free what is no longer used, or ask for a higher quota.",
    ),
    Code(
        "AllocationFailed",
        QuotaExceeded,
        "The location has no room for the VM size at the moment; a VM that was deallocated can meet this at its "
        "start as well.",
        f"{_OTHER_SIZE} Try again later if it is a VM of your own that does not start.",
        waits=True,
    ),
    Code(
        "ZonalAllocationFailed",
        QuotaExceeded,
        "The zone has no room for the VM size at the moment.",
        f"{_OTHER_SIZE} Try again later if it is a VM of your own that does not start.",
        waits=True,
    ),
    Code(
        "OverconstrainedAllocationRequest",
        QuotaExceeded,
        "No host of the location satisfies everything that was asked for together: size, disks, network.",
        _OTHER_SIZE,
        waits=True,
    ),
    Code(
        "OverconstrainedZonalAllocationRequest",
        QuotaExceeded,
        "No host of the zone satisfies everything that was asked for together: size, disks, network.",
        _OTHER_SIZE,
        waits=True,
    ),
    Code(
        "PublicIPCountLimitReached",
        QuotaExceeded,
        "The subscription has as many public IP addresses in the location as it may.",
        "Delete unused addresses, ask for a higher quota, or set export_worker_use_fip to false where this host "
        "reaches the worker's network by itself.",
    ),
    Code(
        "IPv4StandardSkuPublicIpCountLimitReached",
        QuotaExceeded,
        "The subscription has as many public IP addresses of the Standard SKU in the location as it may.",
        "Delete unused addresses, ask for a higher quota, or set export_worker_use_fip to false where this host "
        "reaches the worker's network by itself.",
    ),
    Code(
        "IPv4BasicSkuPublicIpCountLimitReached",
        QuotaExceeded,
        "A public IP address of the Basic SKU was asked for; it is retired, and new subscriptions may have none.",
        f"Use addresses of the Standard SKU. {_REPORT}",
    ),
    Code(
        "SubnetIsFull",
        QuotaExceeded,
        "The subnet has no free address for the worker.",
        "Set export_network to a subnet with free addresses, or leave it unset so that a network is made.",
    ),
)

_THROTTLING = (
    Code(
        "TooManyRequests",
        Throttled,
        "More requests were sent than the service takes; the target names the group of operations (HighCostGet for "
        "lists of disks and snapshots, for instance) whose budget is empty.",
        "Wait as long as Azure's answer says before the next request: earlier ones prolong it. Run fewer transfers "
        "and fewer other tools on this subscription side by side.",
        waits=True,
    ),
    Code(
        "SubscriptionRequestsThrottled",
        Throttled,
        "The subscription, or this identity in it, has sent more requests than the resource manager takes.",
        "Wait as long as Azure's answer says. Run fewer transfers and fewer other tools on this subscription side by "
        "side, or give them identities of their own.",
        waits=True,
    ),
    Code(
        "ResourceCollectionRequestsThrottled",
        Throttled,
        "More requests for one kind of resource were sent than its provider takes.",
        "Wait as long as Azure's answer says. Run fewer transfers of this subscription side by side.",
        waits=True,
    ),
    Code(
        "ServerBusy",
        Throttled,
        "The storage account takes no more requests at the moment.",
        "Run fewer transfers on this storage account side by side, or set bandwidth_limit.",
        waits=True,
    ),
)

# Locks, policies, permissions.
_REFUSED = (
    Code(
        "ScopeLocked",
        Conflict,
        "Somebody has put a management lock on the resource, its group or the subscription.",
        "Ask whoever set the lock to remove it, then run `coriolis-azure cleanup`. Wait some minutes after its "
        "removal, for Azure takes a while to notice.",
    ),
    Code(
        "RequestDisallowedByPolicy",
        Denied,
        "An Azure Policy of the subscription or resource group forbids the resource as it was asked for.",
        "Read which policy Azure's message names. Satisfy it (required tags with the tags setting, permitted sizes "
        "with export_worker_size, no public IP with export_worker_use_fip), or ask its owner for an exemption.",
    ),
    Code(
        "AuthorizationFailed",
        Denied,
        "The identity lacks the permission for an action; Azure's message names the action and the scope.",
        "Give the identity a role with that action at that scope. Wait up to ten minutes if it was given just now.",
    ),
    Code(
        "DenyAssignmentAuthorizationFailed",
        Denied,
        "A deny assignment forbids the action, whatever roles the identity has: of a deployment stack, of a managed "
        "application, or of a resource group that another service keeps.",
        "Ask the owner of the deny assignment that Azure's message names to leave the identity out of it. Choose "
        "another resource_group or export_network if it protects only that one.",
    ),
    Code(
        "LinkedAuthorizationFailed",
        Denied,
        "The identity may change the resource, but not use another one that it refers to: joining a subnet, reading "
        "the source of a snapshot, using a disk encryption set.",
        "Give the identity the action that Azure's message names on the resource that it refers to.",
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
        "The token comes from another tenant than the one that the subscription belongs to.",
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
        "There is no such subscription in this cloud, or the identity's tenant does not know it.",
        "Check subscription_id, tenant and cloud_profile.",
    ),
    Code(
        "InvalidSubscriptionId",
        AzureError,
        "The subscription id is not one: it must have the form of a GUID.",
        "Correct subscription_id in the connection settings.",
    ),
    Code(
        "MissingSubscriptionRegistration",
        Conflict,
        "The subscription has not registered the resource provider (Microsoft.Compute, Microsoft.Network, ...).",
        "Register the provider once: `az provider register --namespace` with the name from Azure's message.",
    ),
)

# Things that a request names and that are not there, or not there yet.
_MISSING = (
    Code(
        "ResourceNotFound",
        NotFound,
        "The resource does not exist in the resource group and subscription that were asked.",
        "Check the name, resource_group and subscription_id.",
    ),
    Code(
        "ResourceGroupNotFound",
        NotFound,
        "The resource group does not exist in the subscription, or the identity may not see it.",
        "Check resource_group (or default_resource_group) and subscription_id.",
    ),
    Code(
        "ParentResourceNotFound",
        NotFound,
        "The resource that this one is a part of does not exist.",
        "Check the name, resource_group and subscription_id.",
    ),
    Code(
        "InvalidResourceReference",
        NotFound,
        "The request refers to a resource that does not exist, or that is in another location.",
        "Check that what Azure's message names exists and is in the same location: export_network first.",
    ),
    Code(
        "InvalidResourceLocation",
        Conflict,
        "A resource of that name exists in another location already.",
        "Delete or rename the resource of that name, or correct location.",
    ),
    Code(
        "LocationNotAvailableForResourceType",
        AzureError,
        "The location does not exist in this cloud, or does not offer this kind of resource.",
        "Correct location: `az account list-locations` names those there are.",
    ),
    Code(
        "InvalidAvailabilityZone",
        AzureError,
        "The location does not have that availability zone, or not for this kind of resource.",
        f"{_OTHER_SIZE} Report it as a fault of coriolis-azure if it repeats.",
    ),
    Code(
        "NoRegisteredProviderFound",
        AzureError,
        "The cloud does not offer that kind of resource in that API version and location.",
        "Check location and cloud_profile. Set api_profile or api_versions in custom_cloud_properties for an older or "
        "private cloud.",
    ),
    Code(
        "InvalidApiVersionParameter",
        AzureError,
        "The cloud does not know the API version that was asked for; older and private clouds lag behind.",
        "Set api_profile or api_versions in custom_cloud_properties to what Azure's message says that it offers.",
    ),
    Code(
        "MissingApiVersionParameter",
        AzureError,
        "The request came without an API version, which a proxy in between may have removed.",
        f"Check the proxy between this host and Azure. {_REPORT}",
    ),
)

_IMAGES = (
    Code(
        "PlatformImageNotFound",
        NotFound,
        "The marketplace of the location does not have the image, or no longer.",
        _OTHER_IMAGE,
    ),
    Code("ImageNotFound", NotFound, "The image does not exist, or no longer.", _OTHER_IMAGE),
    Code(
        "MarketplacePurchaseEligibilityFailed",
        Denied,
        "The subscription may not buy the plan of the marketplace image; the details hold the reason.",
        f"{_OTHER_IMAGE} Accept the plan's terms, and check the subscription's payment and its country, if it must "
        "be this one.",
    ),
    Code(
        "AccountSetupError",
        Denied,
        "The billing account of the subscription is not set up for purchases in the marketplace.",
        f"{_OTHER_IMAGE} Complete the billing account's data if it must be this one.",
    ),
    Code(
        "ResourcePurchaseValidationFailed",
        Denied,
        "The plan of the marketplace image cannot be bought: it does not exist, is withdrawn, or its terms are not "
        "accepted.",
        f"{_OTHER_IMAGE} Accept the plan's terms if it must be this one.",
    ),
    Code(
        "VMMarketplaceInvalidInput",
        AzureError,
        "A VM was to start from an image or disk that has a marketplace plan, and the request did not name the plan.",
        f"{_OTHER_IMAGE} Name the plan of the source in the request where you make a VM of a copied disk yourself.",
    ),
)

# Azure accepted a VM, and it did not come up.
_PROVISIONING = (
    Code(
        "OSProvisioningTimedOut",
        OperationFailed,
        "The system on the VM did not report that it is ready within Azure's time; the VM exists and costs money.",
        f"{_OTHER_IMAGE} {_UNDONE}",
    ),
    Code(
        "OSProvisioningClientError",
        OperationFailed,
        "The system on the VM reported that its first configuration failed; the VM exists and costs money.",
        f"{_OTHER_IMAGE} {_UNDONE}",
    ),
    Code(
        "OSProvisioningInternalError",
        OperationFailed,
        "The first configuration of the VM failed on Azure's side; the VM exists and costs money.",
        f"{_RETRY} {_UNDONE}",
        waits=True,
    ),
    Code(
        "VMStartTimedOut",
        OperationFailed,
        "The VM did not start within Azure's time; it exists and may still come up.",
        f"{_RETRY} {_UNDONE}",
        waits=True,
    ),
    Code(
        "VMAgentStatusCommunicationError",
        OperationFailed,
        "The agent in the VM does not report: it does not run, or cannot reach Azure's address 168.63.129.16.",
        f"{_OTHER_IMAGE} Check firewalls and routes of export_network. {_UNDONE}",
    ),
    Code(
        "VirtualMachineMustHaveAtLeastOneNetworkInterface",
        AzureError,
        "A VM was to be made without a network interface.",
        _REPORT,
    ),
)

_SERVER = (
    Code(
        "ResourceReadFailed",
        AzureError,
        "Azure could not read a resource within its own time, most often one that the request refers to.",
        f"{_RETRY} Give Azure's support the request id if it repeats.",
        waits=True,
    ),
    Code(
        "InternalServerError",
        AzureError,
        "Something went wrong inside Azure.",
        f"{_RETRY} Give Azure's support the request id if it repeats.",
        waits=True,
    ),
    Code(
        "InternalOperationError",
        OperationFailed,
        "An operation went wrong inside Azure.",
        f"{_RETRY} Give Azure's support the request id if it repeats.",
        waits=True,
    ),
    Code(
        "InternalExecutionError",
        OperationFailed,
        "An operation on a VM or disk went wrong inside Azure.",
        f"{_RETRY} Give Azure's support the request id if it repeats.",
        waits=True,
    ),
    Code(
        "NetworkingInternalOperationError",
        OperationFailed,
        "The network part of an operation on a VM went wrong inside Azure.",
        f"{_RETRY} Give Azure's support the request id if it repeats.",
        waits=True,
    ),
    Code(
        "InternalError",
        AzureError,
        "The storage service failed inside.",
        f"{_RETRY} Give Azure's support the request id if it repeats.",
        waits=True,
    ),
    Code(
        "ServerTimeout",
        AzureError,
        "A service of Azure did not answer its own gateway in time; the request may have been carried out.",
        _RETRY,
        waits=True,
    ),
    Code(
        "GatewayTimeout",
        AzureError,
        "A service of Azure did not answer the resource manager in time; the request may have been carried out.",
        _RETRY,
        waits=True,
    ),
    Code(
        "ServiceUnavailable",
        AzureError,
        "A service of Azure takes no requests at the moment.",
        f"{_RETRY} Look at Azure's status page if it repeats.",
        waits=True,
    ),
    Code(
        "OperationTimedOut",
        AzureError,
        "The storage service did not finish the request in its time; the request may have been carried out.",
        _RETRY,
        waits=True,
    ),
)

# Storage: unmanaged disks, SAS URLs, page blobs.
_STORAGE = (
    Code(
        "KeyBasedAuthenticationNotPermitted",
        Denied,
        "The storage account does not accept account keys, nor SAS made with them (allowSharedKeyAccess is false).",
        "Set storage_use_account_key to false, and give the identity the role Storage Blob Data Contributor on the "
        "account. Allow shared keys there if that cannot be.",
    ),
    Code(
        "AuthorizationFailure",
        Denied,
        "The storage account's firewall does not let this host in, or the request may not do this with its SAS.",
        "Add this host's address or network to the account's firewall. Check that public network access is as "
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
        "The request came without proof of identity, and the storage account permits no anonymous access.",
        "Check the credentials, and that nothing between this host and Azure removes the Authorization header.",
    ),
    Code(
        "BlobImmutableDueToPolicy",
        Conflict,
        "An immutability policy or a legal hold keeps the blob from being changed or deleted.",
        "Choose a container without an immutability policy: a replica changes with every run.",
    ),
    Code(
        "LeaseAlreadyPresent",
        Conflict,
        "Somebody else has a lease on the blob: another run, or a VM that has it as a disk.",
        "Wait for the other run to end, or choose another prefix.",
    ),
    Code(
        "InvalidVhd",
        AzureError,
        "The blob is no fixed VHD of whole MiB, so no managed disk can be made of it.",
        "Run replicate again if it is a replica whose last run did not end well. Choose another VHD otherwise.",
    ),
    Code(
        "BlobTypeNotSupported",
        AzureError,
        "The storage account does not take blobs of this type: premium accounts take page blobs or block blobs only.",
        "Choose an account of kind StorageV2 with standard performance.",
    ),
    Code(
        "CannotVerifyCopySource",
        Denied,
        "Azure could not read the blob that was to be copied: it is missing, or the source account keeps Azure out.",
        "Check that the source account's firewall lets Azure services in, and that the identity may read its blobs.",
    ),
    Code(
        "LeaseIdMissing",
        Conflict,
        "The blob is leased, as that of every attached unmanaged disk is: it can be read, but not changed or deleted.",
        "Detach the disk from its VM, or choose another blob.",
    ),
    Code(
        "SnapshotsPresent",
        Conflict,
        "A blob cannot be deleted without its snapshots.",
        "Delete the blob's snapshots too, if nobody needs them.",
    ),
    Code(
        "NoPendingCopyOperation",
        Conflict,
        "A copy was to be stopped that has ended already.",
        "Look at the state of the copy. Go on if it succeeded.",
    ),
    Code(
        "BlobNotFound",
        NotFound,
        "The blob does not exist, or not yet, as the console log of a VM that has just been made.",
        "Check storage_account_name, storage_container_name and the blob's name. Run the command again if it is to "
        "appear by itself.",
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
        "A container of that name is being deleted, which takes half a minute and more.",
        "Run the command again in a minute.",
        waits=True,
    ),
)

# What the request's own text makes impossible.
_REQUEST = (
    Code(
        "InvalidRequestContent",
        AzureError,
        "The request's document cannot be read: a property that this API version does not know, or of another type.",
        _REPORT,
    ),
    Code(
        "InvalidRequestFormat",
        AzureError,
        "The network service cannot read the request's document.",
        "Check export_network and export_worker_allowed_addresses. Report it as a fault of coriolis-azure if they are "
        "right.",
    ),
    Code(
        "SecurityRuleInvalidAddressPrefix",
        AzureError,
        "An address or range in a network security rule is not one, or is a service tag that Azure does not know.",
        "Correct export_worker_allowed_addresses: IP addresses, ranges as 192.0.2.0/24, or one service tag.",
    ),
    *(
        Code(name, AzureError, meaning, f"Report this as a fault of coriolis-azure, {_ADDRESSES}")
        for name, meaning in (
            (
                "SecurityRuleParameterContainsUnsupportedValue",
                "A service tag stands in a list of addresses of a network security rule.",
            ),
            (
                "ResourceCannotContainAddressPrefixesFromDifferentAddressFamilies",
                "The addresses of a network security rule are of IPv4 and of IPv6.",
            ),
            (
                "OverlappingSubnetsNotPermittedInSecurityRule",
                "Two ranges of a network security rule have addresses in common.",
            ),
        )
    ),
    Code(
        "InvalidTagNameCharacters",
        AzureError,
        "The name of a tag has a character that Azure does not permit there: < > % & \\ ? or /.",
        "Rename the tag in the tags setting.",
    ),
)


def _sign_in(number: int, meaning: str, remedy: str, *, waits: bool = False) -> Code:
    return Code(f"AADSTS{number}", Denied, meaning, remedy, waits)


# Microsoft Entra (the sign-in service). Its codes are numbers after AADSTS.
_SIGN_IN = (
    _sign_in(
        90002,
        "There is no such tenant in this cloud.",
        "Check tenant, and that cloud_profile is the cloud of the tenant.",
    ),
    _sign_in(
        900023,
        "What was given as tenant is neither an id nor a domain name.",
        "Set tenant to the tenant's id (a GUID) or to one of its domain names.",
    ),
    _sign_in(
        700016,
        "The application (client_id) does not exist in the tenant.",
        "Check client_id and tenant. Have the application added to the tenant if it belongs to another one.",
    ),
    _sign_in(
        7000112,
        "The application is disabled in the tenant.",
        "Ask an administrator of the tenant to enable the application.",
    ),
    _sign_in(
        7000215,
        "The client secret is wrong; often the secret's id was given in place of its value.",
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
        "The application must prove who it is, and the request held neither secret nor certificate.",
        "Give client_secret or client_certificate_path in service_principal_credentials.",
    ),
    _sign_in(
        700027,
        "The certificate is not one of the application's, or has expired.",
        "Add the certificate to the application, or use one that is there. Check the clock of this host.",
    ),
    _sign_in(
        700024,
        "The time in the application's proof is wrong: the clock of this host is.",
        "Set the clock of this host.",
    ),
    _sign_in(
        500011,
        "The tenant does not know the service that the token is for: another cloud's audience was asked for.",
        "Check cloud_profile and, of a CustomCloud, active_directory_resource_id.",
    ),
    _sign_in(
        65001,
        "Nobody has consented to the application's acting for this user.",
        f"Have an administrator of the tenant consent. {_USER_TO_APPLICATION}",
    ),
    _sign_in(
        50034,
        "There is no such user in the tenant.",
        "Check username in user_credentials, and tenant.",
    ),
    _sign_in(50126, "The user name or the password is wrong.", "Correct user_credentials."),
    _sign_in(
        50053,
        "The user is locked for a while after too many wrong passwords, or the address is blocked.",
        "Correct user_credentials before the next try. Wait until the lock ends.",
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
        "The user must use multi-factor authentication, which needs a person.",
        _USER_TO_APPLICATION,
    ),
    _sign_in(
        50079,
        "The user must enrol in multi-factor authentication, which needs a person.",
        _USER_TO_APPLICATION,
    ),
    _sign_in(
        53003,
        "A conditional access policy of the tenant forbids this sign-in, for instance from this place.",
        "Ask an administrator of the tenant which policy it was. Sign in from a permitted network, or have the "
        "identity excluded.",
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
# Statuses that speak of the moment rather than of the request.
_PASSING = {409, 412, _THROTTLED}


def find(name: str) -> Code | None:
    """The entry of a code, whatever its case; None for one that is not in the table."""
    return _BY_NAME.get(name.lower())


def nearest(name: str) -> list[str]:
    """The names of known codes that look like `name`, the most similar first."""
    wanted = name.lower()
    holding = [known for known in _BY_NAME if wanted and wanted in known]
    alike = difflib.get_close_matches(wanted, _BY_NAME, n=3, cutoff=0.5)
    return [_BY_NAME[known].name for known in dict.fromkeys([*alike, *holding][:5])]


def cause(names: Sequence[str], status: int) -> Code | None:
    """The entry that explains an answer best; `names` are its codes from the outermost to the innermost.

    The innermost code is the cause, except where it is vague and one around it is not.
    """
    known = [code for name in reversed(names) if (code := find(name)) is not None]
    clear = [code for code in known if not code.vague]
    if status == _THROTTLED:  # the vague ones do not speak of throttling
        return next(iter(clear), None)
    return next(iter(clear + known), None)


def waits(name: str, status: int) -> bool:
    """Whether the same request can succeed later by itself. Of an unknown code the status tells."""
    code = find(name)
    if status == _THROTTLED or code is None:
        return status in _PASSING
    return code.waits
