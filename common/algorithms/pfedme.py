"""pFedMe (Dinh, Tran, Nguyen 2020, "Personalized Federated Learning with Moreau Envelopes", Algorithm 1).

Repeat R times on a task: draw a minibatch D; solve phi = argmin L_D(phi) + lambda / 2 ||phi - w||^2
approximately by k proximal gradient steps; move w <- w - eta lambda (w - phi), a step along the gradient of
the Moreau envelope. g = theta - w_R; `outer_lr` is the paper's beta. The personal parameters solve the same
problem on the support set.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions, InnerLoopOptions
from quickbloom.common.algorithms.local_sgd import shuffled_epochs, steps_of_an_epoch
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.inner_loop import descend_towards, endpoint_towards
from quickbloom.common.maths.params import Params, add, subtract


class PFedMeOptions(InnerLoopOptions):
    local_steps: int = Field(10, ge=1, le=10_000, description="local rounds of a task in a round (R)")
    local_epochs: int = Field(
        0, ge=0, le=1000, description="epochs over a task's own examples in place of `local-steps`; 0: so many steps for all"
    )
    local_lr: float = Field(5.0, gt=0, description="learning rate of the local rounds (eta)")
    strength: float = Field(0.1, gt=0, description="how strongly personal parameters are drawn to the local ones (lambda)")
    batch_size: int = Field(10, ge=0, description="examples per local round; 0: all examples of the task")
    outer_optimizer: Literal["sgd", "adam"] = Field("sgd", description="the server's optimizer")
    outer_lr: float = Field(1.0, gt=0, description="how far the server moves towards the mean of the tasks (beta)")

    @model_validator(mode="after")
    def _moves_towards_the_solution(self) -> Self:
        if self.local_lr * self.strength >= 2:
            raise ValueError(
                "`pfedme.local-lr` times `pfedme.strength` must be below 2, or the local rounds diverge, "
                f"got {self.local_lr * self.strength:g}"
            )
        return self


class PFedMe(Algorithm):
    """g = theta - w_R after R steps along the gradient of the Moreau envelope."""

    name = "pfedme"
    Options: ClassVar[type[AlgorithmOptions]] = PFedMeOptions
    descends_in_place = True

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        size = self.options.batch_size
        steps = self.options.local_epochs * steps_of_an_epoch(num_examples, size) or self.options.local_steps
        return shuffled_epochs(num_examples, steps, size, rng)

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        w = phi = meta
        loss, lr, strength = self.learner.mean_loss, self.options.inner_lr, self.options.strength
        for batch in minibatches.batches(episode):
            phi = endpoint_towards(loss, w, w, iter([batch] * self.options.inner_steps), lr, strength)
            w = add(w, subtract(w, phi), -self.options.local_lr * strength)
        # The query examples were trained on as well, so this is a training loss.
        return subtract(meta, w), self.learner.loss(phi, episode.query)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the proximal gradient steps from `meta` towards the proximal point of the loss on `support`."""
        return descend_towards(self.learner.mean_loss, meta, meta, iter([support] * steps), lr, self.options.strength)
