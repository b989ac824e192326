"""Authentication and authorization: the token endpoint and the identity's permissions."""
