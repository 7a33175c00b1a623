"""The setting `dropout`: random numbers of a task's own in training, whoever computes it beside whom, and none in scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import activation
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import RoundResult, TaskWork, contributions, evaluate, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.messaging.in_process_grid import InlineGrid

SPEC = DataSpec("classification", (3,), 4)
SIZES = [(3, 7), (9, 2), (5, 5), (4, 3)]
ROUND = 6


def batch(size: int, seed: int) -> Batch:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch.of(x, torch.arange(size) % 4)


TASKS = [
    TaskData(batch(support, 10 + seed), batch(query, 20 + seed), batch(5, 30 + seed))
    for seed, (support, query) in enumerate(SIZES)
]


def work(tasks: list[int]) -> list[TaskWork]:
    return [TaskWork(TASKS[task], generator(0, "train", ROUND, f"task-{task}")) for task in tasks]


def build(name: str, *, keep: bool = True, share: float = 0.5) -> Algorithm:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        options = ALGORITHMS[name].Options.model_validate({"inner-lr": 0.1})
        outputs = ALGORITHMS[name].model_outputs(options, 4)
        module = nn.Sequential(nn.Linear(3, 8), activation(name, 8), nn.Dropout(share), nn.Linear(8, outputs)).double()
    learner = Learner(module, "classification", 4)
    if keep:
        learner.keep_dropout()
    return ALGORITHMS[name](options, learner)


def close(one: Params, other: Params) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-10)


CLASSIFIERS = sorted(name for name, one in ALGORITHMS.items() if "classification" in one.kinds)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_task_does_not_depend_on_those_that_are_computed_with_it(name: str) -> None:
    algorithm = build(name)
    meta = algorithm.init()
    before = torch.random.get_rng_state()
    together = run_round(algorithm, meta, work([0, 1, 2, 3]), 128)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = run_round(algorithm, meta, work([3, 1, 0, 2]), 1)
    close(again.gradient, together.gradient)
    alone: list[RoundResult] = [run_round(algorithm, meta, work([task]), 2) for task in range(4)]
    assert together.losses == pytest.approx([one.losses[0] for one in alone], abs=1e-10)
    for task, one in enumerate(alone):
        close(one.kept[0], together.kept[task])
    parts = {part.positions[0]: part.gradients for part in contributions(algorithm, meta, work([0, 1, 2, 3]), 4)}
    for task, one in enumerate(alone):
        close({key: value[0] for key, value in parts[task].items()}, one.gradient)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_training_has_it_and_scores_do_not(name: str) -> None:
    kept, off = build(name), build(name, keep=False)
    meta = off.init()
    one, other = (run_round(algorithm, meta, work([0, 1]), 8) for algorithm in (kept, off))
    assert one.losses != pytest.approx(other.losses, abs=1e-6)
    scores = [evaluate(algorithm, meta, [[TASKS[0]], [TASKS[1]]], [0.1], 2, 8) for algorithm in (kept, off)]
    np.testing.assert_array_equal(scores[0], scores[1])


def test_two_tasks_with_the_same_examples_and_two_rounds_draw_different_numbers() -> None:
    algorithm = build("fedavg")
    algorithm = type(algorithm)(algorithm.options.model_copy(update={"batch_size": 0, "inner_steps": 1}), algorithm.learner)
    keys = [(ROUND, "a"), (ROUND, "b"), (ROUND + 1, "a"), (ROUND, "a")]
    losses = [
        run_round(algorithm, algorithm.init(), [TaskWork(TASKS[0], generator(0, "train", *key))], 8).losses[0] for key in keys
    ]
    assert len({round(loss, 9) for loss in losses}) == 3
    assert losses[0] == losses[3]


def test_one_step_is_that_of_plain_torch_with_the_same_numbers() -> None:
    """One step on all examples, then the loss of the query: the masks come one after the other from the task's seed."""
    algorithm = build("fedavg")
    algorithm = type(algorithm)(algorithm.options.model_copy(update={"batch_size": 0, "inner_steps": 1}), algorithm.learner)
    meta = algorithm.init()
    found = run_round(algorithm, meta, work([1]), 8)
    rng = generator(0, "train", ROUND, "task-1")
    rows = torch.from_numpy(algorithm.minibatch_indices(11, rng)[0])  # type: ignore[index]
    seed = int(rng.integers(2**63))
    x, y = (torch.cat([getattr(TASKS[1].support, part), getattr(TASKS[1].query, part)])[rows] for part in ("x", "y"))
    theta = {name: value.clone().requires_grad_() for name, value in meta.items()}

    def outputs(at: dict[str, Tensor], inputs: Tensor) -> Tensor:
        hidden = torch.tanh(inputs @ at["0.weight"].T + at["0.bias"])
        return dropout(hidden, 0.5) @ at["3.weight"].T + at["3.bias"]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        slopes = torch.autograd.grad(cross_entropy(outputs(theta, x), y), list(theta.values()))
        phi = {name: value - 0.1 * slope for (name, value), slope in zip(theta.items(), slopes, strict=True)}
        loss = cross_entropy(outputs(phi, TASKS[1].query.x), TASKS[1].query.y)
    assert found.losses[0] == pytest.approx(loss.item(), abs=1e-10)
    close(found.gradient, {name: 0.1 * slope for name, slope in zip(theta, slopes, strict=True)})


