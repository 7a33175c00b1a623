"""Encodes many examples once: what is stored is found, the rest is computed in batches, with progress."""

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quickbloom.common.encoders.base import Encoder, Features
from quickbloom.common.encoders.cache import Cache
from quickbloom.common.errors import DataError, as_told, in_one_line
from quickbloom.common.formatting import counted

_LOG = getLogger("flwr")
_BETWEEN = 10.0
"""Seconds between two lines of progress."""
_STORED_AT_ONCE = 1024
"""Examples after which features are stored, so that an interrupted start loses no more."""


class Examples(ABC):
    """Examples to encode. `what`: one of them in words, for messages."""

    what = "example"

    @abstractmethod
    def __len__(self) -> int:
        """Return their number."""

    @abstractmethod
    def key(self, at: int) -> bytes:
        """Return a hash of one of them: 16 bytes."""

    @abstractmethod
    def get(self, at: int) -> Any:
        """Return one of them as the encoder reads it. Raises DataError if it cannot be read."""

    def length(self, at: int) -> int:
        """Return a number by which similar ones are encoded together."""
        return 0

    def place(self, at: int) -> str:
        """Return where one of them stands, for a message."""
        return str(at + 1)


class Texts(Examples):
    """Texts, each of which is stored once."""

    what = "text"

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def key(self, at: int) -> bytes:
        return hash_of(self._texts[at].encode())

    def get(self, at: int) -> str:
        return self._texts[at]

    def length(self, at: int) -> int:
        return len(self._texts[at])

    def place(self, at: int) -> str:
        return f"'{as_told(self._texts[at], 60)}'"


class Rows(Examples):
    """Rows of numbers [n, columns]."""

    what = "row"

    def __init__(self, numbers: NDArray[np.float32], places: Sequence[int]) -> None:
        """`places`: where each stands, for a message."""
        self._numbers, self._places = numbers, places

    def __len__(self) -> int:
        return len(self._numbers)

    def key(self, at: int) -> bytes:
        return hash_of(self._numbers[at].tobytes())

    def place(self, at: int) -> str:
        return str(self._places[at])

    def get(self, at: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._numbers[at]
        return found


def hash_of(content: bytes) -> bytes:
    """Return the key of an example with this content."""
    return hashlib.blake2b(content, digest_size=16).digest()


def encode_all(encoder: Encoder, examples: Examples, folder: Path | None = None) -> Features:
    """Return the features [n, size] of all examples, each computed once on this machine.

    `folder`: where features are stored, instead of in the user's cache. Raises DataError for an example that the encoder
    cannot encode, or whose features are not finite.
    """
    keys = [examples.key(at) for at in range(len(examples))]
    try:
        cache = Cache(encoder.stored_as, encoder.size, folder)
    except OSError as error:
        _LOG.log(WARNING, "Features are not stored (%s): every start computes them again.", in_one_line(error))
        return _together(keys, _computed(encoder, examples, _first_places(keys, {}), None), encoder.size)
    found = cache.find(list(dict.fromkeys(keys)))
    if len(found) < len(set(keys)):
        with cache.alone():  # another process may have computed them meanwhile
            found = cache.find(list(dict.fromkeys(keys)))
            found |= _computed(encoder, examples, _first_places(keys, found), cache)
    return _together(keys, found, encoder.size)


def _together(keys: Sequence[bytes], found: dict[bytes, Features], size: int) -> Features:
    return np.stack([found[key] for key in keys]) if keys else np.zeros((0, size), dtype=np.float32)


def _first_places(keys: Sequence[bytes], found: dict[bytes, Features]) -> dict[bytes, int]:
    """Return the first place of every example that is not known yet."""
    places: dict[bytes, int] = {}
    for at, key in enumerate(keys):
        if key not in found:
            places.setdefault(key, at)
    return places


def _computed(encoder: Encoder, examples: Examples, places: dict[bytes, int], cache: Cache | None) -> dict[bytes, Features]:
    """Return the features of the examples at these places. They are stored as they are computed."""
    order = sorted(places, key=lambda key: examples.length(places[key]))
    found: dict[bytes, Features] = {}
    fresh: dict[bytes, Features] = {}
    told = started = time.monotonic()
    at, size = 0, encoder.at_once
    while at < len(order):
        some = order[at : at + size]
        values, size = _batch(encoder, examples, [places[key] for key in some], size)
        some = some[: len(values)]
        fresh |= dict(zip(some, values, strict=True))
        at += len(some)
        if len(fresh) >= _STORED_AT_ONCE or at >= len(order):
            if cache:
                cache.store(fresh)
            found, fresh = found | fresh, {}
        if time.monotonic() - told > _BETWEEN:
            told = time.monotonic()
            left = (told - started) / at * (len(order) - at)
            _LOG.log(INFO, "Encoded %s of %s, about %.0f s to go", at, counted(len(order), examples.what), left)
    return found


def _batch(encoder: Encoder, examples: Examples, at: Sequence[int], size: int) -> tuple[Features, int]:
    """Return (features of the first of these examples, how many to encode at once from now on). Raises DataError."""
    while True:
        some = [examples.get(one) for one in at[:size]]
        try:
            values = encoder.encode(some)
        except Exception as error:  # the encoder's library may raise anything
            if size > 1:  # of less memory, or else to name the example that is to blame
                size //= 2
                continue
            place = examples.place(at[0])
            mend = "it needs more memory than there is" if _is_memory(error) else "mend it, or choose another encoder"
            raise DataError(
                f"the encoder cannot encode the {examples.what} {place} ({in_one_line(error)}): {mend}",
                place,
                in_one_line(error),
            ) from error
        values = np.asarray(values, dtype=np.float32)
        if values.shape != (len(some), encoder.size):
            raise DataError(f"the encoder must give features {(len(some), encoder.size)}, got the shape {values.shape}")
        if not (fine := np.isfinite(values).all(axis=1)).all():
            place = examples.place(at[int(np.flatnonzero(~fine)[0])])
            raise DataError(
                f"the encoder gives features that are not finite for the {examples.what} {place}: leave it out, or choose "
                "another encoder",
                place,
            )
        return values, size


def _is_memory(error: BaseException) -> bool:
    text = str(error).casefold()
    return isinstance(error, MemoryError) or "allocate" in text or "out of memory" in text or "bad_alloc" in text
