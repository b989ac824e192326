"""Everything that talks to Azure, and the only place with Azure's SDKs.

Clients, sign-in, transport, translated errors and their codes, documents, names and tags, permissions, blobs.
What a run makes and deletes is `run`'s business."""
