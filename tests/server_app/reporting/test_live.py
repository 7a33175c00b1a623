"""What is read out of a run's log, and what a person is shown."""

import json
from typing import Any

import pytest

from quickbloom.server_app.reporting.live import SUMMARY, LogReader

LOG = """INFO :      Run directory: /tmp/r
WARNING :   Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.
WARNING :   Node 7 does not take part: it is asleep
WARNING :   1 task is left out: E (it has 1 row)
INFO :      [ROUND 1/2]
INFO :      	└──> Aggregated MetricRecord: {'loss': 1.5, 'tasks': 37}
INFO :
INFO :      [ROUND 2/2]
INFO :      	└──> Aggregated MetricRecord: {'loss': 1.25, 'tasks': 37}
INFO :      	└──> Aggregated MetricRecord: {'accuracy-before': 0.2, 'accuracy-after': 0.755}
INFO :      Strategy execution finished in 3.82s"""


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


def test_a_line_is_said_for_every_round_and_every_warning_of_ours() -> None:
    reader = LogReader()
    said = [text for line in LOG.splitlines() if (text := reader.read(line))]
    assert said == [
        "Node 7 does not take part: it is asleep",
        "1 task is left out: E (it has 1 row)",
        "round 1/2   query loss 1.5000",
        "round 2/2   query loss 1.2500   validation accuracy 20.0 % -> 75.5 %",
    ]
    assert (reader.round, reader.total, reader.summary) == (2, 2, None)


def test_the_run_directory_is_found_in_the_log() -> None:
    reader = LogReader()
    assert reader.read("INFO :      Run directory: /data/my runs/digits-maml") is None
    assert reader.run_dir == "/data/my runs/digits-maml"


def test_the_summary_is_found_in_the_log() -> None:
    reader = LogReader()
    assert reader.read(f"INFO :      {SUMMARY}{json.dumps(summary())}") is None
    assert reader.summary == summary()


@pytest.mark.parametrize("line", ["", "Traceback", "INFO :", "round 3", "[ROUND x/y]", "WARNING :   something of Flower's"])
def test_other_lines_are_passed_over(line: str) -> None:
    assert LogReader().read(line) is None


def test_a_run_that_diverges_is_read_without_an_error() -> None:
    reader = LogReader()
    reader.read("INFO :      [ROUND 1/2]")
    reader.read("INFO :      	└──> Aggregated MetricRecord: {'loss': nan, 'tasks': 37}")
    reader.read("INFO :      	└──> Aggregated MetricRecord: {'mse-before': 1e+20, 'mse-after': inf}")
    assert reader.read("INFO :      [ROUND 2/2]") == "round 1/2   query loss nan   validation mean squared error 1e+20 -> inf"
