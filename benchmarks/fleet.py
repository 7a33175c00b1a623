"""Many nodes at one SuperLink: seconds, processor and memory of a round in which half of them are asked, and what grows.

A real SuperLink with its database, a real run, and nodes that compute nothing and share one process (`benchmarks.many_nodes`):
what is left is what a message costs. A round's seconds after the slowest reply are those from the last reply that a node pushed
to the end of the round.

    python -m benchmarks.fleet --nodes 250 1000 4000 --rounds 6
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.runner import ROOT, commit, finish, goal, machine, say
from quickbloom.common.flower import superlink, workers
from quickbloom.common.system.processes import end_all_with, end_group, sessions_with
from quickbloom.server_app.comparing.batch import today
from quickbloom.server_app.launch.flower_run import environment, free_port, healthy, script
from quickbloom.server_app.runs.directory import read_history

ASKED, TRAIN = 0.5, 0.8
"""Shares of all nodes: those asked in a round, and those that train."""
GOAL_SECONDS, GOAL_MEMORY, GOAL_GROWTH = 20.0, 1000.0, 1.2
SIDES = ("superlink", "server", "nodes")


def main() -> None:
    claim = "a round of half of many nodes ends soon after its slowest reply, and no part of it grows faster than their number"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet", description=claim, epilog="Example: python -m benchmarks.fleet --nodes 250 1000"
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[250, 1000, 4000], metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="of every run; default: %(default)s")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="of every run; default: %(default)s")
    chosen = parser.parse_args()
    sizes = []
    for nodes in chosen.nodes:
        sizes.append(measure(nodes, chosen.rounds, chosen.timeout))
        say(json.dumps(sizes[-1]))
    result: dict[str, Any] = {"schema": 1, "benchmark": "fleet", "claim": claim, "goals": [], "rounds": chosen.rounds}
    result |= {"sizes": sizes, "machine": machine(), "commit": commit(), "date": today()}
    for size in sizes:
        if size["nodes"] == 1000:
            late = size["after_last"]
            goal(result, "1,000 nodes: a round ends within 20 s of the slowest reply", late, met=late <= GOAL_SECONDS)
            megabytes = size["memory"]["server"]
            goal(result, "1,000 nodes: memory of the server's process below 1 GB", megabytes, met=megabytes < GOAL_MEMORY)
    for small, large in pairwise(sizes):
        for name in ("roll_call", "round"):
            growth = (large[name] / small[name]) / (large["nodes"] / small["nodes"])
            text = f"{name}: from {small['nodes']} to {large['nodes']} nodes at most {GOAL_GROWTH} times linear"
            goal(result, text, growth, met=growth <= GOAL_GROWTH)
    finish(result, table(result))


def measure(nodes: int, rounds: int, timeout: float) -> dict[str, Any]:
    """Return what a run of so many nodes and rounds takes."""
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder), nodes) as processes:
        home = Path(folder)
        began = time.monotonic()
        while (active := told(home)["active"]) < nodes:
            if time.monotonic() - began > timeout:
                raise SystemExit(f"only {active} of {nodes} nodes joined within {timeout:g} s")
            time.sleep(1)
        joined = time.monotonic() - began
        idle = watched(processes, lambda: time.sleep(30))
        looks = told(home)
        settings = [f"fraction={ASKED / TRAIN}", "validation-tasks=0.1", "test-tasks=0.1", "evaluate-every=0", "adapt-steps=1"]
        settings += ["round-deadline=600", "node-deadline=600", f"min-nodes={nodes}", "baselines=false", "personal=false"]
        command = [script("quickbloom"), "run", "--algorithm", "fomaml", "--dataset", "gaussian", "--rounds", str(rounds)]
        command += [word for one in settings for word in ("--set", one)]
        command += ["--no-report", "--connection", "loopback", "--output", str(home / "run")]

        def run() -> None:
            done = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=timeout)
            if done.returncode:
                raise SystemExit(f"the run ended with code {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")

        ends: dict[str, list[float]] = {"history.jsonl": [], "events.jsonl": []}
        started = time.time()
        used = watched(processes, run, lambda: note_ends(home / "run", ends))
        ended, last = ends["history.jsonl"], told(home)["last"]
        history = read_history(home / "run")[:-1]  # the last round scores as well
        later = history[1:] or history
        after = [end - last[f"train {line['round']}"] for line, end in zip(history, ended, strict=False)]
        return {
            "nodes": nodes,
            "asked": round(ASKED * nodes),
            "joined": joined,
            "look": looks["looked"] / max(1, looks["calls"].get("PullMessages", 0)),
            "idle_cpu": {side: idle[side]["cpu"] / 30 for side in SIDES if side in idle},
            "roll_call": last["query.roll_call"] - started,
            "before_training": ended[0] - history[0]["seconds"] - started,
            "round": statistics.median(line["seconds"] for line in later),
            "rounds": [line["seconds"] for line in history],
            "failures": sum(len(line.get("failures", [])) for line in history),
            "cpu": {side: used[side]["cpu"] for side in used},
            "memory": {side: used[side]["memory"] for side in used},
            "database": sum(file.stat().st_size for file in home.glob("state.db*")) / 1e6,
            "calls": told(home)["calls"],
            "failed": told(home)["failed"],
            "after_last": max(after),
        }


def note_ends(run: Path, ends: dict[str, list[float]]) -> None:
    """Add the time to each file's list for every line that it has got since."""
    for name, times in ends.items():
        if (run / name).exists():
            times += [time.time()] * ((run / name).read_bytes().count(b"\n") - len(times))


