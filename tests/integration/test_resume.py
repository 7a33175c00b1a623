"""A real run that is killed with SIGKILL, again and again, and resumed with one command."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from real_processes import SCRIPTS, quickbloom

from quickbloom.common.system.processes import end_all_with
from quickbloom.server_app.launch.flower_run import environment
from quickbloom.server_app.runs.directory import MEASURED, read_history

ROUNDS = 300
RUN = ["--algorithm", "maml", "--rounds", str(ROUNDS), "--set", "evaluate-every=7", "--seed", "5", "--no-report"]


def result(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bytes]]:
    """The summary and the history without times, places and ids of nodes, and the bytes of the table of scores."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [{key: value for key, value in record.items() if key not in MEASURED} for record in read_history(folder)]
    for line in lines:
        line["nodes"] = {
            key: value for key, value in line["nodes"].items() if key != "trained"
        }  # other ids in every simulation
    kept = {key: value for key, value in summary.items() if key not in ("seconds", "run_dir", "resumed", "workers")}
    return kept, lines, {"per_task": (folder / "per_task.csv").read_bytes()}


def killed(folder: Path, arguments: list[str], more_rounds: int) -> None:
    """Start the command and kill it when the history has so many lines more."""
    goal = len(read_history(folder)) + more_rounds
    mark = f"QUICKBLOOM_TEST_MARK={folder}"
    command = [str(SCRIPTS / "quickbloom"), "run", *arguments]
    process = subprocess.Popen(
        command, env={**environment(), "QUICKBLOOM_TEST_MARK": str(folder)}, stderr=subprocess.DEVNULL, cwd=folder.parent
    )
    try:
        deadline = time.monotonic() + 300
        while len(read_history(folder)) < goal:
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        end_all_with(mark)


def test_a_run_in_one_process_that_is_killed_twice_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole = quickbloom("run", *RUN, "--output", "whole", "--json", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    cut = tmp_path / "cut"
    killed(cut, [*RUN, "--output", str(cut)], 23)
    killed(cut, ["--resume", str(cut)], 61)
    rest = quickbloom("run", "--resume", "cut", "--json", "--no-report", cwd=tmp_path)
    assert rest.returncode == 0, rest.stderr
    assert "starting Flower" not in rest.stderr  # it goes on as it began: in one process
    assert result(cut) == result(tmp_path / "whole")
    assert [record["round"] for record in read_history(cut)] == list(range(1, ROUNDS + 1))
    assert json.loads(rest.stdout)["resumed"] == 2
    again = quickbloom("run", "--resume", "cut", cwd=tmp_path)
    assert again.returncode == 2
    assert "names a run that is finished" in " ".join(again.stderr.split())


@pytest.mark.slow
@pytest.mark.simulation
def test_a_simulation_that_is_killed_ends_like_one_that_was_not(tmp_path: Path) -> None:
    few = [*RUN, "--runtime", "simulation", "--rounds", "12"]
    whole = quickbloom("run", *few, "--output", "whole", "--json", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    killed(tmp_path / "cut", [*few, "--output", str(tmp_path / "cut")], 4)
    rest = quickbloom("run", "--resume", "cut", "--json", "--no-report", cwd=tmp_path)
    assert rest.returncode == 0, rest.stderr
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
