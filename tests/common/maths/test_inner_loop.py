"""Proximal steps and Hessian-vector products against numbers by hand and plain autograd."""

from collections.abc import Sequence

import pytest
import torch
from plain_torch import cross_entropy, leaves, line_learner, random_episode, row, tanh_learner
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from quickbloom.common.maths import inner_loop
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.inner_loop import (
    descend,
    descend_towards,
    endpoint,
    endpoint_towards,
    gradient_and_hessian,
    gradient_and_value,
    last,
    with_pull,
    with_slope,
)
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params

LINE = line_learner(1)
THREE = Batch.of(row(1), row(3))
"""L(w) = (w - 3)^2."""


def towards_one(start: float, steps: int, lr: float, strength: float) -> list[float]:
    path = descend_towards(LINE.loss, {"weight": row(start)}, {"weight": row(1)}, iter([THREE] * steps), lr, strength)
    return [phi["weight"].item() for phi in path]


def test_proximal_steps_by_hand() -> None:
    # From 7 with lr 0.25 and strength 2 towards 1: (7 - 0.25 * 8 + 0.25 * 2 * 1) / (1 + 0.25 * 2) = 5.5 / 1.5 = 11/3.
    # Then (11/3 - 0.25 * 4/3 + 0.5) / 1.5 = (23/6) / 1.5 = 23/9.
    assert towards_one(7, steps=2, lr=0.25, strength=2) == pytest.approx([7, 11 / 3, 23 / 9], abs=1e-12)


@pytest.mark.parametrize(("lr", "strength"), [(0.1, 2), (0.5, 2), (0.1, 1e6), (0.1, 1e-3)])
def test_proximal_steps_end_where_both_slopes_cancel(lr: float, strength: float) -> None:
    # 2 (phi - 3) + strength (phi - 1) = 0 at phi = (6 + strength) / (2 + strength), whatever the step size.
    minimum = (6 + strength) / (2 + strength)
    assert towards_one(7, steps=200, lr=lr, strength=strength)[-1] == pytest.approx(minimum, abs=1e-12)
    assert towards_one(minimum, steps=1, lr=lr, strength=strength)[-1] == pytest.approx(minimum, abs=1e-12)


def test_without_strength_proximal_steps_are_plain_gradient_steps() -> None:
    # w - 3 shrinks by 1 - 2 * 0.25 = 1/2 a step.
    assert towards_one(7, steps=3, lr=0.25, strength=0) == pytest.approx([7, 5, 4, 3.5], abs=1e-12)


def test_gradient_and_hessian_equal_those_of_plain_autograd() -> None:
    learner, batch = tanh_learner("classification"), random_episode("classification").support
    at, theta = learner.initial(), leaves(learner.initial())
    slopes = joined(torch.autograd.grad(cross_entropy(theta, batch), theta, create_graph=True))
    hessian = torch.stack([joined(torch.autograd.grad(slope, theta, retain_graph=True)) for slope in slopes])
    gradient, times_hessian = gradient_and_hessian(lambda params: learner.loss(params, batch), at)
    v = {name: value.cos() for name, value in at.items()}
    direction = joined(list(v.values()))
    assert torch.allclose(joined(list(gradient.values())), slopes, rtol=0, atol=1e-10)
    assert torch.allclose(joined(list(times_hessian(v).values())), hessian @ direction, rtol=0, atol=1e-10)
    twice = times_hessian(times_hessian(v))
    assert torch.allclose(joined(list(twice.values())), hessian @ (hessian @ direction), rtol=0, atol=1e-10)


def joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def test_the_end_of_a_path_is_its_last_entry_and_an_empty_path_has_none() -> None:
    assert last(iter([{"w": row(1)}, {"w": row(2)}]))["w"].item() == 2
    with pytest.raises(StopIteration):
        last(iter([]))


@pytest.mark.parametrize("piece", [1, 2, 10**6])
def test_a_passing_path_has_the_bits_of_the_one_that_is_kept(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner_loop, "_MOVED_AT_ONCE", piece)
    learner = tanh_learner("classification")
    start, before = learner.initial(), learner.initial()
    tasks = [random_episode("classification", 6, seed).support for seed in range(3)]
    support = Batch(*(torch.stack(list(values)) for values in zip(*tasks, strict=True)))
    rates = torch.tensor([0.1, 0.5], dtype=torch.float64)

    def steps(*, passing: bool) -> list[Params]:
        def path(theta: Params, lr: Tensor, batch: Batch) -> list[Params]:
            found = descend(learner.loss, theta, iter([batch] * 3), lr, passing=passing)
            return [{name: value.clone() for name, value in phi.items()} for phi in found]

        over_rates = vmap(path, in_dims=(None, 0, None))
        return list(vmap(over_rates, in_dims=(None, None, 0))(start, rates, support))

    with torch.no_grad():
        kept, passed = steps(passing=False), steps(passing=True)
    assert len(kept) == 4
    for phi, same in zip(kept, passed, strict=True):
        assert all(torch.equal(value, same[name]) for name, value in phi.items())
    assert all(torch.equal(value, before[name]) for name, value in start.items())


