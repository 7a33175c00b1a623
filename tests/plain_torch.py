"""An oracle for the algorithms: a small network, its losses and their derivatives in plain torch, without our own engine."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params

Weights = list[Tensor]
Loss = Callable[[Weights, Batch], Tensor]
NO_MINIBATCHES = Minibatches(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0))


def tanh_learner(kind: str, outputs: int = 3) -> Learner:
    """3 inputs, 4 tanh units, `outputs` outputs, in float64; the data have 3 classes or targets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return Learner(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double(), kind, 3)


def tanh_outputs(weights: Weights, x: Tensor) -> Tensor:
    w1, b1, w2, b2 = weights
    return torch.tanh(x @ w1.T + b1) @ w2.T + b2


def cross_entropy(weights: Weights, batch: Batch) -> Tensor:
    outputs = tanh_outputs(weights, batch.x)
    return (outputs.logsumexp(1) - outputs[torch.arange(len(batch.y)), batch.y]).mean()


def squared_error(weights: Weights, batch: Batch) -> Tensor:
    return ((tanh_outputs(weights, batch.x) - batch.y) ** 2).mean()


LOSSES: dict[str, Loss] = {"classification": cross_entropy, "regression": squared_error}


def random_episode(kind: str, support: int = 6, query: int = 5) -> Episode:
    """Standard normal inputs; random targets, or the classes 0, 1, 2, 0, ..."""
    source = torch.Generator().manual_seed(support + 10 * query)

    def batch(size: int) -> Batch:
        x, y = (torch.randn(size, 3, generator=source, dtype=torch.float64) for _ in range(2))
        return Batch.of(x, torch.arange(size) % 3 if kind == "classification" else y)

    return Episode(batch(support), batch(query))


def together(episode: Episode) -> Batch:
    """Support and query as one batch."""
    return Batch(*(torch.cat(parts) for parts in zip(*episode, strict=True)))


def line_learner(inputs: int = 2) -> Learner:
    """One output, linear in `inputs` weights, no bias, float64: the loss of n examples is quadratic, with Hessian 2 X'X / n."""
    return Learner(nn.Linear(inputs, 1, bias=False).double(), "regression")


def quadratic(rows: list[list[float]], centre: list[float]) -> Batch:
    """Two examples X with targets X c: their loss is (w - c)' A (w - c) / 2 with A = X'X, and its gradient A (w - c)."""
    assert len(rows) == 2
    x = torch.tensor(rows, dtype=torch.float64)
    return Batch.of(x, x @ torch.tensor(centre, dtype=torch.float64).view(-1, 1))


def row(*values: float) -> Tensor:
    """The weights of `line_learner`."""
    return torch.tensor([values], dtype=torch.float64)


def leaves(params: Params) -> Weights:
    """Copies that plain autograd can differentiate by."""
    return [value.detach().clone().requires_grad_() for value in params.values()]


def moved(weights: Weights, slopes: Sequence[Tensor], lr: float) -> Weights:
    return [value - lr * slope for value, slope in zip(weights, slopes, strict=True)]


def sgd(loss: Loss, start: Weights, batches: Sequence[Batch], lr: float) -> Weights:
    """The end of gradient descent; plain autograd can differentiate through it."""
    weights = start
    for batch in batches:
        weights = moved(weights, torch.autograd.grad(loss(weights, batch), weights, create_graph=True), lr)
    return weights


def proximal_point(loss: Loss, anchor: Weights, batch: Batch, strength: float, steps: int = 80) -> Weights:
    """argmin loss + strength / 2 * ||phi - anchor||^2 by gradient steps on that sum; differentiable in `anchor`."""

    def whole(phi: Weights, batch: Batch) -> Tensor:
        return loss(phi, batch) + strength / 2 * sum(((p - a) ** 2).sum() for p, a in zip(phi, anchor, strict=True))

    return sgd(whole, anchor, [batch] * steps, 1 / (2 + strength))


def central_differences(value: Callable[[Weights], Tensor], at: Weights, size: float = 1e-5) -> list[Tensor]:
    """The derivative of `value` by every single number."""
    slopes = []
    for leaf in (weights := [value.detach().clone() for value in at]):
        slope = torch.zeros_like(leaf)
        for i in range(leaf.numel()):
            flat, old = leaf.view(-1), leaf.view(-1)[i].item()
            flat[i] = old + size
            above = value(weights)
            flat[i] = old - size
            slope.view(-1)[i] = (above - value(weights)).detach() / (2 * size)
            flat[i] = old
        slopes.append(slope)
    return slopes


def close(found: Params, expected: Sequence[Tensor], atol: float) -> bool:
    """Whether the numbers agree, tensor by tensor in their order."""
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(found.values(), expected, strict=True))
