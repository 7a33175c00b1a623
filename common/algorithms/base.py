"""Algorithm, the one abstraction: two pure functions on the task's side and one optimizer step on the server's.

    adaptation_path(meta, support)        -> personal parameters after 0, 1, 2, ... steps   (training and evaluation)
    meta_gradient(meta, episode, minibatches) -> gradient of the meta-objective, same keys as meta, and the query loss
    server: meta <- outer.step(meta, weighted mean over tasks of meta_gradient)

`meta` is all that travels. An algorithm knows no data set and no model: it sees a `Learner`. The functions
are written for one task. A round maps them over tasks with `torch.func.vmap`, so they must not branch on
values (`if loss > 1`) or change tensors in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.embedding import Embedding, sum_of_embedded
from quickbloom.common.maths.fast_paths import Summed, scores_along
from quickbloom.common.maths.inner_loop import descend, gradient_and_value, last
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.light_torch import spare_the_compiler
from quickbloom.common.maths.params import Params
from quickbloom.common.options import Options, refuse_idle

spare_the_compiler()


class AlgorithmOptions(Options):
    """Settings of every algorithm: the learning rate of adaptation, and the server's optimizer."""

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


class ClosedFormOptions(AlgorithmOptions):
    """Settings of an algorithm that solves for the head on the support set: a rate for what else is to learn."""

    outer_lr: float = Field(
        0.0,
        ge=0,
        description="learning rate of the server's optimizer; 0: 0.02 for a model that is one linear layer, else 0.003",
    )

    def with_rate(self, *, one_layer: bool) -> "ClosedFormOptions":
        """Return the settings with a rate: `one_layer` says whether the model has nothing before its head."""
        return self if self.outer_lr else self.model_copy(update={"outer_lr": 0.02 if one_layer else 0.003})


class ZeroHeadOptions(Options):
    """Setting of an algorithm that can leave the head out of the starting point.

    The meaning of a class index differs from task to task, so a shared head collects mostly noise. The first
    inner step carries that noise into the body (Kao, Chiu, Chen 2022, "MAML is a Noisy Contrastive Learner in
    Classification").
    """

    zero_head: bool = Field(
        False, description="every task starts from a head of zeros, which the server never moves: helps where classes are drawn"
    )


class ServerStep(NamedTuple):
    """What the server does with the mean of a round's contributions.

    `gradient`: what the outer optimizer steps along, for some or all of the meta-parameters. `placed`: new values of others,
    which the optimizer does not touch. `state`: what the server keeps and does not send, see `Algorithm.server_state`.
    """

    gradient: Params
    placed: Params
    state: Params


