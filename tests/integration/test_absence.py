"""A real SuperLink that is away in the middle of a run, killed or frozen, for longer than Flower waits for a heartbeat.

Flower's and our times are about a tenth here, but a node may take 6 s to connect again as ever, so it has 10 s for a heartbeat;
`absence` has the real ones.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from real_processes import SCRIPTS, process, wait_for

from quickbloom.common.flower import workers
from quickbloom.common.system.processes import end_group
from quickbloom.server_app.launch.flower_run import environment, free_port
from quickbloom.server_app.runs.directory import read_history

pytestmark = [pytest.mark.grpc, pytest.mark.slow]

SHORTER = """
from flwr.common import constant
constant.HEARTBEAT_DEFAULT_INTERVAL, constant.HEARTBEAT_CALL_TIMEOUT, constant.HEARTBEAT_MIN_INTERVAL = 5, 0.5, 1
from flwr.supercore import heartbeat
soon = heartbeat.exponential
heartbeat.exponential = lambda max_delay: soon(max_delay=max_delay / 10)
"""
LINK = """
from quickbloom.common.flower.states import absence
absence.SILENCE, absence.LONGEST = absence.SILENCE / 10, absence.LONGEST / 10
from quickbloom.common.flower.superlink import main
main()
"""
AWAY = 25.0


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_run_goes_on_when_its_superlink_is_back(how: str, tmp_path: Path) -> None:
    home, run_dir, site = tmp_path / "home", tmp_path / "run", tmp_path / "site"
    home.mkdir()
    site.mkdir()
    (site / "sitecustomize.py").write_text(SHORTER)
    env = environment(home)
    env["PYTHONPATH"] = os.pathsep.join([str(site), str(Path(__file__).resolve().parents[2])])
    http, fleet = free_port(), free_port()
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "127.0.0.1:{http}"\ninsecure = true\n')
    link = [sys.executable, "-P", "-c", LINK, "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(http)]
    link += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--database", str(home / "state.db"), "--isolation", "process"]
    link += ["--disable-runtime-dependency-installation"]
    superexec = workers.command("flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{http}")

    def node(partition: int) -> list[str]:
        start = [*workers.command("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{fleet}"]
        return [*start, "--port", str(free_port()), "--node-config", f"partition-id={partition} num-partitions=2"]

    command = [str(SCRIPTS / "quickbloom"), "run", "--connection", "loopback", "--output", str(run_dir), "--no-report"]
    for setting in ("rounds=40", "evaluate-every=0", "min-nodes=2", "round-deadline=15", "baselines=false"):
        command += ["--set", setting]
    with (
        process(*link, env=env, log=home / "superlink.log") as away,
        process(*superexec, env=env, log=home / "superexec.log"),
        process(*node(0), env=env, log=home / "node0.log"),
        process(*node(1), env=env, log=home / "node1.log"),
    ):
        wait_for(http)
        running = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            _until(lambda: len(read_history(run_dir)) >= 3, "no round came to an end")
            os.killpg(away.pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            away.wait(10) if how == "killed" else None
            time.sleep(AWAY)
            before = len(read_history(run_dir))
            assert before < 40
            if how == "killed":
                with process(*link, env=env, log=home / "again.log"):
                    said = running.communicate(timeout=300)[1]
            else:
                os.killpg(away.pid, signal.SIGCONT)
                said = running.communicate(timeout=300)[1]
        finally:
            end_group(running)
    assert running.returncode == 0, said
    rounds = read_history(run_dir)
    assert [record["round"] for record in rounds] == list(range(1, 41))
    assert [failure for record in rounds for failure in record["failures"]] == []
    assert json.loads((run_dir / "summary.json").read_text())["failures"] == 0


def _until(condition: Callable[[], bool], sentence: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, sentence
        time.sleep(0.1)
