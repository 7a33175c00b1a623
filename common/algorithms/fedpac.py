"""FedPAC's feature alignment (Xu, Tong, Huang 2023, "Personalized Federated Learning with Feature Alignment and Classifier
Collaboration", Algorithm 1 without the combination of classifiers).

The body travels, the head stays on the node. A task first takes `head-steps` steps with the head alone, then k with the body
alone on L + lambda R, where R is the mean squared distance of its examples' features, the inputs of the head, to the mean
of their class over all tasks. These means travel beside the body: a task tells sums and counts of its features. g = (body of
theta - phi_k, sums, counts); bodies weigh by the number of examples.

The paper's server also combines the heads of the tasks, for each task by a quadratic program over all of their statistics. That
needs every head by itself, where this server sees one mean: here each task keeps its own head.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions, ServerStep
from quickbloom.common.algorithms.local_sgd import AveragedOptions, KeepsState, inner_steps, shuffled_epochs
from quickbloom.common.maths import class_means
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.class_means import KNOWN, MEANS
from quickbloom.common.maths.inner_loop import Loss, built_on, descend, endpoint
from quickbloom.common.maths.learner import Learner, cross_entropy, mean_over_examples
from quickbloom.common.maths.linear_head import LinearHead
from quickbloom.common.maths.params import Params, split, subtract


class FedPacOptions(AveragedOptions):
    head_steps: int = Field(5, ge=0, le=10_000, description="steps of the head alone, before those of the body")
    strength: float = Field(1.0, ge=0, description="how strongly features are drawn to the mean of their class (lambda)")


class FedPac(KeepsState):
    """g = body of theta - phi_k, with sums of features and numbers of examples by class; the head is kept on the node."""

    name = "fedpac"
    Options: ClassVar[type[AlgorithmOptions]] = FedPacOptions
    kinds = ("classification",)
    starts_from_meta = False
    first_order = False
    needs_mean = "class means are quotients of sums and counts"

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._last = LinearHead(learner, self.name, "aligns the inputs of", body=True)
        self._head = self._last.weight, self._last.bias

    def init(self) -> Params:
        """Return the body, and class means of which none is known."""
        return split(self.learner.initial(), self._head)[1] | class_means.unknown(self.learner, self._last.size - 1)

    def fresh(self) -> Params:
        return split(self.learner.initial(), self._head)[0]

    def weight(self, num_examples: int) -> float:
        return float(num_examples)

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        steps = self.options.head_steps + inner_steps(self.options, num_examples)
        return shuffled_epochs(num_examples, steps, self.options.batch_size, rng)

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        known, theta = split(meta, (MEANS, KNOWN))
        batches, lr, first = list(minibatches.batches(episode)), self.options.inner_lr, self.options.head_steps
        head = endpoint(self._beside(theta), kept, iter(batches[:first]), lr)

        def aligned(body: Params, batch: Batch) -> Tensor:
            features = self._last.features(body, batch.x)
            losses = cross_entropy(features @ self._last.matrix(head), batch.y)
            apart = class_means.distance_to_own(features[:, :-1], batch, known)
            total: Tensor = mean_over_examples(losses, batch.weight) + self.options.strength * apart
            return total

        body = endpoint(aligned, theta, iter(batches[first:]), lr)
        # The query examples were trained on as well, so this is a training loss.
        return subtract(theta, body) | self._told(body, episode), self.learner.loss({**body, **head}, episode.query), head

    def _told(self, body: Params, episode: Episode) -> Params:
        """Return sums of features and counts by class over the number of examples, which is the weight of the task."""
        sums = [
            class_means.sums_of(self._last.features(body, batch.x)[:, :-1], batch, self.learner.outputs) for batch in episode
        ]
        number = sum(batch.weight.sum() for batch in episode)
        return {name: (sums[0][name] + sums[1][name]) / number for name in sums[0]}

    def server_step(self, meta: Params, state: Params, mean: Params, share: float) -> ServerStep:
        sums, gradient = split(mean, (MEANS, KNOWN))
        return ServerStep(gradient, class_means.renewed(meta, sums), state)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps of a fresh head."""
        return self.personal_path(meta, self.fresh(), support, lr, steps)

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps of the head `kept` alone."""
        theta = split(meta, (MEANS, KNOWN))[1]
        path = descend(self._beside(theta), kept, iter([support] * steps), lr)
        return ({**theta, **head} for head in path)

    def _beside(self, body: Params) -> Loss:
        """Return the loss as a function of the head, with this body."""
        return built_on(self.learner.mean_loss, lambda head, batch: self.learner.loss({**body, **head}, batch))
