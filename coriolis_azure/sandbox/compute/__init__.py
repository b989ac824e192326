"""Microsoft.Compute: virtual machines, disks, snapshots, sizes and images."""
