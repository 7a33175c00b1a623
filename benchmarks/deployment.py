"""Seconds per round of a real deployment: a SuperLink and two SuperNodes on loopback gRPC, a small model.

Three sides run one after the other in every repetition, so that other work on the machine affects
all alike. Ratios are taken within a repetition. "Flower": its own FedAvg, grid, SuperLink and
SuperNodes (benchmarks/stock_flower). "quickbloom, Flower's nodes": our server, the rest as Flower's
commands start it. "quickbloom": our server, the nodes as `quickbloom-edge join` starts them, with
warm workers, and the SuperLink as `quickbloom superlink` starts it. The first round of a run, which
waits for idle nodes to look for work, is reported separately. Our last round, which scores as well
as trains, does not count.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.runner import ROOT, commit, finish, goal, machine, say
from quickbloom.common.flower import superlink, workers
from quickbloom.common.system.processes import end_group
from quickbloom.server_app.comparing.batch import today
from quickbloom.server_app.launch.flower_run import environment, free_port, healthy, script
from quickbloom.server_app.runs.directory import read_history

FLOWER, MIXED, OURS = "Flower", "quickbloom, Flower's nodes", "quickbloom"
SIDES = (FLOWER, MIXED, OURS)
JOB = ("evaluate-every=0", "inner-steps=15", "batch-size=32")
RUN = ["--algorithm", "fedavg", "--dataset", "gaussian", *(word for part in JOB for word in ("--set", part)), "--no-report"]
GOAL_SECONDS, GOAL_RATIO = 1.5, 6.0


def main() -> None:
    claim = "a round of two nodes over loopback gRPC takes at most 1.5 s, and a sixth of the time that Flower's own parts take"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deployment", description=claim, epilog="Example: python -m benchmarks.deployment --rounds 10"
    )
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="of every run; default: %(default)s")
    chosen = parser.parse_args()
    if chosen.rounds < 3:
        parser.error(f"--rounds must be at least 3, as neither the first nor the last counts, got {chosen.rounds}")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(chosen.repetitions):
        for side in SIDES:
            runs[side].append(measure(side, chosen.rounds))
            say(f"{side}: {runs[side][-1]}")
    result: dict[str, Any] = {"schema": 1, "benchmark": "deployment", "claim": claim, "goals": [], "rounds": chosen.rounds}
    result["sides"] = [{"label": side, "runs": runs[side], "median": middle(runs[side])} for side in SIDES]
    ratios = [flower["round"] / ours["round"] for flower, ours in zip(runs[FLOWER], runs[OURS], strict=True)]
    result |= {"ratios": ratios, "machine": machine(), "commit": commit(), "date": today()}
    seconds = result["sides"][-1]["median"]["round"]
    goal(result, f"median round at most {GOAL_SECONDS} s", seconds, met=seconds <= GOAL_SECONDS)
    ratio = statistics.median(ratios)
    goal(result, f"at least {GOAL_RATIO:.0f} times faster than Flower's own", ratio, met=ratio >= GOAL_RATIO)
    finish(result, table(result))


def measure(side: str, rounds: int) -> dict[str, float]:
    """Return seconds of a run's first and median later round, and CPU seconds per round and idle memory of one node.

    CPU seconds include scoring; memory is in MB.
    """
    with tempfile.TemporaryDirectory() as folder, federation(Path(folder), ours=side == OURS) as node:
        home = Path(folder)
        time.sleep(10)  # until the nodes have started, and a fork server has finished its imports
        idle, before = memory(node), cpu(node)
        if side == FLOWER:
            file = home / "seconds.json"
            config = f'rounds={rounds} seconds-file="{file}"'
            command = [script("flwr"), "run", str(ROOT / "benchmarks" / "stock_flower"), "loopback", "--run-config", config]
            subprocess.run([*command, "--stream"], env=environment(home), check=True, capture_output=True, timeout=600)
            seconds = json.loads(file.read_text(encoding="utf-8"))
        else:
            command = [script("quickbloom"), "run", *RUN, "--rounds", str(rounds), "--connection", "loopback"]
            command += ["--output", str(home / "run")]
            subprocess.run(command, env=environment(home), check=True, capture_output=True, timeout=600)
            seconds = seconds_of_training(home / "run")
        spent = (cpu(node) - before) / rounds
    return {"first": seconds[0], "round": statistics.median(seconds[1:]), "cpu": spent, "idle_megabytes": idle}


def seconds_of_training(run: Path) -> list[float]:
    """Return the seconds of every round that only trains.

    The last round also scores, with one more message per node, and is left out.
    """
    return [float(record["seconds"]) for record in read_history(run) if "validation" not in record]


@contextmanager
def federation(home: Path, *, ours: bool, nodes: int = 2) -> Iterator[psutil.Process]:
    """Start a SuperLink, with the connection `loopback` in FLWR_HOME, and SuperNodes; yield the first of these."""
    env = {**environment(home), **workers.MEMORY}  # as in `quickbloom superlink` and `quickbloom-edge join`
    http, fleet = free_port(), free_port()
    (home / "config.toml").write_text(
        f'[superlink.loopback]\naddress = "127.0.0.1:{http}"\ninsecure = true\n', encoding="utf-8"
    )
    link = superlink.command() if ours else [script("flower-superlink")]
    link += ["--insecure", "--host", "127.0.0.1", "--port", str(http), "--fleet-api-address", f"127.0.0.1:{fleet}"]
    link += ["--disable-runtime-dependency-installation"]
    node = workers.command("flower-supernode") if ours else [script("flower-supernode")]
    node += ["--insecure", "--superlink", f"127.0.0.1:{fleet}"]
    started = [_start(link, env, home)]
    try:
        while not healthy(http):
            time.sleep(0.2)
        for i in range(nodes):
            own = ["--port", str(free_port()), "--node-config", f"partition-id={i} num-partitions={nodes}"]
            started.append(_start([*node, *own], env, home))
        yield psutil.Process(started[1].pid)
    finally:
        for process in reversed(started):
            end_group(process)


def _start(command: list[str], env: dict[str, str], home: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=env,
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def memory(node: psutil.Process) -> float:
    """Return the megabytes of a node and its child processes; shared memory counts once (proportional set size)."""
    return float(sum(process.memory_full_info().pss for process in [node, *node.children(recursive=True)])) / 1e6


def cpu(node: psutil.Process) -> float:
    """Return the CPU seconds of a node and its child processes, ended ones included."""
    times = [process.cpu_times() for process in [node, *node.children(recursive=True)]]
    return float(sum(t.user + t.system + t.children_user + t.children_system for t in times))


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of every figure over the repetitions."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def table(result: dict[str, Any]) -> str:
    lines = ["| side | round, s (range) | first round, s | CPU of a node per round, s | a node's memory when idle, MB |"]
    lines.append("|---|---:|---:|---:|---:|")
    for side in result["sides"]:
        rounds = [run["round"] for run in side["runs"]]
        at = side["median"]
        lines.append(
            f"| {side['label']} | {at['round']:.2f} ({min(rounds):.2f}-{max(rounds):.2f}) | {at['first']:.2f} "
            f"| {at['cpu']:.2f} | {at['idle_megabytes']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
