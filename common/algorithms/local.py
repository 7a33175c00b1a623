"""No federation: every task adapts the initial model by itself. This is the floor for every comparison.

There are no meta-parameters, so messages hold no tensors and the server has nothing to update. With `keep`, a task goes on from
round to round where it stopped: the "Local" of papers on personalised federated learning, trained as long as the others are.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import LocalSgd, LocalSgdOptions
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import end_of_descent, loss_of
from quickbloom.common.maths.inner_loop import descend
from quickbloom.common.maths.params import Params
from quickbloom.common.options import refuse_idle


class LocalOptions(LocalSgdOptions):
    inner_steps: int = Field(5, ge=1, le=10_000, description="gradient steps of the inner loop in training (k)")
    keep: bool = Field(
        False,
        description="every round a task goes on where it stopped, on minibatches of support and query; false: it starts anew",
    )


class Local(LocalSgd):
    """No federation: `meta` is empty, and every task starts from the initial model of the run's seed."""

    name = "local"
    Options: ClassVar[type[AlgorithmOptions]] = LocalOptions
    plain_steps = False
    starts_from_meta = False
    tunes_inner_lr = False
    has_outer_step = False

    @classmethod
    def check_options(cls, options: Any) -> None:
        if not options.keep:
            keys = ("batch-size", "local-epochs", "inner-optimizer", "inner-momentum")
            why = "without `local.keep`, because a task then takes `inner-steps` plain steps on its whole support"
            refuse_idle(options, keys, why, cls.name)
        super().check_options(options)

    def init(self) -> Params:
        return {}

    def fresh(self) -> Params:
        return self.learner.initial() if self.options.keep else {}

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        batches = episode.support.times(self.options.inner_steps)
        phi = end_of_descent(self.learner, self.learner.initial(), batches, self.options.inner_lr)
        return {}, loss_of(self.learner, phi, episode.query)

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        if not self.options.keep:
            return super().contribute(meta, kept, episode, minibatches)
        phi = end_of_descent(self.learner, kept, minibatches.of(episode), self.options.inner_lr, self.optimizer)
        # The query examples were trained on as well, so this is a training loss.
        return {}, loss_of(self.learner, phi, episode.query), phi

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        return descend(self.learner.mean_loss, self.learner.initial(), iter([support] * steps), lr)

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the steps of the model that the task keeps, if it keeps one."""
        return descend(self.learner.mean_loss, kept or self.learner.initial(), iter([support] * steps), lr)
