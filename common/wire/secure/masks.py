"""Masks that cancel in a sum, and the integers that they hide.

Numbers become integers mod 2^64, because adding a uniform integer gives a uniform result, whatever
the number. The primitives are from the package `cryptography`: X25519 for secrets shared by two
nodes, HKDF-SHA256 for keys with one purpose each, and ChaCha20 for long masks.
"""

from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Integers = np.ndarray[Any, np.dtype[np.uint64]]

KEY_BYTES = 32
SEED_BYTES = 16
FRACTION_BITS = 30
"""Binary digits after the point; rounding costs a sum over n nodes at most n * 2^-31."""
LARGEST = 2.0**20
"""Bound on the absolute value of a node's weighted numbers; larger ones are clipped."""
MOST_NODES = 2**12
"""Most nodes of one sum: this many times `LARGEST` does not overflow."""


def to_integers(values: np.ndarray[Any, Any]) -> Integers:
    """Return a node's numbers as fixed-point integers mod 2^64, clipped to +-`LARGEST`. Raises ValueError for NaN."""
    if np.isnan(values).any():
        raise ValueError("NaN is no number that can be summed")
    clipped = np.clip(values.astype(np.float64), -LARGEST, LARGEST)
    whole: Integers = np.rint(clipped * 2.0**FRACTION_BITS).astype(np.int64).view(np.uint64)
    return whole


def to_numbers(total: Integers) -> np.ndarray[Any, Any]:
    """Return a sum over at most `MOST_NODES` nodes as float64."""
    return total.view(np.int64).astype(np.float64) * 2.0**-FRACTION_BITS


def derive(secret: bytes, *purpose: bytes) -> bytes:
    """Return a key of 32 bytes for this purpose only."""
    # Every part is preceded by its length, so that different purposes never give the same bytes.
    info = b"".join(len(part).to_bytes(4, "big") + part for part in (b"quickbloom secure aggregation", *purpose))
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def private_key(seed: bytes) -> X25519PrivateKey:
    """Return the key pair derived from a seed. Nodes share the seed, which is short, in place of the key."""
    return X25519PrivateKey.from_private_bytes(derive(seed, b"key pair"))


def public_bytes(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def agreed(own: X25519PrivateKey, other: bytes) -> bytes:
    """Return the secret that only two nodes can compute. Raises ValueError for bytes that are not a public key."""
    return own.exchange(X25519PublicKey.from_public_bytes(other))


def stream(key: bytes, length: int) -> Integers:
    """Return `length` uniform integers mod 2^64 from a key that is used for nothing else."""
    cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(8 * length)), dtype="<u8").astype(np.uint64, copy=False)


def self_mask(seed: bytes, session: bytes, length: int) -> Integers:
    """Return a node's own mask, which is removed with its seed."""
    return stream(derive(seed, b"self mask", session), length)


def pair_mask(own: X25519PrivateKey, other: bytes, session: bytes, length: int) -> Integers:
    """Return the mask that `own` adds because of `other`; the two masks of a pair add up to 0."""
    mine = public_bytes(own)
    mask = stream(derive(agreed(own, other), b"pair mask", session, *sorted((mine, other))), length)
    return mask if mine < other else np.negative(mask)
