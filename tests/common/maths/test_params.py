"""Arithmetic on named parameters, by hand."""

import math

import pytest
import torch
from torch import Tensor

from quickbloom.common.maths.params import (
    Params,
    add,
    add_weighted,
    all_finite,
    can_be_squared,
    mismatch,
    subtract,
    weighted_mean,
    weighted_quotient,
    zeros,
)


def params(weight: list[float], bias: float) -> Params:
    return {"weight": torch.tensor(weight), "bias": torch.tensor(bias)}


def as_lists(values: Params) -> dict[str, object]:
    return {name: value.tolist() for name, value in values.items()}


def test_add_and_subtract_work_key_by_key_and_change_nothing() -> None:
    a, b = params([1.0, 2.0], 3.0), params([10.0, 20.0], 30.0)
    assert as_lists(add(a, b, 0.5)) == {"weight": [6.0, 12.0], "bias": 18.0}
    assert as_lists(subtract(a, b)) == {"weight": [-9.0, -18.0], "bias": -27.0}
    assert as_lists(a) == {"weight": [1.0, 2.0], "bias": 3.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_bad_entry_is_found(bad: float) -> None:
    assert all_finite(params([1.0, 2.0], 3.0))
    assert not all_finite(params([1.0, bad], 3.0))


@pytest.mark.parametrize(
    ("value", "fine"),
    [
        (torch.full((300_000,), 1.0, dtype=torch.float16), True),  # a sum of squares beyond float16 itself
        (torch.tensor([6e4, 6e4], dtype=torch.float16), True),
        (torch.tensor([float("inf")], dtype=torch.float16), False),
        (torch.tensor([1e20]), False),
        (torch.tensor([1e20], dtype=torch.float64), True),
        (torch.tensor([float("nan"), 1.0]), False),
        (torch.tensor([2**40]), True),
    ],
)
def test_what_an_optimizer_can_square(value: Tensor, fine: bool) -> None:
    assert can_be_squared(value) is fine


def test_mismatch_is_none_for_equal_keys_shapes_and_dtypes() -> None:
    assert mismatch(params([1.0, 2.0], 3.0), params([4.0, 5.0], 6.0)) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": torch.zeros(2)}, "`bias` is missing"),
        ({**params([0.0, 0.0], 0.0), "extra": torch.zeros(1)}, "unexpected tensor `extra`"),
        (params([0.0, 0.0, 0.0], 0.0), r"`weight` has shape \(3,\), expected \(2,\)"),
        (
            {"weight": torch.zeros(2, dtype=torch.int64), "bias": torch.tensor(0.0)},
            "`weight` has dtype int64, expected float32",
        ),
    ],
)
def test_mismatch_names_what_does_not_fit(given: Params, words: str) -> None:
    reason = mismatch(given, params([1.0, 2.0], 3.0))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(reason)


def test_weighted_mean_by_hand() -> None:
    # (1 * [1, 2] + 3 * [5, 6]) / 4 = [4, 5]; (1 * 0 + 3 * 8) / 4 = 6
    mean = weighted_mean([(params([1.0, 2.0], 0.0), 1.0), (params([5.0, 6.0], 8.0), 3.0)])
    assert as_lists(mean) == {"weight": [4.0, 5.0], "bias": 6.0}
    assert mean["weight"].dtype == torch.float32


def test_weighted_mean_is_summed_in_float64() -> None:
    # In float32 the ones would vanish beside 2^25: (2^25 + 1 + 1 - 2^25) / 4 = 0.5.
    items = [({"w": torch.tensor(value)}, 1.0) for value in (2.0**25, 1.0, 1.0, -(2.0**25))]
    assert weighted_mean(items)["w"].item() == 0.5


@pytest.mark.parametrize("items", [[], [({"w": torch.ones(1)}, 0.0)]])
def test_weighted_mean_of_nothing_is_an_error(items: list[tuple[Params, float]]) -> None:
    with pytest.raises(ValueError, match="at least one item with a positive weight"):
        weighted_mean(items)


def test_a_mean_of_tensors_that_lie_in_memory_column_by_column() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    columns = weight.t().contiguous().t()
    assert not columns.is_contiguous()
    assert (
        weighted_mean([({"weight": columns}, 1.0), ({"weight": 3 * weight}, 1.0)])["weight"].tolist() == (2 * weight).tolist()
    )


def test_weighted_mean_in_blocks_has_the_bits_of_the_plain_sum() -> None:
    # More numbers than a block; the oracle adds whole tensors in float64, in the order given.
    values = [torch.randn(3, 2**19, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    weights = [3.0, 0.1, 7.0]
    plain = sum((weight * value.double() for value, weight in zip(values, weights, strict=True)), torch.zeros(3, 2**19))
    mean = weighted_mean([({"w": value}, weight) for value, weight in zip(values, weights, strict=True)])["w"]
    assert torch.equal(mean, (plain / sum(weights)).float())


def test_weighted_quotient_has_the_bits_of_a_sum_in_float64() -> None:
    values = torch.randn(3, 2**20, generator=torch.Generator().manual_seed(5))
    values[:, 7] = -0.0
    weights = torch.tensor([3.0, 0.1, 7.0], dtype=torch.float64)
    total = zeros({"w": values[0]})["w"]
    add_weighted(total, values, weights)
    found = weighted_quotient(values, weights, 10.1, torch.float32)
    assert torch.equal(found.view(torch.int32), (total / 10.1).float().view(torch.int32))
    plain = (values.double() * weights.unsqueeze(1)).sum(dim=0) / 10.1
    assert torch.allclose(found.double(), plain, rtol=1e-6, atol=1e-12)
