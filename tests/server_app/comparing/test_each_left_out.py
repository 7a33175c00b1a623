"""`compare --leave-one-out`: every algorithm and task, kept when repeated, and a table worked by hand. The runs are a stub."""

import csv
import io
import json
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.comparing.comparison import place, planned
from quickbloom.server_app.comparing.each_left_out import caption, carry_out, failures, table

TEST = {"fomaml": {"A": 0.9, "B": 0.8, "C": 0.7, "D": 0.6}, "protonet": {"A": 0.8, "B": 0.8, "C": 0.5, "D": 0.6}}
"""Test accuracies of the algorithms on the task that was left out."""


class Stub:
    """Stands in for the process of `quickbloom run`. `fails`: (algorithm, task) of runs that fail; `name`: of the metric."""

    def __init__(self, name: str = "accuracy", fails: set[tuple[str, str]] | None = None) -> None:
        self.name, self.fails = name, fails or set()
        self.calls: list[tuple[str, str, float, int]] = []
        self.code = 0

    def __call__(self, command: list[str], **options: Any) -> "Stub":
        given = dict(text.split("=", 1) for word, text in pairwise(command) if word == "--set")
        algorithm, task = command[command.index("--algorithm") + 1], given["own.leave-out"]
        rate, seed = float(given.get(f"{algorithm}.inner-lr", 0)), int(command[command.index("--seed") + 1])
        self.calls.append((algorithm, task, rate, seed))
        process = Stub(self.name, self.fails)
        process.code = int((algorithm, task) in self.fails)
        if process.code:
            options["stderr"].write(b"error: too few examples\n")
        else:
            # The higher rate validates better, and its test score is that of the table.
            self.leave(Path(command[command.index("--output") + 1]), TEST[algorithm][task] * (1 if rate != 0.1 else 0.5), rate)
        return process

    def leave(self, directory: Path, score: float, rate: float) -> None:
        def part(after: float) -> dict[str, Any]:
            return {name: {"mean": [0.5, after], "worst10": [0, 0]} for name in (self.name, "loss")}

        validation = rate if self.name == "accuracy" else 1 - rate
        summary = {
            "tasks": {"train": 2, "validation": 1, "test": 1},
            "chosen": {"adapt_lr": 0.3, "adapt_steps": 1},
            "validation": part(validation),
            "test": part(score),
            "seconds": {"total": 5.0},
        }
        (directory / "summary.json").write_text(json.dumps(summary))

    def poll(self) -> int:
        return self.code


def data(tmp_path: Path, tasks: str = "ABCD", number: bool = False) -> str:
    rows = [f"{task},{i}.5,{i * 1.25 if number else 'ab'[i % 2]}" for task in tasks for i in range(24)]
    (tmp_path / "h.csv").write_text("\n".join(["hospital,x,y", *rows]))
    return str(tmp_path / "h.csv")


def asked(tmp_path: Path, *algorithms: str, seeds: str = "1", tasks: str = "ABCD", number: bool = False, **more: Any) -> Any:
    options = {"data": data(tmp_path, tasks, number), "task": "hospital", "target": "y", "inner_lrs": "0.1,0.3", **more}
    return planned(list(algorithms), seeds=seeds, leave_one_out=True, **options)


def done(plan: Any, directory: Path) -> tuple[dict[str, Any], str]:
    directory.mkdir(exist_ok=True)
    said = io.StringIO()
    return carry_out(plan, directory, 1, Console(file=said, width=500)), said.getvalue()


def test_every_algorithm_leaves_every_task_out_once_and_repeating_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub()
    monkeypatch.setattr(subprocess, "Popen", stub)
    plan = asked(tmp_path, "fomaml", "protonet", seeds="2")
    result, said = done(plan, tmp_path / "out")
    fomaml = [("fomaml", task, rate, seed) for task in "ABCD" for seed in (0, 1) for rate in (0.1, 0.3)]
    protonet = [("protonet", task, 0.0, seed) for task in "ABCD" for seed in (0, 1)]
    assert sorted(stub.calls) == sorted([*fomaml, *protonet])
    assert "fomaml, inner lr 0.3, seed 1, without C" in said
    assert [set(fold["inner_lr"]) for fold in result["algorithms"][0]["folds"]] == [{0.3}] * 4
    (next((tmp_path / "out").glob("protonet-*")) / "finished.json").unlink()
    again, said = done(plan, tmp_path / "out")
    assert (again, said.count("kept"), len(stub.calls)) == (result, 23, 25)


