"""Secure sums over real gRPC and in a simulation: what a node knows between two steps survives the end of its process."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from real_processes import SCRIPTS, curve, numbers, process, quickbloom, wait_for

from quickbloom.common.flower import workers
from quickbloom.server_app.launch.flower_run import environment, free_port

ROUNDS = ["--rounds", "2", "--set", "evaluate-every=2", "--seed", "3", "--set", "mlp.hidden=8", "--nodes", "3", "--json"]
SECURE = ["--set", "secure-aggregation=true"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same rounds without masks, in one process."""
    folder = tmp_path_factory.mktemp("whole")
    done = quickbloom("run", *ROUNDS, "--output", "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "whole"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """FLWR_HOME with the connection `loopback` to a SuperLink with three SuperNodes with warm workers."""
    home = tmp_path_factory.mktemp("flwr-home")
    env, http, fleet = environment(home), free_port(), free_port()
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "127.0.0.1:{http}"\ninsecure = true\n')
    link: list[str | Path] = [SCRIPTS / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(http)]
    link += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--disable-runtime-dependency-installation"]
    with ExitStack() as stack:
        stack.enter_context(process(*link, env=env, log=home / "superlink.log"))
        wait_for(http)
        for i in range(3):
            program = workers.command("flower-supernode")  # every message in a process of its own, forked from a warm one
            options = ["--insecure", "--superlink", f"127.0.0.1:{fleet}", "--port", str(free_port()), "--node-config"]
            options.append(f"partition-id={i} num-partitions=3 least-in-sum=2")
            stack.enter_context(process(*program, *options, env=env, log=home / f"node{i}.log"))
        yield home


@pytest.mark.slow
@pytest.mark.grpc
def test_a_secure_run_over_grpc_has_the_curve_of_the_plain_run(federation: Path, whole: Path, tmp_path: Path) -> None:
    arguments = ["run", *ROUNDS[:-3], "--json", "--set", "min-nodes=3", "--connection", "loopback", "--output", "secure"]
    done = quickbloom(*arguments, *SECURE, cwd=tmp_path, flwr_home=federation)
    assert done.returncode == 0, done.stderr
    assert numbers(curve(tmp_path / "secure")) == pytest.approx(numbers(curve(whole)), abs=1e-5)
    summary = json.loads(done.stdout)
    assert summary["failures"] == 0
    # These nodes insist on it: without masks they send nothing, and say why.
    refused = quickbloom(*arguments[:-1], "plain", cwd=tmp_path, flwr_home=federation)
    assert refused.returncode == 1
    assert "`least-in-sum` is 2" in " ".join(refused.stderr.split())


@pytest.mark.slow
@pytest.mark.simulation
def test_a_secure_simulation_has_the_curve_of_the_plain_run(whole: Path, tmp_path: Path) -> None:
    done = quickbloom("run", "--runtime", "simulation", *ROUNDS, *SECURE, "--output", "secure", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert numbers(curve(tmp_path / "secure")) == pytest.approx(numbers(curve(whole)), abs=1e-5)
