"""A round summed up in the kernels against one task after the other in plain torch: torch.optim, autograd and sums by hand."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.algorithms.maml import Maml
from quickbloom.common.algorithms.reptile import Reptile
from quickbloom.common.algorithms.ridge import Ridge
from quickbloom.common.engine.round import RoundResult, TaskWork, contributions, run_round, task_norms
from quickbloom.common.maths.batch import Batch, Episode, Minibatches, TaskData
from quickbloom.common.maths.inner_loop import last
from quickbloom.common.maths.kernels import derivatives, train
from quickbloom.common.maths.kernels.build import library
from quickbloom.common.maths.kernels.compiler import SWITCH
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.models.conv4 import Conv4, Conv4Options
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.randomness import generator

pytestmark = pytest.mark.usefixtures("each_library")

LR, STEPS, CLASSES = 0.1, 3, 4
SIZES = ((5, 7), (3, 2), (8, 8), (2, 9))
NAMES = ("reptile", "fedavg", "fomaml")


def module(kind: str, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        if kind == "conv4":
            options = Conv4Options.model_validate({"filters": 8, "norm": "batch", "downsample": "max-pool"})
            return Conv4.build(options, (1, 28, 28), CLASSES).to(dtype)
        return perceptron((6, 10, CLASSES)).to(dtype)


def build(name: str, kind: str = "classification", dtype: torch.dtype = torch.float64, **more: Any) -> Algorithm:
    chosen = ALGORITHMS[name]
    options = {"inner_lr": LR, "inner_steps": STEPS} | ({"batch_size": 4} if name in ("reptile", "fedavg") else {})
    options = {key: value for key, value in options.items() if key in chosen.Options.model_fields} | more
    learner = Learner(module(kind, dtype), "regression" if kind == "regression" else "classification", CLASSES)
    return chosen(chosen.Options.model_validate(options), learner)


def part(n: int, seed: int, kind: str, dtype: torch.dtype) -> Batch:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((n, *((1, 28, 28) if kind == "conv4" else (6,))))).to(dtype)
    if kind == "regression":
        return Batch.of(x, torch.from_numpy(rng.standard_normal((n, CLASSES))).to(dtype))
    return Batch.of(x, torch.from_numpy(rng.integers(CLASSES, size=n)))


def tasks(kind: str = "classification", dtype: torch.dtype = torch.float64) -> list[TaskData]:
    parts = [(part(s, 2 * k, kind, dtype), part(q, 2 * k + 1, kind, dtype)) for k, (s, q) in enumerate(SIZES)]
    return [TaskData(support, query, query) for support, query in parts]


def work(some: list[TaskData]) -> list[TaskWork]:
    return [TaskWork(data, generator(0, "draw", k)) for k, data in enumerate(some)]


def plain_loss(model: nn.Module, batch: Batch, rows: Any = slice(None)) -> Tensor:
    loss = F.mse_loss if batch.y.is_floating_point() else F.cross_entropy
    return loss(model(batch.x[rows]), batch.y[rows])


def plain_contribution(algorithm: Algorithm, data: TaskData, number: int) -> tuple[Params, float]:
    """start - phi, or for FO-MAML the gradient of the query loss at phi; and that loss."""
    start = algorithm.learner.module
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    both = Batch(*(torch.cat(values) for values in zip(data.support, data.query, strict=True)))
    drawn = algorithm.minibatch_indices(len(both.x), generator(0, "draw", number))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = plain_loss(model, data.support) if drawn is None else plain_loss(model, both, torch.from_numpy(drawn[step]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    query = plain_loss(model, data.query)
    query.backward()  # type: ignore[no-untyped-call]
    ends = model.named_parameters()
    if algorithm.name == "fomaml":
        return {name: value.grad for name, value in ends if value.grad is not None}, query.item()
    begins = dict(start.named_parameters())
    return {name: (begins[name] - value).detach() for name, value in ends}, query.item()


def norm(params: Params) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in params.values()))


def plain_round(algorithm: Algorithm, some: list[TaskData], clip: float = 0.0) -> RoundResult:
    total = {name: torch.zeros_like(value) for name, value in algorithm.learner.initial().items()}
    losses, weights, within = [], [], 0.0
    for number, data in enumerate(some):
        own, loss = plain_contribution(algorithm, data, number)
        size = norm(own)
        weight = float(len(data.support.x) + len(data.query.x)) if algorithm.name == "fedavg" and not clip else 1.0
        times = min(1.0, clip / size) if clip else 1.0
        within += float(bool(clip) and size <= clip)
        for name, value in own.items():
            total[name] += weight * times * value
        weights.append(weight)
        losses.append(loss)
    return RoundResult({name: value / sum(weights) for name, value in total.items()}, sum(weights), losses, [], within)


def check(found: RoundResult, expected: RoundResult, tolerance: float) -> None:
    assert found.losses == pytest.approx(expected.losses, abs=tolerance)
    assert (found.weight, found.within) == (expected.weight, expected.within)
    for name, value in expected.gradient.items():
        torch.testing.assert_close(found.gradient[name], value, rtol=tolerance, atol=tolerance)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks every sum of the kernels was over, from now on."""
    seen: list[int] = []
    inside = train.call

    def watching(function: str, layers: Any, batches: Any, *args: Any) -> None:
        if function.startswith("sum_"):
            seen.append(len(batches.x))
        inside(function, layers, batches, *args)

    for module in (train, derivatives):
        monkeypatch.setattr(module, "call", watching)
    return seen


