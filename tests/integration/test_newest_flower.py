"""The newest release of Flower that this project takes, against the one that `make test` installs.

That release alone is put before the installed one, over the other packages that are installed.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from flower_releases import installed
from real_processes import SCRIPTS, curve, numbers, process, quickbloom, wait_for

from quickbloom.common.flower import superlink, workers
from quickbloom.server_app.launch.flower_run import environment, free_port

NEWEST = "1.42.0"
SETTINGS = ["--algorithm", "fomaml", "--rounds", "2", "--set", "evaluate-every=2", "--seed", "3", "--json"]
# It may take long to start its first nodes, on a machine that does other things as well.
PATIENT = ["--set", "node-deadline=300"]


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(NEWEST, tmp_path_factory.mktemp("newest-flower"))


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[float]]:
    """The numbers of the history and of the test on the release that this project is pinned to."""
    directory = tmp_path_factory.mktemp("pinned")
    done = quickbloom("run", *SETTINGS, "--output", "run", "--no-report", cwd=directory)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["versions"]["flwr"] != NEWEST
    return numbers(curve(directory / "run")), numbers(summary["test"])


@pytest.fixture
def on_newest(newest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process that is started from here on imports that release."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(newest), os.environ.get("PYTHONPATH")])))


def _assert_same(run_dir: Path, done: subprocess.CompletedProcess[str], pinned: tuple[list[float], list[float]]) -> None:
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["versions"]["flwr"] == NEWEST
    assert summary["failures"] == 0
    assert numbers(curve(run_dir)) == pytest.approx(pinned[0], abs=1e-5)
    assert numbers(summary["test"]) == pytest.approx(pinned[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.usefixtures("on_newest")
def test_a_simulation_on_the_newest_release_has_the_pinned_ones_result(
    tmp_path: Path, pinned: tuple[list[float], list[float]]
) -> None:
    done = quickbloom("run", *SETTINGS, *PATIENT, "--runtime", "simulation", "--output", "run", "--no-report", cwd=tmp_path)
    _assert_same(tmp_path / "run", done, pinned)


@pytest.mark.slow
@pytest.mark.grpc
@pytest.mark.usefixtures("on_newest")
def test_a_deployment_on_the_newest_release_has_the_pinned_ones_result(
    tmp_path: Path, federation: Path, pinned: tuple[list[float], list[float]]
) -> None:
    done = quickbloom(
        "run", *SETTINGS, *PATIENT, "--connection", "loopback", "--output", "run", cwd=tmp_path, flwr_home=federation
    )
    _assert_same(tmp_path / "run", done, pinned)
    # Every patch is applied there too; what one that was not would say is in the log.
    said = (federation / "node1.log").read_text() + (federation / "superlink.log").read_text()
    assert "The patch" not in said


@pytest.fixture
def federation(on_newest: None, tmp_path: Path) -> Iterator[Path]:
    """FLWR_HOME with the connection `loopback` to a SuperLink with two SuperNodes, which reach it on its one port."""
    home = tmp_path / "home"
    home.mkdir()
    env, http = environment(home), free_port()
    (home / "config.toml").write_text(f'[superlink.loopback]\naddress = "127.0.0.1:{http}"\ninsecure = true\n')
    link = superlink.command("--insecure", "--host", "127.0.0.1", "--port", str(http))
    programs = [[str(SCRIPTS / "flower-supernode")], workers.command("flower-supernode")]
    with ExitStack() as stack:
        stack.enter_context(process(*link, "--disable-runtime-dependency-installation", env=env, log=home / "superlink.log"))
        wait_for(http)
        for number, program in enumerate(programs):
            place = ["--port", str(free_port()), "--node-config", f"partition-id={number} num-partitions=2"]
            command = [*program, "--insecure", "--superlink", f"127.0.0.1:{http}", *place]
            stack.enter_context(process(*command, env=env, log=home / f"node{number}.log"))
        yield home
