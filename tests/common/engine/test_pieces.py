"""Tasks with many examples go through the model in pieces: the same numbers, and never more than a piece in memory."""

from typing import Any

import numpy as np
import pytest
import torch
from fitting import activation
from plain_torch import tanh_learner
from torch import Tensor, nn
from torch.func import grad

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.engine.round import TaskWork, evaluate, run_round
from quickbloom.common.maths import batch as batches
from quickbloom.common.maths.batch import Batch, TaskData, in_one_piece
from quickbloom.common.maths.inner_loop import gradient_and_value, slope, with_pull, with_slope
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params

ROWS = 4
INPUTS = 3


class Watched(nn.Module):
    """A layer that notes how many examples it sees; for the fast paths it is an unknown model."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[0])
        return x


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of `ROWS` examples."""
    monkeypatch.setattr(batches, "APPLIED_AT_ONCE", INPUTS * ROWS)


def examples(size: int, kind: str = "classification", seed: int = 0) -> Batch:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(size, INPUTS, generator=source, dtype=torch.float64)
    y = torch.randn(size, 4, generator=source, dtype=torch.float64)
    return Batch.of(x, torch.arange(size) % 4 if kind == "classification" else y)


def build(name: str, kind: str) -> tuple[Algorithm, Watched]:
    watched = Watched()
    torch.manual_seed(1)
    options = ALGORITHMS[name].Options.model_validate({"inner-lr": 0.1})
    outputs = ALGORITHMS[name].model_outputs(options, 4)
    module = nn.Sequential(watched, nn.Linear(INPUTS, 5), activation(name, 5), nn.Linear(5, outputs)).double()
    return ALGORITHMS[name](options, Learner(module, kind, 4)), watched


def close(one: Params, other: Params) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-10, atol=1e-10)


def test_an_ordinary_piece_holds_668_small_pictures() -> None:
    assert in_one_piece((1, 28, 28)) == 668
    assert in_one_piece((2**30,)) == 1


def test_pieces_are_even_and_hold_every_example_once(small: None) -> None:
    whole = examples(10)
    parts = whole.pieces()
    assert [len(part.x) for part in parts] == [4, 4, 2]
    for name in Batch._fields:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert examples(4).pieces()[0].x.shape[0] == 4


@pytest.mark.parametrize("change", ["plain", "pull", "slope", "both"])
def test_the_gradient_in_pieces_is_that_of_the_whole(change: str, small: None) -> None:
    """Weighted examples, of which the last piece has none that counts: it is padding."""
    learner = Learner(nn.Linear(INPUTS, 4).double(), "classification")
    whole, at = examples(11), learner.initial()
    whole = whole._replace(weight=torch.tensor([1, 2, 0.5, 1, 3, 1, 1, 0.1, 0, 0, 0], dtype=torch.float64))
    aim = {name: value + 1 for name, value in at.items()}
    loss = learner.mean_loss
    if change in ("pull", "both"):
        loss = with_pull(loss, aim, 0.7)
    if change in ("slope", "both"):
        loss = with_slope(loss, aim)

    def plain(params: Params) -> Tensor:
        losses = nn.functional.cross_entropy(whole.x @ params["weight"].T + params["bias"], whole.y, reduction="none")
        total = (losses * whole.weight).sum() / whole.weight.sum()
        if change in ("pull", "both"):
            total = total + 0.35 * sum(((value - aim[name]) ** 2).sum() for name, value in params.items())
        if change in ("slope", "both"):
            total = total + sum((value * aim[name]).sum() for name, value in params.items())
        return total

    assert len(whole.pieces()) == 3
    found, value = gradient_and_value(loss, at, whole)
    close(found, grad(plain)(at))
    close(slope(loss, at, whole), found)
    assert value.item() == pytest.approx(plain(at).item(), abs=1e-12)
    # A gradient through it, as exact MAML takes it.
    through = grad(lambda params: sum((v**2).sum() for v in slope(loss, params, whole).values()))(at)
    close(through, grad(lambda params: sum((v**2).sum() for v in grad(plain)(params).values()))(at))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in sorted(ALGORITHMS) for kind in ALGORITHMS[name].kinds])
def test_every_algorithm_trains_and_scores_the_same_in_pieces(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tasks are of different sizes, so that whole pieces of some are padding."""
    algorithm, _ = build(name, kind)
    tasks = [TaskData(*(examples(size, kind, seed) for size in sizes)) for seed, sizes in enumerate([(13, 9, 6), (3, 2, 11)])]

    def once() -> tuple[Any, Any]:
        work = [TaskWork(task, np.random.default_rng(0)) for task in tasks]
        meta = algorithm.init()
        return run_round(algorithm, meta, work, 8), evaluate(algorithm, meta, [[task] for task in tasks], [0.1, 0.3], 2, 8)

    whole, scores = once()
    monkeypatch.setattr(batches, "APPLIED_AT_ONCE", INPUTS * ROWS)
    cut, scores_cut = once()
    close(cut.gradient, whole.gradient)
    assert cut.losses == pytest.approx(whole.losses, abs=1e-10)
    for one, other in zip(cut.kept, whole.kept, strict=True):
        close(one, other)
    np.testing.assert_allclose(scores_cut, scores, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["reptile", "fedavg", "ditto", "heads", "apfl", "scaffold", "fedrod", "pfedme", "metasgd"])
def test_a_model_never_sees_more_than_a_piece_of_a_task_that_is_scored(name: str, small: None) -> None:
    algorithm, watched = build(name, "classification")
    task = TaskData(examples(21), examples(0), examples(17))
    evaluate(algorithm, algorithm.init(), [[task]], [0.1], 2, 8)
    assert max(watched.seen) == ROWS
    watched.seen.clear()
    if fresh := algorithm.fresh():
        evaluate(algorithm, algorithm.init(), [[task]], [0.1], 2, 8, [fresh])
        assert max(watched.seen) == ROWS


@pytest.mark.parametrize("name", ["reptile", "heads", "fedprox"])
def test_nor_of_one_that_trains_on_batches(name: str, small: None) -> None:
    """The loss that is told is of the whole query; a batch is of three examples."""
    algorithm, watched = build(name, "classification")
    options = algorithm.options.model_copy(update={"batch_size": 3})
    algorithm = type(algorithm)(options, algorithm.learner)
    run_round(
        algorithm, algorithm.init(), [TaskWork(TaskData(examples(9), examples(30), examples(1)), np.random.default_rng(0))], 8
    )
    assert max(watched.seen) <= ROWS


def test_a_model_that_mixes_examples_sees_them_all(small: None) -> None:
    watched = Watched()
    module = nn.Sequential(watched, nn.Linear(INPUTS, 4), nn.BatchNorm1d(4, track_running_stats=False))
    learner = Learner(module.double(), "classification")
    whole = examples(10)
    assert learner.mixes_examples
    slope(learner.mean_loss, learner.initial(), whole)
    learner.score(learner.initial(), whole)
    assert set(watched.seen) == {10}


def test_a_loss_of_ones_own_is_not_cut(small: None) -> None:
    class Largest(Learner):
        """The largest loss of an example, which is no mean."""

        def loss(self, params: Params, batch: Batch) -> Tensor:
            return self._losses(self.apply(params, batch.x), batch.y).max()

    learner = Largest(tanh_learner("classification", 4).module, "classification")
    whole = examples(10)
    assert learner.mean_loss == learner.loss
    found = slope(learner.mean_loss, learner.initial(), whole)
    close(found, grad(learner.loss)(learner.initial(), whole))
