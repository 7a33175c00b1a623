"""The outer optimizer: theta <- Outer(theta, mean over tasks of g), the same for every algorithm.

torch.optim does the arithmetic. Its state lives as long as the run, so that Adam's moments build up
over the rounds.
"""

import torch
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions
from quickbloom.common.maths.params import Params


class OuterOptimizer:
    """SGD (with momentum) or Adam on the meta-parameters, with an optional linear decay of the rate to 0.

    In round t of T the rate is `outer-lr`, or with `outer-decay` `outer-lr` * (1 - (t - 1) / T). `beside`: what the algorithm
    lets the server keep beside the meta-parameters.
    """

    def __init__(self, options: AlgorithmOptions, meta: Params, num_rounds: int, beside: Params | None = None) -> None:
        self.beside = beside or {}
        self._options = options
        self._num_rounds = num_rounds
        self._leaves = {name: value.detach().clone().requires_grad_() for name, value in meta.items()}
        self._optimizer: torch.optim.Optimizer
        # Unlike a list of parameters, a group may be empty: an algorithm without communication has no meta-parameters.
        groups = [{"params": list(self._leaves.values())}]
        if options.outer_optimizer == "adam":
            self._optimizer = torch.optim.Adam(groups, lr=options.outer_lr)
        else:
            self._optimizer = torch.optim.SGD(groups, lr=options.outer_lr, momentum=options.outer_momentum)

    @property
    def meta(self) -> Params:
        """A copy of the current meta-parameters."""
        return {name: leaf.detach().clone() for name, leaf in self._leaves.items()}

    @property
    def leaves(self) -> Params:
        """The meta-parameters themselves, read-only: the next step changes them."""
        return {name: leaf.detach() for name, leaf in self._leaves.items()}

    def take_in(self, algorithm: Algorithm, mean: Params, server_round: int, share: float) -> None:
        """Do what `algorithm` does with the mean of a round, to which `share` of the training tasks contributed."""
        found = algorithm.server_step(self.leaves, self.beside, mean, share)
        self.step(found.gradient, server_round, found.placed)
        self.beside = found.state

    def step(self, gradient: Params, server_round: int, placed: Params | None = None) -> None:
        """Take one step along the mean meta-gradient of round `server_round` (from 1).

        `placed`: new values of meta-parameters that take no step.
        """
        placed = placed or {}
        decay = 1 - (server_round - 1) / self._num_rounds if self._options.outer_decay else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.outer_lr * decay
        for name, leaf in self._leaves.items():
            leaf.grad = None if name in placed else gradient[name].to(leaf.dtype)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, value in placed.items():
            self._leaves[name].data.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to continue later, the meta-parameters included, as named tensors."""
        tensors = {f"meta/{name}": value for name, value in self.meta.items()}
        tensors |= {f"server/{name}": value.clone() for name, value in self.beside.items()}
        for index, name in enumerate(self._leaves):
            for key, value in self._optimizer.state_dict()["state"].get(index, {}).items():
                if isinstance(value, Tensor):  # SGD without momentum stores None
                    tensors[f"outer/{key}/{name}"] = value.detach().clone()
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from the result of `state`."""
        state: dict[int, dict[str, Tensor]] = {}
        names = list(self._leaves)
        for key, value in tensors.items():
            part, _, rest = key.partition("/")
            if part == "meta":
                self._leaves[rest].data.copy_(value)
            elif part == "server":
                self.beside = {**self.beside, rest: value.clone()}
            else:
                slot, _, name = rest.partition("/")
                state.setdefault(names.index(name), {})[slot] = value.clone()
        self._optimizer.load_state_dict({"state": state, "param_groups": self._optimizer.state_dict()["param_groups"]})
