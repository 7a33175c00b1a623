"""With a column of time a task is cut in its order: support, then query, then test, and no moment in two of them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quickbloom.client_app.check_data import describe
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.time_order import cut, first_of_each, folds
from quickbloom.common.errors import DataError


def own(tmp_path: Path, rows: list[str], header: str = "task,day,x,y", **options: Any) -> Own:
    (tmp_path / "f.csv").write_text("\n".join([header, *rows]) + "\n")
    settings = {"path": str(tmp_path / "f.csv"), "target_column": "y", "time_column": "day", **options}
    return Own(OwnOptions.model_validate(settings), Path())


def days(data: Own, task: str = "A") -> list[list[str]]:
    """The cells of `day` in each part, in its order."""
    lines = Path(data.options.path).read_text().splitlines()[1:]
    return [[lines[row].split(",")[1] for row in part] for part in data.rows[task]]


TEN = [f"A,{day},{day % 3}.5,{day * day}.5" for day in (7, 2, 9, 4, 1, 10, 3, 8, 6, 5)]


def test_rows_are_cut_in_order_of_time_wherever_they_stand_in_the_file(tmp_path: Path) -> None:
    """Ten days: 4 of support, 3 of query, 3 of test."""
    expected = [["1", "2", "3", "4"], ["5", "6", "7"], ["8", "9", "10"]]
    assert days(own(tmp_path, TEN)) == expected
    assert days(own(tmp_path, TEN[::-1])) == expected
    assert days(own(tmp_path, TEN, shots=2)) == [["1", "2"], ["3", "4", "5", "6"], ["7", "8", "9", "10"]]


@pytest.mark.parametrize(
    "cells",
    [
        ["2024-01-31", "2024-02-01", "2024-02-29", "2024-03-01", "2025-01-01"],
        ["31.1.2024", "1.2.2024", "29.2.2024", "1.3.2024", "1.1.2025"],
        ["9:30", "10:00", "10:05:10", "22:00", "11:30 pm"],
        ["9", "10", "10.5", "100", "1e3"],
    ],
)
def test_moments_are_dates_times_or_numbers_not_text(tmp_path: Path, cells: list[str]) -> None:
    """Five of each: the first 2, one or two, and the last; text would put 10 before 9."""
    data = own(tmp_path, [f"A,{cell},{i}.5,{i % 4}.25" for i, cell in reversed(list(enumerate(cells)))])
    assert list(itertools.chain(*days(data))) == cells
    assert [len(part) for part in days(data)] == [2, 2, 1]  # 40 % and 70 % of five, the second 3.5, rounded to 4


def test_rows_of_one_moment_stay_in_one_part() -> None:
    """By hand: days 1 1 1 1 2 2 3 3 3 4. Ends are possible after 4, 6 and 9 rows; 4 and 7 were asked for."""
    moments = np.array([1.0, 1, 1, 1, 2, 2, 3, 3, 3, 4])
    assert [moments[part].tolist() for part in cut(moments, 4, 7)] == [[1] * 4, [2] * 2, [3] * 3 + [4]]
    # Rows in any order; after 8 rows no moment ends, and 9 would leave the second part without one.
    assert [moments[::-1][part].tolist() for part in cut(moments[::-1], 8, 9)] == [[1] * 4 + [2] * 2, [3] * 3, [4]]
    assert cut(np.array([1.0, 1, 2]), 1, 2) == []
    assert [len(part) for part in cut(np.array([1.0, 1, 2]), 1)] == [2, 1]
    # The first end leaves a moment to each of the parts that follow.
    assert [len(part) for part in cut(np.array([1.0, 2, 3]), 3, 3)] == [1, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_no_part_comes_before_the_one_before_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    moments = rng.integers(0, 12, 40).astype(float)
    parts = [moments[part] for part in cut(moments, 16, 28)]
    assert all(first.max() < second.min() for first, second in itertools.pairwise(parts))
    assert sum(map(len, parts)) == 40
    fold, number = folds(moments, 5)
    assert 2 <= number <= 5
    assert all(moments[fold == one].min() > moments[fold < one].max() for one in range(number))
    assert {*fold} == {-1, *range(number)}


def test_folds_forward_by_hand() -> None:
    """Twelve rows in six blocks of two, the first of which is only adapted to; five rows have no three blocks of two."""
    fold, number = folds(np.arange(12.0)[::-1], 5)
    assert (number, fold[::-1].tolist()) == (5, [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert folds(np.arange(6.0), 5)[1] == 2
    for few in (np.arange(5.0), np.zeros(20), np.repeat([0.0, 1.0], 9)):
        fold, number = folds(few, 5)
        assert (number, {*fold}) == (0, {-1})


def test_shots_are_the_first_of_each_class_and_what_follows_the_last_of_them() -> None:
    """Days 0 to 9 with classes a a a b a b a b a b, two of each: a on 0 and 1, b on 3 and 5. Days 2 and 4 lie between."""
    classes = np.array([0, 0, 0, 1, 0, 1, 0, 1, 0, 1])
    support, rest = first_of_each(np.arange(10.0), classes, 2)
    assert (support.tolist(), rest.tolist()) == ([0, 1, 3, 5], [6, 7, 8, 9])
    # Another row of the last moment is no later row.
    support, rest = first_of_each(np.array([1.0, 2, 2, 3]), np.zeros(4), 2)
    assert (support.tolist(), rest.tolist()) == ([0, 1], [3])


def test_shots_per_class_in_a_file(tmp_path: Path) -> None:
    rows = [f"A,{day},{day}.5,{'aaababababab'[day]}" for day in range(12)]
    data = own(tmp_path, rows, shots=2)
    assert days(data) == [["0", "1", "3", "5"], ["6", "7", "8"], ["9", "10", "11"]]
    (remark,) = [one for one in data.remarks if "own.shots" in one]
    assert remark.startswith("2 of 12 rows of")
    lacking = own(tmp_path, [*rows, *(f"B,{day},{day}.5,a" for day in range(12))], shots=2)
    assert lacking.left_out["B"] == "it has examples of 1 of 2 classes, `own.shots` needs 2 + 2 of each"
    few = own(tmp_path, [*rows, *(f"B,{day},{day}.5,{'aaaaaaabbb'[day]}" for day in range(10))], shots=2)
    assert few.left_out["B"] == "it has 3 rows of a class, `own.shots` needs 2 for support and others to test"


def test_rows_without_a_moment_are_left_out_and_said_and_words_are_refused(tmp_path: Path) -> None:
    data = own(tmp_path, [*TEN, "A,,1.5,2.5", "A,NA,1.5,3.5", "A,,1.5,"])
    assert days(data) == [["1", "2", "3", "4"], ["5", "6", "7"], ["8", "9", "10"]]
    (remark,) = [one for one in data.remarks if "have no moment" in one]
    assert remark.startswith("2 of 13 rows of")
    with pytest.raises(DataError, match=r"`day` holds numbers, but row 11 .* the text 'soon'"):
        own(tmp_path, [*TEN, "A,soon,1.5,2.5"])
    with pytest.raises(DataError, match="`--time` must name a column of numbers, dates or times"):
        own(tmp_path, [f"A,{('first', 'then', 'last')[i % 3]} {i},1.5,{i}.5" for i in range(10)])
    with pytest.raises(DataError, match="`--time` and `--target` must be two columns"):
        own(tmp_path, TEN, time_column="y")
    with pytest.raises(DataError, match="no column `when`"):
        own(tmp_path, TEN, time_column="when")
    with pytest.raises(DataError, match="infinite"):
        own(tmp_path, [*TEN, "A,inf,1.5,2.5"], features="x")


def test_a_task_of_too_few_moments_is_left_out(tmp_path: Path) -> None:
    data = own(tmp_path, [*TEN, *(f"B,{i % 2},{i}.5,{i}.5" for i in range(10))])
    assert data.left_out["B"].startswith("it has 10 rows of 2 moments in `day`, too few")
    assert list(data.rows) == ["A"]


def test_published_test_rows_come_last_or_the_task_is_left_out(tmp_path: Path) -> None:
    """Ten rows, of which the days 9 and 10 are test rows: of eight others 3 (40 %) are support, the rest is query."""

    def said(last: set[int], day: int) -> str:
        return "test" if day in last else "train"

    rows = [f"A,{day},{day % 3}.5,{day}.5,{said({9, 10}, day)}" for day in (7, 2, 9, 4, 1, 10, 3, 8, 6, 5)]
    wrong = [f"B,{day},{day % 3}.5,{day}.5,{said({5, 10}, day)}" for day in range(1, 11)]
    data = own(tmp_path, [*rows, *wrong], "task,day,x,y,split", split_column="split")
    assert days(data) == [["1", "2", "3"], ["4", "5", "6", "7", "8"], ["9", "10"]]
    assert data.left_out["B"] == "`split` calls rows test that do not come after all others in `day`"
    shots = own(tmp_path, rows, "task,day,x,y,split", split_column="split", shots=2)
    assert days(shots) == [["1", "2"], ["3", "4", "5", "6", "7", "8"], ["9", "10"]]


@pytest.mark.parametrize("target", ["{0}.25", "{1}"])
def test_no_draw_of_training_turns_time_round(tmp_path: Path, target: str) -> None:
    """The column stays an input, so each draw shows its own days: standardised by the support's, 1 to 4."""
    rows = [f"A,{day},{target.format(day, 'ab'[day % 2])}" for day in range(1, 11)]
    data = own(tmp_path, rows, "task,day,y")
    rng = np.random.default_rng(0)
    for _ in range(5):
        draw = data.train_draw("A", rng)
        support, query, test = ((part.x[:, 0].numpy() * np.sqrt(1.25) + 2.5).round(3).tolist() for part in draw_parts(draw))
        assert (support, query, test) == ([1, 2, 3, 4], [5, 6, 7], [8, 9, 10])
    assert own(tmp_path, [f"{row},1.5" for row in rows], "task,day,y,x", features="x").spec.input_shape == (1,)


