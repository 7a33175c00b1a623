"""ALPaCA against Gaussian process regression with its kernel, finite differences, and the exact mixed model."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from plain_torch import NO_MINIBATCHES, Weights, central_differences, close, random_episode, tanh_learner
from torch import Tensor

from quickbloom.common.algorithms.alpaca import FACTOR, NOISE, Alpaca
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.inner_loop import last
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.linear_head import STRETCH
from quickbloom.common.maths.params import Params
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.randomness import generator
from quickbloom.server_app.federation.outer import OuterOptimizer


def alpaca(learner: Learner | None = None, **options: Any) -> Alpaca:
    return Alpaca(Alpaca.Options.model_validate({"inner-lr": 0.1, **options}), learner or tanh_learner("regression"))


def uneven(algorithm: Alpaca) -> Params:
    """Meta-parameters of which none is 0."""
    meta, source = algorithm.init(), torch.Generator().manual_seed(0)
    for name in ("2.weight", "2.bias"):
        meta[name] = 0.3 * torch.randn(meta[name].shape, generator=source, dtype=torch.float64)
    factor = torch.randn(5, 5, generator=source, dtype=torch.float64)
    meta[FACTOR] = 0.4 * factor.tril(-1) + torch.diag(factor.diagonal()) * 0.3 / STRETCH
    meta[NOISE] = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64).log() / STRETCH
    return meta


def features(meta: Params, x: Tensor) -> np.ndarray:
    found = np.tanh(x.numpy() @ meta["0.weight"].numpy().T + meta["0.bias"].numpy())
    augmented: np.ndarray = np.c_[found, np.ones(len(found))]
    return augmented


@pytest.mark.parametrize("support", [1, 4, 30])
def test_predictions_are_those_of_a_gaussian_process_with_the_kernel_of_the_prior(support: int) -> None:
    # The other view of the same model (Rasmussen, Williams 2006, Equations 2.25 and 2.26): no head anywhere.
    algorithm, episode = alpaca(), random_episode("regression", support=support)
    meta = uneven(algorithm)
    factor = meta[FACTOR].tril(-1).numpy() + np.diag(np.exp(STRETCH * meta[FACTOR].diagonal().numpy()))
    prior = np.linalg.inv(factor @ factor.T)
    shared = np.r_[meta["2.weight"].numpy().T, meta["2.bias"].numpy()[None]]
    seen, new = features(meta, episode.support.x), features(meta, episode.query.x)
    gain = new @ prior @ seen.T @ np.linalg.inv(seen @ prior @ seen.T + np.eye(len(seen)))
    mean = new @ shared + gain @ (episode.support.y.numpy() - seen @ shared)
    variance = 1 + np.diag(new @ prior @ new.T - gain @ seen @ prior @ new.T)
    personal = last(algorithm.adaptation_path(meta, episode.support, 0.1, 1))
    np.testing.assert_allclose(algorithm.predict(personal, episode.query.x).numpy(), mean, atol=1e-9)
    deviation = np.sqrt(variance)[:, None] * np.exp(STRETCH * meta[NOISE].numpy())
    np.testing.assert_allclose(algorithm.deviation(personal, episode.query.x).numpy(), deviation, atol=1e-9)


def test_the_gradient_is_that_of_the_likelihood_of_the_query_set() -> None:
    algorithm, episode = alpaca(), random_episode("regression")
    meta = uneven(algorithm)
    names = list(meta)

    def objective(weights: Weights) -> Tensor:
        personal = last(algorithm.adaptation_path(dict(zip(names, weights, strict=True)), episode.support, 0.1, 1))
        mean, deviation = algorithm.predict(personal, episode.query.x), algorithm.deviation(personal, episode.query.x)
        densities = torch.distributions.Normal(mean, deviation).log_prob(episode.query.y)  # type: ignore[no-untyped-call]
        total: Tensor = densities.sum(dim=1).mean()
        return -total - 1.5 * math.log(2 * math.pi)

    gradient, loss = algorithm.meta_gradient(meta, episode, NO_MINIBATCHES)
    assert close(gradient, central_differences(objective, list(meta.values())), atol=1e-6)
    personal = last(algorithm.adaptation_path(meta, episode.support, 0.1, 1))
    expected = (algorithm.predict(personal, episode.query.x) - episode.query.y).square().mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert all(gradient[name].abs().max() > 1e-3 for name in (FACTOR, NOISE, "0.weight", "2.weight"))


SPREADS, SHARED, NOISE_OF_DATA = np.array([0.8, 0.3, 0.05, 0.5]), np.array([1.0, -0.5, 0.3, 0.7]), 0.5
"""Of the slopes of three inputs and the intercept over users: their deviations and means; and the noise of a row."""


def user(rng: np.random.Generator, rows: int, more: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs with a column of ones [rows + more, 4], and targets, of a user with slopes of its own."""
    slopes = SHARED + SPREADS * rng.normal(size=4)
    x = np.c_[rng.normal(size=(rows + more, 3)), np.ones(rows + more)]
    return x, x @ slopes + NOISE_OF_DATA * rng.normal(size=rows + more)


