"""FedAvg against a mean of client models worked by hand."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from quickbloom.common.algorithms.fedavg import FedAvg
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.server_app.federation.outer import OuterOptimizer


def fedavg(**settings: float) -> FedAvg:
    """On one weight without bias, squared error, float64; every step takes the whole task unless asked otherwise."""
    options = FedAvg.Options.model_validate({"inner_lr": 0.1, "batch_size": 0, **settings})
    return FedAvg(options, Learner(nn.Linear(1, 1, bias=False).double(), "regression"))


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def client(target: float, support: int, query: int) -> TaskWork:
    """All examples (1, target), so L(w) = (w - target)^2 on every subset."""
    ones, targets = column(*[1.0] * (support + query)), column(*[target] * (support + query))
    parts = Batch.of(ones[:support], targets[:support]), Batch.of(ones[support:], targets[support:])
    return TaskWork(TaskData(*parts, parts[1]), np.random.default_rng(0))


def test_mean_is_weighted_by_examples_by_hand() -> None:
    # w = 1, one step with rate 0.25: w - 0.25 * 2 (w - y) = (w + y) / 2. Client A (y = 3, 2 examples): phi = 2, g = -1.
    # Client B (y = -5, 6 examples): phi = -2, g = 3. Mean: (2 * -1 + 6 * 3) / 8 = 2, weight 8.
    algorithm = fedavg(inner_lr=0.25, inner_steps=1)
    result = run_round(algorithm, {"weight": column(1)}, [client(3, 1, 1), client(-5, 4, 2)], chunk_size=64)
    assert result.gradient["weight"].item() == pytest.approx(2.0, abs=1e-12)
    assert result.weight == 8.0
    assert result.losses == pytest.approx([(2 - 3) ** 2, (-2 + 5) ** 2], abs=1e-12)


def test_outer_rate_one_replaces_the_model_by_the_weighted_mean_of_client_models() -> None:
    # The client models of the test above: 2 with 2 examples, -2 with 6. Their mean: (2 * 2 + 6 * -2) / 8 = -1.
    algorithm = fedavg(inner_lr=0.25, inner_steps=1)
    meta = {"weight": column(1)}
    result = run_round(algorithm, meta, [client(3, 1, 1), client(-5, 4, 2)], chunk_size=64)
    outer = OuterOptimizer(algorithm.options, meta, num_rounds=10)
    outer.step(result.gradient, server_round=7)
    assert outer.meta["weight"].item() == pytest.approx(-1.0, abs=1e-12)


def test_minibatch_steps_reach_the_query_examples_as_well() -> None:
    # Support (1, 0), query (1, 8), rate 0.5: a step on one example lands on its target, since w - 0.5 * 2 (w - y) = y. Two
    # steps of one example each walk through both, so phi is the target of the last one: 0 or 8, and never the start.
    algorithm = fedavg(inner_lr=0.5, inner_steps=2, batch_size=1)
    data = TaskData(*(Batch.of(column(1), column(y)) for y in (0, 8, 8)))
    ends = set()
    for seed in range(10):
        result = run_round(algorithm, {"weight": column(5)}, [TaskWork(data, np.random.default_rng(seed))], chunk_size=1)
        ends.add(5 - result.gradient["weight"].item())
    assert ends == {0.0, 8.0}


def test_weight_is_the_number_of_examples() -> None:
    assert [fedavg().weight(n) for n in (1, 17)] == [1.0, 17.0]


def test_an_outer_rate_of_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match="outer-lr"):
        FedAvg.Options.model_validate({"outer-lr": 0.0})
