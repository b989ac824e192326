"""SSH key pairs in their text forms: the worker's host key and our client key."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from ..errors import InvalidInput

if TYPE_CHECKING:
    import paramiko


def client_key() -> tuple[str, str]:
    """A fresh key pair to sign in with: private PEM, public OpenSSH line. RSA, because every SSH server accepts it."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    return _plain(key), public_line(key.public_key())


def encrypted(private: str, password: str) -> str:
    """A private key from `client_key` as a PEM encrypted with `password`."""
    key = serialization.load_pem_private_key(private.encode(), None)
    encryption = serialization.BestAvailableEncryption(password.encode())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    ).decode()


def decrypted(private: str, password: str) -> str:
    """The private key that `encrypted` was given. ValueError or TypeError if the password is wrong."""
    return _plain(serialization.load_pem_private_key(private.encode(), password.encode()))


def _plain(key: PrivateKeyTypes) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    ).decode()


def host_key() -> tuple[str, str]:
    """A fresh host key pair for the worker: private OpenSSH PEM, public OpenSSH line."""
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private.decode(), public_line(key.public_key())


def private_key(text: str) -> paramiko.PKey:
    """The key in a PEM text, of any type. InvalidInput if it cannot be read."""
    import paramiko  # takes a while to import: not for callers that only make keys

    for kind in (paramiko.RSAKey, paramiko.Ed25519Key, paramiko.ECDSAKey):
        try:
            return kind.from_private_key(io.StringIO(text))
        except (paramiko.SSHException, ValueError):
            continue
    raise InvalidInput("the private key for the target cannot be read", remedy="Give it as PEM, unencrypted.")


def public_line(key: rsa.RSAPublicKey | ed25519.Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
