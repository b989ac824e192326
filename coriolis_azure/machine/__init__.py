"""The VM that is taken out of Azure: its description, what cannot be moved, and copies of its disks.

The worker is not a subject of this folder."""
