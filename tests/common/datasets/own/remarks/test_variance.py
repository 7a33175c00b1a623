"""Where the variance of a target lies, against tables worked by hand and against generated ones whose components are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quickbloom.client_app.check_data import describe
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.remarks.grouped import Grouped
from quickbloom.common.datasets.own.remarks.order import in_words
from quickbloom.common.datasets.own.remarks.variance import Components, components, explained_in_order


def own(tmp_path: Path, columns: dict[str, Any], **options: Any) -> Own:
    np.savez(tmp_path / "f.npz", **columns)
    return Own(
        OwnOptions.model_validate({"path": str(tmp_path / "f.npz"), "target_column": "y", **options}), Path(), whole=True
    )


def found(data: Own) -> Components:
    result = components(data, Grouped.of(data))
    assert result is not None
    return result


def test_components_of_numbers_by_hand(tmp_path: Path) -> None:
    """Tasks A: 1, 3; B: 5, 7, 9; C: 2. Means 2, 7, 2; of all six rows 27 / 6 = 4.5.

    Squares within: 1 + 1 + 4 + 0 + 4 + 0 = 10, by 6 - 3: MSW = 10 / 3. Between: (2 + 3 + 1) * 2.5^2 = 37.5, by 2: 18.75.
    n_0 = (6 - (4 + 9 + 1) / 6) / 2 = 11 / 6, so the component between is (18.75 - 10 / 3) * 6 / 11 = 8.409.
    """
    data = own(tmp_path, {"task": list("ABABCB"), "x": np.zeros(6), "y": [1.0, 5, 3, 7, 2, 9]}, kind="regression")
    assert found(data).within == pytest.approx(10 / 3)
    assert found(data).between == pytest.approx((18.75 - 10 / 3) * 6 / 11)


def test_components_of_classes_by_hand(tmp_path: Path) -> None:
    """Task A: u u v v, B: u u u w. Gini sums n (1 - sum p^2): within 4 (1 - 1/2) + 4 (1 - 10/16) = 3.5, by 8 - 2.

    Of all rows 8 (1 - (25 + 4 + 1) / 64) = 4.25, so between 0.75, by 1; n_0 = 4: (0.75 - 3.5 / 6) / 4.
    """
    data = own(tmp_path, {"task": list("AAAABBBB"), "x": np.zeros(8), "y": list("uuvvuuuw")})
    assert found(data).within == pytest.approx(3.5 / 6)
    assert found(data).between == pytest.approx((0.75 - 3.5 / 6) / 4)


def test_a_negative_estimate_is_told_as_zero_and_nothing_to_tell_is_no_sentence(tmp_path: Path) -> None:
    alike = own(tmp_path, {"task": list("AABB"), "x": np.zeros(4), "y": [1.0, 2, 1, 2]}, kind="regression")
    assert found(alike).between == 0
    assert list(in_words(alike)) == ["0 % of the variance of `y` lies between the 2 tasks, 100 % within"]
    for y in ([1.5, 1.5, 1.5], [1.5, 2.5, 3.5]):
        data = own(tmp_path, {"task": list("ABC"), "x": np.zeros(3), "y": y}, kind="regression")
        assert list(in_words(data)) == []


@pytest.mark.parametrize("seed", range(3))
def test_known_components_are_found(tmp_path: Path, seed: int) -> None:
    """Between tasks 4; within them 0.9 in a curve over time and 0.3 of noise, so 75 % is in order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 60, size=1000)
    task = np.repeat(np.arange(1000), sizes)
    when = rng.uniform(size=len(task)).round(3)  # some rows are of one moment
    curve = np.sqrt(1.8) * np.sin(2 * np.pi * (when + rng.uniform(size=1000)[task]))
    y = rng.normal(0, 2, size=1000)[task] + curve + rng.normal(0, np.sqrt(0.3), size=len(task))
    data = own(tmp_path, {"task": task, "time": when, "y": y})
    assert found(data).between == pytest.approx(4, rel=0.15)
    assert found(data).within == pytest.approx(1.2, rel=0.02)
    share = explained_in_order(data, Grouped.of(data), when[Grouped.of(data).rows], found(data).within)
    assert share == pytest.approx(0.75, abs=0.02)
    (said,) = in_words(data)
    assert said.endswith(" % is explained by interpolating the neighbours in `time`")


def test_noise_is_not_explained_and_a_line_is_whatever_its_steps(tmp_path: Path) -> None:
    """Without the factor 1 + a^2 + b^2 noise would seem worse than not explained, and half of it in order less than half."""
    rng = np.random.default_rng(0)
    task, when = np.repeat(np.arange(40), 50), rng.uniform(size=2000) ** 3
    noise = rng.normal(size=2000)
    for y, share, room in (
        (noise, 0.0, 0.05),
        (3 * when, 1.0, 1e-9),
        (noise + np.sqrt(12) * when_ranks(task, when), 0.5, 0.05),
    ):
        data = own(tmp_path, {"task": task, "time": when, "y": y})
        grouped = Grouped.of(data)
        assert explained_in_order(data, grouped, when[grouped.rows], found(data).within) == pytest.approx(share, abs=room)


def when_ranks(task: np.ndarray[Any, Any], when: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rank of each moment in its task, in 0..1: its variance is 1 / 12."""
    rank = np.empty(len(when))
    for one in np.unique(task):
        at = np.flatnonzero(task == one)
        rank[at[np.argsort(when[at])]] = np.linspace(0, 1, len(at))
    return rank


def test_classes_that_last_are_in_order(tmp_path: Path) -> None:
    """One task of 60 rows that is ill, well and ill for twenty days each: only the days 20, 21, 40, 41 differ from a neighbour.

    Their interpolations are half wrong for both classes, 2 * 0.25 / 1.5, of 58 rows; the Gini within is 60 (1 - 5/9) / 59.
    """
    day = np.arange(60)
    data = own(tmp_path, {"task": np.zeros(60), "day": day, "y": np.where((day < 20) | (day >= 40), "ill", "well")})
    grouped = Grouped.of(data)
    share = explained_in_order(data, grouped, day[grouped.rows].astype(float), found(data).within)
    assert share == pytest.approx(1 - 4 * (0.5 / 1.5) / 58 / (60 * (4 / 9) / 59))
    (said,) = in_words(data)
    assert said == "of the variance (Gini) of `y` 95 % is explained by interpolating the neighbours in `day`"


def test_check_data_says_it_with_the_column_of_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(30), 30)
    when = rng.permutation(900)
    y = 10 * (task % 3) + 0.01 * when + rng.normal(size=900)
    np.savez(tmp_path / "f.npz", task=task, code=when, y=y)
    lines = list(describe(str(tmp_path / "f.npz"), "task", "y", time="code"))
    (said,) = [line for line in lines if "variance" in line]
    assert "lies between the 30 tasks" in said
    assert said.endswith(" % is explained by interpolating the neighbours in `code`")
    (unnamed,) = [line for line in describe(str(tmp_path / "f.npz"), "task", "y") if "variance" in line]
    assert unnamed == said.partition(";")[0]  # a column of this name, in any order, does not look like time
