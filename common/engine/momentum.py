"""Momentum on the nodes (`node-momentum`): a task sends a moving average of its contributions instead of the last one alone.

Karimireddy, He, Jaggi 2021, "Learning from History for Byzantine Robust Optimization", Algorithm 2, with beta the momentum:

    m_t = (1 - beta) g_t + beta m_(t-1)

Contributions of single rounds scatter by their draws, and a lie hides in that; averages of the same task scatter less. There a
worker takes part in every round. A task that takes part again after k rounds weighs what it has kept by beta ** k, so that

    m_t = (1 - beta ** k) g_t + beta ** k m_(t-k)

and a memory fades with the rounds, however rarely the task is asked. A task that never took part sends g_t as it is. A round
that is repeated (k = 0) sends the same m again: the model and the draw are the same, so g_t is in it already.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions
from quickbloom.common.maths.batch import Episode, Minibatches
from quickbloom.common.maths.params import Params, split

_MEMORY, _LAST, _NOW = "momentum/of/", "momentum/last", "momentum/now"
"""Prefix of the tensors of m, and names of two numbers: the round of its last change, and the present one."""


class Momentum(Algorithm):
    """The algorithm `of`, whose tasks contribute m in place of g. m is part of the state that a task keeps."""

    name = "momentum"
    Options: ClassVar[type[AlgorithmOptions]] = AlgorithmOptions

    def __init__(self, of: Algorithm, beta: float) -> None:
        super().__init__(of.options, of.learner)
        self.first_order, self.descends_in_place = of.first_order, of.descends_in_place
        self._of, self._beta = of, beta
        device, like = of.learner.device, of.init()
        self.memory = {_MEMORY + name: torch.zeros(v.shape, dtype=v.dtype, device=device) for name, v in like.items()}
        self.memory[_LAST] = torch.tensor(-math.inf, device=device)

    def before(self, kept: Params | None, memory: Params | None, number: int) -> Params:
        """Return the state of a task for round `number`, from what it has `kept` for its algorithm and its `memory`.

        A memory of a later round is none: the run goes on from before it.
        """
        if memory is None or float(memory[_LAST]) > number:
            memory = self.memory
        return {**(self._of.fresh() if kept is None else kept), **memory, _NOW: torch.tensor(float(number))}

    def after(self, state: Params) -> tuple[Params, Params]:
        """Return (what the task keeps for its algorithm, its memory) from its state; {} for a memory of no contribution."""
        memory, kept = split({name: value for name, value in state.items() if name != _NOW}, self.memory)
        return kept, memory if math.isfinite(float(memory[_LAST])) else {}

    def counted(self, states: Sequence[Params]) -> list[Params]:
        """Return those of a task's `states`, one of each draw in a round, with the newest contribution.

        A draw that was not finite has left its state as it was, which is no part of what was sent.
        """
        newest = max(float(state[_LAST]) for state in states)
        return [state for state in states if float(state[_LAST]) == newest]

    def fresh(self) -> Params:
        return self.before(None, None, 0)

    def weight(self, num_examples: int) -> float:
        return self._of.weight(num_examples)

    def minibatch_indices(self, num_examples: int, rng: np.random.Generator) -> np.ndarray[Any, Any] | None:
        return self._of.minibatch_indices(num_examples, rng)

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        return self._of.meta_gradient(meta, episode, minibatches)

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        own = {name: value for name, value in kept.items() if name not in self.memory and name != _NOW}
        gradient, loss, after = self._of.contribute(meta, own, episode, minibatches)
        share = self._beta ** (kept[_NOW] - kept[_LAST])
        m = {name: (1 - share) * g + share * kept[_MEMORY + name] for name, g in gradient.items()}
        return m, loss, {**after, **{_MEMORY + name: value for name, value in m.items()}, _LAST: kept[_NOW], _NOW: kept[_NOW]}


@lru_cache(maxsize=8)  # as many as a process has algorithms, whose compiled code is found by the object
def with_momentum(algorithm: Algorithm, beta: float) -> Momentum:
    """Return `algorithm` with momentum `beta`, one object for all that ask."""
    return Momentum(algorithm, beta)
