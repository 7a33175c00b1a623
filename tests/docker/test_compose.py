"""The federation of docker-compose.yml in a real Docker engine: one host, three nodes, TLS, and what happens when parts die.

Run by `make test-docker`. The tests of a file share one federation, in the order in which they stand.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from real_processes import SCRIPTS, curve, numbers, process, quickbloom

from server_app.certificates import node_key
from server_app.history import read_history
from server_app.launch import free_port

pytestmark = pytest.mark.docker

ROOT = Path(__file__).resolve().parents[2]
DOCKER = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
SEED = ["--algorithm", "fomaml", "--seed", "3"]


class Federation:
    """docker-compose with a project, a port and a directory of runs of its own."""

    def __init__(self, home: Path) -> None:
        self.runs = home / "runs"
        self.port = free_port()
        wheels = list((ROOT / "docker" / "wheels").glob("torch-*.whl"))
        own = {"QUICKBLOOM_RUNS": str(self.runs), "QUICKBLOOM_FLEET": f"127.0.0.1:{self.port}"}
        own |= {"DOCKER_BUILDKIT": "1", "COMPOSE_DOCKER_CLI_BUILD": "1", "PATH": f"/usr/bin:{os.environ['PATH']}"}
        self.env = {**os.environ, **own, **({"TORCH_INDEX": ""} if wheels else {})}
        self.command = [
            shutil.which("docker-compose") or "docker-compose",
            "-p",
            "quickbloom-test",
            "-f",
            str(ROOT / "docker-compose.yml"),
        ]

    def compose(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        command = [*self.command, *arguments]
        return subprocess.run(
            command,
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command line in its container, going on in the background."""
        command = [*self.command, "run", "--rm", "-T", "cli", *arguments]
        return subprocess.Popen(
            command, env=self.env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
        )

    def container(self, service: str) -> str:
        return self.compose("ps", "-q", service).stdout.strip()

    def inspect(self, service: str, what: str) -> str:
        return _docker("inspect", "--format", what, self.container(service)).stdout.strip()

    def kill(self, service: str) -> None:
        """kill -9 of a container's main process; `docker kill` would count as a wish, after which nothing is restarted."""
        os.kill(int(self.inspect(service, "{{.State.Pid}}")), signal.SIGKILL)

    def until_healthy(self, *services: str) -> None:
        _until(lambda: all(self.inspect(service, "{{.State.Health.Status}}") == "healthy" for service in services), 180)

    def directory_of(self, summary: dict[str, Any]) -> Path:
        """A run directory on the host, from the name that it has in the containers."""
        return self.runs / Path(summary["run_dir"]).name


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    if shutil.which("docker-compose") is None or _docker("info").returncode:
        pytest.skip("needs a Docker engine that answers and docker-compose: install them, or run `make test-docker` as root")
    it = Federation(tmp_path_factory.mktemp("containers"))
    try:
        built = it.compose("build", "superlink")
        assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
        up = it.compose("up", "-d")
        assert up.returncode == 0, up.stdout + up.stderr + it.compose("logs", "--no-color").stdout[-5000:]
        it.until_healthy("superlink", "superexec", "supernode-1", "supernode-2", "supernode-3")
        yield it
    finally:
        it.compose("down", "--volumes", "--remove-orphans")


def test_the_image_is_small_runs_as_nobody_in_particular_and_installs_nothing(federation: Federation) -> None:
    image = json.loads(_docker("image", "inspect", "quickbloom:0.1.0").stdout)[0]
    assert image["Size"] < 1.3e9
    assert image["Config"]["User"] == "app"
    assert image["Config"]["Labels"]["org.opencontainers.image.version"] == "0.1.0"
    who = _docker("exec", federation.container("supernode-1"), "sh", "-c", "id -u; command -v pip; ls /secrets")
    assert who.stdout.split() == ["49999", "ca.crt", "node.key", "node.key.pub"]


def test_a_run_has_the_curve_of_the_simulation_and_lands_on_the_host(federation: Federation, tmp_path: Path) -> None:
    settings = [*SEED, "--rounds", "3", "--set", "min-nodes=3", "--json"]
    run = federation.start("quickbloom", "run", *settings)
    out, said = run.communicate(timeout=600)
    assert run.returncode == 0, said
    summary = json.loads(out)
    assert summary["failures"] == 0
    directory = federation.directory_of(summary)
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert (directory / "report.html").exists()
    here = quickbloom("run", *SEED, "--rounds", "3", "--in-process", "--json", "--output", str(tmp_path / "here"), cwd=tmp_path)
    assert here.returncode == 0, here.stderr
    assert numbers(curve(directory)) == pytest.approx(numbers(curve(tmp_path / "here")), abs=1e-5)
    logs = federation.compose("logs", "--no-color").stdout
    assert "Traceback" not in logs


