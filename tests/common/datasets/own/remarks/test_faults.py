"""Faults that were put into tables are found and named; tables without them, public and generated ones, have no such remark."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.errors import DataError

Columns = dict[str, Any]
FAULTS = ("neighbours in", "correlation of", "as ids do", "is empty in", "without any overlap", "are copies", "nearly copies")


def own(folder: Path, columns: Columns, **options: Any) -> Own:
    np.savez(folder / "f.npz", **columns)
    return Own(OwnOptions.model_validate({"path": str(folder / "f.npz"), "target_column": "y", **options}), Path())


def faults(data: Own) -> list[str]:
    return [remark for remark in data.remarks if any(words in remark for words in FAULTS)]


def wards(tasks: int = 4, rows: int = 60, seed: int = 0) -> Columns:
    """A sound table: people of 20 to 90 years, a temperature in Celsius, a laboratory value, and a number to predict."""
    rng = np.random.default_rng(seed)
    n = tasks * rows
    age, lab = rng.integers(20, 90, size=n).astype(float), np.exp(rng.normal(0.3, 0.4, size=n))
    y = 0.05 * age + lab + rng.normal(size=tasks).repeat(rows) + rng.normal(size=n)
    return {
        "task": np.repeat([f"ward-{i}" for i in range(tasks)], rows),
        "age": age,
        "degrees": rng.normal(37, 0.5, size=n).round(1),
        "lab": lab,
        "sex": rng.choice(["f", "m"], size=n),
        "y": y,
    }


def changed(columns: Columns, name: str, where: Any, change: Any) -> Columns:
    """The table with a column changed in some rows."""
    column = columns[name].copy()
    column[where] = change(column[where])
    return {**columns, name: column}


@pytest.mark.parametrize("tasks", [1, 2, 4, 30])
@pytest.mark.parametrize("seed", range(3))
def test_a_sound_table_has_no_remark(tmp_path: Path, tasks: int, seed: int) -> None:
    assert own(tmp_path, wards(tasks, seed=seed)).remarks == []


# ---- order


def series(tasks: int = 10, rows: int = 40) -> Columns:
    """People who were measured in a few visits: between these a target is interpolated, as in some public tables."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(tasks), rows)
    when = rng.uniform(0, 180, size=tasks * rows)
    visits = rng.normal(20, 5, size=(tasks, 4))
    y = np.concatenate([np.interp(when[task == one], [0, 60, 120, 180], visits[one]) for one in range(tasks)])
    return {"task": task, "voice": rng.normal(size=len(y)), "test_time": when, "y": y}


def test_a_target_that_neighbours_in_time_give_away(tmp_path: Path) -> None:
    (remark,) = faults(own(tmp_path, series()))
    assert "neighbours in `test_time`" in remark
    assert "`--time test_time`" in remark
    assert faults(own(tmp_path, series(), time_column="test_time")) == []
    noisy = {**series(), "y": series()["y"] + np.random.default_rng(1).normal(0, 5, size=400)}
    assert faults(own(tmp_path, noisy)) == []


def test_an_input_with_a_smooth_effect_is_no_time_unless_the_file_is_in_its_order(tmp_path: Path) -> None:
    columns = {{"test_time": "depth"}.get(name, name): column for name, column in series().items()}
    assert faults(own(tmp_path, columns)) == []
    order = np.lexsort((columns["depth"], columns["task"]))
    (remark,) = faults(own(tmp_path, {name: column[order] for name, column in columns.items()}))
    assert "neighbours in `depth`" in remark


# ---- leaks and ids


def test_a_column_that_says_the_target_in_other_words(tmp_path: Path) -> None:
    columns = wards()
    rng = np.random.default_rng(1)
    near = columns["y"] + rng.normal(0, 0.3 * columns["y"].std(), size=240)  # correlation 1 / sqrt(1.09) = 0.958
    far = columns["y"] + rng.normal(0, 0.6 * columns["y"].std(), size=240)  # 1 / sqrt(1.36) = 0.857
    (remark,) = faults(own(tmp_path, {**columns, "total": near, "related": far}))
    assert f"`total` has a correlation of {np.corrcoef(near, columns['y'])[0, 1]:.2f} with the target" in remark
    within = columns["y"] + 100 * np.repeat(np.arange(4), 60)  # between wards it says something else
    (remark,) = faults(own(tmp_path, {**columns, "total": within}))
    assert "correlation of 1.00 with the target within tasks" in remark
    gaps = np.where(np.arange(240) % 3 == 0, np.nan, near)
    (remark,) = faults(own(tmp_path, {**columns, "total": gaps}))
    known = ~np.isnan(gaps)
    assert f"of {np.corrcoef(near[known], columns['y'][known])[0, 1]:.2f} with" in remark


def test_a_column_that_codes_the_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    label = rng.integers(0, 3, size=240)
    columns = {**wards(), "y": np.array(["low", "middle", "high"])[label]}
    code = np.array([2.0, 1.0, 3.0])[label]
    (remark,) = faults(own(tmp_path, {**columns, "stage": code}))
    assert remark.startswith("the column `stage` has a correlation of 1.00 with the target")
    assert faults(own(tmp_path, {**columns, "stage": code + rng.normal(0, 1, size=240)})) == []


