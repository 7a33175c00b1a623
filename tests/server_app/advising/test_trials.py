"""Successive halving: what goes on, in which order, and what becomes of candidates that fail."""

import math
from pathlib import Path
from typing import Any

import pytest

from quickbloom.common.errors import ConfigError, QuickbloomError, RunError
from quickbloom.server_app.advising import trials
from quickbloom.server_app.advising.candidates import Candidate
from quickbloom.server_app.advising.trials import Trial, halve

CANDIDATES = [Candidate(name, "linear") for name in ("a", "b", "c", "d", "e")]
Ends = dict[str, Any]
"""By name of an algorithm: its rmse, one by the number of rounds, the scores by user, or the error that it raises."""


class Stub:
    """Stands in for the runs of a candidate."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        self.calls: list[tuple[str, int]] = []

    def __call__(self, settings: Any, candidate: Candidate, rounds: int, tasks: Any, folder: Path) -> Trial:
        self.calls.append((candidate.algorithm, rounds))
        end = self.ends[candidate.algorithm]
        end = end.get(rounds, end) if isinstance(end, dict) else end
        if isinstance(end, QuickbloomError):
            raise end
        users = end if isinstance(end, dict) else {"u": end, "v": end}
        parts = {part: {"after": users, "own": {"u": 9.0, "v": 9.0}} for part in ("choosing", "telling")}
        return Trial(candidate, rounds, [{"baselines": {"metric": "rmse"}}], parts)


def ranked(monkeypatch: pytest.MonkeyPatch, ends: Ends, rounds: int = 8) -> tuple[list[Trial], Stub, list[str]]:
    stub, said = Stub(ends), list[str]()
    monkeypatch.setattr(trials, "_tried", stub)
    tried = [one for one in CANDIDATES if one.algorithm in ends]
    return halve({"rounds": rounds}, tried, ["u", "v"], Path("none"), said.append), stub, said


def test_the_worse_half_is_dropped_after_a_quarter_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of five, three go on: d, b and a. With more rounds a is the best of them.
    ends = {"a": {2: 3.0, 8: 0.5}, "b": 2.0, "c": 5.0, "d": 1.0, "e": 4.0}
    left, stub, said = ranked(monkeypatch, ends)
    assert stub.calls == [*((name, 2) for name in "abcde"), ("d", 8), ("b", 8), ("a", 8)]
    assert [(one.candidate.algorithm, one.rounds) for one in left] == [("a", 8), ("d", 8), ("b", 8), ("e", 2), ("c", 2)]
    assert said[0] == "a, linear: 2 rounds"


def test_one_that_was_dropped_stands_where_its_score_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    left, _, _ = ranked(monkeypatch, {"a": {2: 1.0, 8: 7.0}, "b": {2: 2.0, 8: 6.0}, "c": 3.0})
    assert [(one.candidate.algorithm, one.rounds) for one in left] == [("c", 2), ("b", 8), ("a", 8)]


def test_equal_ones_keep_their_order_and_one_round_needs_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    left, stub, _ = ranked(monkeypatch, dict.fromkeys("abcd", 1.0), rounds=1)
    assert [one.candidate.algorithm for one in left] == list("abcd")
    assert stub.calls == [(name, 1) for name in "abcd"]


def test_one_that_diverged_for_a_user_is_behind_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mean of "a" over the one user that it has would be the best.
    left, _, _ = ranked(monkeypatch, {"a": {"u": 0.1}, "b": 2.0, "c": 3.0}, rounds=1)
    assert [one.candidate.algorithm for one in left] == ["b", "c", "a"]
    assert math.isnan(left[-1].mean("choosing"))
    assert list(left[-1].scores["telling"]["after"]) == ["u", "v"]


def test_one_that_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {"a": RunError("not finite"), "b": 1.0, "c": ConfigError("`model` cannot read this"), "d": 2.0}
    left, _, said = ranked(monkeypatch, ends)
    assert [one.candidate.algorithm for one in left] == ["b", "d"]
    assert "a, linear is left out: not finite" in said
    assert "c, linear is left out: `model` cannot read this" in said


def test_what_stops_all_is_a_mistake_of_the_settings_or_a_run_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="every candidate failed"):
        ranked(monkeypatch, dict.fromkeys("ab", RunError("not finite")))
    with pytest.raises(ConfigError, match="`metric` must be"):
        ranked(monkeypatch, {"a": RunError("not finite"), "b": ConfigError("`metric` must be another")})
