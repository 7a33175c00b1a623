"""Randomness from what it is for, never from a global state.

Every random draw in a federation comes from (seed, purpose, round, task). So the outcome depends neither on the order of
the work nor on which node a task lives on.
"""

import hashlib

import numpy as np


def generator(seed: int, *parts: str | int) -> np.random.Generator:
    """A NumPy generator that is a pure function of `seed` and `parts`, the same on every machine.

    Example: `generator(7, "episode", round_number, task_id)`.
    """
    text = "\x1f".join(str(part) for part in (seed, *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    # What `default_rng` makes, without its looking at what it was given: a round of many small tasks makes one for each.
    return np.random.Generator(np.random.PCG64(np.frombuffer(digest, dtype=np.uint32)))
