"""Events as lines of JSON: what goes in comes out, and what is not known or damaged is passed over."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from quickbloom.server_app.events.kinds import (
    IN_SUMMARY,
    KINDS,
    Ended,
    Event,
    Failed,
    Joined,
    Refused,
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

SUMMARY: dict[str, Any] = {**dict.fromkeys(sorted(IN_SUMMARY)), "shots": None, "more": [1.5, {"a": "b"}]}
EVENTS: list[Event] = [
    Started("/data/my runs/digits-maml", "maml", "digits", 4, 10, 3),
    RollCalled(3, {"train": 37, "validation": 8, "test": 11}, {"flwr 1.39.0, torch 2.13.0": 3}),
    Scored(2, "accuracy", 0.2, 0.755, 0.3, 10, 8),
    RoundEnded(2, 10, 1.25, 37, 0.125, 3, 2, 1, 1, 1000, 2000, ""),
    RoundEnded(3, 10, 1.25, 0, 0.125, skipped="no node sent a usable reply"),
    Warned("1 task is left out: Ward 0 (it has 1 row)", 2),
    Failed("node 7", "its reply is of no use: it cannot be read", 2),
    Joined(7, 4, 3),
    Refused(8, "other columns or classes", 3),
    Saved(2, "checkpoints/round-000002.safetensors"),
    Ended(SUMMARY),
    Stopped("`min-nodes` is 3, but 2 usable nodes answered"),
]


def test_there_is_a_sample_of_every_kind() -> None:
    assert {type(event) for event in EVENTS} == set(KINDS)
    assert len({event.kind for event in EVENTS}) == len(KINDS)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_a_line_holds_the_event(event: Event) -> None:
    line = to_line(event)
    assert from_line(line) == event
    assert from_line(line.encode()) == event
    assert json.loads(line)["kind"] == event.kind


@pytest.mark.parametrize(
    "words", ["a\nb", "\r", "\x1b[2J", "\x7f", "\x85\u2028\u2029", "\u4eac", '"}{"', "\\", "\ud800", "\x00"]
)
def test_a_line_is_printable_ascii_whatever_the_words(words: str) -> None:
    for event in (Warned(words), Failed(words, words), Ended({**SUMMARY, "run_dir": words}), Stopped(words)):
        line = to_line(event)
        assert line.isascii()
        assert line.isprintable()
        assert json.loads(line)["kind"] == event.kind


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_run_that_diverges_has_standard_json(bad: float) -> None:
    line = to_line(replace(EVENTS[3], loss=bad))  # type: ignore[arg-type]
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    ended = from_line(line)
    assert isinstance(ended, RoundEnded)
    assert math.isnan(ended.loss)
    scored = from_line(to_line(Scored(2, "mse", 1e20, bad, 0.3, 1, 8)))
    assert isinstance(scored, Scored)
    assert scored.before == 1e20
    assert math.isnan(scored.after)
    assert json.loads(to_line(Ended({"x": [bad, {"y": bad}]})))["summary"] == {"x": [None, {"y": None}]}


def test_fields_of_a_newer_version_are_passed_over_and_its_kinds_are_none() -> None:
    for event in EVENTS:
        newer = {**json.loads(to_line(event)), "time": 3.5, "nested": {"a": []}}
        assert from_line(json.dumps(newer)) == event
    assert from_line('{"kind": "weather", "round": 3}') is None


@pytest.mark.parametrize(
    ("metric", "known"), [("accuracy", True), ("rmse", True), ("auroc", True), ("crps", False), ("", False)]
)
def test_scores_by_a_metric_of_a_newer_version_are_passed_over(metric: str, known: bool) -> None:
    assert (from_line(to_line(Scored(2, metric, 0.2, 0.7, 0.3, 10, 8))) is not None) == known


@pytest.mark.parametrize(
    "line",
    [
        *("", "{", "3", "null", "[]", '"round"', "{}", '{"kind": 3}', '{"kind": "round"}', '{"kind": null}'),
        '{"kind": "round", "round": "many", "rounds": 2, "loss": 1, "tasks": 1, "seconds": 1}',
        '{"kind": "roll-call", "nodes": 3, "tasks": [1]}',
        '{"kind": "end", "summary": {}}',
        '{"kind": "end", "summary": {"schema": 1, "algorithm": "forged"}}',
        '{"kind": "end", "summary": 3}',
        '{"kind": "warning", "sentence": ["x"]}',
        "[" * 100_000,
        '{"kind": "end", "summary": ' + '{"a":' * 100_000,
        '{"kind": "round", "round": ' + "9" * 10_000 + "}",
        b"\xff\xfe",
        b"\x00" * 100,
        to_line(EVENTS[2])[:-5],
    ],
)
def test_a_line_that_is_no_event_is_none(line: str | bytes) -> None:
    assert from_line(line) is None


def test_a_failure_keeps_the_letters_of_the_name() -> None:
    assert Failed("task Ward-0", "its numbers are not finite").sentence == "Task Ward-0: its numbers are not finite"
    assert Failed("", "odd").sentence == ": odd"
