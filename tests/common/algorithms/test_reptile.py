"""Reptile against numbers worked by hand and a plain torch loop over the same minibatches."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loopback import LoopbackGrid
from pydantic import ValidationError
from torch import Tensor, nn

from quickbloom.common.algorithms.reptile import Reptile
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.learner import Learner
from quickbloom.common.models import build_model
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import to_arrays
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.strategy import MetaStrategy


def reptile(**settings: float) -> Reptile:
    """On one weight without bias, squared error, float64."""
    options = Reptile.Options.model_validate({"inner_lr": 0.1, **settings})
    return Reptile(options, Learner(nn.Linear(1, 1, bias=False).double(), "regression"))


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def walk(rows: list[list[int]]) -> Minibatches:
    index = torch.tensor(rows)
    return Minibatches(index, torch.ones(index.shape, dtype=torch.float64))


def test_one_step_on_the_whole_task_by_hand() -> None:
    # Support (x, y) = (1, 1), query (2, 0), w = 1: the slope is mean of 2 x (x w - y) = (2*1*0 + 2*2*2) / 2 = 4.
    # phi = 1 - 0.1 * 4 = 0.6, g = theta - phi = 0.4, query loss (2 * 0.6)^2 = 1.44.
    episode = Episode(Batch.of(column(1), column(1)), Batch.of(column(2), column(0)))
    gradient, loss = reptile(inner_lr=0.1).meta_gradient({"weight": column(1)}, episode, walk([[0, 1]]))
    assert gradient["weight"].item() == pytest.approx(0.4, abs=1e-12)
    assert loss.item() == pytest.approx(1.44, abs=1e-12)


def test_two_steps_on_single_examples_by_hand() -> None:
    # Positions count support first, then query. Step 1 on (2, 0): slope 2*2*(2 - 0) = 8, phi = 1 - 0.1 * 8 = 0.2.
    # Step 2 on (1, 1): slope 2*1*(0.2 - 1) = -1.6, phi = 0.2 + 0.16 = 0.36. g = 1 - 0.36 = 0.64.
    episode = Episode(Batch.of(column(1), column(1)), Batch.of(column(2), column(0)))
    gradient, loss = reptile(inner_lr=0.1).meta_gradient({"weight": column(1)}, episode, walk([[1], [0]]))
    assert gradient["weight"].item() == pytest.approx(0.64, abs=1e-12)
    assert loss.item() == pytest.approx(0.72**2, abs=1e-12)


def test_tasks_weigh_the_same_however_many_examples_they_have() -> None:
    assert {reptile().weight(n) for n in (1, 10, 1000)} == {1.0}


def test_epsilon_falls_linearly_to_zero_over_the_rounds() -> None:
    # Rate of round t of 4: 1 - (t - 1) / 4 = 1, 0.75, 0.5, 0.25. With g = 1 every round theta falls by the rate.
    outer = OuterOptimizer(Reptile.Options.model_validate({}), {"weight": column(0)}, num_rounds=4)
    path = []
    for t in (1, 2, 3, 4):
        outer.step({"weight": column(1)}, t)
        path.append(outer.meta["weight"].item())
    assert path == pytest.approx([-1.0, -1.75, -2.25, -2.5], abs=1e-12)


def plain_mlp(weights: list[Tensor], x: Tensor) -> Tensor:
    w1, b1, w2, b2 = weights
    return torch.relu(x.flatten(1) @ w1.T + b1) @ w2.T + b2


def test_a_federated_round_is_theta_plus_epsilon_times_the_mean_of_phi_minus_theta() -> None:
    flat = {"algorithm": "reptile", "rounds": 2, "mlp.hidden": "8"}
    flat |= {"reptile.inner-lr": 0.1, "reptile.outer-lr": 0.7, "reptile.batch-size": 4}
    config = parse_run_config({**flat, "seed": 3}).resolved()
    grid = LoopbackGrid(5, config.flat())
    population = call_roll(grid, config)
    module = build_model("mlp", config.table("mlp"), (1, 8, 8), 5, seed=3)
    algorithm = Reptile(config.table("reptile"), Learner(module, "classification"))
    strategy = MetaStrategy(config, population, algorithm, OuterOptimizer(algorithm.options, algorithm.init(), 2))
    strategy.aggregate_train(
        1,
        grid.send_and_receive(strategy.configure_train(1, to_arrays(strategy.outer.meta), None, grid)),  # type: ignore[arg-type]
    )
    theta = [value.detach() for value in module.parameters()]
    dataset = load_dataset("digits", config.table("digits"), Path())
    moves = [torch.zeros_like(value) for value in theta]
    for task_id in population.splits["train"]:
        rng = generator(3, "train", 1, task_id, 0)
        data = dataset.train_draw(task_id, rng)
        x, y = torch.cat([data.support.x, data.query.x]), torch.cat([data.support.y, data.query.y])
        phi = [value.clone().requires_grad_() for value in theta]
        for rows in algorithm.minibatch_indices(len(x), rng):
            slopes = torch.autograd.grad(F.cross_entropy(plain_mlp(phi, x[rows]), y[rows]), phi)
            phi = [(p - 0.1 * s).detach().requires_grad_() for p, s in zip(phi, slopes, strict=True)]
        moves = [move + p.detach() - t for move, p, t in zip(moves, phi, theta, strict=True)]
    for found, t, move in zip(strategy.outer.meta.values(), theta, moves, strict=True):
        assert torch.allclose(found, t + 0.7 * move / len(population.splits["train"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("examples", "batch", "steps"), [(20, 5, 11), (20, 6, 7), (7, 3, 9), (4, 1, 4)])
def test_minibatches_walk_through_shuffled_epochs(examples: int, batch: int, steps: int) -> None:
    rows = reptile(batch_size=batch, inner_steps=steps).minibatch_indices(examples, np.random.default_rng(0))
    assert rows.shape == (steps, batch)
    assert rows.min() >= 0
    assert rows.max() < examples
    per_epoch = examples // batch
    for start in range(0, steps, per_epoch):
        epoch = rows[start : start + per_epoch].ravel()
        assert len(set(epoch.tolist())) == len(epoch)  # no example twice in an epoch, nor in a batch
        if examples % batch == 0 and start + per_epoch <= steps:
            assert sorted(epoch.tolist()) == list(range(examples))


def test_minibatches_differ_from_epoch_to_epoch() -> None:
    rows = reptile(batch_size=10, inner_steps=4).minibatch_indices(20, np.random.default_rng(0))
    assert not np.array_equal(rows[:2], rows[2:])


@pytest.mark.parametrize("batch", [0, 6, 7, 1000])
def test_batch_size_zero_or_above_the_task_takes_the_whole_task_in_every_step(batch: int) -> None:
    rows = reptile(batch_size=batch, inner_steps=3).minibatch_indices(6, np.random.default_rng(0))
    assert [sorted(step) for step in rows.tolist()] == [[0, 1, 2, 3, 4, 5]] * 3


def test_a_negative_batch_size_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Reptile.Options.model_validate({"batch-size": -1})
