"""MAML against gradients that share no code with it: plain autograd, finite differences, and a quadratic worked by hand."""

from collections.abc import Callable, Sequence

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from quickbloom.common.algorithms.fomaml import FoMaml
from quickbloom.common.algorithms.maml import Maml
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params

NO_MINIBATCHES = Minibatches(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0))
Weights = list[Tensor]
Loss = Callable[[Weights, Batch], Tensor]


def learner(kind: str) -> Learner:
    """3 inputs, 4 tanh units, 3 outputs, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Learner(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), kind)


def episode(kind: str, seed: int = 0) -> Episode:
    source = torch.Generator().manual_seed(seed)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 3, generator=source, dtype=torch.float64)
        y = torch.randn(size, 3, generator=source, dtype=torch.float64)
        return Batch.of(x, torch.randint(3, (size,), generator=source) if kind == "classification" else y)

    return Episode(batch(6), batch(5))


def cross_entropy(weights: Weights, batch: Batch) -> Tensor:
    w1, b1, w2, b2 = weights
    outputs = torch.tanh(batch.x @ w1.T + b1) @ w2.T + b2
    return (outputs.logsumexp(1) - outputs[torch.arange(len(batch.y)), batch.y]).mean()


def squared_error(weights: Weights, batch: Batch) -> Tensor:
    w1, b1, w2, b2 = weights
    outputs = torch.tanh(batch.x @ w1.T + b1) @ w2.T + b2
    return ((outputs - batch.y) ** 2).sum() / outputs.numel()


LOSSES: dict[str, Loss] = {"classification": cross_entropy, "regression": squared_error}


def adapted(loss: Loss, theta: Weights, support: Batch, lr: float, steps: int) -> Weights:
    phi = theta
    for _ in range(steps):
        slopes = torch.autograd.grad(loss(phi, support), phi, create_graph=True)
        phi = [p - lr * s for p, s in zip(phi, slopes, strict=True)]
    return phi


def leaves(params: Params) -> Weights:
    return [value.clone().requires_grad_() for value in params.values()]


def close(gradient: Params, expected: Sequence[Tensor], atol: float) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(gradient.values(), expected, strict=True))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", LOSSES)
def test_maml_gradient_equals_plain_autograd_through_the_inner_loop(kind: str, steps: int) -> None:
    maml = Maml(Maml.Options.model_validate({"inner-lr": 0.4, "inner-steps": steps}), learner(kind))
    support, query = episode(kind)
    theta = leaves(maml.init())
    objective = LOSSES[kind](adapted(LOSSES[kind], theta, support, 0.4, steps), query)
    expected = torch.autograd.grad(objective, theta)
    gradient, loss = maml.meta_gradient(maml.init(), Episode(support, query), NO_MINIBATCHES)
    assert close(gradient, expected, atol=1e-10)
    assert loss.item() == pytest.approx(objective.item(), abs=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_maml_gradient_matches_finite_differences_of_the_true_objective(kind: str) -> None:
    maml = Maml(Maml.Options.model_validate({"inner-lr": 0.4, "inner-steps": 2}), learner(kind))
    support, query = episode(kind)
    theta, size = leaves(maml.init()), 1e-5

    def objective() -> float:
        return LOSSES[kind](adapted(LOSSES[kind], theta, support, 0.4, 2), query).item()

    slopes = []
    for leaf in theta:
        flat = leaf.data.view(-1)
        for i in range(len(flat)):
            flat[i] += size
            above = objective()
            flat[i] -= 2 * size
            slopes.append((above - objective()) / (2 * size))
            flat[i] += size
    gradient, _ = maml.meta_gradient(maml.init(), Episode(support, query), NO_MINIBATCHES)
    found = torch.cat([value.flatten() for value in gradient.values()])
    assert torch.allclose(found, torch.tensor(slopes, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_maml_gradient_of_a_quadratic_carries_the_factor_of_every_inner_step(steps: int) -> None:
    # One weight, support (x=1, y=3), query (x=1, y=5): L_S(w) = (w - 3)^2 with curvature a = 2, so one step multiplies w - 3 by
    # 1 - alpha a, and phi_k = 3 + (1 - alpha a)^k (w - 3). Hence d L_Q(phi_k) / dw = 2 (phi_k - 5) (1 - alpha a)^k.
    alpha, w, factor = 0.1, 7.0, (1 - 0.1 * 2) ** steps
    phi = 3 + factor * (w - 3)
    maml = Maml(
        Maml.Options.model_validate({"inner-lr": alpha, "inner-steps": steps}),
        Learner(nn.Linear(1, 1, bias=False).double(), "regression"),
    )
    meta = {"weight": torch.tensor([[w]], dtype=torch.float64)}
    one = torch.ones(1, 1, dtype=torch.float64)
    gradient, loss = maml.meta_gradient(meta, Episode(Batch.of(one, 3 * one), Batch.of(one, 5 * one)), NO_MINIBATCHES)
    assert gradient["weight"].item() == pytest.approx(2 * (phi - 5) * factor, abs=1e-12)
    assert loss.item() == pytest.approx((phi - 5) ** 2, abs=1e-12)


def test_maml_at_a_vanishing_inner_rate_is_the_gradient_of_the_query_loss() -> None:
    maml = Maml(Maml.Options.model_validate({"inner-lr": 1e-12, "inner-steps": 3}), learner("classification"))
    support, query = episode("classification")
    theta = leaves(maml.init())
    expected = torch.autograd.grad(cross_entropy(theta, query), theta)
    gradient, _ = maml.meta_gradient(maml.init(), Episode(support, query), NO_MINIBATCHES)
    assert close(gradient, expected, atol=1e-10)


@pytest.mark.parametrize("kind", LOSSES)
def test_maml_and_fomaml_differ_by_the_second_derivatives(kind: str) -> None:
    options = Maml.Options.model_validate({"inner-lr": 0.4, "inner-steps": 3})
    exact, loss = Maml(options, learner(kind)).meta_gradient(learner(kind).initial(), episode(kind), NO_MINIBATCHES)
    first, same = FoMaml(options, learner(kind)).meta_gradient(learner(kind).initial(), episode(kind), NO_MINIBATCHES)
    assert not close(exact, list(first.values()), atol=1e-3)
    assert loss.item() == pytest.approx(same.item(), abs=1e-14)


@pytest.mark.parametrize("wrong", [{"inner_lr": -0.1}, {"inner_lr": float("nan")}, {"inner_steps": 0}, {"inner_steps": 1.0}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Maml.Options.model_validate(wrong)
