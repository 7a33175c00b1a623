"""`adapt` to a file whose target has classes that training never saw, with `protonet`, `protomaml` and `ridge`."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import quickbloom
from quickbloom import adapt, predict
from quickbloom.client_app.cli import cli
from quickbloom.common.errors import DataError
from quickbloom.common.personal import checkpoint
from quickbloom.common.personal.model import load

Array = np.ndarray[Any, Any]
KNOWN = ["a", "b", "c"]
CENTRES = {"a": (3, 0), "b": (-3, 0), "c": (0, 3), "x": (0, -3), "y": (3, 3), "z": (-3, 3)}


def rows_of(user: str, classes: list[str], each: int, seed: int = 0, noise: float = 0.7) -> list[str]:
    rng = np.random.default_rng([seed, *user.encode()])
    points = [(label, *(np.array(CENTRES[label]) + noise * rng.normal(size=2))) for label in classes for _ in range(each)]
    return [f"{user},{first:.4f},{second:.4f},{label}" for label, first, second in points]


def written(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(["user,u,v,kind", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories after training on three classes, by algorithm."""
    folder = tmp_path_factory.mktemp("trained")
    data = written(folder / "users.csv", [row for user in "ABCDEFGH" for row in rows_of(user, KNOWN, 8)])
    models: dict[str, dict[str, Any]] = {"ridge": {"model": "linear"}, "protonet": {"embedding": 4}, "fomaml": {}}
    for name, more in models.items():
        more = {"model": "mlp", "settings": {"mlp.hidden": "8"}, **more}
        quickbloom.run(name, data=data, task="user", target="kind", rounds=6, output=folder / name, progress=False, **more)
    return {name: folder / name for name in models}