def test_the_endpoint_is_the_last_of_the_path_and_the_start_stays_as_it_was() -> None:
    """In place with plain autograd, or under vmap: the numbers of `descend`."""
    learner = Learner(convolutional().double(), "classification")
    start = {**learner.initial(), "unused": torch.ones(2, dtype=torch.float64)}
    before = {name: value.clone() for name, value in start.items()}
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, 1, 8, 8, generator=draw, dtype=torch.float64)
    y = torch.randint(0, 4, (3, 2, 5), generator=draw)

    def loss(params: Params, batch: Batch) -> Tensor:
        return learner.loss({name: value for name, value in params.items() if name != "unused"}, batch)

    def batches(task: int) -> list[Batch]:
        return [Batch.of(x[task, step], y[task, step]) for step in range(2)]

    def mapped(inputs: Tensor, labels: Tensor) -> Params:
        weight = torch.ones(5, dtype=torch.float64)
        return endpoint(loss, start, iter(Batch(inputs[step], labels[step], weight) for step in range(2)), 0.1)

    of_all = vmap(mapped)(x, y)
    for task in range(3):
        expected = last(descend(loss, start, iter(batches(task)), 0.1))
        found = endpoint(loss, start, iter(batches(task)), 0.1)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(of_all[name][task], value, rtol=1e-12, atol=1e-12)
            assert found[name].is_contiguous()
            assert not found[name].requires_grad
            assert torch.equal(start[name], before[name])
    assert torch.equal(found["unused"], before["unused"])


@pytest.mark.parametrize("terms", ["pull", "slope", "pull, slope", "pull, slope, pull"])
def test_terms_without_examples_move_the_parameters_in_place_as_plain_autograd_says(terms: str) -> None:
    """phi <- phi - lr grad (L + sum of terms), in double precision; the anchor and the direction stay as they were."""
    learner, batches = Learner(convolutional().double(), "classification"), convolutional_batches()
    start = learner.initial()
    anchor = {name: value.cos() for name, value in start.items()}
    before = {name: value.clone() for name, value in anchor.items()}
    objective = learner.mean_loss
    for term in terms.split(", "):
        objective = with_pull(objective, anchor, 0.7) if term == "pull" else with_slope(objective, anchor)
    found = endpoint(objective, start, iter(batches), 0.1)

    phi = {name: value.clone() for name, value in start.items()}
    for batch in batches:
        theta = {name: value.clone().requires_grad_() for name, value in phi.items()}
        value = learner.loss(theta, batch)
        for name, here in theta.items():
            for term in terms.split(", "):
                value = value + (0.35 * ((here - anchor[name]) ** 2).sum() if term == "pull" else (here * anchor[name]).sum())
        slopes = torch.autograd.grad(value, list(theta.values()))
        phi = {name: here - 0.1 * slope for (name, here), slope in zip(phi.items(), slopes, strict=True)}
    for name, value in phi.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
        assert found[name].is_contiguous()
        assert not found[name].requires_grad
        assert torch.equal(anchor[name], before[name])


def test_the_endpoint_of_proximal_steps_is_the_last_of_their_path() -> None:
    learner, batches = Learner(convolutional().double(), "classification"), convolutional_batches()
    start = learner.initial()
    anchor = {name: value.cos() for name, value in start.items()}
    before = {name: value.clone() for name, value in start.items()}
    found = endpoint_towards(learner.mean_loss, start, anchor, iter(batches), 0.1, 2.0)
    expected = last(descend_towards(learner.mean_loss, start, anchor, iter(batches), 0.1, 2.0))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
        assert torch.equal(start[name], before[name])


def convolutional_batches() -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(3, 5, 1, 8, 8, generator=draw, dtype=torch.float64)
    return [Batch.of(x, torch.randint(0, 4, (5,), generator=draw)) for x in images]


def test_gradient_and_value_are_those_of_torch_func() -> None:
    learner = Learner(convolutional().double(), "classification")
    at, batch = learner.initial(), Batch.of(torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 4)
    gradient, value = gradient_and_value(learner.loss, at, batch)
    expected, loss = grad_and_value(learner.loss)(at, batch)
    torch.testing.assert_close(value, loss)
    for name, slope in expected.items():
        torch.testing.assert_close(gradient[name], slope, rtol=1e-12, atol=1e-12)
        assert not at[name].requires_grad


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4))
