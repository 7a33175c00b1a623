"""Secrets that enough nodes together can restore, and envelopes in which their parts travel through the server.

Shamir 1979, "How to share a secret", over GF(2^128), from PyCryptodome; envelopes are ChaCha20-Poly1305 of `cryptography`.

A server restores one secret of every node, mostly from the same holders: what depends on these alone is computed once.
PyCryptodome's own `Shamir.combine` does it for every secret; its arithmetic is used here, which has no public name there.
"""

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from Crypto.Protocol import SecretSharing
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

_NONCE_BYTES = 12
_Element: Any = SecretSharing._Element  # of GF(2^128); its type stubs lack the product
SHARE_BYTES = 16
SEALED_BYTES = _NONCE_BYTES + 2 * SHARE_BYTES + 16
DIGEST_BYTES = 32


def split(secret: bytes, threshold: int, number: int) -> list[bytes]:
    """`number` shares of a secret of 16 bytes: any `threshold` of them restore it, fewer say nothing of it."""
    return [share for _, share in Shamir.split(threshold, number, secret, ssss=False)]


def restore(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret out of at least `threshold` shares by position, which counts from 0; out of wrong ones something else."""
    chosen = tuple(sorted(shares)[:threshold])
    secret = _Element(0)
    for position, factor in zip(chosen, _factors(chosen), strict=True):
        secret += factor * _Element(shares[position])
    return bytes(secret.encode())


@lru_cache(maxsize=64)  # of a large sum some 100 kB each; nodes that keep single shares back make other sets of holders
def _factors(positions: tuple[int, ...]) -> list[Any]:
    """Lagrange's basis polynomials at 0: a secret is the sum of its shares at these positions times these."""
    places = [_Element(position + 1) for position in positions]
    factors = []
    for i, place in enumerate(places):
        above, below = _Element(1), _Element(1)
        for other in places[:i] + places[i + 1 :]:
            above *= other
            below *= place + other
        factors.append(above * below.inverse())
    return factors


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
