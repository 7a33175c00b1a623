"""Rounds that do not wait: asynchronous training beside synchronous rounds, on slow devices.

In virtual time: 620 devices with one task each, of which 500 train, as slow and as often away as `devices = lognormal`
says. Synchronous rounds ask for 1.3 times their 20 tasks and end after 20 minutes at the latest (twenty times the median
device's minute). Asynchronous training keeps 26, or 100, tasks at work. It is asked when the synchronous run's last
validation accuracy was reached first, by the mean of three scores in a row in both, since single scores are noisy.

With `--real`: a SuperLink and 20 nodes over gRPC with TLS, of which 4 get a tenth of the time (they are stopped for nine
tenths of it). It is asked how many outer steps a minute there are, and who contributes. An asynchronous step takes a quarter
of a round's tasks, while as many are at work.

    python -m benchmarks.asynchronous --seeds 0 1 2
    python -m benchmarks.asynchronous --real
"""

import argparse
import json
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos import Federation, federated
from benchmarks.runner import Plan, Variant, by_label, commit, finish, goal, machine, measure, parser, percent, run_all, say
from quickbloom.server_app.comparing.batch import Result, today
from quickbloom.server_app.launch.flower_run import script
from quickbloom.server_app.runs.directory import read_history

ALGORITHMS = ("reptile", "fomaml", "protonet")
TASKS = 20
ROUNDS = 60
SYNC = ("over-select=1.3", "round-deadline=1200", f"evaluate-every={ROUNDS // 30}")
NARROW, WIDE = (26, 5, 2), (100, 20, 2)
"""(tasks at work, tasks in a step, times as many tasks in all as the synchronous run)"""
THIRD, POINT, FASTER = 1 / 3, 0.01, 3.0
SLOW, SHARE, PERIOD = 4, 0.1, 0.2


def plan() -> Plan:
    """Return the runs in virtual time."""
    variants = []
    for algorithm in ALGORITHMS:
        variants.append(Variant(f"{algorithm}, sync", algorithm, SYNC))
        for at_work, buffer, times in (NARROW, WIDE):
            steps = ROUNDS * TASKS * times // buffer
            settings = ("mode=async", f"async-concurrency={at_work}", f"async-buffer={buffer}", "round-deadline=1e6")
            variants.append(
                Variant(
                    f"{algorithm}, async {at_work}/{buffer}",
                    algorithm,
                    (*settings, f"evaluate-every={steps // 30}"),
                    rounds=steps,
                )
            )
    return Plan(
        name="asynchronous",
        claim="asynchronous training reaches the synchronous run's accuracy in a third of its time",
        dataset="gaussian",
        rounds=ROUNDS,
        variants=tuple(variants),
        settings=(
            *("gaussian.clients=620", "validation-tasks=60", "test-tasks=60", "split=exact", f"tasks-per-round={TASKS}"),
            *("devices=lognormal", "adapt-steps=5", "adapt-lrs=0.1", "baselines=false", "personal=false", "checkpoint-every=0"),
        ),
        nodes=620,
        in_process=True,
    )


def main() -> None:
    commands = parser("asynchronous training beside synchronous rounds, on slow devices", "asynchronous")
    commands.add_argument("--real", action="store_true", help="real nodes over gRPC in place of virtual time")
    commands.add_argument("--nodes", type=int, default=20, metavar="N", help="with --real; default: %(default)s")
    commands.add_argument("--rounds", type=int, default=16, metavar="N", help="with --real; default: %(default)s")
    chosen = commands.parse_args()
    if chosen.real:
        real(chosen)
        return
    result = run_all(plan(), chosen.seeds, fresh=chosen.fresh, jobs=chosen.jobs)
    kept = measure(plan(), [(variant, seed) for seed in chosen.seeds for variant in plan().variants])
    rows = reached(plan(), chosen.seeds, kept)
    result["reached"] = rows
    for algorithm in ALGORITHMS:
        sync = by_label(result, f"{algorithm}, sync")["mean"]["after"]
        for at_work, buffer, _ in (NARROW, WIDE):
            label = f"{algorithm}, async {at_work}/{buffer}"
            ratios = [row["ratio"] for row in rows if row["label"] == label]
            worst = max(1.0 if ratio is None else ratio for ratio in ratios)  # 1: not reached
            goal(result, f"{label}: time to the synchronous accuracy at most a third, in every seed", worst, met=worst <= THIRD)
            lost = 100 * (sync - by_label(result, label)["mean"]["after"])
            goal(result, f"{label}: test accuracy at most one point below, in points", lost, met=lost <= 100 * POINT)
    finish(result, table(result))


def curve(result: Result) -> list[tuple[float, float, float]]:
    """Return (virtual hours, mean of three validation accuracies, gigabytes) after each score from the third on."""
    sent, points = 0, []
    for line in result.rounds:
        sent += line["bytes"]["up"] + line["bytes"]["down"]
        if "validation" in line:
            points.append((line["virtual_hours"], float(max(line["validation"]["accuracy"])), sent / 1e9))
    return [
        (points[i][0], float(np.mean([accuracy for _, accuracy, _ in points[i - 2 : i + 1]])), points[i][2])
        for i in range(2, len(points))
    ]


