"""Ridge heads against NumPy's least squares on an augmented system, finite differences, and a sum worked by hand."""

import math

import numpy as np
import pytest
import torch
from plain_torch import LOSSES, NO_MINIBATCHES, Weights, central_differences, close, random_episode, tanh_learner
from torch import Tensor, nn

from quickbloom.common.algorithms.ridge import PENALTY, SCALE, Ridge
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Episode, TaskData
from quickbloom.common.maths.inner_loop import last
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.linear_head import STRETCH, shrunk_fit
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator


def ridge(kind: str, learner: Learner | None = None) -> Ridge:
    return Ridge(Ridge.Options.model_validate({"inner-lr": 0.1}), learner or tanh_learner(kind))


def uneven(algorithm: Ridge) -> Params:
    """Meta-parameters of which none is 0: a shared head, two penalties and a scale."""
    meta = algorithm.init()
    source = torch.Generator().manual_seed(0)
    for name in ("2.weight", "2.bias"):
        meta[name] = 0.3 * torch.randn(meta[name].shape, generator=source, dtype=torch.float64)
    meta[PENALTY] = torch.tensor([0.7, 0.2], dtype=torch.float64).log() / STRETCH
    if SCALE in meta:
        meta[SCALE] = torch.tensor([2.5], dtype=torch.float64).log() / STRETCH
    return meta


def numpy_head(meta: Params, support: Batch, kind: str) -> np.ndarray:
    """A [features + 1, outputs] by least squares: rows of the penalty stand below those of the support."""
    w1, b1, w2, b2 = (meta[name].numpy() for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    features = np.tanh(support.x.numpy() @ w1.T + b1)
    features = np.c_[features, np.ones(len(features))]
    shared = np.r_[w2.T, b2[None]]
    wanted = np.eye(3)[support.y.numpy()] if kind == "classification" else support.y.numpy()
    roots = np.sqrt([0.7] * 4 + [0.2])
    rows, right = np.r_[features, np.diag(roots)], np.r_[wanted, roots[:, None] * shared]
    return np.linalg.lstsq(rows, right, rcond=None)[0]


@pytest.mark.parametrize("support", [1, 3, 4, 5, 40])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_adapted_head_is_the_least_squares_solution(kind: str, support: int) -> None:
    algorithm, batch = ridge(kind), random_episode(kind, support=support).support
    meta = uneven(algorithm)
    personal = last(algorithm.adaptation_path(meta, batch, 0.1, 1))
    expected = numpy_head(meta, batch, kind) * (2.5 if kind == "classification" else 1)
    np.testing.assert_allclose(personal["2.weight"].numpy(), expected[:-1].T, atol=1e-10)
    np.testing.assert_allclose(personal["2.bias"].numpy(), expected[-1], atol=1e-10)
    assert personal.keys() == algorithm.learner.initial().keys()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_is_that_of_the_query_loss_through_the_solution(kind: str) -> None:
    algorithm, episode = ridge(kind), random_episode(kind)
    meta = uneven(algorithm)
    names = list(meta)

    def objective(weights: Weights) -> Tensor:
        personal = last(algorithm.adaptation_path(dict(zip(names, weights, strict=True)), episode.support, 0.1, 1))
        return LOSSES[kind]([personal[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias")], episode.query)

    gradient, loss = algorithm.meta_gradient(meta, episode, NO_MINIBATCHES)
    assert close(gradient, central_differences(objective, list(meta.values())), atol=1e-7)
    assert loss.item() == pytest.approx(objective(list(meta.values())).item(), abs=1e-12)
    assert all(gradient[name].abs().max() > 1e-3 for name in (PENALTY, "0.weight", "2.weight"))


def test_one_row_by_hand() -> None:
    # Features (2, 1), target 3, shared head 0, penalties 1 and 1: A = f t / (1 + |f|^2) = (6, 3) / 6.
    found = shrunk_fit(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0]]), torch.ones(1), torch.ones(2))
    assert found.flatten().tolist() == pytest.approx([1.0, 0.5], abs=1e-14)


def test_rows_of_weight_zero_and_no_rows_change_nothing() -> None:
    source = torch.Generator().manual_seed(0)
    features, targets = (torch.randn(9, size, generator=source, dtype=torch.float64) for size in (4, 2))
    weight, precision = torch.ones(9, dtype=torch.float64), torch.full((4,), 0.3, dtype=torch.float64)
    weight[3:] = 0
    padded = shrunk_fit(features, targets, weight, precision)
    torch.testing.assert_close(padded, shrunk_fit(features[:3], targets[:3], weight[:3], precision), atol=1e-12, rtol=0)
    assert not shrunk_fit(features, targets, 0 * weight, precision).any()


def test_a_support_without_spread_moves_the_intercept_alone() -> None:
    # All rows alike and a linear body: of what the rows ask for, the share of each column is its feature over its penalty.
    algorithm = ridge("regression", Learner(nn.Linear(2, 1).double(), "regression"))
    support = Batch.of(torch.zeros(6, 2, dtype=torch.float64), torch.full((6, 1), 2.0, dtype=torch.float64))
    personal = last(algorithm.adaptation_path(algorithm.init(), support, 0.1, 1))
    assert not personal["weight"].any()
    assert personal["bias"].item() == pytest.approx(2.0 * 6 / (6 + 1), abs=1e-12)


def test_a_task_that_diverged_costs_no_other_its_answer() -> None:
    algorithm = ridge("regression")

    def work(value: float, seed: int) -> TaskWork:
        episode = random_episode("regression", support=5 + seed)
        support = episode.support._replace(x=episode.support.x * value)
        return TaskWork(TaskData(support, episode.query, episode.query), generator(0, "test", seed))

    result = run_round(algorithm, algorithm.init(), [work(1.0, 0), work(math.inf, 1), work(1.0, 2)], chunk_size=8)
    assert [math.isfinite(loss) for loss in result.losses] == [True, False, True]
    assert all(value.isfinite().all() for value in result.gradient.values())


def test_a_model_whose_last_layer_is_not_linear_is_refused() -> None:
    learner = Learner(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "regression")
    with pytest.raises(ConfigError, match=r'`algorithm = "ridge"` solves for the last layer .* got LayerNorm'):
        ridge("regression", learner)


def test_a_user_unlike_all_others_still_adapts_with_enough_rows() -> None:
    """Training users who agree push the penalty up without end; with 100 rows of size 1 the head moves half of the way."""
    algorithm = Ridge(
        Ridge.Options.model_validate({"inner-lr": 0.1}), Learner(nn.Linear(1, 1, bias=True).double(), "regression", 1)
    )
    meta = algorithm.init()
    meta[PENALTY] = torch.full_like(meta[PENALTY], math.log(1e9) / STRETCH)
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(50, 1)
    support = Batch.of(x, 3 * x)
    personal = last(algorithm.adaptation_path(meta, support, 0.1, 1))
    assert personal["weight"].item() == pytest.approx(3 * 100 / (100 + 100), rel=1e-9)
    query = Batch.of(x, torch.zeros_like(x))  # which would have the head stay: the way back from the bound is open
    gradient, _ = algorithm.meta_gradient(meta, Episode(support, query), NO_MINIBATCHES)
    assert abs(gradient[PENALTY][0].item()) > 0.1
