"""Checks a VHD blob before it is imported as a managed disk, as Azure does."""

from __future__ import annotations

from coriolis_azure import errors, vhd
from coriolis_azure.sandbox.state import Resource
from coriolis_azure.sandbox.storage.accounts import endpoint
from coriolis_azure.sandbox.storage.store import Blob
from coriolis_azure.sandbox.wire import ArmError, Request, invalid
from coriolis_azure.sandbox.world import World


def source(world: World, account: Resource, uri: str) -> Blob:
    """The page blob, or its snapshot, at `uri` in `account`: a fixed VHD of whole MiB. The caller holds the lock."""
    start = endpoint(world, account)
    if not uri.startswith(start):
        raise invalid(f"The source blob {uri} is not in the storage account {account.name}.", "sourceUri")
    request = Request("GET", uri)
    container, _, name = request.path.removeprefix(f"/{account.name}/").partition("/")
    blobs = world.blobs.accounts.get(account.name)
    source_container = blobs.containers.get(container) if blobs else None
    blob = source_container.find(name, request.query.get("snapshot", "")) if source_container else None
    if blob is None:
        raise ArmError(404, "BlobNotFound", f"The source blob {uri} does not exist.")
    if blob.kind != "PageBlob":
        raise ArmError(
            400, "BlobNotPageBlob", f"The source blob {uri} is a {blob.kind}; a disk is made of a page blob."
        )
    last = world.blobs.read(blob, max(0, blob.size - vhd.FOOTER), vhd.FOOTER)
    if not last.startswith(b"conectix"):
        raise _invalid_vhd(
            f"The specified cookie value in VHD footer indicates that disk '{name}' with blob {uri} is not a "
            "supported VHD. Disk is expected to have cookie value 'conectix'."
        )
    try:
        size = vhd.content_size(last, blob.size, uri)
    except errors.Unsupported as error:
        raise _invalid_vhd(error.message) from None
    if size % vhd.ALIGNMENT:
        raise _invalid_vhd(
            f"The specified disk '{name}' with blob {uri} has an unsupported virtual size of {size} bytes. The size "
            "must be a whole number (in MBs)."
        )
    return blob


def _invalid_vhd(message: str) -> ArmError:
    return ArmError(400, "InvalidVhd", message)
