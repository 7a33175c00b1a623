"""`quickbloom compare` with real runs in processes of their own."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from real_processes import SCRIPTS, commands_with, quickbloom

from quickbloom.common.system.processes import end_all_with
from quickbloom.server_app.launch.flower_run import environment

SMALL = ["compare", "--algorithms", "fedavg,protonet", "--seeds", "2", "--rounds", "2", "--inner-lrs", "0.1,0.3", "--jobs", "1"]


@pytest.mark.slow
def test_a_comparison_is_fair_and_its_runs_are_not_repeated(tmp_path: Path) -> None:
    done = quickbloom(*SMALL, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result, directory = json.loads(done.stdout), tmp_path / "runs" / "compare-digits"
    written = {file.suffix for file in directory.glob("comparison.*")}
    assert written == {".html", ".json", ".md", ".csv", ".tex"}
    assert (directory / "comparison.html").read_text().count("<figure>") == 3
    for one, other in zip(*(row["runs"] for row in result["algorithms"]), strict=True):
        assert one["seed"] == other["seed"]
        assert _tasks(directory / one["directory"]) == _tasks(directory / other["directory"])
    fedavg = result["algorithms"][0]
    for run in fedavg["runs"]:
        assert run["validation"] == max(tried["validation"] for tried in fedavg["tried"] if tried["seed"] == run["seed"])
    assert fedavg["runs"][0]["shots"].keys() == {"1", "2"}

    summaries = {file: file.stat().st_mtime_ns for file in directory.glob("*/summary.json")}
    assert len(summaries) == 6  # on each of two seeds fedavg tries two rates, and protonet has one run
    again = quickbloom(*SMALL, "--json", cwd=tmp_path)
    assert json.loads(again.stdout) == result
    assert again.stderr.count("kept") == 6
    assert {file: file.stat().st_mtime_ns for file in directory.glob("*/summary.json")} == summaries


@pytest.mark.slow
def test_both_modes_are_compared_in_virtual_time(tmp_path: Path) -> None:
    settings = [
        "--dataset",
        "sinusoid",
        "--set",
        "sinusoid.clients=20",
        "--set",
        "tasks-per-round=4",
        "--set",
        "evaluate-every=2",
    ]
    options = ["--algorithms", "fomaml", "--seeds", "1", "--rounds", "6", "--inner-lrs", "0.01", "--jobs", "1"]
    modes = ["--modes", "sync,async", "--devices", "lognormal", "--set", "over-select=1.5"]
    done = quickbloom("compare", *options, *settings, *modes, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "`over-select` is for rounds that wait: the async runs go without" in done.stderr
    result, directory = json.loads(done.stdout), tmp_path / "runs" / "compare-sinusoid"
    assert [(row["algorithm"], row["mode"]) for row in result["algorithms"]] == [("fomaml", "sync"), ("fomaml", "async")]
    (waiting,), (free,) = (row["runs"] for row in result["algorithms"])
    assert _tasks(directory / waiting["directory"]) == _tasks(directory / free["directory"])
    for run in (waiting, free):
        lines = (directory / run["directory"] / "history.jsonl").read_text().splitlines()
        assert run["time"] == json.loads(lines[-1])["virtual_hours"] > 0
        assert run["timeline"][-1][3] == run["time"]
    assert free["time"] < waiting["time"]  # nobody waits for the slowest of a round
    assert waiting["time_to_sync"] <= waiting["time"]
    assert result["modes"]["unit"] == "virtual hours"
    assert (directory / "comparison.html").read_text().count("<figure>") == 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_from_outside_it_leaves_no_process_and_says_how_to_go_on(tmp_path: Path, number: int) -> None:
    mark = f"QUICKBLOOM_TEST_MARK={tmp_path}"
    running = subprocess.Popen(
        [SCRIPTS / "quickbloom", "compare", "--algorithms", "protonet", "--rounds", "100000", "--jobs", "1"],
        cwd=tmp_path,
        env={**environment(), "QUICKBLOOM_TEST_MARK": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("runs/*/*/history.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(running.pid, number)
        _, said = running.communicate(timeout=300)
        assert running.returncode == 130, said
        assert "Stopped; repeat the command to go on" in said
        assert "Traceback" not in said
        assert commands_with(mark) == []
    finally:
        running.kill()
        end_all_with(mark)


def _tasks(run_dir: Path) -> list[tuple[str, str]]:
    with (run_dir / "per_task.csv").open(newline="") as file:
        return [(row["split"], row["task"]) for row in csv.DictReader(file)]
