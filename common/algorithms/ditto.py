"""Ditto (Li, Hu, Beirami, Smith 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", Algorithm 1).

The server's model is FedAvg's. Beside it every task has a personal model v, which stays on its node from round to round and
takes k steps of v <- v - eta (grad L(v) + lambda (v - theta)): its own loss, and a pull towards the server's model of the
round. A task that was never trained starts its v at theta. One that trains for the first time starts it at the model before
the first round, as the paper initialises it.
"""

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.fedavg import FedAvg, FedAvgOptions
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.inner_loop import descend, endpoint, with_pull
from quickbloom.common.maths.params import Params


class DittoOptions(FedAvgOptions):
    strength: float = Field(0.1, ge=0, description="how strongly personal models are drawn to the server's model (lambda)")


class Ditto(FedAvg):
    """g is FedAvg's; the personal model, pulled towards the server's, is kept on the node."""

    name = "ditto"
    Options: ClassVar[type[AlgorithmOptions]] = DittoOptions
    starts_from_meta = False

    def fresh(self) -> Params:
        return self.initial()

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        gradient, loss = self.meta_gradient(meta, episode, minibatches)
        pulled = with_pull(self.learner.mean_loss, meta, self.options.strength)
        own = endpoint(pulled, kept, minibatches.batches(episode), self.options.inner_lr, self.optimizer)
        return self.with_zero_head(gradient), loss, own

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the steps of a personal model that starts at the server's."""
        return self._pulled_path(meta, meta, iter([support] * steps), lr)

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the steps of the personal model `kept`."""
        return self._pulled_path(meta, kept, iter([support] * steps), lr)

    def _pulled_path(self, meta: Params, start: Params, batches: Iterator[Batch], lr: float | Tensor) -> Iterator[Params]:
        return descend(with_pull(self.learner.mean_loss, meta, self.options.strength), start, batches, lr)
