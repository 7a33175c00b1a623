"""FedALA (Zhang, Hua, Wang, Song, Xue, Ma, Guan 2023, "FedALA: Adaptive Local Aggregation for Personalized Federated Learning",
Algorithm 1).

Before a task trains, the higher layers of its own last model phi and of the server's theta are mixed, number by number
with weights W in [0, 1] that it has learned by gradient steps on its own examples:

    start = phi + (theta - phi) * W,   W <- W - eta grad_W L(start)

The lower layers are the server's. From there it takes k steps. The higher layers of phi and W stay on the node; g = theta -
phi_k, weighted by the number of examples. W is 1 at first, which is the server's model.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import AveragedOptions, KeepsState, inner_steps, shuffled_epochs
from quickbloom.common.maths.batch import Batch, Draws, Episode, Minibatches
from quickbloom.common.maths.fast_paths import end_of_descent, loss_of
from quickbloom.common.maths.inner_loop import descend
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params, subtract
from quickbloom.common.options import Text

LOCAL, WEIGHT = "local/", "weight/"
"""Prefixes of the names of what a task keeps: its higher layers after its last steps, and W."""


class FedAlaOptions(AveragedOptions):
    higher: Text = Field(
        "auto", description='comma-separated name prefixes of the higher layers, which are mixed; "auto": the last layer'
    )
    mixing_steps: int = Field(5, ge=0, le=10_000, description="steps of the mixing weights, before those of the model")
    mixing_lr: float = Field(1.0, gt=0, description="learning rate of the mixing weights (eta)")


class FedAla(KeepsState):
    """g = theta - phi_k after k steps from a learned mixture; mixing weights and own higher layers are kept on the node."""

    name = "fedala"
    Options: ClassVar[type[AlgorithmOptions]] = FedAlaOptions
    starts_from_meta = False

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._higher = learner.head("fedala.higher", options.higher)

    def fresh(self) -> Params:
        model = self.learner.initial()
        ones = {WEIGHT + name: torch.ones_like(model[name]) for name in self._higher}
        return {LOCAL + name: model[name] for name in self._higher} | ones

    def weight(self, num_examples: int) -> float:
        return float(num_examples)

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        steps = self.options.mixing_steps + inner_steps(self.options, num_examples)
        return shuffled_epochs(num_examples, steps, self.options.batch_size, rng)

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        first, draws = self.options.mixing_steps, minibatches.of(episode)
        for_mixing = Draws(draws.x, draws.y, draws.rows[:first], draws.weight[:first])
        kept = self._learned(meta, kept, for_mixing.stacked().unbind())
        rest = Draws(draws.x, draws.y, draws.rows[first:], draws.weight[first:])
        phi = end_of_descent(self.learner, self._mixed(meta, kept), rest, self.options.inner_lr)
        kept = kept | {LOCAL + name: phi[name] for name in self._higher}
        # The query examples were trained on as well, so this is a training loss.
        return subtract(meta, phi), loss_of(self.learner, phi, episode.query), kept

    def _learned(self, meta: Params, kept: Params, batches: Iterator[Batch]) -> Params:
        """Return `kept` with the mixing weights after one step on each batch."""

        def loss(weights: Params, batch: Batch) -> Tensor:
            return self.learner.loss(self._mixed(meta, {**kept, **weights}), batch)

        weights = {name: value for name, value in kept.items() if name.startswith(WEIGHT)}
        for batch in batches:
            slope = grad(loss)(weights, batch)
            weights = {name: (value - self.options.mixing_lr * slope[name]).clamp(0, 1) for name, value in weights.items()}
        return {**kept, **weights}

    def _mixed(self, meta: Params, kept: Params) -> Params:
        local, weight = ({name: kept[part + name] for name in self._higher} for part in (LOCAL, WEIGHT))
        return {**meta, **{name: local[name] + (meta[name] - local[name]) * weight[name] for name in self._higher}}

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the steps of a model that starts as the mixture by the weights in `kept`."""
        return descend(self.learner.mean_loss, self._mixed(meta, kept), iter([support] * steps), lr)
