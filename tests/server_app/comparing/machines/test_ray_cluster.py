"""A comparison on a Ray cluster: the table of one on this machine, and a sentence where there is no cluster."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from quickbloom.common.errors import ConfigError
from quickbloom.common.system.processes import end_all_with, processes_with
from quickbloom.server_app.cli import main
from quickbloom.server_app.comparing.batch import LOG, Run, perform
from quickbloom.server_app.comparing.comparison import carry_out, planned
from quickbloom.server_app.comparing.machines.ray_cluster import Task, work, workers
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.spread_out import facts_of

QUIET = Console(quiet=True)
PLAN: dict[str, Any] = {"dataset": "gaussian", "rounds": 1, "seeds": "2", "settings": ["gaussian.clients=8", "adapt-steps=1"]}


def small(**changes: Any) -> Plan:
    return planned(["fedavg", "local"], inner_lrs="0.1", **{**PLAN, **changes})


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["quickbloom", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main.main()
    return int(end.value.code or 0)


def test_an_address_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--algorithms", "local", "--dataset", "gaussian", "--rounds", 1, "--seeds", 1)
    for address in (f"127.0.0.1:{free_port()}", "nowhere", "ray://127.0.0.1:999999"):
        assert command(monkeypatch, *words, "--ray", address) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert (
            f"`--ray` must be the address of a Ray cluster that is running, HOST:PORT or auto, got '{address}', which" in said
        )
        assert "Traceback" not in said
    for more in (("--jobs", 2), ("--simulation",), ("--plan", "list.jsonl")):
        assert command(monkeypatch, *words, "--ray", "127.0.0.1:1", *more) == 2
        assert f"`--ray` excludes `{more[0]}`" in " ".join(capsys.readouterr().err.split())


def test_a_part_of_ones_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickbloom.server_app.comparing.machines.ray_cluster.own_parts", lambda _: {"algorithm": object})
    with pytest.raises(ConfigError, match="the algorithm is one of your own, which Ray's processes do not know"):
        workers("127.0.0.1:1", small())


def test_other_data_on_a_machine_of_the_cluster_are_refused_there(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("task,x,target\n" + "".join(f"t{i % 8},{i},{i % 3 + 0.5}\n" for i in range(160)))
    plan = planned(["ridge"], data=str(data), task="task", target="target", rounds=1, seeds="1")
    facts = facts_of(Run(plan.first(), 0, tmp_path))
    data.write_text(data.read_text().replace("t0,0,", "t0,1,"))
    code, said, files = work(facts, str(tmp_path / "elsewhere"))
    assert (code, files) == (2, b"")
    assert "the data here are not those of the comparison" in said


def test_a_task_that_ray_lost_is_told(tmp_path: Path) -> None:
    class Ray:
        exceptions = SimpleNamespace(RayError=RuntimeError)

        def wait(self, references: list[object], timeout: float) -> tuple[list[object], list[object]]:
            return references, []

        def get(self, reference: object) -> None:
            raise RuntimeError("the machine is gone")

    run = Run(small().first(), 0, tmp_path)
    task = Task(Ray(), object(), run)
    assert task.poll() not in (None, 0, 1, 2)
    assert "the Ray task was lost (RuntimeError: the machine is gone)" in (run.directory / LOG).read_text()


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster of this machine alone, with two processors."""
    import ray

    folder = tempfile.mkdtemp(dir="/tmp")  # short: it holds sockets, whose paths may have 107 characters
    mark, port = f"QUICKBLOOM_TEST_RAY={os.getpid()}-{time.monotonic_ns()}", free_port()
    name, _, value = mark.partition("=")
    environment = {
        **os.environ,
        name: value,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else the address stays behind in /tmp/ray, and every simulation on this machine waits for a cluster that is gone.
        "RAY_TMPDIR": folder,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    program = Path(sys.executable).parent / "ray"
    options = [
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        "--num-cpus=2",
        "--include-dashboard=false",
    ]
    started = subprocess.Popen(
        [program, "start", *options, "--disable-usage-stats", "--object-store-memory=100000000"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert started.poll() is None
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        ray.shutdown()
        end_all_with(mark, [started.pid])
        started.wait()
    assert not processes_with(mark)


def without_clocks(result: dict[str, Any]) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: 0 if key == "seconds" else plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return plain(json.loads(json.dumps(result)))


@pytest.mark.slow
def test_a_comparison_on_a_cluster_is_that_of_this_machine(cluster: str, tmp_path: Path) -> None:
    plan = small()
    here = carry_out(plan, tmp_path / "here", 2, QUIET)
    spread = workers(cluster, plan)
    assert spread.number == 2
    there = carry_out(plan, tmp_path / "there", spread, QUIET)
    assert without_clocks(there) == without_clocks(here)
    runs = sorted(path.parent.name for path in (tmp_path / "there").glob("*/finished.json"))
    assert runs == sorted(path.parent.name for path in (tmp_path / "here").glob("*/finished.json"))
    assert len(runs) == 4
    assert (tmp_path / "there" / runs[0] / "history.jsonl").is_file()
    # A run that would take hours ends with the comparison: its processor is free again.
    long = small(rounds=10**6).first()

    def stop_at_the_second(run: Run) -> None:
        if run.seed == 7:
            time.sleep(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform([Run(long, seed, tmp_path / "stopped") for seed in (6, 7)], spread, on_start=stop_at_the_second)
    deadline = time.monotonic() + 90
    while free_processors() < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert free_processors() == 2


def free_processors() -> float:
    ray: Any = import_module("ray")
    return float(ray.available_resources().get("CPU", 0))
