"""The federation of docker-compose.yml in a real Docker engine: one host, three nodes, TLS, and what happens when parts die.

Run by `make test-docker`. The tests of this file share one federation, in the order in which they stand.
"""

import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from containers import federation, rounds
from real_processes import SCRIPTS, curve, numbers, process, quickbloom

from benchmarks.compose import IMAGE, NODES, Federation, docker, inspect, until
from quickbloom import __version__
from quickbloom.server_app.deployment.certificates import node_key
from quickbloom.server_app.launch.flower_run import free_port
from quickbloom.server_app.runs.directory import read_history

pytestmark = pytest.mark.docker

SEED = ["--algorithm", "fomaml", "--seed", "3"]
NOTHING_LOST = ["--set", "min-nodes=3", "--set", "min-replies=37", "--set", "on-too-few=repeat", "--set", "node-deadline=300"]
"""Every round has all 37 training tasks of `digits`, or is repeated."""


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation("quickbloom-test", tmp_path_factory.mktemp("containers")) as it:
        it.until_healthy("superlink", "superexec", *NODES)
        yield it


def simulated(home: Path, settings: list[str]) -> list[float]:
    """The learning curve of the same run in one process."""
    here = quickbloom("run", *settings, "--in-process", "--json", "--output", str(home / "here"), cwd=home)
    assert here.returncode == 0, here.stderr
    return numbers(curve(home / "here"))


def test_the_image_is_small_runs_as_nobody_in_particular_and_installs_nothing(three_nodes: Federation) -> None:
    image = json.loads(docker("image", "inspect", IMAGE).stdout)[0]
    assert image["Size"] < 1.3e9
    assert image["Config"]["User"] == "app"
    assert image["Config"]["Labels"]["org.opencontainers.image.version"] == __version__
    who = docker("exec", three_nodes.container("supernode-1"), "sh", "-c", "id -u; command -v pip; ls /secrets")
    assert who.stdout.split() == ["49999", "ca.crt", "node.key", "node.key.pub"]


def test_a_run_has_the_curve_of_the_simulation_and_lands_on_the_host(three_nodes: Federation, tmp_path: Path) -> None:
    settings = [*SEED, "--rounds", "3"]
    run = three_nodes.start("quickbloom", "run", *settings, "--set", "min-nodes=3", "--set", "node-deadline=300", "--json")
    out, said = run.communicate(timeout=600)
    assert run.returncode == 0, said
    summary = json.loads(out)
    assert summary["failures"] == 0
    directory = three_nodes.directory_of(summary)
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert (directory / "report.html").exists()
    assert numbers(curve(directory)) == pytest.approx(simulated(tmp_path, settings), abs=1e-5)


def test_the_logs_of_a_good_run_say_nothing_that_should_be_mended(three_nodes: Federation) -> None:
    logs = three_nodes.compose("logs", "--no-color").stdout
    assert "Successfully installed quickbloom" in logs  # on the nodes: these are the logs of a run
    assert "Traceback" not in logs
    troubling = [line for line in logs.splitlines() if "WARN" in line or "ERROR" in line]
    # Flower says this of its own release, whatever the settings.
    assert [line for line in troubling if "SuperExec authentication is experimental" not in line] == []


def test_a_run_that_fails_has_the_exit_code_of_failure(three_nodes: Federation) -> None:
    run = three_nodes.start("quickbloom", "run", "--rounds", "1", "--set", "min-nodes=4", "--set", "node-deadline=5")
    _, said = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "min-nodes" in said
    assert "Traceback" not in said


def test_nodes_do_not_reach_the_port_on_which_runs_are_started(three_nodes: Federation) -> None:
    for port, reached in ((9092, True), (8000, False)):
        attempt = f"import socket; socket.create_connection(('superlink', {port}), 5)"
        done = docker("exec", three_nodes.container("supernode-1"), "python", "-c", attempt)
        assert (done.returncode == 0) is reached, done.stderr


def test_plain_text_is_refused_and_tls_with_the_ca_is_not(three_nodes: Federation, tmp_path: Path) -> None:
    address = f"localhost:{three_nodes.port}"
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=5)
    credentials = grpc.ssl_channel_credentials(ca(three_nodes, tmp_path).read_bytes())
    with grpc.secure_channel(address, credentials) as channel:
        grpc.channel_ready_future(channel).result(timeout=60)


def test_a_key_that_is_not_registered_is_refused_in_one_sentence(three_nodes: Federation, tmp_path: Path) -> None:
    ca(three_nodes, tmp_path)
    (tmp_path / "node.key").write_bytes(node_key()[0])
    command: list[str | Path] = [SCRIPTS / "python", "-m", "quickbloom.client_app.cli", "join"]
    command += ["--server", f"localhost:{three_nodes.port}", "--secrets", tmp_path, "--port", str(free_port())]
    with process(*command, env={**os.environ, "FLWR_HOME": str(tmp_path)}, log=tmp_path / "log"):
        until(lambda: "refuses this node's key" in (tmp_path / "log").read_text(), 240)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_second_container_with_the_key_of_a_node_is_refused_and_the_first_one_stays(three_nodes: Federation) -> None:
    second = three_nodes.compose("run", "-d", "--no-deps", "--name", "quickbloom-second", "supernode-1")
    assert second.returncode == 0, second.stderr
    try:
        until(lambda: "in use by another node" in logs("quickbloom-second"), 240)
        assert "Traceback" not in logs("quickbloom-second")
    finally:
        docker("rm", "--force", "quickbloom-second")
    assert inspect(three_nodes.container("supernode-1"), "{{.State.Health.Status}} {{.RestartCount}}") == "healthy 0"


