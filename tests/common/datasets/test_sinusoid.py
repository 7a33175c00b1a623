"""Sine waves: amplitude and phase can be found back from what is drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quickbloom.common.datasets.sinusoid import Sinusoid, SinusoidOptions
from quickbloom.common.maths.batch import Batch


def build(**options: object) -> Sinusoid:
    return Sinusoid(SinusoidOptions.model_validate({name.replace("_", "-"): value for name, value in options.items()}), Path())


def fit(batch: Batch) -> tuple[float, float]:
    """Amplitude and phase by least squares: A sin(x - p) = (A cos p) sin x - (A sin p) cos x, linear in both brackets."""
    x, y = batch.x.double().numpy().ravel(), batch.y.double().numpy().ravel()
    (a, b), *_ = np.linalg.lstsq(np.stack([np.sin(x), -np.cos(x)], axis=1), y, rcond=None)
    return float(np.hypot(a, b)), float(np.arctan2(b, a))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 199), st.integers(0, 1000))
def test_every_part_lies_on_the_wave_of_its_task(index: int, seed: int) -> None:
    dataset = build()
    task_id = f"client-{index:03d}"
    draw = dataset.train_draw(task_id, np.random.default_rng(seed))
    for part in (draw.support, draw.query, draw.test, dataset.test_draws(task_id)[0].test):
        assert fit(part) == pytest.approx(tuple(dataset.wave(task_id)), abs=1e-3)


def test_waves_and_points_fill_the_ranges_of_the_paper() -> None:
    dataset = build(clients=2000)
    amplitude, phase = np.array([dataset.wave(task.task_id) for task in dataset.tasks()]).T
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, np.pi)):
        assert low <= values.min() < low + 0.05
        assert high - 0.05 < values.max() <= high
    x = build(test_points=5000).test_draws("client-000")[0].test.x
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5


def test_fresh_tasks_draw_a_new_wave_every_round_but_keep_the_tests() -> None:
    fixed, fresh = build(), build(fresh_tasks=True)
    rounds = [fit(fresh.train_draw("client-000", np.random.default_rng(seed)).support) for seed in range(3)]
    assert len({round(amplitude, 3) for amplitude, _ in rounds}) == 3
    assert torch.equal(fresh.test_draws("client-000")[0].test.y, fixed.test_draws("client-000")[0].test.y)


def test_sizes_follow_the_options() -> None:
    draw = build(shots=3, query_shots=4, test_points=5).test_draws("client-000")[0]
    assert [len(part.x) for part in (draw.support, draw.query, draw.test)] == [3, 4, 5]


@pytest.mark.parametrize("option", ["clients", "shots", "query_shots", "test_points"])
def test_zero_is_refused(option: str) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        build(**{option: 0})
