"""A real SuperLink gets a new certificate in the middle of a run over TLS, with real nodes: nothing stops."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tomli_w
from real_processes import SCRIPTS, process, quickbloom

from quickbloom.common.flower import transport
from quickbloom.common.system.processes import end_group
from quickbloom.common.system.tls import end_of, served
from quickbloom.server_app.deployment.secrets import create, renew_server
from quickbloom.server_app.launch.flower_run import environment, free_port
from quickbloom.server_app.runs.directory import read_history

PATH = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).resolve().parents[2])]))
pytestmark = [pytest.mark.grpc, pytest.mark.slow]

ROUNDS = 30
SERVER = [sys.executable, "-m", "quickbloom.server_app.cli.main"]


def test_a_run_goes_on_while_its_superlink_gets_a_new_certificate(tmp_path: Path) -> None:
    home, run_dir = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    create(home / "secrets", ["node-1", "node-2", "node-3"], [], days=1)
    http, fleet = free_port(), free_port()
    connection = {"address": f"127.0.0.1:{http}", "root-certificates": str(home / "secrets" / "cli" / "ca.crt")}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"loopback": connection}}))
    env = {**environment(home), "PYTHONPATH": PATH}
    link: list[str | Path] = [
        *SERVER,
        "superlink",
        "--secrets",
        home / "secrets" / "superlink",
        "--state",
        home / "state",
        "--port",
        str(http),
    ]
    if transport.spoken() == transport.GRPC:
        link += ["--fleet-host", "127.0.0.1", "--fleet-port", str(fleet)]
    else:
        fleet = http
    superexec: list[str | Path] = [
        *SERVER,
        "superexec",
        "--secrets",
        home / "secrets" / "superexec",
        "--superlink",
        f"127.0.0.1:{http}",
    ]
    ports = {fleet, http}

    def node(number: int) -> list[str | Path]:
        start: list[str | Path] = [sys.executable, "-m", "quickbloom.client_app.cli", "join", "--server", f"127.0.0.1:{fleet}"]
        start += ["--port", str(free_port()), "--set", f"partition-id={number - 1}", "--set", "num-partitions=2"]
        return [*start, "--secrets", home / "secrets" / "nodes" / f"node-{number}", "--state", tmp_path / f"state-{number}"]

    command = [str(SCRIPTS / "quickbloom"), "run", "--connection", "loopback", "--output", str(run_dir), "--no-report"]
    for setting in (f"rounds={ROUNDS}", "evaluate-every=0", "min-nodes=2", "round-deadline=60", "baselines=false"):
        command += ["--set", setting]
    with process(*link, env=env, log=home / "superlink.log") as superlink:
        _until(lambda: all(map(_shown, ports)), "the SuperLink did not start")
        assert all(_left(port) < timedelta(days=1) for port in ports)
        done = quickbloom("secrets", "--output", "secrets", "--register", "loopback", cwd=home, flwr_home=home)
        assert done.returncode == 0, done.stderr
        with (
            process(*superexec, "--runs", home / "runs", env=env, log=home / "superexec.log"),
            process(*node(1), env=env, log=home / "node1.log"),
            process(*node(2), "--log-format", "json", env=env, log=home / "node2.log"),
        ):
            running = subprocess.Popen(
                command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            try:
                _until(lambda: len(read_history(run_dir)) >= 2, "no round came to an end")
                renew_server(home / "secrets", [], days=100)
                assert all(_left(port) > timedelta(days=99) for port in ports)  # the very next connection
                assert len(read_history(run_dir)) < ROUNDS
                with process(*node(3), env=env, log=home / "node3.log"):  # one that connects only now
                    _until(lambda: "certificate" in (home / "superlink.log").read_text(), "it says nothing", 60)
                    said = running.communicate(timeout=600)[1]
            finally:
                end_group(running)
        assert superlink.poll() is None  # the same process
    assert running.returncode == 0, said
    rounds = read_history(run_dir)
    assert [record["round"] for record in rounds] == list(range(1, ROUNDS + 1))
    assert [failure for record in rounds for failure in record["failures"]] == []
    assert json.loads((run_dir / "summary.json").read_text())["failures"] == 0
    log, first, third = ((home / f"{name}.log").read_text() for name in ("superlink", "node1", "node3"))
    assert "the SuperLink's certificate ends at" in log
    assert f"The server certificate '{home / 'secrets' / 'superlink' / 'server.crt'}' is new" in log
    assert f"the certificate of 127.0.0.1:{fleet} ends at" in first
    assert "ends at" not in third
    assert "Traceback" not in log + first + third
    lines = [json.loads(line) for line in (home / "node2.log").read_text().splitlines()]
    assert {line["node"] for line in lines} == {"node-2"}
    assert {line["round"] for line in lines if line["message"].startswith("Round ")} >= set(range(1, ROUNDS + 1))


def _left(port: int) -> timedelta:
    return end_of(served("127.0.0.1", port)) - datetime.now(UTC)


def _shown(port: int) -> bool:
    try:
        return bool(served("127.0.0.1", port))
    except OSError:
        return False


def _until(condition: Callable[[], bool], sentence: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, sentence
        time.sleep(0.1)