def reached(plan: Plan, seeds: Sequence[int], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return for every run when the synchronous run's last validation accuracy was reached first."""
    rows: list[dict[str, Any]] = []
    each = iter(results)
    for seed in seeds:
        target = goal_hours = 0.0
        for variant in plan.variants:
            points = curve(next(each))
            if variant.label.endswith("sync") and "async" not in variant.label:
                target, goal_hours = points[-1][1], points[-1][0]
            first = next(((hours, sent) for hours, accuracy, sent in points if accuracy >= target), None)
            row = {"label": variant.label, "seed": seed, "target": target, "hours": points[-1][0], "last": points[-1][1]}
            row |= {"reached_hours": first and first[0], "reached_gb": first and first[1]}
            rows.append({**row, "ratio": first[0] / goal_hours if first else None})
    return rows


def table(result: Mapping[str, Any]) -> str:
    lines = [
        "| run | test accuracy, % | hours in all | hours until reached | share of the synchronous time | GB until reached |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for variant in result["variants"]:
        rows = [row for row in result["reached"] if row["label"] == variant["label"]]
        after, sd = variant["mean"]["after"], variant["sd"]["after"]
        cells = [f"{percent(after)} ± {percent(sd)}", f"{np.mean([row['hours'] for row in rows]):.2f}"]
        for name, digits in (("reached_hours", 2), ("ratio", 2), ("reached_gb", 3)):
            values = [row[name] for row in rows]
            known = [value for value in values if value is not None]
            cells.append(
                f"{np.mean(known):.{digits}f}" + f" ({len(values) - len(known)} not)" * (len(known) < len(values))
                if known
                else "never"
            )
        lines.append(f"| {variant['label']} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- real nodes


def real(chosen: argparse.Namespace) -> None:
    """Run both modes over gRPC with some slow nodes, and write the result."""
    result: dict[str, Any] = {"schema": 1, "benchmark": "asynchronous-real", "claim": "slow nodes hold nobody up", "goals": []}
    result |= {"nodes": chosen.nodes, "slow": SLOW, "machine": machine(), "commit": commit(), "date": today()}
    with tempfile.TemporaryDirectory() as name, federated(Path(name), chosen.nodes) as federation, slowed(federation):
        result["sync"] = outcome(Path(name) / "sync", federation, chosen.rounds, [])
        say(f"sync: {result['sync']['steps_per_minute']:.1f} steps a minute")
        asked = ["mode=async", f"async-buffer={TASKS // 4}"]
        result["async"] = outcome(Path(name) / "async", federation, 6 * chosen.rounds, asked)
        say(f"async: {result['async']['steps_per_minute']:.1f} steps a minute")
    ratio = result["async"]["steps_per_minute"] / result["sync"]["steps_per_minute"]
    goal(result, f"outer steps a minute at least {FASTER:g} times as many", ratio, met=ratio >= FASTER)
    silent = result["async"]["silent"]
    goal(result, "nodes that never contributed: none", silent, met=silent == 0)
    head = ["mode", "steps a minute", "contributions a minute", "nodes that contributed", "test accuracy, %"]
    lines = [f"| {' | '.join(head)} |", "|---|---:|---:|---:|---:|"]
    for mode in ("sync", "async"):
        of = result[mode]
        rates = f"{of['steps_per_minute']:.1f} | {of['tasks_per_minute']:.0f}"
        lines.append(f"| {mode} | {rates} | {chosen.nodes - of['silent']} | {percent(of['after'])} |")
    finish(result, "\n".join(lines))


@contextmanager
def slowed(federation: Federation) -> Iterator[None]:
    """Within this context the first nodes run for a tenth of the time."""
    over = threading.Event()

    def hold() -> None:
        names = federation.names[:SLOW]
        while not over.wait(SHARE * PERIOD):
            for name in names:
                federation.signal(name, signal.SIGSTOP)
            over.wait((1 - SHARE) * PERIOD)
            for name in names:
                federation.signal(name, signal.SIGCONT)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def outcome(directory: Path, federation: Federation, rounds: int, settings: Sequence[str]) -> dict[str, Any]:
    """Run one mode; return its steps a minute after the first three, and how many nodes never contributed."""
    command = [script("quickbloom"), "run", "--algorithm", "reptile", "--dataset", "gaussian", "--rounds", str(rounds)]
    command += ["--connection", "loopback", "--output", str(directory), "--no-report", "--json"]
    for setting in ("gaussian.clients=400", "tasks-per-round=20", "evaluate-every=0", "baselines=false", *settings):
        command += ["--set", setting]
    started = time.monotonic()
    done = subprocess.run(command, env=federation.env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"the run ended with code {done.returncode}: {done.stderr[-3000:]}")
    summary, lines = json.loads(done.stdout), read_history(directory)
    later = lines[3:]
    trained = {node for line in lines for node in line["nodes"]["trained"]}
    minutes = sum(line["seconds"] for line in later) / 60
    return {
        "steps_per_minute": len(later) / minutes,
        "tasks_per_minute": sum(line["train"]["tasks"] for line in later) / minutes,
        "silent": len(federation.names) - len(trained),
        "after": summary["test"]["accuracy"]["mean"][summary["chosen"]["adapt_steps"]],
        "seconds": time.monotonic() - started,
        "failures": summary["failures"],
    }


if __name__ == "__main__":
    main()
