"""Comparisons: who is chosen, what is repeated, targets and tables worked by hand. The command itself is a stub."""

import importlib.util
import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.metric import ACCURACY, MSE, named
from quickbloom.server_app.cli import compare as compare_command
from quickbloom.server_app.cli import main
from quickbloom.server_app.comparing import files as comparison
from quickbloom.server_app.comparing.page import write_comparison_page
from quickbloom.server_app.comparing.plan import Plan, parse_rates, parse_seeds, recommended_rates
from quickbloom.server_app.comparing.result import assemble
from quickbloom.server_app.comparing.searching import Entry, choose, compare, locked
from quickbloom.server_app.comparing.table import caption, failures, markdown, table
from quickbloom.server_app.comparing.targets import curve, default_target, to_target
from quickbloom.server_app.comparing.watching import CompareError, inner_lr
from quickbloom.server_app.events.file import written
from quickbloom.server_app.events.kinds import Event, Failed, Warned

NAN = float("nan")
Scores = Callable[[str, float, int], tuple[float, float] | str]
"""(algorithm, inner lr, seed) -> (validation accuracy, validation loss), or what a run that fails says."""


class Command:
    """Stands in for the process of `quickbloom run`: accuracy 0.1 before and the given one after.

    On test tasks it is 1 less the given one.
    """

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.calls: list[tuple[str, float, int]] = []
        self.code = 1
        self.warnings: Callable[[str, float, int], list[Event]] = lambda algorithm, lr, seed: []

    def __call__(self, command: list[str], **options: Any) -> "Command":
        given = dict(text.split("=") for word, text in pairwise(command) if word == "--set")
        algorithm, seed = command[command.index("--algorithm") + 1], int(command[command.index("--seed") + 1])
        self.calls.append((algorithm, float(given.get(f"{algorithm}.inner-lr", 0)), seed))
        scores = self.scores(*self.calls[-1])
        process = Command(self.scores)
        process.code = self.code if isinstance(scores, str) else 0
        with written(Path(command[command.index("--output") + 1]), self.warnings(*self.calls[-1])):
            pass
        if isinstance(scores, str):
            options["stderr"].write(f"something\nerror: {scores}\n".encode())
        else:
            leave(Path(command[command.index("--output") + 1]), *scores)
        return process

    def poll(self) -> int:
        return self.code


def leave(directory: Path, score: float, loss: float) -> None:
    """The files of a finished run: evaluated after rounds 2 and 4, 10 bytes up and 20 down a round."""

    def part(after: float) -> dict[str, Any]:
        return {
            "steps": [0, 1],
            "accuracy": {"mean": [0.1, after], "ci95": [0, 0], "worst10": [0, after / 2]},
            "loss": {"mean": [2.0, loss], "ci95": [0, 0], "worst10": [2.0, loss]},
        }

    summary = {
        "tasks": {"train": 3, "validation": 1, "test": 2},
        "chosen": {"adapt_lr": 0.3, "adapt_steps": 1},
        "validation": part(score),
        "test": part(1 - score),
        "shots": {"shots": [1, 2], "accuracy": {"mean": [0.3, 1 - score]}},
        "seconds": {"total": 5.0},
    }
    (directory / "summary.json").write_text(json.dumps(summary).replace("NaN", "null"))
    rounds: list[dict[str, Any]] = [{"round": number, "bytes": {"up": 10, "down": 20}} for number in (1, 2, 3, 4)]
    rounds[1]["validation"] = {"accuracy": [0.1, score / 2]}
    rounds[3]["validation"] = {"accuracy": [0.1, score]}
    text = "".join(json.dumps(line).replace("NaN", "null") + "\n" for line in rounds)
    (directory / "history.jsonl").write_text(text)


def plan(*algorithms: str, seeds: tuple[int, ...] = (0, 1), settings: tuple[str, ...] = ()) -> Plan:
    return Plan(algorithms, seeds, "digits", 4, (0.1, 0.3, 0.9), ("evaluate-every=2", *settings))


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scores], Command]:
    def install(scores: Scores) -> Command:
        stub = Command(scores)
        monkeypatch.setattr(subprocess, "Popen", stub)
        return stub

    return install


