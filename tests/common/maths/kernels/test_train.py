"""The kernels against plain torch modules with autograd and torch.optim, finite differences, and by hand."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from quickbloom.common.maths import fast_paths
from quickbloom.common.maths.batch import Batch, Draws
from quickbloom.common.maths.fast_paths import end_of_descent, gradient_and_loss, has_kernels, loss_of
from quickbloom.common.maths.kernels import train
from quickbloom.common.maths.kernels.train import known
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.models.conv4 import Conv4, Conv4Options
from quickbloom.common.models.mlp import perceptron

pytestmark = pytest.mark.usefixtures("each_library")

LR, CLASSES = 0.05, 5
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
CONV4 = list(itertools.product(("stride", "max-pool"), ("group", "batch", "none"), ((1, 28, 28), (3, 13, 9)), (8, 20)))


def prepared(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Numbers of its own for every parameter: the usual ones and zeros of a normalisation would hide mistakes."""
    source = torch.Generator().manual_seed(3)
    for value in module.parameters():
        if value.ndim == 1:
            value.data = torch.randn(value.shape, generator=source)
    return module.to(dtype)


def conv4(case: tuple[str, str, tuple[int, ...], int], dtype: torch.dtype) -> Learner:
    downsample, norm, shape, filters = case
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        options = Conv4Options.model_validate({"downsample": downsample, "norm": norm, "filters": filters})
        return Learner(prepared(Conv4.build(options, shape, CLASSES), dtype), "classification", CLASSES)


def batch(n: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int, kind: str = "classification") -> Batch:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=source, dtype=torch.float64).to(dtype)
    if kind == "regression":
        return Batch.of(x, torch.randn(n, CLASSES, generator=source, dtype=torch.float64).to(dtype))
    return Batch.of(x, torch.randint(CLASSES, (n,), generator=source))


def plain_descent(learner: Learner, batches: list[Batch]) -> Params:
    """torch.optim on a copy of the module, with torch's own loss."""
    module = copy.deepcopy(learner.module)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    for one in batches:
        optimizer.zero_grad()
        plain_loss(module, one, learner.kind).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: value.detach() for name, value in module.named_parameters()}


def plain_loss(module: nn.Module, one: Batch, kind: str) -> Tensor:
    return F.cross_entropy(module(one.x), one.y) if kind == "classification" else F.mse_loss(module(one.x), one.y)


