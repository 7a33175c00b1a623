"""FedALA against plain torch, whose autograd finds the gradient of the mixing weights through the mixture."""

import pytest
import torch
from plain_torch import LOSSES, Weights, close, leaves, moved, random_episode, tanh_learner
from rounds import ROUNDS, batches, tasks, trained, whole

from quickbloom.common.algorithms.fedala import LOCAL, WEIGHT, FedAla


def fedala(kind: str, **more: object) -> FedAla:
    options = {"inner-lr": 0.2, "inner-steps": 3, "batch-size": 3, "mixing-steps": 2, "mixing-lr": 0.7, **more}
    return FedAla(FedAla.Options.model_validate(options), tanh_learner(kind))


def mixed(theta: Weights, local: Weights, weight: Weights) -> Weights:
    """The server's first layer, and a mixture of the second ones."""
    return theta[:2] + [a + (b - a) * w for a, b, w in zip(local, theta[2:], weight, strict=True)]


@pytest.mark.parametrize("kind", LOSSES)
def test_rounds_with_state_equal_plain_torch(kind: str) -> None:
    algorithm, data = fedala(kind), tasks(kind)
    theta = leaves(algorithm.init())
    state = {t: (theta[2:], [torch.ones_like(value) for value in theta[2:]]) for t in range(3)}
    for number, chosen in enumerate(ROUNDS, 1):
        ends, sizes = [], []
        for t in chosen:
            theta, (local, weight) = [value.detach() for value in theta], state[t]
            drawn = batches(algorithm, data, number, t)
            for batch in drawn[:2]:
                weight = [value.detach().requires_grad_() for value in weight]
                slopes = torch.autograd.grad(LOSSES[kind](mixed(theta, local, weight), batch), weight)
                weight = [value.detach().clamp(0, 1) for value in moved(weight, slopes, 0.7)]
            phi = mixed(theta, local, weight)
            for batch in drawn[2:]:
                phi = [value.detach().requires_grad_() for value in phi]
                phi = moved(phi, torch.autograd.grad(LOSSES[kind](phi, batch), phi), 0.2)
            phi = [value.detach() for value in phi]
            state[t] = phi[2:], weight
            ends.append(phi)
            sizes.append(len(whole(data[t]).x))
        theta = [torch.as_tensor(sum(n * e[i] for n, e in zip(sizes, ends, strict=True)) / sum(sizes)) for i in range(4)]
    meta, kept = trained(algorithm, data)
    assert close(meta, theta, atol=1e-10)
    for t, (local, weight) in state.items():
        assert close({name: value for name, value in kept[t].items() if name.startswith(LOCAL)}, local, atol=1e-10)
        assert close({name: value for name, value in kept[t].items() if name.startswith(WEIGHT)}, weight, atol=1e-10)
        assert any((value < 1).any() for value in weight)


def test_a_known_task_starts_at_its_mixture_and_a_new_one_at_the_servers_model() -> None:
    algorithm, support = fedala("classification"), random_episode("classification").support
    meta = algorithm.init()
    local = {LOCAL + name: meta[name] + 1 for name in ("2.weight", "2.bias")}
    kept = local | {WEIGHT + name: torch.full_like(meta[name], 0.25) for name in ("2.weight", "2.bias")}
    first, second = algorithm.personal_path(meta, kept, support, 0.1, 1)
    expected = leaves(meta)[:2] + [value + 0.75 for value in leaves(meta)[2:]]
    assert close(first, expected, atol=1e-12)
    phi = [value.detach().requires_grad_() for value in expected]
    slopes = torch.autograd.grad(LOSSES["classification"](phi, support), phi)
    assert close(second, moved(phi, slopes, 0.1), atol=1e-12)
    for path in (
        algorithm.adaptation_path(meta, support, 0.1, 0),
        algorithm.personal_path(meta, algorithm.fresh(), support, 0.1, 0),
    ):
        assert close(next(path), list(meta.values()), atol=1e-12)
