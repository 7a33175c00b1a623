"""What `predict` gives back: the file's own columns, then the class with all probabilities, or the number; and as a frame."""

import csv
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import LoopbackGrid
from typer.testing import CliRunner

import quickbloom
from quickbloom import adapt, predict
from quickbloom.client_app.cli import cli
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.frames import typed
from quickbloom.server_app.app import run_federation

HEADER = "ward,code,weight,answer,prediction"
ADDED = ["task", "part", "target", "prediction", "probability"]


def rows_of(ward: str, number: int = 30) -> list[str]:
    """Three answers; a column whose name predictions need; codes with a 0, and a formula."""
    rng = np.random.default_rng(list(ward.encode()))
    answers = ("no", "perhaps", "yes")
    rows = []
    for i in range(number):
        weight, noise = rng.normal(), rng.normal()
        rows.append(f"{ward},0{400 + i % 3},{weight:.2f},{answers[i % 3]},{noise + 2 * (i % 3):.2f}")
    return rows


def written(path: Path, rows: list[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def trained(folder: Path, data: Path, **more: Any) -> Path:
    settings: dict[str, Any] = {"dataset": "own", "min-nodes": 1, "rounds": 3, "evaluate-every": 0, "adapt-steps": 3}
    settings |= {"mlp.hidden": "8", "algorithm": "fomaml", "output-dir": str(folder / "run"), **more}
    config = parse_run_config(settings)
    node = {"data-path": str(data), "state-dir": str(folder / "state")}
    run_federation(LoopbackGrid(1, config.flat(), node_configs={0: node}), config)
    return folder / "state"


COLUMNS = {"own.task-column": "ward", "own.target-column": "answer", "own.categorical": "code"}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    rows = [row for ward in "ABCDEFGH" for row in rows_of(ward)]
    return trained(folder, written(folder / "wards.csv", rows), **COLUMNS)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_own_columns_come_first_and_then_a_probability_for_each_class(state: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "new.csv", [*rows_of("Z"), "Z,=1+1,0.5,,1.0"])
    (model,) = adapt(state, data, tmp_path / "mine", own_rows=False)
    output = tmp_path / "out.csv"
    done = CliRunner().invoke(
        cli, ["predict", "--model", str(tmp_path / "mine"), "--input", str(data), "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    rows, own = read(output), read(data)
    classes = ["no", "perhaps", "yes"]
    assert list(rows[0]) == [
        *("row", "ward", "code", "weight", "answer", "input.prediction"),
        *ADDED,
        *(f"probability_{label}" for label in classes),
    ]
    for row, cells in zip(rows[:-1], own[:-1], strict=True):
        assert {name: row["input." * (name == "prediction") + name] for name in cells} == cells
    assert rows[-1]["code"] == "'=1+1"  # what a spreadsheet would run
    # By hand from the model's file: outputs over the temperature of the card, softmax.
    columns = {name: np.array([float(cells[name]) for cells in own]) for name in ("prediction", "weight")}
    assert list(model.card["preparation"]["features"]) == ["code", "prediction", "weight"]
    scales = json.loads(model.card["schema"])["scales"]  # those of the training tasks
    scaled = [((column - scales[name][0]) / scales[name][1])[:, None] for name, column in columns.items()]
    inputs = torch.tensor(np.concatenate([codes_by_hand(model.card["schema"], own), *scaled], axis=1), dtype=torch.float32)
    assert inputs.shape[1] == 3 + 2 + 2  # the codes of training, another one, none; and two numbers
    hidden = torch.relu(inputs @ model.tensors["1.weight"].T + model.tensors["1.bias"])
    outputs = (hidden @ model.tensors["3.weight"].T + model.tensors["3.bias"]).double()
    shares = torch.softmax(outputs / (model.card["temperature"] or 1.0), dim=1)
    for row, by_hand in zip(rows, shares.tolist(), strict=True):
        assert [float(row[f"probability_{label}"]) for label in classes] == pytest.approx(by_hand, abs=1e-6)
        assert row["prediction"] == classes[int(np.argmax(by_hand))]
        assert float(row["probability"]) == pytest.approx(max(by_hand), abs=1e-6)
    assert [row["target"] for row in rows] == [cells["answer"] for cells in own]


def codes_by_hand(schema: str, rows: list[dict[str, str]]) -> np.ndarray[Any, Any]:
    keys = json.loads(schema)["vocabularies"]["code"]
    found = np.zeros((len(rows), len(keys) + 2))
    for i, row in enumerate(rows):
        key = hashlib.blake2b(f"code\x1f{row['code']}".encode(), digest_size=8).hexdigest()
        found[i, keys.index(key) if key in keys else len(keys)] = 1
    return found


def test_as_python_it_is_a_frame_with_numbers(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    data = written(tmp_path / "new.csv", [*rows_of("Z"), "Z,0401,,yes,1.0"])
    adapt(state, data, tmp_path / "mine")
    found = predict(tmp_path / "mine", data)
    assert isinstance(found.table, pandas.DataFrame)
    shares = found.table[[f"probability_{label}" for label in ("no", "perhaps", "yes")]]
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    assert (shares.idxmax(axis=1) == "probability_" + found.table["prediction"]).all()
    assert found.table["row"].tolist() == list(range(1, 32))
    assert found.table["code"].tolist() == [f"0{400 + i % 3}" for i in range(30)] + ["0401"]  # no number: a 0 stands before it
    assert np.isnan(found.table["weight"].iloc[-1])
    assert found.table["weight"].iloc[0] == float(found.rows[0]["weight"])
    monkeypatch.setattr("quickbloom.common.frames.find_spec", lambda name: None)
    arrays = predict(tmp_path / "mine", data).table
    assert arrays["prediction"].tolist() == found.table["prediction"].tolist()
    assert arrays["probability_yes"].dtype == np.float64


def test_a_frame_goes_in_and_its_index_and_ids_come_back(state: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    data = pandas.read_csv(written(tmp_path / "new.csv", rows_of("Z")), dtype={"code": str})
    adapt(state, data, tmp_path / "mine")
    shuffled = data.assign(id=[f"p-{i:03}" for i in range(30)]).sample(frac=1, random_state=0)
    shuffled.index = [f"row {name}" for name in shuffled["id"]]
    strangers = shuffled.head(3).assign(ward="unknown", id="x")
    found = predict(tmp_path / "mine", pandas.concat([strangers, shuffled]))
    assert found.table.index.tolist() == shuffled.index.tolist()
    assert found.table["id"].tolist() == shuffled["id"].tolist()
    assert found.table["row"].tolist() == list(range(4, 34))
    by_file = predict(tmp_path / "mine", tmp_path / "new.csv").table
    assert (found.table.set_index("id")["prediction"].sort_index().tolist()) == by_file["prediction"].tolist()
    assert by_file.index.tolist() == list(range(30))


class Polars:
    """A frame as polars has it: no `to_csv`, no index."""

    def __init__(self, text: str) -> None:
        self._text = text

    def write_csv(self, file: Path) -> None:
        file.write_text(self._text)


def test_a_frame_of_polars_and_arrays_are_taken_as_well(state: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "new.csv", rows_of("Z"))
    adapt(state, Polars(data.read_text()), tmp_path / "mine")
    expected = [row["prediction"] for row in predict(tmp_path / "mine", data).rows]
    assert [row["prediction"] for row in predict(tmp_path / "mine", Polars(data.read_text())).rows] == expected
    cells = read(data)
    numbers = {name: np.array([float(row[name]) for row in cells]) for name in ("weight", "prediction")}
    words = {name: np.array([row[name] for row in cells]) for name in ("ward", "code", "answer")}
    assert [row["prediction"] for row in predict(tmp_path / "mine", numbers | words).rows] == expected
    with pytest.raises(ConfigError, match="`data` must be a path, a pandas or polars DataFrame, or arrays by column, got int"):
        predict(tmp_path / "mine", 3)


def test_an_id_is_written_and_is_no_input(state: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "new.csv", rows_of("Z"))
    adapt(state, data, tmp_path / "mine")
    ids = [f"0{7 * i}" for i in range(30)]
    with_ids = written(tmp_path / "ids.csv", [f"{i},{row}" for i, row in zip(ids, rows_of("Z"), strict=True)], f"id,{HEADER}")
    found = predict(tmp_path / "mine", with_ids)
    assert [row["id"] for row in found.rows] == ids
    assert [row["prediction"] for row in found.rows] == [row["prediction"] for row in predict(tmp_path / "mine", data).rows]


def test_a_class_that_the_model_cannot_predict_is_not_offered(tmp_path: Path) -> None:
    rows = [row for ward in "ABCDEFGH" for row in rows_of(ward)]
    state = trained(tmp_path, written(tmp_path / "wards.csv", rows), algorithm="protonet", **COLUMNS)
    two = written(tmp_path / "two.csv", [row for row in rows_of("Z") if ",perhaps," not in row])
    three = written(tmp_path / "three.csv", rows_of("Y"))
    adapt(state, two, tmp_path / "mine")
    (row, *_) = predict(tmp_path / "mine", two).rows
    assert {name for name in row if name.startswith("probability_")} == {"probability_no", "probability_yes"}
    # A folder with a model that can: the other one's rows have nothing there.
    adapt(state, three, tmp_path / "mine")
    both = written(tmp_path / "both.csv", [*rows_of("Z"), *rows_of("Y")])
    found = predict(tmp_path / "mine", both)
    held = {task: {row.get("probability_perhaps", "") != "" for row in found.rows if row["task"] == task} for task in "YZ"}
    assert held == {"Y": {True}, "Z": {False}}
    with (tmp_path / "both.out.csv").open("w", newline="") as file:
        found.write_csv(file)
    assert {row["probability_perhaps"] for row in read(tmp_path / "both.out.csv") if row["task"] == "Z"} == {""}


def test_columns_called_task_and_target_stand_once(tmp_path: Path) -> None:
    rows = [f"{ward},{i / 7:.3f},{200 + i + ord(ward):.1f}" for ward in "ABCDEFGH" for i in range(20)]
    data = written(tmp_path / "wards.csv", rows, "task,dose,target")
    state = trained(tmp_path, data)
    adapt(state, data, tmp_path / "mine", own_rows=False)
    found = predict(tmp_path / "mine", data)
    assert found.columns == ["row", "dose", "task", "part", "target", "prediction"]
    assert found.rows[0] | {"prediction": ""} == {
        **{"row": 1, "dose": "0.000", "task": "A", "part": "support", "target": "265", "prediction": ""}
    }


def test_images_are_named_by_their_files(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for task in "ABCDE":
        for label, light in (("day", 170), ("night", 80)):
            (tmp_path / "scans" / task / label).mkdir(parents=True)
            for i in range(6):
                pixels = rng.normal(light, 30, size=(8, 8)).clip(0, 255).astype(np.uint8)
                image.fromarray(pixels).save(tmp_path / "scans" / task / label / f"{i}.png")
    state = trained(tmp_path, tmp_path / "scans", **{"own.image-side": 8, "conv4.filters": 4})
    adapt(state, tmp_path / "scans", tmp_path / "mine")
    found = predict(tmp_path / "mine", tmp_path / "scans")
    assert found.columns == ["row", "file", "class", *ADDED, "probability_day", "probability_night"]
    assert [row["file"] for row in found.rows][:7] == [*(f"A/day/{i}.png" for i in range(6)), "A/night/0.png"]
    assert all(row["file"].split("/")[:2] == [row["task"], row["target"]] for row in found.rows)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "2"], [1, 2]),
        (["1", ""], [1.0, None]),
        (["1.5", "-2e3"], [1.5, -2000.0]),
        (["0401", "7"], ["0401", "7"]),
        (["1583715738627261037", "1"], ["1583715738627261037", "1"]),
        (["", ""], [None, None]),
        (["nan", "1"], ["nan", "1"]),
        (["1,234", "1"], ["1,234", "1"]),
    ],
)
def test_only_plain_numbers_become_numbers(cells: list[str], expected: list[Any]) -> None:
    assert [None if value != value else value for value in typed(cells)] == expected


def test_packed_in_and_packed_out_is_the_same_table(state: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "new.csv", rows_of("Z"))
    (tmp_path / "new.csv.gz").write_bytes(gzip.compress(data.read_bytes()))
    adapt(state, tmp_path / "new.csv.gz", tmp_path / "mine")
    for source, target in (("new.csv", "a.csv"), ("new.csv.gz", "b.csv.gz")):
        paths = ["--input", str(tmp_path / source), "--output", str(tmp_path / target)]
        done = CliRunner().invoke(cli, ["predict", "--model", str(tmp_path / "mine"), *paths])
        assert done.exit_code == 0, done.output
        assert "30 rows that it was adapted to" in done.output
    assert gzip.decompress((tmp_path / "b.csv.gz").read_bytes()) == (tmp_path / "a.csv").read_bytes()


def test_the_intervals_of_alpaca_hold_nine_rows_in_ten_that_it_has_not_seen(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def rows(user: int, slope: float, level: float, count: int) -> list[str]:
        x = rng.normal(size=count)
        y = 1000 + 20 * (slope * x + level + 0.5 * rng.normal(size=count))
        return [f"u{user},{a:.5f},{b:.5f}" for a, b in zip(x, y, strict=True)]

    seen, new = ["user,x,y"], ["user,x,y"]
    for user in range(60):
        slope, level = 1 + 0.8 * rng.normal(), 0.5 * rng.normal()
        seen += rows(user, slope, level, int(rng.integers(15, 60)))
        new += rows(user, slope, level, 40)
    for name, lines in (("seen.csv", seen), ("new.csv", new)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    quickbloom.run(
        "alpaca",
        data=tmp_path / "seen.csv",
        task="user",
        target="y",
        rounds=60,
        model="linear",
        output=tmp_path / "run",
        progress=False,
    )
    quickbloom.adapt(tmp_path / "run", tmp_path / "seen.csv", tmp_path / "mine")
    found = quickbloom.predict(tmp_path / "mine", tmp_path / "new.csv").rows
    truth, low, value, high = (
        np.array([float(row[name]) for row in found]) for name in ("target", "lower_90", "prediction", "upper_90")
    )
    assert len(truth) == 2400
    assert (low < value).all()
    assert (value < high).all()
    assert 0.85 < ((low < truth) & (truth < high)).mean() < 0.95
    # The noise of a row is 10, the spread of a user's rows 25; a user with few rows is less sure.
    assert 2 * 1.645 * 10 < (high - low).mean() < 2 * 1.645 * 18
