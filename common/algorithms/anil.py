"""ANIL, "almost no inner loop" (Raghu, Raghu, Bengio, Vinyals 2020, "Rapid Learning or Feature Reuse?").

The inner loop of MAML moves the head alone, in training and at evaluation. g is the exact gradient with
respect to all of theta, the body included.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.maml import Maml, MamlOptions
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.inner_loop import built_on, descend
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.options import Text


class AnilOptions(MamlOptions):
    head: Text = Field("auto", description='comma-separated name prefixes of the parameters that adapt; "auto": the last layer')


class Anil(Maml):
    """g = gradient at theta of the query loss after k full steps of the head on the support set."""

    name = "anil"
    Options: ClassVar[type[AlgorithmOptions]] = AnilOptions

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._head = learner.head("anil.head", options.head)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps of the head; the body stays that of `meta`."""

        def loss(head: Params, batch: Batch) -> Tensor:
            return self.learner.loss({**meta, **head}, batch)

        head = {name: meta[name] for name in self._head}
        for phi in descend(built_on(self.learner.mean_loss, loss), head, iter([support] * steps), lr):
            yield {**meta, **phi}
