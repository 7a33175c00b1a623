"""What the maths eats: weighted batches, and the three parts of a task."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Examples with weights: 1 for a real example, 0 for padding.

    One task: `x` [n, ...] (floating point, or int64 token ids), `y` [n] (class indices) or [n, outputs] (regression),
    `weight` [n].
    Stacked tasks carry one more leading axis each. A NamedTuple, so `torch.func.vmap` maps over it.
    """

    x: Tensor
    y: Tensor
    weight: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Batch":
        """A batch in which every example is real."""
        dtype = x.dtype if x.is_floating_point() else torch.float32
        return cls(x, y, torch.ones(len(x), dtype=dtype, device=x.device))

    def first(self, shots: int) -> "Batch":
        """One task's first `shots` examples of each class, in their order; for regression the first `shots` in all.

        0 takes every example; a class that has fewer keeps what it has. Classes 0 0 1 1 1 with two shots: 0 0 1 1.
        """
        if shots == 0:
            return self
        if self.y.dtype != torch.int64:
            return Batch(*(values[:shots] for values in self))
        same = self.y.unsqueeze(1) == self.y
        before = same.tril(-1).sum(dim=1)  # how many examples of the same class stand before each
        return Batch(*(values[before < shots] for values in self))

    def classes_alike(self) -> "Batch":
        """One task's examples with weights by which every class that is there counts alike: n / (classes * members).

        Classes 0 0 0 1: 2/3 2/3 2/3 2.
        """
        members = (self.y.unsqueeze(1) == self.y).sum(dim=1).to(self.weight.dtype)
        classes = (1 / members).sum()
        return self._replace(weight=len(self.y) / (classes * members))

    def times(self, steps: int) -> "Batch":
        """The same batch for every one of `steps` steps, with a leading axis of steps; nothing is copied."""
        return Batch(*(values.expand(steps, *values.shape) for values in self))

    def unbind(self) -> Iterator["Batch"]:
        """One batch for every entry of the leading axis."""
        return map(Batch, *(values.unbind() for values in self))


class Episode(NamedTuple):
    """One (support, query) draw from a task."""

    support: Batch
    query: Batch


@dataclass(frozen=True)
class TaskData:
    """The three parts of one draw from a task; no example is in two of them unless the data set says so.

    `support` is what a device adapts on, `query` is what the meta-objective of a training task is measured on, `test` is what
    a held-out task is scored on after adapting on its support.
    """

    support: Batch
    query: Batch
    test: Batch


class Draws(NamedTuple):
    """A batch for every one of some steps, as rows of the same examples.

    One task: `x` [examples, ...] and `y` [examples, ...] as in `Batch`; `rows` [steps, n] and `weight` [steps, n] (0: padding).
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    weight: Tensor

    def stacked(self) -> Batch:
        """The batches of all steps, with a leading axis of steps."""
        # All batches in one gather: a gather in every step costs a tenth of the inner loop.
        return Batch(self.x[self.rows], self.y[self.rows], self.weight)


class Minibatches(NamedTuple):
    """Which examples of an episode every inner step uses: positions in support-then-query.

    `rows` [steps, batch] and `weight` [steps, batch] (0: padding). Both are empty for an algorithm without minibatches.
    """

    rows: Tensor
    weight: Tensor

    def of(self, episode: Episode, axis: int = 0) -> Draws:
        """The batches of all steps; `axis`: that of the examples, 1 for stacked tasks."""
        x, y = (torch.cat([getattr(episode.support, part), getattr(episode.query, part)], dim=axis) for part in ("x", "y"))
        return Draws(x, y, self.rows, self.weight)

    def batches(self, episode: Episode) -> Iterator[Batch]:
        """One batch for every step."""
        return self.of(episode).stacked().unbind()
