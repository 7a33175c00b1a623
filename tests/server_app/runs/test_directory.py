"""The run directory: what is written, when, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from quickbloom.common.errors import ConfigError
from quickbloom.common.metric import ACCURACY, MSE
from quickbloom.server_app.runs.directory import RunDirectory, read_history, spread, to_json


def test_rounds_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    directory = RunDirectory.create(str(tmp_path / "a" / "b"), "x")
    assert read_history(directory.path) == []
    for number in (1, 2):
        directory.append_round({"round": number})
        assert read_history(directory.path)[-1] == {"round": number}
    with (directory.path / "history.jsonl").open("a") as file:
        file.write('{"round": 3, "tr')
    assert [record["round"] for record in read_history(directory.path)] == [1, 2]


def test_a_failing_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory.create(str(tmp_path), "x")
    directory.write_json("summary.json", {"schema": 1})
    with pytest.raises(TypeError):
        directory.write_json("summary.json", {"schema": object()})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        directory.write_json("summary.json", {"schema": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"schema": 1}


def test_per_task_lines_come_back_and_none_leave_no_file(tmp_path: Path) -> None:
    directory = RunDirectory.create(str(tmp_path), "x")
    directory.write_per_task([])
    assert not (tmp_path / "per_task.csv").exists()
    directory.write_per_task([{"task": "a, b", "score": 0.1}, {"task": "c", "score": 0.25}])
    with (tmp_path / "per_task.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"task": "a, b", "score": "0.1"}, {"task": "c", "score": "0.25"}]


def test_without_a_setting_every_run_gets_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {RunDirectory.create("", "digits-maml-seed0").path for _ in range(3)}
    assert len(paths) == 3
    assert all(path.parent == tmp_path / "quickbloom-runs" and path.is_dir() for path in paths)
    assert all(path.name.startswith("digits-maml-seed0-") for path in paths)


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    RunDirectory.create(str(tmp_path), "x").append_round({"round": 1})
    with pytest.raises(ConfigError, match=r"`output-dir` .* already holds a run"):
        RunDirectory.create(str(tmp_path), "x")


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="`output-dir` must be a directory that can be written"):
        RunDirectory.create(str(tmp_path / "file" / below), "x")


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    RunDirectory.create(str(tmp_path), "x")
    assert list(tmp_path.iterdir()) == []


def test_spread_by_hand() -> None:
    # Step 0: 1, 2, 3, 6: mean 3, deviations -2, -1, 0, 3, variance 14 / 3. With 3 degrees of freedom t is 3.1824:
    # half-width 3.1824 * sqrt(14 / 3 / 4). Step 1: all 5.
    values = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [6.0, 5.0]])
    result = spread(values, ACCURACY)
    assert result["mean"] == [3.0, 5.0]
    assert result["ci95"] == pytest.approx([3.182446 * (14 / 12) ** 0.5, 0.0])
    assert result["worst10"] == [1.0, 5.0]
    assert spread(values, MSE)["worst10"] == [6.0, 5.0]


@pytest.mark.parametrize(
    ("tasks", "higher", "worst"), [(10, True, 0.0), (20, True, 0.5), (29, True, 0.5), (20, False, 18.5), (1, True, 0.0)]
)
def test_worst_tenth_is_the_mean_over_the_worst_tenth_of_the_tasks(tasks: int, higher: bool, worst: float) -> None:
    values = np.random.default_rng(0).permutation(tasks).astype(float).reshape(-1, 1)
    assert spread(values, ACCURACY if higher else MSE)["worst10"] == [worst]


def test_the_spread_of_a_single_task_is_not_known() -> None:
    found = spread(np.array([[0.3, 0.4]]), ACCURACY)
    assert (found["mean"], found["worst10"]) == ([0.3, 0.4], [0.3, 0.4])
    assert json.loads(to_json(found))["ci95"] == [None, None]
