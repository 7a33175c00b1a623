"""A real SuperLink and two real SuperNodes on loopback: the learning curve over gRPC equals the simulation's.

One node is as Flower starts it, the other has warm workers.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_encoders
from real_processes import SCRIPTS, curve, numbers, process, quickbloom, wait_for

from quickbloom.common.flower import workers
from quickbloom.common.system.processes import processes_with
from quickbloom.server_app.launch.flower_run import environment, free_port
from quickbloom.server_app.runs.directory import read_history

pytestmark = pytest.mark.grpc

ROUNDS = ["--rounds", "2", "--set", "evaluate-every=2", "--seed", "3", "--json"]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """FLWR_HOME with the connection `loopback` to a SuperLink with two SuperNodes."""
    home = tmp_path_factory.mktemp("flwr-home")
    env = environment(home) | {"XDG_CACHE_HOME": str(home / "cache")}
    http, fleet = free_port(), free_port()
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "127.0.0.1:{http}"\ninsecure = true\n')
    link: list[str | Path] = [SCRIPTS / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(http)]
    link += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--disable-runtime-dependency-installation"]
    node = ["--insecure", "--superlink", f"127.0.0.1:{fleet}", "--port"]
    with process(*link, env=env, log=home / "superlink.log"):
        wait_for(http)
        first: list[str | Path] = [
            SCRIPTS / "flower-supernode",
            *node,
            str(free_port()),
            "--node-config",
            "partition-id=0 num-partitions=2",
        ]
        second = [
            *workers.command("flower-supernode"),
            *node,
            str(free_port()),
            "--node-config",
            "partition-id=1 num-partitions=2",
        ]
        with process(*first, env=env, log=home / "node0.log"), process(*second, env=env, log=home / "node1.log"):
            yield home


def test_the_curve_over_grpc_equals_the_simulation(federation: Path, tmp_path: Path) -> None:
    arguments = ["run", "--algorithm", "reptile", *ROUNDS]
    real = quickbloom(*arguments, "--connection", "loopback", "--output", "real", cwd=tmp_path, flwr_home=federation)
    assert real.returncode == 0, real.stderr
    simulated = quickbloom(*arguments, "--runtime", "simulation", "--output", "simulated", cwd=tmp_path)
    assert simulated.returncode == 0, simulated.stderr
    assert numbers(curve(tmp_path / "real")) == pytest.approx(numbers(curve(tmp_path / "simulated")), abs=1e-5)
    assert "new Python process" not in (federation / "node1.log").read_text()
    one, other = (json.loads(done.stdout) for done in (real, simulated))
    assert numbers(one["test"]) == pytest.approx(numbers(other["test"]), abs=1e-5)
    assert one["seen"]["tasks"] == one["tasks"]["train"]
    assert same_of_seen(one, other)
    scores = one["baselines"]["scores"]
    assert scores["accuracy"].keys() >= {"after", "own", "global"}
    assert numbers(scores) == pytest.approx(numbers(other["baselines"]["scores"]), abs=1e-4)


def same_of_seen(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs have the same scores of seen users, and of the baselines beside them."""
    models, baselines = [], []
    for summary in (one, other):
        baselines.append(numbers(summary["seen"]["baselines"]["scores"]) if summary["seen"].get("baselines") else [])
        models.append(numbers({key: value for key, value in summary["seen"].items() if key != "baselines"}))
    same: bool = models[0] == pytest.approx(models[1], abs=1e-5) and baselines[0] == pytest.approx(baselines[1], abs=1e-4)
    return same


def test_seen_users_are_scored_with_the_heads_on_their_nodes_as_in_process(federation: Path, tmp_path: Path) -> None:
    arguments = ["run", "--algorithm", "heads", *ROUNDS, "--set", "evaluate-users=seen", "--set", "heads.inner-lr=0.3"]
    found = []
    for place in (["--connection", "loopback"], ["--in-process"]):
        done = quickbloom(*arguments, *place, "--output", place[0].strip("-"), cwd=tmp_path, flwr_home=federation)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert [one["seen"]["tasks"] for one in found] == [56, 56]
    assert found[0]["seen"]["accuracy"]["mean"][0] > 0.3  # a fresh head guesses one of five
    assert same_of_seen(*found)


