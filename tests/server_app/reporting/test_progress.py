"""What a person sees of a run's events: a line for every round, every warning once, and a bar."""

import io
import math
from typing import Any

import pytest
from rich.console import Console

from quickbloom.server_app.events.kinds import (
    Ended,
    Event,
    Failed,
    Joined,
    RollCalled,
    RoundEnded,
    Saved,
    Scored,
    Started,
    Stopped,
    Warned,
    from_line,
    to_line,
)
from quickbloom.server_app.reporting.progress import Pace, Shown, progress_bar, round_line

STARTED = Started("/tmp/r", "maml", "digits", 0, 2)
EVENTS: list[Event] = [
    STARTED,
    Warned("Node 7 does not take part: it is asleep"),
    Warned("1 task is left out: E (it has 1 row)"),
    RollCalled(2, {"train": 37, "validation": 8, "test": 11}),
    Saved(0, "checkpoints/x"),
    RoundEnded(1, 2, 1.5, 37, 0.1),
    Scored(2, "accuracy", 0.2, 0.755, 0.3, 10, 8),
    RoundEnded(2, 2, 1.25, 37, 0.1),
]


def shown(events: list[Event], **options: Any) -> tuple[list[str], Shown, Any]:
    """The lines that a person sees of these events, what is known at the end, and the bar's task."""
    console = Console(width=60, file=io.StringIO(), force_terminal=False)
    progress = progress_bar(console)
    what = Shown(progress, progress.add_task("", total=None), **options)
    for event in events:
        what(event)
    (task,) = progress.tasks
    return console.file.getvalue().splitlines(), what, task  # type: ignore[attr-defined]


def test_a_line_is_said_for_every_round_and_every_warning() -> None:
    lines, what, task = shown(EVENTS)
    assert lines == [
        "Node 7 does not take part: it is asleep",
        "1 task is left out: E (it has 1 row)",
        "round 1/2   query loss 1.5000",
        "round 2/2   query loss 1.2500   validation accuracy 20.0 % -> 75.5 %",
    ]
    assert (what.round, what.run_dir, what.summary, what.stopped) == (2, "/tmp/r", None, "")
    assert (task.description, task.total, task.completed) == ("training", 2, 2)


def test_a_node_that_joins_is_told_of_once_and_is_no_warning() -> None:
    events = [*EVENTS[:6], Joined(7, 1, 2), Joined(7, 1, 2), *EVENTS[6:]]
    assert shown(events)[0][2:4] == ["round 1/2   query loss 1.5000", "Node 7 joined with 1 task"]
    assert len(shown(events)[0]) == 5
    assert shown(events, quiet=True)[0] == []


def test_the_bar_counts_rounds_that_are_over_of_all_that_there_are() -> None:
    assert shown([])[2].total is None
    assert shown([STARTED])[2].description == "roll call"
    task = shown([Started("/tmp/r", "maml", "digits", 0, 5, done=3), RollCalled(1, {})])[2]
    assert (task.total, task.completed) == (5, 3)
    # A budget of privacy ends a run sooner than it was meant to.
    assert shown([STARTED, RoundEnded(1, 1, 1.5, 37, 0.1)])[2].total == 1


@pytest.mark.parametrize(
    "sentence",
    [
        "Task Ward 0 is left out: it has 0 support and 3 query examples",
        "Task Ward-0 is left out: it has 0 support and 3 query examples",
        "TensorBoard is told nothing more of this run: OSError: disk full",
        "No validation task could be scored: the inner rate and all 5 steps are used",
        "/tmp/r/history.jsonl lacks rounds that are part of the model: 3",
        "anything at all [bold]with[/bold] :smile: {braces} and a line that is longer than any terminal " + "x" * 300,
    ],
)
def test_whatever_its_wording_a_warning_is_told_in_full_and_once(sentence: str) -> None:
    assert shown([Warned(sentence), Warned(sentence, 3)])[0] == [sentence]
    assert shown([Warned(sentence)], rounds=False)[0] == [sentence]


def test_a_failure_is_told_once_however_many_rounds_it_lasts() -> None:
    failures: list[Event] = [Failed("task Ward-0", "its numbers are not finite", number) for number in (1, 2, 3)]
    assert shown([*failures, Failed("task Ward-0", "it is asleep", 4)])[0] == [
        "Task Ward-0: its numbers are not finite",
        "Task Ward-0: it is asleep",
    ]


def test_what_another_run_has_told_is_not_told_again() -> None:
    warned: set[str] = set()
    assert shown([Warned("it rains")], warned=warned)[0] == ["it rains"]
    assert shown([Warned("it rains"), Warned("it snows")], warned=warned)[0] == ["it snows"]


def test_a_log_that_is_read_from_its_beginning_again_says_nothing_twice() -> None:
    lines, what, task = shown([*EVENTS, *EVENTS])
    assert lines == shown(EVENTS)[0]
    assert (what.round, task.completed) == (2, 2)


def test_words_of_others_stay_on_their_line() -> None:
    assert shown([Failed("task A\nround 2/2", "\x1b[2J")])[0] == ["Task A round 2/2:  [2J"]


