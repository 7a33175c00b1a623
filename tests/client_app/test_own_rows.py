"""Where ridge or a constant on a device's own rows alone is better, it is the personal model; against scikit-learn's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import LoopbackGrid
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from typer.testing import CliRunner

from quickbloom import adapt, explain, predict
from quickbloom.client_app.cli import cli
from quickbloom.client_app.export import export
from quickbloom.client_app.personal_models import in_words
from quickbloom.common.baselines.own_ridge import PENALTIES
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import DataError
from quickbloom.common.metric import ACCURACY
from quickbloom.common.personal import checkpoint
from quickbloom.common.personal.cross_validation import Scores
from quickbloom.common.personal.model import PERSONAL, load
from quickbloom.server_app.app import run_federation

COLUMNS = ["a", "b", "c", "d"]


def diabetes() -> tuple[Any, Any]:
    """Four columns of the table of 442 patients, and the progression of their disease."""
    found = load_diabetes(scaled=False)
    return found.data[:, [2, 3, 8, 9]], found.target


def tumours() -> tuple[Any, Any]:
    """Four columns of the table of 569 tumours, and their kind."""
    found = load_breast_cancer()
    return found.data[:, [0, 1, 4, 7]], np.array(["bad", "good"])[found.target]


def written(path: Path, x: Any, y: Any, tasks: Any = None) -> Path:
    lines = [",".join([*map(repr, map(float, row)), str(label)]) for row, label in zip(x, y, strict=True)]
    header = ",".join([*COLUMNS, "target"])
    if tasks is not None:
        lines, header = [f"{task},{line}" for task, line in zip(tasks, lines, strict=True)], f"task,{header}"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def trained(folder: Path, x: Any, y: Any, **more: Any) -> Path:
    """A run on these rows, dealt to eight tasks."""
    data = written(folder / "train.csv", x, y, [f"t{i % 8}" for i in range(len(x))])
    settings: dict[str, Any] = {"dataset": "own", "own.path": str(data), "min-nodes": 1, "rounds": 20, "evaluate-every": 0}
    settings |= {"algorithm": "ridge", "model": "linear", "own.scale": "task", "baselines": False, **more}
    config = parse_run_config({**settings, "output-dir": str(folder / "run")})
    run_federation(LoopbackGrid(1, config.flat()), config)
    return folder / "run"


def scaled(x: Any, by: Any) -> Any:
    return (x - by.mean(axis=0)) / by.std(axis=0)


def numbers(rows: list[dict[str, Any]], name: str = "prediction") -> Any:
    return np.array([float(row[name]) for row in rows])


@pytest.fixture(scope="module")
def misled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on patients of whom the sicker are said to be the healthier: of no use to a device with others."""
    x, y = diabetes()
    return trained(tmp_path_factory.mktemp("misled"), x[200:], -y[200:], **{"ridge.penalty": 30.0})


