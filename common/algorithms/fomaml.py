"""First-order MAML (Finn, Abbeel, Levine 2017, s. 5.2).

phi_k is the result of k full gradient steps on the support set. The gradient of the query loss at phi_k is
used in place of the gradient at theta. The query loss is over all of Q and contains no support example
(Nichol et al. 2018, s. 6.3, show the cost of sharing them).
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions, InnerLoopOptions, ZeroHeadOptions
from quickbloom.common.maths.batch import Episode, Minibatches
from quickbloom.common.maths.fast_paths import Summed, end_of_descent, gradient_and_loss, sum_of_descents
from quickbloom.common.maths.params import Params


class FoMamlOptions(InnerLoopOptions, ZeroHeadOptions):
    inner_steps: int = Field(10, ge=1, le=10_000, description="gradient steps of the inner loop in training (k)")


class FoMaml(Algorithm):
    """g = gradient of L_Q at phi_k."""

    name = "fomaml"
    Options: ClassVar[type[AlgorithmOptions]] = FoMamlOptions
    first_order = True
    descends_in_place = True

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        phi = end_of_descent(self.learner, meta, episode.support.times(self.options.inner_steps), self.options.inner_lr)
        return gradient_and_loss(self.learner, phi, episode.query)

    def sum_up(self, meta: Params, episode: Episode, minibatches: Minibatches, weights: Tensor, clip: float) -> Summed | None:
        if not self.sums_up_as(FoMaml, clip):
            return None
        steps, lr = self.options.inner_steps, self.options.inner_lr
        batches = episode.support.times_each(steps)
        return sum_of_descents(self.learner, meta, batches, episode.query, lr, weights, clip, of="query")
