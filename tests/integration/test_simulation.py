"""`quickbloom run` and plain `flwr run` in real simulations."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from real_processes import SCRIPTS, commands_with, curve, numbers, quickbloom, without_names

from quickbloom.common.config.run import Scalar
from quickbloom.common.flower.names import NAMES
from quickbloom.common.system.processes import end_all_with, living, session_of, sessions_with
from quickbloom.server_app.launch.flower_run import LaunchError, LocalSuperLink, Run, bundle, environment, free_port

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.simulation
SIMULATION = ("--runtime", "simulation")


def test_run_prints_the_summary_alone_and_leaves_a_run_directory(tmp_path: Path) -> None:
    done = quickbloom("run", *SIMULATION, "--rounds", "2", "--set", "evaluate-every=1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    run_dir = Path(summary["run_dir"])
    assert run_dir.parent == tmp_path / "runs"
    assert summary["tasks"]["train"] + summary["tasks"]["validation"] + summary["tasks"]["test"] == 56
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.json", "history.jsonl", "summary.json", "per_task.csv", "checkpoints", "report.html"}
    assert "round 2/2" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_simulation_needs_no_name_that_flower_does_not_promise(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in without_names(tmp_path / "site", *NAMES).items():
        monkeypatch.setenv(name, value)
    small = ["--dataset", "gaussian", "--rounds", "2", "--set", "gaussian.clients=8", "--output", str(tmp_path / "out")]
    algorithms = [*SIMULATION, "--algorithm", "fomaml"] if command == "run" else ["--algorithms", "fedavg", "--seeds", "1"]
    done = quickbloom(command, *algorithms, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / ("summary.json" if command == "run" else "comparison.json")).is_file()
    assert (tmp_path / "site" / "lacking").read_text()


def test_the_curve_does_not_depend_on_the_number_of_nodes(tmp_path: Path) -> None:
    curves = []
    for nodes in (["--nodes", "1"], ["--nodes", "5", *SIMULATION]):
        output = tmp_path / nodes[1]
        settings = ["--rounds", "3", "--set", "evaluate-every=1", *nodes, "--output", str(output), "--json"]
        done = quickbloom("run", "--algorithm", "maml", *settings, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        curves.append(numbers(curve(output)))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wait_for", "signals"),
    [
        ("round", [signal.SIGINT, signal.SIGINT, signal.SIGINT]),
        ("round", [signal.SIGTERM]),
        ("starting Flower", [signal.SIGINT]),
    ],
)
def test_ended_from_outside_it_stops_the_run_and_leaves_no_process(tmp_path: Path, wait_for: str, signals: list[int]) -> None:
    # Every process of the run inherits the environment, so a mark in it finds what is left behind.
    mark = f"QUICKBLOOM_TEST_MARK={tmp_path}"
    running = subprocess.Popen(
        [SCRIPTS / "quickbloom", "run", *SIMULATION, "--rounds", "5000"],
        cwd=tmp_path,
        env={**environment(), "QUICKBLOOM_TEST_MARK": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith(wait_for):
                break
        sessions = sessions_with(mark)
        if wait_for == "round":  # Flower started ours in the place of its own
            assert any("common/flower/simulation.py" in command for command in commands_with(mark))
        for number in signals:
            time.sleep(0.7)
            running.send_signal(number)
        _, rest = running.communicate(timeout=90)
        assert running.returncode == 130, rest
        assert "Stopped" in rest
        assert "Traceback" not in rest
        assert commands_with(mark) == []
        # Ray's agents write over their environment, so that no mark is found in it.
        assert [pid for pid in living() if session_of(pid) in sessions] == []
    finally:
        running.kill()
        end_all_with(mark)


@pytest.mark.slow
def test_a_superlink_that_dies_ends_the_command_with_one_sentence(tmp_path: Path) -> None:
    settings: dict[str, Scalar] = {"rounds": 5000, "output-dir": str(tmp_path / "run")}
    with bundle() as app, LocalSuperLink() as link:
        run = Run(app, link, settings, 2)
        lines = run.lines()
        while "[ROUND 2/" not in next(lines):
            pass
        os.kill(link._process.pid, signal.SIGKILL)
        with pytest.raises(LaunchError, match="has died"):
            list(lines)
        run.close()
    assert commands_with(f"FLWR_HOME={link.home}") == []


def test_a_users_own_model_is_imported_from_the_current_directory(tmp_path: Path) -> None:
    source = (
        "from torch import nn\n\ndef net(shape, outputs):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))\n"
    )
    (tmp_path / "my_models.py").write_text(source)
    # A file of the user's that has the name of a package of this app does not stand in its way.
    (tmp_path / "common.py").write_text("raise RuntimeError('the wrong module')\n")
    settings = ["--set", "model=my_models:net", "--set", "evaluate-every=1", "--rounds", "2"]
    own, builtin = (
        quickbloom("run", *model, "--output", str(tmp_path / name), "--json", cwd=tmp_path)
        for name, model in {"own": [*settings, *SIMULATION], "builtin": [*settings, "--set", "model=linear"]}.items()
    )
    assert own.returncode == builtin.returncode == 0, own.stderr + builtin.stderr
    assert json.loads((tmp_path / "own" / "config.json").read_text())["model"] == "my_models:net"
    # The same network from the same seed under another name.
    assert numbers(curve(tmp_path / "own")) == pytest.approx(numbers(curve(tmp_path / "builtin")), abs=1e-6)


@pytest.mark.slow
def test_a_run_that_diverges_ends_without_a_traceback(tmp_path: Path) -> None:
    settings = ["--rounds", "1", "--set", "fomaml.outer-optimizer=sgd", "--set", "fomaml.outer-lr=1e15"]
    done = quickbloom("run", *SIMULATION, "--algorithm", "fomaml", "--dataset", "sinusoid", *settings, "--json", cwd=tmp_path)
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        json.loads(done.stdout)
    else:
        assert "is not finite any more" in done.stderr


def test_a_run_whose_nodes_all_lack_their_data_fails_with_one_sentence(tmp_path: Path) -> None:
    settings: dict[str, Scalar] = {"dataset": "uji", "data-dir": str(tmp_path / "nowhere"), "node-deadline": 90.0}
    settings["output-dir"] = str(tmp_path / "run")
    with bundle() as app, LocalSuperLink() as link:
        run = Run(app, link, settings, 2)
        log = list(run.lines())
        status, details = run.status()
        run.close()
    assert status == "finished:failed"
    assert "0 usable nodes" in details
    assert "does not exist" in details
    assert not any("Traceback" in line for line in log), "\n".join(log)


def test_plain_flwr_run_works_from_any_directory_without_network_or_environment(tmp_path: Path) -> None:
    home, runs = tmp_path / "home", tmp_path / "home" / "quickbloom-runs"
    home.mkdir()
    env = {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "HOME": str(home), "FLWR_HOME": str(home / ".flwr")}
    env |= {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()), "FLWR_LOCAL_CONTROL_API_PORT": str(free_port())}
    command = f"flwr run {REPOSITORY} --stream --run-config 'rounds=2'; flwr list --format json"
    try:
        done = subprocess.run(
            _without_network(command), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False
        )
        assert '"status": "finished:completed"' in done.stdout, done.stdout + done.stderr
        (run_dir,) = runs.iterdir()
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["algorithm"] == "reptile"
        assert summary["dataset"] == "digits"
    finally:
        end_all_with(f"FLWR_HOME={env['FLWR_HOME']}")


def _without_network(command: str) -> list[str]:
    """The command in a network namespace with nothing but loopback, where this machine allows one."""
    inside = f"ip link set lo up 2>/dev/null; {command}"
    allowed = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode == 0
    return ["unshare", "-n", "sh", "-c", inside] if allowed else ["sh", "-c", command]
