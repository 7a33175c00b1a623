"""SCAFFOLD (Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning", Algorithm 1 with option II).

Control variates correct the drift of the tasks: c on the server, which travels beside theta, and c_i, which a task keeps. It
takes K steps y <- y - eta (grad L(y) - c_i + c) and then has

    c_i+ = c_i - c + (theta - y) / (K eta)

g = (theta - y, c_i - c_i+); tasks weigh the same. The server moves theta by its optimizer, and c by |S| / N of the mean of
c_i+ - c_i, with the |S| of N training tasks that contributed. At evaluation the model is fine-tuned like
FedAvg's, without control.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from quickbloom.common.algorithms.base import AlgorithmOptions, ServerStep
from quickbloom.common.algorithms.local_sgd import AveragedOptions, KeepsState
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.inner_loop import descend, endpoint, with_slope
from quickbloom.common.maths.params import Params, add, subtract

CONTROL = "control/"
"""Prefix of the names of the server's control variate; the name of the parameter follows."""


class Scaffold(KeepsState):
    """g = (theta - y_K, c_i - c_i+); the task's own control variate is kept on the node."""

    name = "scaffold"
    Options: ClassVar[type[AlgorithmOptions]] = AveragedOptions
    first_order = False
    needs_mean = "the server's control variate has to stay the mean of those that the tasks keep"
    needs_whole = True

    def init(self) -> Params:
        """Return theta, and for each of its numbers the server's control under "control/" and the parameter's name: 0."""
        theta = self.initial()
        return theta | {CONTROL + name: torch.zeros_like(value) for name, value in theta.items()}

    def fresh(self) -> Params:
        return self.learner.zeros()

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        theta, control = _parts(meta)
        lr, steps = self.options.inner_lr, minibatches.rows.shape[0]
        objective = with_slope(self.learner.mean_loss, subtract(control, kept))
        y = endpoint(objective, theta, minibatches.batches(episode), lr)
        moved = subtract(theta, y)
        own = add(subtract(kept, control), moved, 1 / (steps * lr))
        gradient = moved | {CONTROL + name: kept[name] - value for name, value in own.items()}
        # The query examples were trained on as well, so this is a training loss.
        return gradient, self.learner.loss(y, episode.query), own

    def server_step(self, meta: Params, state: Params, mean: Params, share: float) -> ServerStep:
        gradient, of_control = _parts(mean)
        control = {CONTROL + name: meta[CONTROL + name] - share * value for name, value in of_control.items()}
        return ServerStep(gradient, control, state)

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield theta after 0, 1, .. `steps` gradient steps."""
        return descend(self.learner.mean_loss, _parts(meta)[0], iter([support] * steps), lr)


def _parts(meta: Params) -> tuple[Params, Params]:
    """Return (theta, control) by the names of the parameters."""
    theta = {name: value for name, value in meta.items() if not name.startswith(CONTROL)}
    return theta, {name: meta[CONTROL + name] for name in theta}
