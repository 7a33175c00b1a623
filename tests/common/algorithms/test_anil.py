"""ANIL against plain autograd, finite differences, and a product of two weights worked by hand."""

from itertools import pairwise

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
    moved,
    random_episode,
    row,
    tanh_learner,
)
from torch import Tensor, nn

from quickbloom.common.algorithms.anil import Anil
from quickbloom.common.algorithms.maml import Maml
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Episode
from quickbloom.common.maths.learner import Learner


def anil(kind: str, steps: int = 2, head: str = "auto") -> Anil:
    return Anil(Anil.Options.model_validate({"inner-lr": 0.4, "inner-steps": steps, "head": head}), tanh_learner(kind))


def plain_objective(kind: str, theta: Weights, episode: Episode, steps: int, head: slice = slice(2, 4)) -> Tensor:
    """L_Q after `steps` steps of the tensors `head` alone."""
    phi = list(theta)
    for _ in range(steps):
        phi[head] = moved(phi[head], torch.autograd.grad(LOSSES[kind](phi, episode.support), phi[head], create_graph=True), 0.4)
    return LOSSES[kind](phi, episode.query)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", LOSSES)
def test_anil_gradient_equals_plain_autograd_through_the_steps_of_the_head(kind: str, steps: int) -> None:
    algorithm, episode = anil(kind, steps), random_episode(kind)
    theta = leaves(algorithm.init())
    objective = plain_objective(kind, theta, episode, steps)
    gradient, loss = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert close(gradient, torch.autograd.grad(objective, theta), atol=1e-10)
    assert loss.item() == pytest.approx(objective.item(), abs=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_anil_gradient_matches_finite_differences_of_the_true_objective(kind: str) -> None:
    algorithm, episode = anil(kind), random_episode(kind)

    def objective(theta: Weights) -> Tensor:
        return plain_objective(kind, [value.requires_grad_() for value in map(torch.clone, theta)], episode, 2)

    gradient, _ = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert close(gradient, central_differences(objective, list(algorithm.init().values())), atol=1e-8)


def test_a_body_before_an_adapted_head_feels_the_inner_step_by_hand() -> None:
    # Output h b x with body b = 2, head h = 1, at x = 1. Support target 0: L_S = (h b)^2, dL_S/dh = 2 h b^2 = 8.
    # alpha 0.1: h' = 1 - 0.8 = 0.2. Query target 1: L_Q = (h' b - 1)^2 = 0.36, dL_Q/dh' = 2 * -0.6 * 2 = -2.4.
    # g_h = -2.4 dh'/dh = -2.4 (1 - 0.1 * 2 b^2) = -0.48.
    # g_b = 2 * -0.6 * h' - 2.4 dh'/db = -0.24 - 2.4 * (-0.1 * 4 h b) = -0.24 + 1.92 = 1.68; first order has -0.24.
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    algorithm = Anil(Anil.Options.model_validate({"inner-lr": 0.1, "inner-steps": 1}), Learner(module, "regression"))
    episode = Episode(Batch.of(row(1), row(0)), Batch.of(row(1), row(1)))
    gradient, loss = algorithm.meta_gradient({"0.weight": row(2), "1.weight": row(1)}, episode, NO_MINIBATCHES)
    assert gradient["0.weight"].item() == pytest.approx(1.68, abs=1e-12)
    assert gradient["1.weight"].item() == pytest.approx(-0.48, abs=1e-12)
    assert loss.item() == pytest.approx(0.36, abs=1e-12)


def test_only_the_head_adapts_at_evaluation() -> None:
    algorithm = anil("classification")
    meta = algorithm.init()
    path = list(algorithm.adaptation_path(meta, random_episode("classification").support, 0.4, 3))
    for before, after in pairwise(path):
        assert torch.equal(after["0.weight"], meta["0.weight"])
        assert torch.equal(after["0.bias"], meta["0.bias"])
        assert not torch.equal(after["2.weight"], before["2.weight"])
        assert not torch.equal(after["2.bias"], before["2.bias"])


def test_the_head_may_be_named_by_the_beginning_of_its_parameters() -> None:
    algorithm, episode = anil("regression", steps=2, head="0."), random_episode("regression")
    theta = leaves(algorithm.init())
    expected = torch.autograd.grad(plain_objective("regression", theta, episode, 2, head=slice(0, 2)), theta)
    gradient, _ = algorithm.meta_gradient(algorithm.init(), episode, NO_MINIBATCHES)
    assert close(gradient, expected, atol=1e-10)


def test_anil_is_not_maml_as_the_body_stays_in_the_inner_loop() -> None:
    episode = random_episode("classification")
    maml = Maml(Maml.Options.model_validate({"inner-lr": 0.4, "inner-steps": 2}), tanh_learner("classification"))
    found = [a.meta_gradient(a.init(), episode, NO_MINIBATCHES)[0] for a in (anil("classification"), maml)]
    assert not close(found[0], list(found[1].values()), atol=1e-3)


@pytest.mark.parametrize("head", ["9.", "0.,2.", ""])
def test_a_head_of_no_or_of_all_parameters_is_refused(head: str) -> None:
    with pytest.raises(ConfigError, match=r"`anil\.head` must name some but not all parameters"):
        anil("classification", head=head)


def test_a_model_of_one_layer_has_no_head_to_adapt() -> None:
    with pytest.raises(ConfigError, match=r"`anil\.head`"):
        Anil(Anil.Options.model_validate({"inner-lr": 0.4}), line_learner())
