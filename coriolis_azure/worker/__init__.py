"""The worker, the temporary VM that reads clones: its size, image, network, user data, attached clones, and pools.

What runs on it is `agent`; what is read from it, `readers`."""