@pytest.mark.parametrize("kind", ["classification", "regression", "conv4"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clipped", [False, True])
def test_a_round_is_the_weighted_mean_of_plain_torch_for_every_task(
    name: str, kind: str, clipped: bool, sums: list[int]
) -> None:
    algorithm = build(name, kind)
    norms = [norm(plain_contribution(algorithm, data, k)[0]) for k, data in enumerate(tasks(kind))]
    clip = sum(sorted(norms)[1:3]) / 2 if clipped else 0.0
    expected = plain_round(algorithm, tasks(kind), clip)
    found = run_round(algorithm, algorithm.init(), work(tasks(kind)), 3, clip=clip)
    assert sum(sums) == len(SIZES)
    assert expected.within == (2.0 if clipped else 0.0)
    check(found, expected, 1e-9)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "maml": ("maml", {}),
    "metasgd": ("metasgd", {}),
    "anil": ("anil", {}),
    "perfedavg": ("perfedavg", {"local_steps": 2, "local_lr": 0.07}),
    "perfedavg without Hessians": ("perfedavg", {"local_steps": 2, "variant": "fo"}),
    "protonet": ("protonet", {"temperature": 3.0}),
    "protonet by pairs": ("protonet", {"pairs": True}),
    "ridge": ("ridge", {}),
}
"""Those that need more than a descent: each with its table of settings."""


@contextmanager
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without kernels: by `torch.func.grad` under `vmap`."""
    with monkeypatch.context() as patched:
        patched.setenv(SWITCH, "0")
        library.cache_clear()
        try:
            yield
        finally:
            library.cache_clear()


@pytest.mark.parametrize("kind", ["classification", "regression", "conv4"])
@pytest.mark.parametrize("label", OTHERS)
@pytest.mark.parametrize("clipped", [False, True])
def test_others_have_the_numbers_of_torch(
    label: str, kind: str, clipped: bool, sums: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = OTHERS[label]
    if kind == "regression" and name == "protonet":
        pytest.skip("protonet is defined for classes")
    algorithm = build(name, kind, **options)
    source = torch.Generator().manual_seed(9)
    meta = {
        key: value + 0.05 * torch.randn(value.shape, generator=source, dtype=value.dtype)
        for key, value in algorithm.init().items()
    }
    with in_torch(monkeypatch):
        parts = contributions(algorithm, meta, work(tasks(kind)), 128)
        norms = sorted(norm for part in parts for norm in task_norms(part.gradients).tolist())
        clip = (norms[1] + norms[2]) / 2 if clipped else 0.0
        expected = run_round(algorithm, meta, work(tasks(kind)), 3, clip=clip)
    assert not sums
    assert expected.within == 2 * clipped
    found = run_round(algorithm, meta, work(tasks(kind)), 3, clip=clip)
    assert len(sums) == 2 or kind == "conv4"  # three tasks, then one; batch norm splits them by their sizes
    assert sums
    check(found, expected, 1e-9)


@pytest.mark.parametrize("spoiled", ["support", "query"])
@pytest.mark.parametrize("label", OTHERS)
def test_a_spoiled_task_leaves_no_trace_in_others(label: str, spoiled: str) -> None:
    name, options = OTHERS[label]
    algorithm, some = build(name, dtype=torch.float32, **options), tasks(dtype=torch.float32)
    expected = run_round(algorithm, algorithm.init(), [w for k, w in enumerate(work(some)) if k != 1], 128)
    part = getattr(some[1], spoiled)
    some[1] = replace(some[1], **{spoiled: Batch.of(part.x * float("nan"), part.y)})
    found = run_round(algorithm, algorithm.init(), work(some), 128)
    assert np.isnan(found.losses.pop(1))
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.weight == expected.weight
    for key, value in expected.gradient.items():
        torch.testing.assert_close(found.gradient[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 100.0])
def test_a_task_whose_numbers_beside_the_model_are_too_large_is_left_out(clip: float) -> None:
    """A body that gives zeros has no gradient, and the targets' size is in that of the head alone, whose squares overflow."""
    algorithm = build("ridge", "regression", dtype=torch.float32)
    meta = algorithm.init()
    meta["1.bias"] = torch.full_like(meta["1.bias"], -100.0)
    some = tasks("regression", torch.float32)
    expected = run_round(algorithm, meta, [w for k, w in enumerate(work(some)) if k != 1], 128, clip=clip)
    support, query = (part._replace(y=part.y * 1e12) for part in (some[1].support, some[1].query))
    some[1] = replace(some[1], support=support, query=query)
    found = run_round(algorithm, meta, work(some), 128, clip=clip)
    assert found.weight == expected.weight == 3
    for key, value in expected.gradient.items():
        torch.testing.assert_close(found.gradient[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_losses_in_another_number_type_are_read_as_what_they_are(clip: float) -> None:
    """Targets of float64 beside a model of float32."""
    algorithm, some = build("ridge", "regression", dtype=torch.float32), tasks("regression", torch.float32)
    expected = run_round(algorithm, algorithm.init(), work(some), 128, clip=clip)
    wide = [
        replace(one, **{name: getattr(one, name)._replace(y=getattr(one, name).y.double()) for name in ("support", "query")})
        for one in some
    ]
    found = run_round(algorithm, algorithm.init(), work(wide), 128, clip=clip)
    check(found, expected, 1e-5)


@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_parameters_that_require_a_gradient_and_inference_mode_change_nothing(name: str) -> None:
    algorithm = build(name)
    meta = algorithm.init()
    expected = run_round(algorithm, meta, work(tasks()), 128)
    leaves: Params = {key: nn.Parameter(value.clone()) for key, value in meta.items()}
    check(run_round(algorithm, leaves, work(tasks()), 128), expected, 1e-12)
    with torch.inference_mode():
        check(run_round(algorithm, meta, work(tasks()), 128), expected, 1e-9)


class Bounded(nn.Module):
    """A model of a user's whose outputs are more than its last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(self.head(self.body(x).relu()))


@pytest.mark.parametrize("name", ["anil", "ridge"])
def test_what_a_model_does_after_its_last_layer_counts_in_training(name: str) -> None:
    chosen = ALGORITHMS[name]
    options = {key: value for key, value in (("inner_lr", LR), ("inner_steps", STEPS)) if key in chosen.Options.model_fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learner = Learner(Bounded().double(), "classification", CLASSES)
    algorithm = chosen(chosen.Options.model_validate(options), learner)
    data = tasks()[0]
    found = run_round(algorithm, algorithm.init(), work([data]), 128)
    phi = last(algorithm.adaptation_path(algorithm.init(), data.support, LR, STEPS))
    assert found.losses[0] == pytest.approx(
        float(F.cross_entropy(functional_call(learner.module, phi, (data.query.x,)), data.query.y))
    )


class Thrice(Ridge):
    """A user's own way to score."""

    def score(self, personal: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, metric = super().score(personal, batch)
        return 3 * loss, metric


class Doubled(Learner):
    """A user's own loss."""

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return 2 * super().loss(params, batch)


def test_a_subclass_that_scores_in_another_way_is_trained_by_that(sums: list[int]) -> None:
    ridge = build("ridge")
    own = Thrice(ridge.options, ridge.learner)
    expected = run_round(ridge, ridge.init(), work(tasks()), 128)
    sums.clear()
    found = run_round(own, ridge.init(), work(tasks()), 128)
    assert not sums
    assert found.losses == pytest.approx([3 * loss for loss in expected.losses])


def test_a_learner_with_a_loss_of_its_own_is_trained_by_that(sums: list[int]) -> None:
    anil = build("anil")
    own = type(anil)(anil.options, Doubled(anil.learner.module, "classification", CLASSES))
    found = run_round(own, anil.init(), work(tasks()), 128)
    assert not sums
    faster = build("anil", inner_lr=2 * LR)
    expected = run_round(faster, anil.init(), work(tasks()), 128)
    assert found.losses == pytest.approx([2 * loss for loss in expected.losses])


class Slower(Maml):
    """A user's own path of adaptation."""

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        return super().adaptation_path(meta, support, lr / 2, steps)


def test_a_subclass_with_a_path_of_its_own_is_trained_along_it(sums: list[int]) -> None:
    maml = build("maml")
    own = Slower(maml.options, maml.learner)
    expected = run_round(build("maml", inner_lr=LR / 2), maml.init(), work(tasks()), 128)
    sums.clear()
    check(run_round(own, maml.init(), work(tasks()), 128), expected, 1e-9)
    assert not sums


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_agrees_but_for_rounding(name: str) -> None:
    algorithm = build(name, dtype=torch.float32)
    expected = plain_round(algorithm, tasks(dtype=torch.float32))
    found = run_round(algorithm, algorithm.init(), work(tasks(dtype=torch.float32)), 128)
    assert {value.dtype for value in found.gradient.values()} == {torch.float32}
    check(found, expected, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_threads_share_the_tasks(name: str) -> None:
    algorithm, before = build(name), torch.get_num_threads()
    one = run_round(algorithm, algorithm.init(), work(tasks()), 128)
    try:
        torch.set_num_threads(3)
        check(run_round(algorithm, algorithm.init(), work(tasks()), 128), one, 1e-12)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("clip", [0.0, 0.35])
@pytest.mark.parametrize("size", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("spoiled", ["support", "query"])
@pytest.mark.parametrize("name", NAMES)
def test_a_task_whose_numbers_are_not_finite_leaves_no_trace(name: str, spoiled: str, size: float, clip: float) -> None:
    """The squares of 1e25 are not finite in float32."""
    algorithm, some = build(name, dtype=torch.float32), tasks(dtype=torch.float32)
    expected = run_round(algorithm, algorithm.init(), [w for k, w in enumerate(work(some)) if k != 1], 128, clip=clip)
    part = getattr(some[1], spoiled)
    some[1] = replace(some[1], **{spoiled: Batch.of(part.x * size, part.y)})
    found = run_round(algorithm, algorithm.init(), work(some), 128, clip=clip)
    assert np.isnan(found.losses.pop(1))
    assert found.losses == expected.losses
    assert (found.weight, found.within) == (expected.weight, expected.within)
    for name, value in expected.gradient.items():
        assert torch.equal(found.gradient[name], value)


def test_rows_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = build("reptile")
    monkeypatch.setattr(algorithm, "minibatch_indices", lambda num_examples, rng: np.full((STEPS, 4), num_examples))
    with pytest.raises(IndexError, match="rows of a batch must be"):
        run_round(algorithm, algorithm.init(), work(tasks()), 128)


def general(algorithm: Algorithm, some: list[TaskData]) -> RoundResult | type[BaseException]:
    """What comes of the same tasks without the sum, or the kind of error."""
    try:
        parts = list(contributions(algorithm, algorithm.init(), work(some), 128))
    except Exception as error:
        return type(error)
    gradient = {name: value.mean(dim=0) for name, value in parts[0].gradients.items()}
    return RoundResult(gradient, float(parts[0].finite.sum()), parts[0].losses.tolist(), [])


def with_query(data: TaskData, x: Tensor, y: Tensor) -> TaskData:
    return replace(data, query=Batch.of(x, y), test=Batch.of(x, y))


ODD_QUERIES = {
    "other numbers": lambda data: with_query(data, data.query.x.double(), data.query.y),
    "other labels": lambda data: with_query(data, data.query.x, torch.zeros(len(data.query.x), CLASSES)),
    "other inputs": lambda data: with_query(data, data.query.x[:, :5], data.query.y),
}


@pytest.mark.parametrize("odd", ODD_QUERIES)
def test_a_query_that_does_not_fit_is_for_torch_to_refuse(odd: str, sums: list[int]) -> None:
    """The kernels would read beyond its end, or numbers as what they are not."""
    algorithm = build("fomaml", dtype=torch.float32)
    some = [ODD_QUERIES[odd](data) for data in tasks(dtype=torch.float32)[:2]]
    expected = general(algorithm, some)
    assert isinstance(expected, type)
    with pytest.raises(expected):
        run_round(algorithm, algorithm.init(), work(some), 128)
    assert not sums


@pytest.mark.parametrize("name", NAMES)
def test_one_query_example_is_not_normalised_alone(name: str, sums: list[int]) -> None:
    """At 1 x 1 pixels torch refuses to, and so must the sum."""
    options = Conv4Options.model_validate({"filters": 4, "norm": "batch", "downsample": "max-pool"})
    module = Conv4.build(options, (1, 8, 8), CLASSES)
    like = build(name, dtype=torch.float32)
    algorithm = type(like)(like.options, Learner(module, "classification", CLASSES))
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = TaskData(Batch.of(x[:5], torch.arange(5) % CLASSES), *[Batch.of(x[5:], torch.tensor([1]))] * 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run_round(algorithm, algorithm.init(), work([data, data]), 128)
    assert not sums


def test_a_task_without_a_query_is_left_out(sums: list[int]) -> None:
    algorithm = build("reptile")
    empty = Batch.of(torch.zeros(0, 6, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    some = [replace(data, query=empty) for data in tasks()[:2]]
    found = run_round(algorithm, algorithm.init(), work(some), 128)
    assert (found.weight, sums) == (0.0, [])
    assert not any(value.any() for value in found.gradient.values())


class Halved(Reptile):
    """What a user's own algorithm may change."""

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        gradient, loss = super().meta_gradient(meta, episode, minibatches)
        return {name: value / 2 for name, value in gradient.items()}, loss


class Watched(Reptile):
    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        gradient, loss, kept = super().contribute(meta, kept, episode, minibatches)
        return {name: value / 2 for name, value in gradient.items()}, loss, kept


class Frozen(Reptile):
    def with_zero_head(self, params: Params) -> Params:
        return {name: value / 2 for name, value in params.items()}


@pytest.mark.parametrize("own", [Halved, Watched, Frozen])
def test_a_subclass_contributes_what_it_says(own: type[Reptile], sums: list[int]) -> None:
    reptile = build("reptile")
    found = run_round(own(reptile.options, reptile.learner), reptile.init(), work(tasks()), 128)
    assert not sums
    expected = plain_round(reptile, tasks())
    halves = {name: value / 2 for name, value in expected.gradient.items()}
    check(found, replace(expected, gradient=halves), 1e-9)


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_a_head_of_zeros_stays_one_and_is_not_in_the_norm(name: str, clip: float, sums: list[int]) -> None:
    algorithm = build(name, zero_head=True)
    algorithm.learner.module[-1].weight.data.zero_()  # type: ignore[index]
    algorithm.learner.module[-1].bias.data.zero_()  # type: ignore[index]
    total = {name: torch.zeros_like(value) for name, value in algorithm.init().items()}
    weights = 0.0
    for k, data in enumerate(tasks()):
        own, _ = plain_contribution(algorithm, data, k)
        own = {name: value * (not name.startswith("3.")) for name, value in own.items()}
        weight = float(len(data.support.x) + len(data.query.x)) if name == "fedavg" and not clip else 1.0
        for key, value in own.items():
            total[key] += weight * (min(1.0, clip / norm(own)) if clip else 1.0) * value
        weights += weight
    found = run_round(algorithm, algorithm.init(), work(tasks()), 128, clip=clip).gradient
    assert bool(sums) == (not clip)
    for key, value in total.items():
        torch.testing.assert_close(found[key], value / weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_without_kernels_the_numbers_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch, sums: list[int]) -> None:
    algorithm = build(name)
    expected = run_round(algorithm, algorithm.init(), work(tasks()), 128, clip=0.35)
    assert sums == [len(SIZES)]
    monkeypatch.setenv(SWITCH, "0")
    library.cache_clear()
    try:
        found = run_round(algorithm, algorithm.init(), work(tasks()), 128, clip=0.35)
    finally:
        library.cache_clear()
    assert sums == [len(SIZES)]
    check(found, expected, 1e-9)