class Algorithm(ABC):
    """Base class of the algorithms. A new one is a file with a subclass, and one line in `ALGORITHMS`."""

    name: ClassVar[str]
    Options: ClassVar[type[AlgorithmOptions]]
    kinds: ClassVar[tuple[str, ...]] = ("classification", "regression")
    """Kinds of data that the algorithm is defined for. Other data are refused after the roll call."""
    tunes_inner_lr: ClassVar[bool] = True
    """True if `inner_lr` affects training, so that a comparison has to tune it."""
    uses_adapt_lr: ClassVar[bool] = True
    """True if `adaptation_path` uses `lr`."""

    model_for_tables: ClassVar[str] = "mlp"
    """Model for `model = "auto"` where a data set recommends none and the inputs are no images."""

    per_step: ClassVar[tuple[str, ...]] = ()
    """Names of personal tensors with any number of rows: of examples, or of steps, where they are [steps, outputs] and appear
    only after some."""

    takes_new_classes: ClassVar[bool] = False
    """True if a task may have classes that training never saw, see `with_classes`."""

    starts_from_meta: ClassVar[bool] = True
    """True if a node needs only `meta`; False if it also needs the numbers of the freshly initialised model."""

    embeds: ClassVar[bool] = False
    """True if the model is to give an embedding, of its own size if it has one, see `Model.embedding`."""

    needs_mean: ClassVar[str] = ""
    """Why the server must be given the mean of the contributions as they are, for a message to people; "": it need not.

    Rules against liars and privacy, which change it, are refused then."""

    needs_whole: ClassVar[bool] = False
    """True if no contribution may count in part, or be left out every round, because a task keeps all of what it tells the
    server: see `needs_mean`."""

    has_outer_step: ClassVar[bool] = True
    """False if nothing travels that the server's optimizer could move, so that its settings decide nothing."""

    descends_in_place: bool = False
    """True if a task that is computed by itself is trained by plain steps, most of them in place, see `inner_loop.endpoint`."""

    first_order: bool = False
    """True if the inner loop of training is `fast_paths.end_of_descent`. On known models torch.compile then brings no gain."""

    @classmethod
    def model_outputs(cls, options: Any, outputs: int) -> int:
        """Return the number of outputs the model needs for data with `outputs` classes or targets."""
        return outputs

    @classmethod
    def check_options(cls, options: Any) -> None:
        """Raise ConfigError for settings of its table that cannot work, or that decide nothing beside the others."""
        if not cls.has_outer_step:
            keys = ("outer-optimizer", "outer-lr", "outer-momentum", "outer-decay")
            refuse_idle(options, keys, "because no weights travel that the server could move", cls.name)
        elif options.outer_optimizer != "sgd":
            why = f'with `outer-optimizer = "{options.outer_optimizer}"`, whose own beta1 is 0.9'
            refuse_idle(options, ["outer-momentum"], why, cls.name)
        if getattr(options, "local_epochs", 0):
            counted = [name for name in ("inner-steps", "local-steps") if hasattr(options, name.replace("-", "_"))]
            refuse_idle(options, counted[-1:], "with `local-epochs`, which count the same steps in epochs", cls.name)

    def __init__(self, options: Any, learner: Learner) -> None:
        if learner.kind not in self.kinds:
            raise ConfigError(
                f'`algorithm = "{self.name}"` is defined for {" and ".join(self.kinds)}, but these data are for '
                f"{learner.kind}: choose another algorithm or data set"
            )
        if options.inner_lr <= 0:
            raise ConfigError("`inner-lr` must be above 0 here: 0 means the recommendation of a data set, and there is none")
        self.options = options
        self.learner = learner
        self._zeroed = self._last_layer() if getattr(options, "zero_head", False) else []

    @property
    def mixes_examples(self) -> bool:
        """True if the prediction for one example depends on the others in its batch, unless parameters are `settled`."""
        return self.learner.mixes_examples

    def mixes(self, personal: Params) -> bool:
        """Return whether the prediction for one example depends on the others in its batch, with these parameters."""
        return not self.learner.has_statistics(personal)

    def settled(self, personal: Params, support: Batch) -> Params:
        """Return personal parameters with the support set's statistics of batch norm, by which all else is then normalised.

        They stay as they are for a model without such layers, and if it is `transductive`.
        """
        if self.learner.transductive:
            return personal
        return {**personal, **self.learner.statistics(personal, support.x)}

    def settled_path(self, path: Iterator[Params], support: Batch) -> Iterator[Params]:
        """Yield the elements of a path `settled`; one that is repeated is the same object again."""
        if self.learner.transductive or not self.learner.mixes_examples:
            yield from path
            return
        before, found = None, {}
        for phi in path:
            found = found if phi is before else self.settled(phi, support)
            before = phi
            yield found

    def init(self) -> Params:
        """Return the meta-parameters before the first round: all that travels."""
        return self.initial()

    def initial(self) -> Params:
        """Return the parameters of the freshly initialised model, with a head of zeros if `zero_head`."""
        return self.with_zero_head(self.learner.initial())

    def with_zero_head(self, params: Params) -> Params:
        """Return parameters, or a meta-gradient, with zeros for the head if `zero_head`."""
        return params | {name: torch.zeros_like(params[name]) for name in self._zeroed}

    def _last_layer(self) -> list[str]:
        try:
            return self.learner.head(f"{self.name}.zero-head", "auto")
        except ConfigError:
            raise ConfigError(
                f"`{self.name}.zero-head` needs a model with parameters before its last layer, and this one is nothing but a "
                "head: set it to false, or choose another `model`"
            ) from None

    def with_classes(self, meta: Params, sources: Sequence[int | None]) -> Params:
        """Return the meta-parameters of a run on other classes for this algorithm, if it `takes_new_classes`.

        `sources`: for each class here its place in the run, None for a class that training never saw.
        """
        return meta

    def fresh(self) -> Params:
        """Return the state that a new task starts with on its node, kept there from round to round; {} for no state."""
        return {}

    def weight(self, num_examples: int) -> float:
        """Return the weight in the server's mean of a task with `num_examples` examples (support and query)."""
        return 1.0

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any] | None:
        """Return the examples of every inner step: [steps, batch] positions in support-then-query; None: no minibatches.

        Drawn outside the mapped functions, because randomness must derive from (seed, round, task).
        """
        return None

    @abstractmethod
    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        """Return one task's contribution g, with the keys and shapes of `meta`, and its query loss after adaptation."""

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        """Return (g, loss, kept): `meta_gradient` for a task with state on its node, and the task's new state."""
        gradient, loss = self.meta_gradient(meta, episode, minibatches)
        return self.with_zero_head(gradient), loss, kept

    def sum_up(self, meta: Params, episode: Episode, minibatches: Minibatches, weights: Tensor, clip: float) -> Summed | None:
        """Return the weighted sum of the contributions of stacked tasks without state; None if there is no fast path.

        `weights` [tasks] are float64. Each contribution is first scaled down to the norm `clip`, if that is
        above 0.
        """
        return None

    def sums_up_as(self, other: type[Any], clip: float, *more: str) -> bool:
        """Return whether the contributions are computed by `other`'s code, with no method overridden by a subclass.

        `more`: methods of `other` that count beside those of all algorithms. False for a head of zeros with clipping: the head
        would count in the norms.
        """
        own = type(self)
        names = ("meta_gradient", "contribute", "with_zero_head", *more)
        same = all(getattr(own, name) is getattr(other, name) for name in names)
        return same and not (clip and self._zeroed)

    def server_state(self) -> Params:
        """Return what the server keeps beside the meta-parameters and never sends, before the first round; {} for nothing."""
        return {}

    def server_step(self, meta: Params, state: Params, mean: Params, share: float) -> ServerStep:
        """Return what the server does with the `mean` of the contributions: by itself all is the outer optimizer's.

        `meta` and `state`: as they are before this step. `share`: part of the training tasks that contributed; under privacy
        the part that is expected to.
        """
        return ServerStep(mean, {}, state)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield personal parameters after 0, 1, .. `steps` gradient steps on the whole support set.

        The last are the personal parameters to predict with.
        """
        return descend(self.learner.mean_loss, meta, iter([support] * steps), lr)

    def passing_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Like `adaptation_path`, but each result is valid only until the next is requested.

        A result may be overwritten by the next, which saves the memory of one model. No gradient can be taken
        through it.
        """
        if type(self).adaptation_path is not Algorithm.adaptation_path:
            return self.adaptation_path(meta, support, lr, steps)
        return descend(self.learner.mean_loss, meta, iter([support] * steps), lr, passing=True)

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Like `adaptation_path`, for a task with the state `kept` on its node. One that never trained has none."""
        return self.adaptation_path(meta, support, lr, steps)

    def predict(self, personal: Params, x: Tensor) -> Tensor:
        """Return the outputs of personal parameters for the inputs `x` [n, ...].

        These are scores [n, classes], the largest of which is the predicted class, or values [n, outputs].
        """
        return self.learner.apply(personal, x)

    def predictable(self, personal: Params) -> Tensor | None:
        """Return which classes personal parameters can predict, bool [classes]; None: all of them."""
        return None

    def deviation(self, personal: Params, x: Tensor) -> Tensor | None:
        """Return the standard deviations of the predictions for `x` [n, outputs]; None if the algorithm knows none."""
        return None

    def score(self, personal: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (loss, accuracy or mean squared error) of personal parameters on `batch`; two scalars."""
        return self.learner.score(personal, batch)

    def scores_along(self, meta: Params, lrs: Tensor, support: Batch, test: Batch, steps: int) -> tuple[Tensor, Tensor] | None:
        """Return the scores of stacked new tasks along `adaptation_path`, each [tasks, rates, steps + 1], by a faster way.

        None if there is none. There is for gradient steps of the model itself, whose predictions depend on no other example.
        """
        own = type(self)
        same = all(getattr(own, name) is getattr(Algorithm, name) for name in ("adaptation_path", "passing_path", "score"))
        if not same or self.learner.mixes_examples or not self.learner.uses_kernels:
            return None
        return scores_along(self.learner, meta, lrs, support, test, steps)