@pytest.fixture(scope="module")
def kept(misled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the personal model of 60 patients, a file with 140 others)."""
    x, y = diabetes()
    folder = tmp_path_factory.mktemp("kept")
    data, fresh = written(folder / "mine.csv", x[:60], y[:60]), written(folder / "fresh.csv", x[60:200], y[60:200])
    adapt(misled, data, folder / "model.safetensors", target="target")
    return folder / "model.safetensors", fresh


def test_ridge_on_the_own_rows_is_kept_and_predicts_as_that_of_scikit_learn(kept: tuple[Path, Path]) -> None:
    x, y = diabetes()
    model = load(kept[0])
    score = model.card["score"]
    assert (score["kept"], score["best"], model.card["adapted"]["steps"]) == ("own", "own", 0)
    assert score["own"] < min(score["before"], score["after"], score["constant"])
    assert in_words(model).endswith("; ridge on its own rows alone does better, and is the personal model")
    ridge = RidgeCV(PENALTIES).fit(scaled(x[:60], x[:60]), y[:60])
    found = predict(*kept)
    np.testing.assert_allclose(numbers(found.rows), ridge.predict(scaled(x[60:200], x[:60])), rtol=1e-4)
    (told,) = found.scores
    assert told.rmse == pytest.approx(np.sqrt(np.mean((numbers(found.rows) - y[60:200]) ** 2)), rel=1e-4)


def test_its_intervals_are_as_wide_as_its_errors_on_rows_held_out(kept: tuple[Path, Path]) -> None:
    _, y = diabetes()
    rows = predict(*kept).rows
    low, high = numbers(rows, "lower_90"), numbers(rows, "upper_90")
    deviation = np.sqrt(load(kept[0]).card["score"]["own"]) * y[:60].std()
    np.testing.assert_allclose(high - low, 2 * 1.6449 * deviation, rtol=1e-3)
    np.testing.assert_allclose((high + low) / 2, numbers(rows), rtol=1e-4)
    assert 0.83 < np.mean((low <= y[60:200]) & (y[60:200] <= high)) < 0.97


def test_it_is_explained_beside_the_shared_model_that_it_is_not_made_from(kept: tuple[Path, Path], misled: Path) -> None:
    (found,) = explain(*kept, checkpoint=misled)
    (rows,) = predict(*kept).scores
    assert found.score == pytest.approx(rows.rmse, rel=1e-6)
    assert found.shared_score is not None
    assert found.shared_score > 1.2 * found.score
    assert {one.column for one in found.columns} == set(COLUMNS)


def test_it_is_exported_as_others_are(kept: tuple[Path, Path], tmp_path: Path) -> None:
    x, _ = diabetes()
    export(kept[0], tmp_path / "model.pt2", "torch")
    inputs = torch.from_numpy(scaled(x[60:200], x[:60]).astype(np.float32))
    outputs = torch.export.load(tmp_path / "model.pt2").module()(inputs).numpy()[:, 0]
    np.testing.assert_allclose(outputs, numbers(predict(*kept).rows), rtol=1e-4)


@pytest.mark.parametrize("rows", [12, 20])
def test_where_the_run_knows_more_than_few_own_rows_its_model_is_kept(rows: int, tmp_path: Path) -> None:
    """For ten devices the model of the run is better on other patients than ridge, which is chosen once at most."""
    x, y = diabetes()
    run = trained(tmp_path, x[200:], y[200:], **{"own.scale": "shared", "rounds": 40})
    rng, kept, of_run, alone = np.random.default_rng(0), [], [], []
    for _ in range(10):
        order = rng.permutation(200)
        mine, rest = order[:rows], order[rows:]
        data = written(tmp_path / "mine.csv", x[mine], y[mine])
        (model,) = adapt(run, data, tmp_path / "mine", target="target")
        kept.append(model.card["score"]["kept"])
        ridge = RidgeCV(PENALTIES).fit(scaled(x[mine], x[mine]), y[mine])
        alone.append(np.mean((ridge.predict(scaled(x[rest], x[mine])) - y[rest]) ** 2))
        (told,) = predict(tmp_path / "mine", written(tmp_path / "fresh.csv", x[rest], y[rest])).scores
        of_run.append(told.value)
        if kept[-1] == "after":
            assert model.card["config"]["algorithm"] == "ridge"
    assert sum(one in ("own", "constant") for one in kept) <= 1
    assert model.preparation.target is not None
    assert np.mean(of_run) * model.preparation.target.deviation**2 < 0.95 * np.mean(alone)


def test_classes_are_those_of_scikit_learn_with_probabilities(tmp_path: Path) -> None:
    x, y = tumours()
    other = {"bad": "good", "good": "bad"}
    slow = {"algorithm": "reptile", "reptile.inner-lr": 0.01, "adapt-steps": 1, "adapt-lrs": "0.001"}
    run = trained(tmp_path, x[200:], [other[label] for label in y[200:]], **slow)
    (model,) = adapt(run, written(tmp_path / "mine.csv", x[:60], y[:60]), tmp_path / "mine", target="target")
    assert model.card["score"]["kept"] == "own"
    assert model.card["temperature"] is None
    rows = predict(tmp_path / "mine", written(tmp_path / "fresh.csv", x[60:200], y[60:200])).rows
    expected = RidgeClassifierCV(PENALTIES).fit(scaled(x[:60], x[:60]), y[:60]).predict(scaled(x[60:200], x[:60]))
    assert [row["prediction"] for row in rows] == list(expected)
    bad, good = numbers(rows, "probability_bad"), numbers(rows, "probability_good")
    np.testing.assert_allclose(bad + good, 1, atol=1e-6)
    likely = np.where(np.array([row["target"] for row in rows]) == "bad", bad, good)
    share = np.mean(y[:60] == "bad")
    constant = np.where(y[60:200] == "bad", share, 1 - share)
    assert -np.log(likely).mean() < 0.5 * -np.log(constant).mean()


@pytest.mark.parametrize("classes", [False, True])
def test_the_constant_is_kept_where_nothing_is_better(misled: Path, tmp_path: Path, *, classes: bool) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(30, 4))
    source, y = misled, np.round(rng.normal(50, 5, size=30), 2)
    if classes:
        known, labels = tumours()
        source, y = trained(tmp_path, known[200:], labels[200:]), np.where(np.arange(30) % 5, "good", "bad")
    (model,) = adapt(source, written(tmp_path / "mine.csv", x, y), tmp_path / "mine", target="target")
    assert model.card["score"]["kept"] == "constant"
    assert "does better, and is the personal model" in in_words(model)
    rows = predict(tmp_path / "mine", written(tmp_path / "fresh.csv", rng.normal(size=(5, 4)), y[:5])).rows
    if classes:
        assert {row["prediction"] for row in rows} == {"good"}
        np.testing.assert_allclose(numbers(rows, "probability_bad"), (6 + 1) / (30 + 2), rtol=1e-5)
    else:
        np.testing.assert_allclose(numbers(rows), y.mean(), rtol=1e-6)
        assert (numbers(rows, "lower_90") < y.mean()).all()


def scores_of_18(zeros: int, margin: float) -> Scores:
    """16 rows of class 0 and 2 of class 1; a constant that says 0, and a model that is right about the 2 and about `zeros`.

    `margin`: between its two logits where it is right; it is 0.2 where it is wrong.
    """
    labels = np.array([0.0] * 16 + [1.0] * 2)
    right = np.array([1.0] * zeros + [0.0] * (16 - zeros) + [1.0] * 2)
    says = np.where(right > 0, labels, 1 - labels)
    logits = np.eye(2)[says.astype(int)] * np.where(right > 0, margin, 0.2)[:, None]
    nan = np.full(18, np.nan)
    each = {"constant": 1 - labels, "own": nan, "before": nan, "after": right}
    outputs = {"constant": np.log(np.tile([16 / 18, 2 / 18], (18, 1))), "own": np.tile(nan[:, None], 2), "after": logits}
    return Scores(each, labels, 5, outputs)


def test_the_constant_must_be_better_by_a_standard_error_and_by_the_log_loss() -> None:
    unsure, sure, nearly = scores_of_18(10, 0.2), scores_of_18(10, 4.0), scores_of_18(13, 0.2)
    # 16 right against 12: six rows more and two less, a mean of 0.222 with the standard error sqrt((8 / 18 - 0.222^2) / 17).
    assert unsure.log_loss("constant") == pytest.approx(-16 / 18 * np.log(16 / 18) - 2 / 18 * np.log(2 / 18))  # 0.349
    assert unsure.log_loss("after") == pytest.approx((12 * np.log1p(np.exp(-0.2)) + 6 * np.log1p(np.exp(0.2))) / 18)  # 0.665
    assert unsure.kept(ACCURACY, "after") == "constant"
    assert sure.log_loss("after") == pytest.approx((12 * np.log1p(np.exp(-4)) + 6 * np.log1p(np.exp(0.2))) / 18)  # 0.278
    assert sure.kept(ACCURACY, "after") == "after"
    # 16 against 15: three rows more and two less, 0.056 with the standard error 0.127.
    assert nearly.kept(ACCURACY, "after") == "after"


def test_the_command_can_be_told_to_keep_the_runs_model(misled: Path, tmp_path: Path) -> None:
    x, y = diabetes()
    data = written(tmp_path / "mine.csv", x[:60], y[:60])
    arguments = ["adapt", "--checkpoint", str(misled), "--data", str(data), "--target", "target", "--output"]
    done = CliRunner().invoke(cli, [*arguments, str(tmp_path / "mine"), "--no-own-rows"])
    assert done.exit_code == 0, done.output
    assert done.stdout.rstrip().endswith("; ridge on its own rows alone does better")
    assert load(tmp_path / "mine" / "mine.safetensors").card["config"]["algorithm"] == "ridge"


@pytest.mark.parametrize("deviation", [-1.0, "wide", 1e40])
def test_a_card_with_an_absurd_deviation_is_refused(kept: tuple[Path, Path], tmp_path: Path, deviation: Any) -> None:
    model = load(kept[0])
    card = {**model.card, "deviation": deviation}
    checkpoint.write(tmp_path / "x.safetensors", model.tensors, card, PERSONAL, wait=False)
    with pytest.raises(DataError, match="cannot be used: `deviation` is not what it should be"):
        load(tmp_path / "x.safetensors")