def batch(x: np.ndarray, y: np.ndarray) -> Batch:
    return Batch.of(torch.tensor(x[:, :3], dtype=torch.float32), torch.tensor(y[:, None], dtype=torch.float32))


def trained(rounds: int, users: int) -> tuple[Alpaca, Params]:
    """With default settings and a model of one linear layer, on users of 5 to 50 rows."""
    rng = np.random.default_rng(0)
    algorithm = alpaca(Learner(perceptron((3, 1)), "regression", 1))
    outer = OuterOptimizer(algorithm.options, algorithm.init(), rounds)
    data = [user(rng, int(rng.integers(5, 51))) for _ in range(users)]
    for number in range(1, rounds + 1):
        work = []
        for i, (x, y) in enumerate(data):
            order = generator(0, "test", number, i).permutation(len(y))
            parts = np.split(order, [max(1, len(y) // 2)])
            support, query = (batch(x[part], y[part]) for part in parts)
            work.append(TaskWork(TaskData(support, query, query), generator(0, "work", i)))
        outer.step(run_round(algorithm, outer.leaves, work, chunk_size=256).gradient, number)
    return algorithm, outer.meta


def test_random_slopes_are_predicted_as_by_the_exact_mixed_model() -> None:
    algorithm, meta = trained(rounds=100, users=140)
    rng, covered = np.random.default_rng(1), []
    errors: dict[str, list[float]] = {"alpaca": [], "exact": [], "own ridge": [], "shared": []}
    for _ in range(60):
        rows = int(rng.integers(5, 51))
        x, y = user(rng, rows, more=200)
        (seen, known), (new, truth) = (x[:rows], y[:rows]), (x[rows:], y[rows:])
        personal = last(algorithm.adaptation_path(meta, batch(seen, known), 0.1, 1))
        inputs = batch(new, truth).x
        found, deviation = (f(personal, inputs).numpy()[:, 0] for f in (algorithm.predict, algorithm.deviation))
        covered.append((np.abs(found - truth) < 1.6449 * deviation).mean())
        # Henderson's best linear unbiased predictor with the true variances: nothing that is learned can beat it.
        precision = seen.T @ seen / NOISE_OF_DATA**2 + np.diag(SPREADS**-2.0)
        exact = SHARED + np.linalg.solve(precision, seen.T @ (known - seen @ SHARED) / NOISE_OF_DATA**2)
        own = np.linalg.solve(seen.T @ seen + np.eye(4), seen.T @ known)
        for name, guess in (("alpaca", found), ("exact", new @ exact), ("own ridge", new @ own), ("shared", new @ SHARED)):
            errors[name].append(((guess - truth) ** 2).mean())
    error = {name: math.sqrt(np.mean(values)) for name, values in errors.items()}
    assert error["alpaca"] < 1.03 * error["exact"]
    assert error["alpaca"] < error["own ridge"] < error["shared"]
    assert 0.88 < np.mean(covered) < 0.92
