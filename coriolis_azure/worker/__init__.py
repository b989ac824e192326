"""The worker, the temporary VM that reads clones: its size, image, network, cloud-init, attached clones, and pools.

The program that runs on it is `agent`; reading from it is the job of `readers`."""
