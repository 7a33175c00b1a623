"""Memory for a large model: about 100 MB, three nodes over loopback gRPC with warm workers.

The measure is how far the resident memory of a process rises above its level before the run; for a
process started in the run, above the level of the process it was forked from. It is read ten times
a second, by the kernel's own high-water mark.
"""

import argparse
import itertools
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.deployment import federation
from benchmarks.runner import commit, finish, goal, machine
from quickbloom.common.system.processes import processes_with
from quickbloom.server_app.comparing.batch import today
from quickbloom.server_app.launch.flower_run import environment, script
from quickbloom.server_app.runs.directory import read_history

HIDDEN = (4992, 4992)
MOST = 4.0
SETTINGS = ("evaluate-every=0", "inner-steps=1", "batch-size=32", "chunk-size=1", "checkpoint-every=0", "tasks-per-round=3")


def main() -> None:
    claim = "a model of 100 MB goes round in three nodes, and no process takes more than four times its size for it"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.large_model",
        description=claim,
        epilog="Example: python -m benchmarks.large_model --rounds 3",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    rounds = parser.parse_args().rounds
    sizes = (32, *HIDDEN, 10)
    model = sum((a + 1) * b for a, b in itertools.pairwise(sizes)) * 4 / 1e6
    with tempfile.TemporaryDirectory() as folder, federation(Path(folder), ours=True, nodes=3):
        home = Path(folder)
        before = {pid: peak for pid, (_, peak) in at_rest(home).items()}
        over, peaks = threading.Event(), dict[int, tuple[str, float]]()
        watcher = threading.Thread(target=watch, args=(home, peaks, over))
        watcher.start()
        command = [script("quickbloom"), "run", "--algorithm", "fedavg", "--dataset", "gaussian", "--connection", "loopback"]
        command += ["--rounds", str(rounds), "--output", str(home / "run"), "--no-report"]
        for setting in (*SETTINGS, f"mlp.hidden={','.join(map(str, HIDDEN))}"):
            command += ["--set", setting]
        done = subprocess.run(
            command, env=environment(home), capture_output=True, text=True, encoding="utf-8", check=False, timeout=1800
        )
        over.set()
        watcher.join()
        if done.returncode:
            raise SystemExit(f"the run failed: {done.stderr[-2000:]}")
        history = read_history(home / "run")
    # A process started in the run begins with the memory of a fork server.
    start = max(before.values())
    roles: dict[str, float] = {}
    for pid, (role, peak) in peaks.items():
        fresh = 60.0 if role in ("quickbloom", "flwr") else start
        roles[role] = max(roles.get(role, 0.0), peak - before.get(pid, fresh))
    result: dict[str, Any] = {"schema": 1, "benchmark": "large_model", "claim": claim, "goals": [], "model_megabytes": model}
    result["risen_megabytes"] = roles
    result["bytes"] = [record["bytes"] for record in history]
    result["seconds"] = [record["seconds"] for record in history]
    result |= {"machine": machine(), "commit": commit(), "date": today()}
    worst = max(roles.values()) / model
    goal(result, f"no process rises by more than {MOST:g} times the model's size", worst, met=worst <= MOST)
    # Every message of a round carries the model once, requests for scores included.
    most = max(record["bytes"]["down"] / (record["nodes"]["asked"] * model * 1e6) for record in history)
    goal(result, "bytes down in a round at most 1.02 times the model for each message", most, met=most <= 1.02)
    lines = ["| process | rises by, MB | times the model |", "|---|---:|---:|"]
    lines += [f"| {role} | {size:.0f} | {size / model:.1f} |" for role, size in sorted(roles.items())]
    finish(result, "\n".join(lines))


def at_rest(home: Path) -> dict[int, tuple[str, float]]:
    """Return `look` once the fork servers have finished their imports: when hardly anything has grown for ten seconds."""
    before, since = look(home), time.monotonic()
    while time.monotonic() - since < 10:
        time.sleep(1)
        now = look(home)
        if now.keys() != before.keys() or any(peak > before[pid][1] + 1 for pid, (_, peak) in now.items()):
            before, since = now, time.monotonic()
    return before


def watch(home: Path, peaks: dict[int, tuple[str, float]], over: threading.Event) -> None:
    """Keep the latest figures of every process of the federation, until `over`."""
    while not over.wait(0.1):
        peaks.update(look(home))


def look(home: Path) -> dict[int, tuple[str, float]]:
    """Return (role, highest resident memory in MB) of every process with this FLWR_HOME."""
    found = {}
    for pid in processes_with(f"FLWR_HOME={home}"):
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        names = [Path(word).name for word in words if word]
        role = next((name for name in names if name.startswith(("flower-", "flwr", "quickbloom"))), " ".join(names)[:40])
        peak = next((int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)
        found[pid] = (role, peak)
    return found


if __name__ == "__main__":
    main()
