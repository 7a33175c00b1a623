"""MAML, exact second order (Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning", Algorithm 1).

g = grad_theta L_Q(phi_k(theta)): the gradient is taken through all k inner steps, second derivatives
included.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions, InnerLoopOptions, ObjectiveAlgorithm, ZeroHeadOptions
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import Summed, differentiable_end, sum_of_descents
from quickbloom.common.maths.inner_loop import last
from quickbloom.common.maths.params import Params


class MamlOptions(InnerLoopOptions, ZeroHeadOptions):
    outer_lr: float = Field(1e-2, gt=0, description="learning rate of the server's optimizer")
    outer_decay: bool = Field(True, description="let the server's learning rate fall linearly to 0 over the rounds")


class Maml(ObjectiveAlgorithm):
    """g = gradient at theta of the query loss after k full steps on the support set."""

    name = "maml"
    Options: ClassVar[type[AlgorithmOptions]] = MamlOptions

    def objective(self, meta: Params, episode: Episode) -> Tensor:
        phi = self.adapted(meta, episode.support)
        return self.learner.loss(phi, episode.query)

    def adapted(self, meta: Params, support: Batch) -> Params:
        """Return phi_k, the last element of `adaptation_path`, for a gradient through it; by the kernels where they can."""
        lr, steps = self.options.inner_lr, self.options.inner_steps
        if type(self).adaptation_path is not Algorithm.adaptation_path:
            return last(self.adaptation_path(meta, support, lr, steps))
        return differentiable_end(self.learner, meta, support, lr, steps)

    def sum_up(self, meta: Params, episode: Episode, minibatches: Minibatches, weights: Tensor, clip: float) -> Summed | None:
        if not self.sums_up_as(Maml, clip, "objective", "adapted", "adaptation_path"):
            return None
        batches, lr = episode.support.times_each(self.options.inner_steps), self.options.inner_lr
        return sum_of_descents(self.learner, meta, batches, episode.query, lr, weights, clip, of="through")