def done(what: Plan, directory: Path) -> tuple[list[Entry], str]:
    """(the entries, what was told on the way)."""
    said = io.StringIO()
    with locked(directory):
        return compare(what, directory, 1, Console(file=said, width=500)), said.getvalue()


# ---- choices


def chosen_rates(entry: Entry) -> dict[int, float | None]:
    return {seed: inner_lr(result.run.setup) if result else None for seed, result in entry.chosen.items()}


def test_the_rate_with_the_best_validation_score_wins_whatever_the_test_says(start: Any, tmp_path: Path) -> None:
    # The stub's test accuracy is 1 less the validation accuracy: whoever looked at it would choose 0.9.
    command = start(lambda algorithm, lr, seed: ({0.1: 0.5, 0.3: 0.8, 0.9: 0.2}[lr], 1.0))
    (entry,), _ = done(plan("maml", seeds=(4, 5)), tmp_path)
    assert command.calls == [("maml", lr, seed) for seed in (4, 5) for lr in (0.1, 0.3, 0.9)]
    assert chosen_rates(entry) == {4: 0.3, 5: 0.3}
    assert entry.chosen[4] == entry.tried[4][1]


def test_every_seed_chooses_by_its_own_validation_scores_alone(start: Any, tmp_path: Path) -> None:
    # On the mean over seeds 0.3 would win everywhere: 0.6, against 0.5 and 0.47.
    scores = {0: {0.1: 0.9, 0.3: 0.6, 0.9: 0.0}, 1: {0.1: 0.1, 0.3: 0.6, 0.9: 0.5}, 2: {0.1: 0.5, 0.3: 0.6, 0.9: 0.9}}
    start(lambda algorithm, lr, seed: (scores[seed][lr], 1.0))
    what = plan("maml", seeds=(0, 1, 2))
    entries, _ = done(what, tmp_path)
    assert chosen_rates(entries[0]) == {0: 0.1, 1: 0.3, 2: 0.9}
    result = assemble(what, entries, None)
    row = result["algorithms"][0]
    assert [run["inner_lr"] for run in row["runs"]] == [0.1, 0.3, 0.9]
    assert [(one["seed"], one["inner_lr"], one["validation"]) for one in row["tried"]] == [
        (seed, lr, score) for seed, own in scores.items() for lr, score in own.items()
    ]
    assert table(result)[1][0][1] == "0.1-0.9"
    assert row["edge"] == [0, 2]
    assert any("wider range (`--inner-lrs`) may do better: maml, seeds 0, 2." in sentence for sentence in caption(result))


def test_what_another_seed_scores_changes_no_choice(start: Any, tmp_path: Path) -> None:
    own = {0.1: 0.5, 0.3: 0.8, 0.9: 0.2}
    for folder, other in (("x", {0.1: 0.9, 0.3: 0.0, 0.9: 0.0}), ("y", {0.1: 0.0, 0.3: 0.0, 0.9: 0.9})):
        start(lambda algorithm, lr, seed, other=other: ((other if seed else own)[lr], 1.0))
        (entry,), _ = done(plan("maml"), tmp_path / folder)
        assert chosen_rates(entry)[0] == 0.3


def test_equal_scores_go_to_the_lower_loss_then_to_the_first(start: Any, tmp_path: Path) -> None:
    start(lambda algorithm, lr, seed: (0.5, {0.1: 1.0, 0.3: 0.9, 0.9: 0.9}[lr]))
    (entry,), _ = done(plan("maml", seeds=(0,)), tmp_path)
    assert choose(entry.tried[0]) == entry.tried[0][1]


