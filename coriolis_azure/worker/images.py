"""Chooses the image that the worker boots."""

from __future__ import annotations

from ..azure.client import Azure
from ..errors import InvalidInput
from ..events import Notice, Report
from ..model import at
from ..settings import Environment, Image

IMAGES = (
    Image("Canonical", "ubuntu-24_04-lts", "server"),
    Image("Canonical", "0001-com-ubuntu-server-jammy", "22_04-lts-gen2"),
    Image("Debian", "debian-12", "12-gen2"),
    Image("Debian", "debian-13", "13-gen2"),
)


def choose_image(
    azure: Azure, environment: Environment, report: Report, without: frozenset[Image] = frozenset()
) -> Image:
    """The image of the settings if it exists and has no terms, else the first of `IMAGES` that exists.

    Images of `without`, which Azure has rejected, are skipped. Raises InvalidInput if none is left.
    """
    configured = environment.export_worker_image
    obstacle = ""
    if configured and configured not in without:
        document = azure.image(environment.location, configured)
        if document is not None and not at(document, "properties.plan"):
            return configured
        # Accepting the terms would mean buying the plan on the user's behalf.
        obstacle = "has terms to accept (a plan)" if document else "does not exist"
    for image in IMAGES:
        if image not in without and azure.image(environment.location, image) is not None:
            if obstacle:
                report(
                    Notice(
                        f"export_worker_image {configured} {obstacle} in {environment.location}: "
                        f"using {image} instead"
                    )
                )
            return image
    raise InvalidInput(
        f"none of the images that are known to work exists in {environment.location}",
        remedy="Set export_worker_image to a Linux image with cloud-init, Python 3 and sudo.",
    )


def images(azure: Azure, location: str) -> list[Image]:
    """Those of `IMAGES` that exist in `location`."""
    return [image for image in IMAGES if azure.image(location, image) is not None]
