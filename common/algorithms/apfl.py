"""APFL (Deng, Kamani, Mahdavi 2020, "Adaptive Personalized Federated Learning", Algorithm 1 and Equation 10).

A task predicts with the mixture alpha v + (1 - alpha) w of a personal model v, which stays on its node with alpha, and of the
server's model w. In each of k steps

    w <- w - eta grad L(w),   v <- v - eta alpha grad L(mixture),   alpha <- alpha - eta <v - w, grad L(mixture)>, within [0, 1]

so that v and alpha follow the gradient of the mixture's loss. g = theta - w_k; tasks weigh the same. A task that was never
trained starts its v at theta. One that trains for the first time starts it at the model before the first round.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import AveragedOptions, KeepsState
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.inner_loop import slope
from quickbloom.common.maths.params import Params, add, dot, subtract

MIXING = "apfl/mixing"
"""Name of alpha among what a task keeps: one number."""


class ApflOptions(AveragedOptions):
    mixing: float = Field(0.5, ge=0, le=1, description="share of the personal model in a task's predictions at first (alpha)")
    adaptive: bool = Field(True, description="every task learns its own share by gradient steps")


class Apfl(KeepsState):
    """g = theta - w_k; the personal model v and its share alpha are kept on the node."""

    name = "apfl"
    Options: ClassVar[type[AlgorithmOptions]] = ApflOptions
    starts_from_meta = False
    first_order = False

    def fresh(self) -> Params:
        return self._beginning(self.initial())

    def _beginning(self, personal: Params) -> Params:
        share = torch.full((), self.options.mixing, dtype=self.learner.dtype, device=self.learner.device)
        return {**personal, MIXING: share}

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        w, end = meta, kept
        for w, end in self._steps(meta, kept, minibatches.batches(episode), self.options.inner_lr):  # noqa: B007
            pass
        # The query examples were trained on as well, so this is a training loss.
        return subtract(meta, w), self.learner.loss(_mixture(w, end), episode.query), end

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the mixtures of a task whose personal model starts at the server's."""
        return self.personal_path(meta, self._beginning(meta), support, lr, steps)

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the mixtures of the personal model in `kept` with the server's, while both take steps."""
        return (_mixture(w, now) for w, now in self._steps(meta, kept, iter([support] * steps), lr))

    def _steps(self, w: Params, kept: Params, batches: Iterator[Batch], lr: float | Tensor) -> Iterator[tuple[Params, Params]]:
        """Yield (w, what the task keeps) after 0, 1, .. steps."""
        yield w, kept
        for batch in batches:
            gradient = slope(self.learner.mean_loss, _mixture(w, kept), batch)
            share, personal = kept[MIXING], _personal(kept)
            moved = add(personal, gradient, -lr * share)
            if self.options.adaptive:
                share = (share - lr * dot(gradient, subtract(personal, w))).clamp(0, 1)
            w, kept = add(w, slope(self.learner.mean_loss, w, batch), -lr), {**moved, MIXING: share}
            yield w, kept


def _personal(kept: Params) -> Params:
    return {name: value for name, value in kept.items() if name != MIXING}


def _mixture(w: Params, kept: Params) -> Params:
    """Return alpha v + (1 - alpha) w."""
    return add(w, subtract(_personal(kept), w), kept[MIXING])
