"""Base of FedAvg and Reptile: k SGD steps on a task's own examples; g is the difference between start and end."""

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, InnerLoopOptions
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Episode, Minibatches
from quickbloom.common.maths.fast_paths import Summed, end_of_descent, has_kernels, loss_of, sum_of_descents
from quickbloom.common.maths.inner_loop import InnerOptimizer
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.options import refuse_idle


class LocalSgdOptions(InnerLoopOptions):
    inner_steps: int = Field(10, ge=1, le=10_000, description="gradient steps of the inner loop in training (k)")
    batch_size: int = Field(10, ge=0, description="examples per inner step; 0: all examples of the task in every step")
    local_epochs: int = Field(
        0, ge=0, le=1000, description="epochs over a task's own examples in place of `inner-steps`; 0: so many steps for all"
    )
    inner_optimizer: Literal["sgd", "momentum", "adam"] = Field(
        "sgd", description="optimizer of the local steps in training; it starts anew in every round; users adapt by plain steps"
    )
    inner_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the local steps, or Adam's beta1; not for sgd")


class AveragedOptions(LocalSgdOptions):
    """Settings of an algorithm whose server takes the mean of what the tasks have after their steps."""

    outer_optimizer: Literal["sgd", "adam"] = Field("sgd", description="the server's optimizer")
    outer_lr: float = Field(1.0, gt=0, description="learning rate of the server; 1 replaces what travels by the mean")


class LocalSgd(Algorithm):
    """g = theta - phi_k after k SGD steps on minibatches of support and query together."""

    first_order = True
    plain_steps: ClassVar[bool] = True
    """True if the local steps have to be those of SGD. Other optimizers are refused then."""

    @classmethod
    def check_options(cls, options: Any) -> None:
        super().check_options(options)
        if _optimizer(cls, options).plain:
            refuse_idle(options, ["inner-momentum"], 'with `inner-optimizer = "sgd"`', cls.name)

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        self.optimizer = _optimizer(type(self), options)
        self.descends_in_place = self.optimizer.plain

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        steps = inner_steps(self.options, num_examples)
        return shuffled_epochs(num_examples, steps, self.options.batch_size, rng)

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        phi = end_of_descent(self.learner, meta, minibatches.of(episode), self.options.inner_lr, self.optimizer)
        # The query examples were trained on as well, so this is a training loss.
        loss = loss_of(self.learner, phi, episode.query)
        # theta - phi, written in place: phi was made here and is not used again.
        return {name: value.neg_().add_(meta[name]) for name, value in phi.items()}, loss

    def sum_up(self, meta: Params, episode: Episode, minibatches: Minibatches, weights: Tensor, clip: float) -> Summed | None:
        if not self.optimizer.plain or not self.sums_up_as(LocalSgd, clip) or not has_kernels(self.learner):
            return None
        batches, lr = minibatches.of(episode, axis=1), self.options.inner_lr
        return sum_of_descents(self.learner, meta, batches, episode.query, lr, weights, clip)


def _optimizer(algorithm: type[LocalSgd], options: Any) -> InnerOptimizer:
    """Return the optimizer of the local steps. Raises ConfigError for one that the algorithm has no steps of."""
    optimizer = InnerOptimizer(options.inner_optimizer, options.inner_momentum)
    if algorithm.plain_steps and not optimizer.plain:
        raise ConfigError(
            f'`{algorithm.name}.inner-optimizer` must be "sgd", as the paper of {algorithm.name} has it, got '
            f'"{options.inner_optimizer}": leave it out, or choose `fedavg`, `reptile`, `heads` or `ditto`'
        )
    return optimizer


class KeepsState(LocalSgd):
    """Base of algorithms whose tasks keep something on their node: a subclass writes `fresh` and `contribute`."""

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        gradient, loss, _ = self.contribute(meta, self.fresh(), episode, minibatches)
        return gradient, loss


def inner_steps(options: LocalSgdOptions, num_examples: int) -> int:
    """Return the number of inner steps of a task in a round: `inner-steps`, or those of `local-epochs` over its examples."""
    return options.local_epochs * steps_of_an_epoch(num_examples, options.batch_size) or options.inner_steps


def steps_of_an_epoch(num_examples: int, batch_size: int) -> int:
    """Return the number of whole batches in one epoch, at least 1: what is left over waits for the next shuffle."""
    return num_examples // min(batch_size or num_examples, num_examples)


def shuffled_epochs(num_examples: int, steps: int, batch_size: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return [steps, batch] positions from shuffled epochs; no example repeats within a batch.

    A batch has at most `num_examples` examples. `batch_size` 0 means all examples in every step.
    """
    size = min(batch_size or num_examples, num_examples)
    per_epoch = steps_of_an_epoch(num_examples, batch_size)
    epochs = -(-steps // per_epoch)
    # Sorting random numbers gives permutations; all epochs at once cost a quarter of one permutation after another.
    walk = rng.random((epochs, num_examples)).argsort(axis=1)[:, : per_epoch * size]
    return walk.reshape(-1, size)[:steps]
