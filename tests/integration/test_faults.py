"""Real SuperNodes over gRPC, one of which is killed and started again in a run: the run goes on, and the node comes back."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from real_processes import SCRIPTS, process

from quickbloom.common.flower import workers
from quickbloom.common.system.processes import end_group
from quickbloom.server_app.launch.flower_run import environment, free_port, healthy
from quickbloom.server_app.runs.directory import read_history

pytestmark = [pytest.mark.grpc, pytest.mark.slow]


def test_a_node_that_is_killed_and_restarted_takes_part_again(tmp_path: Path) -> None:
    home, run_dir = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    env = environment(home)
    http, fleet = free_port(), free_port()
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "127.0.0.1:{http}"\ninsecure = true\n')
    link: list[str | Path] = [SCRIPTS / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(http)]
    link += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--disable-runtime-dependency-installation"]

    def node(partition: int) -> list[str | Path]:
        start: list[str | Path] = [*workers.command("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{fleet}"]
        return [*start, "--port", str(free_port()), "--node-config", f"partition-id={partition} num-partitions=2"]

    command = [
        str(SCRIPTS / "quickbloom"),
        "run",
        "--connection",
        "loopback",
        "--output",
        str(run_dir),
        "--json",
        "--no-report",
    ]
    for setting in ("rounds=300", "evaluate-every=0", "round-deadline=25", "on-too-few=repeat"):
        command += ["--set", setting]
    with process(*link, env=env, log=home / "superlink.log"):
        _until(lambda: healthy(http), "the SuperLink did not start")
        with process(*node(0), env=env, log=home / "node0.log"), process(*node(1), env=env, log=home / "node1.log") as doomed:
            running = subprocess.Popen(
                command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            try:
                _until(lambda: len(read_history(run_dir)) >= 1, "no round came to an end")
                assert read_history(run_dir)[0]["failures"] == []
                os.killpg(doomed.pid, signal.SIGKILL)
                before = len(read_history(run_dir))
                with process(*node(1), env=env, log=home / "again.log"):
                    _until(lambda: any(r["failures"] for r in read_history(run_dir)[before:]), "nobody was missed")
                    _until(lambda: len(_whole(run_dir, before)) > 1, "the node did not come back")
                    running.send_signal(signal.SIGINT)
                    _, said = running.communicate(timeout=300)
            finally:
                end_group(running)
    assert running.returncode == 130, said
    rounds = read_history(run_dir)
    missed = [failure["who"] for record in rounds for failure in record["failures"]]
    assert missed.count(missed[0]) == 1  # the dead node was waited for once
    assert [r["round"] for r in rounds] == list(range(1, len(rounds) + 1))


def _whole(run_dir: Path, before: int) -> list[int]:
    """The rounds after `before` and a failure in which both nodes answered."""
    rounds = read_history(run_dir)[before:]
    failed = next((i for i, record in enumerate(rounds) if record["failures"]), len(rounds))
    return [record["round"] for record in rounds[failed + 1 :] if record["nodes"]["answered"] == 2]


def _until(condition: Callable[[], bool], sentence: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, sentence
        time.sleep(0.2)
