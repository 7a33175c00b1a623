"""Ditto against plain torch: FedAvg's contribution, and a personal model that is pulled towards the server's."""

import pytest
import torch
from plain_torch import LOSSES, Weights, close, leaves, moved, random_episode, tanh_learner, together

from quickbloom.common.algorithms.ditto import Ditto
from quickbloom.common.algorithms.fedavg import FedAvg
from quickbloom.common.maths.batch import Batch, Minibatches
from quickbloom.common.maths.params import Params

ROWS = [[0, 7, 3], [10, 1, 8], [2, 9, 4]]
LAMBDA = 0.6


def ditto(kind: str) -> Ditto:
    return Ditto(Ditto.Options.model_validate({"inner-lr": 0.2, "inner-steps": 3, "strength": LAMBDA}), tanh_learner(kind))


def walk() -> Minibatches:
    return Minibatches(torch.tensor(ROWS), torch.ones(3, 3, dtype=torch.float64))


def shifted(params: Params, by: float) -> Params:
    return {name: value + by for name, value in params.items()}


def plain(kind: str, start: Weights, anchor: Weights, batches: list[Batch], lr: float) -> Weights:
    """v <- v - lr * (grad L(v) + lambda * (v - anchor))."""
    v = start
    for batch in batches:
        v = [value.detach().requires_grad_() for value in v]
        slopes = torch.autograd.grad(LOSSES[kind](v, batch), v)
        v = moved(v, [slope + LAMBDA * (a - b) for slope, a, b in zip(slopes, v, anchor, strict=True)], lr)
    return v


@pytest.mark.parametrize("kind", LOSSES)
def test_the_personal_model_equals_plain_torch_and_the_contribution_is_fedavgs(kind: str) -> None:
    algorithm, episode = ditto(kind), random_episode(kind)
    meta, kept = shifted(algorithm.init(), 0.1), shifted(algorithm.init(), -0.2)
    batches = [Batch(*(part[rows] for part in together(episode))) for rows in ROWS]
    gradient, loss, personal = algorithm.contribute(meta, kept, episode, walk())
    assert close(personal, plain(kind, leaves(kept), leaves(meta), batches, 0.2), atol=1e-12)
    fedavg = FedAvg(FedAvg.Options.model_validate({"inner-lr": 0.2, "inner-steps": 3}), algorithm.learner)
    expected, its_loss = fedavg.meta_gradient(meta, episode, walk())
    assert close(gradient, list(expected.values()), atol=1e-12)
    assert loss.item() == pytest.approx(its_loss.item())
    assert algorithm.weight(7) == 7.0


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("known", [True, False])
def test_adaptation_goes_on_from_the_personal_model_or_from_the_servers(kind: str, known: bool) -> None:
    algorithm, episode = ditto(kind), random_episode(kind)
    meta, kept = shifted(algorithm.init(), 0.1), shifted(algorithm.init(), -0.2)
    start = kept if known else meta
    path = algorithm.personal_path(meta, kept, episode.support, 0.3, 2) if known else None
    steps = list(path if path is not None else algorithm.adaptation_path(meta, episode.support, 0.3, 2))
    assert close(steps[0], list(start.values()), atol=0)
    assert close(steps[2], plain(kind, leaves(start), leaves(meta), [episode.support] * 2, 0.3), atol=1e-12)


def test_a_new_task_starts_at_the_model_before_the_first_round() -> None:
    algorithm = ditto("classification")
    assert close(algorithm.fresh(), list(algorithm.init().values()), atol=0)
