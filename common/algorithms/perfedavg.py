"""Per-FedAvg (Fallah, Mokhtari, Ozdaglar 2020, "Personalized Federated Learning with Theoretical Guarantees", Algorithm 1).

A task takes tau local meta-steps on the MAML objective of one inner step, and sends theta - w_tau:

    w <- w - beta (I - alpha H(w)) v,    v = grad L_Q(w - alpha grad L_S(w)),    H = Hessian of L_S

`variant = "fo"` drops H; `"hf"` (Hessian-free) multiplies H with v without forming it. Here that product is exact; the paper
approximates it with a difference of two gradients. The paper draws three independent batches for every local step. Here all
steps of a round share one draw of support and query, or with a `batch-size` every step draws two batches from all examples of
the task: L_S is of the first, with its Hessian, and L_Q of the second.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import shuffled_epochs, steps_of_an_epoch
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import Summed, gradient_and_loss, gradient_and_product, loss_of, sum_of_meta_steps
from quickbloom.common.maths.params import Params, add, subtract


class PerFedAvgOptions(AlgorithmOptions):
    variant: Literal["fo", "hf"] = Field("hf", description="fo: first order; hf: with the Hessian-vector product")
    local_steps: int = Field(5, ge=1, le=10_000, description="local meta-steps of a task in a round (tau)")
    local_lr: float = Field(0.0, ge=0, description="learning rate of the local meta-steps (beta); 0: the same as `inner-lr`")
    batch_size: int = Field(
        0, ge=0, description="examples of each of a local meta-step's two batches; 0: the whole support and the whole query"
    )
    local_epochs: int = Field(
        0, ge=0, le=1000, description="epochs over a task's own examples in place of `local-steps`, with a `batch-size`"
    )
    outer_optimizer: Literal["sgd", "adam"] = Field("sgd", description="the server's optimizer")
    outer_lr: float = Field(1.0, gt=0, description="learning rate of the server; 1 replaces the model by the mean")

    @model_validator(mode="after")
    def _epochs_are_of_batches(self) -> Self:
        if self.local_epochs and not self.batch_size:
            raise ValueError(
                f"`perfedavg.local-epochs` must be 0 without `perfedavg.batch-size`, got {self.local_epochs}: set both, or "
                "count in `perfedavg.local-steps`"
            )
        return self


class PerFedAvg(Algorithm):
    """g = theta - w_tau after tau local meta-steps."""

    name = "perfedavg"
    Options: ClassVar[type[AlgorithmOptions]] = PerFedAvgOptions

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any] | None:
        size = 2 * self.options.batch_size
        if not size:
            return None
        steps = self.options.local_epochs * steps_of_an_epoch(num_examples, size) or self.options.local_steps
        return shuffled_epochs(num_examples, steps, size, rng)

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        w, beta = meta, self.options.local_lr or self.options.inner_lr
        for draw in self._draws(episode, minibatches):
            w = add(w, self.local_meta_gradient(w, draw), -beta)
        gradient, _ = gradient_and_loss(self.learner, w, episode.support)
        return subtract(meta, w), loss_of(self.learner, add(w, gradient, -self.options.inner_lr), episode.query)

    def sum_up(self, meta: Params, episode: Episode, minibatches: Minibatches, weights: Tensor, clip: float) -> Summed | None:
        if self.options.batch_size or not self.sums_up_as(PerFedAvg, clip, "local_meta_gradient", "_draws"):
            return None
        steps, alpha, beta = self.options.local_steps, self.options.inner_lr, self.options.local_lr or self.options.inner_lr
        exact = self.options.variant == "hf"
        return sum_of_meta_steps(self.learner, meta, episode, steps, alpha, beta, weights, clip, exact=exact)

    def _draws(self, episode: Episode, minibatches: Minibatches) -> Iterator[Episode]:
        """Yield what every local meta-step is taken on."""
        if not self.options.batch_size:
            yield from [episode] * self.options.local_steps
            return
        for batch in minibatches.batches(episode):
            # Every other example, since what is padded of a small task stands at the end.
            yield Episode(*(Batch(*(values[first::2] for values in batch)) for first in (0, 1)))

    def local_meta_gradient(self, w: Params, episode: Episode) -> Params:
        """Return (I - alpha H(w)) v, or v alone if `variant` is "fo"."""
        alpha = self.options.inner_lr
        if self.options.variant == "fo":
            gradient, _ = gradient_and_loss(self.learner, w, episode.support)
            return gradient_and_loss(self.learner, add(w, gradient, -alpha), episode.query)[0]
        gradient, times_hessian = gradient_and_product(self.learner, w, episode.support)
        v, _ = gradient_and_loss(self.learner, add(w, gradient, -alpha), episode.query)
        return add(v, times_hessian(v), -alpha)
