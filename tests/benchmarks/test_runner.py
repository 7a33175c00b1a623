"""What the benchmarks share: statistics, resuming, the result file. The command itself is a stub."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import runner
from benchmarks.runner import BenchmarkError, Plan, Variant, average, figures, measure, run_all, run_only

PLAN = Plan("try", "it works", "digits", 3, (Variant("a", "maml"), Variant("b", "fedavg", ("inner-lr=0.1",), {"paper": 0.5})))


class Command:
    """Stands in for the process of `quickbloom run`: leaves a history and a summary.

    The accuracy after step s is seed / 10 + s / 100.
    """

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.code = 0

    def __call__(self, command: list[str], **options: Any) -> "Command":
        assert Path(command[0]).name == "quickbloom"
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        self.calls.append(command)
        options["stderr"].write(b"error: no such thing\n" * (self.code != 0))
        directory = Path(command[command.index("--output") + 1])
        assert [file.name for file in directory.iterdir()] == ["command.log"]
        seconds = (2.0, 0.1, 0.3)
        (directory / "history.jsonl").write_text("".join(json.dumps({"seconds": value}) + "\n" for value in seconds))
        seed = int(command[command.index("--seed") + 1])
        mean = [seed / 10 + step / 100 for step in range(3)]
        summary = {
            "seed": seed,
            "run_dir": str(directory),
            "tasks": {"train": 3, "validation": 1, "test": 1},
            "chosen": {"adapt_lr": 0.3, "adapt_steps": 1},
            "test": {"accuracy": {"mean": mean, "ci95": [0.0] * 3, "worst10": [value / 2 for value in mean]}},
            "bytes": {"up": 1, "down": 2},
            "seconds": {"total": 5.0, "cpu": 4.0, "round_median": 0.3},
            "failures": 0,
            "versions": {"flwr": "1.39.0"},
        }
        (directory / "summary.json").write_text(json.dumps(summary))
        return self

    def poll(self) -> int:
        return self.code


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    stub = Command()
    monkeypatch.setattr(subprocess, "Popen", stub)
    monkeypatch.setattr(runner, "commit", lambda: "0123abcd")
    monkeypatch.setattr(runner, "machine", lambda: {"cores": 2})
    monkeypatch.setattr(runner, "RAW", tmp_path / "raw")
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    return stub


def test_mean_and_deviation_by_hand() -> None:
    # 1, 2, 6: mean 3, deviations -2, -1, 3, variance 14 / 2 = 7.
    result = average([{"after": 1.0}, {"after": 2.0}, {"after": 6.0}], ["after"])
    assert result == {"mean": {"after": 3.0}, "sd": {"after": pytest.approx(7**0.5)}}


def test_a_single_seed_has_no_deviation() -> None:
    assert average([{"after": 0.5}], ["after"]) == {"mean": {"after": 0.5}, "sd": {"after": None}}


def test_figures_are_read_at_the_chosen_step_and_leave_out_the_first_round(command: Command) -> None:
    read = figures(measure(PLAN, [(PLAN.variants[0], 2)])[0])
    assert (read["before"], read["after"], read["worst10"]) == pytest.approx((0.2, 0.21, 0.105))
    assert read["round_median"] == pytest.approx(0.2)
    assert read["round_p90"] == pytest.approx(0.28)
    assert read["round_first"] == 2.0


def test_finished_runs_are_not_repeated(command: Command) -> None:
    first = run_all(PLAN, [0, 1])
    assert len(command.calls) == 4
    assert run_all(PLAN, [0, 1, 2])["variants"][0]["runs"][:2] == first["variants"][0]["runs"]
    assert len(command.calls) == 6
    run_all(PLAN, [0], fresh=True)
    assert len(command.calls) == 8


def test_single_variants_are_kept_for_the_whole(command: Command) -> None:
    run_only(PLAN, ["b"], [0, 1])
    assert [call[call.index("--algorithm") + 1] for call in command.calls] == ["fedavg", "fedavg"]
    run_all(PLAN, [0, 1])
    assert [call[call.index("--algorithm") + 1] for call in command.calls[2:]] == ["maml", "maml"]


def test_a_variant_that_is_not_there_is_refused(command: Command) -> None:
    with pytest.raises(SystemExit, match=r"`--only` must name variants of this benchmark \(a, b\), got c"):
        run_only(PLAN, ["a", "c"], [0])
    assert not command.calls


def test_the_nodes_may_live_in_the_process_of_the_command(command: Command) -> None:
    measure(replace(PLAN, in_process=True), [(PLAN.variants[0], 0)])
    assert "in-process" in command.calls[0]
    measure(PLAN, [(PLAN.variants[0], 0)])
    assert "simulation" in command.calls[1]


def test_a_failed_run_names_the_command_and_the_reason(command: Command) -> None:
    command.code = 2
    with pytest.raises(BenchmarkError, match=r"quickbloom run --algorithm maml .* ended with code 2: no such thing"):
        measure(PLAN, [(PLAN.variants[0], 0)])


def test_the_result_file_has_what_it_promises_and_no_path(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_all(PLAN, [0, 2])
    runner.goal(result, "a reaches 0.1", 0.11, met=True)
    runner.finish(result, runner.table(result))
    text = (runner.RESULTS / "try.json").read_text()
    assert str(runner.RAW) not in text
    written = json.loads(text)
    assert {"schema", "claim", "seeds", "variants", "goals", "machine", "versions", "commit", "date"} <= written.keys()
    assert (written["seeds"], written["commit"]) == ([0, 2], "0123abcd")
    second = written["variants"][1]
    assert second["set"] == ["inner-lr=0.1"]
    assert second["configuration"]["fedavg.inner-lr"] == 0.1
    assert second["reference"] == {"paper": 0.5}
    assert second["mean"]["after"] == pytest.approx(0.11)
    assert second["sd"]["after"] == pytest.approx(0.2 / 2**0.5)
    assert second["curve"] == pytest.approx([0.1, 0.11, 0.12])
    assert "| b | 10.0 ± 14.1 | 11.0 ± 14.1 | 5.5 ± 7.1 | 3 | 4 | paper 50.0 |" in capsys.readouterr().out
