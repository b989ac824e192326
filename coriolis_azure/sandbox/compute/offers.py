"""What the compute provider offers in a location: SKUs, sizes, usage, images."""

from __future__ import annotations

import re

from coriolis_azure.sandbox import catalog
from coriolis_azure.sandbox.relations import DISKS, MACHINES, SNAPSHOTS
from coriolis_azure.sandbox.wire import ArmError, Json, Response
from coriolis_azure.sandbox.world import Call, World

_BY_LOCATION = re.compile(r"location eq '([^']+)'", re.IGNORECASE)


def list_skus(world: World, call: Call) -> Response:
    """The SKU list; it can be filtered only by location."""
    del world
    text = call.query.get("$filter")
    match = _BY_LOCATION.fullmatch(text.strip()) if text else None
    if text and match is None:
        raise ArmError(400, "InvalidFilter", f"The filter '{text}' is not supported: location eq '<name>'.")
    return Response.of(200, {"value": catalog.skus(match.group(1) if match else None)})


def list_sizes(world: World, call: Call) -> Response:
    """The sizes available in a location."""
    del world
    location = _location(call)
    rows = [
        {
            "name": size.name,
            "numberOfCores": size.cores,
            "osDiskSizeInMB": 1047552,
            "resourceDiskSizeInMB": size.temporary_mib,
            "memoryInMB": int(size.memory_gib * 1024),
            "maxDataDiskCount": size.data_disks,
        }
        for size in catalog.SIZES.values()
        if location not in size.closed_in
    ]
    return Response.of(200, {"value": rows})


def list_usages(world: World, call: Call) -> Response:
    """Cores, VMs, disks and snapshots in use, with their quotas."""
    location = _location(call)
    machines = [machine for machine in world.state.of_type(MACHINES) if machine.location == location]
    sizes = [catalog.SIZES[machine.properties["hardwareProfile"]["vmSize"].lower()] for machine in machines]
    rows = [
        _usage("cores", "Total Regional vCPUs", sum(size.cores for size in sizes), 100),
        _usage("virtualMachines", "Virtual Machines", len(sizes), 25000),
    ]
    for family in sorted({size.family for size in catalog.SIZES.values()}):
        used = sum(size.cores for size in sizes if size.family == family)
        rows.append(_usage(family, f"{family} vCPUs", used, 100))
    for kind, counted in ((DISKS, "DiskCount"), (SNAPSHOTS, "SnapshotCount")):
        skus = [_counted(str(resource.document["sku"]["name"])) for resource in world.state.of_type(kind)]
        for sku in sorted({*map(_counted, catalog.DISK_SKUS)} if kind == DISKS else {"Standard", "Premium"}):
            used = skus.count(sku)
            rows.append(_usage(f"{sku}{counted}", f"{sku} {kind.rpartition('/')[2]}", used, 50000))
    for row in rows:
        row["currentValue"], row["limit"] = world.quotas.get(
            row["name"]["value"], (row["currentValue"], row["limit"])
        )
    return Response.of(200, {"value": rows})


def _counted(sku: str) -> str:
    """An account type as named in the usage lists: `Premium_ZRS` is PremiumZRS, `Premium_LRS` is Premium."""
    return sku.removesuffix("_LRS").replace("_", "")


def _usage(name: str, display: str, used: int, limit: int) -> Json:
    return {
        "unit": "Count",
        "currentValue": used,
        "limit": limit,
        "name": {"value": name, "localizedValue": display},
    }


def list_publishers(world: World, call: Call) -> Response:
    """All publishers of images."""
    del world
    return _names(call, {image.publisher for image in catalog.IMAGES})


def list_image_offers(world: World, call: Call) -> Response:
    """A publisher's offers."""
    del world
    names = {image.offer for image in catalog.IMAGES if _is(image, call, "publisher")}
    return _names(call, _known(names, "Publisher", call.part["publisher"]))


def list_image_skus(world: World, call: Call) -> Response:
    """An offer's SKUs."""
    del world
    names = {image.sku for image in catalog.IMAGES if _is(image, call, "publisher", "offer")}
    return _names(call, _known(names, "Artifact: VMImage", call.part["offer"]))


def list_image_versions(world: World, call: Call) -> Response:
    """An image's versions; supports `$top` and `$orderby=name desc`."""
    del world
    versions = sorted(_image(call).versions)
    if "desc" in call.query.get("$orderby", "").lower():
        versions.reverse()
    top = call.query.get("$top")
    return _names(call, versions[: int(top)] if top and top.isdigit() else versions)


def get_image_version(world: World, call: Call) -> Response:
    """One version of an image; as on Azure, `latest` is not a version here."""
    del world
    image, version = _image(call), call.part["version"]
    if version not in image.versions:
        raise _missing("Artifact: VMImage", version)
    document = {
        "location": _location(call),
        "name": version,
        "id": call.request.path,
        "properties": image.document(),
    }
    return Response.of(200, document)


def _image(call: Call) -> catalog.Image:
    image = catalog.image(call.part["publisher"], call.part["offer"], call.part["sku"])
    if image is None:
        raise _missing("Artifact: VMImage", call.part["sku"])
    return image


def _is(image: catalog.Image, call: Call, *fields: str) -> bool:
    return all(str(getattr(image, field)).lower() == call.part[field].lower() for field in fields)


def _known(names: set[str], kind: str, name: str) -> set[str]:
    if not names:
        raise _missing(kind, name)
    return names


def _missing(kind: str, name: str) -> ArmError:
    return ArmError(404, "NotFound", f"{kind}: {name} was not found.")


def _names(call: Call, names: set[str] | list[str]) -> Response:
    """A bare list, the format of the image API."""
    location = _location(call)
    ordered = names if isinstance(names, list) else sorted(names)
    base = call.request.path.rstrip("/")
    return Response.of(
        200, [{"location": location, "name": name, "id": f"{base}/{name}"} for name in ordered]
    )


def _location(call: Call) -> str:
    location = call.part["location"].replace(" ", "").lower()
    if location not in catalog.LOCATIONS:
        raise ArmError(
            400,
            "NoRegisteredProviderFound",
            f"No registered resource provider found for location '{location}' and API version "
            f"'{call.query.get('api-version')}'. The supported locations are "
            f"'{', '.join(catalog.LOCATIONS)}'.",
        )
    return location
