"""Per-task clipping: no task moves a round's sum by more than the norm, to float precision, and all tasks weigh alike."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import RoundResult, TaskWork, run_round
from quickbloom.common.maths.batch import Batch, Episode, Minibatches, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params, norm
from quickbloom.common.randomness import generator

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


# ---- real algorithms, with data of one task that are meant to do harm

CLIP = 0.3
HARM: dict[str, Any] = {
    "NaN": {"x": math.nan},
    "infinity": {"x": math.inf},
    "beyond float32": {"x": 3e38},
    "squares beyond float32": {"x": 1e25},
    "as small as there is": {"x": 1e-45},
    "no support": {"support": 0},
    "no query": {"query": 0},
    "nothing at all": {"support": 0, "query": 0},
    "many rows": {"support": 400, "query": 300},
    "NaN as target": {"y": math.nan},
    "huge target": {"y": 1e30},
}


def part(rng: np.random.Generator, rows: int, kind: str, x: float | None = None, y: float | None = None) -> Batch:
    inputs = torch.from_numpy(rng.normal(size=(rows, 6)).astype(np.float32))
    inputs = inputs if x is None else torch.full_like(inputs, x)
    if kind == "classification":
        return Batch.of(inputs, torch.from_numpy(rng.integers(0, 3, rows)))
    targets = torch.from_numpy(rng.normal(size=(rows, 1)).astype(np.float32))
    return Batch.of(inputs, targets if y is None else torch.full_like(targets, y))


def work_of(seed: int, kind: str, support: int = 5, query: int = 4, **harm: float) -> TaskWork:
    rng = np.random.default_rng(seed)
    data = TaskData(part(rng, support, kind, **harm), part(rng, query, kind, **harm), part(rng, 3, kind))
    return TaskWork(data, generator(0, "train", seed))


@pytest.mark.parametrize("harm", sorted(HARM))
@pytest.mark.parametrize(
    ("algorithm", "kernels"),
    [("fedavg", True), ("fedavg", False), ("reptile", True), ("fomaml", True), ("maml", True), ("heads", True), ("anil", True)],
)
def test_one_task_moves_the_sum_by_at_most_the_norm_whatever_its_data(
    monkeypatch: pytest.MonkeyPatch, algorithm: str, kernels: bool, harm: str
) -> None:
    if not kernels:
        monkeypatch.setattr("quickbloom.common.maths.fast_paths._network", lambda *_, **__: None)
    kind = "regression" if "target" in harm else "classification"
    config = parse_run_config({"algorithm": algorithm, "model": "mlp", "mlp.hidden": "5", f"{algorithm}.inner-lr": 0.1})
    model = build_algorithm(config, DataSpec(kind, (6,), 3 if kind == "classification" else 1))  # type: ignore[arg-type]
    others = [work_of(seed, kind) for seed in range(4)]
    sums: list[Params] = []
    losses: list[list[float]] = []
    bits: list[float] = []
    for work in (others, [*others[:2], work_of(9, kind, **HARM[harm]), *others[2:]]):
        result = run_round(model, model.init(), [replace(w, rng=generator(0, "train", 7)) for w in work], 3, clip=CLIP)
        assert all(torch.isfinite(value).all() for value in result.gradient.values())
        sums.append({name: value.double() * result.weight for name, value in result.gradient.items()})
        losses.append(result.losses)
        bits.append(result.within - result.weight / 2)
    # A mean travels as float32: half a unit in the last place of each number, for the five tasks.
    moved = norm({name: sums[1][name] - sums[0][name] for name in sums[0]})
    assert moved <= CLIP * (1 + 10 * 2.0**-23)
    assert abs(bits[1] - bits[0]) <= 0.5
    del losses[1][2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
