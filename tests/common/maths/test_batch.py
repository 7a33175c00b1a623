"""Truncating a task's support."""

import pytest
import torch

from quickbloom.common.maths.batch import Batch

LABELS = [1, 0, 1, 1, 2, 0]


@pytest.mark.parametrize(
    ("shots", "kept"),
    [
        (1, [0, 1, 4]),  # the first 1, the first 0, the only 2
        (2, [0, 1, 2, 4, 5]),  # class 2 has fewer than asked: it keeps what it has
        (3, [0, 1, 2, 3, 4, 5]),
        (9, [0, 1, 2, 3, 4, 5]),
        (0, [0, 1, 2, 3, 4, 5]),  # 0: all
    ],
)
def test_the_first_examples_of_each_class_stay_in_their_order(shots: int, kept: list[int]) -> None:
    few = Batch.of(torch.arange(6.0), torch.tensor(LABELS)).first(shots)
    assert few.x.tolist() == kept
    assert few.y.tolist() == [LABELS[i] for i in kept]
    assert few.weight.tolist() == [1.0] * len(kept)


@pytest.mark.parametrize(("shots", "number"), [(1, 1), (3, 3), (9, 4), (0, 4)])
def test_for_regression_the_first_examples_in_all_stay(shots: int, number: int) -> None:
    targets = torch.tensor([[0.5], [0.5], [2.0], [0.5]])
    few = Batch.of(torch.arange(4.0), targets).first(shots)
    assert few.x.tolist() == list(range(number))
    assert few.y.shape == (number, 1)
