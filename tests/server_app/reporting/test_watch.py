"""`quickbloom watch`: what it reads of a run's directory, while that grows, is written anew, or stops."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.reporting.watch import Watched, going_on, newest, watch
from quickbloom.server_app.runs.directory import RunDirectory

CONFIG = {"algorithm": "maml", "dataset": "digits", "seed": 4, "rounds": 10}


def record(number: int, **more: Any) -> dict[str, Any]:
    line = {"round": number, "train": {"loss": 1 / number, "tasks": 3}, "bytes": {"up": 10, "down": 30}, "seconds": 2.0}
    return {**line, "failures": [], "nodes": {"asked": 3, "answered": 2, "away": [], "late": {}}, **more}


def append(directory: Path, *records: dict[str, Any], ending: str = "\n") -> None:
    with (directory / "history.jsonl").open("a") as file:
        file.write("\n".join(json.dumps(line) for line in records) + ending)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def shown(directory: Path, *, once: bool = True) -> tuple[str, bool]:
    console = Console(width=200, record=True, force_terminal=False, quiet=False)
    with console.capture() as capture:
        fine = watch(directory, console, once=once, pause=0.01)
    return capture.get(), fine


def test_rounds_are_read_once_and_a_torn_line_waits(run: Path) -> None:
    watched = Watched(run)
    assert watched.read() == []
    append(run, record(1), record(2))
    append(run, record(3), ending="")
    assert [line["round"] for line in watched.read()] == [1, 2]
    append(run, ending="\n")
    assert [line["round"] for line in watched.read()] == [3]
    assert watched.read() == []
    assert watched.round == 3
    assert watched.traffic == 120
    assert watched.seconds_left == 14.0  # 7 rounds of 2 s


def test_a_history_that_is_written_anew_is_read_anew(run: Path) -> None:
    watched = Watched(run)
    append(run, *(record(number) for number in range(1, 6)))
    watched.read()
    RunDirectory(run).write_rounds([record(1), record(2)])
    assert [line["round"] for line in watched.read()] == [1, 2]
    assert watched.round == 2
    assert watched.traffic == 80
    assert watched.total == 10


def test_another_history_is_read_anew_even_if_it_is_longer(run: Path) -> None:
    watched = Watched(run)
    append(run, record(1), record(2))
    watched.read()
    RunDirectory(run).write_rounds([record(number, seconds=12.345678) for number in range(1, 8)])
    assert [line["round"] for line in watched.read()] == list(range(1, 8))
    assert watched.traffic == 280


@pytest.mark.parametrize("line", ["{", "[1]", '{"round": 3}', "5"])
def test_a_damaged_history_is_one_sentence(run: Path, line: str) -> None:
    append(run, record(1))
    (run / "history.jsonl").write_text((run / "history.jsonl").read_text() + line + "\n")
    with pytest.raises(ConfigError, match=r"history.jsonl' holds a line that is no round"):
        Watched(run).read()


def test_time_left_goes_by_the_newest_rounds(run: Path) -> None:
    watched = Watched(run, total=0)
    append(run, record(1, seconds=1000.0), *(record(number, seconds=3.0) for number in range(2, 9)))
    watched.read()
    assert watched.seconds_left == 6.0


def test_after_the_last_round_nothing_is_left_but_the_test(run: Path) -> None:
    append(run, *(record(number) for number in range(1, 11)))
    said, _ = shown(run)
    assert " left" not in said.splitlines()[0]
    watched = Watched(run)
    watched.read()
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(watched.panel())
    assert "the test of the result" in console.export_text()
    watched.summary = {"any": "thing"}
    console.print(watched.panel())
    assert "time left" not in console.export_text()


def test_a_line_says_round_scores_nodes_failures_and_time(run: Path) -> None:
    accuracy = {"adapt_lr": 0.1, "accuracy": [0.2, 0.7, None, 0.6], "loss": [1, 1, 1, 1], "tasks": 5}
    failures = [{"who": "node 7", "reason": "it sent NaN"}]
    append(run, record(4, validation=accuracy, failures=failures))
    said, fine = shown(run)
    assert (
        said.splitlines()[0]
        == "round 4/10   query loss 0.2500   validation accuracy 20.0 % -> 70.0 %   replies 2 of 3   failures 1   12 s left"
    )
    assert "to go on: quickbloom run --resume" in said
    assert not fine


def test_a_terminal_sees_everything_at_once(run: Path) -> None:
    mse = [{"adapt_lr": 0.1, "mse": [4.0, value, value], "loss": [1, 1, 1], "tasks": 5} for value in (0.5, 0.25, 0.75)]
    failures = [{"who": f"node {i}", "reason": "late"} for i in range(9)]
    append(run, *(record(i + 1, validation=scores) for i, scores in enumerate(mse)), record(4, failures=failures))
    watched = Watched(run)
    watched.read()
    console = Console(width=160, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(watched.panel())
    said = capture.get()
    assert "maml on digits, seed 4" in said
    assert "mean squared error 4 -> 0.75 in round 3; best 0.25 in round 2" in said
    assert "12 s (2.00 s a round)" in said
    assert "node 8: late" in said
    assert "node 3: late" not in said  # the newest alone


def test_a_run_that_holds_its_directory_goes_on(run: Path) -> None:
    assert not going_on(run)
    with RunDirectory(run).held():
        assert going_on(run)
        said, fine = shown(run)
        assert fine
        assert "resume" not in said
    assert not going_on(run)


def test_a_finished_run_ends_with_its_table(tmp_path: Path) -> None:
    settings = ["--dataset", "gaussian", "--algorithm", "fomaml", "--rounds", "3", "--output", str(tmp_path / "runs" / "r")]
    done = CliRunner().invoke(cli, ["run", "--in-process", "--no-report", *settings])
    assert done.exit_code == 0, done.output
    said, fine = shown(tmp_path / "runs" / "r", once=False)
    assert fine
    assert said.startswith("round 3/3")
    assert "fomaml on gaussian, 3 rounds, seed 0" in said
    assert newest(tmp_path / "runs") == tmp_path / "runs" / "r"


def test_without_a_run_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="RUN_DIR must be the directory of a run"):
        watch(tmp_path, Console(quiet=True), once=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no run in 'runs'"):
        CliRunner().invoke(cli, ["watch"], catch_exceptions=False)
