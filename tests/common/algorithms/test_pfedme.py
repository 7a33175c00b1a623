"""pFedMe against the gradient of the Moreau envelope: in closed form by hand, and in plain autograd."""

import numpy as np
import pytest
import torch
from plain_torch import (
    LOSSES,
    close,
    leaves,
    line_learner,
    proximal_point,
    quadratic,
    random_episode,
    row,
    tanh_learner,
    together,
)
from pydantic import ValidationError
from torch import Tensor

from quickbloom.common.algorithms.pfedme import PFedMe
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.learner import Learner


def pfedme(learner: Learner, strength: float, local_lr: float, inner_steps: int = 200) -> PFedMe:
    settings = {"inner-lr": 0.3, "inner-steps": inner_steps, "strength": strength, "local-lr": local_lr}
    return PFedMe(PFedMe.Options.model_validate(settings), learner)


def walk(rows: list[list[int]]) -> Minibatches:
    index = torch.tensor(rows)
    return Minibatches(index, torch.ones(index.shape, dtype=torch.float64))


@pytest.mark.parametrize(("local_steps", "expected"), [(1, (0.3, 0.1)), (2, (0.3 + 2.96 / 11, 0.1 + 0.92 / 11))])
def test_local_steps_on_a_quadratic_by_hand(local_steps: int, expected: tuple[float, float]) -> None:
    # L = (w - s)' A (w - s) / 2 with A = [[2, 1], [1, 1]], s = (1, 0); lambda = 2, eta = 0.1, w = (4.5, -0.5).
    # phi = (A + 2 I)^-1 (A s + 2 w) = [[3, -1], [-1, 4]] / 11 (11, 0) = (3, -1).
    # R = 1: eta lambda (w - phi) = 0.2 (1.5, 0.5) = (0.3, 0.1), w = (4.2, -0.6).
    # R = 2: A s + 2 w = (10.4, -0.2), phi = (31.4, -11.2) / 11, 0.2 (w - phi) = 0.2 (14.8, 4.6) / 11 = (2.96, 0.92) / 11.
    whole = quadratic([[1, 0], [1, 1]], [1, 0])
    episode = Episode(Batch(*(part[:1] for part in whole)), Batch(*(part[1:] for part in whole)))
    gradient, _ = pfedme(line_learner(), 2, 0.1).meta_gradient(
        {"weight": row(4.5, -0.5)}, episode, walk([[0, 1]] * local_steps)
    )
    assert torch.allclose(gradient["weight"], row(*expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_local_step_is_a_step_along_the_gradient_of_the_moreau_envelope(kind: str) -> None:
    algorithm, episode = pfedme(tanh_learner(kind), 2.0, 0.25), random_episode(kind, 3, 2)
    batch = together(episode)

    w = leaves(algorithm.init())
    phi = proximal_point(LOSSES[kind], w, batch, 2.0)
    pull: Tensor = sum(((p - a) ** 2).sum() for p, a in zip(phi, w, strict=True))  # type: ignore[assignment]
    slopes = torch.autograd.grad(LOSSES[kind](phi, batch) + 2.0 / 2 * pull, w)
    gradient, _ = algorithm.meta_gradient(algorithm.init(), episode, walk([[0, 1, 2, 3, 4]]))
    assert close(gradient, [0.25 * slope for slope in slopes], atol=1e-10)


@pytest.mark.parametrize("strength", [2.0, 3.0])
@pytest.mark.parametrize("kind", LOSSES)
def test_contribution_equals_plain_torch_over_minibatches_of_support_and_query(kind: str, strength: float) -> None:
    algorithm, episode = pfedme(tanh_learner(kind), strength, 0.25), random_episode(kind)
    rows = [[0, 7, 3], [10, 1, 8], [2, 9, 4]]
    theta = w = leaves(algorithm.init())
    for positions in rows:
        batch = Batch(*(part[positions] for part in together(episode)))
        phi = [value.detach() for value in proximal_point(LOSSES[kind], w, batch, strength)]
        w = [(value - 0.25 * strength * (value - p)).detach().requires_grad_() for value, p in zip(w, phi, strict=True)]
    gradient, loss = algorithm.meta_gradient(algorithm.init(), episode, walk(rows))
    assert close(gradient, [a - b for a, b in zip(theta, w, strict=True)], atol=1e-10)
    assert loss.item() == pytest.approx(LOSSES[kind](phi, episode.query).item(), abs=1e-10)


def test_personal_parameters_are_the_proximal_point_on_the_support_set_alone() -> None:
    algorithm, support = pfedme(tanh_learner("classification"), 2.0, 0.25), random_episode("classification").support
    expected = proximal_point(LOSSES["classification"], leaves(algorithm.init()), support, 2.0)
    *_, personal = algorithm.adaptation_path(algorithm.init(), support, 0.3, 100)
    assert close(personal, expected, atol=1e-10)


def test_every_local_step_has_a_minibatch_of_its_own() -> None:
    options = PFedMe.Options.model_validate({"inner-lr": 0.1, "local-steps": 4, "inner-steps": 3, "batch-size": 2})
    rows = PFedMe(options, line_learner()).minibatch_indices(8, np.random.default_rng(0))
    assert rows.shape == (4, 2)
    assert sorted(rows.ravel().tolist()) == list(range(8))


@pytest.mark.parametrize(("eta", "strength"), [(1.0, 2.0), (0.5, 15.0)])
def test_local_steps_that_would_overshoot_more_than_twice_are_refused(eta: float, strength: float) -> None:
    # w - phi is multiplied by 1 - eta lambda where the loss is flat: at eta lambda >= 2 it never shrinks.
    with pytest.raises(ValidationError, match="must be below 2"):
        PFedMe.Options.model_validate({"local-lr": eta, "strength": strength})
