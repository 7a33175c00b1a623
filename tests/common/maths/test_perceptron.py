"""The written-out descent against the general one, which takes its gradients from `torch.func`, and by hand."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.engine.round import RoundResult, TaskWork, run_round
from quickbloom.common.maths import fast_paths
from quickbloom.common.maths import perceptron as perceptron_module
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.fast_paths import end_of_descent
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.perceptron import layer_names
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.randomness import generator

SIZES = [(3, 7), (9, 2), (5, 5), (4, 3)]
FIRST_ORDER = ["fedavg", "fomaml", "heads", "local", "reptile"]
KINDS = ["classification", "regression"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no compiler: tests/common/kernels has the other way."""
    monkeypatch.setattr(fast_paths, "known", lambda module: None)


class Other(nn.Sequential):
    """The same module, but not known as a perceptron."""


def build(name: str, kind: str, dtype: torch.dtype, *, known: bool, hidden: tuple[int, ...]) -> Algorithm:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        module = perceptron((6, *hidden, 4)).to(dtype)
    options = ALGORITHMS[name].Options.model_validate({"inner-lr": 0.1, "inner-steps": 7})
    return ALGORITHMS[name](options, Learner(module if known else Other(*module), kind, 4))


def batch(size: int, kind: str, dtype: torch.dtype, seed: int) -> Batch:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 3, generator=source, dtype=torch.float64).to(dtype)
    y = torch.randn(size, 4, generator=source, dtype=torch.float64).to(dtype)
    return Batch.of(x, torch.randint(4, (size,), generator=source) if kind == "classification" else y)


def round_of(algorithm: Algorithm, kind: str, dtype: torch.dtype, *, poison: float = 0.0) -> RoundResult:
    work = []
    for seed, (support, query) in enumerate(SIZES):
        data = TaskData(*(batch(n, kind, dtype, 10 * seed + n) for n in (support, query, 1)))
        if seed == 1:
            data.support.x[0] += poison
        work.append(TaskWork(data, generator(0, seed)))
    return run_round(algorithm, algorithm.init(), work, chunk_size=3)


@pytest.mark.parametrize("hidden", [(), (5,), (8, 7)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_round_is_the_same_as_on_a_module_that_is_not_known(
    name: str, kind: str, dtype: torch.dtype, hidden: tuple[int, ...]
) -> None:
    if name == "heads" and not hidden:
        pytest.skip("a head needs a body")
    known, other = (build(name, kind, dtype, known=known, hidden=hidden) for known in (True, False))
    assert (layer_names(known.learner.module) is None, layer_names(other.learner.module) is None) == (False, True)
    found, expected = round_of(known, kind, dtype), round_of(other, kind, dtype)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=0, atol=TOLERANCE[dtype])
    assert found.losses == pytest.approx(expected.losses, abs=TOLERANCE[dtype])
    torch.testing.assert_close(found.kept, expected.kept, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
def test_a_task_with_broken_numbers_contributes_nothing(poison: float) -> None:
    known, other = (build("fedavg", KINDS[0], torch.float32, known=known, hidden=(8,)) for known in (True, False))
    found, expected = (round_of(algorithm, KINDS[0], torch.float32, poison=poison) for algorithm in (known, other))
    assert found.losses == pytest.approx(expected.losses, abs=1e-5, nan_ok=True)
    assert [loss != loss for loss in found.losses] == [False, True, False, False]
    assert found.weight == sum(SIZES[0]) + sum(SIZES[2]) + sum(SIZES[3])


def test_one_step_of_a_line_by_hand() -> None:
    # Outputs 3 x - 1 = 2 and 5 at x = 1 and 2, targets 0 and 1: errors 2 and 4, so dL/dw = 2 * (2 * 1 + 4 * 2) / 2 = 10 and
    # dL/db = 2 * (2 + 4) / 2 = 6; with rate 0.5, w = 3 - 5 and b = -1 - 3.
    learner = Learner(perceptron((1, 1)), "regression", 1)
    start = {"1.weight": torch.tensor([[3.0]]), "1.bias": torch.tensor([-1.0])}
    steps = Batch.of(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])).times(1)
    end = end_of_descent(learner, start, steps, 0.5)
    assert {name: value.item() for name, value in end.items()} == {"1.weight": -2.0, "1.bias": -4.0}
    assert start["1.weight"].item() == 3.0


def test_tasks_that_start_apart_and_share_their_examples() -> None:
    learner = Learner(perceptron((6, 8, 4)).double(), "classification", 4)
    general = Learner(Other(*learner.module.children()), "classification", 4)
    source = torch.Generator().manual_seed(1)
    starts = {
        name: torch.randn(3, *value.shape, generator=source, dtype=value.dtype) for name, value in learner.initial().items()
    }
    steps = batch(5, "classification", torch.float64, 2).times(4)
    found, expected = (vmap(lambda start, of=of: end_of_descent(of, start, steps, 0.1))(starts) for of in (learner, general))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_steps_on_the_same_examples_take_no_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    slope = perceptron_module._slope

    def watched(y: torch.Tensor, share: torch.Tensor, outputs: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        seen.append(max(y.shape[1], share.shape[1]))
        return slope(y, share, outputs)

    monkeypatch.setattr(perceptron_module, "_slope", watched)
    for name in ("fomaml", "local", "fedavg"):
        round_of(build(name, KINDS[0], torch.float32, known=True, hidden=(5,)), KINDS[0], torch.float32)
    assert seen == [1, 1, 1, 1, 7, 7]  # in two chunks each


def test_there_is_no_gradient_through_it() -> None:
    learner = Learner(perceptron((6, 8, 4)), "classification", 4)
    one = batch(5, "classification", torch.float32, 2)

    def objective(start: dict[str, torch.Tensor]) -> torch.Tensor:
        return learner.loss(end_of_descent(learner, start, one.times(2), 0.1), one)

    with pytest.raises(NotImplementedError, match="no gradient through"):
        grad(objective)(learner.initial())


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 4),
        nn.Sequential(nn.Linear(6, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 4, bias=False)),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
        nn.Sequential(nn.Flatten(0), nn.Linear(6, 4)),
        nn.Sequential(),
    ],
    ids=str,
)
def test_what_is_not_exactly_a_perceptron_goes_the_general_way(module: nn.Module) -> None:
    assert layer_names(module) is None


def test_layers_that_share_a_weight_go_the_general_way() -> None:
    layer = nn.Linear(6, 6)
    assert layer_names(nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)) is None


def test_a_hook_is_not_passed_over() -> None:
    module = perceptron((6, 5, 4))
    assert layer_names(module) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    module[1].register_forward_hook(lambda *_: None)
    assert layer_names(module) is None
