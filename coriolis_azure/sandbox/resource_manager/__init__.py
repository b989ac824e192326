"""Azure's resource manager: which function answers which path, resource groups, locks, lists, policies."""
