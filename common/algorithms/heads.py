"""Task-specific heads: FedPer (Arivazhagan et al. 2019) and FedRep (Collins, Hassani, Mokhtari, Shakkottai 2021, Algorithm 1).

The body travels and is averaged; the head never leaves the node and stays there from round to round. FedPer
moves body and head together in k steps. FedRep (`head-steps` above 0) first moves the head alone for that
many steps, then the body alone for k. Every new task starts from the same fresh head. g = body of theta -
phi_k.
"""

from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import AveragedOptions, shuffled_epochs
from quickbloom.common.algorithms.part_stays import PartStays
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import loss_of
from quickbloom.common.maths.inner_loop import descend, last
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params, subtract
from quickbloom.common.options import Text


class HeadsOptions(AveragedOptions):
    head: Text = Field("auto", description='comma-separated name prefixes of the parameters that stay; "auto": the last layer')
    head_steps: int = Field(
        0, ge=0, le=10_000, description="FedRep: steps of the head alone, before those of the body; 0: FedPer"
    )


class Heads(PartStays):
    """FedPer and FedRep: g = body of theta - phi_k; the head of phi_k is kept on the node."""

    name = "heads"
    Options: ClassVar[type[AlgorithmOptions]] = HeadsOptions

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self.first_order = options.head_steps == 0

    def staying(self) -> Collection[str]:
        return self.learner.head("heads.head", self.options.head)

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        steps = self.options.head_steps + self.options.inner_steps
        return shuffled_epochs(num_examples, steps, self.options.batch_size, rng)

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        lr, of_head = self.options.inner_lr, self.options.head_steps
        if not of_head:
            return super().contribute(meta, kept, episode, minibatches)
        batches = list(minibatches.batches(episode))
        head = last(self._descend_part(kept, meta, batches[:of_head], lr))
        body = last(self._descend_part(meta, head, batches[of_head:], lr))
        # The query examples were trained on as well, so this is a training loss.
        return subtract(meta, body), loss_of(self.learner, {**body, **head}, episode.query), head

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps from the head `kept`. FedRep moves the head alone."""
        if not self.options.head_steps:
            return super().personal_path(meta, kept, support, lr, steps)
        return ({**meta, **head} for head in self._descend_part(kept, meta, [support] * steps, lr))

    def _descend_part(self, moving: Params, fixed: Params, batches: list[Batch], lr: float | Tensor) -> Iterator[Params]:
        def loss(part: Params, batch: Batch) -> Tensor:
            return self.learner.loss({**fixed, **part}, batch)

        return descend(loss, moving, iter(batches), lr)