def test_a_rate_that_is_given_or_of_no_use_is_not_searched(start: Any, tmp_path: Path) -> None:
    command = start(lambda algorithm, lr, seed: (0.5, 1.0))
    what = plan("maml", "protonet", "local", settings=("maml.inner-lr=0.7",))
    entries, _ = done(what, tmp_path)
    assert command.calls == [(name, lr, seed) for seed in (0, 1) for name, lr in [("maml", 0.7), ("protonet", 0), ("local", 0)]]
    text = " ".join(caption(assemble(what, entries, None)))
    assert "Inner rate given, not searched: maml." in text
    assert "Without an inner rate of training: protonet, local." in text
    assert "Chosen there as well" not in text


def test_all_runs_adapt_with_rates_of_one_grid() -> None:
    # The default's five rates, 0.9 of the rates to choose from, 0.7 of fedavg; 0.3 of protonet is there.
    what = plan("fedavg", "maml", "protonet", settings=("fedavg.inner-lr=0.7",))
    setups = [setup for name in what.algorithms for setup in what.candidates(name)]
    assert len(setups) == 1 + 3 + 1
    assert {setup.effective()["adapt-lrs"] for setup in setups} == {"0.01,0.03,0.1,0.3,0.7,0.9,1.0"}


def test_the_one_grid_holds_the_rates_that_are_set() -> None:
    what = plan("maml", "local", settings=("adapt-lrs=0.2,2",))
    assert {setup.config().lrs for name in what.algorithms for setup in what.candidates(name)} == {(0.1, 0.2, 0.3, 0.9, 2.0)}


@pytest.mark.parametrize("bad", ["the model is not finite any more", (NAN, NAN)])
def test_a_rate_that_diverges_is_told_and_not_chosen(start: Any, tmp_path: Path, bad: Any) -> None:
    start(lambda algorithm, lr, seed: bad if lr == 0.9 else (lr, 1.0))
    what = plan("maml", seeds=(0,))
    entries, said = done(what, tmp_path)
    result = assemble(what, entries, None)
    assert result["algorithms"][0]["runs"][0]["inner_lr"] == 0.3
    assert result["algorithms"][0]["failed"] == 0
    (sentence,) = failures(result)
    assert sentence.startswith("maml, inner lr 0.9, seed 0: ")
    assert ("failed: the model" if isinstance(bad, str) else "diverged") in said


def test_warnings_of_the_runs_are_told_in_full_and_once(start: Any, tmp_path: Path) -> None:
    left_out = "1 task is left out: Ward 0 (it has 1 row) [bold]" + "x" * 300
    command = start(lambda algorithm, lr, seed: (0.5, 1.0) if algorithm == "local" else "not finite")
    command.warnings = lambda algorithm, lr, seed: [Warned(left_out), Failed("task Ward-0", f"seed {seed}", 2)]
    what = plan("local", "protonet")
    said = done(what, tmp_path)[1].splitlines()
    told = [line for line in said if line and not line.startswith("[")]
    assert told == [
        f"local, seed 0: {left_out}",
        "local, seed 0: Task Ward-0: seed 0",
        "local, seed 1: Task Ward-0: seed 1",
    ]
    # When a comparison goes on, those of the runs that are kept are told as well.
    assert f"local, seed 0: {left_out}" in done(what, tmp_path)[1].splitlines()


def test_warnings_of_a_run_that_fails_are_told_as_well(start: Any, tmp_path: Path) -> None:
    command = start(lambda algorithm, lr, seed: "not finite")
    command.warnings = lambda algorithm, lr, seed: [Warned("it rains")]
    assert "protonet, seed 0: it rains" in done(plan("protonet"), tmp_path)[1].splitlines()


def test_where_every_rate_diverges_the_others_go_on(start: Any, tmp_path: Path) -> None:
    start(lambda algorithm, lr, seed: "not finite" if algorithm == "maml" else (0.5, 1.0))
    what = plan("maml", "protonet")
    first, second = table(assemble(what, done(what, tmp_path)[0], None))[1]
    assert first[:4] == ["maml (2 of 2 failed)", "-", "-", "-"]
    assert second[:4] == ["protonet", "-", "- x 1", "10.0 ± 0.0"]


