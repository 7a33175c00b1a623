"""A comparison on a Ray cluster: the table of one on this machine, and a sentence where there is no cluster."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from ray_machines import Cluster, free_port, wait_until
from rich.console import Console

from quickbloom.common.errors import ConfigError, RunError
from quickbloom.server_app.cli import main
from quickbloom.server_app.comparing.batch import LOG, Run, perform
from quickbloom.server_app.comparing.comparison import carry_out, planned
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.comparing.spread_out import facts_of
from quickbloom.server_app.ray_cluster.connecting import Processors
from quickbloom.server_app.ray_cluster.runs import Task, _packed, work, workers

QUIET = Console(quiet=True)
PLAN: dict[str, Any] = {"dataset": "gaussian", "rounds": 1, "seeds": "2", "settings": ["gaussian.clients=8", "adapt-steps=1"]}


def small(**changes: Any) -> Plan:
    return planned(["fedavg", "local"], inner_lrs="0.1", **{**PLAN, **changes})


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


def silent() -> socket.socket:
    """A server that takes connections and says nothing."""
    return socket.create_server(("127.0.0.1", 0))


def of_another_kind() -> grpc.Server:
    return grpc.server(ThreadPoolExecutor(1))


def test_a_server_that_is_not_ray_is_told_within_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quickbloom.server_app.ray_cluster.address._PATIENCE", 2.0)
    words = ("--algorithms", "local", "--dataset", "gaussian", "--rounds", 1, "--seeds", 1)
    other = of_another_kind()
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with closing(silent()) as server:
        nobody = server.getsockname()[1]
        for address, found, why in (
            (f"127.0.0.1:{nobody}", "", "it took a connection and said nothing"),
            (f"ray://127.0.0.1:{nobody}", "", "it took a connection and said nothing"),
            ("auto", f"127.0.0.1:{port}", "it is a server of another kind"),
        ):
            monkeypatch.setenv("RAY_ADDRESS", found)
            started = time.monotonic()
            assert command(monkeypatch, *words, "--ray", address) == 2
            assert time.monotonic() - started < 30
            said = " ".join(capsys.readouterr().err.split())
            assert f"got '{address}', which does not answer" in said
            assert why in said
    other.stop(None)


def test_a_part_of_ones_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickbloom.server_app.ray_cluster.connecting.own_parts", lambda _: {"algorithm": object})
    with pytest.raises(ConfigError, match="the algorithm is one of your own, which Ray's processes do not know"):
        workers("127.0.0.1:1", small())


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigError, match=r"`--ray` needs ray, which is not installed: run pip install 'quickbloom\[simulation\]'"
    ):
        workers("127.0.0.1:1", small())


def test_a_machine_that_comes_later_counts() -> None:
    found = iter([{"CPU": 2.0}, {"CPU": 5.0}, {}])
    processors = Processors(SimpleNamespace(cluster_resources=lambda: next(found)))
    assert [processors(), processors()] == [2, 2]  # it is not asked for every time
    counts = []
    for _ in range(2):
        processors._until = 0.0
        counts.append(processors())
    assert counts == [5, 1]


def test_other_data_on_a_machine_of_the_cluster_are_refused_there(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("task,x,target\n" + "".join(f"t{i % 8},{i},{i % 3 + 0.5}\n" for i in range(160)))
    plan = planned(["ridge"], data=str(data), task="task", target="target", rounds=1, seeds="1")
    facts = facts_of(Run(plan.first(), 0, tmp_path))
    data.write_text(data.read_text().replace("t0,0,", "t0,1,"))
    code, said, files = work(facts, str(tmp_path / "elsewhere"))
    assert (code, files) == (2, b"")
    assert "the data here are not those of the comparison" in said


class LostError(Exception):
    """As Ray tells of a process or a machine that is gone."""


class FailedError(Exception):
    """As Ray tells of an exception of the task."""

    cause = ModuleNotFoundError("No module named 'quickbloom'")


class FakeRay:
    """Gives the results in their order; exceptions are raised."""

    exceptions = SimpleNamespace(RayError=(LostError, FailedError), RayTaskError=FailedError)

    def __init__(self, *results: Any) -> None:
        self.results = list(results)

    def wait(self, references: list[object], timeout: float) -> tuple[list[object], list[object]]:
        return references, []

    def get(self, reference: object) -> Any:
        if isinstance(result := self.results.pop(0), Exception):
            raise result
        return result


def polled(root: Path, *results: Any) -> tuple[int, str, int]:
    """The exit code, what stands in the run's log, and how often it was begun."""
    begun: list[object] = []
    run = Run(small().first(), 0, root)
    task = Task(
        FakeRay(*results), lambda: begun.append(0), run, Processors(SimpleNamespace(cluster_resources=lambda: {"CPU": 1.0}))
    )
    while (code := task.poll()) is None:
        pass
    log = run.directory / LOG
    return code, log.read_text() if log.is_file() else "", len(begun)


