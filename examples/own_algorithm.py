"""An algorithm of one's own in one file: FedProx (Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith 2020, Algorithm 2).

As FedAvg, but every local step also draws a task's parameters back to theta: k proximal gradient steps on
L(phi) + mu / 2 * ||phi - theta||^2, then g = theta - phi_k. With mu = 0 it is FedAvg.

    python examples/own_algorithm.py run --algorithm prox --set prox.mu=0.1
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import LocalSgd, LocalSgdOptions
from quickbloom.common.maths.batch import Episode, Minibatches
from quickbloom.common.maths.inner_loop import descend_towards, last
from quickbloom.common.maths.params import Params, subtract


class ProxOptions(LocalSgdOptions):
    mu: float = Field(0.1, ge=0, description="how strongly a task is drawn back to the starting point")
    outer_optimizer: Literal["sgd", "adam"] = Field("sgd", description="the server's optimizer")
    outer_lr: float = Field(1.0, gt=0, description="learning rate of the server; 1 replaces the model by the mean")


class Prox(LocalSgd):
    """g = theta - phi_k after k proximal steps on minibatches of support and query; tasks weigh by their examples."""

    name = "prox"
    Options: ClassVar[type[AlgorithmOptions]] = ProxOptions

    def weight(self, num_examples: int) -> float:
        return float(num_examples)

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        loss, batches = self.learner.loss, minibatches.batches(episode)
        phi = last(descend_towards(loss, meta, meta, batches, self.options.inner_lr, self.options.mu))
        return subtract(meta, phi), loss(phi, episode.query)


ALGORITHMS[Prox.name] = Prox


if __name__ == "__main__":
    from quickbloom.server_app.cli.main import main

    main()
