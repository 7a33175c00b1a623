"""MAML, exact second order (Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning", Algorithm 1).

g = grad_theta L_Q(phi_k(theta)): the gradient goes back through all k inner steps, second derivatives included.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.func import grad_and_value

from common.algorithms.base import Algorithm, AlgorithmOptions
from common.batch import Episode, Minibatches
from common.inner import last
from common.params import Params


class MamlOptions(AlgorithmOptions):
    outer_lr: float = Field(1e-2, gt=0, description="learning rate of the server's optimizer")
    outer_decay: bool = Field(True, description="let the server's learning rate fall linearly to 0 over the rounds")


class Maml(Algorithm):
    """g = gradient at theta of the query loss after k full steps on the support set."""

    name = "maml"
    Options: ClassVar[type[AlgorithmOptions]] = MamlOptions

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        def objective(theta: Params) -> Tensor:
            path = self.adaptation_path(theta, episode.support, self.options.inner_lr, self.options.inner_steps)
            return self.learner.loss(last(path), episode.query)

        gradient, loss = grad_and_value(objective)(meta)
        return gradient, loss
