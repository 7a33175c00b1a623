"""Chunks as large as memory allows: how many tasks these are, and that results do not depend on it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from quickbloom.common.algorithms.fedavg import FedAvg, FedAvgOptions
from quickbloom.common.algorithms.maml import Maml
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine import chunking
from quickbloom.common.engine import round as engine
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.chunking import FIRST, MOST, AutoChunks, at_once, chunks, convolved, pieces
from quickbloom.common.engine.round import TaskWork, evaluate, run_round
from quickbloom.common.flower import message_assembly
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.models import MODELS, build_model
from quickbloom.common.system import at_once as limited
from quickbloom.common.system import memory as machine

CPU = torch.device("cpu")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Bytes as the machine would tell them: in use, at the peak, free."""
    told = {"before": 100.0, "peak": 100.0, "free": 4000.0}
    monkeypatch.setattr(chunking, "_mark", lambda _: told["before"])
    monkeypatch.setattr(chunking, "_peak", lambda _: told["peak"])
    monkeypatch.setattr(chunking, "_free", lambda _: told["free"])
    return told


def test_the_first_chunk_is_small_and_of_the_largest_tasks(memory: dict[str, float]) -> None:
    memory["peak"] = 100 + FIRST * 50  # a quarter of 4000 bytes is room for 20 tasks of 50
    found = list(AutoChunks(CPU).chunks(list(range(FIRST + 40)), exact=False))
    assert found[0] == list(range(40, FIRST + 40))
    assert [len(part) for part in found[1:]] == [20, 20]
    assert sorted(i for part in found for i in part) == list(range(FIRST + 40))


def test_what_is_known_is_kept_and_free_memory_is_looked_at_anew(memory: dict[str, float]) -> None:
    auto = AutoChunks(CPU)
    memory["peak"] = 100 + FIRST * 50
    list(auto.chunks([1] * FIRST, exact=False))
    assert auto.per_task == 50
    memory["free"] = 2000.0
    assert [len(part) for part in auto.chunks([1] * 20, exact=False)] == [10, 10]
    memory["free"] = 10.0
    assert auto.size() == 1


def test_tasks_that_take_nothing_measurable_are_as_many_as_by_default(memory: dict[str, float]) -> None:
    auto = AutoChunks(CPU)
    assert [len(part) for part in auto.chunks([1] * (FIRST + MOST), exact=False)] == [FIRST, MOST]


def test_exact_chunks_never_mix_sizes(memory: dict[str, float]) -> None:
    sizes = [3, 5, 3, 5, 5, 3, 4]
    for part in AutoChunks(CPU).chunks(sizes, exact=True):
        assert len({sizes[i] for i in part}) == 1


def test_no_tasks_give_no_chunks(memory: dict[str, float]) -> None:
    assert list(chunks([], AutoChunks(CPU), exact=False)) == []


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert chunking._free(CPU) == 4000 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("1500\n")
    assert chunking._free(CPU) == 500


def test_where_memory_is_not_known_it_is_the_default_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path / "none")
    auto = AutoChunks(CPU)
    assert [len(part) for part in auto.chunks([1] * (FIRST + MOST), exact=False)] == [FIRST, MOST]


def test_a_large_model_is_computed_few_tasks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "TRAINED_AT_ONCE", 100)
    large, small = (Learner(nn.Linear(size, 1), "regression") for size in (49, 1))  # 50 numbers and 2
    assert [at_once(large, size) for size in (128, 1, AutoChunks(CPU))] == [2, 1, 2]
    assert at_once(small, 128) == 50
    assert isinstance(at_once(small, AutoChunks(CPU)), AutoChunks)
    monkeypatch.setattr(chunking, "TRAINED_AT_ONCE", 10)
    assert at_once(large, 128) == 1


class Own(nn.Sequential):
    """The same module, but not one that the kernels know."""


def small_cnn() -> Learner:
    model = build_model("cnn", MODELS["cnn"].Options.model_validate({"filters": 4, "units": 8}), (1, 16, 16), 4, 0)
    assert isinstance(model, nn.Sequential)
    return Learner(Own(*model).double(), "classification")


def test_convolutions_are_counted() -> None:
    images = torch.zeros(3, 1, 16, 16, dtype=torch.float64)
    # 12 x 12 places of 4 filters of 5 x 5, then pooled to 6 x 6: 2 x 2 places of 8 filters of 5 x 5 on 4 channels.
    assert convolved(small_cnn(), images) == 12 * 12 * 4 * 25 + 2 * 2 * 8 * 25 * 4
    assert convolved(Learner(nn.Sequential(nn.Flatten(), nn.Linear(256, 4)).double(), "classification"), images) == 0
    spreads = nn.Sequential(nn.ConvTranspose2d(1, 3, 2, stride=2), nn.Flatten(), nn.LazyLinear(4)).double()
    spreads(images)
    assert convolved(Learner(spreads, "classification"), images) == 16 * 16 * 3 * 4  # every pixel goes to 2 x 2 of 3 channels


