"""FedBABU against plain torch: only the body moves and travels; fine-tuning moves both."""

import pytest
import torch
from plain_torch import LOSSES, close, leaves, moved, random_episode, tanh_learner, together

from quickbloom.common.algorithms.fedbabu import FedBabu
from quickbloom.common.maths.batch import Batch, Minibatches

ROWS = [[0, 7, 3], [10, 1, 8], [2, 9, 4]]
BODY = ["0.weight", "0.bias"]


def fedbabu(kind: str) -> FedBabu:
    return FedBabu(FedBabu.Options.model_validate({"inner-lr": 0.2, "inner-steps": 3}), tanh_learner(kind))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_contribution_equals_plain_torch(kind: str) -> None:
    algorithm, episode = fedbabu(kind), random_episode(kind)
    meta = {name: value + 0.1 for name, value in algorithm.init().items()}
    assert list(meta) == BODY
    start = leaves({**meta, **algorithm.head()})
    phi = start
    for rows in ROWS:
        batch = Batch(*(part[rows] for part in together(episode)))
        phi = [value.detach().requires_grad_() for value in phi]
        phi[:2] = moved(phi[:2], torch.autograd.grad(LOSSES[kind](phi, batch), phi[:2]), 0.2)
    walk = Minibatches(torch.tensor(ROWS), torch.ones(3, 3, dtype=torch.float64))
    gradient, loss = algorithm.meta_gradient(meta, episode, walk)
    assert list(gradient) == BODY
    assert close(gradient, [a - b for a, b in zip(start[:2], phi[:2], strict=True)], atol=1e-12)
    assert loss.item() == pytest.approx(LOSSES[kind](phi, episode.query).item(), abs=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_fine_tuning_moves_body_and_head(kind: str) -> None:
    algorithm, episode = fedbabu(kind), random_episode(kind)
    meta = {name: value + 0.1 for name, value in algorithm.init().items()}
    phi = leaves({**meta, **algorithm.head()})
    path = list(algorithm.adaptation_path(meta, episode.support, 0.3, 2))
    assert close(path[0], phi, atol=0)
    for step in (1, 2):
        phi = [value.detach().requires_grad_() for value in phi]
        phi = moved(phi, torch.autograd.grad(LOSSES[kind](phi, episode.support), phi), 0.3)
        assert close(path[step], phi, atol=1e-12)


def test_all_tasks_share_a_head_that_is_the_seeds() -> None:
    one, other = fedbabu("classification"), fedbabu("classification")
    assert close(one.head(), list(other.head().values()), atol=0)
    assert not one.fresh()
    assert one.weight(7) == 7.0