@pytest.mark.parametrize("number", [2, 15])
def test_many_classes_are_no_correlation_by_chance(tmp_path: Path, number: int) -> None:
    """60 cells of four rows each: without a correction a column of noise would lie at about sqrt(60 / 240) = 0.5."""
    columns = {**wards(), "y": np.array([f"c{i % number:02d}" for i in range(240)])}
    assert faults(own(tmp_path, columns)) == []


def test_numbers_that_are_all_different_are_ids(tmp_path: Path) -> None:
    columns = wards()
    rng = np.random.default_rng(0)
    (remark,) = faults(own(tmp_path, {**columns, "row": rng.permutation(240) + 1000}))
    assert remark.startswith("all 240 values of the whole-number column `row` differ, as ids do")
    wide = rng.choice(10**9, size=240, replace=False)  # all different by chance
    assert faults(own(tmp_path, {**columns, "inhabitants": wide})) == []
    (remark,) = faults(own(tmp_path, {**columns, "patientId": wide}))
    assert "`patientId`" in remark
    assert faults(own(tmp_path, {**columns, "day": rng.permutation(240)})) == []


# ---- units


def test_a_column_that_is_empty_in_some_tasks(tmp_path: Path) -> None:
    columns = wards()
    there = np.isin(columns["task"], ["ward-1", "ward-3"])
    (remark,) = faults(own(tmp_path, changed(columns, "lab", there, lambda cells: cells * np.nan)))
    assert remark.startswith("the column `lab` is empty in 2 of 4 tasks (ward-1, ward-3) and not in the others")
    (remark,) = faults(own(tmp_path, changed(columns, "sex", there, lambda cells: np.full(len(cells), ""))))
    assert "`sex` is empty in 2 of 4 tasks" in remark
    everywhere = np.random.default_rng(0).uniform(size=600) < 0.6  # of 200 people with 3 rows about 43 have no value
    few = {"task": np.arange(600) // 3, "x": np.where(everywhere, np.nan, 1.5 + np.arange(600) % 7), "y": np.arange(600) / 7.0}
    assert not [remark for remark in faults(own(tmp_path, few)) if "is empty in" in remark]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("age", lambda age: age * 12, "about 12"),
        ("lab", lambda lab: lab * 88.42, "88.42 would be as µmol/l are to mg/dl of creatinine"),
        ("lab", lambda lab: lab / 38.67, "about 1/"),
        ("lab", lambda lab: lab * 1000, "(1000?)"),
        ("degrees", lambda degrees: degrees * 1.8 + 32, "as degrees Fahrenheit are to Celsius"),
        ("height", lambda height: height / 2.54, "2.54 would be as centimetres are to inches"),
        ("height", lambda height: height * 7, "about 6.9"),
    ],
)
def test_a_unit_that_moved_is_named_with_task_column_and_factor(tmp_path: Path, name: str, change: Any, words: str) -> None:
    columns = {**wards(5), "height": np.random.default_rng(2).normal(170, 9, size=300)}
    # Nobody is a child, so that no age in months is one in years.
    columns["age"] = np.maximum(columns["age"], 25)
    told = faults(own(tmp_path, changed(columns, name, columns["task"] == "ward-2", change)))
    assert len(told) == 1, told
    assert told[0].startswith(f"the column `{name}` of ward-2 is ")
    assert words in told[0]
    both = faults(own(tmp_path, changed(columns, name, np.isin(columns["task"], ["ward-2", "ward-4"]), change)))
    assert len(both) == 1
    assert both[0].startswith(f"the column `{name}` of ward-2, ward-4 is ")


@pytest.mark.parametrize(("tasks", "factor", "told"), [(2, 12, True), (3, 88.42, True), (3, 7, False), (2, 2.54, False)])
def test_of_two_or_three_tasks_a_unit_shows_by_a_known_large_factor_alone(
    tmp_path: Path, tasks: int, factor: float, told: bool
) -> None:
    columns = {**wards(tasks), "height": np.random.default_rng(2).normal(170, 9, size=tasks * 60)}
    found = faults(own(tmp_path, changed(columns, "height", columns["task"] == "ward-1", lambda height: height * factor)))
    assert [remark.startswith("the column `height` of ward-1 is about") for remark in found] == [True] * told


@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("tasks", [3, 4, 10, 40])
def test_means_that_differ_by_factors_are_hardly_ever_taken_for_units(tmp_path: Path, tasks: int, spread: float) -> None:
    """A hundred tables of places whose means differ by factors of e^0.3 or e, within which people differ by 20 %."""
    rng = np.random.default_rng(0)
    columns: Columns = {f"c{i}": np.exp(rng.normal(0, spread, size=tasks)).repeat(30) for i in range(100)}
    columns = {name: column * np.exp(0.2 * rng.normal(size=len(column))) for name, column in columns.items()}
    columns |= {"task": np.arange(tasks).repeat(30), "y": rng.normal(size=tasks * 30)}
    assert len([remark for remark in faults(own(tmp_path, columns)) if "without any overlap" in remark]) <= 5


