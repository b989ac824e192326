"""What processes of the tests are forked from: everything imported, and keys made."""

import coriolis_azure.cli.entry
import coriolis_azure.plugin.provider
import coriolis_azure.source
from harness import battles, keys

__all__ = ["battles", "coriolis_azure"]

keys.take_turns()
keys.make()
