"""Ridge regression as the inner loop (Bertinetto, Henriques, Torr, Vedaldi 2019, "Meta-learning with Differentiable Closed-form
Solvers", R2-D2, Equations 4 to 6).

The adapted head minimises a squared error on the support set, so there is no rate and there are no steps:
W = argmin ||Y - F W||^2 + lambda ||W - W_0||^2 with the features F of the body. As in the paper the penalty
is learned, and so is the scale of the outputs before the softmax; an offset that all classes share cancels
there. Two things are more general than the paper. The head W_0 that the penalty pulls to is learned as
well: with a body that changes nothing (`model = "linear"`) this is empirical Bayes over users on plain
tables. `zero-head` keeps it at the paper's 0. The intercept has a penalty of its own. Penalties are at most 100.
"""

from collections.abc import Iterator, Sequence
from math import log
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions, ClosedFormOptions, EmbeddingAlgorithm, ZeroHeadOptions
from quickbloom.common.maths.batch import Batch, Episode
from quickbloom.common.maths.embedding import Embedding
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.linear_head import STRETCH, LinearHead, shrunk_fit
from quickbloom.common.maths.params import Params

PENALTY, SCALE = "ridge/penalty", "ridge/scale"
"""Names of what is learned beside the model: logarithms over STRETCH, of the penalties of weights and intercept [2], and of the
scale of the outputs [1] (classification)."""
_MOST = 100.0
"""Largest penalty that is learned. Training users who are all alike would make it endless, and a user who differs could not
adapt with any number of rows: with as many rows as this the head moves half of the way."""


class RidgeOptions(ZeroHeadOptions, ClosedFormOptions):
    penalty: float = Field(1.0, gt=0, description="penalty on the head's distance from the shared head before the first round")


class Ridge(EmbeddingAlgorithm):
    """g = gradient of the query loss through the closed-form head of the support set."""

    name = "ridge"
    Options: ClassVar[type[AlgorithmOptions]] = RidgeOptions
    tunes_inner_lr = False
    uses_adapt_lr = False
    model_for_tables = "linear"
    takes_new_classes = True

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._head = LinearHead(learner, self.name)
        self.options = options.with_rate(one_layer=self._head.is_all)

    def init(self) -> Params:
        """Return the model with a head of zeros, the penalties and the scale."""
        zero = self._head.zeroed(self.initial())
        extra = {PENALTY: torch.full_like(zero[self._head.bias][:1], log(self.options.penalty) / STRETCH).repeat(2)}
        if self.learner.kind == "classification":
            extra[SCALE] = torch.zeros_like(extra[PENALTY][:1])
        return zero | extra

    def with_classes(self, meta: Params, sources: Sequence[int | None]) -> Params:
        """Return `meta` with a head for these classes; the shared head of one that training never saw is the mean of all.

        What all heads have in common changes no probability after adaptation, so the mean is what stays as it is
        under such a shift. Penalties and scale are those of all classes.
        """
        shared = self._head.matrix(meta)
        mean = shared.mean(dim=1)
        return self._head.replaced(meta, torch.stack([mean if at is None else shared[:, at] for at in sources], dim=1))

    def is_of_embeddings(self) -> bool:
        return self.learner.ends_with_its_last_layer and super().is_of_embeddings()

    def embedding(self) -> Embedding:
        return self._head.embedding

    def objective_on(self, meta: Params, embedded: Episode) -> Tensor:
        return self.learner.loss_of(embedded.query.x @ self._solved(meta, embedded.support), embedded.query)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the model with the shared head, then with the support set's; `lr` is not used, further steps change nothing."""
        model = {name: value for name, value in meta.items() if name not in (PENALTY, SCALE)}
        yield self._head.replaced(model, self._scale(meta) * self._head.matrix(model))
        if steps:
            features = support._replace(x=self._head.features(model, support.x))
            personal = self._head.replaced(model, self._solved(meta, features))
            yield from [personal] * steps

    def _solved(self, meta: Params, support: Batch) -> Tensor:
        """Return the head A [features + 1, outputs] of a support set, given its features."""
        shared, features = self._head.matrix(meta), support.x
        weights, intercept = _bounded(STRETCH * meta[PENALTY]).exp().unbind()
        precision = torch.cat([weights.expand(self._head.size - 1), intercept.unsqueeze(0)])
        moved = shrunk_fit(features, self._targets(support.y, features) - features @ shared, support.weight, precision)
        return self._scale(meta) * (shared + moved.to(shared.dtype))

    def _scale(self, meta: Params) -> Tensor | float:
        return (STRETCH * meta[SCALE]).exp() if SCALE in meta else 1.0

    def _targets(self, y: Tensor, features: Tensor) -> Tensor:
        """Return what the head is to give [n, outputs]: the targets, or 1 for the class and 0 for the others."""
        if self.learner.kind == "regression":
            return y
        # functional.one_hot does not work inside vmap.
        classes = torch.arange(self._head.outputs, device=y.device)
        return (y.unsqueeze(-1) == classes).to(features.dtype)


def _bounded(logarithms: Tensor) -> Tensor:
    """Return the logarithms of penalties, at most that of _MOST; the gradient is as if there were no bound."""
    return logarithms - (logarithms - log(_MOST)).relu().detach()
