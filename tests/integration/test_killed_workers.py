"""A real node whose workers are killed by signal 9 while they compute too much at once takes part in every round."""

import json
from pathlib import Path

import pytest
from real_processes import SCRIPTS, process, quickbloom, wait_for

from quickbloom.common.flower import lean as lean_node
from quickbloom.common.flower import workers
from quickbloom.server_app.launch.flower_run import environment, free_port
from quickbloom.server_app.runs.directory import read_history

pytestmark = pytest.mark.grpc

MODEL = """
import os, signal
from math import prod
from torch import nn

class Hungry(nn.Module):
    def forward(self, x):
        noted = os.environ.get("QUICKBLOOM_AT_ONCE_FILE", "/none")
        if os.path.exists(noted) and int(open(noted).read()) > {room}:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

def small(input_shape, outputs):
    return nn.Sequential(nn.Flatten(), Hungry(), nn.Linear(prod(input_shape), outputs))
"""


@pytest.mark.parametrize(("lean", "room"), [("0", 3), ("1", 3), ("0", 0)])
def test_a_node_whose_workers_are_killed_computes_less_at_once_until_it_can(lean: str, room: int, tmp_path: Path) -> None:
    home, run_dir = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    (tmp_path / "hungry.py").write_text(MODEL.format(room=room))
    env = {**environment(home, tmp_path), lean_node.LEAN: lean}
    http, fleet = free_port(), free_port()
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "127.0.0.1:{http}"\ninsecure = true\n')
    link: list[str | Path] = [SCRIPTS / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(http)]
    link += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--disable-runtime-dependency-installation"]
    node: list[str | Path] = [*workers.command("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{fleet}"]
    run = [
        "run",
        "--connection",
        "loopback",
        "--algorithm",
        "reptile",
        "--rounds",
        "2",
        "--output",
        str(run_dir),
        "--json",
        "--no-report",
    ]
    for setting in ("model=hungry:small", "chunk-size=16", "baselines=false", "evaluate-every=0", "min-nodes=1"):
        run += ["--set", setting]
    log = home / "node.log"
    with (
        process(*link, env=environment(home, tmp_path), log=home / "superlink.log"),
        process(*node, "--port", str(free_port()), env=env, log=log),
    ):
        wait_for(http)
        done = quickbloom(*run, cwd=tmp_path, flwr_home=home)
    said = log.read_text() + done.stderr
    # 37 training tasks are 13 at once, then 6, then 3. Where there is no room at all, the model's trial with 2 is the first.
    assert said.count("trying again with") == (2 if room else 1), said
    if room:
        assert done.returncode == 0, said
        assert [record["failures"] for record in read_history(run_dir)] == [[], []]
        assert json.loads(done.stdout)["failures"] == 0
    else:
        assert done.returncode == 1
        assert "this node's worker was killed (signal 9) while it computed 1 task at once" in done.stderr
        assert said.count("this round goes on without the node") == 1
