"""Meta-SGD (Li, Zhou, Chen, Li 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", Algorithm 1).

In a federation: Chen, Luo, Dong, Li, He 2018, "FedMeta". phi = theta - a * grad L_S(theta), with a separate
learned rate a for every parameter. Both theta and a travel, and g is the exact gradient of the query loss
with respect to both.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.maml import Maml, MamlOptions
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import Summed, differentiable_end, sum_of_descents
from quickbloom.common.maths.inner_loop import descend_at_rates
from quickbloom.common.maths.params import Params

RATE = "rate/"
"""Prefix of the names of the learned rates; the name of the parameter follows."""


class MetaSgdOptions(MamlOptions):
    inner_lr: float = Field(0.0, ge=0, description="every learned rate before the first round; 0: what the data set recommends")


class MetaSgd(Maml):
    """g = gradient at (theta, a) of the query loss after k steps with the rates a; the paper has k = 1."""

    name = "metasgd"
    Options: ClassVar[type[AlgorithmOptions]] = MetaSgdOptions

    def init(self) -> Params:
        """Return theta, and for each of its numbers a learned rate under "rate/" and the parameter's name."""
        theta = self.initial()
        return theta | {RATE + name: torch.full_like(value, self.options.inner_lr) for name, value in theta.items()}

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield theta after 0, 1, .. `steps` steps. `lr` scales the learned rates; at `inner_lr` the scale is 1."""
        theta, rates = _parted(meta)
        return descend_at_rates(self.learner.mean_loss, theta, support, lr / self.options.inner_lr, steps, rates)

    def adapted(self, meta: Params, support: Batch) -> Params:
        if type(self).adaptation_path is not MetaSgd.adaptation_path:
            return super().adapted(meta, support)
        theta, rates = _parted(meta)
        return differentiable_end(self.learner, theta, support, 1.0, self.options.inner_steps, rates)

    def sum_up(self, meta: Params, episode: Episode, minibatches: Minibatches, weights: Tensor, clip: float) -> Summed | None:
        if not self.sums_up_as(MetaSgd, clip, "objective", "adapted", "adaptation_path"):
            return None
        (theta, rates), batches = _parted(meta), episode.support.times_each(self.options.inner_steps)
        found = sum_of_descents(self.learner, theta, batches, episode.query, 0.0, weights, clip, of="through", rates=rates)
        if found is not None:
            found.total.update({RATE + name: value for name, value in found.rates.items()})
        return found


def _parted(meta: Params) -> tuple[Params, Params]:
    """Return (theta, the rates by the names of theta)."""
    theta = {name: value for name, value in meta.items() if not name.startswith(RATE)}
    return theta, {name: meta[RATE + name] for name in theta}
