"""Clients per second of `quickbloom run`, in process and in Flower's simulation, and growth of memory, beside stock Flower.

A client has 64 training rows of 32 features and 10 classes; it takes 15 SGD steps of batch 32 on a
perceptron 32-64-64-10. Our way is in process, many tasks per node and one node per core; with one
client a node it is Flower's simulation. "Flower" is its own
FedAvg with one client per node, as its users run it (benchmarks/stock_flower). Both run in turn in
every repetition, and ratios are taken within it. Clients per second are those of the median round
after the first, which starts the processes. Memory is that of the run's processes together (shared
memory counts once), read every two seconds, since a reading takes time from the run.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.runner import ROOT, commit, finish, goal, machine, say
from quickbloom.common.system.processes import processes_with
from quickbloom.server_app.comparing.batch import today
from quickbloom.server_app.launch.flower_run import LocalSuperLink, environment, script
from quickbloom.server_app.messaging.runtimes import IN_PROCESS, SIMULATION
from quickbloom.server_app.runs.directory import read_history

TRAIN_ROWS = 64
JOB = ("inner-steps=15", "batch-size=32", "inner-lr=0.05", "evaluate-every=0")
# 80 rows, of which 0.4 and 0.4 are trained on: 64.
DATA = ("gaussian.rows=80", "validation-tasks=0.05", "test-tasks=0.05")
GOAL_RATE, GOAL_STOCK, GOAL_MANY, GOAL_NODES, GOAL_MEMORY = 3500.0, 40.0, 0.97, 250.0, 1.05


@dataclass(frozen=True)
class Case:
    """One size. `clients`: in all, `training` of which are neither validation nor test tasks."""

    label: str
    clients: int
    training: int
    per_round: int
    nodes: int
    rounds: int
    runtime: str = IN_PROCESS


CASES = (
    Case("1,000 clients, 1,000 a round", 1112, 1000, 1000, 2, 60),
    Case("1,000 clients, 100 a round", 1112, 1000, 100, 2, 150),
    Case("10,000 clients, 1,000 a round", 11112, 10000, 1000, 2, 60),
    Case("1,000 nodes with one client each, 50 a round", 1000, 900, 50, 1000, 100, SIMULATION),
)
STOCK = "stock Flower: 200 nodes with one client each, 100 a round"
STOCK_NODES, STOCK_ROUNDS = 200, 6


def main() -> None:
    claim = (
        "`quickbloom run` gets through 3,500 clients a second, 40 times as many as stock Flower, and its memory does not grow"
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulation",
        description=claim,
        epilog="Example: python -m benchmarks.simulation --repetitions 5",
    )
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="one per core; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="stock Flower and the first case only; writes no results")
    chosen = parser.parse_args()
    cases = CASES[:1] if chosen.quick else CASES
    runs: dict[str, list[dict[str, float]]] = {label: [] for label in [STOCK, *(case.label for case in cases)]}
    for repetition in range(chosen.repetitions):
        runs[STOCK].append(stock())
        say(f"{STOCK}: {runs[STOCK][-1]}")
        for case in cases:
            # The long case, which reports no speed, runs once.
            if repetition == 0 or case.nodes == 2:
                runs[case.label].append(measure(case, repetition, chosen.nodes))
                say(f"{case.label}: {runs[case.label][-1]}")
    result: dict[str, Any] = {"schema": 1, "benchmark": "simulation", "claim": claim, "goals": []}
    result["sides"] = [{"label": label, "runs": of, "median": middle(of)} for label, of in runs.items()]
    if chosen.quick:
        print(table(result))
        return
    result |= {"machine": machine(), "versions": {"torch": torch.__version__}, "commit": commit(), "date": today()}
    first, _, many, nodes = (case.label for case in CASES)
    rate = middle(runs[first])["rate"]
    goal(result, f"{first}: at least {GOAL_RATE:.0f} clients per second", rate, met=rate >= GOAL_RATE)
    times = statistics.median(ours["rate"] / flower["rate"] for ours, flower in zip(runs[first], runs[STOCK], strict=True))
    goal(result, f"the same: at least {GOAL_STOCK:.0f} times stock Flower", times, met=times >= GOAL_STOCK)
    share = statistics.median(m["rate"] / f["rate"] for m, f in zip(runs[many], runs[first], strict=True))
    goal(result, f"{many}: at least {GOAL_MANY} of the rate of {first}", share, met=share >= GOAL_MANY)
    rate = middle(runs[nodes])["rate"]
    goal(result, f"{nodes}: at least {GOAL_NODES:.0f} clients per second", rate, met=rate >= GOAL_NODES)
    for label in (many, nodes):
        growth = middle(runs[label])["growth"]
        goal(
            result, f"{label}: memory at the end over that at round 20 at most {GOAL_MEMORY}", growth, met=growth <= GOAL_MEMORY
        )
    finish(result, table(result))


def measure(case: Case, seed: int, cores: int) -> dict[str, float]:
    """Return clients per second, seconds of the first and of the median later round, and memory.

    Memory is that at the end, and its ratio to that at round 20.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = (*JOB, *DATA, f"gaussian.clients={case.clients}", f"tasks-per-round={case.per_round}")
        command = [
            script("quickbloom"),
            "run",
            "--runtime",
            case.runtime,
            "--algorithm",
            "reptile",
            "--dataset",
            "gaussian",
        ]
        command += [
            "--seed",
            str(seed),
            "--rounds",
            str(case.rounds),
            "--nodes",
            str(cores if case.nodes == 2 else case.nodes),
            "--no-report",
        ]
        command += ["--output", str(run)]
        for setting in settings:
            command += ["--set", setting]
        marker = f"QUICKBLOOM_BENCHMARK={folder}"
        sizes = watch(command, marker, lambda: rounds_of(run))
        history = read_history(run)
    short = [record["train"]["tasks"] for record in history if record["train"]["tasks"] != case.per_round]
    if short:
        raise SystemExit(f"{case.label}: a round had {short[0]} tasks instead of {case.per_round}")
    seconds = [record["seconds"] for record in history]
    later = statistics.median(seconds[1:])
    # The last round does not count: it scores held-out tasks and ends its processes.
    from_20 = [size for number, size in sizes if 20 <= number < case.rounds - 1]
    if not from_20:
        raise SystemExit(f"{case.label}: the run was over before its memory was looked at after round 20")
    return {
        "rate": case.per_round / later,
        "first": seconds[0],
        "round": later,
        "megabytes": from_20[-1],
        "growth": from_20[-1] / from_20[0],
    }


