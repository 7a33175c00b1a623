"""No federation: every task adapts the initial model by itself. This is the floor for every comparison.

There are no meta-parameters, so messages hold no tensors and the server has nothing to update.
"""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions, InnerLoopOptions
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import end_of_descent, loss_of
from quickbloom.common.maths.inner_loop import descend
from quickbloom.common.maths.params import Params


class Local(Algorithm):
    """No federation: `meta` is empty, and every task starts from the initial model of the run's seed."""

    name = "local"
    Options: ClassVar[type[AlgorithmOptions]] = InnerLoopOptions
    starts_from_meta = False
    first_order = True
    tunes_inner_lr = False

    def init(self) -> Params:
        return {}

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        batches = episode.support.times(self.options.inner_steps)
        phi = end_of_descent(self.learner, self.learner.initial(), batches, self.options.inner_lr)
        return {}, loss_of(self.learner, phi, episode.query)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        return descend(self.learner.loss, self.learner.initial(), iter([support] * steps), lr)
