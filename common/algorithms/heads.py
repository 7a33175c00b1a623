"""Task-specific heads: FedPer (Arivazhagan et al. 2019) and FedRep (Collins, Hassani, Mokhtari, Shakkottai 2021, Algorithm 1).

The body travels and is averaged; the head never leaves the node and stays there from round to round. FedPer
moves body and head together in k steps. FedRep (`head-steps` above 0) first moves the head alone for that
many steps, then the body alone for k. Every new task starts from the same fresh head. g = body of theta -
phi_k.
"""

from collections.abc import Collection, Iterator
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import AveragedOptions, inner_steps, shuffled_epochs, steps_of_an_epoch
from quickbloom.common.algorithms.part_stays import PartStays
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import loss_of
from quickbloom.common.maths.inner_loop import Loss, built_on, descend, endpoint
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params, subtract
from quickbloom.common.options import Text


class HeadsOptions(AveragedOptions):
    head: Text = Field("auto", description='comma-separated name prefixes of the parameters that stay; "auto": the last layer')
    head_steps: int = Field(
        0, ge=0, le=10_000, description="FedRep: steps of the head alone, before those of the body; 0: FedPer"
    )
    head_epochs: int = Field(0, ge=0, le=1000, description="FedRep: epochs of the head alone, with `local-epochs` of the body")

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if self.head_epochs and (self.head_steps or not self.local_epochs):
            raise ValueError(
                "`heads.head-epochs` goes with `heads.local-epochs` above 0 and `heads.head-steps = 0`, got "
                f"local-epochs {self.local_epochs} and head-steps {self.head_steps}: count both in steps, or both in epochs"
            )
        return self


class Heads(PartStays):
    """FedPer and FedRep: g = body of theta - phi_k; the head of phi_k is kept on the node."""

    name = "heads"
    Options: ClassVar[type[AlgorithmOptions]] = HeadsOptions

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._head_first = options.head_steps + options.head_epochs > 0
        self.first_order = not self._head_first

    def staying(self) -> Collection[str]:
        return self.learner.head("heads.head", self.options.head)

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        of_head = self.options.head_epochs * steps_of_an_epoch(num_examples, self.options.batch_size) or self.options.head_steps
        steps = of_head + inner_steps(self.options, num_examples)
        return shuffled_epochs(num_examples, steps, self.options.batch_size, rng)

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        if not self._head_first:
            return super().contribute(meta, kept, episode, minibatches)
        batches, lr = list(minibatches.batches(episode)), self.options.inner_lr
        of_head = self._steps_of_head(len(batches))
        head = endpoint(self._beside(meta), kept, iter(batches[:of_head]), lr, self.optimizer)
        body = endpoint(self._beside(head), meta, iter(batches[of_head:]), lr, self.optimizer)
        # The query examples were trained on as well, so this is a training loss.
        return subtract(meta, body), loss_of(self.learner, {**body, **head}, episode.query), head

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps from the head `kept`. FedRep moves the head alone."""
        if not self._head_first:
            return super().personal_path(meta, kept, support, lr, steps)
        path = descend(self._beside(meta), kept, iter([support] * steps), lr)
        return ({**meta, **head} for head in path)

    def _steps_of_head(self, steps: int) -> int:
        """Return how many of a round's `steps` move the head alone."""
        epochs: int = self.options.head_epochs
        of_all: int = epochs + self.options.local_epochs
        return steps * epochs // of_all if epochs else int(self.options.head_steps)

    def _beside(self, fixed: Params) -> Loss:
        """Return the loss as a function of one part, while the other is `fixed`."""
        return built_on(self.learner.mean_loss, lambda part, batch: self.learner.loss({**fixed, **part}, batch))
