"""Secrets that enough nodes together can restore, and envelopes in which their parts travel through the server.

Shamir 1979, "How to share a secret", over GF(2^128), from PyCryptodome; envelopes are ChaCha20-Poly1305 of `cryptography`.
"""

import hashlib
import os
from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

_NONCE_BYTES = 12
SHARE_BYTES = 16
SEALED_BYTES = _NONCE_BYTES + 2 * SHARE_BYTES + 16
DIGEST_BYTES = 32


def split(secret: bytes, threshold: int, number: int) -> list[bytes]:
    """`number` shares of a secret of 16 bytes: any `threshold` of them restore it, fewer say nothing of it."""
    return [share for _, share in Shamir.split(threshold, number, secret, ssss=False)]


def restore(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret out of at least `threshold` shares by position, which counts from 0; out of wrong ones something else."""
    chosen = sorted(shares)[:threshold]
    return bytes(Shamir.combine([(position + 1, shares[position]) for position in chosen], ssss=False))


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """`text` in an envelope that only `key` opens, and only as part of the same `context`."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """What was sealed; None if it was not, or was changed."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError):
        return None


def digest(secret: bytes, *context: bytes) -> bytes:
    """What tells later whether a secret or a share is the one that was meant, and nothing else of it: both are uniform."""
    text = b"".join(len(part).to_bytes(4, "big") + part for part in (*context, secret))
    return hashlib.sha256(text).digest()
