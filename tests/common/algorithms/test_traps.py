"""Mistakes that well-known code has made, looked for in every algorithm of the registry."""

import numpy as np
import pytest
import torch
from fitting import activation
from torch import nn

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.engine.round import TaskWork, evaluate, run_round
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.randomness import generator


@pytest.fixture(params=sorted(ALGORITHMS))
def name(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


def build(name: str, middle: nn.Module | None = None) -> Algorithm:
    """Three classes, or three targets for an algorithm of regression alone, from 3 inputs, with 4 units, in float64."""
    options = ALGORITHMS[name].Options.model_validate({"inner-lr": 0.1})
    outputs = ALGORITHMS[name].model_outputs(options, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(3, 4), middle or activation(name, 4), nn.Linear(4, outputs)).double()
    return ALGORITHMS[name](options, Learner(module, kind_of(name), 3))


def kind_of(name: str) -> str:
    return ALGORITHMS[name].kinds[0]


def batch(size: int, seed: int, kind: str) -> Batch:
    """The classes 0, 1, 2, 0, ..., or random targets."""
    source = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(size, 3, generator=source, dtype=torch.float64) for _ in range(2))
    return Batch.of(x, torch.arange(size) % 3 if kind == "classification" else y)


def work(name: str, *sizes: tuple[int, int]) -> list[TaskWork]:
    kind = kind_of(name)
    data = [
        TaskData(batch(support, i, kind), batch(query, i + 50, kind), batch(4, i + 90, kind))
        for i, (support, query) in enumerate(sizes)
    ]
    return [TaskWork(draw, generator(0, "traps", i)) for i, draw in enumerate(data)]


def test_a_task_of_one_support_and_one_query_example_counts(name: str) -> None:
    algorithm = build(name)
    result = run_round(algorithm, algorithm.init(), work(name, (1, 1), (6, 9)), chunk_size=8)
    assert np.isfinite(result.losses).all()
    assert result.weight == algorithm.weight(2) + algorithm.weight(15)
    small = run_round(algorithm, algorithm.init(), work(name, (1, 1)), chunk_size=8)
    # One prototype alone is always right, and so is a softmax balanced over one class: there is nothing to learn.
    assert all(bool(value.any()) != (name in ("protonet", "protomaml", "fedrod")) for value in small.gradient.values())


BY_EXAMPLES = ("fedavg", "fedprox", "fedbabu", "ditto", "lgfedavg", "fedrod", "fedala", "knnper", "fedpac")


def test_tasks_weigh_the_same_except_where_the_paper_weighs_by_examples(name: str) -> None:
    assert [build(name).weight(n) for n in (2, 50)] == ([2, 50] if name in BY_EXAMPLES else [1, 1])


def test_adaptation_never_sees_what_it_is_scored_on(name: str) -> None:
    # If it did, the score of two halves together could not be the mean of the scores of each.
    algorithm, support = build(name), batch(6, 0, kind_of(name))
    first, second = (batch(5, seed, kind_of(name)) for seed in (1, 2))
    both = Batch(*(torch.cat(parts) for parts in zip(first, second, strict=True)))
    tasks = [[TaskData(support, first, test)] for test in (first, second, both)]
    for scores in evaluate(algorithm, algorithm.init(), tasks, [0.1, 0.5], steps=3, chunk_size=1):
        assert np.allclose(scores[2], (scores[0] + scores[1]) / 2, rtol=0, atol=1e-10)


def test_the_global_random_state_is_neither_read_nor_changed(name: str) -> None:
    algorithm, gradients = build(name), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.random.get_rng_state()
        gradients.append(run_round(algorithm, algorithm.init(), work(name, (3, 4), (6, 9)), chunk_size=8).gradient)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, gradients[1][key]) for key, value in gradients[0].items())


def test_no_state_goes_from_one_round_to_the_next_but_what_is_kept(name: str) -> None:
    algorithm = build(name)
    first = run_round(algorithm, algorithm.init(), work(name, (6, 9)), chunk_size=8)
    run_round(algorithm, algorithm.init(), work(name, (3, 4), (5, 5)), chunk_size=8)
    again = run_round(algorithm, algorithm.init(), work(name, (6, 9)), chunk_size=8)
    assert first.losses == again.losses
    assert all(torch.equal(value, again.kept[0][key]) for key, value in first.kept[0].items())


def test_batch_norm_never_mixes_tasks_nor_their_padding(name: str) -> None:
    algorithm = build(name, nn.BatchNorm1d(4, track_running_stats=False))
    sizes = [(3, 4), (6, 9), (3, 4)]
    together = run_round(algorithm, algorithm.init(), work(name, *sizes), chunk_size=8)
    alone = [run_round(algorithm, algorithm.init(), [task], chunk_size=1) for task in work(name, *sizes)]
    assert together.losses == pytest.approx([result.losses[0] for result in alone], abs=1e-10)
    for key, value in together.gradient.items():
        mean = sum(result.weight * result.gradient[key] for result in alone) / together.weight
        assert torch.allclose(value, torch.as_tensor(mean), rtol=0, atol=1e-10)