@pytest.mark.parametrize("seed", range(5))
def test_people_and_places_that_differ_are_no_units(tmp_path: Path, seed: int) -> None:
    """Means of users that differ by large factors, and places of which one is simply warmer, or larger."""
    rng = np.random.default_rng(seed)
    user = rng.normal(size=40).repeat(20)
    incomes = {
        "task": np.arange(800) // 20,
        "income": np.exp(8 + 1.2 * user + 0.3 * rng.normal(size=800)),
        "y": rng.normal(size=800),
    }
    counts = {**incomes, "income": rng.poisson(np.exp(2 + user)).astype(float)}
    warmer = changed(wards(5), "degrees", np.arange(300) < 60, lambda degrees: degrees * 2)  # no known factor, below 5
    older = changed(wards(5), "age", np.arange(300) < 60, lambda age: age / 10 + 600)  # another mean, and no wider spread
    for columns in (incomes, counts, warmer, older):
        assert not [remark for remark in faults(own(tmp_path, columns)) if "without any overlap" in remark]


# ---- copies


def test_rows_that_two_tasks_share(tmp_path: Path) -> None:
    columns = wards()
    taken = {name: column.copy() for name, column in columns.items()}
    for name in columns:
        if name != "task":
            taken[name][60:72] = columns[name][:12]
    (remark,) = faults(own(tmp_path, taken))
    assert remark.startswith("24 of 240 rows are copies of a row of another task")
    answers = {"task": columns["task"], "q1": np.arange(240) % 3, "q2": np.arange(240) // 5 % 2, "y": np.arange(240) // 7 % 2}
    assert faults(own(tmp_path, answers)) == []  # a few categories are equal by chance


def test_test_rows_that_repeat_a_support_row(tmp_path: Path) -> None:
    """A file that says itself what is test, where the test rows are copies; and measurements that were repeated at once."""
    columns = wards()
    half = {name: np.concatenate([column[:120], column[:120]]) for name, column in columns.items()}
    split = np.repeat(["train", "test"], 120)
    (remark,) = faults(own(tmp_path, {**half, "split": split}, split_column="split"))
    assert remark.endswith("else a score says how well rows are remembered")
    rng = np.random.default_rng(0)
    again = {name: column.repeat(2) for name, column in columns.items()}
    for name in ("lab", "y"):
        again[name] = again[name] * (1 + 1e-5 * rng.normal(size=480))
    (remark,) = faults(own(tmp_path, again))
    assert "are nearly copies of a support row" in remark


# ---- no false alarms


@pytest.mark.parametrize("table", ["wine", "breast_cancer", "diabetes"])
def test_public_tables_cut_by_their_columns_have_no_such_remark(tmp_path: Path, table: str) -> None:
    loaded = getattr(pytest.importorskip("sklearn.datasets"), f"load_{table}")()
    names = [str(name).replace("/", " ") for name in loaded.feature_names]
    for at in range(0, len(names), 3):
        columns = {name: loaded.data[:, i] for i, name in enumerate(names) if i != at}
        quarters = np.quantile(loaded.data[:, at], [0.25, 0.5, 0.75])
        columns |= {"task": np.searchsorted(quarters, loaded.data[:, at]), "y": loaded.target}
        try:
            data = own(tmp_path, columns)
        except DataError:  # a class that no row of any quarter has enough of
            continue
        assert faults(data) == []


@pytest.mark.parametrize("seed", range(3))
def test_generated_users_have_no_such_remark(tmp_path: Path, seed: int) -> None:
    """Intercepts, slopes, vocabularies and drift of users, and waves: all smooth, and none a fault."""
    rng = np.random.default_rng(seed)
    task = np.arange(60).repeat(20)
    x, of_user = rng.normal(size=(1200, 2)), rng.normal(size=60)[task]
    drift = np.tile(np.arange(20), 60)
    wave = rng.uniform(-5, 5, size=1200)
    words = rng.choice(["a", "b", "c", "d"], size=1200)
    targets: dict[str, tuple[Any, Columns]] = {
        "intercepts": (of_user + x[:, 0] + rng.normal(size=1200), {"x0": x[:, 0], "x1": x[:, 1]}),
        "slopes": (x[:, 0] * (1 + of_user) + 0.5 * rng.normal(size=1200), {"x0": x[:, 0], "x1": x[:, 1]}),
        "drift": (0.05 * drift * of_user + x[:, 0] + rng.normal(size=1200), {"day": drift, "x0": x[:, 0]}),
        "waves": (np.exp(0.3 * of_user) * np.sin(wave - of_user), {"x": wave}),
        "words": (of_user * (words == "a") + rng.normal(size=1200), {"word": words, "x0": x[:, 0].round(1)}),
    }
    for y, columns in targets.values():
        assert faults(own(tmp_path, {"task": task, **columns, "y": y})) == []
