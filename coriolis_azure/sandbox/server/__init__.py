"""The front: HTTPS, certificates, and how other processes of this machine talk to the sandbox."""
