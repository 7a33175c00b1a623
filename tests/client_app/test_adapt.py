"""`quickbloom-edge adapt`: all rows of a device are adapted to, and what that is worth comes from cross-validation."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import LoopbackGrid
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.metrics import log_loss
from typer.testing import CliRunner

from quickbloom import adapt, predict
from quickbloom.client_app.cli import cli
from quickbloom.client_app.personal_models import in_words
from quickbloom.common.baselines.own_ridge import PENALTIES
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.row_order import folds
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.maths.batch import Batch
from quickbloom.common.personal import checkpoint, cross_validation
from quickbloom.common.personal.model import Personal, load, save
from quickbloom.server_app.app import run_federation

HEADER = "marker,sex,outcome"


def rows_of(seed: int, number: int, *, dose: bool, sign: float = 1.0) -> list[str]:
    """Rows whose outcome hangs on the marker, with noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        marker = rng.normal(3, 2)
        signal = sign * (marker - 3) + rng.normal(0, 1)
        outcome = f"{200 + 10 * signal:.2f}" if dose else ("ill" if signal > 0 else "well")
        rows.append(f"{marker:.3f},{'mf'[i % 2]},{outcome}")
    return rows


def written(path: Path, rows: list[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def trained(folder: Path, *, dose: bool = False, **more: Any) -> Path:
    """The state directory of a node after a run on eight wards, in half of which the marker is turned round."""
    rows = [f"w{ward},{row}" for ward in range(8) for row in rows_of(ward, 30, dose=dose, sign=(-1) ** ward)]
    written(folder / "wards.csv", rows, f"ward,{HEADER}")
    settings: dict[str, Any] = {"dataset": "own", "own.task-column": "ward", "own.target-column": "outcome", "min-nodes": 1}
    settings |= {"rounds": 5, "evaluate-every": 0, "mlp.hidden": "8", "adapt-steps": 5, "algorithm": "fomaml", **more}
    settings = {"own.scale": "task", **settings}  # each fold is standardised by the rows that a model adapts to
    config = parse_run_config({**settings, "output-dir": str(folder / "run")})
    node = {"data-path": str(folder / "wards.csv"), "state-dir": str(folder / "state")}
    run_federation(LoopbackGrid(1, config.flat(), node_configs={0: node}), config)
    return folder / "state"


@pytest.fixture(scope="module", params=[False, True], ids=["classes", "numbers"])
def state(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    return trained(tmp_path_factory.mktemp("trained"), dose=request.param), request.param


def errors_on(model: Path, data: Path) -> list[float]:
    """1 for a wrong class and 0 for a right one, or the squared error in the target's unit, from the file that users read."""
    output = data.with_suffix(".predicted.csv")
    done = CliRunner().invoke(cli, ["predict", "--model", str(model), "--input", str(data), "--output", str(output)])
    assert done.exit_code == 0, done.output
    with output.open(newline="") as file:
        pairs = [(row["prediction"], row["target"]) for row in csv.DictReader(file)]
    if all(target in ("ill", "well") for _, target in pairs):
        return [float(prediction != target) for prediction, target in pairs]
    return [(float(prediction) - float(target)) ** 2 for prediction, target in pairs]


def test_the_score_is_that_of_models_that_adapted_to_files_without_the_rows_they_are_scored_on(
    state: tuple[Path, bool], tmp_path: Path
) -> None:
    folder, dose = state
    rows = rows_of(99, 23, dose=dose)
    data = written(tmp_path / "mine.csv", rows)
    (model,) = adapt(folder, data, tmp_path / "mine")
    schema = model.card["schema"]
    own = Own(OwnOptions(path=str(data), task_name="mine", target_column="outcome"), Path(), schema, whole=True)
    targets = np.array([row.split(",")[2] for row in rows])
    fold, number = folds(own.content, np.zeros(23) if dose else (targets == "well").astype(float), 5)
    assert (number, len(rows)) == (5, model.card["score"]["test"])
    errors: list[float] = []
    guesses: list[float] = []
    for one in range(number):
        fit, held = ([row for row, at in zip(rows, fold, strict=True) if (at == one) == where] for where in (False, True))
        adapt(folder, written(tmp_path / f"fit{one}.csv", fit), tmp_path / f"m{one}", folds=0)
        errors += errors_on(tmp_path / f"m{one}", written(tmp_path / f"held{one}.csv", held))
        known, wanted = targets[fold != one], targets[fold == one]
        if dose:
            guesses += ((known.astype(float).mean() - wanted.astype(float)) ** 2).tolist()
        else:
            labels, counts = np.unique(known, return_counts=True)
            guesses += (labels[counts.argmax()] != wanted).tolist()
    unit = targets.astype(float).var() if dose else 1.0
    score = model.card["score"]
    alone = own_errors(rows, fold, dose=dose)
    assert (score["own"] if dose else 1 - score["own"]) == pytest.approx(np.mean(alone) / unit, rel=1e-4)
    for name, each in (("after", errors), ("own", alone), ("constant", guesses)):
        assert score["interval"][name] == pytest.approx(interval_by_scipy(np.array(each) / unit, dose=dose), rel=1e-3)
    after, constant = (score[name] if dose else 1 - score[name] for name in ("after", "constant"))
    assert after == pytest.approx(np.mean(errors) / unit, rel=1e-4)
    assert constant == pytest.approx(np.mean(guesses) / unit, rel=1e-4)
    assert f"cross-validated on 23 rows in 5 folds{'; rmse ' if dose else ''}" in in_words(model)
    if dose:
        assert f" {np.sqrt(np.mean(guesses)):.4g} by the mean, in the unit of the target" in in_words(model)
        assert f", {np.sqrt(np.mean(alone)):.4g} by ridge, " in in_words(model)


def own_errors(rows: list[str], fold: Any, *, dose: bool) -> list[float]:
    """Errors, fold by fold, of scikit-learn's ridge on the rows of the other folds, prepared as docs/own-data.md says."""
    cells = [row.split(",") for row in rows]
    markers = np.array([float(marker) for marker, _, _ in cells])
    sexes = np.array([[sex == "m", sex == "f"] for _, sex, _ in cells], dtype=float)
    found: list[float] = []
    for one in range(max(fold) + 1):
        fit, held = fold != one, fold == one
        scaled = (markers - markers[fit].mean()) / markers[fit].std()
        x = np.concatenate([scaled[:, None], sexes], axis=1)
        if dose:
            y = np.array([float(cell) for _, _, cell in cells])
            model = RidgeCV(PENALTIES).fit(x[fit], (y[fit] - y[fit].mean()) / y[fit].std())
            found += ((model.predict(x[held]) * y[fit].std() + y[fit].mean() - y[held]) ** 2).tolist()
        else:
            labels = np.array([cell for _, _, cell in cells])
            found += (RidgeClassifierCV(PENALTIES).fit(x[fit], labels[fit]).predict(x[held]) != labels[held]).tolist()
    return found


def interval_by_scipy(errors: Any, *, dose: bool) -> tuple[float, float]:
    stats = pytest.importorskip("scipy.stats")
    if not dose:
        ends = stats.binomtest(int((1 - errors).sum()), len(errors)).proportion_ci(method="wilson")
        return ends.low, ends.high
    low, high = stats.t.interval(0.95, len(errors) - 1, errors.mean(), stats.sem(errors))
    return max(0.0, low), high


def test_what_the_own_rows_or_a_constant_do_better_is_said(tmp_path: Path) -> None:
    folder = trained(tmp_path, dose=True)
    line = [f"{i / 3:.3f},{'mf'[i % 2]},{7 * i}" for i in range(30)]  # which ridge has without error, and five steps have not
    (model,) = adapt(folder, written(tmp_path / "line.csv", line), tmp_path / "mine")
    assert in_words(model).endswith("; ridge on its own rows alone does better, and is the personal model")
    assert model.card["score"]["best"] == model.card["score"]["kept"] == "own"
    assert model.card["score"]["own"] < 0.01 * model.card["score"]["after"]
    (other,) = adapt(folder, tmp_path / "line.csv", tmp_path / "mine", own_rows=False)
    assert in_words(other).endswith("; ridge on its own rows alone does better")
    assert other.card["score"] == {**model.card["score"], "kept": "after", "own_rows": False}
    rng = np.random.default_rng(4)
    noise = [f"{rng.normal():.3f},{'mf'[i % 2]},{rng.normal():.3f}" for i in range(12)]
    (model,) = adapt(folder, written(tmp_path / "noise.csv", noise), tmp_path / "mine")
    assert in_words(model).endswith("; the mean of its own targets does as well")
    assert (model.card["score"]["best"], model.card["score"]["kept"]) == ("constant", "before")  # within chance
    # Far more rows than a device has: no ridge, and all else as before.
    few = cross_validation.own_ridge(Batch.of(torch.zeros(10, 4), torch.zeros(10, 1)), 0)
    many = cross_validation.own_ridge(Batch.of(torch.zeros(1, 1).expand(40_000, 600), torch.zeros(40_000, 1)), 0)
    assert (few is None, many) == (False, None)


def over_confident(folder: Path) -> Path:
    """A checkpoint whose model divides its distances by a twentieth of what it was trained with."""
    state = trained(folder, algorithm="protonet")
    found = checkpoint.read(state / "meta.safetensors", checkpoint.CHECKPOINT, "checkpoint")
    facts = {**found.facts, "config": {**found.facts["config"], "protonet.temperature": 0.05}}
    checkpoint.write(folder / "sure.safetensors", found.tensors, facts, wait=False)
    return folder / "sure.safetensors"


def calibration(model: Path, data: Path) -> tuple[float, float]:
    """(log loss by scikit-learn, expected calibration error in ten bins) of the predictions for a file."""
    rows = predict(model, data).rows
    shares = np.array([[float(row["probability_ill"]), float(row["probability_well"])] for row in rows])
    right = np.array([row["prediction"] == row["target"] for row in rows])
    sure = shares.max(axis=1)
    bins = np.minimum((10 * sure).astype(int), 9)
    gaps = [(bins == one).mean() * abs(sure[bins == one].mean() - right[bins == one].mean()) for one in np.unique(bins)]
    return float(log_loss([row["target"] for row in rows], shares, labels=["ill", "well"])), float(sum(gaps))


def one_in_four_wrong(rows: list[str]) -> list[str]:
    other = {"ill": "well", "well": "ill"}
    parts = [row.rsplit(",", 1) for row in rows]
    return [f"{cells},{label if i % 4 else other[label]}" for i, (cells, label) in enumerate(parts)]


def test_the_temperature_makes_an_over_confident_model_right_about_rows_that_it_has_not_seen(tmp_path: Path) -> None:
    source = over_confident(tmp_path)
    fresh = written(tmp_path / "fresh.csv", one_in_four_wrong(rows_of(7, 1000, dose=False)))
    gains = []
    for seed in (1, 2, 3):
        (model,) = adapt(
            source, written(tmp_path / "mine.csv", one_in_four_wrong(rows_of(seed, 60, dose=False))), tmp_path / "mine"
        )
        assert model.card["temperature"] > 1.2
        before = [row["prediction"] for row in predict(tmp_path / "mine", fresh).rows]
        cooled = calibration(tmp_path / "mine", fresh)
        save(Personal(model.tensors, {**model.card, "temperature": None}), tmp_path / "mine" / "mine.safetensors")
        assert [row["prediction"] for row in predict(tmp_path / "mine", fresh).rows] == before
        raw = calibration(tmp_path / "mine", fresh)
        gains.append(np.subtract(raw, cooled))
    assert (np.array(gains)[:, 0] > 0).all()
    assert (np.mean(gains, axis=0) > [0.2, 0.1]).all()


def test_a_temperature_takes_twenty_rows_and_a_gain_beyond_chance(tmp_path: Path) -> None:
    source = over_confident(tmp_path)
    coin = [f"{i % 5},{'mf'[i % 2]},{'ill' if i % 3 else 'well'}" for i in range(60)]
    temperatures = []
    for number in (18, 60):
        (model,) = adapt(source, written(tmp_path / "mine.csv", coin[:number]), tmp_path / "mine", own_rows=False)
        temperatures.append(model.card["temperature"])
    assert temperatures[0] is None
    assert temperatures[1] > 5
    # Not computed from rows that the model adapted to, of which it is sure: by those it would be below 1.
    y = np.arange(24) % 2
    logits = np.where(np.eye(2)[y] > 0, 1.1, -1.1) * np.where(np.arange(24) < 22, 1, -1)[:, None]  # right in 22 of 24
    scores = cross_validation.Scores({}, y.astype(float), 5, {"after": logits})
    assert scores.temperature("after") is None  # 0.90 said, 0.92 found
    sure = cross_validation.Scores({}, y.astype(float), 5, {"after": 10 * logits})
    # exp(2.2 / T) = (rows right + 1/26 ...) worked out: the mean of the smoothed labels is (22 * 25/26 + 2 * 1/26) / 24.
    share = (22 * 25 / 26 + 2 / 26) / 24
    assert sure.temperature("after") == pytest.approx(22 / np.log(share / (1 - share)), rel=1e-6)
    few = cross_validation.Scores({}, y[:19].astype(float), 5, {"after": 10 * logits[:19]})
    assert few.temperature("after") is None


def test_in_order_of_time_a_fold_is_scored_by_a_model_of_the_rows_before_it(state: tuple[Path, bool], tmp_path: Path) -> None:
    """23 rows in six blocks, which end after the rows 4, 8, 12, 15 and 19 in the order of the marker; five are scored."""
    folder, dose = state
    rows = rows_of(99, 23, dose=dose)
    (model,) = adapt(folder, written(tmp_path / "mine.csv", rows), tmp_path / "mine", time="marker")
    in_order = sorted(rows, key=lambda row: float(row.split(",")[0]))
    errors: list[float] = []
    for start, end in ((4, 8), (8, 12), (12, 15), (15, 19), (19, 23)):
        adapt(folder, written(tmp_path / f"fit{start}.csv", in_order[:start]), tmp_path / f"m{start}", folds=0)
        errors += errors_on(tmp_path / f"m{start}", written(tmp_path / f"held{start}.csv", in_order[start:end]))
    score, targets = model.card["score"], np.array([row.split(",")[2] for row in rows])
    unit = targets.astype(float).var() if dose else 1.0
    assert (score["test"], score["folds"]) == (19, 5)
    assert (score["after"] if dose else 1 - score["after"]) == pytest.approx(np.mean(errors) / unit, rel=1e-4)
    assert "on 19 rows in 5 folds, each by a model of the rows before it" in in_words(model)
    with pytest.raises(DataError, match="no column `day`"):
        adapt(folder, tmp_path / "mine.csv", tmp_path / "no", time="day")


def test_what_shows_in_a_devices_own_rows_is_remarked_on(tmp_path: Path) -> None:
    """The marker follows the outcome closely here, and the file stands in its order: a leak and a series, said beforehand."""
    folder = trained(tmp_path, dose=True)
    said: list[str] = []
    rows = [f"{i / 10:.1f},{'mf'[i % 2]},{200 + 10 * np.sin(i / 6):.2f}" for i in range(40)]
    adapt(folder, written(tmp_path / "mine.csv", rows), tmp_path / "mine", say=said.append)
    assert [sentence for sentence in said if sentence.startswith("Remark: rows that are neighbours in `marker`")]
    rows = [f"{i / 10:.1f},{'mf'[i % 2]},{200 + i + 2 * (i % 3)}.5" for i in np.random.default_rng(0).permutation(40)]
    said.clear()
    adapt(folder, written(tmp_path / "other.csv", rows), tmp_path / "other", say=said.append)
    assert [sentence for sentence in said if sentence.startswith("Remark: the column `marker` has a correlation of 0.99")]


def test_all_labelled_rows_are_adapted_to_and_unlabelled_ones_are_left(state: tuple[Path, bool], tmp_path: Path) -> None:
    folder, dose = state
    rows = [*rows_of(99, 20, dose=dose), "1.0,m,", "2.0,f,"]
    (model,) = adapt(folder, written(tmp_path / "mine.csv", rows), tmp_path / "mine")
    assert model.card["adapted"]["support"] == 20
    assert model.card["score"]["test"] == 20
    with pytest.raises(DataError, match=r"no task of .* can be used: 1 task is left out: none \(it has no row with a target\)"):
        adapt(folder, written(tmp_path / "none.csv", ["1.0,m,", "2.0,f,"]), tmp_path / "none")


def test_one_row_of_a_number_is_enough(tmp_path: Path) -> None:
    folder = trained(tmp_path, dose=True)
    said: list[str] = []
    (model,) = adapt(folder, written(tmp_path / "one.csv", ["3.0,m,205.5"]), tmp_path / "one", say=said.append)
    assert "from 1 row: adapted in" in in_words(model)
    assert any("support part of 1 task are the same" in sentence for sentence in said)
    (found,) = predict(tmp_path / "one", tmp_path / "one.csv").rows
    assert abs(float(found["prediction"]) - 205.5) < 3  # its mean is 205.5, its deviation is taken for 1


def with_rate(folder: Path, target: Path, lr: float) -> Path:
    """A copy of a node's checkpoint that is to be adapted with another rate."""
    found = checkpoint.read(folder / "meta.safetensors", checkpoint.CHECKPOINT, "checkpoint")
    checkpoint.write(target, found.tensors, {**found.facts, "adapt": {"lr": lr, "steps": 5}}, wait=False)
    return target


def test_a_model_that_adapting_makes_worse_stays_the_shared_one(tmp_path: Path) -> None:
    folder = trained(tmp_path, dose=True)
    source = with_rate(folder, tmp_path / "fast.safetensors", 300.0)
    data = written(tmp_path / "mine.csv", rows_of(99, 20, dose=True))
    (model,) = adapt(source, data, tmp_path / "mine", own_rows=False)
    score = model.card["score"]
    assert score["kept"] == "before"
    assert score["after"] is None or score["after"] > score["before"]
    meta = checkpoint.load(source, print).meta
    assert all(torch.equal(value, meta[name]) for name, value in model.tensors.items())
    assert "adapting made it worse, so the shared model stays as it was" in in_words(model)
    assert load(tmp_path / "mine" / "mine.safetensors").card["adapted"]["steps"] == 0
    (again,) = predict(tmp_path / "mine", data).scores
    assert again.value == score["before"]
    # Without a score nobody can tell, and what is not finite is no model.
    with pytest.raises(DataError, match="is not finite: adapt with a lower rate"):
        adapt(with_rate(folder, tmp_path / "mad.safetensors", 1e20), data, tmp_path / "mad", folds=0)


def test_one_task_that_diverges_is_named_and_the_others_are_written(tmp_path: Path) -> None:
    folder = trained(tmp_path, dose=True)
    source = with_rate(folder, tmp_path / "fast.safetensors", 1e4)
    # Of one row all inputs are 0, so only intercepts move, and five steps do not overflow.
    many = [f"{name},{row}" for name in "ac" for row in rows_of(99, 20, dose=True)]
    arguments = ["adapt", "--checkpoint", str(source), "--output", str(tmp_path / "mine"), "--folds", "0", "--data"]
    data = written(tmp_path / "three.csv", ["b,3.0,m,205.5", *many], f"ward,{HEADER}")
    done = CliRunner().invoke(cli, [*arguments, str(data)])
    assert done.exit_code == 0
    assert [path.name for path in (tmp_path / "mine").iterdir() if path.suffix != ".json"] == ["b.safetensors"]
    for name in "ac":
        assert f"No model: the personal model of the task '{name}' is not finite: adapt with a lower rate" in done.stderr
    none = CliRunner().invoke(cli, [*arguments, str(written(tmp_path / "two.csv", many, f"ward,{HEADER}"))])
    assert isinstance(none.exception, DataError)  # which ends the command with the exit code 2
    assert "No model: the personal model of the task 'a' is not finite" in none.stderr
    assert "the task 'c' is not finite" in str(none.exception)


def test_a_starting_point_that_gives_all_classes_alike_is_no_model_to_keep(tmp_path: Path) -> None:
    """Without prototypes every class is as near: were that kept, 18 of 20 right would be all it ever says."""
    folder = trained(tmp_path, algorithm="protonet")
    noise = [f"{i % 7},{'mf'[i % 2]},{'ill' if i % 10 else 'well'}" for i in range(20)]
    (model,) = adapt(folder, written(tmp_path / "mine.csv", noise), tmp_path / "mine", own_rows=False)
    score = model.card["score"]
    assert (score["before"], score["constant"], score["kept"]) == (0.9, 0.9, "after")
    assert score["after"] < 0.9
    assert model.tensors["known"].tolist() == [1.0, 1.0]
    assert "; adapting made it worse: more rows" in in_words(model)
    assert in_words(model).endswith("; its most frequent class alone does as well")


def test_the_command_says_what_a_model_is_worth_and_what_a_constant_is(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    data = written(tmp_path / "mine.csv", rows_of(98, 40, dose=False))
    arguments = ["adapt", "--checkpoint", str(folder), "--data", str(data), "--output", str(tmp_path / "mine")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    found = load(tmp_path / "mine" / "mine.safetensors").card["score"]
    assert done.stdout.startswith(
        f"Personal model of mine (round 5) from 40 rows: accuracy {100 * found['before']:.1f} % before, "
        f"{100 * found['after']:.1f} % after "
    )
    assert f", {100 * found['constant']:.1f} % by its most frequent class alone; cross-validated on 40 rows in 5" in done.stdout
    none = CliRunner().invoke(cli, [*arguments, "--folds", "0"])
    assert none.stdout.rstrip().endswith(", not scored")
    with pytest.raises(ConfigError, match="`--folds` must be 2 or more, or 0 for a model without a score, got 1"):
        adapt(folder, data, tmp_path / "mine", folds=1)


def test_the_name_of_the_file_changes_neither_model_nor_score(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    rows = rows_of(97, 30, dose=False)
    first, second = (adapt(folder, written(tmp_path / f"{n}.csv", rows), tmp_path / n)[0] for n in ("a", "ward 12"))
    assert first.task != second.task
    assert first.card["score"] == second.card["score"]
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())


def test_a_model_that_compares_rows_needs_two(tmp_path: Path) -> None:
    """Batch norm over one row of one pixel has nothing to divide by."""
    rng = np.random.default_rng(0)

    def images(path: Path, tasks: str, number: int) -> Path:
        size = len(tasks) * number
        pixels = rng.integers(0, 255, (size, 8, 8)).astype(np.uint8)
        np.savez(path, task=np.repeat(list(tasks), number), image=pixels, target=rng.normal(size=size))
        return path

    data = images(tmp_path / "all.npz", "ABCDE", 12)
    settings: dict[str, Any] = {"dataset": "own", "min-nodes": 1, "rounds": 1, "evaluate-every": 0, "algorithm": "fomaml"}
    settings |= {"conv4.norm": "batch", "conv4.filters": 4, "output-dir": str(tmp_path / "run")}
    config = parse_run_config(settings)
    run_federation(LoopbackGrid(1, config.flat(), node_configs={0: {"data-path": str(data)}}), config)
    with pytest.raises(DataError, match=r"the task 'Z' must have two rows with a target for this model, .* got 1"):
        adapt(tmp_path / "run", images(tmp_path / "one.npz", "Z", 1), tmp_path / "mine")
    said: list[str] = []
    one, four = (dict(np.load(images(tmp_path / f"{task}.npz", task, number))) for task, number in (("X", 1), ("Y", 4)))
    both: dict[str, Any] = {name: np.concatenate([one[name], four[name]]) for name in one}
    np.savez(tmp_path / "both.npz", **both)
    (model,) = adapt(tmp_path / "run", tmp_path / "both.npz", tmp_path / "mine", say=said.append)
    assert model.task == "Y"
    assert any("No model: the task 'X' must have two rows with a target" in sentence for sentence in said)
    (model,) = adapt(tmp_path / "run", images(tmp_path / "four.npz", "Z", 4), tmp_path / "mine")
    assert (model.card["score"]["test"], model.card["score"]["folds"]) == (4, 2)