def test_a_task_of_one_class_is_not_left_out_where_it_has_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", Stub("auroc"))
    rows = [f"{task},{i}.5,{'a' if task == 'B' else 'ab'[i % 2]}" for task in "ABCD" for i in range(24)]
    (tmp_path / "one.csv").write_text("\n".join(["hospital,x,y", *rows]))
    plan = asked(tmp_path, "protonet", data=str(tmp_path / "one.csv"))
    result, said = done(replace(plan, settings=(*plan.settings, "metric=auroc")), tmp_path / "out")
    assert [fold["task"] for fold in result["algorithms"][0]["folds"]] == ["A", "C", "D"]
    assert "Remark: the test rows of 1 task (B) are of one class, which has no AUROC: they only train" in said


def test_the_table_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means 0.75 and 0.675; deviations sqrt(0.05 / 3) = 0.1291 and sqrt(0.0675 / 3) = 0.15; t of 3 degrees is 3.1824.

    Differences 0.1, 0, 0.2, 0: mean 0.075, deviation sqrt(0.0275 / 3) = 0.09574, half-width 3.1824 * 0.09574 / 2 = 0.1523.
    """
    monkeypatch.setattr(subprocess, "Popen", Stub())
    result, _ = done(asked(tmp_path, "protonet", "fomaml"), tmp_path / "out")
    first, second = result["algorithms"]
    assert (first["algorithm"], first["after"], first["worst"], first["behind"]) == ("fomaml", pytest.approx(0.75), "D", None)
    assert first["ci95"] == pytest.approx(3.182446 * 0.1290994 / 2)
    assert (second["after"], second["worst"]) == (pytest.approx(0.675), "C")
    assert second["ci95"] == pytest.approx(3.182446 * 0.15 / 2)
    assert second["behind"] == {"mean": pytest.approx(0.075), "ci95": pytest.approx(0.152348, abs=1e-6), "tasks": 4}
    assert caption(result)[1] == "Not told apart from fomaml by these tasks: protonet."
    assert table(result)[1][1] == ["protonet", "50.0", "67.5 ± 23.9", "7.5 ± 15.2", "C: 50.0", "-"]
    assert json.loads((tmp_path / "out" / "leave-one-out.json").read_text()) == result
    with (tmp_path / "out" / "leave-one-out.csv").open(newline="") as file:
        scores = {(row["algorithm"], row["task"]): float(row["after"]) for row in csv.DictReader(file)}
    assert scores == {(name, task): score for name, of_task in TEST.items() for task, score in of_task.items()}
    assert "| fomaml | 50.0 | 75.0" in (tmp_path / "out" / "leave-one-out.md").read_text()


def test_a_lower_error_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", Stub("mse"))
    monkeypatch.setitem(TEST, "reptile", {task: score - 0.3 for task, score in TEST["fomaml"].items()})
    result, _ = done(asked(tmp_path, "fomaml", "reptile", number=True), tmp_path / "out")
    assert [row["algorithm"] for row in result["algorithms"]] == ["reptile", "fomaml"]
    assert result["algorithms"][1]["behind"] == {"mean": pytest.approx(0.3), "ci95": pytest.approx(0, abs=1e-12), "tasks": 4}
    assert result["algorithms"][0]["worst"] == "A"
    assert len(caption(result)) == 1  # 0.3 with no spread is told apart


def test_an_algorithm_that_fails_on_a_task_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", Stub(fails={("fomaml", "A")}))
    result, _ = done(asked(tmp_path, "fomaml", "protonet"), tmp_path / "out")
    assert [row["algorithm"] for row in result["algorithms"]] == ["protonet", "fomaml"]
    assert (result["algorithms"][1]["failed"], result["algorithms"][1]["behind"]["tasks"]) == (1, 3)
    assert failures(result) == ["fomaml without A: too few examples"]
    assert table(result)[1][1][-1] == "1 of 4"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tasks": "AB"}, "needs at least 3 tasks, of which one chooses the rates, the data have 2"),
        ({"settings": ["own.leave-out=A"]}, "excludes `own.leave-out`"),
        ({"simulation": True}, "excludes `--simulation`"),
        ({"target_score": 0.5}, "excludes `--simulation` and `--target-score`"),
        ({"data": None, "task": None, "target": None, "dataset": "digits"}, "is for data of your own"),
    ],
)
def test_what_cannot_be_left_out_is_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        asked(tmp_path, "protonet", **more)


def test_its_directory_is_its_own(tmp_path: Path) -> None:
    plan = asked(tmp_path, "protonet")
    assert place(plan, None, leave_one_out=True) == Path("runs/leave-one-out-own")
    assert place(plan, None) == Path("runs/compare-own")
