"""Random generators derived from a seed and a purpose; there is no global state.

Every draw in a federation derives from (seed, purpose, round, task). The outcome therefore depends neither on
the order of work nor on which node holds a task.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISpawnableSeedSequence


def generator(seed: int, *parts: str | int) -> np.random.Generator:
    """Return a NumPy generator that is a pure function of `seed` and `parts`, equal on every machine.

    Example: `generator(7, "episode", round_number, task_id)`.
    """
    text = "\x1f".join(map(str, (seed, *parts)))
    # NumPy accepts any ISeedSequence, although its type stubs do not say so.
    return np.random.Generator(np.random.PCG64(_Digest(_digest(text.encode()))))  # type: ignore[arg-type]


class _Digest(ISpawnableSeedSequence):
    """The 256 bits that seed PCG64. A cryptographic digest needs none of the mixing that `SeedSequence` does.

    That mixing would cost more than everything else here, and a round makes a generator for each of its many
    small tasks.
    """

    def __init__(self, digest: bytes) -> None:
        self._digest = digest
        self._spawned = 0

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray[Any, Any]:
        words = np.frombuffer(self._digest, dtype="<u8").astype(np.uint64, copy=False)
        if n_words != len(words) or np.dtype(dtype) != np.uint64:
            raise NotImplementedError(f"{n_words} words of {np.dtype(dtype)}: PCG64 takes four of 64 bits")
        return words

    def spawn(self, n_children: int) -> "list[_Digest]":
        first, self._spawned = self._spawned, self._spawned + n_children
        return [_Digest(_digest(self._digest + b"\x1e%d" % child)) for child in range(first, self._spawned)]


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=32).digest()
