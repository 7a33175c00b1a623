"""What quietly does not count in a user's file is said; and numbers to predict are never clipped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quickbloom.client_app.check_data import describe
from quickbloom.common.datasets.own import Own, OwnOptions


def own(tmp_path: Path, rows: list[str], header: str = "task,x,y", **options: Any) -> Own:
    path = tmp_path / "f.csv"
    path.write_text("\n".join([header, *rows]))
    return Own(OwnOptions.model_validate({"path": str(path), **options}), Path())


def plain(count: int = 20, task: str = "A") -> list[str]:
    return [f"{task},{i}.5,{'ab'[i % 2]}" for i in range(count)]


def said(data: Own, words: str) -> str:
    (remark,) = [one for one in data.remarks if words in one]
    return remark


def test_a_file_without_faults_has_no_remark(tmp_path: Path) -> None:
    assert own(tmp_path, plain()).remarks == []


def test_rows_without_a_task_or_a_target_are_counted(tmp_path: Path) -> None:
    data = own(tmp_path, [*plain(), ",1.5,a", "NaN,2.5,b", "A,3.5,", "A,4.5,#N/A"])
    assert said(data, "name no task").startswith("2 of 24 rows of")
    assert said(data, "have no target").startswith("2 of 24 rows of")


@pytest.mark.parametrize("word", ["none", "NA", "null", "None"])
def test_a_class_that_is_called_like_a_missing_value_is_one_and_is_told(tmp_path: Path, word: str) -> None:
    rows = [f"A,{i}.5,{('mild', 'severe', word)[i % 3]}" for i in range(30)]
    data = own(tmp_path, rows)
    assert sorted(data.classes) == sorted(["mild", "severe", word])
    assert said(data, f"set `own.missing={word}`").startswith("10 rows of")
    left = own(tmp_path, rows, missing=word)
    assert left.classes == ["mild", "severe"]
    assert said(left, "have no target").startswith("10 of 30 rows")


def test_among_numbers_such_words_stay_missing(tmp_path: Path) -> None:
    data = own(tmp_path, [f"A,{i}.5,{('0', '1', 'NA')[i % 3]}" for i in range(30)])
    assert data.classes == ["0", "1"]


def test_a_class_of_which_no_row_is_left_to_test_is_told(tmp_path: Path) -> None:
    data = own(tmp_path, [*plain(40), "A,7,fraud"])
    assert "'fraud' in 1 of 1 tasks" in said(data, "too few rows for a test row")


@pytest.mark.parametrize("values", [[f"P{i:03d}" for i in range(40)], [f"visit {i} of ward" for i in range(40)]])
def test_a_column_of_which_nearly_every_value_is_another_one_is_told(tmp_path: Path, values: list[str]) -> None:
    data = own(tmp_path, [f"A,{value},{'ab'[i % 2]}" for i, value in enumerate(values)])
    assert said(data, "values of the column `x` differ").startswith("40 of 40")


def test_codes_that_begin_with_0_and_numbers_with_two_readings_are_told(tmp_path: Path) -> None:
    data = own(tmp_path, [f"A,0{i + 100},{'ab'[i % 2]}" for i in range(20)])
    assert "begin with 0, such as '0100'" in said(data, "own.categorical=x")
    data = own(tmp_path, [f'A,"{i + 1},250",{"ab"[i % 2]}' for i in range(20)])
    assert said(data, "is read as 1250")


def test_more_categories_than_the_limit_are_told(tmp_path: Path) -> None:
    data = own(tmp_path, [f"A,{'uvwz'[i % 4]},{'ab'[i // 2 % 2]}" for i in range(40)], vocabulary_limit=2)
    assert "has 4 categories, of which `own.vocabulary-limit` (2)" in said(data, "`x`")
    assert data.spec.input_shape == (4,)


def test_an_empty_column_is_told_and_harms_nothing(tmp_path: Path) -> None:
    data = own(tmp_path, [f"A,{i},{'ab'[i % 2]}," for i in range(20)], "task,x,y,nothing")
    assert said(data, "`nothing` is empty")
    assert torch.equal(data.test_draws("A")[0].test.x[:, 0], torch.zeros(len(data.rows["A"][2])))


def rain(tmp_path: Path, **options: Any) -> Own:
    """A station whose support is dry, and whose other rows are not; and one that rains everywhere."""
    wet = [f"wet,{i},{3 * i + 0.5}" for i in range(40)]
    days = {i: 400 + i for i in range(60)}
    # A row is drawn by its content, so a support part of zeros has to be looked for.
    support = _support_of_dry(tmp_path, days)
    while any(days[i] for i in support):
        days |= dict.fromkeys(support, 0)
        support = _support_of_dry(tmp_path, days)
    dry = [f"dry,{i},{rain}" for i, rain in days.items() if rain or i in support]
    return own(tmp_path, [*dry, *wet], kind="regression", shots=8, **options)


def _support_of_dry(tmp_path: Path, days: dict[int, int]) -> list[int]:
    data = own(tmp_path, [f"dry,{i},{rain}" for i, rain in days.items()], kind="regression", shots=8)
    return [int(row) for row in data.rows["dry"][0]]


def test_numbers_to_predict_are_never_clipped(tmp_path: Path) -> None:
    data = rain(tmp_path)
    test = data.test_draws("dry")[0].test
    by_hand = data.target.values[data.rows["dry"][2]]  # mean 0, and the deviation is taken for 1
    np.testing.assert_allclose(test.y[:, 0].numpy(), by_hand)
    assert by_hand.min() >= 400
    of_each = rain(tmp_path, scale="task")
    assert "(dry): their deviation is taken for `own.target-deviation` (1)" in said(of_each, "support part of 1 task")
    assert not any("their deviation is taken" in one for one in data.remarks)  # all tasks share a scale that has spread
    scaled = rain(tmp_path, target_deviation=50.0)
    assert scaled.target_deviation("dry") == 50.0
    np.testing.assert_allclose(scaled.test_draws("dry")[0].test.y[:, 0].numpy(), by_hand / 50, rtol=1e-6)


def test_a_training_task_is_scaled_by_all_examples_that_it_trains_with(tmp_path: Path) -> None:
    """Its own support may have no spread; then a query of 400 would be 400 deviations away."""
    data = rain(tmp_path)
    draw = data.train_draw("dry", np.random.default_rng(0))
    both = torch.cat([draw.support.y, draw.query.y])[:, 0].double()
    assert float(both.mean()) == pytest.approx(0, abs=1e-5)
    assert float(both.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_rows_are_shown_as_the_model_sees_them(tmp_path: Path) -> None:
    """The example of docs/own-data.md: support rows 50 M and 70 F, a test row 80 M."""
    rows, header = [f"A,{50 + i},{'MF'[i % 2]},{'ill' if i % 3 else 'well'}" for i in range(12)], "task,age,sex,y"
    data = own(tmp_path, rows, header)
    lines = [line for line in describe(str(tmp_path / "f.csv"), "task", "y", show=3) if line.startswith("row ")]
    assert len(lines) == 3
    age = np.array([50 + i for i in range(12)], dtype=float)
    support = data.rows["A"][0]
    standard = (50 - age[support].mean()) / age[support].std()
    assert f"age {standard:.4g}, sex=M 1, sex=F 0, sex: other 0, sex: missing 0" in lines[0]
    assert lines[0].endswith("target well (class 1)")
