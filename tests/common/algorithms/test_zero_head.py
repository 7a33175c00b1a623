"""`zero-head`: tasks start from a head of zeros, which nothing but their own adaptation moves."""

import pytest
import torch
from torch import Tensor, nn

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.algorithms.base import ZeroHeadOptions
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.server_app.federation.outer import OuterOptimizer

NAMES = sorted(name for name, algorithm in ALGORITHMS.items() if issubclass(algorithm.Options, ZeroHeadOptions))
HEAD, BODY = ("2.weight", "2.bias"), ("0.weight", "0.bias")


def build(name: str, *, zero_head: bool) -> Algorithm:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    options = ALGORITHMS[name].Options.model_validate({"inner-lr": 0.1, "zero-head": zero_head})
    return ALGORITHMS[name](options, Learner(module, "classification", 4))


def work() -> list[TaskWork]:
    source = torch.Generator().manual_seed(1)

    def batch() -> Batch:
        x = torch.randn(8, 3, generator=source, dtype=torch.float64)
        return Batch.of(x, torch.arange(8) % 4)

    return [TaskWork(TaskData(batch(), batch(), batch()), generator(0, k)) for k in range(3)]


def head_of(params: Params) -> list[Tensor]:
    return [value for name, value in params.items() if name in HEAD]


@pytest.mark.parametrize("name", NAMES)
def test_the_head_stays_zero_and_the_body_learns_as_from_that_head(name: str) -> None:
    plain, zeroed = build(name, zero_head=False), build(name, zero_head=True)
    meta = zeroed.init()
    assert all(not value.any() for value in head_of(meta))
    assert all(torch.equal(meta[part], plain.init()[part]) for part in BODY)
    expected, got = (run_round(algorithm, meta, work(), 8).gradient for algorithm in (plain, zeroed))
    assert all(value.any() for value in head_of(expected))
    assert all(not value.any() for value in head_of(got))
    torch.testing.assert_close(
        {k: v for k, v in got.items() if k not in HEAD}, {k: v for k, v in expected.items() if k not in HEAD}
    )
    outer = OuterOptimizer(zeroed.options, meta, 3)
    for number in (1, 2, 3):
        outer.step(run_round(zeroed, meta, work(), 8).gradient, number)
        meta = outer.meta
    assert all(not value.any() for value in head_of(meta))
    assert not torch.equal(meta["0.weight"], plain.init()["0.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_a_task_moves_its_own_head(name: str) -> None:
    algorithm = build(name, zero_head=True)
    start, *_, end = algorithm.adaptation_path(algorithm.init(), work()[0].data.support, 0.1, 2)
    assert all(not value.any() for value in head_of(start))
    assert all(value.any() for value in head_of(end))


def test_a_model_that_is_nothing_but_a_head_is_refused() -> None:
    config = parse_run_config({"algorithm": "fomaml", "fomaml.zero-head": True, "model": "linear"}).resolved()
    with pytest.raises(ConfigError, match=r"`fomaml\.zero-head` needs a model with parameters before its last layer"):
        build_algorithm(config, DataSpec("classification", (3,), 4))