def test_the_end_is_kept_and_says_nothing() -> None:
    lines, what, _ = shown([Ended({"a": 1}), Stopped("no node")])
    assert (lines, what.summary, what.stopped) == ([], {"a": 1}, "no node")


def test_who_sees_the_log_needs_no_lines_beside_it() -> None:
    lines, what, task = shown(EVENTS, quiet=True)
    assert (lines, what.round, task.completed) == ([], 2, 2)


def test_the_scores_before_training_have_a_line_of_their_own() -> None:
    initial = Scored(0, "accuracy", 0.2, 0.5, 0.3, 10, 8)
    assert shown([initial])[0] == ["before training   validation accuracy 20.0 % -> 50.0 %"]
    assert shown([initial], rounds=False)[0] == []


def test_of_many_rounds_only_those_with_an_evaluation_are_told() -> None:
    scored = Scored(7, "mse", 4.0, 0.5, 0.3, 10, 8)
    for rounds, told in ((200, True), (201, False)):
        assert (round_line(RoundEnded(7, rounds, 1.5, 3, 0.1), None) is not None) == told
        assert round_line(RoundEnded(7, rounds, 1.5, 3, 0.1), scored) is not None


def test_a_run_that_diverges_is_told_without_an_error() -> None:
    scored = Scored(1, "mse", 1e20, math.inf, 0.3, 10, 8)
    line = round_line(RoundEnded(1, 2, math.nan, 3, 0.1), scored)
    assert line == "round 1/2   query loss nan   validation mean squared error 1e+20 -> diverged"


def test_a_round_that_was_skipped_has_a_line_for_its_scores_alone() -> None:
    skipped = RoundEnded(1, 2, math.nan, 0, 0.1, skipped="no node sent a usable reply")
    assert round_line(skipped, None) is None
    scored = Scored(1, "mse", 4.0, 0.5, 0.3, 10, 8)
    assert round_line(skipped, scored) == "round 1/2   validation mean squared error 4 -> 0.5"


# ---- mode async


def step(number: int, **more: Any) -> RoundEnded:
    """A step of mode async, of 0.5 s."""
    return RoundEnded(number, 30, 1.5, 3, more.pop("seconds", 0.5), **{"staleness": 0.5, "at_work": 7, **more})


def test_a_step_is_told_with_its_staleness_and_the_pace() -> None:
    pace = Pace()
    for number in (1, 2, 3):
        pace.add(step(number))
    assert str(pace) == "120 steps a minute"  # 3 steps in 1.5 s
    for number in range(4, 60):
        pace.add(step(number, seconds=0.01875))
    assert str(pace) == "3,200 steps a minute"  # not 3.2e+03
    pace = Pace()
    pace.add(step(1))
    line = round_line(step(3, dropped=2), None, pace)
    assert line == "round  3/30   query loss 1.5000   staleness 0.5   7 at work   2 dropped   120 steps a minute"


def test_the_pace_of_simulated_devices_is_that_of_their_own_time() -> None:
    pace = Pace()
    pace.add(step(1, virtual_hours=0.5))
    assert str(pace) == ""  # of a single step nothing is known
    for number, hours in ((2, 0.75), (3, 1.5)):
        pace.add(step(number, virtual_hours=hours))
    assert str(pace) == "2 steps an hour"  # 2 steps in 1 hour
    assert "1.50 virtual h" in str(round_line(step(3, virtual_hours=1.5), None, pace))


def test_scores_that_come_in_later_are_told_with_their_round() -> None:
    scored = Scored(5, "accuracy", 0.2, 0.7, 0.3, 10, 8)
    assert "validation accuracy 20.0 % -> 70.0 % in round 5   " in str(round_line(step(7), scored))
    said = io.StringIO()
    with progress_bar(Console(file=said, width=300)) as progress:
        shown = Shown(progress, progress.add_task(""))
        for event in (step(5), step(6), scored, step(7), step(8)):
            shown(event)
    lines = said.getvalue().splitlines()
    assert ["-> 70.0 % in round 5" in line for line in lines if line.startswith("round")] == [False, False, True, False]


def test_an_event_of_mode_async_says_what_its_line_says() -> None:
    record = {
        "round": 4,
        "train": {"loss": 1.0, "tasks": 6},
        "seconds": 1.0,
        "nodes": {"asked": 3, "answered": 2, "away": []},
        "bytes": {"up": 1, "down": 2},
        "failures": [],
        "async": {"staleness": {"0": 4, "2": 1, "3": 1}, "dropped": 2, "turn": 43, "at-work": 7},
        "virtual_hours": 0.197,
    }
    event = RoundEnded.of(record, 10, ["A"])
    assert event.staleness == pytest.approx(5 / 6)  # (4 * 0 + 2 + 3) / 6
    assert (event.dropped, event.at_work, event.virtual_hours, event.rarely) == (2, 7, 0.197, ["A"])
    assert from_line(to_line(event)) == event
    del record["async"], record["virtual_hours"]
    plain = RoundEnded.of(record, 10)
    assert (plain.staleness, plain.virtual_hours, plain.dropped, plain.rarely) == (None, None, 0, [])
    assert "staleness" not in str(round_line(plain, None))
