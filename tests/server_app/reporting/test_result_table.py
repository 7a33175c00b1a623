"""What a person is shown of a run's result."""

import io
from typing import Any

from rich.console import Console

from quickbloom.server_app.reporting.result_table import result_lines, result_table


def summary(**changes: Any) -> dict[str, Any]:
    scores = {"mean": [0.2, 0.5, 0.75], "ci95": [0.01, 0.02, 0.03], "worst10": [0.0, 0.25, 0.5]}
    split = {"steps": [0, 1, 2], "accuracy": scores, "loss": scores}
    facts: dict[str, Any] = {
        "algorithm": "maml",
        "dataset": "digits",
        "rounds": 2,
        "seed": 0,
        "failures": 0,
        "run_dir": "/tmp/r",
    }
    facts |= {"chosen": {"adapt_lr": 0.3, "adapt_steps": 2}, "seconds": {"total": 12.0, "round_median": 0.1}}
    facts |= {"tasks": {"train": 36, "validation": 8, "test": 12}, "bytes": {"up": 1_410_000, "down": 999}}
    return facts | {"validation": None, "test": split} | changes


def test_the_table_shows_before_after_worst_seconds_and_bytes() -> None:
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(result_table(summary()))
    text = " ".join(console.export_text().split())
    for part in (
        "20.0 ± 1.0 %",
        "75.0 ± 3.0 %",
        "50.0 %",
        "12 s in all",
        "0.10 s a round",
        "1.41 MB up",
        "999 B down",
    ):
        assert part in text


def test_a_diverged_score_is_called_that() -> None:
    scores = {"mean": [2.0, None], "ci95": [0.1, None], "worst10": [3.0, None]}
    split = {"steps": [0, 1], "mse": scores, "loss": scores}
    (line,) = result_lines(summary(test=split, chosen={"adapt_lr": 1.0, "adapt_steps": 1}))
    assert "mean squared error 2 ± 0.1 before, diverged after 1 step, " in line


def test_a_single_task_has_no_interval_and_the_table_says_why() -> None:
    scores = {"mean": [0.2, 0.5, 0.75], "ci95": [None, None, None], "worst10": [0.2, 0.5, 0.75]}
    one = summary(test={"steps": [0, 1, 2], "accuracy": scores, "loss": scores}, tasks={"train": 3, "validation": 0, "test": 1})
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(result_table(one))
    text = " ".join(console.export_text().split())
    assert "±" not in text
    assert "75.0 %" in text
    assert "of one task no interval: the spread over tasks cannot be told from a single one" in text
    assert result_lines(one) == ["1 test task: accuracy 20.0 % before, 75.0 % after 2 steps, worst 10 % 75.0 %"]


def test_an_error_of_own_data_has_its_unit_and_that_of_other_data_needs_none() -> None:
    scores = {"mean": [2.0, 1.0, 0.5], "ci95": [0.1, 0.1, 0.1], "worst10": [3.0, 2.0, 1.0]}
    split = {"steps": [0, 1, 2], "mse": scores, "loss": scores}
    for dataset, told in (("own", True), ("sinusoid", False)):
        console = Console(width=300, file=io.StringIO(), record=True)
        console.print(result_table(summary(dataset=dataset, test=split)))
        text = " ".join(console.export_text().split())
        assert "mean squared error" in text
        assert ("is of the standardised target (`own.scale`); rmse is in its unit" in text) == told
