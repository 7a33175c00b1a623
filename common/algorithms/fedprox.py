"""FedProx (Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2).

A task takes k SGD steps on h(w) = L(w) + mu / 2 ||w - theta||^2, so that it does not drift far from theta; g = theta - phi_k,
as in FedAvg, whose weights it has. At evaluation the model is fine-tuned like FedAvg's, without the pull: it is for the
server's model alone. Here all tasks take k steps; the paper also lets slow devices take fewer.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.fedavg import FedAvg, FedAvgOptions
from quickbloom.common.maths.batch import Episode, Minibatches
from quickbloom.common.maths.inner_loop import endpoint, with_pull
from quickbloom.common.maths.params import Params, subtract


class FedProxOptions(FedAvgOptions):
    strength: float = Field(0.01, ge=0, description="how strongly a task is drawn to the server's model (mu)")


class FedProx(FedAvg):
    """g = theta - phi_k after k steps on the loss and a pull towards theta; tasks weigh by their number of examples."""

    name = "fedprox"
    Options: ClassVar[type[AlgorithmOptions]] = FedProxOptions
    first_order = False

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        objective = with_pull(self.learner.mean_loss, meta, self.options.strength)
        phi = endpoint(objective, meta, minibatches.batches(episode), self.options.inner_lr, self.optimizer)
        # The query examples were trained on as well, so this is a training loss.
        return subtract(meta, phi), self.learner.loss(phi, episode.query)
