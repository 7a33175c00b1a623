"""FedProx against plain torch, and two numbers by hand."""

import pytest
import torch
from plain_torch import LOSSES, close, leaves, moved, random_episode, tanh_learner, together

from quickbloom.common.algorithms.fedavg import FedAvg
from quickbloom.common.algorithms.fedprox import FedProx
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.learner import Learner

ROWS = [[0, 7, 3], [10, 1, 8], [2, 9, 4]]


def walk() -> Minibatches:
    return Minibatches(torch.tensor(ROWS), torch.ones(3, 3, dtype=torch.float64))


def fedprox(learner: Learner, **settings: float) -> FedProx:
    return FedProx(FedProx.Options.model_validate({"inner-lr": 0.2, "inner-steps": 3, **settings}), learner)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_contribution_equals_plain_torch(kind: str) -> None:
    algorithm, episode = fedprox(tanh_learner(kind), strength=0.7), random_episode(kind)
    meta = algorithm.init()
    start = leaves(meta)
    phi = [value.detach().requires_grad_() for value in start]
    for rows in ROWS:
        batch = Batch(*(part[rows] for part in together(episode)))
        pull = sum(((a - b.detach()) ** 2).sum() for a, b in zip(phi, start, strict=True))
        phi = moved(phi, torch.autograd.grad(LOSSES[kind](phi, batch) + 0.35 * pull, phi), 0.2)
        phi = [value.detach().requires_grad_() for value in phi]
    gradient, loss = algorithm.meta_gradient(meta, episode, walk())
    assert close(gradient, [a - b for a, b in zip(start, phi, strict=True)], atol=1e-12)
    assert loss.item() == pytest.approx(LOSSES[kind](phi, episode.query).item(), abs=1e-12)


def test_two_steps_by_hand() -> None:
    """L(w) = (w - 3)^2, w = 1, rate 0.25, mu = 2: w1 = 1 + .25 * 4 = 2; w2 = 2 - .25 * (2 * (2 - 3) + 2 * (2 - 1)) = 2."""
    line = torch.nn.Linear(1, 1, bias=False).double()
    one, three = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 3.0, dtype=torch.float64)
    episode = Episode(Batch.of(one, three), Batch.of(one, three))
    every = Minibatches(torch.tensor([[0, 1]] * 2), torch.ones(2, 2, dtype=torch.float64))
    algorithm = fedprox(Learner(line, "regression"), **{"inner-lr": 0.25, "inner-steps": 2, "strength": 2.0})
    gradient, loss = algorithm.meta_gradient({"weight": one}, episode, every)
    assert gradient["weight"].item() == pytest.approx(1.0 - 2.0)
    assert loss.item() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", LOSSES)
def test_without_a_pull_it_is_fedavg(kind: str) -> None:
    learner, episode = tanh_learner(kind), random_episode(kind)
    fedavg = FedAvg(FedAvg.Options.model_validate({"inner-lr": 0.2, "inner-steps": 3}), learner)
    without = fedprox(learner, strength=0.0)
    meta = without.init()
    one, other = (algorithm.meta_gradient(meta, episode, walk())[0] for algorithm in (without, fedavg))
    assert close(one, list(other.values()), atol=1e-12)
    assert without.weight(7) == 7.0
