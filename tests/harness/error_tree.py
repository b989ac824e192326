"""All classes of errors."""

from __future__ import annotations

from coriolis_azure import errors


def tree(root: type[errors.CoriolisAzureError]) -> list[type[errors.CoriolisAzureError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in tree(child))]
