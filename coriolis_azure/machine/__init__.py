"""The VM to be moved out of Azure: its description, whether it can be moved, and the cloning of its disks.

The worker VM does not belong here."""