def test_a_seed_whose_rates_all_diverge_is_no_part_of_the_mean(start: Any, tmp_path: Path) -> None:
    start(lambda algorithm, lr, seed: "not finite" if seed else (lr, 1.0))
    what = plan("maml")
    result = assemble(what, done(what, tmp_path)[0], None)
    assert table(result)[1][0][:2] == ["maml (1 of 2 failed)", "0.9"]
    assert failures(result) == [f"maml, inner lr {lr}, seed 1: not finite" for lr in (0.1, 0.3, 0.9)]


def test_a_seed_that_diverges_is_a_note_beside_the_mean_of_the_others(start: Any, tmp_path: Path) -> None:
    start(lambda algorithm, lr, seed: "not finite" if seed == 1 else (0.5, 1.0))
    what = plan("protonet", seeds=(0, 1, 2))
    result = assemble(what, done(what, tmp_path)[0], None)
    assert table(result)[1][0][0] == "protonet (1 of 3 failed)"
    assert failures(result) == ["protonet, seed 1: not finite"]
    assert result["algorithms"][0]["mean"]["after"] == 0.5


@pytest.mark.parametrize(
    ("code", "says", "error", "sentence"),
    [
        (2, "`rounds` must be more", ConfigError, "^`rounds` must be more$"),
        (1, "Traceback (most recent call last): ...", CompareError, "ended with code 1: (?s:.*)Traceback"),
        (1, "a file could not be read or written (disk full)", RunError, "ended with code 1: a file could not be read"),
        (-9, "", CompareError, "quickbloom run --algorithm protonet .* ended with code -9"),
    ],
)
def test_any_other_failure_ends_the_comparison(
    start: Any, tmp_path: Path, code: int, says: str, error: type[Exception], sentence: str
) -> None:
    command = start(lambda algorithm, lr, seed: says)
    command.code = code
    with pytest.raises(error, match=sentence):
        done(plan("protonet"), tmp_path)
    assert len(command.calls) == 1


# ---- going on


def test_finished_runs_are_not_repeated_and_failed_ones_are(start: Any, tmp_path: Path) -> None:
    command = start(lambda algorithm, lr, seed: "not finite" if lr == 0.9 else (0.5, 1.0))
    what = plan("fedavg")
    first = assemble(what, done(what, tmp_path)[0], None)
    assert len(command.calls) == 6
    entries, said = done(what, tmp_path)
    assert command.calls[6:] == [("fedavg", 0.9, 0), ("fedavg", 0.9, 1)]
    assert said.count("kept") == 4
    assert assemble(what, entries, None) == first
    done(plan("fedavg", "protonet", seeds=(0, 1, 2)), tmp_path)
    new = [("fedavg", 0.9, 0), ("fedavg", 0.9, 1), *(("fedavg", lr, 2) for lr in (0.1, 0.3, 0.9))]
    assert sorted(command.calls[8:]) == sorted([*new, *(("protonet", 0, seed) for seed in (0, 1, 2))])


def test_two_comparisons_in_one_directory_are_refused(start: Any, tmp_path: Path) -> None:
    def scores(algorithm: str, lr: float, seed: int) -> tuple[float, float]:
        with pytest.raises(ConfigError, match="another comparison is at work"):
            done(plan("protonet"), tmp_path)
        return 0.5, 1.0

    start(scores)
    done(plan("local", seeds=(0,)), tmp_path)


def test_the_directory_is_locked_until_all_files_are_written(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(lambda algorithm, lr, seed: (0.5, 1.0))
    writers = {"write": comparison.write, "page": compare_command._write_comparison_page}
    seen: list[str] = []

    def refuses(name: str) -> Callable[[dict[str, Any], Path], None]:
        def write(result: dict[str, Any], directory: Path) -> None:
            with pytest.raises(ConfigError, match="another comparison is at work"), locked(directory):
                pass
            seen.append(name)
            writers[name](result, directory)

        return write

    monkeypatch.setattr("quickbloom.server_app.comparing.comparison.write", refuses("write"))
    monkeypatch.setattr(compare_command, "_write_comparison_page", refuses("page"))
    assert run_command(monkeypatch, tmp_path, "--algorithms", "protonet", "--seeds", "1", "--json") == 0
    assert seen == ["write", "page"]


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="`--output` must be a directory that can be written"):
        done(plan("protonet"), tmp_path / "file" / "x")


