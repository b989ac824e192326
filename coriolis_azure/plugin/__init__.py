"""The orchestrator's side: provider, base classes, configuration, catalogs, volumes, the writers' protocols.

The only place that knows the orchestrator."""
