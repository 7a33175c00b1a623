"""Scores along the steps by the kernels: those of one task after the other in plain torch."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.engine.round import evaluate
from quickbloom.common.maths import fast_paths
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.models.conv4 import Conv4, Conv4Options
from quickbloom.common.models.mlp import perceptron

RATES, STEPS, CLASSES = [0.03, 0.3], 3, 4
SIZES = ((5, 7), (3, 2), (8, 8), (3, 9))


def module(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        if kind == "conv4":
            return Conv4.build(Conv4Options.model_validate({"filters": 8}), (1, 28, 28), CLASSES).double()
        return perceptron((6, 10, CLASSES)).double()


def algorithm(name: str, kind: str) -> Algorithm:
    learner = Learner(module(kind), "regression" if kind == "regression" else "classification", CLASSES)
    chosen = ALGORITHMS[name]
    return chosen(chosen.Options.model_validate({"inner_lr": 0.1}), learner)


def tasks(kind: str) -> list[list[TaskData]]:
    rng = np.random.default_rng(0)

    def part(n: int) -> Batch:
        x = torch.from_numpy(rng.standard_normal((n, *((1, 28, 28) if kind == "conv4" else (6,)))))
        y = rng.standard_normal((n, CLASSES)) if kind == "regression" else rng.integers(CLASSES, size=n)
        return Batch.of(x, torch.from_numpy(y))

    return [[TaskData(part(support), part(1), part(test))] for support, test in SIZES]


def plainly(start: nn.Module, data: TaskData, lr: float) -> list[tuple[float, float]]:
    """(loss, accuracy or squared error) before and after each step of torch.optim.SGD on the support set."""
    model, found = copy.deepcopy(start), []
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    classes = data.test.y.dtype == torch.int64
    loss = F.cross_entropy if classes else F.mse_loss
    for step in range(STEPS + 1):
        with torch.no_grad():
            outputs = model(data.test.x)
            value = float(loss(outputs, data.test.y))
            found.append((value, float((outputs.argmax(dim=1) == data.test.y).double().mean()) if classes else value))
        if step < STEPS:
            optimizer.zero_grad()
            loss(model(data.support.x), data.support.y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return found


@pytest.mark.parametrize("kind", ["classification", "regression", "conv4"])
@pytest.mark.parametrize("name", ["maml", "fedavg"])
def test_they_are_those_of_plain_torch(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = algorithm(name, kind), []

    def watching(*args: object) -> object:
        calls.append(fast_paths.scores_along(*args))  # type: ignore[arg-type]
        return calls[-1]

    monkeypatch.setattr("quickbloom.common.algorithms.base.scores_along", watching)
    losses, metrics = evaluate(own, own.init(), tasks(kind), RATES, STEPS, 4)
    assert calls
    assert None not in calls
    expected = np.array([[plainly(own.learner.module, one[0], lr) for lr in RATES] for one in tasks(kind)])
    np.testing.assert_allclose(losses, expected[..., 0], rtol=1e-9)
    np.testing.assert_allclose(metrics, expected[..., 1], rtol=1e-9)


def test_a_label_that_is_none_is_seen_in_the_scores() -> None:
    own, some = algorithm("fedavg", "classification"), tasks("classification")
    support = some[0][0].support
    support.y[0] = CLASSES
    losses, metrics = evaluate(own, own.init(), some[:2], RATES, STEPS, 4)
    assert np.isnan(losses[0, :, 1:]).all()
    assert not metrics[0, :, 1:].any()
    assert np.isfinite(losses[1]).all()