# ---- targets


def test_the_curve_takes_the_best_step_after_adaptation_and_adds_up_the_bytes() -> None:
    rounds = [
        {"round": 1, "bytes": {"up": 1, "down": 2}},
        {"round": 2, "bytes": {"up": 1, "down": 4}, "validation": {"accuracy": [0.9, 0.2, 0.4], "mse": [1, 3, None]}},
        {"round": 3, "bytes": {"up": 1, "down": 4}, "validation": {"accuracy": [0.1, None, None]}},
    ]
    assert curve(rounds, ACCURACY) == [[2, 0.4, 8]]  # 1 + 2 + 1 + 4
    assert curve(rounds, MSE) == [[2, 3, 8]]


@pytest.mark.parametrize(
    ("target", "metric", "expected"),
    [
        (0.5, "accuracy", (20, 200)),  # at least as good counts
        (0.51, "accuracy", (30, 300)),
        (0.9, "accuracy", (None, None)),
        (0.5, "mse", (10, 100)),  # lower is better: 0.4 is there at once
        (0.1, "mse", (None, None)),
        (None, "accuracy", (None, None)),
    ],
)
def test_rounds_and_bytes_to_the_target(target: float | None, metric: str, expected: tuple[int | None, int | None]) -> None:
    assert to_target([[10, 0.4, 100], [20, 0.5, 200], [30, 0.6, 300], [40, 0.3, 400]], target, named(metric)) == expected


def _row(name: str, *ends: float | None) -> dict[str, Any]:
    return {"algorithm": name, "runs": [{"failure": "" if end else "bad", "validation": end} for end in ends]}


def test_the_target_is_where_fedavg_ends_else_where_the_worst_ends() -> None:
    maml, reptile = _row("maml", 0.8, 0.6), _row("reptile", 0.5)
    assert default_target([maml, _row("fedavg", 0.9, None, 0.7), reptile], ACCURACY)[0] == pytest.approx(0.8)
    value, origin = default_target([maml, reptile, _row("fedavg", None)], ACCURACY)
    assert (value, origin) == (0.5, "what reptile ends at, mean over seeds")
    assert default_target([maml, reptile], MSE)[0] == pytest.approx(0.7)
    assert default_target([_row("maml", None)], ACCURACY) == (None, "no run has a score")


@pytest.mark.parametrize(("metric", "end"), [("accuracy", 2 / 3), ("mse", 4.02300004)])
def test_a_run_reaches_the_target_that_is_its_own_last_score(metric: str, end: float) -> None:
    # summary.json has seven digits: 0.6666667 is above 2/3, and 4.023 is below 4.02300004.
    points = curve([{"round": 4, "bytes": {"up": 1, "down": 2}, "validation": {metric: [0.0, end]}}], named(metric))
    for seeds in (1, 3):
        target, _ = default_target([_row("fedavg", *[round(end, 7)] * seeds)], named(metric))
        assert to_target(points, target, named(metric)) == (4, 3)


# ---- table