def stacked(batches: list[Batch]) -> Batch:
    return Batch(*(torch.stack(list(values)) for values in zip(*batches, strict=True)))


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernels are asked for from now on."""
    asked: list[str] = []
    train = fast_paths._train

    def watching(what: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        asked.append(what)
        return train(what, *args, **kwargs)

    monkeypatch.setattr(fast_paths, "_train", watching)
    return asked


@pytest.mark.parametrize("case", CONV4, ids=str)
def test_conv4_descends_as_with_torch_optim(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(monkeypatch)
    learner = conv4(case, torch.float64)
    batches = [batch(7, case[2], torch.float64, seed) for seed in range(3)]
    found = end_of_descent(learner, learner.initial(), stacked(batches), LR)
    torch.testing.assert_close(found, plain_descent(learner, batches), rtol=0, atol=1e-10)
    assert asked == ["descent"]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("mean", "deviation", "worst"), [(0.0, 1.0, 1e-6), (100.0, 1.0, 5e-5), (100.0, 0.1, 1e-3)])
def test_a_normalisation_keeps_its_digits_where_the_mean_is_large(
    norm: str, mean: float, deviation: float, worst: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Against autograd in float64. In float32 100.0 is known to 7.6e-6, so where the deviation is 0.1 no more than 1e-4 of it.
    asked = watched(monkeypatch)
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(8, track_running_stats=False) if norm == "batch" else nn.GroupNorm(2, 8)
    # Without ReLU: a unit that is switched on or off would be another function.
    convolution = nn.Conv2d(1, 8, 3, padding=1)
    convolution.weight.data *= deviation
    convolution.bias = nn.Parameter(torch.full((8,), mean))
    module = nn.Sequential(convolution, layer, nn.Flatten(), nn.Linear(8 * 14 * 14, CLASSES))
    one = batch(20, (1, 14, 14), torch.float32, 2)
    exact = copy.deepcopy(module).double()
    plain_loss(exact, one._replace(x=one.x.double()), "classification").backward()  # type: ignore[no-untyped-call]
    learner = Learner(module, "classification", CLASSES)
    found, _ = gradient_and_loss(learner, learner.initial(), one)
    expected = {name: value.grad for name, value in exact.named_parameters() if value.grad is not None}
    assert expected.keys() == found.keys()
    off = torch.cat([(found[name].double() - value).flatten() for name, value in expected.items()])
    assert float(off.norm() / torch.cat([value.flatten() for value in expected.values()]).norm()) < worst
    assert asked == ["gradient"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("sizes", [(6, 5), (6, 1, 5), (6, 9, 17, 5), (1, 64, 33, 5)], ids=str)
def test_a_perceptron_descends_as_with_torch_optim(sizes: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    learner = Learner(prepared(perceptron(sizes), dtype), kind, CLASSES)
    batches = [batch(11, sizes[:1], dtype, seed, kind) for seed in range(4)]
    found = end_of_descent(learner, learner.initial(), stacked(batches), LR)
    torch.testing.assert_close(found, plain_descent(learner, batches), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", [("stride", "batch", (1, 28, 28), 8), ("max-pool", "group", (2, 17, 12), 12)], ids=str)
def test_a_gradient_equals_finite_differences(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(monkeypatch)
    learner = conv4(case, torch.float64)
    one, theta = batch(6, case[2], torch.float64, 1), learner.initial()
    gradient, loss = gradient_and_loss(learner, theta, one)
    assert loss.item() == pytest.approx(plain_loss(learner.module, one, "classification").item(), abs=1e-12)
    source = torch.Generator().manual_seed(4)
    direction = {name: torch.randn(value.shape, generator=source, dtype=value.dtype) for name, value in theta.items()}
    step = 1e-8  # so small that hardly a unit is switched on or off in between

    def moved(by: float) -> float:
        return loss_of(learner, {name: value + by * direction[name] for name, value in theta.items()}, one).item()

    slope = sum(float((gradient[name] * direction[name]).sum()) for name in theta)
    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert asked == ["gradient", "loss", "loss"]


def test_two_steps_of_two_units_by_hand() -> None:
    # h = relu(w x) with w = (1, -1) and x = 2 is (2, 0); out = v . h with v = (3, 5) is 6, target 4: the error is 2, and the
    # loss 4. Gradients: dv = 2 * 2 * (2, 0) = (8, 0), dw = 2 * 2 * (3, -) * 2 = (24, 0), of the biases 4 and (12, 0).
    # With rate 1/8: v = (2, 5), w = (-2, -1), bias of h (-1.5, 0), of out -0.5. Then h = relu(-5.5, -2) = 0, out = -0.5, the
    # error -4.5, and only the last bias moves: by 2 * 4.5 / 8.
    module = perceptron((1, 2, 1)).double()
    theta = {"1.weight": [[1.0], [-1.0]], "1.bias": [0.0, 0.0], "3.weight": [[3.0, 5.0]], "3.bias": [0.0]}
    start = {name: torch.tensor(value, dtype=torch.float64) for name, value in theta.items()}
    one = Batch.of(torch.tensor([[2.0]]).double(), torch.tensor([[4.0]]).double())
    end = end_of_descent(Learner(module, "regression", 1), start, one.times(2), 0.125)
    assert {name: value.tolist() for name, value in end.items()} == {
        "1.weight": [[-2.0], [-1.0]],
        "1.bias": [-1.5, 0.0],
        "3.weight": [[2.0, 5.0]],
        "3.bias": [0.625],
    }


def test_examples_of_weight_zero_count_for_nothing() -> None:
    learner = Learner(perceptron((6, 7, CLASSES)).double(), "classification", CLASSES)
    whole = batch(9, (6,), torch.float64, 1)
    part = Batch(*(values[:4] for values in whole))
    padded = whole._replace(weight=torch.tensor([1.0] * 4 + [0.0] * 5, dtype=torch.float64))
    found, expected = (end_of_descent(learner, learner.initial(), one.times(3), LR) for one in (padded, part))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_rows_of_the_same_examples_are_the_batches_that_they_name() -> None:
    for learner, shape in ((conv4(("stride", "group", (1, 12, 12), 8), torch.float64), (1, 12, 12)), (mlp(), (6,))):
        whole = batch(9, shape, torch.float64, 1)
        rows = torch.tensor([[0, 8, 3], [5, 5, 1]])
        draws = Draws(whole.x, whole.y, rows, torch.ones(2, 3, dtype=torch.float64))
        found = end_of_descent(learner, learner.initial(), draws, LR)
        expected = plain_descent(learner, [Batch.of(whole.x[row], whole.y[row]) for row in rows])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def mlp() -> Learner:
    return Learner(prepared(perceptron((6, 7, CLASSES)), torch.float64), "classification", CLASSES)


def test_vmap_over_tasks_within_rates_equals_one_after_the_other() -> None:
    learner = mlp()
    tasks = [batch(5, (6,), torch.float64, seed) for seed in range(3)]
    starts = {name: torch.stack([value, value + 1]) for name, value in learner.initial().items()}

    def end(start: Params, one: Batch) -> Params:
        return end_of_descent(learner, start, one.times(3), LR)

    found = vmap(vmap(end, in_dims=(None, 0)), in_dims=(0, None))(starts, stacked(tasks))
    for i, k in itertools.product(range(2), range(3)):
        expected = end({name: value[i] for name, value in starts.items()}, tasks[k])
        torch.testing.assert_close({name: value[i, k] for name, value in found.items()}, expected, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(threads: int) -> None:
    learner = mlp()
    tasks = stacked([batch(5, (6,), torch.float64, seed) for seed in range(7)])

    def ends() -> Params:
        return vmap(lambda one: end_of_descent(learner, learner.initial(), one.times(3), LR))(tasks)

    alone, before = ends(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(ends(), alone, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("label", [-1, CLASSES, 2**40])
def test_a_label_that_is_none_makes_numbers_that_are_not_finite(label: int) -> None:
    learner, one = mlp(), batch(4, (6,), torch.float64, 1)
    one.y[2] = label
    end = end_of_descent(learner, learner.initial(), one.times(2), LR)
    assert any(not torch.isfinite(value).all() for value in end.values())
    assert not torch.isfinite(gradient_and_loss(learner, learner.initial(), one)[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_broken_numbers_are_not_hidden_by_relu(poison: float) -> None:
    for learner, shape in ((conv4(("max-pool", "batch", (1, 12, 12), 8), torch.float32), (1, 12, 12)), (mlp(), (6,))):
        one = batch(4, shape, learner.dtype, 1)
        one.x[0] = poison
        assert not torch.isfinite(loss_of(learner, learner.initial(), one))


def test_large_logits_keep_their_digits() -> None:
    # Logits 1000 and 990: the losses are log(1 + e^-10) = 4.54e-5 and 10 more.
    module = perceptron((1, 2))
    start = {"1.weight": torch.zeros(2, 1), "1.bias": torch.tensor([1000.0, 990.0])}
    learner, x = Learner(module, "classification", 2), torch.zeros(1, 1)
    losses = [loss_of(learner, start, Batch.of(x, torch.tensor([k]))).item() for k in (0, 1)]
    assert losses == pytest.approx([4.5399e-5, 10.0000454], rel=1e-3)


def test_max_pooling_hands_on_what_is_not_a_number() -> None:
    module = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES))
    learner = Learner(module, "classification", CLASSES)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        one = batch(3, (1, 4, 4), torch.float32, 1)
        one.x[(0, 0, *place)] = torch.nan
        assert torch.isnan(loss_of(learner, learner.initial(), one))


SHAPES = [(1, 1, 0), (1, 2, 0), (1, 1, 2), (2, 1, 1), (3, 1, 0), (3, 3, 2), (5, 2, 2)]


@pytest.mark.parametrize(("side", "stride", "pad"), SHAPES)
def test_other_convolutions_descend_as_with_torch_optim(
    side: int, stride: int, pad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watched(monkeypatch)
    body = [nn.Conv2d(2, 5, side, stride, pad), nn.ReLU(), nn.Conv2d(5, 3, side, stride, pad), nn.GroupNorm(1, 3), nn.Flatten()]
    features = nn.Sequential(*body)(torch.zeros(1, 2, 13, 11)).shape[1]
    module = prepared(nn.Sequential(*body, nn.Linear(features, CLASSES)), torch.float64)
    learner = Learner(module, "classification", CLASSES)
    batches = [batch(4, (2, 13, 11), torch.float64, seed) for seed in range(2)]
    found = end_of_descent(learner, learner.initial(), stacked(batches), LR)
    torch.testing.assert_close(found, plain_descent(learner, batches), rtol=0, atol=1e-10)
    assert asked == ["descent"]


def test_modules_that_are_there_twice_are_twice_in_the_network() -> None:
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    convolutions = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    body = [part for convolution in convolutions for part in (convolution, relu, pool)]
    module = prepared(nn.Sequential(*body, nn.Flatten(), nn.Linear(16, CLASSES)), torch.float64)
    assert known(module) is not None
    learner, one = Learner(module, "classification", CLASSES), batch(4, (1, 8, 8), torch.float64, 1)
    found = end_of_descent(learner, learner.initial(), stacked([one]), LR)
    torch.testing.assert_close(found, plain_descent(learner, [one]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("row", [-1, 9, 10**9])
def test_a_row_that_is_none_is_an_error_and_no_crash(row: int) -> None:
    learner, whole = mlp(), batch(9, (6,), torch.float64, 1)
    draws = Draws(whole.x, whole.y, torch.tensor([[0, row]]), torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(IndexError, match=r"rows of a batch must be 0\.\.8"):
        end_of_descent(learner, learner.initial(), draws, LR)


def test_a_batch_without_weight_has_no_loss() -> None:
    learner, one = mlp(), batch(4, (6,), torch.float64, 1)
    nothing = one._replace(weight=torch.zeros(4, dtype=torch.float64))
    assert torch.isnan(loss_of(learner, learner.initial(), nothing))
    assert torch.isnan(learner.loss(learner.initial(), nothing))


REFUSED: dict[str, Callable[[], tuple[Params, Batch]]] = {
    "an input too few": lambda: (mlp().initial(), batch(4, (5,), torch.float64, 1)),
    "another number of outputs": lambda: (
        mlp().initial(),
        batch(4, (6,), torch.float64, 1)._replace(y=torch.zeros(4, 4).double()),
    ),
    "other numbers": lambda: (mlp().initial(), batch(4, (6,), torch.float32, 1)),
    "a parameter of another shape": lambda: (
        {**mlp().initial(), "1.bias": torch.zeros(8).double()},
        batch(4, (6,), torch.float64, 1),
    ),
    "a parameter too few": lambda: (
        {k: v for k, v in mlp().initial().items() if k != "1.bias"},
        batch(4, (6,), torch.float64, 1),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_never_reaches_the_kernels(case: str) -> None:
    params, one = REFUSED[case]()
    assert fast_paths._network(mlp(), params, one.times(1)) is None


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(6, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 4, bias=False)),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
        nn.Sequential(nn.Flatten(0), nn.Linear(6, 4)),
        nn.Sequential(nn.Conv2d(1, 4, 3, groups=1, dilation=2), nn.Flatten(), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)),
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(4, 2)
        ),
        nn.Sequential(nn.Conv2d(1, 4, 3, padding="same"), nn.Flatten(), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)),
        nn.Sequential(),
    ],
    ids=str,
)
def test_other_modules_are_not_known(module: nn.Module) -> None:
    assert known(module) is None


def test_a_hook_is_not_passed_over() -> None:
    module = perceptron((6, 5, 4))
    assert known(module) is not None
    module[1].register_forward_hook(lambda *_: None)
    assert known(module) is None


def test_neither_is_a_forward_of_its_own_or_a_part_that_was_exchanged() -> None:
    module = perceptron((6, 5, 4))
    module[1].forward = lambda x: x
    assert known(module) is None
    module = perceptron((6, 5, 4))
    assert known(module) is not None
    module[2] = nn.Tanh()
    assert known(module) is None


def test_layers_that_share_a_weight_are_not_known() -> None:
    layer, other = nn.Linear(6, 6), nn.Linear(6, 4)
    assert known(nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.ReLU(), other)) is None
    block = nn.Sequential(layer, nn.ReLU())
    assert known(nn.Sequential(nn.Flatten(), block, block, other)) is None


def test_labels_of_the_other_kind_are_torch_s_to_refuse() -> None:
    one = batch(4, (6,), torch.float64, 1)
    regression = Learner(mlp().module, "regression", CLASSES)
    assert fast_paths._network(regression, regression.initial(), one.times(1)) is None


def test_there_is_no_gradient_through_a_descent() -> None:
    learner, one = mlp(), batch(4, (6,), torch.float64, 1)
    start = {name: value.requires_grad_() for name, value in learner.initial().items()}
    end = end_of_descent(learner, start, one.times(2), LR)
    with pytest.raises(NotImplementedError, match="no gradient through"):
        learner.loss(end, one).backward()  # type: ignore[no-untyped-call]


def test_a_model_that_is_only_a_structure_has_kernels_and_a_large_one_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        module, other = (nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2))
    learner = Learner(module, "classification")
    learner.drop_numbers()
    learner.to(torch.device("cpu"))
    assert has_kernels(learner)
    learner.to(torch.device("cuda"))  # only a name: nothing is put there
    assert not has_kernels(learner)
    monkeypatch.setattr(train, "MOST", 100)  # bytes; these are 47 numbers
    assert known(other) is None


def test_a_model_that_does_not_fit_a_cache_is_left_to_torch() -> None:
    assert known(perceptron((32, 256, 256, 10))) is not None
    assert known(perceptron((32, 1024, 1024, 10))) is None