def draw_parts(draw: Any) -> tuple[Any, Any, Any]:
    return draw.support, draw.query, draw.test


def test_a_training_target_has_the_mean_of_its_support_as_in_a_test(tmp_path: Path) -> None:
    """Targets 1 to 10 in order: the support's mean is 2.5, around which the training rows 1 to 7 are scaled.

    Mean square distance of 1..7 from 2.5: (2.25 + .25 + .25 + 2.25 + 6.25 + 12.25 + 20.25) / 7 = 6.25, so the unit is 2.5.
    """
    data = own(tmp_path, [f"A,{day},{day % 3}.5,{day}" for day in range(1, 11)], kind="regression")
    draw = data.train_draw("A", np.random.default_rng(0))
    assert torch.allclose(draw.support.y[:, 0], torch.tensor([-0.6, -0.2, 0.2, 0.6]))
    assert torch.allclose(draw.query.y[:, 0], torch.tensor([1.0, 1.4, 1.8]))
    # In a test the unit is the support's alone, sqrt(1.25).
    scored = data.test_draws("A")[0].test.y[:, 0].double().numpy()
    np.testing.assert_allclose(scored, np.array([5.5, 6.5, 7.5]) / np.sqrt(1.25), rtol=1e-6)


def test_check_data_shows_rows_in_the_part_that_time_puts_them(tmp_path: Path) -> None:
    own(tmp_path, TEN)
    lines = [line for line in describe(str(tmp_path / "f.csv"), "task", "y", time="day", show=10) if line.startswith("row ")]
    parts = dict(zip((7, 2, 9, 4, 1, 10, 3, 8, 6, 5), (line.split()[4].strip(";") for line in lines), strict=True))
    assert [parts[day] for day in range(1, 11)] == ["support"] * 4 + ["query"] * 3 + ["test"] * 3
    day, _ = lines[0].split("; ")[1].split(", ")
    assert day == f"day {4.5 / np.sqrt(1.25):.4g}"  # the value belongs to its own row: day 7, of mean 2.5


def test_a_class_that_only_the_past_holds_is_remarked_on(tmp_path: Path) -> None:
    data = own(tmp_path, [f"A,{day},{day}.5,{'aabababbbb'[day - 1]}" for day in range(1, 11)])
    (remark,) = [one for one in data.remarks if "test part" in one]
    assert remark.startswith("classes without a row in the test part, the last in `day`: 'a' in 1 of 1 tasks")
