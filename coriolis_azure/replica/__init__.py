"""Where chunks go: manifests and digests, media (images, devices, VHD blobs), the state beside them, verification.

The rules that keep a replica right live here. This folder does not know where chunks come from.
"""
