"""The outer optimizer: steps worked by hand, and going on exactly where a checkpoint stopped."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.maths.params import Params
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.runs import checkpoints

ADAM = {"outer-optimizer": "adam", "outer-lr": 0.1}
SGD = {"outer-optimizer": "sgd", "outer-lr": 0.1}
MOMENTUM = {**SGD, "outer-momentum": 0.5}


def outer(settings: dict[str, Any], start: float = 1.0, rounds: int = 10) -> OuterOptimizer:
    return OuterOptimizer(AlgorithmOptions.model_validate(settings), {"w": torch.tensor([start], dtype=torch.float64)}, rounds)


def step(optimizer: OuterOptimizer, gradient: float, number: int = 1) -> float:
    optimizer.step({"w": torch.tensor([gradient], dtype=torch.float64)}, number)
    return optimizer.meta["w"].item()


def test_sgd_by_hand() -> None:
    # 1 - 0.1 * 2 = 0.8, then 0.8 - 0.1 * -1 = 0.9
    optimizer = outer(SGD)
    assert [step(optimizer, 2.0, 1), step(optimizer, -1.0, 2)] == pytest.approx([0.8, 0.9], abs=1e-14)


def test_momentum_by_hand() -> None:
    # v1 = 2, w = 1 - 0.2 = 0.8; v2 = 0.5 * 2 + 1 = 2, w = 0.6; v3 = 0.5 * 2 + 0 = 1, w = 0.5
    optimizer = outer(MOMENTUM)
    path = [step(optimizer, gradient, t) for t, gradient in enumerate([2.0, 1.0, 0.0], 1)]
    assert path == pytest.approx([0.8, 0.6, 0.5], abs=1e-14)


def test_adam_by_hand_over_three_rounds() -> None:
    # Kingma, Ba 2015, Algorithm 1: m and v are running means with 0.9 and 0.999, corrected by 1 - 0.9^t and 1 - 0.999^t.
    optimizer, w, m, v = outer(ADAM), 1.0, 0.0, 0.0
    for t, gradient in enumerate([2.0, -1.0, 0.5], 1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert step(optimizer, gradient, t) == pytest.approx(w, abs=1e-12)


def test_adam_keeps_its_moments_from_round_to_round() -> None:
    kept = outer(ADAM)
    after_one = step(kept, 2.0, 1)
    fresh = outer(ADAM, start=after_one)
    assert abs(step(kept, -1.0, 2) - step(fresh, -1.0, 2)) > 0.01


def test_rate_falls_linearly_only_if_asked() -> None:
    # w falls by 0.1 * (1 - (t - 1) / 4): 0.1, 0.075, 0.05, 0.025
    falling = outer({**SGD, "outer-decay": True}, start=0.0, rounds=4)
    path = [step(falling, 1.0, t) for t in (1, 2, 3, 4)]
    assert path == pytest.approx([-0.1, -0.175, -0.225, -0.25], abs=1e-14)
    steady = outer(SGD, start=0.0, rounds=4)
    assert [step(steady, 1.0, t) for t in (1, 2, 3, 4)][-1] == pytest.approx(-0.4, abs=1e-14)


def path_of(optimizer: OuterOptimizer, numbers: range) -> list[Params]:
    """Four tensors, one of them 0-d, through rounds of gradients that depend on the round alone."""
    result = []
    for number in numbers:
        source = torch.Generator().manual_seed(number)
        gradient = {name: torch.randn(value.shape, generator=source) for name, value in optimizer.meta.items()}
        optimizer.step(gradient, number)
        result.append(optimizer.meta)
    return result


@pytest.mark.parametrize("settings", [SGD, MOMENTUM, ADAM, {**ADAM, "outer-decay": True}])
@pytest.mark.parametrize("through_file", [False, True])
def test_a_restored_optimizer_goes_on_exactly(settings: dict[str, Any], through_file: bool, tmp_path: Path) -> None:
    options = AlgorithmOptions.model_validate(settings)
    start = {"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3), "a/b": torch.ones(2), "scale": torch.tensor(1.0)}
    whole = path_of(OuterOptimizer(options, start, 8), range(1, 9))
    first = OuterOptimizer(options, start, 8)
    path_of(first, range(1, 5))
    tensors = first.state()
    if through_file:
        tensors = checkpoints.load(checkpoints.CheckpointWriter(tmp_path, {}).write(4, tensors, {})).tensors
    second = OuterOptimizer(options, {name: torch.full_like(value, 9.0) for name, value in start.items()}, 8)
    second.restore(tensors)
    for expected, found in zip(whole[4:], path_of(second, range(5, 9)), strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_state_and_parameters_handed_out_are_copies() -> None:
    optimizer = outer(MOMENTUM)
    step(optimizer, 2.0)
    for tensors in (optimizer.meta, optimizer.state()):
        for value in tensors.values():
            value.fill_(77.0)
    assert step(optimizer, 1.0) == pytest.approx(0.6, abs=1e-14)


def test_the_parameters_given_at_the_start_are_not_changed() -> None:
    meta = {"w": torch.ones(1)}
    OuterOptimizer(AlgorithmOptions.model_validate(SGD), meta, 1).step({"w": torch.ones(1)}, 1)
    assert meta["w"].item() == 1.0


def test_a_gradient_that_lacks_a_tensor_is_an_error() -> None:
    with pytest.raises(KeyError):
        outer(SGD).step({}, 1)


def test_a_gradient_of_another_shape_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        outer(SGD).step({"w": torch.zeros(2, dtype=torch.float64)}, 1)


def test_state_of_another_model_is_an_error() -> None:
    with pytest.raises(KeyError):
        outer(ADAM).restore({"meta/other": torch.ones(1)})


@pytest.mark.parametrize("settings", [ADAM, SGD, MOMENTUM], ids=["adam", "sgd", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_and_state_are_those_of_torch_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    meta = {"w": torch.randn(7, 3, dtype=dtype), "b": torch.randn(3, dtype=dtype), "none": torch.zeros(0, dtype=dtype)}
    ours = OuterOptimizer(AlgorithmOptions.model_validate(settings), meta, 30)
    theirs = {name: value.clone().requires_grad_() for name, value in meta.items()}
    kinds = {"lr": 0.1} if settings is ADAM else {"lr": 0.1, "momentum": settings.get("outer-momentum", 0.0)}
    optimizer = (torch.optim.Adam if settings is ADAM else torch.optim.SGD)(theirs.values(), **kinds)
    for t in range(1, 31):
        gradient = {name: torch.randn_like(value) for name, value in meta.items()}
        ours.step(gradient, t)
        for name, value in theirs.items():
            value.grad = gradient[name]
        optimizer.step()
        if t == 15:  # go on from a checkpoint
            kept, ours = ours.state(), OuterOptimizer(AlgorithmOptions.model_validate(settings), meta, 30)
            ours.restore(kept)
    assert all(torch.equal(ours.meta[name], value.detach()) for name, value in theirs.items())
    state = {
        f"outer/{key}/{name}": value
        for name, one in zip(theirs, optimizer.state_dict()["state"].values(), strict=False)
        for key, value in one.items()
        if isinstance(value, torch.Tensor)
    }
    kept = {name: value for name, value in ours.state().items() if name.startswith("outer/")}
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], value) for name, value in state.items())
