"""Microsoft.Storage: accounts and their blob endpoint, VHDs."""
