"""Few tasks: each is held out once, by a run that equals the one that a person would type."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.metric import RMSE
from quickbloom.server_app.cli import main
from quickbloom.server_app.comparing.leave_one_out import fold, metric_for_all, result, table, tasks_of, write

SMALL = ["--in-process", "--no-report", "--json", "--set", "evaluate-every=0", "--set", "mlp.hidden=16"]


def file(path: Path, names: str) -> list[str]:
    """The options for a file with one task of 40 rows for each letter; every other one has its marker turned round."""
    rng = np.random.default_rng(0)
    lines = ["hospital,marker,outcome"]
    for i, name in enumerate(names):
        for marker in rng.normal(size=40):
            lines.append(f"{name},{marker:.4f},{'ill' if (-1) ** i * marker > 0 else 'well'}")
    path.write_text("\n".join(lines))
    return ["--data", str(path), "--task", "hospital", "--target", "outcome", "--rounds", "2"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main.cli, ["run", *SMALL, *arguments])


def of_one_class(path: Path, names: str, alike: str) -> list[str]:
    """The same file, but the rows of the tasks `alike` are all of one class."""
    options = file(path, names)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(f"{line.rpartition(',')[0]},ill" if line[0] in alike else line for line in lines))
    return options


def test_a_task_of_one_class_stops_no_leave_one_out_by_auroc(tmp_path: Path) -> None:
    data = of_one_class(tmp_path / "h.csv", "ABCD", "B")
    done = invoke(*data, "--leave-one-out", "--set", "metric=auroc", "--output", str(tmp_path / "folds"))
    assert done.exit_code == 0, done.output
    (said,) = [line for line in done.stderr.splitlines() if "of one class" in line]
    assert said == (
        "Remark: the test rows of 1 task (B) are of one class, which has no AUROC: they only train, and the means are over "
        "the other tasks"
    )
    found = json.loads(done.stdout)
    assert [(fold["task"], fold["train"]) for fold in found["folds"]] == [("A", 3), ("C", 3), ("D", 3)]  # B trains
    assert found["mean"][1] == pytest.approx(np.mean([fold["auroc_after"] for fold in found["folds"]]))
    # By the log loss B counts like all others.
    by_loss = invoke(*data, "--leave-one-out", "--set", "metric=log_loss", "--output", str(tmp_path / "loss"))
    assert [fold["task"] for fold in json.loads(by_loss.stdout)["folds"]] == list("ABCD")


def test_where_no_task_has_an_auroc_another_metric_is_asked_for(tmp_path: Path) -> None:
    data = of_one_class(tmp_path / "h.csv", "ABC", "ABC")
    path = tmp_path / "h.csv"
    path.write_text(path.read_text() + "\n" + "\n".join(f"{name},0.5,well" for name in "AAA"))
    options = ["--set", "metric=auroc", "--set", "own.split-column=part", "--leave-one-out"]
    lines = path.read_text().splitlines()
    parts = ["part", *("train" if line.endswith("well") or i % 3 else "test" for i, line in enumerate(lines[1:]))]
    path.write_text("\n".join(f"{line},{part}" for line, part in zip(lines, parts, strict=True)))
    with pytest.raises(
        ConfigError, match=r"of 3 tasks \(A, B, C\) are of one class, which has no AUROC: choose another `metric`"
    ):
        CliRunner().invoke(
            main.cli, ["run", *SMALL, *data, *options, "--output", str(tmp_path / "folds")], catch_exceptions=False
        )


def test_every_fold_is_the_run_that_leaves_its_task_out(tmp_path: Path) -> None:
    data = file(tmp_path / "h.csv", "ABCD")
    done = invoke(*data, "--leave-one-out", "--output", str(tmp_path / "folds"))
    assert done.exit_code == 0, done.output
    told = [line.partition(": accuracy")[0] for line in done.stderr.splitlines() if line.strip()]
    assert told == ["1/4 A left out", "2/4 B left out", "3/4 C left out", "4/4 D left out"]
    found = json.loads(done.stdout)
    assert [fold["task"] for fold in found["folds"]] == list("ABCD")
    assert json.loads((tmp_path / "folds" / "leave-one-out.json").read_text()) == found
    with (tmp_path / "folds" / "leave-one-out.csv").open(newline="") as table:
        assert [row["task"] for row in csv.DictReader(table)] == list("ABCD")
    alone = ["--set", "own.leave-out=C", "--set", "validation-tasks=0"]  # ridge has no rate to choose: all others train
    plain = json.loads(invoke(*data, *alone, "--output", str(tmp_path / "plain")).stdout)
    step = plain["chosen"]["adapt_steps"]
    fold = found["folds"][2]
    assert (fold["accuracy_before"], fold["accuracy_after"], fold["adapt_lr"], fold["adapt_steps"]) == (
        plain["test"]["accuracy"]["mean"][0],
        plain["test"]["accuracy"]["mean"][step],
        plain["chosen"]["adapt_lr"],
        step,
    )
    assert (fold["train"], fold["validation"]) == (3, 0)
    assert found["mean"][1] == pytest.approx(sum(fold["accuracy_after"] for fold in found["folds"]) / 4, abs=1e-6)


def test_it_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    data, folds = file(tmp_path / "h.csv", "ABCD"), tmp_path / "folds"
    whole = invoke(*data, "--leave-one-out", "--output", str(folds))
    written = {name: (folds / name / "summary.json").stat().st_mtime_ns for name in "ABCD"}
    for name in "CD":  # one fold was interrupted, and one not begun
        (folds / name / "summary.json").unlink()
    shutil.rmtree(folds / "D")
    again = invoke(*data, "--leave-one-out", "--output", str(folds))
    assert again.exit_code == 0, again.output
    told = [line.endswith(", kept") for line in again.stderr.splitlines() if "left out" in line]
    assert told == [True, True, False, False]
    first, second = ({**json.loads(one.stdout), "folds": None} for one in (whole, again))
    assert first == second
    now = {name: (folds / name / "summary.json").stat().st_mtime_ns for name in "ABCD"}
    assert [now[name] == written[name] for name in "ABCD"] == [True, True, False, False]
    for changed in (["--set", "inner-lr=0.2"], ["--seed", "1"]):
        with pytest.raises(ConfigError, match="holds folds of other settings or data"):
            CliRunner().invoke(
                main.cli, ["run", *SMALL, *data, *changed, "--leave-one-out", "--output", str(folds)], catch_exceptions=False
            )
    with (tmp_path / "h.csv").open("a") as rows:
        rows.write("\nA,0.5,ill")
    with pytest.raises(ConfigError, match="holds folds of other settings or data"):
        CliRunner().invoke(main.cli, ["run", *SMALL, *data, "--leave-one-out", "--output", str(folds)], catch_exceptions=False)


def test_what_was_not_begun_by_it_is_not_removed(tmp_path: Path) -> None:
    data, folds = file(tmp_path / "h.csv", "AB"), tmp_path / "folds"
    (folds / "A").mkdir(parents=True)
    for name in ("notes.txt", "config.json", "history.jsonl"):
        (folds / "A" / name).write_text("{}")
    for _ in range(2):  # the second time it has begun there
        with pytest.raises(ConfigError, match="already holds a run"):
            CliRunner().invoke(
                main.cli, ["run", *SMALL, *data, "--leave-one-out", "--output", str(folds)], catch_exceptions=False
            )
        assert (folds / "A" / "notes.txt").is_file()


def test_a_warning_of_all_folds_is_told_once(tmp_path: Path) -> None:
    data = file(tmp_path / "h.csv", "ABCD")
    with (tmp_path / "h.csv").open("a") as rows:
        rows.write("\nWard 0,0.5,ill\nWard-0,0.5,ill")
    done = invoke(*data, "--leave-one-out", "--output", str(tmp_path / "folds"))
    assert done.exit_code == 0, done.output
    told = [line for line in done.stderr.splitlines() if "are left out" in line]
    assert len(told) == 1
    assert told[0].startswith("2 tasks are left out: Ward 0 and Ward-0 (it has 1 row")


def test_two_tasks_are_too_few_for_a_split_and_enough_to_leave_one_out(tmp_path: Path) -> None:
    data = file(tmp_path / "h.csv", "AB")
    with pytest.raises(ConfigError, match="use `quickbloom run --leave-one-out`"):
        CliRunner().invoke(main.cli, ["run", *SMALL, *data], catch_exceptions=False)
    done = invoke(*data, "--leave-one-out", "--output", str(tmp_path / "folds"))
    assert done.exit_code == 0, done.output
    assert [(fold["task"], fold["train"], fold["validation"]) for fold in json.loads(done.stdout)["folds"]] == [
        ("A", 1, 0),
        ("B", 1, 0),
    ]


@pytest.mark.parametrize(
    ("names", "more", "words"),
    [
        ("A", [], "`--leave-one-out` needs at least two tasks, the data have 1"),
        ("AB", ["--set", "own.leave-out=A"], "`--leave-one-out` excludes"),
        ("", [], "`--leave-one-out` is for data of your own"),
    ],
)
def test_what_cannot_be_left_out_is_refused_in_one_sentence(tmp_path: Path, names: str, more: list[str], words: str) -> None:
    data = file(tmp_path / "h.csv", names) if names else []
    with pytest.raises(ConfigError, match=words):
        CliRunner().invoke(main.cli, ["run", *SMALL, *data, *more, "--leave-one-out"], catch_exceptions=False)


def hand_made(task: str, after: float | None, **baselines: float) -> dict[str, Any]:
    scores = {"rmse_before": 9.0, "rmse_after": after, **{f"rmse_{name}": value for name, value in baselines.items()}}
    return {"task": task, "train": 2, "validation": 0, **scores, "adapt_lr": 0.1, "adapt_steps": 1, "run_dir": "none"}


def printed(found: dict[str, Any]) -> str:
    file = io.StringIO()
    Console(file=file, width=200).print(table(found))
    return file.getvalue()


def test_the_verdict_over_folds_by_hand() -> None:
    # Own rows are the best baseline: 2 on average, the constant has 4. Gains 1, 2, 3: mean 2, half 4.303 / sqrt(3) = 2.48.
    folds = [hand_made(name, 1.0, own=1.0 + gain, constant=4.0) for name, gain in (("[b]A", 1), ("B", 2), ("C", 3))]
    found = result(folds, RMSE)
    assert found["baselines"]["best"] == "own"
    assert found["baselines"]["gain"] == 2.0
    assert found["baselines"]["ci95"] == pytest.approx(2.4841, abs=1e-4)
    text = printed(found)
    assert "[b]A" in text
    assert "ridge, own rows" in text
    assert "3 ± 2.5" in text
    words = " ".join(text.split())
    assert "the trained model does not beat it for certain (better by 2 ± 2.5 over 3 tasks)" in words


def test_without_baselines_the_folds_have_no_verdict() -> None:
    text = printed(result([hand_made("A", 1.0), hand_made("B", 2.0)], RMSE))
    assert "baseline" not in text


def test_a_fold_that_lacks_a_baseline_or_diverged_is_written_all_the_same(tmp_path: Path) -> None:
    found = result([hand_made("A", None, constant=4.0), hand_made("B", 2.0, constant=3.0, own=1.0)], RMSE)
    write(tmp_path, found)
    with (tmp_path / "leave-one-out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rmse_own"] for row in rows] == ["", "1.0"]
    content = json.loads((tmp_path / "leave-one-out.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["mean"][1] is None


def test_one_metric_for_all_folds_is_that_of_all_rows(tmp_path: Path) -> None:
    # Half of the rows of A are "no", and all of B: with as many of B as of A that is three of four, the limit of two classes.

    def chosen(of_b: int, **more: Any) -> str:
        rows = [f"A,{place},{'no' if place % 2 else 'yes'}" for place in range(40)]
        rows += [f"B,{place},no" for place in range(of_b)]
        path = tmp_path / f"{of_b}.csv"  # a file is read once in a process
        path.write_text("\n".join(["who,x,y", *rows]))
        settings = {"dataset": "own", "own.path": str(path), "own.task-column": "who", "own.target-column": "y", **more}
        return metric_for_all(parse_run_config(settings))

    assert chosen(20) == "accuracy"
    assert chosen(80) == "balanced_accuracy"
    assert chosen(80, metric="auroc") == "auroc"


def test_seen_users_alone_leave_nobody_to_be_left_out(tmp_path: Path) -> None:
    config = parse_run_config({"dataset": "own", "own.path": str(tmp_path / "any.csv"), "evaluate-users": "seen"})
    with pytest.raises(ConfigError, match='`evaluate-users` must not be "seen" with `--leave-one-out`'):
        tasks_of(config)
    assert fold({}, "A", 3, tmp_path)["evaluate-users"] == "unseen"  # the others are not asked: it would take time
    assert fold({"evaluate-users": "both"}, "A", 3, tmp_path)["evaluate-users"] == "both"
