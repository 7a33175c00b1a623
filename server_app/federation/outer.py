"""The outer optimizer: theta <- Outer(theta, mean over tasks of g), the same for every algorithm.

Its state lives as long as the run, so that Adam's moments build up over the rounds. Steps and state are those of torch.optim
(SGD without dampening; Adam of Kingma, Ba 2015, with beta1 = 0.9, beta2 = 0.999 and epsilon = 1e-8), bit for bit. They are
written out, because torch.optim imports torch's compiler, which takes a second.
"""

import torch
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions
from quickbloom.common.maths.params import Params

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class OuterOptimizer:
    """SGD (with momentum) or Adam on the meta-parameters, with an optional linear decay of the rate to 0.

    In round t of T the rate is `outer-lr`, or with `outer-decay` `outer-lr` * (1 - (t - 1) / T). `beside`: what the algorithm
    lets the server keep beside the meta-parameters. `centre`: the last mean meta-gradient, where `aggregate` starts from it.
    `root`: the last contribution of the root set, where the next one goes on from it.
    """

    def __init__(self, options: AlgorithmOptions, meta: Params, num_rounds: int, beside: Params | None = None) -> None:
        self.beside = beside or {}
        self.centre: Params = {}
        self.root: Params = {}
        self._options = options
        self._num_rounds = num_rounds
        self._leaves = {name: value.detach().clone() for name, value in meta.items()}
        self._state: dict[str, Params] = {name: {} for name in meta}

    @property
    def meta(self) -> Params:
        """A copy of the current meta-parameters."""
        return {name: leaf.clone() for name, leaf in self._leaves.items()}

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
        for name, leaf in self._leaves.items():
            if name not in placed:
                self._step(leaf, gradient[name].to(leaf.dtype), self._state[name], self._options.outer_lr * decay)
        for name, value in placed.items():
            self._leaves[name].copy_(value)

    def _step(self, leaf: Tensor, gradient: Tensor, state: Params, lr: float) -> None:
        if self._options.outer_optimizer == "adam":
            adam_step(leaf, gradient, state, lr)
        else:
            sgd_step(leaf, gradient, state, lr, self._options.outer_momentum)

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to continue later, the meta-parameters included, as named tensors."""
        tensors = {f"meta/{name}": value for name, value in self.meta.items()}
        tensors |= {f"server/{name}": value.clone() for name, value in self.beside.items()}
        tensors |= {f"centre/{name}": value.clone() for name, value in self.centre.items()}
        tensors |= {f"root/{name}": value.clone() for name, value in self.root.items()}
        for name, state in self._state.items():
            tensors |= {f"outer/{key}/{name}": value.clone() for key, value in state.items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from the result of `state`."""
        self._state = {name: {} for name in self._leaves}
        self.centre, self.root = {}, {}
        for key, value in tensors.items():
            part, _, rest = key.partition("/")
            if part == "meta":
                self._leaves[rest].copy_(value)
            elif part == "server":
                self.beside = {**self.beside, rest: value.clone()}
            elif part == "centre":
                self.centre[rest] = value.clone()
            elif part == "root":
                self.root[rest] = value.clone()
            else:
                slot, _, name = rest.partition("/")
                self._state[name][slot] = value.clone()


def sgd_step(leaf: Tensor, gradient: Tensor, state: Params, lr: float, momentum: float) -> None:
    """Change `leaf` and `state` ("momentum_buffer") by a step of SGD: v <- momentum v + g, theta <- theta - lr v."""
    if momentum:
        if "momentum_buffer" in state:
            state["momentum_buffer"].mul_(momentum).add_(gradient)
        else:
            state["momentum_buffer"] = gradient.clone()
        gradient = state["momentum_buffer"]
    leaf.add_(gradient, alpha=-lr)


def adam_step(leaf: Tensor, gradient: Tensor, state: Params, lr: float) -> None:
    """Change `leaf` and `state` ("step", "exp_avg", "exp_avg_sq") by a step of Adam."""
    if not state:
        state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(leaf), "exp_avg_sq": torch.zeros_like(leaf)}
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    state["step"] += 1
    t = state["step"].item()
    mean.lerp_(gradient, 1 - _BETA1)
    square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
    root = (square.sqrt() / (1 - _BETA2**t) ** 0.5).add_(_EPSILON)
    leaf.addcdiv_(mean, root, value=-lr / (1 - _BETA1**t))