class ObjectiveAlgorithm(Algorithm):
    """Algorithm whose contribution is the exact gradient of one objective: g = grad_theta objective(theta, episode)."""

    @abstractmethod
    def objective(self, meta: Params, episode: Episode) -> Tensor:
        """Return the query loss of one task as a differentiable function of the meta-parameters; a scalar."""

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        return gradient_and_value(self.objective, meta, episode)


class EmbeddingAlgorithm(ObjectiveAlgorithm):
    """Algorithm whose objective needs the model at theta alone: what it makes of the support and query examples.

    Their embeddings are computed once, by the kernels where they can, and the rest of the objective on these.
    """

    @abstractmethod
    def embedding(self) -> Embedding:
        """Return what embeds the examples."""

    @abstractmethod
    def objective_on(self, meta: Params, embedded: Episode) -> Tensor:
        """Return the query loss, given embeddings [n, embedding] in place of the inputs; a scalar.

        `meta` may lack the parameters of the embedding.
        """

    def objective(self, meta: Params, episode: Episode) -> Tensor:
        if not self.is_of_embeddings():
            loss, _ = self.score(last(self.adaptation_path(meta, episode.support, 0.0, 1)), episode.query)
            return loss
        return self.objective_on(meta, self.embedding().embedded(meta, episode))

    def is_of_embeddings(self) -> bool:
        """Return whether the objective is `objective_on`; else it is the score after one step of `adaptation_path`.

        It is unless a subclass of the class that defines `objective_on` adapts, predicts or scores in another way.
        """
        own = next(one for one in type(self).__mro__ if "objective_on" in vars(one))
        names = ("adaptation_path", "predict", "score")
        return type(self.learner) is Learner and all(getattr(type(self), name) is getattr(own, name) for name in names)

    def sum_up(self, meta: Params, episode: Episode, minibatches: Minibatches, weights: Tensor, clip: float) -> Summed | None:
        if not (self.is_of_embeddings() and self.sums_up_as(EmbeddingAlgorithm, clip, "objective")):
            return None
        return sum_of_embedded(self.embedding(), self.objective_on, meta, episode, weights, clip)