def told(home: Path) -> dict[str, Any]:
    """Return what the nodes did until now."""
    file = home / "status.json"
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"active": 0}
    return facts


def watched(
    processes: Mapping[str, psutil.Process], work: Callable[[], None], look: Callable[[], None] = lambda: None
) -> dict[str, dict[str, float]]:
    """Return CPU seconds and most memory (MB) of SuperLink, server and nodes while `work` is done; `look` is called often."""
    before, most, spent = spending(processes), dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES, 0.0)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        while wait([done], timeout=1).not_done:
            look()
            for side, (seconds, megabytes) in spending(processes).items():
                most[side] = max(most[side], megabytes)
                spent[side] = max(spent[side], seconds - before.get(side, (0.0, 0.0))[0])
        done.result()
    return {side: {"cpu": spent[side], "memory": most[side]} for side in SIDES}


def spending(processes: Mapping[str, psutil.Process]) -> dict[str, tuple[float, float]]:
    """Return CPU seconds until now and megabytes (resident) of every side; the server is what the SuperLink has started."""
    found: dict[str, tuple[float, float]] = {}
    for side, process in processes.items():
        found[side] = spent(process)
    children = [spent(child) for child in processes["superlink"].children(recursive=True)]
    # Of processes that share memory, the largest.
    found["server"] = (sum(one[0] for one in children), max((one[1] for one in children), default=0.0))
    return found


def spent(process: psutil.Process) -> tuple[float, float]:
    """Return CPU seconds and megabytes of a process; nothing of one that has ended."""
    try:
        with process.oneshot():
            times = process.cpu_times()
            return times.user + times.system, process.memory_info().rss / 1e6
    except psutil.Error:
        return 0.0, 0.0


@contextmanager
def fleet(home: Path, nodes: int) -> Iterator[dict[str, psutil.Process]]:
    """Start a SuperLink, with the connection `loopback` in FLWR_HOME, and the nodes; yield both processes by side."""
    env = {**environment(home), **workers.MEMORY}
    http, port = free_port(), free_port()
    (home / "config.toml").write_text(
        f'[superlink.loopback]\naddress = "127.0.0.1:{http}"\ninsecure = true\n', encoding="utf-8"
    )
    link = [*superlink.command(), "--insecure", "--host", "127.0.0.1", "--port", str(http)]
    link += ["--fleet-api-address", f"127.0.0.1:{port}", "--database", str(home / "state.db")]
    link += ["--disable-runtime-dependency-installation"]
    node = [sys.executable, "-m", "benchmarks.many_nodes", "--superlink", f"127.0.0.1:{port}", "--nodes", str(nodes)]
    node += ["--status", str(home / "status.json")]
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
    log = (home / "log").open("wb")
    started = [subprocess.Popen(link, env=env, cwd=home, stderr=log, **quiet)]
    try:
        while not healthy(http):
            time.sleep(0.2)
        started.append(subprocess.Popen(node, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, stderr=log, **quiet))
        yield {"superlink": psutil.Process(started[0].pid), "nodes": psutil.Process(started[1].pid)}
    finally:
        ours = f"FLWR_HOME={home}"
        sessions = sessions_with(ours)  # while their first processes live
        for process in reversed(started):
            end_group(process)
        end_all_with(ours, sessions)  # the app of a run that has not ended
        log.close()


def table(result: dict[str, Any]) -> str:
    """Return the table of the result file."""
    heads = ["nodes", "joined in, s", "roll call, s", "a round, s", "after the last reply, s", "a look, ms", "idle: cores"]
    heads += ["CPU s: SuperLink", "server", "MB: SuperLink", "server", "database, MB"]
    lines = [f"| {' | '.join(heads)} |"]
    lines.append("|" + "---:|" * 12)
    for size in result["sizes"]:
        cells = [f"{size['nodes']:,}", f"{size['joined']:.0f}", f"{size['roll_call']:.1f}", f"{size['round']:.1f}"]
        cells += [f"{size['after_last']:.1f}", f"{1000 * size['look']:.0f}", f"{size['idle_cpu']['superlink']:.2f}"]
        cells += [f"{size[what][side]:.0f}" for what in ("cpu", "memory") for side in ("superlink", "server")]
        cells.append(f"{size['database']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
