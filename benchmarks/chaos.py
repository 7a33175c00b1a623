"""Robustness of a federation to faults: real nodes over gRPC with TLS, seeded faults, and an undisturbed run to compare with.

Every few seconds a fault hits a node: it is killed (and restarted after a while), paused, cut off, or gets a slow link. Now and
then the SuperLink is killed and restarted with its database. The outcome is compared with the same run without faults: in one
process, with `--mode async` on the same nodes before the faults begin. A round with too few replies is repeated. The data are
generated, with 240 test clients: on the 11 of `digits` two undisturbed runs that ask different devices differ by more than the
tolerance of one point.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from benchmarks.flaky_link import FlakyLink
from benchmarks.runner import commit, finish, goal, machine, say
from quickbloom.common.system.processes import end_all_with, processes_with
from quickbloom.server_app.comparing.batch import today
from quickbloom.server_app.deployment.secrets import create
from quickbloom.server_app.launch.flower_run import environment, free_port, script
from quickbloom.server_app.runs.directory import read_history

SETTINGS = (
    *("gaussian.clients=400", "validation-tasks=0.1", "test-tasks=0.6"),
    *("evaluate-every=0", "round-deadline=15", "node-deadline=120", "on-too-few=repeat"),
)
MODES = {"sync": ("min-replies=0.5",), "async": ("mode=async",)}
POINT, MEMORY = 0.01, 1.05
_AT_REST, _LOOKS = 50, 60
"""Percent of processor use that counts as at rest, and how often it is measured, over five seconds each."""
MARK = "QUICKBLOOM_CHAOS"


def main() -> None:
    claim = "nodes die, sleep, are cut off or slow, the SuperLink dies: the run comes to its end, as good as an undisturbed one"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=claim, epilog="Example: python -m benchmarks.chaos --nodes 5 --rounds 20"
    )
    parser.add_argument("--nodes", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the run and of the faults; default: %(default)s")
    parser.add_argument(
        "--pause", type=float, default=6.0, metavar="S", help="seconds between two faults; default: %(default)s"
    )
    parser.add_argument("--mode", choices=("sync", "async"), default="sync", help="default: %(default)s")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that child processes end as well
    result: dict[str, Any] = {
        "schema": 1,
        "benchmark": "chaos" + "-async" * (chosen.mode == "async"),
        "claim": claim,
        "goals": [],
        **vars(chosen),
    }
    with tempfile.TemporaryDirectory() as folder:
        result |= compare(Path(folder), chosen)
    calm, disturbed = result["undisturbed"], result["disturbed"]
    result |= {"machine": machine(), "commit": commit(), "date": today()}
    lost = calm["after"] - disturbed["after"]
    goal(result, "accuracy at most 1 point below that of the undisturbed run, in points", 100 * lost, met=lost <= POINT)
    rounds = disturbed["rounds"]
    goal(result, f"all {chosen.rounds} rounds came to an end", rounds, met=rounds == chosen.rounds)
    growth = disturbed["memory_growth"]
    goal(
        result,
        f"memory of the run's process at the end over that at a third of the rounds at most {MEMORY}",
        growth,
        met=growth <= MEMORY,
    )
    finish(result, table(result))


def run(directory: Path, chosen: argparse.Namespace, how: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Run `quickbloom run` to its end; return the test accuracy, the rounds and their missing replies."""
    command = [script("quickbloom"), "run", "--algorithm", "reptile", "--dataset", "gaussian", "--seed", str(chosen.seed), *how]
    command += ["--rounds", str(chosen.rounds), "--output", str(directory), "--no-report", "--json"]
    for setting in (*SETTINGS, *MODES[chosen.mode]):
        command += ["--set", setting]
    done = subprocess.run(
        command,
        env=env,
        cwd=directory.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        logs = [f"{log.name}: {log.read_text('utf-8')[-4000:]}" for log in sorted(directory.parent.glob("super*.log"))]
        raise SystemExit("\n".join([f"the run ended with code {done.returncode}: {done.stderr[-3000:]}", *logs]))
    summary = json.loads(done.stdout)
    history = read_history(directory)
    scores = summary["test"]["accuracy"]["mean"]
    return {
        "after": scores[summary["chosen"]["adapt_steps"]],
        "rounds": len(history),
        "seconds": summary["seconds"]["total"],
        "missed": sum(len(record["failures"]) for record in history),
        "answered": sum(record["nodes"]["answered"] for record in history) / len(history),
        "command": " ".join(["quickbloom", *command[1:]]).replace(str(directory), directory.name),
    }


def compare(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the outcome without faults and that of the same command with faults.

    A synchronous run computes the same wherever it runs, so the one without faults is in this process. Without waiting, nodes
    that are equally fast are stale too: that run has the same real nodes.
    """
    if chosen.mode == "sync":
        calm = run(folder / "calm", chosen, ["--nodes", str(chosen.nodes)], dict(os.environ))
        say(f"undisturbed: {calm['after']:.4f}")
    with federated(folder, chosen.nodes) as federation:
        if chosen.mode == "async":
            calm = run(folder / "calm", chosen, ["--connection", "loopback"], federation.env)
            say(f"undisturbed, on real nodes: {calm['after']:.4f}")
        return {"undisturbed": calm, "disturbed": chaos(folder, chosen, federation)}


def chaos(folder: Path, chosen: argparse.Namespace, federation: "Federation") -> dict[str, Any]:
    """Run the command over gRPC with faults; return its outcome, the faults and the growth of memory."""
    with ExitStack() as stack:
        over = threading.Event()
        sizes: list[tuple[int, float]] = []
        threads = stack.enter_context(ThreadPoolExecutor())
        background = [
            threads.submit(_watch, folder / "run", sizes, over),
            threads.submit(federation.disturb, random.Random(chosen.seed), chosen.pause, over, folder / "run"),
        ]
        try:
            outcome = run(folder / "run", chosen, ["--connection", "loopback"], federation.env)
        finally:
            over.set()
        for thread in background:
            thread.result()
    early = [size for number, size in sizes if number >= chosen.rounds / 3]
    return {**outcome, "faults": dict(federation.counted), "memory_growth": early[-1] / early[0], "megabytes": early[-1]}


def _watch(run_dir: Path, sizes: list[tuple[int, float]], over: threading.Event) -> None:
    """Record (rounds done, megabytes) of the ServerApp's process until `over` is set."""
    while not over.wait(2):
        rounds = len(read_history(run_dir)) if run_dir.exists() else 0
        # It is a fork of the SuperExec's fork server, and the largest, since it holds everything that the others hold.
        if rounds and (found := [_resident(pid) for pid in processes_with(f"{MARK}=server")]):
            sizes.append((rounds, max(found) / 1e6))


def _resident(pid: int) -> int:
    """Return the resident bytes of a process; 0 if it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


class Federation:
    """A SuperLink, its SuperExec and nodes behind flaky links, as processes that can be disturbed."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.counted: Counter[str] = Counter()
        self.http, self.fleet = free_port(), free_port()
        self.secrets = folder / "secrets"
        self.names = [f"node-{i:02d}" for i in range(nodes)]
        create(self.secrets, self.names, [], days=1)
        self.env = environment(folder)
        connection = {"address": f"127.0.0.1:{self.http}", "root-certificates": str(self.secrets / "cli" / "ca.crt")}
        (folder / "config.toml").write_text(tomli_w.dumps({"superlink": {"loopback": connection}}), encoding="utf-8")
        self.links = {name: FlakyLink(self.fleet) for name in self.names}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start "superlink", "superexec" or a node."""
        at = f"127.0.0.1:{self.http}"
        if name == "superlink":
            command = [
                script("quickbloom"),
                "superlink",
                "--secrets",
                self.secrets / "superlink",
                "--state",
                self.folder / "state",
            ]
            command += ["--port", self.http, "--fleet-host", "127.0.0.1", "--fleet-port", self.fleet]
        elif name == "superexec":
            command = [script("quickbloom"), "superexec", "--secrets", self.secrets / "superexec", "--superlink", at]
            command += ["--runs", self.folder / "runs"]
        else:
            server = f"127.0.0.1:{self.links[name].port}"
            command = [script("quickbloom-edge"), "join", "--server", server, "--secrets", self.secrets / "nodes" / name]
            command += ["--port", free_port(), "--set", f"partition-id={self.names.index(name)}"]
            command += ["--set", f"num-partitions={len(self.names)}", "--set", f"state-dir={self.folder / name}"]
        env = {**self.env, MARK: "server" if name == "superexec" else name}
        with (self.folder / f"{name}.log").open("a", encoding="utf-8") as log:
            self.running[name] = subprocess.Popen(
                list(map(str, command)),
                env=env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to all processes of a node or of the SuperLink."""
        for pid in processes_with(f"{MARK}={name}"):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def disturb(self, rng: random.Random, pause: float, over: threading.Event, run_dir: Path) -> None:
        """Cause one fault after another from the end of the first round until `over`; in the end repair all."""
        while not (run_dir.exists() and read_history(run_dir)):
            if over.wait(0.5):
                return
        mends: list[tuple[float, str, Callable[[], None]]] = []
        try:
            while not over.wait(rng.uniform(0.5, 1.5) * pause):
                for entry in [entry for entry in mends if entry[0] <= time.monotonic()]:
                    mends.remove(entry)
                    entry[2]()
                hurt = {name for _, name, _ in mends}
                what = rng.choices(("kill", "pause", "cut", "slow", "superlink"), (3, 3, 3, 3, 1))[0]
                if what == "superlink":
                    fit = {"superlink"} - hurt
                else:  # half of the nodes must answer, so faults may hit a quarter
                    few = len(hurt - {"superlink"}) < max(1, len(self.names) // 4)
                    fit = set(self.names) - hurt if few else set()
                if fit:
                    self.counted[what] += 1
                    mends.append(self._hurt(rng.choice(sorted(fit)), what, rng))
        finally:
            for _, _, mend in mends:
                mend()

    def _hurt(self, name: str, what: str, rng: random.Random) -> tuple[float, str, Callable[[], None]]:
        """Cause a fault in a node or the SuperLink; return (time of the repair, name, function that repairs it)."""
        seconds = rng.uniform(2, 40)
        mend: Callable[[], None]
        if what in ("kill", "superlink"):
            self.signal(name, signal.SIGKILL)
            self.running.pop(name).wait()
            seconds, mend = min(seconds, 5) if what == "superlink" else seconds, partial(self.start, name)
        elif what == "pause":
            self.signal(name, signal.SIGSTOP)
            mend = partial(self.signal, name, signal.SIGCONT)
        elif what == "cut":
            self.links[name].cut()
            mend = self.links[name].mend
        else:
            self.links[name].delay = rng.uniform(0.05, 0.3)
            mend = partial(setattr, self.links[name], "delay", 0.0)
        return time.monotonic() + seconds, name, mend

    def end(self) -> None:
        for name in ("superexec", "superlink", *self.names):
            self.signal(name, signal.SIGCONT)
            end_all_with(f"{MARK}={'server' if name == 'superexec' else name}")
        for process in self.running.values():
            process.wait()
        for link in self.links.values():
            link.close()


@contextmanager
def federated(folder: Path, nodes: int) -> Iterator[Federation]:
    """Start a federation whose nodes are all registered and online, or about to be."""
    federation = Federation(folder, nodes)
    try:
        federation.start("superlink")
        federation.start("superexec")
        command = [script("quickbloom"), "secrets", "--output", str(federation.secrets), "--register", "loopback"]
        deadline = time.monotonic() + 120
        while subprocess.run(command, env=federation.env, capture_output=True, check=False).returncode:
            if time.monotonic() > deadline:
                raise SystemExit(
                    "the SuperLink does not take the nodes' keys: "
                    + (folder / "superlink.log").read_text(encoding="utf-8")[-2000:]
                )
            time.sleep(1)
        for name in federation.names:
            federation.start(name)
            time.sleep(0.5)
        # Nodes first import torch in a process that forks for every message; until then they answer slowly.
        say("nodes prepare themselves")
        for _ in range(_LOOKS):
            if psutil.cpu_percent(interval=5) < _AT_REST:
                break
        yield federation
    finally:
        federation.end()


def table(result: dict[str, Any]) -> str:
    lines = ["| run | accuracy after, % | rounds | nodes that answered, of a round | replies missed | seconds |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name in ("undisturbed", "disturbed"):
        of = result[name]
        figures = f"{100 * of['after']:.1f} | {of['rounds']} | {of['answered']:.1f} | {of['missed']} | {of['seconds']:.0f}"
        lines.append(f"| {name} | {figures} |")
    faults = ", ".join(f"{what} {times}" for what, times in sorted(result["disturbed"]["faults"].items()))
    return "\n".join([*lines, "", f"Faults: {faults}."])


if __name__ == "__main__":
    main()
