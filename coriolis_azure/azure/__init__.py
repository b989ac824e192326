"""Everything that talks to Azure; the only package that imports Azure's SDKs.

Clients, sign-in, transport, error translation and error codes, documents, names and tags, permissions, blobs.
Creating and deleting the resources of a run is the job of `run`."""
