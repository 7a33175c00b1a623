"""Stacking, padding, chunks and evaluation: a node's round without Flower."""

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor

from quickbloom.common.algorithms.maml import Maml
from quickbloom.common.algorithms.reptile import Reptile
from quickbloom.common.engine.chunking import chunks
from quickbloom.common.engine.round import TaskWork, evaluate, run_round, stack
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Episode, Minibatches, TaskData
from quickbloom.common.maths.learner import Learner

CPU = torch.device("cpu")


def batch(size: int, seed: int) -> Batch:
    source = torch.Generator().manual_seed(seed)
    return Batch.of(torch.randn(size, 3, generator=source, dtype=torch.float64), torch.randint(2, (size,), generator=source))


def task(support: int, query: int, test: int, seed: int) -> TaskData:
    return TaskData(batch(support, seed), batch(query, seed + 100), batch(test, seed + 200))


def maml(*middle: nn.Module) -> Maml:
    """3 inputs, 4 units, whatever stands in the middle, 2 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        module = nn.Sequential(nn.Linear(3, 4), *middle, nn.Linear(4, 2)).double()
    return Maml(Maml.Options.model_validate({"inner-lr": 0.3, "inner-steps": 2}), Learner(module, "classification"))


def test_chunks_cover_every_task_once_and_keep_similar_sizes_together() -> None:
    sizes = [(5, 1), (2, 1), (5, 1), (3, 1), (2, 1)]
    assert list(chunks(sizes, 2, exact=False)) == [[1, 4], [3, 0], [2]]


def test_exact_chunks_never_mix_sizes() -> None:
    sizes = [(5, 1), (2, 1), (5, 1), (3, 1), (2, 1), (5, 1)]
    assert list(chunks(sizes, 2, exact=True)) == [[1, 4], [3], [0, 2], [5]]


def test_no_tasks_give_no_chunks() -> None:
    assert list(chunks([], 4, exact=False)) == []


def test_stack_pads_with_weight_zero_to_the_largest_task() -> None:
    small, large = batch(2, 0), batch(5, 1)
    x, y, weight = stack([small, large], CPU)
    assert (x.shape, y.shape) == ((2, 5, 3), (2, 5))
    assert weight.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert torch.equal(x[0, :2], small.x)
    assert torch.equal(y[1], large.y)
    assert torch.isfinite(x).all()


def test_tokens_stay_whole_numbers_and_their_weights_are_numbers() -> None:
    short, long = (Batch.of(torch.arange(2 * size).view(size, 2), torch.arange(size)) for size in (1, 3))
    x, _, weight = stack([short, long], CPU)
    assert x.tolist() == [[[0, 1], [0, 1], [0, 1]], [[0, 1], [2, 3], [4, 5]]]
    assert (x.dtype, weight.dtype) == (torch.int64, torch.float32)
    assert weight.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_stacking_inputs_of_different_form_is_an_error() -> None:
    odd = Batch.of(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        stack([batch(2, 0), odd], CPU)


class Recorder(Reptile):
    """Hands back what the minibatches hold instead of a gradient: the sum of the inputs of every step."""

    def meta_gradient(
        self, meta: dict[str, Tensor], episode: Episode, minibatches: Minibatches
    ) -> tuple[dict[str, Tensor], Tensor]:
        seen = torch.stack([(b.x.squeeze(-1) * b.weight).sum() for b in minibatches.batches(episode)])
        return {"weight": seen.sum().view(1, 1) + 0 * meta["weight"]}, seen[0]


def test_minibatch_positions_find_the_same_examples_behind_padding() -> None:
    # Inputs are 1, 2, 4, 8, .. over support and query, so a sum names its examples. A whole-task batch of n sums to 2^n - 1.
    options = Recorder.Options.model_validate({"inner-lr": 0.1, "inner-steps": 3, "batch-size": 0})
    algorithm = Recorder(options, Learner(nn.Linear(1, 1, bias=False), "regression"))
    work = []
    for support, query in ((1, 4), (3, 2), (2, 2)):
        x = (2.0 ** torch.arange(support + query)).view(-1, 1)
        parts = Batch.of(x[:support], x[:support]), Batch.of(x[support:], x[support:])
        work.append(TaskWork(TaskData(*parts, parts[1]), np.random.default_rng(0)))
    result = run_round(algorithm, {"weight": torch.zeros(1, 1)}, work, chunk_size=3)
    assert result.losses == [31.0, 31.0, 15.0]
    assert result.gradient["weight"].item() == pytest.approx(3 * (31 + 31 + 15) / 3)


def plain_scores(algorithm: Maml, data: TaskData, lr: float, steps: int) -> list[tuple[float, float]]:
    """(loss, accuracy) at steps 0..steps with plain torch."""
    module = algorithm.learner.module
    start = [value.detach().clone() for value in module.parameters()]
    scores = []
    for step in range(steps + 1):
        outputs = module(data.test.x)
        hits = (outputs.argmax(1) == data.test.y).double().mean()
        scores.append((F.cross_entropy(outputs, data.test.y).item(), hits.item()))
        slopes = torch.autograd.grad(F.cross_entropy(module(data.support.x), data.support.y), list(module.parameters()))
        for value, slope in zip(module.parameters(), slopes, strict=True):
            value.data -= lr * slope * (step < steps)
    for value, old in zip(module.parameters(), start, strict=True):
        value.data.copy_(old)
    return scores


def test_evaluation_equals_a_plain_torch_loop_at_every_step_and_rate() -> None:
    algorithm = maml(nn.Tanh())
    tasks = [task(3, 1, 7, 0), task(6, 1, 4, 1), task(4, 1, 9, 2)]
    losses, accuracies = evaluate(algorithm, algorithm.init(), [[t] for t in tasks], [0.1, 0.7], steps=4, chunk_size=64)
    assert losses.shape == accuracies.shape == (3, 2, 5)
    for t, data in enumerate(tasks):
        for r, lr in enumerate([0.1, 0.7]):
            expected = np.array(plain_scores(algorithm, data, lr, 4))
            assert np.allclose(losses[t, r], expected[:, 0], rtol=0, atol=1e-10)
            assert np.allclose(accuracies[t, r], expected[:, 1], rtol=0, atol=1e-10)


def test_step_zero_is_before_adaptation_at_every_rate() -> None:
    algorithm = maml()
    data = task(5, 1, 6, 3)
    losses, _ = evaluate(algorithm, algorithm.init(), [[data]], [0.01, 1.0], steps=1, chunk_size=64)
    before = F.cross_entropy(algorithm.learner.module(data.test.x), data.test.y).item()
    assert losses[0, :, 0] == pytest.approx(before, abs=1e-10)
    assert losses[0, 0, 1] != losses[0, 1, 1]


def test_several_draws_of_a_task_are_averaged() -> None:
    algorithm = maml()
    first, second, other = (task(4, 1, 5, seed) for seed in (4, 5, 6))
    single, _ = evaluate(algorithm, algorithm.init(), [[first], [second], [other]], [0.2], steps=2, chunk_size=64)
    merged, _ = evaluate(algorithm, algorithm.init(), [[first, second], [other]], [0.2], steps=2, chunk_size=64)
    assert np.allclose(merged[0], (single[0] + single[1]) / 2, rtol=0, atol=1e-12)
    assert np.allclose(merged[1], single[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_evaluation_does_not_depend_on_the_chunk_size(chunk_size: int) -> None:
    algorithm = maml(nn.Tanh())
    tasks = [[task(3 + s, 1, 8 - s, s)] for s in range(5)]
    whole = evaluate(algorithm, algorithm.init(), tasks, [0.1, 0.7, 1.0], steps=2, chunk_size=64)
    parts = evaluate(algorithm, algorithm.init(), tasks, [0.1, 0.7, 1.0], steps=2, chunk_size=chunk_size)
    assert np.allclose(whole, parts, rtol=0, atol=1e-10)


def test_evaluation_is_never_on_the_query_part() -> None:
    algorithm = maml()
    data = task(4, 3, 5, 7)
    broken = TaskData(
        data.support, Batch.of(torch.full((3, 3), math.nan, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)), data.test
    )
    for one, other in zip(*(evaluate(algorithm, algorithm.init(), [[d]], [0.2], 2, 8) for d in (data, broken)), strict=True):
        assert np.array_equal(one, other)


def test_batch_norm_tasks_of_different_sizes_do_not_disturb_each_other() -> None:
    algorithm = maml(nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU())
    assert algorithm.learner.mixes_examples
    tasks = [task(4, 3, 6, 0), task(9, 5, 3, 1), task(4, 3, 6, 2)]
    together = run_round(algorithm, algorithm.init(), [TaskWork(t, np.random.default_rng(0)) for t in tasks], chunk_size=64)
    alone = [run_round(algorithm, algorithm.init(), [TaskWork(t, np.random.default_rng(0))], chunk_size=1) for t in tasks]
    assert together.losses == pytest.approx([result.losses[0] for result in alone], abs=1e-10)
    for name, value in together.gradient.items():
        assert torch.allclose(value, sum(result.gradient[name] for result in alone) / 3, rtol=0, atol=1e-10)  # type: ignore[arg-type]
    algorithm.learner.transductive = True
    losses, _ = evaluate(algorithm, algorithm.init(), [[t] for t in tasks], [0.1], steps=1, chunk_size=64)
    assert losses[1, 0, 0] == pytest.approx(
        F.cross_entropy(algorithm.learner.module(tasks[1].test.x), tasks[1].test.y).item(), abs=1e-10
    )


torchs_own = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@compiler
@torchs_own
def test_a_compiled_round_gives_the_same_numbers() -> None:
    algorithm = maml()
    work = [TaskWork(task(4, 6, 1, seed), np.random.default_rng(seed)) for seed in range(3)]
    plain = run_round(algorithm, algorithm.init(), work, chunk_size=8)
    compiled = run_round(algorithm, algorithm.init(), work, chunk_size=8, compile=True)
    torch.testing.assert_close(compiled.gradient, plain.gradient)
    assert compiled.losses == pytest.approx(plain.losses)
    assert (compiled.weight, plain.weight) == (3, 3)


@torchs_own
def test_without_a_compiler_a_sentence_says_what_to_set() -> None:
    algorithm = maml(nn.ELU())
    work = [TaskWork(task(3, 5, 1, 0), np.random.default_rng(0))]
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(ConfigError, match=r"`compile = true` needs a C\+\+ compiler.*set `compile = false`"),
    ):
        run_round(algorithm, algorithm.init(), work, chunk_size=8, compile=True)


def test_parameters_that_lie_in_memory_column_by_column() -> None:
    plain, columns = maml(), maml()
    weight = columns.learner.module.get_parameter("0.weight")
    weight.data = weight.data.t().contiguous().t()
    assert not columns.init()["0.weight"].is_contiguous()
    work = [TaskWork(task(3, 4, 2, seed), np.random.default_rng(0)) for seed in (0, 1)]
    expected, found = (run_round(algorithm, algorithm.init(), work, 8).gradient for algorithm in (plain, columns))
    torch.testing.assert_close(found, expected)