@pytest.mark.slow
@pytest.mark.parametrize("way", small_encoders.WAYS)
def test_what_is_trained_on_a_pretrained_model_over_grpc_is_what_is_trained_in_process(
    way: str, federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = small_encoders.WAYS[way](tmp_path, "ABCDEFGHIJKLMNOP") | {"baselines": "false", "evaluate-every": 2}
    arguments = ["run", "--json", *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]
    found = []
    for place in (["--workers", "1"], ["--runtime", "simulation"], ["--connection", "loopback"]):
        name = place[0].strip("-")
        done = quickbloom(*arguments, *place, "--output", name, cwd=tmp_path, flwr_home=federation)
        assert done.returncode == 0, done.stderr
        found.append(numbers([curve(tmp_path / name), json.loads(done.stdout)["test"]]))
    assert len(found[0]) > 10
    for other in found[1:]:
        assert found[0] == pytest.approx(other, abs=1e-5)


@pytest.mark.slow
def test_a_run_whose_server_is_killed_goes_on_with_its_directory_alone(federation: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "cut"
    settings = ["--algorithm", "fomaml", "--rounds", "2", "--set", "evaluate-every=1", "--seed", "3"]
    command = [str(SCRIPTS / "quickbloom"), "run", *settings, "--connection", "loopback", "--output", str(run_dir)]
    with process(*command, env=environment(federation), log=tmp_path / "first.log"):
        deadline = time.monotonic() + 300
        while not read_history(run_dir):
            assert time.monotonic() < deadline, (tmp_path / "first.log").read_text()
            time.sleep(0.1)
        killed = _kill_server_app(federation)
    assert killed
    done = len(read_history(run_dir))
    assert done < 2
    resumed = quickbloom("run", "--resume", str(run_dir), "--connection", "loopback", cwd=tmp_path, flwr_home=federation)
    assert resumed.returncode == 0, resumed.stderr
    assert f"round {done + 1}/2" in resumed.stderr
    assert json.loads((run_dir / "summary.json").read_text())["resumed"] == 1
    whole = quickbloom("run", *settings, "--output", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert numbers(curve(run_dir)) == pytest.approx(numbers(curve(tmp_path / "whole")), abs=1e-5)


def _kill_server_app(home: Path) -> list[int]:
    """Kill the process in which Flower runs the server's part; returns the ids of what was killed."""
    found = [
        pid
        for pid in processes_with(f"FLWR_HOME={home}")
        if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    ]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return found


@pytest.mark.slow
def test_too_few_nodes_end_the_run_at_the_deadline(federation: Path, tmp_path: Path) -> None:
    settings = ["--set", "min-nodes=3", "--set", "node-deadline=2"]
    done = quickbloom("run", *settings, "--connection", "loopback", cwd=tmp_path, flwr_home=federation)
    assert done.returncode == 1
    assert "`min-nodes` is 3, but 2 usable nodes answered" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_asynchronous_training_over_grpc_takes_as_many_steps_and_hears_every_node(federation: Path, tmp_path: Path) -> None:
    settings = ["mode=async", "async-buffer=5", "async-concurrency=8", "evaluate-every=4", "baselines=false", "adapt-steps=3"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["run", "--algorithm", "reptile", "--rounds", "30", "--seed", "3", *words, "--json"]
    done = quickbloom(*command, "--connection", "loopback", "--output", "async", cwd=tmp_path, flwr_home=federation)
    assert done.returncode == 0, done.stderr
    lines = read_history(tmp_path / "async")
    assert [line["round"] for line in lines] == list(range(1, 31))
    assert all(sum(line["async"]["staleness"].values()) >= 5 for line in lines)
    assert all(line["train"]["tasks"] == sum(line["async"]["staleness"].values()) for line in lines)
    assert len({node for line in lines for node in line["nodes"]["trained"]}) == 2
    assert "validation" in lines[-1]
    # One of the nodes starts a process for every message: the scores of a step come in some steps later, or not before the end.
    assert all(
        line["validation"].get("round", line["round"]) in {4, 8, 12, 16, 20, 24, 28, 30}
        for line in lines
        if "validation" in line
    )
    assert all(line["nodes"]["away"] == [] and line["failures"] == [] for line in lines)
