"""Rows are drawn by their content: no name and no order of rows matters, and copies of a row stay together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quickbloom.common.datasets import row_order
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.row_order import cut, folds


def own(path: Path, **options: Any) -> Own:
    named = {"task_name": path.stem, "target_column": "y", **options}
    return Own(OwnOptions.model_validate({"path": str(path), **named}), Path())


def lines(number: int = 40, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{rng.normal():.4f},{'MF'[i % 2]},{'ill' if rng.random() < 0.4 else 'well'}" for i in range(number)]


def written(path: Path, rows: list[str], header: str = "age,sex,y") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def parts(data: Own, rows: list[str]) -> list[list[str]]:
    """The lines of each part of the only task, sorted."""
    (found,) = data.rows.values()
    return [sorted(rows[row] for row in part) for part in found]


def test_the_name_of_a_file_and_of_its_task_moves_no_row(tmp_path: Path) -> None:
    rows = lines()
    first = own(written(tmp_path / "a.csv", rows))
    for name in ("b.csv", "ward 7 of 2024.csv"):
        other = own(written(tmp_path / name, rows))
        for mine, theirs in zip(*(next(iter(data.rows.values())) for data in (first, other)), strict=True):
            assert np.array_equal(mine, theirs)
    named = own(written(tmp_path / "c.csv", [f"{row},Z" for row in rows], "age,sex,y,hospital"), task_column="hospital")
    assert parts(named, rows) == parts(first, rows)
    # And it is a random draw: other rows are cut otherwise, and the file's beginning is not the support.
    assert parts(first, rows)[0] != sorted(rows[: len(parts(first, rows)[0])])


def test_the_order_of_rows_and_columns_and_what_else_other_nodes_hold_move_no_row(tmp_path: Path) -> None:
    rows = lines()
    first = own(written(tmp_path / "a.csv", rows))
    turned = rows[::-1]
    assert parts(own(written(tmp_path / "b.csv", turned)), turned) == parts(first, rows)
    columns = [",".join(row.split(",")[::-1]) for row in rows]
    swapped = own(written(tmp_path / "c.csv", columns, "y,sex,age"))
    assert [sorted(",".join(line.split(",")[::-1]) for line in part) for part in parts(swapped, columns)] == parts(first, rows)
    # The other node has a class and a category that are not here.
    more = written(tmp_path / "d.csv", [*rows, "1.0,X,dead", "2.0,X,dead", "3.0,X,dead"])
    agreed = own(more).spec.schema
    alone = Own(OwnOptions(path=str(tmp_path / "a.csv"), task_name="a", target_column="y"), Path(), agreed)
    assert alone.spec.input_shape > first.spec.input_shape
    assert parts(alone, rows) == parts(first, rows)


@pytest.mark.parametrize("shots", [0, 5])
def test_copies_of_a_row_are_in_one_part(tmp_path: Path, shots: int) -> None:
    rows = lines(30) * 2 + lines(7, seed=1) * 3
    sets = [set(part) for part in parts(own(written(tmp_path / "a.csv", rows), shots=shots), rows)]
    assert sum(map(len, sets)) == len(set(rows)) == 37
    assert all(sets)
    # The same with single rows that are no copies, by numbers alone: 12 of each class, each twice.
    content = np.repeat(np.arange(12, dtype=np.uint64), 2)
    assert [len(part) for part in cut(content, 10, 17)] == [10, 6, 8]  # 17 is no end of a pair, 16 is the first as near
    assert sorted(np.concatenate(cut(content, 10, 17))) == list(range(24))


def test_where_few_rows_differ_copies_are_observations_like_others(tmp_path: Path) -> None:
    """Two categories and nothing else: were copies kept together, one would be the support and the other the test."""
    rows = [f"{'MF'[i % 2]},{'ill' if i % 3 else 'well'}" for i in range(60)]
    found = parts(own(written(tmp_path / "a.csv", rows, "sex,y")), rows)
    assert [len(part) for part in found] == [24, 18, 18]  # 40, 30, 30 % of 20 and of 40
    assert all(set(part) == set(rows) for part in found)
    # Three rows of a class, two of them equal: left out if they had to stay together.
    few = ["1,a", "1,a", "2,a", "3,b", "4,b", "5,b"]
    assert [len(part) for part in parts(own(written(tmp_path / "b.csv", few, "x,y")), few)] == [2, 2, 2]


def test_shots_are_met_exactly_even_if_a_copy_is_elsewhere() -> None:
    content = np.repeat(np.arange(5, dtype=np.uint64), 3)
    support, query, test = cut(content, 4, 10, exact=True)
    assert (len(support), len(query), len(test)) == (4, 5, 6)  # two of the first group left; 6 more, to the next end of a group
    assert sorted(np.concatenate([support, query, test])) == list(range(15))


def test_without_copies_the_ends_are_those_that_were_asked_for() -> None:
    content = np.random.default_rng(0).permutation(20).astype(np.uint64)
    found = cut(content, 8, 14)
    assert [content[part].tolist() for part in found] == [list(range(8)), list(range(8, 14)), list(range(14, 20))]
    for number, ends, sizes in ((1, (1, 2), [1, 0, 0]), (2, (1, 2), [1, 1, 0]), (3, (1, 2), [1, 1, 1]), (4, (2, 4), [2, 2, 0])):
        assert [len(part) for part in cut(np.arange(number, dtype=np.uint64), *ends)] == sizes


def test_folds_have_all_classes_and_hold_no_copy_of_what_they_are_scored_by() -> None:
    classes = np.array([0.0] * 9 + [1.0] * 12 + [2.0] + [3.0, 3.0])
    content = np.array([*range(9), *(i // 2 + 20 for i in range(12)), 40, 50, 50], dtype=np.uint64)
    fold, number = folds(content, classes, 5)
    assert number == 5
    assert (fold[classes >= 2] == -1).all()  # one row, and one with its copy: nothing would show the class
    for one in range(number):
        assert {*classes[fold == one]} == {0, 1}
        assert not {*content[fold == one]} & {*content[fold != one]}
    assert max(np.bincount(fold[fold >= 0])) - min(np.bincount(fold[fold >= 0])) <= 2
    assert folds(content[:3], np.zeros(3), 5)[1] == 0  # two folds of two rows are the least
    assert folds(np.arange(4, dtype=np.uint64), np.array([0.0, 0, 1, 1]), 5)[1] == 2
    assert folds(np.arange(4, dtype=np.uint64), np.zeros(4), 0)[1] == 0


def test_equal_cells_have_equal_content(tmp_path: Path) -> None:
    rows = ["1.0,M,ill", "1,M,ill", "-0.0,F,well", "0,F,well", ",,well", "NA,,well", "2,M,ill"]
    content = own(written(tmp_path / "a.csv", rows * 3)).content[:7]
    assert len({*content.tolist()}) == 4
    assert [content[0], content[2], content[4]] == [content[1], content[3], content[5]]
    assert row_order.content_of([np.full(3, np.nan)]).shape == (3,)
