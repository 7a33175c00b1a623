"""iMAML against a closed form, autograd through a long inner loop, and finite differences; conjugate gradient by hand."""

from collections.abc import Callable

import pytest
import torch
from plain_torch import (
    LOSSES,
    NO_MINIBATCHES,
    Weights,
    central_differences,
    close,
    leaves,
    line_learner,
    proximal_point,
    quadratic,
    random_episode,
    row,
    tanh_learner,
)
from pydantic import ValidationError
from torch import Tensor

from quickbloom.common.algorithms.imaml import Imaml, conjugate_gradient
from quickbloom.common.maths.batch import Episode
from quickbloom.common.maths.inner_loop import last
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params

SUPPORT = quadratic([[1, 0], [1, 1]], [1, 0])
"""L_S = (w - s)' A (w - s) / 2 with A = [[2, 1], [1, 1]] and s = (1, 0)."""
QUERY = quadratic([[1, 0], [0, 1]], [3, -12])
"""L_Q = |w - q|^2 / 2 with q = (3, -12)."""
HESSIAN = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)


def imaml(learner: Learner, strength: float, inner_steps: int = 300, cg_steps: int = 40, damping: float = 0.0) -> Imaml:
    settings = {"inner-lr": 0.3, "inner-steps": inner_steps, "strength": strength, "cg-steps": cg_steps, "damping": damping}
    return Imaml(Imaml.Options.model_validate(settings), learner)


def test_implicit_gradient_of_a_quadratic_by_hand() -> None:
    # lambda = 2, theta = (4.5, -0.5): A + 2 I = [[4, 1], [1, 3]], its inverse [[3, -1], [-1, 4]] / 11.
    # phi* = (A + 2 I)^-1 (A s + 2 theta) = (A + 2 I)^-1 ((2, 1) + (9, -1)) = (A + 2 I)^-1 (11, 0) = (3, -1).
    # grad L_Q = phi* - q = (0, 11), loss 121 / 2. g = (I + A / 2)^-1 (0, 11) = 2 (A + 2 I)^-1 (0, 11) = (-2, 8).
    algorithm, theta = imaml(line_learner(), strength=2, cg_steps=2), {"weight": row(4.5, -0.5)}
    phi = last(algorithm.adaptation_path(theta, SUPPORT, 0.3, 300))
    gradient, loss = algorithm.meta_gradient(theta, Episode(SUPPORT, QUERY), NO_MINIBATCHES)
    assert torch.allclose(phi["weight"], row(3, -1), rtol=0, atol=1e-12)
    assert torch.allclose(gradient["weight"], row(-2, 8), rtol=0, atol=1e-12)
    assert loss.item() == pytest.approx(60.5, abs=1e-10)


def test_damping_is_added_to_lambda_in_the_gradient_and_not_in_the_inner_problem_by_hand() -> None:
    # lambda = 1: (A + I)^-1 = [[2, -1], [-1, 3]] / 5. theta = (3, -1): phi* = (A + I)^-1 ((2, 1) + (3, -1)) = (2, -1).
    # grad L_Q = phi* - (2, -12) = (0, 11). Damping 1 makes it lambda = 2 in g: (-2, 8) as above.
    algorithm, theta = imaml(line_learner(), strength=1, cg_steps=2, damping=1), {"weight": row(3, -1)}
    episode = Episode(SUPPORT, quadratic([[1, 0], [0, 1]], [2, -12]))
    gradient, loss = algorithm.meta_gradient(theta, episode, NO_MINIBATCHES)
    assert torch.allclose(gradient["weight"], row(-2, 8), rtol=0, atol=1e-12)
    assert loss.item() == pytest.approx(60.5, abs=1e-10)


@pytest.mark.parametrize("strength", [0.3, 1.0, 5.0])
def test_implicit_gradient_is_the_total_derivative_of_the_query_loss(strength: float) -> None:
    def objective(theta: Weights) -> Tensor:
        right = HESSIAN @ torch.tensor([1.0, 0.0], dtype=torch.float64) + strength * theta[0][0]
        phi: Tensor = torch.linalg.solve(HESSIAN + strength * torch.eye(2, dtype=torch.float64), right)
        return (phi - torch.tensor([3.0, -12.0], dtype=torch.float64)).square().sum() / 2

    gradient, _ = imaml(line_learner(), strength).meta_gradient(
        {"weight": row(4.5, -0.5)}, Episode(SUPPORT, QUERY), NO_MINIBATCHES
    )
    assert close(gradient, central_differences(objective, [row(4.5, -0.5)], size=1e-3), atol=1e-8)


