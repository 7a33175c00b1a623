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
from quickbloom.common.maths.batch import Batch, Episode
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
        if self._last is None or type(self).adaptation_path is not Anil.adaptation_path:
            return super().objective(meta, episode)
        # The steps move the head alone, so that the features of the support set are computed once.
        support, query = (batch._replace(x=self._last.features(meta, batch.x)) for batch in (episode.support, episode.query))
        path = descend(
            self._loss, {_MATRIX: self._last.matrix(meta)}, iter([support] * self.options.inner_steps), self.options.inner_lr
        )
        return self._loss(last(path), query)

    def _loss(self, head: Params, features: Batch) -> Tensor:
        """Return the loss of a head A [features + 1, outputs] on a batch of features."""
        return self.learner.loss_of(features.x @ head[_MATRIX], features)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps of the head; the body stays that of `meta`."""

        def loss(head: Params, batch: Batch) -> Tensor:
            return self.learner.loss({**meta, **head}, batch)

        head = {name: meta[name] for name in self._head}
        for phi in descend(built_on(self.learner.mean_loss, loss), head, iter([support] * steps), lr):
            yield {**meta, **phi}


def _last_layer(learner: Learner, head: list[str]) -> LinearHead | None:
    """Return the last layer if `head` is its parameters, and it is a linear one with a bias; else None."""
    try:
        found = LinearHead(learner, "anil")
    except ConfigError:
        return None
    return found if {found.weight, found.bias} == set(head) else None
