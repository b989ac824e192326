"""Linux VMs of the sandbox, each a process of this machine with an SSH server."""