@pytest.mark.parametrize("strength", [1.0, 2.0])
@pytest.mark.parametrize("kind", LOSSES)
def test_implicit_gradient_of_a_network_equals_autograd_through_a_long_inner_loop(kind: str, strength: float) -> None:
    algorithm, episode = imaml(tanh_learner(kind), strength), random_episode(kind)
    theta = leaves(algorithm.init())
    objective = LOSSES[kind](proximal_point(LOSSES[kind], theta, episode.support, strength), episode.query)
    gradient, loss = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert close(gradient, torch.autograd.grad(objective, theta), atol=1e-10)
    assert loss.item() == pytest.approx(objective.item(), abs=1e-12)


def test_a_very_strong_pull_leaves_the_gradient_of_the_query_loss_at_theta() -> None:
    algorithm, episode = imaml(tanh_learner("regression"), strength=1e12), random_episode("regression")
    theta = leaves(algorithm.init())
    gradient, _ = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert close(gradient, torch.autograd.grad(LOSSES["regression"](theta, episode.query), theta), atol=1e-9)


def test_adaptation_at_evaluation_goes_to_the_proximal_point() -> None:
    algorithm, support = imaml(tanh_learner("classification"), strength=2.0), random_episode("classification").support
    expected = proximal_point(LOSSES["classification"], leaves(algorithm.init()), support, 2.0)
    path = list(algorithm.adaptation_path(algorithm.init(), support, 0.3, 100))
    assert close(path[-1], expected, atol=1e-10)
    assert not close(path[1], expected, atol=1e-3)


def random_system(size: int) -> tuple[Callable[[Params], Params], Tensor, Tensor]:
    """(matrix over two tensors, the same as an array, right-hand side): symmetric, with eigenvalues 1..size."""
    source = torch.Generator().manual_seed(size)
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=source, dtype=torch.float64))
    array = turn @ torch.diag(torch.arange(1.0, size + 1, dtype=torch.float64)) @ turn.T
    return lambda p: split(array @ joined(p)), array, torch.randn(size, generator=source, dtype=torch.float64)


def split(flat: Tensor) -> Params:
    return {"a": flat[:2], "b": flat[2:]}


def joined(params: Params) -> Tensor:
    return torch.cat([params["a"], params["b"]])


@pytest.mark.parametrize("size", [3, 8])
def test_conjugate_gradient_is_exact_after_as_many_steps_as_numbers_and_not_before(size: int) -> None:
    matrix, array, right = random_system(size)
    expected = torch.linalg.solve(array, right)
    assert torch.allclose(joined(conjugate_gradient(matrix, split(right), size)), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(joined(conjugate_gradient(matrix, split(right), size - 1)), expected, rtol=0, atol=1e-6)
    assert torch.allclose(joined(conjugate_gradient(matrix, split(right), 20 * size)), expected, rtol=0, atol=1e-10)


def test_first_steps_of_conjugate_gradient_by_hand() -> None:
    # A = [[2, 1], [1, 1]], b = (1, 0): step |b|^2 / b'Ab = 1/2, x = (1/2, 0), residual b - (1, 1/2) = (0, -1/2).
    # Direction (0, -1/2) + 1/4 (1, 0) = (1/4, -1/2), its image (0, -1/4), curvature 1/8, step (1/4) / (1/8) = 2: x = (1, -1).
    for steps, expected in ((1, row(0.5, 0)), (2, row(1, -1))):
        x = conjugate_gradient(lambda p: {"w": p["w"] @ HESSIAN}, {"w": row(1, 0)}, steps)
        assert torch.allclose(x["w"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("right", [(0.0, 0.0), (1.0, 0.0), (1e-200, 0.0)])
def test_a_residual_of_zero_stays_finite(right: tuple[float, float]) -> None:
    # diag(2, 4): exact in the first step, so every further one has nothing left to do.
    x = conjugate_gradient(lambda p: {"w": p["w"] * row(2, 4)}, {"w": row(*right)}, 6)
    assert torch.allclose(x["w"], row(right[0] / 2, 0), rtol=1e-12, atol=1e-100)


@pytest.mark.parametrize("diagonal", [(-1.0, -1.0), (0.0, 0.0), (-3.0, 1.0), (-1.0, 1.0)])
def test_a_direction_of_no_positive_curvature_is_not_followed(diagonal: tuple[float, float]) -> None:
    # b'Mb is at most 0 for b = (1, 1): the first step stays at 0, and with it all others.
    x = conjugate_gradient(lambda p: {"w": p["w"] * row(*diagonal)}, {"w": row(1, 1)}, 50)
    assert torch.equal(x["w"], row(0, 0))


def test_negative_curvature_beside_positive_one_stays_finite() -> None:
    x = conjugate_gradient(lambda p: {"w": p["w"] * row(-1, 4)}, {"w": row(1, 2)}, 50)
    assert torch.isfinite(x["w"]).all()


@pytest.mark.parametrize("wrong", [{"strength": 0.0}, {"strength": -1.0}, {"cg-steps": 0}, {"damping": -0.1}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Imaml.Options.model_validate(wrong)
