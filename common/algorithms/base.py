"""The one abstraction: an algorithm is two pure functions on the task's side and one optimizer step on the server's.

    adaptation_path(meta, support)        -> personal parameters after 0, 1, 2, ... steps   (training and evaluation)
    meta_gradient(meta, episode, minibatches) -> gradient of the meta-objective, same keys as meta, and the query loss
    server: meta <- outer.step(meta, weighted mean over tasks of meta_gradient)

`meta` is all that travels. An algorithm knows no data set and no model: it sees a `Learner`. The functions are written for one
task; `local_round` maps them over tasks with `torch.func.vmap`, so they must not look at values (`if loss > 1`) nor change
tensors in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad_and_value

from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import Summed
from quickbloom.common.maths.inner_loop import descend
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.options import Options


class AlgorithmOptions(Options):
    """Settings that every algorithm has: the rate of adaptation, and the server's optimizer."""

    inner_lr: float = Field(
        0.0, ge=0, description="learning rate of the inner loop (alpha in the papers); 0: what the data set recommends"
    )
    outer_optimizer: Literal["sgd", "adam"] = Field("adam", description="the server's optimizer")
    outer_lr: float = Field(3e-3, gt=0, description="learning rate of the server's optimizer")
    outer_momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the server's SGD; Adam's beta1 stays 0.9")
    outer_decay: bool = Field(False, description="let the server's learning rate fall linearly to 0 over the rounds")


class InnerLoopOptions(AlgorithmOptions):
    """Settings of an algorithm that takes gradient steps on the support set in training."""

    inner_steps: int = Field(5, ge=1, le=10_000, description="gradient steps of the inner loop in training (k)")


class ZeroHeadOptions(Options):
    """The setting of an algorithm that can leave the head out of the starting point.

    Which class is which differs from task to task, so what tasks do to a head that they share is mostly noise, and that noise
    reaches the body with the first step (Kao, Chiu, Chen 2022, "MAML is a Noisy Contrastive Learner in Classification").
    """

    zero_head: bool = Field(
        False, description="every task starts from a head of zeros, which the server never moves: helps where classes are drawn"
    )


