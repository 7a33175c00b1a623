"""Input of the algorithms: weighted batches, and the three parts of a task."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

APPLIED_AT_ONCE = 2**19
"""Most numbers in the inputs of one task that go through a model at once: 668 images of 28 x 28. A user may have thousands."""


def in_one_piece(shape: Sequence[int]) -> int:
    """Return how many examples of this shape, all of one task, go through a model at once: one or more."""
    return max(1, APPLIED_AT_ONCE // max(1, math.prod(shape)))


class Batch(NamedTuple):
    """Examples with weights: 1 for a real example, 0 for padding.

    One task: `x` [n, ...] (floating point, or int64 token ids), `y` [n] (class indices) or [n,
    outputs] (regression), `weight` [n]. Stacked tasks add one leading axis to each. A NamedTuple,
    so that `torch.func.vmap` maps over it.
    """

    x: Tensor
    y: Tensor
    weight: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Batch":
        """Return a batch in which every example is real."""
        dtype = x.dtype if x.is_floating_point() else torch.float32
        return cls(x, y, torch.ones(len(x), dtype=dtype, device=x.device))

    def first(self, shots: int) -> "Batch":
        """Return one task's first `shots` examples of each class, in their order; for regression the first `shots` in all.

        0 takes every example; a class with fewer examples keeps them all. Classes 0 0 1 1 1 with
        two shots: 0 0 1 1.
        """
        if shots == 0:
            return self
        if self.y.dtype != torch.int64:
            return Batch(*(values[:shots] for values in self))
        same = self.y.unsqueeze(1) == self.y
        before = same.tril(-1).sum(dim=1)  # how many examples of the same class stand before each
        return Batch(*(values[before < shots] for values in self))

    def classes_alike(self) -> "Batch":
        """Return one task's examples weighted so that all present classes count equally: n / (classes * members).

        Classes 0 0 0 1 get the weights 2/3 2/3 2/3 2.
        """
        members = (self.y.unsqueeze(1) == self.y).sum(dim=1).to(self.weight.dtype)
        classes = (1 / members).sum()
        return self._replace(weight=len(self.y) / (classes * members))

    def pieces(self) -> list["Batch"]:
        """Return the examples of one task in even pieces, none larger than `in_one_piece` says."""
        n, most = self.x.shape[0], in_one_piece(self.x.shape[1:])
        if n <= most:
            return [self]
        size = -(-n // -(-n // most))
        return [Batch(*part) for part in zip(*(torch.split(values, size) for values in self), strict=True)]

    def times(self, steps: int) -> "Batch":
        """Return this batch repeated along a new leading axis of `steps`; nothing is copied."""
        return Batch(*(values.expand(steps, *values.shape) for values in self))

    def times_each(self, steps: int) -> "Batch":
        """Return the batches of many tasks, stacked, each repeated along a second axis of `steps`; nothing is copied."""
        return Batch(*(values[:, None].expand(-1, steps, *values.shape[1:]) for values in self))

    def unbind(self) -> Iterator["Batch"]:
        """Yield one batch for every entry of the leading axis."""
        return map(Batch, *(values.unbind() for values in self))


class Episode(NamedTuple):
    """One (support, query) draw from a task."""

    support: Batch
    query: Batch


@dataclass(frozen=True)
class TaskData:
    """The three parts of one draw from a task, disjoint unless the data set says otherwise.

    A device adapts on `support`. The meta-objective of a training task is measured on `query`. A
    held-out task is scored on `test` after adapting on its support.
    """

    support: Batch
    query: Batch
    test: Batch


class Draws(NamedTuple):
    """One batch per step, as row indices into shared examples.

    One task: `x` [examples, ...] and `y` [examples, ...] as in `Batch`; `rows` [steps, n] and
    `weight` [steps, n] (0: padding).
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    weight: Tensor

    def stacked(self) -> Batch:
        """Return the batches of all steps, with a leading axis of steps."""
        # One gather for all batches: a gather in every step costs a tenth of the inner loop.
        return Batch(self.x[self.rows], self.y[self.rows], self.weight)


class Minibatches(NamedTuple):
    """The examples of an episode that every inner step uses, as positions in support-then-query.

    `rows` [steps, batch] and `weight` [steps, batch] (0: padding). Both are empty for an algorithm
    without minibatches.
    """

    rows: Tensor
    weight: Tensor

    def of(self, episode: Episode, axis: int = 0) -> Draws:
        """Return the batches of all steps; `axis` is that of the examples, 1 for stacked tasks."""
        x, y = (torch.cat([getattr(episode.support, part), getattr(episode.query, part)], dim=axis) for part in ("x", "y"))
        return Draws(x, y, self.rows, self.weight)

    def batches(self, episode: Episode) -> Iterator[Batch]:
        """Yield one batch for every step."""
        return self.of(episode).stacked().unbind()
