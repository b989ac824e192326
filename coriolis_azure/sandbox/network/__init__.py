"""Microsoft.Network: virtual networks, interfaces, addresses, security groups."""
