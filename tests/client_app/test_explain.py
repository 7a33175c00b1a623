"""`predict --explain`: permutation importance by column, and which columns moved the personal model from the shared one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.inspection import permutation_importance
from typer.testing import CliRunner

import quickbloom
from quickbloom import adapt, explain, predict
from quickbloom.client_app.cli import cli
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.personal import checkpoint

HEADER = "user,age,ward,noise,admitted,outcome"


def rows_of(user: str, number: int, *, dose: bool, seed: int = 0, sign: float = 1.0) -> list[str]:
    """The outcome hangs on the age, by a sign of the user's own, and on the ward; not on the noise."""
    rng = np.random.default_rng([seed, *user.encode()])
    rows = []
    for i in range(number):
        age, ward = rng.normal(50, 10), "abc"[i % 3]
        signal = sign * (age - 50) / 10 + {"a": 1.5, "b": 0.0, "c": -1.5}[ward] + 0.3 * rng.normal()
        outcome = f"{100 + 20 * signal:.2f}" if dose else ("ill" if signal > 0 else "well")
        rows.append(f"{user},{age:.2f},{ward},{rng.normal():.3f},2024-0{1 + i % 9}-1{i % 10},{outcome}")
    return rows


def written(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["classes", "numbers"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """A folder with a run, a model whose user has the other sign than all users of the training, and new rows of it."""
    folder, dose = tmp_path_factory.mktemp("made"), bool(request.param)
    data = written(folder / "all.csv", [row for user in "ABCDEFGH" for row in rows_of(user, 30, dose=dose)])
    more: dict[str, Any] = {
        "rounds": 40,
        "model": "linear",
        "settings": {"own.cyclic": "admitted", "ridge.outer-lr": 0.003, "own.scale": "task"},
        "progress": False,
    }
    quickbloom.run("ridge", data=data, task="user", target="outcome", output=folder / "run", **more)
    adapt(folder / "run", written(folder / "mine.csv", rows_of("Z", 60, dose=dose, sign=-1)), folder / "mine", folds=0)
    written(folder / "new.csv", rows_of("Z", 90, dose=dose, seed=1, sign=-1))
    return folder, dose


class Fitted:
    """What scikit-learn wants to see: the score is all it uses."""

    def fit(self) -> None: ...


def test_the_importance_is_that_of_scikit_learn_on_the_columns_of_the_file(made: tuple[Path, bool]) -> None:
    pandas = pytest.importorskip("pandas")
    folder, dose = made
    (found,) = explain(folder / "mine", folder / "new.csv", repeats=200)
    frame = pandas.read_csv(folder / "new.csv")
    x, y = frame[["age", "ward"]], frame["outcome"].to_numpy()

    def score_of(_: Any, columns: Any, y: Any) -> float:
        found = predict(folder / "mine", frame.assign(**columns, outcome=y)).table["prediction"].to_numpy()
        return -float(np.sqrt(np.mean((found - y) ** 2))) if dose else float((found == y).mean())

    theirs = permutation_importance(Fitted(), x, y, scoring=score_of, n_repeats=16, random_state=0)
    assert found.score == pytest.approx(abs(score_of(None, x, y)), rel=1e-4)
    assert found.rows == 90
    by_name = {one.column: one for one in found.columns}
    assert set(by_name) == {"age", "ward", "noise", "admitted"}
    for name, mean, spread in zip(x.columns, theirs.importances_mean, theirs.importances_std, strict=True):
        one = by_name[name]
        assert one.fall == pytest.approx(mean, abs=5 * one.fall_spread / 4)
        assert one.fall_spread == pytest.approx(spread, rel=0.7)
    assert [one.column for one in found.columns[:2]] in (["age", "ward"], ["ward", "age"])
    assert found.columns[0].fall > 5 * abs(by_name["noise"].fall)


def test_what_moved_is_the_difference_to_the_shared_model(made: tuple[Path, bool], tmp_path: Path) -> None:
    folder, _ = made
    (found,) = explain(folder / "mine", folder / "new.csv", folder / "run")
    by_name: dict[str, Any] = {one.column: one for one in found.columns}
    # The user's age works the other way, so shuffling it makes the shared model better; the ward is as everybody's.
    assert by_name["age"].shared < 0 < by_name["age"].fall
    assert by_name["age"].moved > by_name["age"].fall
    assert by_name["age"].moved > 5 * abs(by_name["noise"].moved)
    assert all(one.moved == pytest.approx(one.fall - one.shared) for one in by_name.values())
    # The shared model alone, as a personal model that took no step.
    start = checkpoint.load(folder / "run", print)
    facts = {**start.facts, "adapt": {"lr": 0.1, "steps": 0}}
    checkpoint.write(tmp_path / "start.safetensors", start.tensors, facts, wait=False)
    adapt(tmp_path / "start.safetensors", folder / "mine.csv", tmp_path / "shared", folds=0)
    (alone,) = explain(tmp_path / "shared", folder / "new.csv")
    assert found.shared_score == alone.score
    assert {one.column: one.fall for one in alone.columns} == {name: one.shared for name, one in by_name.items()}


def test_the_command_prints_a_table_or_json(made: tuple[Path, bool], tmp_path: Path) -> None:
    folder, dose = made
    arguments = ["predict", "--model", str(folder / "mine"), "--input", str(folder / "new.csv"), "--explain"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    first, head, *rest = done.stdout.splitlines()
    assert first.startswith(f"Z: {'rmse' if dose else 'accuracy'} ")
    assert " on 90 rows; worse by, when a column is shuffled (10 times, ± standard deviation):" in first
    assert head.split() == ["column", "Z"]
    assert {line.split()[0] for line in rest} == {"age", "ward", "noise", "admitted"}
    assert "is said with `--checkpoint`" in done.stderr
    more = CliRunner().invoke(cli, [*arguments, "--checkpoint", str(folder / "run"), "--json"])
    (facts,) = json.loads(more.stdout)
    (found,) = explain(folder / "mine", folder / "new.csv", folder / "run")
    assert facts == found.to_json()
    assert facts["adapted_to"] is False
    own = CliRunner().invoke(cli, [*arguments[:3], "--input", str(folder / "mine.csv"), "--explain"])
    assert " on 60 rows that it was adapted to; worse by" in own.stdout
    output = ["--output", str(tmp_path / "out.csv")]
    assert CliRunner().invoke(cli, [*arguments, *output]).exit_code == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 91


def test_what_cannot_be_explained_is_refused(made: tuple[Path, bool], tmp_path: Path) -> None:
    folder, _ = made
    bare = tmp_path / "bare.csv"
    bare.write_text("\n".join(line.rsplit(",", 1)[0] for line in (folder / "new.csv").read_text().splitlines()) + "\n")
    with pytest.raises(DataError, match=r"hold no two rows of one task with a target \(`outcome`\), without which nothing"):
        explain(folder / "mine", bare)
    start = checkpoint.load(folder / "run", print)
    checkpoint.write(tmp_path / "other.safetensors", start.tensors, {**start.facts, "round": 39}, wait=False)
    with pytest.raises(DataError, match=r"\(round 39\) is not what the personal model of 'Z' was adapted from \(round 40 of"):
        explain(folder / "mine", folder / "new.csv", tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="`repeats` must be 2 or more, got 1"):
        explain(folder / "mine", folder / "new.csv", repeats=1)
    for flag in (["--json"], ["--checkpoint", str(folder / "run")]):
        done = CliRunner().invoke(cli, ["predict", "--model", str(folder / "mine"), "--input", str(folder / "new.csv"), *flag])
        assert f"`{flag[0]}` is for `--explain`" in str(done.exception)


def test_images_have_no_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "all.npz",
        task=np.repeat(list("ABCDE"), 12),
        image=rng.integers(0, 255, (60, 8, 8)).astype(np.uint8),
        target=np.tile(["a", "b"], 30),
    )
    quickbloom.run("protonet", data=tmp_path / "all.npz", rounds=1, output=tmp_path / "run", progress=False)
    adapt(tmp_path / "run", tmp_path / "all.npz", tmp_path / "mine", folds=0)
    with pytest.raises(DataError, match="are images, which have no columns: predict without `--explain`"):
        explain(tmp_path / "mine", tmp_path / "all.npz")
