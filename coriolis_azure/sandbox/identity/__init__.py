"""Who asks, and what they may do: the token endpoint and the permissions of the identity."""