def test_nothing_is_lost_when_a_node_and_the_superlink_are_killed(three_nodes: Federation, tmp_path: Path) -> None:
    settings = [*SEED, "--rounds", "4"]
    with three_nodes.new_run() as directory:
        run = three_nodes.start("quickbloom", "run", *settings, *NOTHING_LOST, "--json")
        until(lambda: rounds(directory()) >= 1, 300)
        three_nodes.kill("supernode-2")
        until(lambda: rounds(directory()) >= 2, 300)
        three_nodes.kill("superlink")
        assert completed(run, 600)["rounds"] == 4
        assert numbers(curve(directory())) == pytest.approx(simulated(tmp_path, settings), abs=1e-5)
    three_nodes.until_healthy("superlink", "superexec", *NODES)


def test_nothing_is_lost_when_nodes_are_cut_off_for_30_and_for_120_seconds(three_nodes: Federation, tmp_path: Path) -> None:
    settings = [*SEED, "--rounds", "3"]
    with three_nodes.new_run() as directory:
        run = three_nodes.start("quickbloom", "run", *settings, *NOTHING_LOST, "--json")
        until(lambda: rounds(directory()) >= 1, 300)
        for node, seconds in (("supernode-1", 30), ("supernode-3", 120)):
            network = docker("network", "disconnect", "quickbloom-test_fleet", three_nodes.container(node))
            assert network.returncode == 0, network.stderr
            time.sleep(seconds)  # what is tested is a cut of this length
            network = docker("network", "connect", "quickbloom-test_fleet", three_nodes.container(node))
            assert network.returncode == 0, network.stderr
        completed(run, 600)
        assert numbers(curve(directory())) == pytest.approx(simulated(tmp_path, settings), abs=1e-5)
        assert (
            len((directory() / "per_task.csv").read_text().splitlines()) == 1 + 8 + 11 + 37
        )  # validation and test tasks, and seen users
    assert all(inspect(three_nodes.container(node), "{{.State.Health.Status}}") == "healthy" for node in NODES)


def test_a_run_goes_on_with_one_command_after_its_server_died_and_after_a_restart_of_everything(
    three_nodes: Federation, tmp_path: Path
) -> None:
    settings = [*SEED, "--rounds", "40"]  # so many that none is over before it is cut off
    with three_nodes.new_run() as directory:
        run = three_nodes.start("quickbloom", "run", *settings, *NOTHING_LOST)
        until(lambda: rounds(directory()) >= 1, 300)
        three_nodes.kill("superexec")
        _, said = run.communicate(timeout=300)
        assert run.returncode == 1
        resume = ["quickbloom", "run", "--resume", f"/app/quickbloom-runs/{directory().name}"]
        assert f"to go on: {' '.join(resume)}" in said
        run = three_nodes.start(*resume)
        done = rounds(directory())
        until(lambda: rounds(directory()) > done, 300)
        three_nodes.compose("down", "--remove-orphans")  # of everything but the volumes; the orphan is the command line
        run.communicate(timeout=300)
        three_nodes.up()
        assert completed(three_nodes.start(*resume, "--json"), 600)["resumed"] == 2
        assert [line["round"] for line in read_history(directory())] == list(range(1, 41))
        early = numbers(curve(directory())[:10])  # of later rounds roundings have grown; both cuts were before
        assert early == pytest.approx(simulated(tmp_path, settings)[: len(early)], abs=1e-5)


def test_training_that_does_not_wait_outlives_a_node_the_superlink_and_its_own_server(three_nodes: Federation) -> None:
    steps = 120  # so many that the run is not over before the last kill
    with three_nodes.new_run() as directory:
        settings = [*SEED, "--rounds", str(steps), "--set", "mode=async", "--set", "min-nodes=3", "--set", "node-deadline=300"]
        run = three_nodes.start("quickbloom", "run", *settings, "--set", "async-buffer=6", "--set", "checkpoint-every=1")
        for part in ("supernode-2", "superlink", "superexec"):
            before = rounds(directory())
            until(partial(has_grown, directory(), before), 300)
            three_nodes.kill(part)
        _, said = run.communicate(timeout=300)
        assert run.returncode == 1
        resume = ["quickbloom", "run", "--resume", f"/app/quickbloom-runs/{directory().name}"]
        assert f"to go on: {' '.join(resume)}" in said
        summary = completed(three_nodes.start(*resume, "--json"), 900)
        lines = read_history(directory())
        assert [line["round"] for line in lines] == list(range(1, steps + 1))
        late = {node for line in lines[steps // 2 :] for node in line["nodes"]["trained"]}
        assert len(late) == 3  # the one that was killed as well
        assert len(summary["test"]["accuracy"]["mean"]) > 1
        assert (
            len((directory() / "per_task.csv").read_text().splitlines()) == 1 + 8 + 11 + 37
        )  # validation and test tasks, and seen users
    three_nodes.until_healthy("superlink", "superexec", *NODES)


def has_grown(directory: Path, before: int) -> bool:
    """Whether a run has three more steps than `before`."""
    return rounds(directory) >= before + 3


def completed(run: Any, seconds: float) -> dict[str, Any]:
    """The summary of a run, which must end well."""
    out, said = run.communicate(timeout=seconds)
    assert run.returncode == 0, said
    return dict(json.loads(out))


def logs(container: str) -> str:
    said = docker("logs", container)
    return said.stdout + said.stderr


def ca(of: Federation, folder: Path) -> Path:
    """A copy of the CA's certificate."""
    copied = docker("cp", f"{of.container('superlink')}:/secrets/ca.crt", folder / "ca.crt")
    assert copied.returncode == 0, copied.stderr
    (folder / "ca.crt").chmod(0o600)
    return folder / "ca.crt"
