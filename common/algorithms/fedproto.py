"""FedProto (Tan, Long, Liu, Zhou, Lu, Jiang, Zhang 2022, "FedProto: Federated Prototype Learning across Heterogeneous Clients",
Algorithm 1).

No weights travel: every task keeps a model of its own, and takes k steps on L + lambda R. R is the mean squared distance of
its examples' features, the inputs of the last layer, to the global prototype of their class. Then it tells sums of features
and counts by class, from which the server makes the next prototypes. A task predicts the class of the nearest prototype.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions, ServerStep
from quickbloom.common.algorithms.local_sgd import KeepsState, LocalSgdOptions
from quickbloom.common.maths import class_means
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.class_means import KNOWN, MEANS
from quickbloom.common.maths.inner_loop import Loss, descend, endpoint
from quickbloom.common.maths.learner import Learner, cross_entropy, hits, mean_over_examples
from quickbloom.common.maths.linear_head import LinearHead
from quickbloom.common.maths.params import Params, split
from quickbloom.common.maths.prototypes import within_reach

_NEVER = -1e30


class FedProtoOptions(LocalSgdOptions):
    strength: float = Field(1.0, ge=0, description="how strongly features are drawn to the prototype of their class (lambda)")


class FedProto(KeepsState):
    """g: sums of features and numbers of examples by class; the whole model is kept on the node."""

    name = "fedproto"
    Options: ClassVar[type[AlgorithmOptions]] = FedProtoOptions
    kinds = ("classification",)
    starts_from_meta = False
    first_order = False
    needs_mean = "prototypes are quotients of sums and counts"
    has_outer_step = False

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._last = LinearHead(learner, self.name, "compares the inputs of", body=True)

    def init(self) -> Params:
        """Return the prototypes, of which none is known."""
        return class_means.unknown(self.learner, self._last.size - 1)

    def fresh(self) -> Params:
        return self.learner.initial()

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        model = endpoint(self._objective(meta), kept, minibatches.batches(episode), self.options.inner_lr)
        told = [self._sums(model, batch) for batch in episode]
        # The query examples were trained on as well, so this is a training loss.
        return {n: told[0][n] + told[1][n] for n in told[0]}, self.learner.loss(model, episode.query), model

    def _objective(self, meta: Params) -> Loss:
        def loss(model: Params, batch: Batch) -> Tensor:
            features = self._last.features(model, batch.x)
            losses = cross_entropy(features @ self._last.matrix(model), batch.y)
            apart = class_means.distance_to_own(features[:, :-1], batch, meta)
            total: Tensor = mean_over_examples(losses, batch.weight) + self.options.strength * apart
            return total

        return loss

    def _sums(self, model: Params, batch: Batch) -> Params:
        return class_means.sums_of(self._last.features(model, batch.x)[:, :-1], batch, self.learner.outputs)

    def server_step(self, meta: Params, state: Params, mean: Params, share: float) -> ServerStep:
        return ServerStep({}, class_means.renewed(meta, mean), state)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield a fresh model with the prototypes after 0, 1, .. `steps` steps."""
        return self.personal_path(meta, self.fresh(), support, lr, steps)

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the model `kept` with the prototypes after 0, 1, .. `steps` steps."""
        return ({**model, **meta} for model in descend(self._objective(meta), kept, iter([support] * steps), lr))

    def predict(self, personal: Params, x: Tensor) -> Tensor:
        """Return negative squared distances to the prototypes, -1e30 for a class without one; the model's own before any is."""
        known, model = split(personal, (MEANS, KNOWN))
        features = self._last.features(model, x)
        gaps = (features[:, None, :-1] - known[MEANS]).square().sum(dim=-1)
        nearest = torch.where(within_reach(known[KNOWN]), -gaps, _NEVER)
        return torch.where(known[KNOWN].sum() > 0, nearest, features @ self._last.matrix(model))

    def predictable(self, personal: Params) -> Tensor:
        """Return the classes with a prototype; all before there is any."""
        return within_reach(personal[KNOWN])

    def score(self, personal: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (loss, accuracy). Examples of a class without prototype count as errors and are left out of the loss."""
        outputs = self.predict(personal, batch.x)
        weight = torch.where(within_reach(personal[KNOWN])[batch.y], batch.weight, 0.0)
        losses = torch.where(weight > 0, cross_entropy(outputs, batch.y), 0.0)
        return (losses * weight).sum() / weight.sum().clamp(min=1), mean_over_examples(hits(outputs, batch.y), batch.weight)
