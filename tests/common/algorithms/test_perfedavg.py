"""Per-FedAvg against plain autograd, and a quadratic whose Hessian is not diagonal, worked by hand."""

import numpy as np
import pytest
import torch
from plain_torch import (
    LOSSES,
    NO_MINIBATCHES,
    Weights,
    close,
    leaves,
    line_learner,
    moved,
    quadratic,
    random_episode,
    row,
    tanh_learner,
)
from pydantic import ValidationError

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.fomaml import FoMaml
from quickbloom.common.algorithms.maml import Maml
from quickbloom.common.algorithms.perfedavg import PerFedAvg
from quickbloom.common.maths.batch import Batch, Episode, Minibatches

VARIANTS = ["fo", "hf"]


def options(variant: str, steps: int, alpha: float, beta: float) -> AlgorithmOptions:
    settings = {"variant": variant, "local-steps": steps, "inner-lr": alpha, "local-lr": beta}
    return PerFedAvg.Options.model_validate(settings)


def plain_local_steps(kind: str, w: Weights, episode: Episode, steps: int, *, second_order: bool) -> Weights:
    """w <- w - 0.2 d L_Q(w - 0.4 grad L_S(w)), the derivative by w, or by the point that the inner step reaches."""
    for _ in range(steps):
        slopes = torch.autograd.grad(LOSSES[kind](w, episode.support), w, create_graph=True)
        adapted = moved(w, slopes, 0.4)
        step = torch.autograd.grad(LOSSES[kind](adapted, episode.query), w if second_order else adapted)
        w = [value.detach().requires_grad_() for value in moved(w, step, 0.2)]
    return w


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", LOSSES)
def test_contribution_equals_plain_autograd_over_the_local_steps(kind: str, steps: int, variant: str) -> None:
    algorithm, episode = PerFedAvg(options(variant, steps, 0.4, 0.2), tanh_learner(kind)), random_episode(kind)
    theta = leaves(algorithm.init())
    w = plain_local_steps(kind, theta, episode, steps, second_order=variant == "hf")
    adapted = moved(w, torch.autograd.grad(LOSSES[kind](w, episode.support), w), 0.4)
    gradient, loss = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert close(gradient, [a - b for a, b in zip(theta, w, strict=True)], atol=1e-10)
    assert loss.item() == pytest.approx(LOSSES[kind](adapted, episode.query).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("variant", "steps", "expected"),
    [("hf", 1, (-0.05, 0.45)), ("fo", 1, (0, 0.5)), ("hf", 2, (-0.0455, 0.71125)), ("fo", 2, (0.025, 0.775))],
)
def test_local_steps_on_a_quadratic_by_hand(variant: str, steps: int, expected: tuple[float, float]) -> None:
    # L_S = w'Aw / 2 with A = X'X = [[2, 1], [1, 1]] for X = [[1, 0], [1, 1]]; L_Q = |w - q|^2 / 2, q = (0.6, 0.7).
    # alpha = 0.1, beta = 0.5, w = (1, 2). Step 1: A w = (4, 3), w - 0.1 A w = (0.6, 1.7), v = (0, 1), A v = (1, 1).
    #   hf: v - 0.1 A v = (-0.1, 0.9), w = (1.05, 1.55), g = (-0.05, 0.45).   fo: w = (1, 1.5), g = (0, 0.5).
    # Step 2, hf: A w = (3.65, 2.6), adapted (0.685, 1.29), v = (0.085, 0.59), A v = (0.76, 0.675),
    #   v - 0.1 A v = (0.009, 0.5225), w = (1.0455, 1.28875), g = (-0.0455, 0.71125).
    # Step 2, fo: A w = (3.5, 2.5), adapted (0.65, 1.25), v = (0.05, 0.55), w = (0.975, 1.225), g = (0.025, 0.775).
    algorithm = PerFedAvg(options(variant, steps, 0.1, 0.5), line_learner())
    episode = Episode(quadratic([[1, 0], [1, 1]], [0, 0]), quadratic([[1, 0], [0, 1]], [0.6, 0.7]))
    gradient, _ = algorithm.meta_gradient({"weight": row(1, 2)}, episode, NO_MINIBATCHES)
    assert torch.allclose(gradient["weight"], row(*expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("variant", "same"), [("hf", Maml), ("fo", FoMaml)])
def test_one_local_step_is_a_step_along_the_gradient_of_one_step_maml(variant: str, same: type[Maml | FoMaml]) -> None:
    algorithm, episode = (
        PerFedAvg(options(variant, 1, 0.4, 0.2), tanh_learner("classification")),
        random_episode("classification"),
    )
    other = same(same.Options.model_validate({"inner-lr": 0.4, "inner-steps": 1}), tanh_learner("classification"))
    expected, _ = other.meta_gradient(other.init(), episode, NO_MINIBATCHES)
    gradient, _ = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert close(gradient, [0.2 * value for value in expected.values()], atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_hessian_term_is_exact_whatever_the_size_of_the_query_slope(scale: float) -> None:
    # As above from w = (1, 2), with q so that v = (0, scale): g / beta = v - 0.1 A v = scale (-0.1, 0.9).
    algorithm = PerFedAvg(options("hf", 1, 0.1, 1.0), line_learner())
    episode = Episode(quadratic([[1, 0], [1, 1]], [0, 0]), quadratic([[1, 0], [0, 1]], [0.6, 1.7 - scale]))
    direction = algorithm.local_meta_gradient({"weight": row(1, 2)}, episode)
    assert torch.allclose(direction["weight"] / scale, row(-0.1, 0.9), rtol=0, atol=1e-8)


def test_a_local_rate_of_zero_stands_for_the_inner_rate() -> None:
    # As above from w = (1, 2), with beta = alpha = 0.1: g = 0.1 (-0.1, 0.9).
    algorithm = PerFedAvg(options("hf", 1, 0.1, 0.0), line_learner())
    episode = Episode(quadratic([[1, 0], [1, 1]], [0, 0]), quadratic([[1, 0], [0, 1]], [0.6, 0.7]))
    gradient, _ = algorithm.meta_gradient({"weight": row(1, 2)}, episode, NO_MINIBATCHES)
    assert torch.allclose(gradient["weight"], row(-0.01, 0.09), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", LOSSES)
def test_batches_are_drawn_anew_for_every_local_step(kind: str, variant: str) -> None:
    settings = {"variant": variant, "inner-lr": 0.4, "local-lr": 0.2, "batch-size": 2, "local-epochs": 1}
    algorithm, episode = PerFedAvg(PerFedAvg.Options.model_validate(settings), tanh_learner(kind)), random_episode(kind)
    rows = torch.tensor([[0, 7, 3, 1], [2, 4, 6, 5]])
    x, y = (torch.cat([getattr(episode.support, part), getattr(episode.query, part)]) for part in ("x", "y"))
    w = theta = leaves(algorithm.init())
    for step in rows:
        seen, asked = (Batch.of(x[half], y[half]) for half in (step[::2], step[1::2]))
        w = plain_local_steps(kind, w, Episode(seen, asked), 1, second_order=variant == "hf")
    gradient, _ = algorithm.meta_gradient(algorithm.init(), episode, Minibatches(rows, torch.ones(2, 4, dtype=torch.float64)))
    assert close(gradient, [a - b for a, b in zip(theta, w, strict=True)], atol=1e-10)


def test_an_epoch_shows_every_example_once_in_two_batches_a_step() -> None:
    settings = {"batch-size": 3, "local-epochs": 2, "inner-lr": 0.1}
    algorithm = PerFedAvg(PerFedAvg.Options.model_validate(settings), tanh_learner("classification"))
    rows = algorithm.minibatch_indices(20, np.random.default_rng(0))
    assert rows is not None
    assert rows.shape == (6, 6)  # of 20 examples 2 are left over in each epoch
    assert all(len(set(epoch.ravel())) == 18 for epoch in (rows[:3], rows[3:]))
    with pytest.raises(ValidationError, match="batch-size"):
        PerFedAvg.Options.model_validate({"local-epochs": 2})


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValidationError, match="variant"):
        options("sgd", 1, 0.1, 0.1)