def watch(command: list[str], marker: str, rounds: Callable[[], int]) -> list[tuple[int, float]]:
    """Run a command to its end; return (rounds done, megabytes of all processes with `marker`), read during its rounds."""
    name, _, value = marker.partition("=")
    sizes = []
    process = subprocess.Popen(
        command,
        env={**environment(), name: value},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    while process.poll() is None:
        time.sleep(2)
        if (done := rounds()) and (found := processes_with(marker)):
            sizes.append((done, sum(map(memory, found))))
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"this failed: {' '.join(command)}\n{said[-2000:]}")
    return sizes


def rounds_of(run: Path) -> int:
    """Return the number of rounds that a run has recorded so far."""
    try:
        return len(read_history(run))
    except OSError:
        return 0


def memory(pid: int) -> float:
    """Return the megabytes of a process, with its part of shared memory (proportional set size); 0 if it has ended."""
    try:
        return float(psutil.Process(pid).memory_full_info().pss) / 1e6
    except psutil.Error:
        return 0.0


def stock() -> dict[str, float]:
    """Return the figures of Flower's own strategy and grid, with one client per node."""
    with tempfile.TemporaryDirectory() as folder, LocalSuperLink() as link:
        file = Path(folder) / "seconds.json"
        config = f'rounds={STOCK_ROUNDS} nodes={STOCK_NODES} nodes-per-round=100 seconds-file="{file}"'
        command = [
            script("flwr"),
            "run",
            str(ROOT / "benchmarks" / "stock_flower"),
            link.name,
            "--run-config",
            config,
            "--stream",
        ]
        command += ["--federation-config", f"num-supernodes={STOCK_NODES} client-resources-num-cpus=1"]
        done = subprocess.run(
            command, env=environment(link.home), capture_output=True, text=True, encoding="utf-8", timeout=900, check=False
        )
        if not file.is_file():
            raise SystemExit(f"Flower's own run failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        seconds = json.loads(file.read_text(encoding="utf-8"))
    later = statistics.median(seconds[1:])
    return {"rate": 100 / later, "first": seconds[0], "round": later}


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of every figure over the repetitions."""
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}


def table(result: dict[str, Any]) -> str:
    lines = ["| simulation | clients per second (range) | round, s | first round, s | memory, MB | over that at round 20 |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for side in result["sides"]:
        rates = [run["rate"] for run in side["runs"]]
        at = side["median"]
        size = f"{at['megabytes']:.0f} | {at['growth']:.2f}" if "growth" in at else "- | -"
        lines.append(
            f"| {side['label']} | {at['rate']:.0f} ({min(rates):.0f}-{max(rates):.0f}) | {at['round']:.2f} "
            f"| {at['first']:.1f} | {size} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
