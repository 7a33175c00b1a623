"""FedBABU (Oh, Kim, Yun 2022, "FedBABU: Toward Enhanced Representation for Federated Image Classification", Algorithm 1).

The head keeps the numbers that it was drawn with, and never travels: k SGD steps move the body alone, g = body of theta -
phi_k, weighted by the number of examples. At evaluation body and head are fine-tuned together, as in the paper's section 5.2.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import AveragedOptions, LocalSgd
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.inner_loop import built_on, descend, endpoint
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params, split, subtract
from quickbloom.common.options import Text


class FedBabuOptions(AveragedOptions):
    head: Text = Field(
        "auto", description='comma-separated name prefixes of the parameters that never train; "auto": the last layer'
    )


class FedBabu(LocalSgd):
    """g = body of theta - phi_k with the head as it was drawn; tasks weigh by their number of examples."""

    name = "fedbabu"
    Options: ClassVar[type[AlgorithmOptions]] = FedBabuOptions
    plain_steps = False
    starts_from_meta = False
    first_order = False

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._head = learner.head("fedbabu.head", options.head)

    def init(self) -> Params:
        return split(self.learner.initial(), self._head)[1]

    def head(self) -> Params:
        """Return the head that all tasks share and that never trains, a function of the run's seed."""
        return split(self.learner.initial(), self._head)[0]

    def weight(self, num_examples: int) -> float:
        return float(num_examples)

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        head = self.head()

        def loss(body: Params, batch: Batch) -> Tensor:
            return self.learner.loss({**body, **head}, batch)

        of_body = built_on(self.learner.mean_loss, loss)
        body = endpoint(of_body, meta, minibatches.batches(episode), self.options.inner_lr, self.optimizer)
        # The query examples were trained on as well, so this is a training loss.
        return subtract(meta, body), loss(body, episode.query)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps of body and head together."""
        return descend(self.learner.mean_loss, {**meta, **self.head()}, iter([support] * steps), lr)
