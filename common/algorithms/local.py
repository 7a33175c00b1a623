"""No federation: every task adapts the initial model by itself. The floor that every comparison needs.

Nothing travels: there are no meta-parameters, so messages hold no tensors and the server has nothing to step.
"""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from common.algorithms.base import Algorithm, AlgorithmOptions, InnerLoopOptions
from common.batch import Batch, Episode, Minibatches
from common.inner import descend, last
from common.params import Params


class Local(Algorithm):
    """No g: `meta` is empty, and every task starts from the initial model of the run's seed."""

    name = "local"
    Options: ClassVar[type[AlgorithmOptions]] = InnerLoopOptions
    tunes_inner_lr = False

    def init(self) -> Params:
        return {}

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        path = self.adaptation_path(meta, episode.support, self.options.inner_lr, self.options.inner_steps)
        return {}, self.learner.loss(last(path), episode.query)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        return descend(self.learner.loss, self.learner.initial(), iter([support] * steps), lr)
