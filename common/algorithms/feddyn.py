"""FedDyn (Acar, Zhao, Matas, Mattina, Whatmough, Saligrama 2021, "Federated Learning Based on Dynamic Regularization",
Algorithm 1).

A task keeps h_i, an estimate of its own gradient, takes k steps on L(phi) - <h_i, phi> + a / 2 ||phi - theta||^2, and then has
h_i <- h_i - a (phi_k - theta). g = theta - phi_k; tasks weigh the same. The server keeps h, which it does not send:

    h <- h + a |S| / N mean of g,    theta <- theta - mean of g - h / a

with the |S| of N training tasks that contributed. At evaluation the model is fine-tuned like FedAvg's.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions, ServerStep
from quickbloom.common.algorithms.local_sgd import AveragedOptions, KeepsState
from quickbloom.common.maths.batch import Episode, Minibatches
from quickbloom.common.maths.inner_loop import endpoint, with_pull, with_slope
from quickbloom.common.maths.params import Params, add, subtract


class FedDynOptions(AveragedOptions):
    strength: float = Field(0.1, gt=0, description="how strongly a task is drawn to the server's model (alpha in the paper)")


class FedDyn(KeepsState):
    """g = theta - phi_k of a loss with a linear and a quadratic term; the linear one is kept on the node."""

    name = "feddyn"
    Options: ClassVar[type[AlgorithmOptions]] = FedDynOptions
    first_order = False
    needs_mean = "the server's correction has to stay the mean of what the tasks keep"
    needs_whole = True

    def fresh(self) -> Params:
        return self.learner.zeros()

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        strength = self.options.strength
        pulled = with_pull(self.learner.mean_loss, meta, strength)
        objective = with_slope(pulled, {name: -value for name, value in kept.items()})
        phi = endpoint(objective, meta, minibatches.batches(episode), self.options.inner_lr)
        gradient = subtract(meta, phi)
        # The query examples were trained on as well, so this is a training loss.
        return gradient, self.learner.loss(phi, episode.query), add(kept, gradient, strength)

    def server_state(self) -> Params:
        return self.learner.zeros()

    def server_step(self, meta: Params, state: Params, mean: Params, share: float) -> ServerStep:
        state = add(state, mean, self.options.strength * share)
        return ServerStep(add(mean, state, 1 / self.options.strength), {}, state)