def test_a_connection_that_has_ended_ends_the_comparison_with_a_sentence(tmp_path: Path) -> None:
    """As of ray://HOST:PORT: what Ray then raises is no error of Ray's."""

    def ended(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Client is shutting down.")

    ray = FakeRay()
    task = Task(ray, lambda: 0, Run(small().first(), 0, tmp_path), Processors(SimpleNamespace(cluster_resources=lambda: {})))
    ray.wait = ray.cancel = ended  # type: ignore[attr-defined, method-assign]
    with pytest.raises(
        RunError, match=r"the connection to the Ray cluster is lost \(ConnectionError: Client is shutting down\): see that its"
    ):
        task.poll()
    task.end()


def test_a_run_that_is_lost_starts_anew_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / LOG).write_text("done")
    assert polled(
        tmp_path, LostError("the machine is gone. See https://example.com"), (-9, "", b""), (0, "", _packed(files))
    ) == (0, "done", 3)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fedavg, inner lr 0.1, seed 0: the Ray task was lost (LostError: the machine is gone); it starts anew"
    assert said[1] == "fedavg, inner lr 0.1, seed 0: its process was ended from outside by signal 9; it starts anew"


def test_a_run_that_is_lost_every_time_ends_it(tmp_path: Path) -> None:
    code, said, begun = polled(tmp_path, *[LostError("gone")] * 3)
    assert (code in (0, 1, 2), begun) == (False, 3)
    assert said == "error: the Ray task was lost (LostError: gone), 3 times\n"


def test_what_would_fail_again_is_not_begun_again(tmp_path: Path) -> None:
    code, said, begun = polled(tmp_path, FailedError("a long story"))
    assert (code in (0, 1, 2), begun) == (False, 1)
    assert said == "error: the Ray task failed (ModuleNotFoundError: No module named 'quickbloom')\n"
    assert polled(tmp_path, (2, "on a: the data here are others", b""))[:2] == (2, "error: on a: the data here are others\n")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def without_clocks(result: dict[str, Any]) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: 0 if key == "seconds" else plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return plain(json.loads(json.dumps(result)))


@pytest.mark.slow
def test_a_comparison_on_a_cluster_is_that_of_this_machine(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = small()
    here = carry_out(plan, tmp_path / "here", 2, QUIET)
    spread = workers(cluster.address, plan)
    wait_until(lambda: spread.number() == 2)  # the other machine may come late
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
    wait_until(lambda: free_processors() == 2)
    # What is lost with a process, and then with a machine, is done again. The lost process takes its run along.
    capsys.readouterr()
    middling = small(rounds=300).first()
    wanted = [Run(middling, seed, tmp_path / "lost") for seed in range(3)]
    with ThreadPoolExecutor(1) as pool:
        losing = pool.submit(lose_twice, cluster)
        done = perform(wanted, spread)
        futures.wait([losing])
    orphan = losing.result()
    assert [result.code for result in done.values()] == [0, 0, 0]
    assert not Path(f"/proc/{orphan}").exists()
    assert capsys.readouterr().err.count("; it starts anew") == 2
    alone = perform([Run(middling, seed, tmp_path / "alone") for seed in range(3)], 2)
    for one, other in zip(done.values(), alone.values(), strict=True):
        assert [line["train"] for line in one.rounds] == [line["train"] for line in other.rounds]


def lose_twice(cluster: Cluster) -> int:
    """Kill Ray's process above the run on the other machine, then this machine; return the process of the first run."""
    first = cluster.run_on(cluster.other)
    os.kill(parent(first), signal.SIGKILL)
    wait_until(lambda: first not in cluster.runs(cluster.other))
    cluster.run_on(cluster.other)
    cluster.lose(cluster.other)
    return first


def stopped(cluster: Cluster, output: Path, stop: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
    """Stop a comparison whose runs are at work on both machines; return its exit code and what it said."""
    words = ["compare", "--algorithms", "fedavg", "--dataset", "gaussian", "--rounds", str(10**6), "--inner-lrs", "0.1"]
    words += ["--seeds", "2", "--ray", cluster.address, "--output", str(output)]
    program = "import sys; from quickbloom.server_app.cli.main import main; sys.argv[0] = 'quickbloom'; main()"
    compare = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE, text=True)
    try:
        cluster.run_on(cluster.head)
        cluster.run_on(cluster.other)
        stop(compare)
        _, said = compare.communicate(timeout=120)
    finally:
        compare.kill()
    assert "Traceback" not in said
    wait_until(lambda: not cluster.runs(cluster.head) + cluster.runs(cluster.other))
    return compare.returncode, said


@pytest.mark.slow
def test_ctrl_c_ends_the_runs_on_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    code, said = stopped(cluster, tmp_path / "out", lambda compare: compare.send_signal(signal.SIGINT))
    assert code == 130, said
    assert "Stopped; repeat the command to go on" in said


@pytest.mark.slow
def test_a_comparison_whose_head_is_lost_ends_with_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    code, said = stopped(cluster, tmp_path / "out", lambda _: cluster.lose_head())
    assert code == 1, said
    assert f"the head of the Ray cluster at {cluster.address} is lost" in said


def free_processors() -> float:
    ray: Any = import_module("ray")
    return float(ray.available_resources().get("CPU", 0))
