"""The face of the package: `quickbloom.run` and its like, as a script and a notebook use them."""

import csv
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import quickbloom
from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.algorithms.fomaml import FoMaml
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.comparing.comparison import planned
from quickbloom.server_app.events.kinds import Event

SMALL: dict[str, Any] = {"dataset": "gaussian", "rounds": 2, "progress": False, "evaluate_every": 1}


def arrays() -> dict[str, np.ndarray]:
    """Eight tasks of twenty rows; the class is the sign of the one feature."""
    x = np.random.default_rng(0).normal(size=160)
    return {"x": x, "target": np.where(x > 0, "up", "down"), "task": np.array([f"t{i % 8}" for i in range(160)])}


def column(table: Any, name: str) -> list[Any]:
    return list(table[name])


def test_a_run_returns_what_it_left_on_the_disk(tmp_path: Path) -> None:
    done = quickbloom.run("fomaml", output=tmp_path / "run", inner_lr=0.2, **SMALL)
    assert done.directory == tmp_path / "run"
    assert done.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["fomaml.inner-lr"] == 0.2
    with (tmp_path / "run" / "per_task.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert column(done.per_task, "task") == [row["task"] for row in rows]
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert column(done.history, "round") == [1, 2]
    assert column(done.history, "loss") == [line["train"]["loss"] for line in lines]
    assert column(done.history, "validation_before") == [line["validation"]["accuracy"][0] for line in lines]
    assert "test task" in repr(done)
    assert "fomaml on gaussian" in done._repr_html_()


def test_two_runs_in_one_process_are_the_same_and_leave_the_process_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        first, second = (quickbloom.run("fomaml", output=tmp_path / name, **SMALL) for name in ("a", "b"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert first.summary["test"] == second.summary["test"]


def test_every_event_is_told(tmp_path: Path) -> None:
    events: list[Event] = []
    quickbloom.run("fomaml", output=tmp_path / "run", listener=events.append, **SMALL)
    kinds = [event.kind for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "end"
    assert kinds.count("round") == 2


def test_arrays_and_frames_are_data_of_ones_own(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"rounds": 2, "progress": False}
    mapped = quickbloom.run("fomaml", data=arrays(), output=tmp_path / "arrays", **arguments)
    assert sum(mapped.summary["tasks"].values()) == 8
    if find_spec("pandas") is None:
        pytest.skip("needs pandas for the second half")
    import pandas

    frame = quickbloom.run("fomaml", data=pandas.DataFrame(arrays()), output=tmp_path / "frame", **arguments)
    assert frame.summary["test"] == mapped.summary["test"]


def test_time_is_the_same_in_python_and_on_the_command_line(tmp_path: Path) -> None:
    """The class of a task turns halfway through its series, so the past tells nothing of the test part; shuffled it would."""
    day = np.repeat(np.arange(20), 8)
    data: dict[str, Any] = arrays() | {"day": day, "target": np.where((arrays()["x"] > 0) == (day < 10), "up", "down")}
    done = quickbloom.run("fomaml", data=data, time="day", rounds=2, output=tmp_path / "python", progress=False)
    assert json.loads((tmp_path / "python" / "config.json").read_text())["own.time-column"] == "day"
    np.savez(tmp_path / "data.npz", **data)
    arguments = ["--algorithm", "fomaml", "--data", str(tmp_path / "data.npz"), "--rounds", "2", "--in-process", "--no-report"]
    typed = CliRunner().invoke(cli, ["run", *arguments, "--json", "--time", "day", "--output", str(tmp_path / "typed")])
    assert typed.exit_code == 0, typed.output
    assert json.loads(typed.stdout)["test"] == done.summary["test"]
    shuffled = quickbloom.run("fomaml", data=data, rounds=2, output=tmp_path / "shuffled", progress=False)
    assert shuffled.summary["test"] != done.summary["test"]
    plan = planned(["fomaml"], data=str(tmp_path / "data.npz"), time="day", rounds=2)
    assert "own.time-column=day" in plan.settings
    with pytest.raises(ConfigError, match="`--text` and `--encoder` are about a file"):
        quickbloom.run("fomaml", time="day")


def test_names_of_tasks_stay_text(tmp_path: Path) -> None:
    data = arrays() | {"task": np.array([str(i % 8) for i in range(160)])}
    done = quickbloom.run("fomaml", data=data, rounds=1, output=tmp_path / "run", progress=False)
    assert set(column(done.per_task, "task")) <= {str(i) for i in range(8)}


def test_wrong_input_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"`data` must be a path, a pandas or polars DataFrame, or arrays by column, got int"):
        quickbloom.run("fomaml", data=3)
    with pytest.raises(ConfigError, match="`algorithm` must be one of"):
        quickbloom.run("no-such")
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        quickbloom.walk  # noqa: B018


def test_an_own_algorithm_is_registered_under_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("quickbloom.common.algorithms", "quickbloom.session"):
        monkeypatch.setattr(f"{module}.ALGORITHMS", known := dict(ALGORITHMS))

    class Mine(FoMaml):
        name = "mine"

    class Taken(FoMaml):
        name = "maml"

    assert quickbloom.register(Mine) is Mine
    assert known["mine"] is Mine
    with pytest.raises(ConfigError, match="`name` of Taken must be one that no other has, got 'maml'"):
        quickbloom.register(Taken)
    with pytest.raises(ConfigError, match="takes a subclass of Algorithm, Dataset or Model, got 3"):
        quickbloom.register(3)  # type: ignore[type-var]


def test_importing_the_package_is_cheap_and_a_script_needs_no_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, quickbloom\nassert not {'torch', 'flwr', 'numpy'} & set(sys.modules), 'heavy'\n"
        "for seed in (0, 1):\n"
        "    done = quickbloom.run('fomaml', dataset='gaussian', rounds=1, seed=seed, output=f'run{seed}', progress=False)\n"
        "    print(done.summary['seed'], done.directory.name)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 run0", "1 run1"]