def inputs(path: Path, run: Path) -> tuple[Array, list[str]]:
    """The file's rows as a linear model has them, on the run's scales, with a column of ones; and their classes."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = np.array([[float(row["u"]), float(row["v"])] for row in rows])
    scales = json.loads(checkpoint.load(run, print).facts["schema"])["scales"]
    mean, deviation = np.array([scales["u"], scales["v"]]).T
    scaled = (numbers - mean) / deviation
    return np.concatenate([scaled, np.ones((len(rows), 1))], axis=1), [row["kind"] for row in rows]


@pytest.mark.parametrize("held", [["x", "y", "z"], ["b", "x"], ["x", "c", "a", "y"]])
def test_the_heads_of_ridge_solve_each_class_for_itself_from_its_own_shared_head(
    runs: dict[str, Path], tmp_path: Path, held: list[str]
) -> None:
    data = written(tmp_path / "new.csv", rows_of("new", held, 6))
    (model,) = adapt(runs["ridge"], data, tmp_path / "mine", folds=0)
    new = [label for label in "xyz" if label in held]
    classes = KNOWN * (len(new) < len(held)) + new
    assert model.classes == classes
    meta = {name: value.double().numpy() for name, value in checkpoint.load(runs["ridge"], print).meta.items()}
    weight, bias = (next(value for name, value in meta.items() if name.endswith(end)) for end in ("weight", "bias"))
    shared = np.concatenate([weight.T, bias[None]])
    features, labels = inputs(data, runs["ridge"])
    penalty = np.exp(10 * meta["ridge/penalty"])
    precision = np.diag([penalty[0], penalty[0], penalty[1]])
    for place, label in enumerate(classes):
        prior = shared[:, KNOWN.index(label)] if label in KNOWN else shared.mean(axis=1)
        target = np.array([float(one == label) for one in labels])
        # argmin |target - F w|^2 + (w - prior)' P (w - prior), from its normal equations
        expected = np.linalg.solve(features.T @ features + precision, features.T @ target + precision @ prior)
        found = torch.cat([model.tensors["1.weight"][place], model.tensors["1.bias"][place : place + 1]])
        np.testing.assert_allclose(found.numpy(), np.exp(10 * meta["ridge/scale"]) * expected, rtol=1e-4, atol=1e-5)
    fresh = written(tmp_path / "fresh.csv", rows_of("new", held, 20, seed=1))
    table = predict(tmp_path / "mine", fresh)
    assert np.mean([row["prediction"] == row["target"] for row in table.rows]) > 0.9
    assert [name for name in table.columns if name.startswith("probability_")] == [f"probability_{one}" for one in classes]


def test_what_the_shared_heads_have_in_common_changes_no_probability(runs: dict[str, Path], tmp_path: Path) -> None:
    """A vector added to all heads is seen in no training loss either, so a new class must not depend on it."""
    found = checkpoint.load(runs["ridge"], print)
    moved = dict(found.tensors)
    for name in ("meta/1.weight", "meta/1.bias"):
        moved[name] = moved[name] + torch.tensor(0.7)
    checkpoint.write(tmp_path / "moved.safetensors", moved, found.facts, wait=False)
    data = written(tmp_path / "new.csv", rows_of("new", ["a", "x"], 3))
    fresh = written(tmp_path / "fresh.csv", rows_of("new", ["a", "x"], 5, seed=1))
    shares = []
    for source in (runs["ridge"], tmp_path / "moved.safetensors"):
        adapt(source, data, tmp_path / "mine", folds=0)
        shares.append(
            [[float(row[f"probability_{label}"]) for label in "abcx"] for row in predict(tmp_path / "mine", fresh).rows]
        )
    np.testing.assert_allclose(shares[0], shares[1], atol=1e-5)


@pytest.mark.parametrize("algorithm", ["protonet", "ridge"])
def test_one_row_of_each_new_class_is_enough(runs: dict[str, Path], tmp_path: Path, algorithm: str) -> None:
    data = written(tmp_path / "one.csv", rows_of("new", ["x", "y", "z"], 1, noise=0.1))
    output = ["--data", str(data), "--output", str(tmp_path / "mine")]
    done = CliRunner().invoke(cli, ["adapt", "--checkpoint", str(runs[algorithm]), *output])
    assert done.exit_code == 0, done.output
    assert "Remark: training never saw the classes x, y, z: what the model knows of them is from the rows" in done.stderr
    model = load(tmp_path / "mine" / "new.safetensors")
    assert (model.classes, model.card["spec"][2]) == (["x", "y", "z"], 3)
    fresh = written(tmp_path / "fresh.csv", rows_of("new", ["x", "y", "z"], 20, seed=1))
    found = predict(tmp_path / "mine", fresh)
    assert np.mean([row["prediction"] == row["target"] for row in found.rows]) > 0.7  # a third by chance
    right = np.mean([row["prediction"] == row["target"] for row in found.rows])
    assert found.scores[0].value == pytest.approx(right)


def test_every_task_has_the_classes_of_its_own_rows_and_a_folder_predicts_them_all(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    held = {"one": ["a", "b"], "two": ["b", "x"], "three": ["y", "z"]}
    rows = [row for user, classes in held.items() for row in rows_of(user, classes, 6)]
    data = written(tmp_path / "three.csv", rows)
    said: list[str] = []
    lonely = rows_of("four", ["z"], 5)
    adapt(runs["ridge"], written(tmp_path / "four.csv", rows + lonely), tmp_path / "four", say=said.append)
    assert any("No model: the rows of the task 'four' must have two classes or more, got 'z' alone" in one for one in said)
    models = {model.task: model for model in adapt(runs["ridge"], data, tmp_path / "mine")}
    assert {task: model.classes for task, model in models.items()} == {
        **{"one": ["a", "b", "c"], "two": ["a", "b", "c", "x"], "three": ["y", "z"]}
    }
    found = predict(tmp_path / "mine", data)
    # The file that the models adapted to is known again, whatever classes each has.
    assert {row["part"] for row in found.rows} == {"support"}
    assert {score.part for score in found.scores} == {"cross-validation"}
    assert {row["prediction"] for row in found.rows if row["task"] == "three"} == {"y", "z"}
    # Alone in its file a task has the same model.
    (alone,) = adapt(runs["ridge"], written(tmp_path / "two.csv", rows_of("two", held["two"], 6)), tmp_path / "alone")
    assert all(torch.equal(value, models["two"].tensors[name]) for name, value in alone.tensors.items())
    assert alone.card["score"] == models["two"].card["score"]


def test_classes_that_are_numbers_are_in_their_order(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = [row.rsplit(",", 1)[0] + f",{10 if row.endswith('x') else 9}" for row in rows_of("new", ["x", "y"], 4)]
    (model,) = adapt(runs["protonet"], written(tmp_path / "new.csv", rows), tmp_path / "mine")
    assert model.classes == ["9", "10"]
    assert {row["prediction"] for row in predict(tmp_path / "mine", tmp_path / "new.csv").rows} == {"9", "10"}


def test_numbers_that_are_measured_are_no_classes(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = [row.rsplit(",", 1)[0] + f",{i / 4}" for i, row in enumerate(rows_of("new", ["x", "y"], 4))]
    with pytest.raises(
        DataError, match=r"must hold classes, such as 'a', as it did in training, got numbers such as '0': name"
    ):
        adapt(runs["ridge"], written(tmp_path / "new.csv", rows), tmp_path / "mine")


def test_other_algorithms_name_those_that_can(runs: dict[str, Path], tmp_path: Path) -> None:
    data = written(tmp_path / "new.csv", rows_of("new", ["a", "x"], 4))
    with pytest.raises(
        DataError,
        match=r"hold the class 'x', which training never saw \(a, b, c\): mend it, or adapt a run of `protonet`, "
        r"`protomaml` and `ridge`, "
        r"which learn new classes from your rows, where `fomaml` cannot",
    ):
        adapt(runs["fomaml"], data, tmp_path / "mine")


def test_a_class_that_the_model_does_not_know_is_refused_in_its_own_rows_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    adapt(runs["ridge"], written(tmp_path / "one.csv", rows_of("one", ["a", "x"], 6)), tmp_path / "mine")
    others = [*rows_of("one", ["a", "x"], 2, seed=1), *rows_of("two", ["y"], 2)]
    assert len(predict(tmp_path / "mine", written(tmp_path / "both.csv", others)).rows) == 4
    with pytest.raises(DataError, match="holds the class 'y', the model knows a, b, c, x"):
        predict(tmp_path / "mine", written(tmp_path / "wrong.csv", rows_of("one", ["a", "y"], 2)))


@pytest.mark.parametrize("algorithm", ["protonet", "ridge"])
def test_new_classes_are_exported(runs: dict[str, Path], tmp_path: Path, algorithm: str) -> None:
    data = written(tmp_path / "new.csv", rows_of("new", ["a", "x", "y"], 10))
    (model,) = adapt(runs[algorithm], data, tmp_path / "mine")
    assert abs(model.card["temperature"] - 1) > 0.1  # which the probabilities below go by as well
    arguments = ["export", "--model", str(tmp_path / "mine"), "--format", "torch", "--output", str(tmp_path / "mine.pt2")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    features, _ = inputs(data, runs[algorithm])
    shares = torch.export.load(tmp_path / "mine.pt2").module()(torch.tensor(features[:, :2], dtype=torch.float32))
    for row, by_export in zip(predict(tmp_path / "mine", data).rows, shares.tolist(), strict=True):
        by_name = dict(zip("abcxy", by_export, strict=True))
        for label in "axy":
            assert float(row[f"probability_{label}"]) == pytest.approx(by_name[label], abs=1e-4)
