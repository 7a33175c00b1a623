"""Prototypical networks (Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning", Algorithm 1).

No inner loop: a class is the mean embedding of its support examples, and an example is classified by a softmax over the
negative squared Euclidean distances to the prototypes. The model is the embedding: it is built with `embedding` outputs. The
personal parameters are the embedding and the prototypes; one "step" finds them, more change nothing.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from common.algorithms.base import AlgorithmOptions, ObjectiveAlgorithm
from common.batch import Batch, Episode
from common.inner import last
from common.learner import cross_entropy, hits, mean_over_examples
from common.params import Params

PROTOTYPES, KNOWN = "prototypes", "known"
"""Names of the personal tensors: prototypes [classes, embedding], and which classes have one, 1 or 0 [classes]."""


class ProtoNetOptions(AlgorithmOptions):
    embedding: int = Field(64, ge=1, le=65_536, description="dimension of the embedding: the number of outputs of the model")


class ProtoNet(ObjectiveAlgorithm):
    """g = gradient of the cross-entropy over negative squared distances on Q to the prototypes of S."""

    name = "protonet"
    Options: ClassVar[type[AlgorithmOptions]] = ProtoNetOptions
    kinds = ("classification",)
    tunes_inner_lr = False
    uses_adapt_lr = False

    @classmethod
    def model_outputs(cls, options: Any, outputs: int) -> int:
        return int(options.embedding)

    def objective(self, meta: Params, episode: Episode) -> Tensor:
        loss, _ = self.score(last(self.adaptation_path(meta, episode.support, 0.0, 1)), episode.query)
        return loss

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """The embedding without prototypes, then with those of the support set; `lr` has nothing to do."""
        nothing = next(iter(meta.values())).new_zeros
        yield {**meta, PROTOTYPES: nothing(self.learner.outputs, self.options.embedding), KNOWN: nothing(self.learner.outputs)}
        if steps:
            # F.one_hot does not work inside vmap.
            classes = torch.arange(self.learner.outputs, device=support.y.device)
            members = (support.y.unsqueeze(-1) == classes).to(support.weight.dtype) * support.weight.unsqueeze(-1)
            counts = members.sum(dim=0)
            sums = members.T @ self.learner.apply(meta, support.x)
            personal = {**meta, PROTOTYPES: sums / counts.clamp(min=1).unsqueeze(-1), KNOWN: (counts > 0).to(counts.dtype)}
            for _ in range(steps):
                yield personal

    def predict(self, personal: Params, x: Tensor) -> Tensor:
        """Negative squared distances to the prototypes, but for what is the same for all; -1e30 for a class without one."""
        theta = {name: value for name, value in personal.items() if name not in (PROTOTYPES, KNOWN)}
        prototypes = personal[PROTOTYPES]
        # Distances do not change when everything moves; near zero the products below keep their digits.
        middle = prototypes.mean(dim=0)
        embedded, prototypes = self.learner.apply(theta, x) - middle, prototypes - middle
        # -||x - p||^2 without ||x||^2, which is the same for all classes and cancels in the softmax.
        logits = 2 * embedded @ prototypes.T - prototypes.square().sum(dim=-1)
        return torch.where(_within_reach(personal), logits, -1e30)

    def score(self, personal: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, accuracy). A class without support cannot be recognised: its examples count as errors, not in the loss."""
        logits, within_reach = self.predict(personal, batch.x), _within_reach(personal)
        weight = torch.where(within_reach[batch.y], batch.weight, 0.0)
        loss = (cross_entropy(logits, batch.y) * weight).sum() / weight.sum().clamp(min=1)
        return loss, mean_over_examples(hits(logits, batch.y), batch.weight)


def _within_reach(personal: Params) -> Tensor:
    """Which classes can be recognised [classes]. Before there is any prototype all are alike, and the first is named."""
    known = personal[KNOWN]
    return (known > 0) | (known.sum() == 0)
