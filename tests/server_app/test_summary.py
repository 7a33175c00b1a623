"""What a run says at its end of the rate and the steps that were chosen."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quickbloom.common.metric import ACCURACY
from quickbloom.server_app.federation.scores import Scores
from quickbloom.server_app.summary import _edge

LRS = [0.01, 0.1, 1.0]


def said(scores: Any, lr: float, steps: int, *, lrs: list[float] = LRS, algorithm: str = "maml") -> str:
    """The sentence where validation tasks have these accuracies [tasks, rates, steps + 1]."""
    values = np.array(scores, dtype=np.float64)
    strategy: Any = SimpleNamespace(
        config=SimpleNamespace(algorithm=algorithm),
        evaluation=SimpleNamespace(metric=ACCURACY),
    )
    tasks = [f"t{place}" for place in range(len(values))]
    return _edge(strategy, Scores(tasks, lrs, losses=np.zeros_like(values), metrics=values), lr, steps)


RISING, FLAT = [[0.1, 0.5, 0.6]] * 3, [[0.1, 0.6, 0.6]] * 3
"""Of one task, for each rate: after 0, 1 and 2 steps."""


@pytest.mark.parametrize(
    ("lr", "steps", "end"),
    [
        (0.01, 1, "the rate 0.01 is the lowest that was tried (`adapt-lrs`)"),
        (1.0, 1, "the rate 1 is the highest that was tried (`adapt-lrs`)"),
        (0.1, 2, "2 steps are the most that were tried (`adapt-steps`)"),
        (
            1.0,
            2,
            "the rate 1 is the highest that was tried (`adapt-lrs`) and 2 steps are the most that were tried (`adapt-steps`)",
        ),
    ],
)
def test_an_end_of_what_was_tried_that_is_best_is_told(lr: float, steps: int, end: str) -> None:
    assert said([RISING], lr, steps) == f"adaptation may gain beyond what was tried: {end}"


def test_what_lies_within_is_not_told() -> None:
    assert said([RISING], 0.1, 1) == ""
    assert said([FLAT], 0.1, 2) == ""  # the last step gains nothing
    assert said([RISING[:1]], 0.1, 1, lrs=[0.1]) == ""  # there was no choice
    assert said([RISING], 1.0, 2, algorithm="protonet") == ""  # it has neither rate nor steps
    assert said([[[0.1, np.nan, np.nan]] * 3], 0.1, 2) == ""


def test_the_last_step_counts_by_the_mean_over_tasks() -> None:
    falling = [[0.1, 0.9, 0.2]] * 3
    assert said([RISING, falling], 0.1, 2) == ""
    assert said([RISING, RISING, FLAT], 0.1, 2) != ""
