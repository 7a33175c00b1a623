"""Meta-SGD against plain autograd, finite differences, and a quadratic worked by hand."""

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
    quadratic,
    random_episode,
    row,
    tanh_learner,
)
from pydantic import ValidationError
from torch import Tensor

from quickbloom.common.algorithms.maml import Maml
from quickbloom.common.algorithms.metasgd import MetaSgd
from quickbloom.common.maths.batch import Episode
from quickbloom.common.maths.params import Params


def metasgd(kind: str, steps: int = 1) -> MetaSgd:
    return MetaSgd(MetaSgd.Options.model_validate({"inner-lr": 0.3, "inner-steps": steps}), tanh_learner(kind))


def uneven(algorithm: MetaSgd) -> Params:
    """Theta as it is, with rates between 0.1 and 0.5 that all differ."""
    meta = algorithm.init()
    source = torch.Generator().manual_seed(0)
    for name in [name for name in meta if name.startswith("rate/")]:
        meta[name] = 0.1 + 0.4 * torch.rand(meta[name].shape, generator=source, dtype=torch.float64)
    return meta


def plain_objective(kind: str, meta: Weights, episode: Episode, steps: int) -> Tensor:
    """L_Q of theta - a * grad L_S, `steps` times; theta is the first half of `meta`, a the second."""
    phi, rates = meta[:4], meta[4:]
    for _ in range(steps):
        slopes = torch.autograd.grad(LOSSES[kind](phi, episode.support), phi, create_graph=True)
        phi = [p - a * s for p, a, s in zip(phi, rates, slopes, strict=True)]
    return LOSSES[kind](phi, episode.query)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_of_theta_and_of_the_rates_equals_plain_autograd(kind: str, steps: int) -> None:
    algorithm, episode = metasgd(kind, steps), random_episode(kind)
    meta = leaves(uneven(algorithm))
    objective = plain_objective(kind, meta, episode, steps)
    gradient, loss = algorithm.meta_gradient(uneven(algorithm), episode, NO_MINIBATCHES)
    assert close(gradient, torch.autograd.grad(objective, meta), atol=1e-10)
    assert loss.item() == pytest.approx(objective.item(), abs=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradient_of_theta_and_of_the_rates_matches_finite_differences(kind: str) -> None:
    algorithm, episode = metasgd(kind), random_episode(kind)

    def objective(meta: Weights) -> Tensor:
        return plain_objective(kind, [value.requires_grad_() for value in map(torch.clone, meta)], episode, 1)

    gradient, _ = algorithm.meta_gradient(uneven(algorithm), episode, NO_MINIBATCHES)
    assert close(gradient, central_differences(objective, list(uneven(algorithm).values())), atol=1e-8)


def test_gradient_of_a_quadratic_by_hand() -> None:
    # Per coordinate L_S = h/2 (phi - s)^2 with h = (4, 1), s = (0, 1); L_Q = 1/2 (phi - q)^2 with q = (3, 0).
    # theta = (1, 2), a = (0.1, 0.5): grad L_S = h (theta - s) = (4, 1), phi = (0.6, 1.5), phi - q = (-2.4, 1.5).
    # d/dtheta = (1 - a h) (phi - q) = (0.6 * -2.4, 0.5 * 1.5) = (-1.44, 0.75).
    # d/da = -grad L_S (phi - q) = (-4 * -2.4, -1 * 1.5) = (9.6, -1.5): even the signs differ from theta's.
    algorithm = MetaSgd(MetaSgd.Options.model_validate({"inner-lr": 0.3, "inner-steps": 1}), line_learner())
    episode = Episode(quadratic([[2, 0], [0, 1]], [0, 1]), quadratic([[1, 0], [0, 1]], [3, 0]))
    meta = {"weight": row(1, 2), "rate/weight": row(0.1, 0.5)}
    gradient, loss = algorithm.meta_gradient(meta, episode, NO_MINIBATCHES)
    assert torch.allclose(gradient["weight"], row(-1.44, 0.75), rtol=0, atol=1e-12)
    assert torch.allclose(gradient["rate/weight"], row(9.6, -1.5), rtol=0, atol=1e-12)
    assert loss.item() == pytest.approx((2.4**2 + 1.5**2) / 2, abs=1e-12)


def test_rates_travel_and_start_at_the_inner_rate() -> None:
    meta = metasgd("classification").init()
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(meta) == names + [f"rate/{name}" for name in names]
    for name in names:
        assert meta[f"rate/{name}"].shape == meta[name].shape
        assert (meta[f"rate/{name}"] == 0.3).all()


@pytest.mark.parametrize("steps", [1, 3])
def test_with_equal_rates_theta_moves_as_in_maml(steps: int) -> None:
    algorithm, episode = metasgd("regression", steps), random_episode("regression")
    maml = Maml(Maml.Options.model_validate({"inner-lr": 0.3, "inner-steps": steps}), tanh_learner("regression"))
    expected, same = maml.meta_gradient(maml.init(), episode, NO_MINIBATCHES)
    gradient, loss = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    theta = {name: value for name, value in gradient.items() if not name.startswith("rate/")}
    assert close(theta, list(expected.values()), atol=1e-12)
    assert loss.item() == pytest.approx(same.item(), abs=1e-14)


@pytest.mark.parametrize("lr", [0.3, 0.6])
def test_evaluation_scales_the_learned_rates_by_the_rate_over_the_inner_rate(lr: float) -> None:
    # theta = (1, 2), a = (0.1, 0.5), grad L_S = (4, 1) as above: at lr = inner-lr = 0.3 theta - a grad, at 0.6 twice as far.
    algorithm = MetaSgd(MetaSgd.Options.model_validate({"inner-lr": 0.3}), line_learner())
    meta = {"weight": row(1, 2), "rate/weight": row(0.1, 0.5)}
    before, after = algorithm.adaptation_path(meta, quadratic([[2, 0], [0, 1]], [0, 1]), lr, 1)
    assert torch.equal(before["weight"], row(1, 2))
    assert torch.allclose(after["weight"], row(1, 2) - lr / 0.3 * row(0.4, 0.5), rtol=0, atol=1e-12)
    assert before.keys() == after.keys() == {"weight"}


def test_a_negative_first_rate_is_refused() -> None:
    with pytest.raises(ValidationError, match="inner-lr"):
        MetaSgd.Options.model_validate({"inner-lr": -0.1})
