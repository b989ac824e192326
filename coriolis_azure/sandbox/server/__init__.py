"""The sandbox as a server: HTTPS, certificates, the in-process transport, and access from other processes."""
