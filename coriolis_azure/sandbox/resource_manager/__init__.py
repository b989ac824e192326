"""Azure's resource manager: routing of requests, resource groups, locks, lists, policies."""
