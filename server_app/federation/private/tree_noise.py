"""Noise of DP-FTRL: prefix sums of the rounds are private, by a binary tree over them, and no sampling is claimed.

Kairouz, McMahan, Song, Thakkar, Thakurta, Xu 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling"
(Algorithm 1, with tree restarts), with the estimate from below of Honaker 2015, "Efficient Use of Differentially Private
Binary Trees". The leaves of a tree are rounds, 1, 2, .. s; a node above is two nodes of the level below. Every node that is
full has noise x ~ N(0, (z C)^2) of its own. Its estimate joins it with those of its children, by their variances:

    e(leaf) = x,    e(node) = w x + (1 - w) (e(left) + e(right)),    w = 2 v / (1 + 2 v)
    v(leaf) = 1,    v(node) = 2 v / (1 + 2 v)                        v: variance of an estimate below, in units of (z C)^2
    N(s) = sum of e over the full nodes that s falls into in binary: 13 = 8 + 4 + 1

The sum of the meta-gradients of s rounds is released with noise N(s), so round s gets N(s) - N(s - 1): what an outer optimizer
makes of the rounds is then a function of the prefix sums.

A task has a slot among the E rounds of an epoch, by its own name, and takes part in that round of every epoch. A tree that
would get a slot twice is given up for a new one. So a task is in one leaf of a tree, and moves the nodes above it, of which
s.bit_length() are full at most, by C each. Gaussian mechanisms compose exactly, adaptively too (Dong, Roth, Su 2022,
Corollary 3.3; for trees Denisov, McMahan, Rush, Smith, Thakurta 2022): L levels in all are one mechanism of noise
multiplier z / sqrt(L), that is L / (2 z^2) of zero-concentrated privacy.
"""

import hashlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Tree:
    """Correlated noise of one tensor, leaf by leaf, in units of the deviation of a node's.

    `draw` returns standard normal numbers, every time new ones of the same shape.
    """

    def __init__(self, draw: Callable[[], Array]) -> None:
        self._draw = draw
        self._full: list[tuple[float, Array]] = []  # (variance, estimate) of the nodes of N, the largest first
        self._leaves = 0
        self._before: Array | float = 0.0

    def leaf(self) -> Array:
        """Return N(s) - N(s - 1) for the next leaf s, from 1."""
        self._leaves += 1
        variance, estimate = 1.0, self._draw()
        # As many nodes are full by this leaf, one above the other, as s can be halved.
        for _ in range(_halvings(self._leaves)):
            _, left = self._full.pop()
            weight = 2 * variance / (1 + 2 * variance)
            estimate = weight * self._draw() + (1 - weight) * (left + estimate)
            variance = weight
        self._full.append((variance, estimate))
        total: Array = sum((each for _, each in self._full), np.zeros_like(estimate))
        added = total - self._before
        self._before = total
        return added


class Epochs:
    """Whose turn it is in a round, and the trees over the rounds. `length`: rounds in an epoch, E.

    `levels`: the sum over all trees so far of the full nodes that a task may be in, including those of earlier processes,
    whose trees are given up: their noise is written nowhere.
    """

    def __init__(self, seed: int, length: int, levels: int = 0) -> None:
        self.length = length
        self.levels = levels
        self._seed = seed
        self._slots: set[int] = set()
        self._trees: dict[str, Tree] = {}

    def turn(self, task_id: str, server_round: int) -> bool:
        """Return whether a task takes part in a round: once in any `length` rounds that follow each other."""
        return slot_of(self._seed, task_id, self.length) == self._slot(server_round)

    def begin(self, server_round: int) -> int:
        """Add a leaf for this round, to a new tree if the tasks of the round are in this one. Returns the levels it costs."""
        slot = self._slot(server_round)
        if slot in self._slots:
            self._slots, self._trees = set(), {}
        costs = _levels(len(self._slots) + 1) - _levels(len(self._slots))
        self._slots.add(slot)
        self.levels += costs
        return costs

    def noise(self, name: str, draw: Callable[[], Array]) -> Array:
        """Return the noise of this round for one tensor, in units of the deviation of a node's; once a round for each."""
        return self._trees.setdefault(name, Tree(draw)).leaf()

    def levels_after(self, more: int) -> int:
        """Return `levels` after so many more rounds."""
        leaves = len(self._slots)
        here = min(more, self.length - leaves)
        trees, rest = divmod(more - here, self.length)
        return self.levels + _levels(leaves + here) - _levels(leaves) + trees * _levels(self.length) + _levels(rest)

    def _slot(self, server_round: int) -> int:
        return (server_round - 1) % self.length


def slot_of(seed: int, task_id: str, length: int) -> int:
    """Return the slot of a task, from 0: a keyed hash of its name, so that another task changes nobody's."""
    key = hashlib.blake2b(str(seed).encode(), digest_size=32, person=b"quickbloom slot").digest()
    digest = hashlib.blake2b(task_id.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "big") % length


@cache
def epsilon(noise_multiplier: float, levels: int, delta: float, centre: float = 0.0) -> float:
    """Return epsilon of so many levels, exactly (Balle, Wang 2018, Theorem 8). `centre`: as in `privacy.epsilon`."""
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    squared = levels / noise_multiplier**2 + (centre**-2 if centre else 0.0)
    with np.errstate(divide="ignore"):  # of differences that are 0 with very much noise
        return float(get_epsilon_gaussian(1 / math.sqrt(squared), delta)) if squared else 0.0


def _levels(leaves: int) -> int:
    """Return how many full nodes of a tree a leaf may be in."""
    return leaves.bit_length()


def _halvings(number: int) -> int:
    """Return how often 2 divides a number above 0."""
    return (number & -number).bit_length() - 1
