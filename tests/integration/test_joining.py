"""A real SuperNode that starts in the middle of a run: it takes part at once, and its tasks only ever train."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_processes import SCRIPTS, process, wait_for

from quickbloom.common.flower import workers
from quickbloom.common.system.processes import end_group
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import Joined
from quickbloom.server_app.launch.flower_run import environment, free_port
from quickbloom.server_app.runs.checkpoints import load
from quickbloom.server_app.runs.directory import read_history

pytestmark = [pytest.mark.grpc, pytest.mark.slow]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_supernode_that_starts_during_a_run_contributes_to_it(mode: str, tmp_path: Path) -> None:
    home, run_dir = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    env = environment(home)
    http, fleet = free_port(), free_port()
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "127.0.0.1:{http}"\ninsecure = true\n')
    link: list[str | Path] = [SCRIPTS / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(http)]
    link += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--disable-runtime-dependency-installation"]

    def node(partition: int) -> list[str | Path]:
        start: list[str | Path] = [*workers.command("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{fleet}"]
        return [*start, "--port", str(free_port()), "--node-config", f"partition-id={partition} num-partitions=3"]

    command = [str(SCRIPTS / "quickbloom"), "run", "--connection", "loopback", "--output", str(run_dir), "--no-report"]
    for setting in ("rounds=3000", "evaluate-every=2", "fraction=0.8", f"mode={mode}"):
        command += ["--set", setting]
    with process(*link, env=env, log=home / "superlink.log"):
        wait_for(http)
        with process(*node(0), env=env, log=home / "node0.log"), process(*node(1), env=env, log=home / "node1.log"):
            running = subprocess.Popen(
                command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            try:
                _until(lambda: len(read_history(run_dir)) >= 2, "no round came to an end")
                before = load(run_dir).facts["splits"]
                with process(*node(2), env=env, log=home / "node2.log"):
                    # Several rounds, since a run's log comes a moment after what it tells of.
                    _until(lambda: len(_trained_by_newcomer(run_dir)) >= 20, "the node did not contribute")
                    running.send_signal(signal.SIGINT)
                    _, said = running.communicate(timeout=300)
            finally:
                end_group(running)
    assert running.returncode == 130, said
    rounds = read_history(run_dir)
    (joined,) = (record["joined"] for record in rounds if "joined" in record)
    assert [len(joined["nodes"]), len(joined["tasks"])] == [1, 18]  # digits has 56 tasks, the third part of them 18
    assert [(event.node, event.tasks) for event in read_events(run_dir) if isinstance(event, Joined)] == [
        (joined["nodes"][0], 18)
    ]
    after = load(run_dir).facts["splits"]
    assert (after["validation"], after["test"]) == (before["validation"], before["test"])
    assert after["train"] == sorted(before["train"] + joined["tasks"])
    assert not set(joined["tasks"]) & {*before["train"], *before["validation"], *before["test"]}
    assert all(record["failures"] == [] for record in rounds)
    assert f"Node {joined['nodes'][0]} joined with 18 tasks" in said
    if mode == "sync":
        newest = _trained_by_newcomer(run_dir)[0]
        assert newest["train"]["tasks"] == 34  # 80 % of 24 + 18 training tasks: 33.6
        assert rounds[0]["train"]["tasks"] == 20  # 80 % of 24: 19.2


def _trained_by_newcomer(run_dir: Path) -> list[dict[str, Any]]:
    """The rounds in which a node that joined trained."""
    rounds = read_history(run_dir)
    come = {node for record in rounds for node in record.get("joined", {}).get("nodes", ())}
    return [record for record in rounds if come & set(record["nodes"]["trained"])]


def _until(condition: Callable[[], bool], sentence: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, sentence
        time.sleep(0.2)
