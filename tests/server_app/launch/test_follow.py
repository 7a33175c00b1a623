"""How a run reaches the person who started it: in this process by objects, from Flower by its log."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.common import log
from rich.console import Console

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.system import terminal
from quickbloom.common.system.terminal import FAILED, OK, STOPPED
from quickbloom.server_app.events.channel import _MARK
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import (
    IN_SUMMARY,
    Ended,
    Event,
    Failed,
    RollCalled,
    RoundEnded,
    Started,
    Stopped,
    Warned,
    to_line,
)
from quickbloom.server_app.launch import follow
from quickbloom.server_app.launch.prepare import Start
from quickbloom.server_app.messaging.in_process_grid import InlineGrid

STARTED = Started("/runs/r", "maml", "digits", 0, 2)
SUMMARY: dict[str, Any] = dict.fromkeys(sorted(IN_SUMMARY))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a person sees."""
    text = io.StringIO()
    console = Console(file=text, width=60, highlight=False, emoji=False)
    monkeypatch.setattr(terminal, "console", console)
    monkeypatch.setattr(follow, "console", console)
    return text


def told(said: io.StringIO) -> list[str]:
    return [line for line in said.getvalue().splitlines() if line]  # a bar that ends leaves an empty one


def data(folder: Path, name: str, column: str = "task") -> Path:
    """A file of eight tasks, and one more of this name that is too small to be one."""
    rows = [[f"T{task}", str(row), "ab"[row % 2]] for task in range(8) for row in range(20)] + [[name, "1", "a"]]
    file = folder / "data.csv"
    file.write_text(f"{column},x,target\n" + "".join(",".join(row) + "\n" for row in rows))
    return file


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    flat = {"min-nodes": 1, "rounds": 2, "adapt-steps": 1, "mlp.hidden": "4", "output-dir": str(folder / "run")}
    return {**flat, **changes}


@pytest.mark.parametrize("name", ["Ward 0", "Ward-0", "[bold]x[/bold]", "Summary: {}"])
def test_every_warning_of_a_run_in_this_process_is_told_once(name: str, tmp_path: Path, said: io.StringIO) -> None:
    flat = settings(tmp_path, dataset="own", **{"own.path": str(data(tmp_path, name))})
    code, summary = follow.follow_here(parse_run_config(flat), 1, verbose=False)
    assert code == OK
    assert summary is not None
    lines = told(said)
    assert len([line for line in lines if line.startswith(f"1 task is left out: {name} (it has 1 row")]) == 1
    assert len([line for line in lines if "left out" in line]) == 1
    assert [line[:9] for line in lines if line.startswith("round")] == ["round 1/2", "round 2/2"]


def test_the_log_is_shown_to_who_wants_it_and_nothing_beside_it(tmp_path: Path, said: io.StringIO) -> None:
    flat = settings(tmp_path, dataset="own", **{"own.path": str(data(tmp_path, "Ward 0"))})
    before = list(logging.getLogger("flwr").handlers)
    follow.follow_here(parse_run_config(flat), 1, verbose=True)
    lines = told(said)
    (warning,) = [line for line in lines if "left out" in line]
    assert warning.startswith("WARNING : 1 task is left out: Ward 0 (")
    assert "INFO : [ROUND 2/2]" in lines
    assert not any(_MARK in line or line.startswith("round") for line in lines)
    assert logging.getLogger("flwr").handlers == before


