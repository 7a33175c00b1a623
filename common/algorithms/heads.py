"""Task-specific heads: FedPer (Arivazhagan et al. 2019) and FedRep (Collins, Hassani, Mokhtari, Shakkottai 2021, Algorithm 1).

The body travels and is averaged; the head never leaves the node and stays there from round to round. FedPer
moves body and head together in k steps. FedRep (`head-steps` above 0) first moves the head alone for that
many steps, then the body alone for k. Every new task starts from the same fresh head. g = body of theta -
phi_k.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import LocalSgd, LocalSgdOptions, inner_steps, shuffled_epochs, steps_of_an_epoch
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import end_of_descent, loss_of
from quickbloom.common.maths.inner_loop import descend, last
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params, subtract
from quickbloom.common.options import Text


class HeadsOptions(LocalSgdOptions):
    head: Text = Field("auto", description='comma-separated name prefixes of the parameters that stay; "auto": the last layer')
    head_steps: int = Field(
        0, ge=0, le=10_000, description="FedRep: steps of the head alone, before those of the body; 0: FedPer"
    )
    head_epochs: int = Field(0, ge=0, le=1000, description="FedRep: epochs of the head alone, with `local-epochs` of the body")
    outer_optimizer: Literal["sgd", "adam"] = Field("sgd", description="the server's optimizer")
    outer_lr: float = Field(1.0, gt=0, description="learning rate of the server; 1 replaces the body by the mean")

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if self.head_epochs and (self.head_steps or not self.local_epochs):
            raise ValueError(
                "`heads.head-epochs` goes with `heads.local-epochs` above 0 and `heads.head-steps = 0`, got "
                f"local-epochs {self.local_epochs} and head-steps {self.head_steps}: count both in steps, or both in epochs"
            )
        return self


class Heads(LocalSgd):
    """FedPer and FedRep: g = body of theta - phi_k; the head of phi_k is kept on the node."""

    name = "heads"
    Options: ClassVar[type[AlgorithmOptions]] = HeadsOptions
    starts_from_meta = False

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self._head = learner.head("heads.head", options.head)
        self._head_first = options.head_steps + options.head_epochs > 0
        self.first_order = not self._head_first

    def init(self) -> Params:
        return {name: value for name, value in self.learner.initial().items() if name not in self._head}

    def fresh(self) -> Params:
        return {name: value for name, value in self.learner.initial().items() if name in self._head}

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        of_head = self.options.head_epochs * steps_of_an_epoch(num_examples, self.options.batch_size) or self.options.head_steps
        steps = of_head + inner_steps(self.options, num_examples)
        return shuffled_epochs(num_examples, steps, self.options.batch_size, rng)

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        gradient, loss, _ = self.contribute(meta, self.fresh(), episode, minibatches)
        return gradient, loss

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        lr = self.options.inner_lr
        if self._head_first:
            batches = list(minibatches.batches(episode))
            of_head = self._steps_of_head(len(batches))
            head = last(self._descend_part(kept, meta, batches[:of_head], lr))
            body = last(self._descend_part(meta, head, batches[of_head:], lr))
        else:
            phi = end_of_descent(self.learner, {**meta, **kept}, minibatches.of(episode), lr)
            body, head = ({name: phi[name] for name in part} for part in (meta, kept))
        # The query examples were trained on as well, so this is a training loss.
        return subtract(meta, body), loss_of(self.learner, {**body, **head}, episode.query), head

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps from a fresh head. FedRep moves the head alone."""
        return self.personal_path(meta, self.fresh(), support, lr, steps)

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield full parameters after 0, 1, .. `steps` steps from the head `kept`. FedRep moves the head alone."""
        batches = [support] * steps
        if self._head_first:
            for head in self._descend_part(kept, meta, batches, lr):
                yield {**meta, **head}
        else:
            yield from self._descend_part({**meta, **kept}, {}, batches, lr)

    def _steps_of_head(self, steps: int) -> int:
        """Return how many of a round's `steps` move the head alone."""
        epochs: int = self.options.head_epochs
        of_all: int = epochs + self.options.local_epochs
        return steps * epochs // of_all if epochs else int(self.options.head_steps)

    def _descend_part(self, moving: Params, fixed: Params, batches: list[Batch], lr: float | Tensor) -> Iterator[Params]:
        def loss(part: Params, batch: Batch) -> Tensor:
            return self.learner.loss({**fixed, **part}, batch)

        return descend(loss, moving, iter(batches), lr)