def test_a_run_that_fails_has_the_exit_code_of_failure(federation: Federation) -> None:
    run = federation.start("quickbloom", "run", "--rounds", "1", "--set", "min-nodes=4", "--set", "node-deadline=5")
    _, said = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "min-nodes" in said
    assert "Traceback" not in said


def test_nodes_do_not_reach_the_port_on_which_runs_are_started(federation: Federation) -> None:
    for port, reached in ((9092, True), (8000, False)):
        attempt = f"import socket; socket.create_connection(('superlink', {port}), 5)"
        done = _docker("exec", federation.container("supernode-1"), "python", "-c", attempt)
        assert (done.returncode == 0) is reached, done.stderr


def test_plain_text_is_refused_and_tls_with_the_ca_is_not(federation: Federation, tmp_path: Path) -> None:
    address = f"localhost:{federation.port}"
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=5)
    credentials = grpc.ssl_channel_credentials(_ca(federation, tmp_path).read_bytes())
    with grpc.secure_channel(address, credentials) as channel:
        grpc.channel_ready_future(channel).result(timeout=20)


def test_a_key_that_is_not_registered_is_refused_in_one_sentence(federation: Federation, tmp_path: Path) -> None:
    _ca(federation, tmp_path)
    (tmp_path / "node.key").write_bytes(node_key()[0])
    command: list[str | Path] = [SCRIPTS / "python", "-m", "client_app.cli", "join"]
    command += ["--server", f"localhost:{federation.port}", "--secrets", str(tmp_path), "--port", str(free_port())]
    with process(*command, env={**os.environ, "FLWR_HOME": str(tmp_path)}, log=tmp_path / "log"):
        _until(lambda: "refuses this node's key" in (tmp_path / "log").read_text(), 90)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_killed_node_and_a_killed_superlink_cost_no_round(federation: Federation) -> None:
    run = federation.start(
        "quickbloom", "run", *SEED, "--rounds", "5", "--set", "min-nodes=3", "--set", "on-too-few=repeat", "--json"
    )
    directory = _new_run(federation)
    _until(lambda: len(read_history(directory)) >= 1, 300)
    federation.kill("supernode-2")
    _until(lambda: len(read_history(directory)) >= 2, 300)
    federation.kill("superlink")
    out, said = run.communicate(timeout=600)
    assert run.returncode == 0, said
    assert [line["round"] for line in read_history(directory)] == [1, 2, 3, 4, 5]
    assert json.loads(out)["rounds"] == 5
    federation.until_healthy("superlink", "superexec", "supernode-1", "supernode-2", "supernode-3")


def test_when_the_serverapp_dies_the_run_goes_on_with_one_command(federation: Federation) -> None:
    run = federation.start("quickbloom", "run", *SEED, "--rounds", "4", "--set", "min-nodes=3")
    directory = _new_run(federation)
    _until(lambda: len(read_history(directory)) >= 2, 300)
    federation.kill("superexec")
    run.communicate(timeout=300)
    assert run.returncode == 1
    federation.until_healthy("superexec")
    again = federation.start("quickbloom", "run", "--resume", f"/app/quickbloom-runs/{directory.name}", "--json")
    out, said = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert json.loads(out)["resumed"] == 1
    assert [line["round"] for line in read_history(directory)] == [1, 2, 3, 4]


def _new_run(federation: Federation) -> Path:
    """The directory of the run that was just started."""
    known = set(federation.runs.iterdir())
    _until(lambda: bool(set(federation.runs.iterdir()) - known), 180)
    return next(iter(set(federation.runs.iterdir()) - known))


def _ca(federation: Federation, folder: Path) -> Path:
    copied = _docker("cp", f"{federation.container('superlink')}:/secrets/ca.crt", str(folder / "ca.crt"))
    assert copied.returncode == 0, copied.stderr
    (folder / "ca.crt").chmod(0o600)
    return folder / "ca.crt"


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(1)


def _docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DOCKER, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False
    )
