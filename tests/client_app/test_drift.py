"""A remark of `predict` on rows outside what the model adapted to, and what its card holds for that."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quickbloom
from quickbloom import adapt, predict
from quickbloom.common.personal.model import Personal, load, save


def rows_of(user: str, number: int) -> list[str]:
    rng = np.random.default_rng([5, *user.encode()])
    return [
        f"{user},{rng.uniform(20, 80):.1f},{'abcd'[i % 3]},name {i},{rng.normal():.2f},{['ill', 'well'][i % 2]}"
        for i in range(number)
    ]


def written(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(["user,age,ward,name,marker,outcome", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    data = written(folder / "all.csv", [row for user in "ABCDEF" for row in [*rows_of(user, 20), f"{user},50,d,x,0,ill"]])
    more: dict[str, Any] = {"rounds": 1, "progress": False, "settings": {"mlp.hidden": "4", "own.scale": "task"}}
    quickbloom.run("fomaml", data=data, task="user", target="outcome", output=folder / "run", **more)
    adapt(folder / "run", written(folder / "mine.csv", rows_of("Z", 40)), folder / "mine", folds=0)
    return folder


def remarks(mine: Path, folder: Path, rows: list[str]) -> list[str]:
    found = predict(mine / "mine", written(folder / "new.csv", rows)).remarks
    return [remark for remark in found if "outside" in remark]


def changed(rows: list[str], place: int, values: dict[int, str]) -> list[str]:
    cells = [row.split(",") for row in rows]
    for at, value in values.items():
        cells[at][place] = value
    return [",".join(row) for row in cells]


def test_rows_like_those_adapted_to_are_not_remarked_on(mine: Path, tmp_path: Path) -> None:
    rows = rows_of("Z", 40)
    assert remarks(mine, tmp_path, rows) == []
    fresh = changed(rows, 3, {i: f"stranger {i}" for i in range(40)})  # a name is new in every row
    assert remarks(mine, tmp_path, fresh) == []
    assert remarks(mine, tmp_path, changed(rows, 1, {0: "900", 1: ""})) == []  # 1 row in 40


def test_numbers_beyond_the_range_by_a_deviation_and_unseen_categories_are_named(mine: Path, tmp_path: Path) -> None:
    rows = rows_of("Z", 40)
    ages = np.array([float(row.split(",")[1]) for row in rows])
    edge = ages.max() + ages.std()
    within = changed(rows, 1, dict.fromkeys(range(9), f"{edge - 0.1:.4f}"))
    assert remarks(mine, tmp_path, within) == []
    beyond = changed(rows, 1, dict.fromkeys(range(9), f"{edge + 0.1:.4f}"))
    beyond = changed(beyond, 2, {6: "d", 7: "d", 8: "other", 9: "d"})  # others' wards, and one of nobody
    assert remarks(mine, tmp_path, beyond) == [
        "10 of 40 rows of Z lie outside what its model adapted to (`age` in 9, `ward` in 4): numbers beyond its range by more "
        "than a deviation, or categories that it has not seen, so its score does not hold for them"
    ]
    below = changed(rows, 1, {i: f"{ages.min() - ages.std() - 0.1:.4f}" for i in range(4)})
    assert "(`age` in 4)" in remarks(mine, tmp_path, below)[0]


def test_the_card_holds_ranges_and_hashes_and_no_row(mine: Path) -> None:
    card = json.loads((mine / "mine" / "Z.json").read_text())
    rows = [row.split(",") for row in rows_of("Z", 40)]
    ages, markers = (sorted(float(row[place]) for row in rows) for place in (1, 4))
    assert card["seen"]["numbers"] == {"age": [ages[0], ages[-1]], "marker": [markers[0], markers[-1]]}
    keys = sorted(hashlib.blake2b(f"ward\x1f{ward}".encode(), digest_size=8).hexdigest() for ward in "abc")
    assert card["seen"]["categories"] == {"ward": keys}
    assert "name 7" not in json.dumps(card)


def test_few_rows_and_older_cards_show_no_range(mine: Path, tmp_path: Path) -> None:
    (few,) = adapt(mine / "run", written(tmp_path / "few.csv", rows_of("Z", 9)), tmp_path / "few", folds=0)
    assert few.card["seen"] == {}
    model = load(mine / "mine" / "Z.safetensors")
    (tmp_path / "old").mkdir()
    save(
        Personal(model.tensors, {name: fact for name, fact in model.card.items() if name != "seen"}),
        tmp_path / "old" / "Z.safetensors",
    )
    far = changed(rows_of("Z", 40), 1, dict.fromkeys(range(40), "900"))
    assert [one for one in predict(tmp_path / "old", written(tmp_path / "far.csv", far)).remarks if "outside" in one] == []
