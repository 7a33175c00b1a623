"""FO-MAML against plain autograd at phi_k, and a quadratic worked by hand."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from quickbloom.common.algorithms.fomaml import FoMaml
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.learner import Learner

NO_MINIBATCHES = Minibatches(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0))


def learner() -> Learner:
    """3 inputs, 4 tanh units, 3 classes, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Learner(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), "classification")


def batch(size: int, seed: int) -> Batch:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=source, dtype=torch.float64)
    return Batch.of(x, torch.randint(3, (size,), generator=source))


def cross_entropy(weights: list[Tensor], examples: Batch) -> Tensor:
    w1, b1, w2, b2 = weights
    outputs = torch.tanh(examples.x @ w1.T + b1) @ w2.T + b2
    return (outputs.logsumexp(1) - outputs[torch.arange(len(examples.y)), examples.y]).mean()


def slopes(weights: list[Tensor], examples: Batch) -> list[Tensor]:
    fresh = [value.detach().clone().requires_grad_() for value in weights]
    return list(torch.autograd.grad(cross_entropy(fresh, examples), fresh))


@pytest.mark.parametrize("steps", [1, 4])
def test_fomaml_gradient_equals_plain_autograd_at_the_adapted_parameters(steps: int) -> None:
    fomaml = FoMaml(FoMaml.Options.model_validate({"inner-lr": 0.4, "inner-steps": steps}), learner())
    support, query = batch(6, 0), batch(5, 1)
    phi = list(fomaml.init().values())
    for _ in range(steps):
        phi = [p - 0.4 * s for p, s in zip(phi, slopes(phi, support), strict=True)]
    gradient, loss = fomaml.meta_gradient(fomaml.init(), Episode(support, query), NO_MINIBATCHES)
    for found, expected in zip(gradient.values(), slopes(phi, query), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    assert loss.item() == pytest.approx(cross_entropy(phi, query).item(), abs=1e-12)


def test_fomaml_gradient_of_a_quadratic_lacks_the_factor_of_the_inner_steps() -> None:
    # L_S(w) = (w - 3)^2 from w = 7 with alpha 0.1: w - 3 shrinks by 1 - 0.2 = 0.8 per step, phi_2 = 3 + 0.64 * 4 = 5.56.
    # L_Q(w) = (w - 5)^2: gradient 2 * 0.56 = 1.12, loss 0.56^2 = 0.3136. MAML would have 1.12 * 0.64.
    fomaml = FoMaml(
        FoMaml.Options.model_validate({"inner-lr": 0.1, "inner-steps": 2}),
        Learner(nn.Linear(1, 1, bias=False).double(), "regression"),
    )
    one = torch.ones(1, 1, dtype=torch.float64)
    episode = Episode(Batch.of(one, 3 * one), Batch.of(one, 5 * one))
    gradient, loss = fomaml.meta_gradient({"weight": 7 * one}, episode, NO_MINIBATCHES)
    assert gradient["weight"].item() == pytest.approx(1.12, abs=1e-12)
    assert loss.item() == pytest.approx(0.3136, abs=1e-12)


def test_query_gradient_is_over_all_query_examples_and_no_support_example() -> None:
    # At a vanishing inner rate phi = theta, so the gradient must be that of the whole query set alone.
    fomaml = FoMaml(FoMaml.Options.model_validate({"inner-lr": 1e-12, "inner-steps": 1}), learner())
    support, query = batch(40, 2), batch(37, 3)
    gradient, _ = fomaml.meta_gradient(fomaml.init(), Episode(support, query), NO_MINIBATCHES)
    for found, expected in zip(gradient.values(), slopes(list(fomaml.init().values()), query), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_an_unknown_outer_optimizer_is_refused() -> None:
    with pytest.raises(ValidationError):
        FoMaml.Options.model_validate({"outer-optimizer": "rmsprop"})
