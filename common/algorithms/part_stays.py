"""Base of algorithms in which one part of the model stays on the node from round to round, and the rest travels.

A task takes k steps on both parts together; g is the difference of the part that travels. Every new task starts from the same
fresh part, that of the freshly initialised model.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

from quickbloom.common.algorithms.local_sgd import KeepsState
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import end_of_descent, loss_of
from quickbloom.common.maths.inner_loop import descend
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params, split, subtract


class PartStays(KeepsState):
    """g = theta - phi_k of the part that travels; the other part of phi_k is kept on the node."""

    starts_from_meta = False
    plain_steps = False

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._stays = self.staying()

    @abstractmethod
    def staying(self) -> Collection[str]:
        """Return the names of the parameters that stay: some, but not all. Raises ConfigError."""

    def init(self) -> Params:
        return split(self.learner.initial(), self._stays)[1]

    def fresh(self) -> Params:
        return split(self.learner.initial(), self._stays)[0]

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        phi = end_of_descent(self.learner, {**meta, **kept}, minibatches.of(episode), self.options.inner_lr, self.optimizer)
        stays, travels = split(phi, self._stays)
        # The query examples were trained on as well, so this is a training loss.
        return subtract(meta, travels), loss_of(self.learner, phi, episode.query), stays

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps from a fresh part."""
        return self.personal_path(meta, self.fresh(), support, lr, steps)

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps of both parts from the part `kept`."""
        return descend(self.learner.mean_loss, {**meta, **kept}, iter([support] * steps), lr)