def test_the_table_by_hand(start: Any, tmp_path: Path) -> None:
    # fedavg ends at 0.4 and 0.6: the target is 0.5, reached by seed 1 in round 4, after 4 * (10 + 20) = 120 bytes.
    # protonet ends at 0.9 and 1.0; half of that is there in round 2: only 1.0 / 2 reaches 0.5.
    ends = {("fedavg", 0): 0.4, ("fedavg", 1): 0.6, ("protonet", 0): 0.9, ("protonet", 1): 1.0}
    start(lambda algorithm, lr, seed: (ends[algorithm, seed], 1.0))
    what = plan("fedavg", "protonet", settings=("fedavg.inner-lr=0.25",))
    result = assemble(what, done(what, tmp_path)[0], None)
    assert result["target"] == {"validation": 0.5, "origin": "what fedavg ends at, mean over seeds"}
    headings, (fedavg, protonet) = table(result)
    assert headings == [
        *("algorithm", "inner lr", "adapt lr x steps", "before", "1 step", "chosen step", "worst 10 %"),
        *("mean rank", "rounds to target", "bytes to target", "seconds"),
    ]
    # Test accuracies 0.6 and 0.4: mean 0.5, deviations 0.1, sd sqrt(0.02 / 1) = 0.141. The worst tenth is half of it.
    assert fedavg[1:7] == ["0.25", "0.3 x 1", "10.0 ± 0.0", "50.0 ± 14.1", "50.0 ± 14.1", "25.0 ± 7.1"]
    assert fedavg[7:] == ["-", "4 (1 of 2)", "120 B", "5 ± 0"]
    # Rounds 4 and 2: mean 3, sd sqrt(2) = 1.4. Bytes 120 and 60.
    assert protonet[7:] == ["-", "3 ± 1.4 (2 of 2)", "90 B", "5 ± 0"]
    assert table(assemble(what, done(what, tmp_path)[0], 0.99))[1][0][8:10] == ["-", "-"]


def with_baselines(directory: Path, **means: float) -> None:
    """Add baselines to the finished runs of a comparison; the worst tenth has half of the mean."""
    for file in directory.glob("*/summary.json"):
        found = {name: {"mean": mean, "ci95": 0.1, "worst10": mean / 2} for name, mean in means.items()}
        content = json.loads(file.read_text()) | {"baselines": {"metric": "accuracy", "scores": {"accuracy": found}}}
        file.write_text(json.dumps(content))


def test_baselines_are_rows_of_the_table_as_in_the_summaries(start: Any, tmp_path: Path) -> None:
    start(lambda algorithm, lr, seed: ({"maml": 0.4, "fedavg": 0.6}[algorithm], 1.0))
    what = plan("fedavg", "maml")
    assert not any("with baselines" in line for line in caption(assemble(what, done(what, tmp_path)[0], None)))
    with_baselines(tmp_path, own=0.5, constant=0.3)
    result = assemble(what, done(what, tmp_path)[0], None)
    assert [row["baseline"] for row in result["baselines"]] == ["constant", "own"]
    assert result["baselines"][1]["mean"] == {"after": 0.5, "worst10": 0.25}
    assert result["baselines"][1]["sd"] == {"after": 0.0, "worst10": 0.0}
    headings, (*_, constant, own) = table(result)
    cells = dict(zip(headings, own, strict=True))
    assert (cells["algorithm"], cells["chosen step"], cells["worst 10 %"]) == ("ridge, own rows", "50.0 ± 0.0", "25.0 ± 0.0")
    assert set(cells) - {name for name, cell in cells.items() if cell == "-"} == {"algorithm", "chosen step", "worst 10 %"}
    assert constant[0] == "own majority class"
    # Test scores are 1 less those of validation: maml 0.6, fedavg 0.4.
    ranked = (
        "The best first, with baselines: maml 60.0 %; ridge regression on the user's own rows alone 50.0 %; fedavg 40.0 %; "
        "the user's most frequent class 30.0 %."
    )
    assert ranked in caption(result)
    assert ranked in markdown(result)
    assert "ridge, own rows" in write_comparison_page(result, tmp_path / "x.html").read_text()


def test_baselines_are_ranked_beside_an_algorithm_that_failed(start: Any, tmp_path: Path) -> None:
    start(lambda algorithm, lr, seed: "loss is not finite" if algorithm == "maml" else (0.4, 1.0))
    what = plan("maml", "fedavg", seeds=(0,))
    done(what, tmp_path)
    with_baselines(tmp_path, own=0.5)
    said = caption(assemble(what, done(what, tmp_path)[0], None))
    assert "The best first, with baselines: fedavg 60.0 %; ridge regression on the user's own rows alone 50.0 %." in said


