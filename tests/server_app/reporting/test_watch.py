"""`quickbloom watch`: what it reads of a run's directory, while that grows, is written anew, or stops."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.events.file import FILE, written
from quickbloom.server_app.events.kinds import Event, Failed, Joined, RoundEnded, Scored, Started, Stopped, Warned, to_line
from quickbloom.server_app.reporting.watch import Watched, going_on, newest, watch
from quickbloom.server_app.runs.directory import RunDirectory

CONFIG = {"algorithm": "maml", "dataset": "digits", "seed": 4, "rounds": 10}


def ended(number: int, seconds: float = 2.0) -> RoundEnded:
    return RoundEnded(number, 10, 1 / number, 3, seconds, asked=3, answered=2, up=10, down=30)


def append(directory: Path, *events: Event, ending: str = "\n") -> None:
    with (directory / FILE).open("a") as file:
        file.write("\n".join(to_line(event) for event in events) + ending)


def rewrite(directory: Path, *events: Event) -> None:
    with written(directory, events):
        pass


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
    append(run, ended(1), ended(2))
    append(run, ended(3), ending="")
    assert watched.read() == [ended(1), ended(2)]
    append(run, ending="\n")
    assert watched.read() == [ended(3)]
    assert watched.read() == []
    assert watched.round == 3
    assert watched.traffic == 120
    assert watched.seconds_left == 14.0  # 7 rounds of 2 s


def test_events_that_are_written_anew_are_read_anew(run: Path) -> None:
    watched = Watched(run)
    append(run, *(ended(number) for number in range(1, 6)), Failed("node 7", "odd", 5), Warned("it rains", 5))
    watched.read()
    rewrite(run, ended(1), ended(2))
    assert watched.read() == [ended(1), ended(2)]
    assert watched.round == 2
    assert watched.traffic == 80
    assert watched.total == 10
    assert (watched.failures, watched.warnings) == ([], [])


def test_nodes_that_join_are_told_of(run: Path) -> None:
    append(run, ended(1), Joined(7, 4, 2), Joined(9, 1, 2), ended(2))
    lines = shown(run)[0].splitlines()
    assert lines[:2] == ["Node 7 joined with 4 tasks", "Node 9 joined with 1 task"]
    watched = Watched(run)
    watched.read()
    console = Console(width=120)
    with console.capture() as capture:
        console.print(watched.panel())
    assert "2 nodes, the last: Node 9 joined with 1 task in round 2" in capture.get()


def test_another_file_is_read_anew_even_if_it_is_longer(run: Path) -> None:
    watched = Watched(run)
    append(run, ended(1), ended(2))
    watched.read()
    rewrite(run, *(ended(number, seconds=12.345678) for number in range(1, 8)))
    assert watched.read() == [ended(number, seconds=12.345678) for number in range(1, 8)]
    assert watched.traffic == 280


@pytest.mark.parametrize("line", ["{", "[1]", "5", "\x00\x00"])
def test_a_damaged_line_is_passed_over_and_told_of(run: Path, line: str) -> None:
    append(run, ended(1))
    (run / FILE).write_text((run / FILE).read_text() + line + "\n")
    append(run, ended(2))
    said, _ = shown(run)
    assert said.splitlines()[0].startswith("round 2/10 ")
    assert said.splitlines()[1] == f"1 line of '{run / FILE}' cannot be read: it is damaged"


def test_events_of_a_newer_version_are_no_damage(run: Path) -> None:
    append(run, ended(1))
    with (run / FILE).open("a") as file:
        file.write('{"kind": "weather", "round": 1}\n')
        file.write(to_line(Scored(1, "auroc", 0.5, 0.9, 0.1, 1, 5)) + "\n")  # a metric of a newer version
    said, _ = shown(run)
    assert "damaged" not in said
    assert said.startswith("round 1/10 ")


def test_warnings_are_told_in_full_and_once(run: Path) -> None:
    long = "1 task is left out: Ward 0 (it has [bold]1[/bold] row) " + "x" * 300
    append(run, Warned(long), ended(1), Warned(long, 1), Warned("it rains", 1), Warned("it\nsnows", 1))
    said, _ = shown(run)
    assert said.splitlines()[:3] == [long, "it rains", "it snows"]
    watched = Watched(run)
    watched.read()
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(watched.panel())
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert [lines.count(words) for words in (long, "it rains", "it snows")] == [1, 1, 1]


def test_why_a_run_stopped_is_told_until_it_goes_on(run: Path) -> None:
    append(run, ended(1), Stopped("the model is not finite any more: lower `outer-lr`"))
    assert "error: the model is not finite any more: lower `outer-lr`" in shown(run)[0].splitlines()
    append(run, Started(str(run), "maml", "digits", 4, 10, 1))
    assert "error:" not in shown(run)[0]


def test_time_left_goes_by_the_newest_rounds(run: Path) -> None:
    watched = Watched(run, total=0)
    append(run, ended(1, seconds=1000.0), *(ended(number, seconds=3.0) for number in range(2, 9)))
    watched.read()
    assert watched.seconds_left == 6.0


def test_after_the_last_round_nothing_is_left_but_the_test(run: Path) -> None:
    append(run, *(ended(number) for number in range(1, 11)))
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
    append(run, Failed("node 7", "it sent NaN", 4), Scored(4, "accuracy", 0.2, 0.7, 0.1, 1, 5), ended(4))
    said, fine = shown(run)
    assert (
        said.splitlines()[0]
        == "round 4/10   query loss 0.2500   validation accuracy 20.0 % -> 70.0 %   replies 2 of 3   failures 1   12 s left"
    )
    assert "to go on: quickbloom run --resume" in said
    assert not fine


def test_a_terminal_sees_everything_at_once(run: Path) -> None:
    for number, value in enumerate((0.5, 0.25, 0.75), 1):
        append(run, Scored(number, "mse", 4.0, value, 0.1, 2, 5), ended(number))
    append(run, *(Failed(f"node {i}", "late", 4) for i in range(9)), ended(4))
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


def test_mode_async_is_told_in_the_line_and_in_the_panel(run: Path) -> None:
    watched = Watched(run)
    names = ["Ward [bold]0", "B"]
    known: dict[str, Any] = {"staleness": 0.75, "dropped": 2, "at_work": 7, "rarely": names}
    steps = [replace(ended(number), virtual_hours=number / 4, **known) for number in (1, 2, 3)]
    append(run, *steps[:2], Scored(1, "mse", 4.0, 0.75, 0.3, 2, 1), steps[2])
    watched.read()
    line = watched.line()
    assert "validation mean squared error 4 -> 0.75 in round 1" in line
    # Four steps in an hour, and twice three contributions that were too old.
    assert "pace 4 steps an hour   staleness 0.75   at work 7   dropped 6   rarely Ward [bold]0, B   virtual hours 0.75" in line
    console = Console(width=160, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(watched.panel())
    assert "4 steps an hour" in capture.get()
    assert "Ward [bold]0, B" in capture.get()
    append(run, ended(4))
    watched.read()
    assert "staleness" not in watched.line()


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
    assert "round 3/3" in said
    assert "fomaml on gaussian, 3 rounds, seed 0" in said
    assert newest(tmp_path / "runs") == tmp_path / "runs" / "r"


def test_without_a_run_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="RUN_DIR must be the directory of a run"):
        watch(tmp_path, Console(quiet=True), once=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no run in 'runs'"):
        CliRunner().invoke(cli, ["watch"], catch_exceptions=False)
