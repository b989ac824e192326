"""Which image the worker boots."""

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
    """The image of the settings where it exists and has no terms, else the first of `IMAGES` that does.

    None of `without`, images that Azure did not take. InvalidInput when there is none.
    """
    asked = environment.export_worker_image
    why = ""
    if asked and asked not in without:
        found = azure.image(environment.location, asked)
        if found is not None and not at(found, "properties.plan"):
            return asked
        # We could buy it only in the name of its user.
        why = "has terms of its own (a plan)" if found else "does not exist"
    for image in IMAGES:
        if image not in without and azure.image(environment.location, image) is not None:
            if why:
                report(
                    Notice(
                        f"export_worker_image {asked} {why} in {environment.location} today: using {image} instead"
                    )
                )
            return image
    raise InvalidInput(
        f"none of the images that are known to work exists in {environment.location}",
        remedy="Set export_worker_image to a Linux image with cloud-init, Python 3 and sudo.",
    )


def images(azure: Azure, location: str) -> list[Image]:
    """The images of our list that exist in `location` today."""
    return [image for image in IMAGES if azure.image(location, image) is not None]