def test_counting_convolutions_takes_models_as_they_are() -> None:
    """Batch norm over examples needs two of them; a model that takes no such inputs counts nothing, and training tells why."""
    images = torch.zeros(3, 1, 16, 16, dtype=torch.float64)
    norm = nn.BatchNorm1d(2304, track_running_stats=False)
    mixing = nn.Sequential(nn.Conv2d(1, 16, 5), nn.Flatten(), norm, nn.Linear(2304, 4)).double()
    assert convolved(Learner(mixing, "classification"), images) == 12 * 12 * 16 * 25
    other = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(576, 4)).double()
    assert convolved(Learner(other, "classification"), images) == 0


def test_counting_convolutions_leaves_random_numbers_and_does_not_load_the_compiler() -> None:
    program = """
import sys, torch
from torch import nn
from quickbloom.common.engine.chunking import convolved
from quickbloom.common.maths.learner import Learner
class Noisy(nn.Conv2d):
    def forward(self, x):
        return super().forward(x + torch.rand_like(x))
learner = Learner(nn.Sequential(Noisy(1, 4, 5), nn.Flatten(), nn.Linear(576, 4)), "classification")
torch.manual_seed(3)
before = torch.random.get_rng_state()
assert convolved(learner, torch.zeros(3, 1, 16, 16)) == 12 * 12 * 4 * 25
assert torch.equal(before, torch.random.get_rng_state())
assert "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_node_that_has_not_yet_the_numbers_of_a_larger_network_trains_it() -> None:
    """As nodes build it: the parameters of 4 MB or more have no numbers until a message brings them."""
    config = parse_run_config(
        {"algorithm": "fedavg", "model": "cnn", "cnn.padding": 2, "cnn.units": 4096, "fedavg.inner-lr": 0.1}
    ).resolved()
    spec = DataSpec("classification", (1, 8, 8), 5)
    draw = torch.Generator().manual_seed(0)
    images = Batch.of(torch.randn(10, 1, 8, 8, generator=draw), torch.arange(10) % 5)
    algorithm = build_algorithm(config, spec, tried=True)
    assert any(value.is_meta for value in algorithm.learner.trained.values())
    meta = build_algorithm(config, spec).init()
    found = run_round(algorithm, meta, [TaskWork(TaskData(images, images, images), np.random.default_rng(0))], 128)
    assert np.isfinite(found.losses).all()


def test_a_task_of_large_convolutions_is_computed_by_itself_whoever_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of 10 of a task's examples, or of all where it has fewer, at 17,600 multiplications each: alone from 10 on."""
    monkeypatch.setattr(chunking, "CONVOLVED_AT_ONCE", 9 * 17_600)
    noted: list[int] = []
    monkeypatch.setattr(limited, "note", noted.append)
    options = FedAvgOptions(inner_lr=0.1, inner_steps=3, batch_size=10)
    draw = torch.Generator().manual_seed(0)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 1, 16, 16, generator=draw, dtype=torch.float64)
        return Batch.of(x, torch.randint(0, 4, (size,), generator=draw))

    tasks = [TaskData(batch(size), batch(2), batch(1)) for size in (7, 12, 5, 20, 6)]

    def computed(*chosen: int) -> tuple[list[int], dict[str, torch.Tensor]]:
        noted.clear()
        work = [TaskWork(tasks[i], np.random.default_rng(i)) for i in chosen]
        found = run_round(FedAvg(options, small_cnn()), small_cnn().initial(), work, 128)
        return sorted(noted), found.gradient

    together, gradient = computed(*range(5))
    assert together == [1, 1, 3]
    monkeypatch.setattr(chunking, "CONVOLVED_AT_ONCE", 10**9)
    mapped, expected = computed(*range(5))
    assert mapped == [5]
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-10, atol=1e-12)


def test_a_process_computes_no_more_at_once_than_it_may_and_notes_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(nn.Linear(3, 2), "classification")
    assert at_once(learner, 64) == 64
    monkeypatch.setenv(limited.FILE, str(tmp_path / "noted"))
    assert limited.noted(tmp_path / "noted") == 0
    monkeypatch.setenv(limited.LIMIT, "4")
    assert [at_once(learner, size) for size in (64, 3, AutoChunks(CPU))] == [4, 3, 4]
    for part in chunks([1] * 10, 4, exact=False):
        assert limited.noted(tmp_path / "noted") == len(part)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are told by Linux alone")
def test_the_memory_of_a_chunk_is_found_also_where_freed_memory_is_kept() -> None:
    message_assembly.keep()  # as `quickbloom run` does
    freed = [torch.ones(FIRST, 2**20) for _ in range(8)]  # 256 MB, which the chunk below takes again
    del freed
    auto = AutoChunks(CPU)
    for part in auto.chunks([1] * FIRST, exact=False):
        taken = [torch.ones(len(part), 2**20) for _ in range(4)]  # 16 MB for each, touched
        del taken
    assert auto.per_task == pytest.approx(16 * 2**20, rel=0.5)


