"""Per-task clipping: no task moves a round's sum by more than the norm, to float precision, and all tasks weigh alike."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.algorithms.base import Algorithm, AlgorithmOptions
from common.batch import Batch, Episode, Minibatches, TaskData
from common.learner import Learner
from common.local_round import RoundResult, TaskWork, run_round
from common.params import Params, norm

META = {"w": torch.zeros(3), "s": torch.zeros(())}


class Given(Algorithm):
    """g is what stands in the first support example: three numbers for `w`, one for `s`, which has no axis."""

    name = "given"
    Options = AlgorithmOptions

    def weight(self, num_examples: int) -> float:
        return 7.0

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        numbers = episode.support.x[0]
        return {"w": numbers[:3], "s": numbers[3]}, numbers.sum() * 0


def clipped(rows: list[list[float]], clip: float, chunk_size: int = 64) -> RoundResult:
    algorithm = Given(AlgorithmOptions(inner_lr=0.1), Learner(nn.Linear(4, 1), "regression"))
    batches = [Batch.of(torch.tensor([row]), torch.zeros(1, 1)) for row in rows]
    work = [TaskWork(TaskData(batch, batch, batch), np.random.default_rng(0)) for batch in batches]
    return run_round(algorithm, META, work, chunk_size, clip=clip)


NUMBERS = st.floats(-(2.0**50), 2.0**50, width=32)
ROWS = st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=1, max_size=6)


@settings(deadline=None)
@given(ROWS, st.floats(1e-6, 1e6), st.integers(1, 3))
def test_a_round_is_the_sum_of_its_clipped_tasks(rows: list[list[float]], clip: float, chunk_size: int) -> None:
    result = clipped(rows, clip, chunk_size)
    exact = np.array(rows, dtype=np.float32).astype(np.float64)
    norms = np.sqrt((exact**2).sum(axis=1))
    wanted = (exact * np.minimum(1, clip / np.maximum(norms, 1e-300))[:, None]).mean(axis=0)
    assert [*result.gradient["w"].tolist(), float(result.gradient["s"])] == pytest.approx(wanted, rel=1e-5, abs=1e-6 * clip)
    assert result.weight == len(rows)
    assert result.within == (norms <= clip).sum()


@settings(deadline=None)
@given(ROWS, st.lists(NUMBERS, min_size=4, max_size=4), st.floats(1e-6, 1e6))
def test_one_task_more_moves_the_sum_by_at_most_the_norm(rows: list[list[float]], more: list[float], clip: float) -> None:
    without, with_it = clipped(rows, clip), clipped([*rows, more], clip)

    def total(result: RoundResult) -> Params:
        return {name: value.double() * result.weight for name, value in result.gradient.items()}

    a, b = total(without), total(with_it)
    moved = norm({name: b[name] - a[name] for name in a})
    # The means travel as float32, each number with half a unit in the last place.
    rounding = 2.0**-23 * (len(rows) + 1) * clip
    assert moved <= clip + 2 * rounding
    assert norm(clipped([more], clip).gradient) <= clip * (1 + 2.0**-23)


def test_by_hand() -> None:
    # Norms 5 and 1 (in w and s together): the first becomes (0.6, 0, 0, 0.8), the second stays; weights do not count.
    result = clipped([[3.0, 0.0, 0.0, 4.0], [0.0, 0.5, 0.0, 0.0]], 1.0)
    assert result.gradient["w"].tolist() == pytest.approx([0.3, 0.25, 0.0])
    assert float(result.gradient["s"]) == pytest.approx(0.4)
    assert (result.weight, result.within) == (2.0, 1.0)


def test_a_task_that_is_not_finite_counts_for_nothing() -> None:
    result = clipped([[math.nan, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]], 1.0)
    assert result.gradient["w"].tolist() == [0.0, 0.5, 0.0]
    assert (result.weight, result.within) == (1.0, 1.0)


def test_without_clipping_weights_are_the_algorithms() -> None:
    result = clipped([[3.0, 0.0, 0.0, 4.0]], 0.0)
    assert (result.weight, result.within) == (7.0, 0.0)
    assert result.gradient["w"].tolist() == [3.0, 0.0, 0.0]