class Algorithm(ABC):
    """One algorithm. Adding one is a new file with a subclass and one line in `ALGORITHMS`."""

    name: ClassVar[str]
    Options: ClassVar[type[AlgorithmOptions]]
    kinds: ClassVar[tuple[str, ...]] = ("classification", "regression")
    """What the algorithm is defined for; data of another kind are refused after the roll call."""
    tunes_inner_lr: ClassVar[bool] = True
    """Whether `inner_lr` changes what is trained, so that a comparison has to choose it."""
    uses_adapt_lr: ClassVar[bool] = True
    """Whether `adaptation_path` looks at `lr`."""

    per_step: ClassVar[tuple[str, ...]] = ()
    """Personal tensors [times, outputs] that are there only after some steps, the more of them the longer."""

    starts_from_meta: ClassVar[bool] = True
    """Whether a node needs of the model's numbers none but `meta`; else those of the freshly made one, too."""

    first_order: bool = False
    """Whether a round's inner loop is `first_order.end_of_descent`: then torch.compile betters nothing on known models."""

    @classmethod
    def model_outputs(cls, options: Any, outputs: int) -> int:
        """How many outputs the model must have on data with `outputs` classes or targets."""
        return outputs

    def __init__(self, options: Any, learner: Learner) -> None:
        if learner.kind not in self.kinds:
            raise ConfigError(
                f'`algorithm = "{self.name}"` is defined for {" and ".join(self.kinds)}, but these data are for '
                f"{learner.kind}: choose another algorithm or data set"
            )
        if options.inner_lr <= 0:
            raise ConfigError("`inner-lr` must be above 0 here: 0 stands for what a data set recommends, and none was asked")
        self.options = options
        self.learner = learner
        self._zeroed = self._last_layer() if getattr(options, "zero_head", False) else []

    @property
    def mixes_examples(self) -> bool:
        """Whether the prediction of an example depends on those that are predicted with it."""
        return self.learner.mixes_examples

    def init(self) -> Params:
        """The meta-parameters before the first round: all that travels."""
        return self.initial()

    def initial(self) -> Params:
        """The parameters of the freshly made model, with zeros for its head if `zero_head`."""
        return self.with_zero_head(self.learner.initial())

    def with_zero_head(self, params: Params) -> Params:
        """Parameters or a meta-gradient of them, with zeros for the head if `zero_head`."""
        return params | {name: torch.zeros_like(params[name]) for name in self._zeroed}

    def _last_layer(self) -> list[str]:
        try:
            return self.learner.head(f"{self.name}.zero-head", "auto")
        except ConfigError:
            raise ConfigError(
                f"`{self.name}.zero-head` needs a model with parameters before its last layer, and this one is nothing but a "
                "head: set it to false, or choose another `model`"
            ) from None

    def fresh(self) -> Params:
        """What a task that is new to its node starts to keep there from round to round; {}: nothing, no state."""
        return {}

    def weight(self, num_examples: int) -> float:
        """How much a task with `num_examples` (support and query) counts in the server's mean."""
        return 1.0

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any] | None:
        """Which examples every inner step uses: [steps, batch] positions in support-then-query; None: no minibatches.

        Drawn outside the mapped functions, because randomness must come from (seed, round, task).
        """
        return None

    @abstractmethod
    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        """(g, loss): one task's contribution with the keys and shapes of `meta`, and its query loss after adaptation."""

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        """(g, loss, kept): `meta_gradient` of a task that may keep something on its node, and what it keeps from now on."""
        gradient, loss = self.meta_gradient(meta, episode, minibatches)
        return self.with_zero_head(gradient), loss, kept

    def sum_up(self, meta: Params, episode: Episode, minibatches: Minibatches, weights: Tensor, clip: float) -> Summed | None:
        """What stacked tasks that keep nothing `contribute`, summed up in one go; None: there is no way to do so.

        `weights` [tasks] are float64; each contribution is scaled down to the norm `clip` first, if that is above 0.
        """
        return None

    def sums_up_as(self, other: "type[Algorithm]", clip: float) -> bool:
        """Whether tasks contribute what they do in the algorithm `other`, and not what a subclass makes of that.

        With a head of zeros not where they are clipped: the head would count in their norms.
        """
        own = type(self)
        names = ("meta_gradient", "contribute", "with_zero_head")
        same = all(getattr(own, name) is getattr(other, name) for name in names)
        return same and not (clip and self._zeroed)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Personal parameters after 0, 1, .. `steps` gradient steps on the whole support set. The last one is personal."""
        return descend(self.learner.loss, meta, iter([support] * steps), lr)

    def passing_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """As `adaptation_path`, for somebody who has done with each of its parameters before asking for the next.

        These may be written over the ones before, which spares the memory of one model; no gradient is taken through them.
        """
        if type(self).adaptation_path is not Algorithm.adaptation_path:
            return self.adaptation_path(meta, support, lr, steps)
        return descend(self.learner.loss, meta, iter([support] * steps), lr, passing=True)

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """As `adaptation_path`, for a task that kept something on its node in training; `kept`: `fresh()` if it did not."""
        return self.adaptation_path(meta, support, lr, steps)

    def predict(self, personal: Params, x: Tensor) -> Tensor:
        """Outputs of personal parameters for the inputs `x` [n, ...]: the largest of [n, classes], or values [n, outputs]."""
        return self.learner.apply(personal, x)

    def score(self, personal: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, accuracy or mean squared error) of personal parameters on `batch`; two scalars."""
        return self.learner.score(personal, batch)


class ObjectiveAlgorithm(Algorithm):
    """An algorithm whose contribution is the exact gradient of one objective: g = grad_theta objective(theta, episode)."""

    @abstractmethod
    def objective(self, meta: Params, episode: Episode) -> Tensor:
        """The query loss of one task as a differentiable function of the meta-parameters; a scalar."""

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        gradient, loss = grad_and_value(self.objective)(meta, episode)
        return gradient, loss