def test_what_a_node_in_this_process_warns_of_is_told_as_well(
    tmp_path: Path, said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WarningGrid(InlineGrid):
        def answer(self, message: Any) -> Any:
            log(logging.WARNING, "What task %s kept on this node cannot be used", "Ward 0")
            log(logging.INFO, "nothing of interest")
            return super().answer(message)

    monkeypatch.setattr("quickbloom.server_app.messaging.in_process_grid.InlineGrid", WarningGrid)
    follow.follow_here(parse_run_config(settings(tmp_path)), 1, verbose=False)
    lines = told(said)
    assert lines.count("What task Ward 0 kept on this node cannot be used") == 1
    assert "nothing of interest" not in lines


def test_two_runs_in_one_process_tell_each_what_is_theirs(tmp_path: Path, said: io.StringIO) -> None:
    file = data(tmp_path, "Ward 0")
    for folder in ("one", "two"):
        flat = settings(tmp_path / folder, dataset="own", **{"own.path": str(file)})
        assert follow.follow_here(parse_run_config(flat), 1, verbose=False)[0] == OK
        warned = [event for event in read_events(tmp_path / folder / "run") if isinstance(event, Warned)]
        assert len([event for event in warned if "is left out" in event.sentence]) == 1
    assert said.getvalue().count("1 task is left out: Ward 0") == 2


def test_a_run_that_fails_says_why_in_one_sentence_and_in_its_events(tmp_path: Path, said: io.StringIO) -> None:
    flat = settings(tmp_path, **{"reptile.outer-lr": 1e38})
    code, summary = follow.follow_here(parse_run_config(flat), 1, verbose=False)
    assert (code, summary) == (FAILED, None)
    (stopped,) = [event for event in read_events(tmp_path / "run") if isinstance(event, Stopped)]
    assert "not finite" in stopped.reason
    assert told(said)[-2:] == [
        f"error: {stopped.reason}",
        f"The rounds before are kept; to go on: quickbloom run --resume {tmp_path / 'run'}",
    ]


def test_ctrl_c_stops_a_run_in_this_process(tmp_path: Path, said: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopping(InlineGrid):
        def answer(self, message: Any) -> Any:
            if message.metadata.group_id == "2":
                raise KeyboardInterrupt
            return super().answer(message)

    monkeypatch.setattr("quickbloom.server_app.messaging.in_process_grid.InlineGrid", Stopping)
    before = list(logging.getLogger("flwr").handlers)
    assert follow.follow_here(parse_run_config(settings(tmp_path)), 1, verbose=False) == (STOPPED, None)
    assert told(said)[-1] == f"Stopped; what was finished is in {tmp_path / 'run'}."
    assert logging.getLogger("flwr").handlers == before
    assert [event.round for event in read_events(tmp_path / "run") if isinstance(event, RoundEnded)] == [1]


class FlowerRun:
    """Stands for a run that Flower has taken: its log, and what `flwr list` says of it."""

    def __init__(self, lines: list[str], status: tuple[str, str]) -> None:
        self._lines, self._status = lines, status
        self.stopped = False

    def lines(self) -> Iterator[str]:
        for line in self._lines:
            if line == "Ctrl-C":
                raise KeyboardInterrupt
            yield line

    def status(self) -> tuple[str, str]:
        return self._status

    def stop(self) -> bool:
        self.stopped = True
        return True

    def close(self) -> None:
        pass


def in_log(*events: Event) -> list[str]:
    return [f"INFO :      {_MARK}{to_line(event)}" for event in events]


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Follows a run with this log and this end; gives (exit code, summary)."""

    @contextmanager
    def bundle() -> Iterator[Path]:
        yield Path("/app")

    monkeypatch.setattr(follow, "bundle", bundle)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def played(lines: list[str], status: tuple[str, str] = ("finished:completed", ""), verbose: bool = False) -> Any:
        monkeypatch.setattr(follow, "Run", lambda *_: FlowerRun(lines, status))
        return follow.follow(Start({"output-dir": "/runs/r"}, "link", 2, "deployment"), verbose)

    return played


LOG = [
    "Loading project configuration...",
    "Successfully started run 7",
    *in_log(STARTED, Warned("1 task is left out: Ward 0 (it has 1 row)"), RollCalled(2, {"train": 3})),
    "WARNING :   1 task is left out: Ward 0 (it has 1 row)",
    "INFO :      [ROUND 1/2]",
    *in_log(Failed("task Ward-0", "its numbers are not finite", 1), RoundEnded(1, 2, 1.5, 3, 0.1)),
]


def test_events_in_flowers_log_are_told_and_its_words_are_not(flower: Any, said: io.StringIO) -> None:
    assert flower([*LOG, *in_log(RoundEnded(2, 2, 1.25, 3, 0.1), Ended(SUMMARY))]) == (OK, SUMMARY)
    assert told(said)[1:] == [
        "1 task is left out: Ward 0 (it has 1 row)",
        "Task Ward-0: its numbers are not finite",
        "round 1/2   query loss 1.5000",
        "round 2/2   query loss 1.2500",
    ]


def test_a_log_that_begins_anew_and_lines_that_are_damaged_change_nothing(flower: Any, said: io.StringIO) -> None:
    end = in_log(RoundEnded(2, 2, 1.25, 3, 0.1), Ended(SUMMARY))
    damaged = [f"INFO :      {_MARK}" + "{" * 1000, f"INFO :      {_MARK}{to_line(STARTED)[:-9]}", "", "Traceback"]
    assert flower([*LOG, *damaged, *LOG, *damaged, *end]) == (OK, SUMMARY)
    assert len(told(said)) == 5


def test_with_verbose_flowers_words_are_shown_and_events_are_not(flower: Any, said: io.StringIO) -> None:
    assert flower([*LOG, *in_log(Ended(SUMMARY))], verbose=True) == (OK, SUMMARY)
    lines = told(said)
    assert "INFO :      [ROUND 1/2]" in lines
    assert not any(_MARK in line for line in lines)


def test_a_run_that_stopped_says_why_itself_and_how_to_go_on(flower: Any, said: io.StringIO) -> None:
    lines = [*LOG, *in_log(Stopped("round 2: no node sent a usable reply"))]
    assert flower(lines, ("finished:failed", "exception: something else")) == (FAILED, None)
    assert told(said)[-2:] == [
        "error: round 2: no node sent a usable reply",
        "The rounds before are kept; to go on: quickbloom run --resume /runs/r --connection link",
    ]


def test_of_a_run_that_said_nothing_flower_says_how_it_ended(flower: Any, said: io.StringIO) -> None:
    lines = ["Successfully started run 7", "ERROR :     boom"]
    assert flower(lines, ("finished:failed", "exception: no such module")) == (FAILED, None)
    (error,) = [line for line in told(said) if line.startswith("error:")]
    assert "finished:failed (exception: no such module)" in error
    assert error.endswith("boom")
    assert "--resume" not in said.getvalue()


def test_a_run_without_a_summary_in_its_log_is_no_success(flower: Any, said: io.StringIO) -> None:
    assert flower(LOG) == (FAILED, None)
    assert "its log holds no summary" in said.getvalue()


def test_ctrl_c_stops_a_run_of_flower(flower: Any, said: io.StringIO) -> None:
    assert flower([*LOG, "Ctrl-C"]) == (STOPPED, None)
    assert told(said)[-1] == "Stopped; what was finished is in /runs/r."
