"""The orchestrator's side: provider, base classes, configuration, catalogs, volumes, the writers' protocols.

Nothing outside this folder knows the orchestrator.
"""
