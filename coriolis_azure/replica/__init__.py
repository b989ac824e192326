"""Where chunks go: manifests and digests, images, devices, VHD blobs, the state beside them, and verifying them.

The rules that keep a replica right live here. Where chunks come from is not known here."""
