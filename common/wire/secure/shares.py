"""Secret sharing among nodes, and sealed envelopes in which shares travel through the server.

Shamir 1979, "How to share a secret", over GF(2^128), from PyCryptodome; envelopes are
ChaCha20-Poly1305 of `cryptography`.

A server restores one secret per node, mostly from the same holders, so the factors that depend only
on the holders are computed once. PyCryptodome's `Shamir.combine` computes them for every secret;
its arithmetic, which has no public name, is used instead.
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
    """Return `number` shares of a secret of 16 bytes: any `threshold` of them restore it, fewer reveal nothing."""
    return [share for _, share in Shamir.split(threshold, number, secret, ssss=False)]


def restore(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret from at least `threshold` shares by position from 0. Wrong shares give a wrong secret, not an error."""
    chosen = tuple(sorted(shares)[:threshold])
    secret = _Element(0)
    for position, factor in zip(chosen, _factors(chosen), strict=True):
        secret += factor * _Element(shares[position])
    return bytes(secret.encode())


@lru_cache(maxsize=64)  # some 100 kB each in a large sum; a node that withholds single shares makes new sets of holders
def _factors(positions: tuple[int, ...]) -> list[Any]:
    """Return Lagrange's basis polynomials at 0: a secret is the sum of its shares at these positions times these."""
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
    """Return `text` encrypted so that only `key` opens it, and only with the same `context`."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """Return the sealed text; None if it was changed or sealed with another key or context."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError):
        return None


def digest(secret: bytes, *context: bytes) -> bytes:
    """Return a digest by which a secret or share can be recognised. It reveals nothing else, since both are uniform."""
    text = b"".join(len(part).to_bytes(4, "big") + part for part in (*context, secret))
    return hashlib.sha256(text).digest()
