"""Means and deviations of columns over nodes: NumPy's of all rows in one place."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.scales import (
    NOTHING_KNOWN,
    TARGET,
    Moments,
    joined,
    scales_from_json,
    scales_of,
    scales_to_json,
)

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize(("level", "spread"), [(0.0, 1.0), (1.7e9, 3.0), (-1e30, 1e26), (1e-12, 1e-13)])
@given(st.integers(0, 10**6), st.lists(st.integers(0, 30), min_size=1, max_size=9))
def test_joined_moments_are_those_of_all_numbers_together(level: float, spread: float, seed: int, sizes: list[int]) -> None:
    """Also for seconds since 1970, whose squares have no digits left for a deviation of three."""
    rng = np.random.default_rng(seed)
    parts = [level + spread * rng.normal(size=size) for size in sizes]
    together = np.concatenate(parts)
    found = joined([Moments.of(part) for part in parts])
    assert found.count == len(together)
    if not len(together):
        assert found == Moments()
        return
    exact = math.fsum(together) / len(together)
    assert found.mean == pytest.approx(exact, rel=1e-12)
    if len(together) > 1:
        # By numbers that are exact: differences from the level are small, and NumPy loses nothing on them.
        shifted = together - level
        assert math.sqrt(found.squares / found.count) == pytest.approx(shifted.std(), rel=1e-12 * max(1, abs(level) / spread))


def test_timestamps_keep_twelve_digits() -> None:
    seconds = 1.7e9 + np.arange(1000) * 0.5
    found = joined([Moments.of(part) for part in np.array_split(seconds, 7)])
    mean, deviation = found.scale()
    assert mean == pytest.approx(1.7e9 + 249.75, rel=1e-15)
    # The deviation of 0..n-1 is the root of (n^2 - 1) / 12.
    assert deviation == pytest.approx(0.5 * math.sqrt((1000**2 - 1) / 12), rel=1e-12)


def test_missing_numbers_do_not_count() -> None:
    assert Moments.of(np.array([np.nan, 1.0, np.nan, 3.0])) == Moments(2, 2.0, 2.0)
    assert Moments.of(np.array([np.nan, np.nan])) == Moments()
    assert joined([Moments(), Moments(2, 2.0, 2.0), Moments()]) == Moments(2, 2.0, 2.0)
    assert joined([]) == Moments()


def test_what_has_no_number_becomes_nothing_and_what_has_no_spread_is_shifted() -> None:
    assert Moments().scale() == [0.0, NOTHING_KNOWN]
    assert Moments.of(np.array([5.0, 5.0])).scale() == [5.0, 1.0]
    assert Moments.of(np.array([5.0, 5.0])).scale(without_spread=3.0) == [5.0, 3.0]
    assert Moments.of(0.1 + np.array([0.0, 1e-17, 2e-17])).scale()[1] == 1.0  # rounding alone
    mean, deviation = Moments.of(np.array([1.0, 1.0 + 1e-6])).scale()
    assert deviation == pytest.approx(5e-7)
    assert mean == pytest.approx(1.0)


def test_a_column_of_some_nodes_has_the_scale_of_those_and_the_target_its_own() -> None:
    nodes = [{"a": Moments.of(np.array([1.0, 3.0])), TARGET: Moments.of(np.array([4.0, 4.0]))}, {"b": Moments()}]
    columns, target = scales_of(nodes, 2.5)
    assert columns == {"a": [2.0, 1.0], "b": [0.0, NOTHING_KNOWN]}
    assert target == [4.0, 2.5]
    assert scales_of([{"a": Moments()}], 2.5)[1] == []


def test_scales_are_written_and_read() -> None:
    columns, target = {"b": [0.1, 1e-300], "a": [1 / 3, 2.0]}, [5.0, 0.25]
    assert scales_from_json(scales_to_json(columns, target)) == (columns, target)
    for wrong in ("", "3", "[1]", "[[], 3]", "{}", '[{"a": 1}]'):
        with pytest.raises((ValueError, TypeError)):
            scales_from_json(wrong)


def table(path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = ["user,age,seen,empty,same,colour,y"]
    for user in "ABCD":
        for i in range(30):
            age = "" if i % 7 == 0 else f"{rng.normal(50, 9):.1f}"
            rows.append(f"{user},{age},2024-{1 + i % 12:02d}-03,,4,{'rg'[i % 2]},{rng.normal(ord(user), 2):.3f}")
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_node_tells_of_support_and_query_rows_of_the_tasks_asked_for_alone(tmp_path: Path) -> None:
    own = Own(OwnOptions(path=str(table(tmp_path / "t.csv")), task_column="user", target_column="y"), Path())
    found = own.column_moments(["A", "C"])
    assert found.keys() == {"age", "seen", "empty", "same", TARGET}
    lines = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()[1:]]
    kept = [lines[row] for task in "AC" for part in own.rows[task][:2] for row in part]
    assert len(kept) == 42
    ages = np.array([float(cells[1]) for cells in kept if cells[1]])
    targets = np.array([float(cells[6]) for cells in kept])
    for column, by_hand in (("age", ages), (TARGET, targets)):
        assert found[column].count == len(by_hand)
        assert found[column].mean == pytest.approx(by_hand.mean(), rel=1e-12)
        assert found[column].squares == pytest.approx(len(by_hand) * by_hand.var(), rel=1e-12)
    assert (found["empty"], found["same"]) == (Moments(), Moments(42, 4.0, 0.0))
    assert own.class_counts(["A", "C"]) == []


def test_on_scales_every_part_is_standardised_by_them_and_the_data_are_not_changed(tmp_path: Path) -> None:
    own = Own(OwnOptions(path=str(table(tmp_path / "t.csv")), task_column="user", target_column="y"), Path())
    before = own.test_draws("B")[0].test.x.clone()
    scales = {"age": [50.0, 4.0], "seen": [19800.0, 100.0], "empty": [0.0, NOTHING_KNOWN], "same": [4.0, 1.0]}
    scaled = own.on_scales(scales, [66.0, 5.0])
    draw = scaled.test_draws("B")[0]
    lines = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()[1:]]
    place = list(scaled.inputs).index("age")
    for part, rows in zip((draw.support, draw.query, draw.test), scaled.rows["B"], strict=True):
        ages = [(float(lines[row][1]) - 50) / 4 if lines[row][1] else 0.0 for row in rows]
        np.testing.assert_allclose(part.x[:, place].numpy(), np.clip(ages, -10, 10), rtol=1e-6, atol=1e-6)
        targets = [(float(lines[row][6]) - 66) / 5 for row in rows]
        np.testing.assert_allclose(part.y[:, 0].numpy(), targets, rtol=1e-5, atol=1e-6)
    assert scaled.target_deviation("B") == scaled.target_deviation("A") == 5.0
    assert (own.test_draws("B")[0].test.x == before).all()
    assert json.loads(scaled.spec.schema)["scales"] == scales
    for wrong in ({"age": [1.0]}, {"age": [0.0, 0.0]}, {"age": [0.0, -1.0]}, {"age": ["a", 1.0]}, {"age": [float("nan"), 1.0]}):
        with pytest.raises((TypeError, ValueError)):
            own.on_scales(wrong, [])  # type: ignore[arg-type]
