"""ANIL, "almost no inner loop" (Raghu, Raghu, Bengio, Vinyals 2020, "Rapid Learning or Feature Reuse?").

The inner loop of MAML moves the head alone, in training and at evaluation. g is the exact gradient with
respect to all of theta, the body included.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.maml import Maml, MamlOptions
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.embedding import sum_of_embedded
from quickbloom.common.maths.fast_paths import Summed
from quickbloom.common.maths.inner_loop import built_on, descend, last
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.linear_head import LinearHead
from quickbloom.common.maths.params import Params
from quickbloom.common.options import Text

_MATRIX = "matrix"


class AnilOptions(MamlOptions):
    head: Text = Field("auto", description='comma-separated name prefixes of the parameters that adapt; "auto": the last layer')


class Anil(Maml):
    """g = gradient at theta of the query loss after k full steps of the head on the support set."""

    name = "anil"
    Options: ClassVar[type[AlgorithmOptions]] = AnilOptions

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._head = learner.head("anil.head", options.head)
        self._last = _last_layer(learner, self._head)

    def objective(self, meta: Params, episode: Episode) -> Tensor:
        if self._last is None or not self._adapts_here():
            return super().objective(meta, episode)
        # The steps move the head alone, so that the features are computed once.
        return self._objective_on(meta, self._last.embedding.embedded(meta, episode))

    def sum_up(self, meta: Params, episode: Episode, minibatches: Minibatches, weights: Tensor, clip: float) -> Summed | None:
        if self._last is None or not self._adapts_here() or not self.sums_up_as(Anil, clip, "objective"):
            return None
        return sum_of_embedded(self._last.embedding, self._objective_on, meta, episode, weights, clip)

    def _adapts_here(self) -> bool:
        return type(self).adaptation_path is Anil.adaptation_path and type(self.learner) is Learner

    def _objective_on(self, meta: Params, features: Episode) -> Tensor:
        """Return the query loss after the inner loop, which moves a head A [features + 1, outputs]."""
        assert self._last is not None
        steps, lr = self.options.inner_steps, self.options.inner_lr
        head = last(descend(self._loss, {_MATRIX: self._last.matrix(meta)}, iter([features.support] * steps), lr))
        return self._loss(head, features.query)

    def _loss(self, head: Params, features: Batch) -> Tensor:
        return self.learner.loss_of(features.x @ head[_MATRIX], features)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps of the head; the body stays that of `meta`."""

        def loss(head: Params, batch: Batch) -> Tensor:
            return self.learner.loss({**meta, **head}, batch)

        head = {name: meta[name] for name in self._head}
        for phi in descend(built_on(self.learner.mean_loss, loss), head, iter([support] * steps), lr):
            yield {**meta, **phi}


def _last_layer(learner: Learner, head: list[str]) -> LinearHead | None:
    """Return the last layer if `head` is its parameters, and the outputs are a linear function of its inputs; else None."""
    if not learner.ends_with_its_last_layer:
        return None
    try:
        found = LinearHead(learner, "anil")
    except ConfigError:
        return None
    return found if {found.weight, found.bias} == set(head) else None