def test_what_is_written_says_how_to_read_and_repeat_it(start: Any, tmp_path: Path) -> None:
    start(lambda algorithm, lr, seed: (0.5, 1.0))
    what = plan("maml", seeds=(3,))
    result = assemble(what, done(what, tmp_path)[0], 0.75)
    comparison.write(result, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == result
    text = (tmp_path / "comparison.md").read_text()
    assert text == markdown(result)
    assert "| maml | 0.1 | 0.3 x 1 | 10.0 | 50.0 | 50.0 | 25.0 | - | - | - | 5 |" in text
    assert "the inner rate of training (of 0.1, 0.3, 0.9): maml." in text
    assert "seeds" not in text.partition("To repeat it")[0]
    assert "every 2 rounds" in " ".join(caption(result))
    command = "quickbloom compare --algorithms maml --dataset digits --seeds 3, --rounds 4 --inner-lrs 0.1,0.3,0.9"
    assert f"    {command} --set evaluate-every=2 --target-score 0.75\n" in text


def test_the_page_has_the_table_and_three_plots_and_fetches_nothing(start: Any, tmp_path: Path) -> None:
    start(lambda algorithm, lr, seed: "not <b>finite</b>" if lr == 0.9 else (0.5, 1.0))
    what = plan("maml", "protonet")
    text = write_comparison_page(assemble(what, done(what, tmp_path)[0], None), tmp_path / "x.html").read_text()
    assert text.count("<img ") == 3
    assert ">50.0 ± 0.0</td>" in text
    assert "maml.inner-steps = 5" in text
    assert "not &lt;b&gt;finite" in text
    assert 'src="http' not in text


def test_the_page_says_why_a_plot_is_missing(start: Any, tmp_path: Path) -> None:
    start(lambda algorithm, lr, seed: (0.5, 1.0))
    what = plan("protonet")
    result = assemble(what, done(what, tmp_path)[0], None)
    assert "No plot" not in write_comparison_page(result, tmp_path / "x.html").read_text()
    for run in result["algorithms"][0]["runs"]:
        run["shots"] = {}
    text = write_comparison_page(result, tmp_path / "x.html").read_text()
    assert text.count("<img ") == 2
    assert "No plot &#34;Test tasks, with few examples&#34;: every number of <code>test-shots</code> is above" in text


def test_the_page_of_runs_that_all_failed_has_no_plot_and_says_so(start: Any, tmp_path: Path) -> None:
    start(lambda algorithm, lr, seed: "not finite")
    what = plan("protonet")
    text = write_comparison_page(assemble(what, done(what, tmp_path)[0], None), tmp_path / "x.html").read_text()
    assert text.count("no run has scores") == 3


# ---- the command line


def run_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> int:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["quickbloom", "compare", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    return int(end.value.code or 0)


def test_without_the_extra_the_other_files_are_written(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(lambda algorithm, lr, seed: (0.5, 1.0))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert run_command(monkeypatch, tmp_path, "--algorithms", "protonet", "--seeds", "1", "--json") == 0
    captured = capsys.readouterr()
    directory = tmp_path / "runs" / "compare-digits"
    assert json.loads(captured.out) == json.loads((directory / "comparison.json").read_text())
    assert "no plots: a report needs matplotlib, which is not installed" in " ".join(captured.err.split())
    assert (directory / "comparison.md").is_file()
    assert not (directory / "comparison.html").exists()


def test_if_every_run_fails_so_does_the_command(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(lambda algorithm, lr, seed: "not finite")
    assert run_command(monkeypatch, tmp_path, "--algorithms", "protonet,maml", "--seeds", "2") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--algorithms", "fedavg,mamll"], "got 'mamll': did you mean `maml`?"),
        (["--dataset", "mnist"], "`dataset` must be one of"),
        (["--seeds", "0"], "`--seeds` must be how many seeds, or the seeds with commas between them (0,1,5), got '0'"),
        (["--seeds", "0,one"], "`--seeds` must be"),
        (["--seeds", "0,-1"], "`--seeds` must be"),
        (["--inner-lrs", "0.1,0"], "`--inner-lrs` must be positive numbers with commas between them, got '0.1,0'"),
        (["--inner-lrs", "a"], "`--inner-lrs` must be positive"),
        (["--inner-lrs", ""], "`--inner-lrs` must be positive numbers with commas between them, got ''"),
        (["--seeds", "101"], "`--seeds` must be at most 100 seeds, got 101: for seed 101 alone write '101,'"),
        (["--rounds", "0"], "`rounds` must be greater than or equal to 1"),
        (["--target-score", "-1"], "`--target-score` must be above 0, got -1"),
        (["--target-score", "75"], "`--target-score` must be an accuracy between 0 and 1, got 75: write 0.75 for 75 %"),
        (["--target-score", "nan"], "`--target-score` must be above 0, got nan"),
        (
            ["--algorithms", "maml,protonet", "--set", "inner-steps=3"],
            "`inner-steps` is no setting of `protonet`: set it for one algorithm alone, as `maml.inner-steps`",
        ),
        (
            ["--algorithms", "protonet,fedavg", "--set", "batch-size=3"],
            "`batch-size` is no setting of `protonet`: set it for one algorithm alone, as `fedavg.batch-size`",
        ),
        (["--algorithms", "protonet", "--set", "inner-steps=3"], "there is no setting `inner-steps`"),
        (["--set", "adapt-lrs=a"], "`adapt-lrs` must be positive numbers"),
        (["--set", "rats=1"], "there is no setting `rats`"),
        (["--set", "seed=3"], "`seed` cannot be set with `--set` here: use `--seeds`"),
        (["--set", "dataset=uji"], "`dataset` cannot be set with `--set` here: use `--dataset`"),
        (["--set", "resume-from=/x"], "`resume-from` cannot be set here"),
        (["--set", "validation-tasks=0"], "a comparison needs validation tasks: set `validation-tasks` above 0"),
        (["--set", "test-tasks=0"], "a comparison needs test tasks"),
        (["--algorithms", "protonet", "--dataset", "sinusoid"], "is defined for classification"),
    ],
)
def test_wrong_input_is_refused_with_one_sentence_before_anything_runs(
    start: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    command = start(lambda algorithm, lr, seed: (0.5, 1.0))
    assert (
        run_command(monkeypatch, tmp_path, *(["--algorithms", "maml"] if "--algorithms" not in arguments else []), *arguments)
        == 2
    )
    captured = capsys.readouterr()
    assert sentence in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert command.calls == []
    assert not (tmp_path / "runs").exists()


def test_the_number_of_runs_is_told_before_they_start(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(lambda algorithm, lr, seed: (0.5, 1.0))
    assert plan("maml", "protonet").describe() == "8 runs: maml (3 inner rates), protonet; 2 seeds each"
    assert run_command(monkeypatch, tmp_path, "--algorithms", "protonet", "--seeds", "1", "--json") == 0
    assert capsys.readouterr().err.startswith("1 run: protonet; 1 seed each\n")


def test_a_target_of_regression_may_be_above_1() -> None:
    replace(plan("fedavg"), dataset="sinusoid").check(3.5)


def test_seeds_and_rates_are_read_as_told() -> None:
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("0,1,5") == (0, 1, 5)
    assert parse_seeds("5,") == (5,)
    assert parse_seeds("101,") == (101,)
    assert parse_seeds("1,1") == (1,)
    assert parse_rates("0.1,1e-3,0.1") == (0.1, 0.001)
    # 0.3 / 3 = 0.1 and 3 * 0.3 = 0.9; 0.01 / 3 = 0.0033 is 0.003 with one digit.
    assert recommended_rates("digits") == (0.1, 0.3, 0.9)
    assert recommended_rates("sinusoid") == (0.003, 0.01, 0.03)