def linear(share: float) -> Algorithm:
    """A linear model whose inputs are dropped, one plain step on all examples, at a rate of 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        learner = Learner(nn.Sequential(nn.Dropout(share), nn.Linear(3, 1, bias=False)).double(), "regression", 1)
    learner.keep_dropout()
    return ALGORITHMS["fedavg"](
        ALGORITHMS["fedavg"].Options.model_validate({"inner-lr": 1.0, "inner-steps": 1, "batch-size": 0}), learner
    )


def test_the_mean_over_masks_is_the_ridge_regression_that_dropout_of_inputs_is_known_to_be() -> None:
    """Inputs keep their mean and gain the variance x^2 p / (1 - p), so the mean of the gradient of mean (w x~ - y)^2 is
    2 mean (w x - y) x + 2 p / (1 - p) w mean x^2 (Srivastava et al. 2014, section 9.1)."""
    share, number = 0.3, 500
    algorithm = linear(share)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = torch.randn(6, 1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    data = TaskData(Batch.of(x[:4], y[:4]), Batch.of(x[4:], y[4:]), Batch.of(x, y))
    drawn = [TaskWork(data, generator(0, "train", ROUND, f"task-{task}")) for task in range(number)]
    meta = algorithm.init()
    w = meta["1.weight"]
    undropped = 2 * ((x @ w.T - y) * x).mean(dim=0)
    expected = undropped + 2 * share / (1 - share) * (w * x.square().mean(dim=0))
    part = torch.cat([one.gradients["1.weight"][:, 0] for one in contributions(algorithm, meta, drawn, 128)])
    error = part.std(dim=0) / number**0.5
    assert ((part.mean(dim=0) - expected[0]).abs() < 4 * error).all()
    assert ((part.mean(dim=0) - undropped).abs() > 4 * error).any()
    # Each output by itself has the mean of the model without dropout.
    outputs = []
    for seed in range(number):
        with algorithm.learner.training(seed):
            outputs.append(algorithm.predict(meta, x[:1]).item())
    error = float(np.std(outputs)) / number**0.5
    assert float(np.mean(outputs)) == pytest.approx(float(x[0] @ w[0]), abs=4 * error)


def test_batch_norm_keeps_its_statistics_and_everything_is_as_before_afterwards() -> None:
    learner = Learner(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), "classification")
    assert any("dropout is off" in remark for remark in learner.remarks)
    with learner.training(0):
        assert not learner.module.training  # it was not asked for
    learner.keep_dropout()
    assert len(learner.remarks) == 1
    digest = learner.digest
    with learner.training(0):
        assert [layer.training for layer in learner.module.children()] == [True, False, True]
        learner.apply(learner.initial(), torch.randn(5, 3))
    assert not any(layer.training for layer in learner.module.modules())
    learner._digest = None
    assert learner.digest == digest


class Counts(nn.Module):
    """Counts in a buffer how often it was trained."""

    times: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("times", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.times += 1
        return dropout(self.linear(x), 0.5, self.training)


class Odd(nn.Module):
    """Returns two things in training, as some networks with an auxiliary head do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Any:
        y = dropout(self.linear(x), 0.5, self.training)
        return (y, y) if self.training else y


def made(module: nn.Module, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Algorithm:
    monkeypatch.setattr("quickbloom.common.engine.build.build_model", lambda *_: module)
    config = parse_run_config({"model": "my_models:net", "dropout": True, "reptile.inner-lr": 0.1, **settings})
    return build_algorithm(config, SPEC)


def test_a_model_of_ones_own_with_dropout_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = made(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1)), monkeypatch)
    assert algorithm.learner.dropout
    assert not algorithm.learner.remarks


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Linear(3, 4), 'with `model = "my_models:net"`, which has no dropout'),
        (Counts(), "which changes its buffer `times` in training mode"),
        (Odd(), "in training mode"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(module: nn.Module, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"^`dropout` must be false .*{said}"):
        made(module, monkeypatch)


def test_compiling_does_not_go_with_it() -> None:
    with pytest.raises(ConfigError, match="`compile` must be False with `dropout = true`, because"):
        parse_run_config({"dropout": True, "compile": True})
    parse_run_config({"dropout": True, "compile": "auto"})


def test_a_run_does_not_depend_on_nodes_or_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def net(*_: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 5))

    monkeypatch.setattr("quickbloom.common.engine.build.build_model", net)
    found = []
    for nodes, chunk, on in ((1, 128, True), (4, 3, True), (1, 128, False)):
        settings = {"dataset": "digits", "model": "my_models:net", "algorithm": "fomaml", "rounds": 2, "chunk-size": chunk}
        settings |= {"adapt-steps": 1, "adapt-lrs": "0.1", "baselines": False, "personal": False, "min-nodes": 1, "dropout": on}
        path = tmp_path / f"{nodes}-{on}"
        config = parse_run_config({**settings, "output-dir": str(path)})
        run_federation(InlineGrid(nodes, config.flat(), {}), config)
        found.append([json.loads(line)["train"]["loss"] for line in (path / "history.jsonl").read_text().splitlines()])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] != pytest.approx(found[2], abs=1e-3)