def test_results_do_not_depend_on_it(memory: dict[str, float]) -> None:
    memory["peak"] = 100 + FIRST * 250  # room for 4
    source = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    algorithm = Maml(Maml.Options.model_validate({"inner-lr": 0.3, "inner-steps": 2}), Learner(model, "classification"))

    def batch(size: int) -> Batch:
        x = torch.randn(size, 3, generator=source, dtype=torch.float64)
        return Batch.of(x, torch.randint(2, (size,), generator=source))

    tasks = [TaskData(batch(3 + k % 4), batch(5), batch(2)) for k in range(FIRST + 9)]
    work = [TaskWork(data, np.random.default_rng(0)) for data in tasks]
    fixed, auto = (run_round(algorithm, algorithm.init(), work, size) for size in (64, AutoChunks(CPU)))
    torch.testing.assert_close(auto.gradient, fixed.gradient)
    assert auto.losses == pytest.approx(fixed.losses)
    one, other = (evaluate(algorithm, algorithm.init(), [[t] for t in tasks], [0.1, 0.5], 2, c) for c in (64, AutoChunks(CPU)))
    assert np.allclose(one, other, rtol=0, atol=1e-10)


def test_tasks_of_a_model_with_large_constants_are_computed_one_after_the_other() -> None:
    module = nn.Sequential(nn.Linear(3000, 3000, bias=False), nn.Linear(3000, 2))  # 36 MB
    module[0].requires_grad_(False)
    learner = Learner(module, "regression")
    assert at_once(learner, 128) == 1
    assert at_once(learner, 1) == 1
    assert at_once(learner, AutoChunks(CPU)) == 1
    assert isinstance(at_once(Learner(nn.Linear(2, 2), "regression"), AutoChunks(CPU)), AutoChunks)


def test_a_chunk_is_cut_where_its_largest_task_makes_it_too_large() -> None:
    rows = [10, 30, 20, 30, 1, 1]
    # Three tasks of 30 rows have 90: five tasks are two parts, as even as can be.
    assert list(pieces([0, 2, 1, 3, 4], rows, 90)) == [[0, 2, 1], [3, 4]]
    assert list(pieces([4, 5], rows, 90)) == [[4, 5]]
    assert list(pieces([1, 3], rows, 7)) == [[1], [3]]  # a task is never cut


@pytest.mark.parametrize("rates", [1, 3])
def test_scores_of_large_tasks_are_the_same_in_smaller_pieces(rates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    algorithm = Maml(Maml.Options(inner_lr=0.1), Learner(nn.Linear(4, 3), "classification", 3))

    def batch(size: int) -> Batch:
        return Batch.of(torch.randn(size, 4), torch.arange(size) % 3)

    tasks = [[TaskData(batch(size), batch(1), batch(5))] for size in (4, 20, 9, 20, 6)]
    lrs = [0.1, 0.3, 1.0][:rates]
    whole = evaluate(algorithm, algorithm.init(), tasks, lrs, 2, 128)
    stacked: list[int] = []
    plain = engine.stack

    def noted(batches: list[Batch], device: torch.device) -> Batch:
        stacked.append(len(batches) * max(len(one.x) for one in batches))
        return plain(batches, device)

    monkeypatch.setattr(engine, "stack", noted)
    monkeypatch.setattr(chunking, "SCORED_AT_ONCE", 4 * 50)
    found = evaluate(algorithm, algorithm.init(), tasks, lrs, 2, 128)
    for part, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-6)
    assert max(stacked) <= 50
    assert len(stacked) > 2


def test_a_round_of_large_tasks_is_the_same_in_smaller_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    algorithm = Maml(Maml.Options(inner_lr=0.1), Learner(nn.Linear(4, 3), "classification", 3))

    def batch(size: int) -> Batch:
        return Batch.of(torch.randn(size, 4), torch.arange(size) % 3)

    tasks = [TaskData(batch(size), batch(5), batch(1)) for size in (4, 20, 9, 20, 6)]
    work = [TaskWork(task, np.random.default_rng(0)) for task in tasks]
    whole = run_round(algorithm, algorithm.init(), work, 128)
    sizes: list[int] = []
    plain = engine.stack

    def noted(batches: list[Batch], device: torch.device) -> Batch:
        sizes.append(len(batches))
        return plain(batches, device)

    monkeypatch.setattr(engine, "stack", noted)
    monkeypatch.setattr(chunking, "SCORED_AT_ONCE", 4 * 50)
    found = run_round(algorithm, algorithm.init(), work, 128)
    assert found.losses == pytest.approx(whole.losses, abs=1e-6)
    assert all(torch.allclose(value, whole.gradient[name], atol=1e-6) for name, value in found.gradient.items())
    assert max(sizes) <= 2  # of 25 rows each
