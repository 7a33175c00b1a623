"""The engine beside other libraries on one workload: clients adapted per second on one core, one thread.

1,000 clients of 64 rows with 32 features, 10 classes; a perceptron 32-64-64-10; a client takes 15
SGD steps on batches of 32 with rate 0.05; 100 clients a round; the mean of (local - global) is
added to the model. A repetition is a few rounds from the common start. Every side begins with the
same numbers and draws the same batches; all must end at the same loss, to 4 decimals, which is
checked first. Repetitions alternate between all sides, and ratios are taken within a repetition.

Two more jobs are few-shot learning with the same clients, 100 a round: exact `maml`, 5 steps on 10 rows and a query of 10
others, and `protonet` on the same; the engine and JAX. Here all numbers must agree at the end.

The engine also scores every client, which the others need not; `jax-given` need not draw batches
either. Other libraries have conflicting requirements: install them into their own environments
(`python -m venv; pip install jax fedjax`, `pip install torch higher torchopt`, `pip install torch
pfl`) and name their Pythons with --peer-python.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.engine import spread
from benchmarks.peer_worker import NAMES, SIDES
from benchmarks.runner import ROOT, commit, finish, goal, machine, say
from quickbloom.common.algorithms.local_sgd import shuffled_epochs
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.randomness import generator
from quickbloom.server_app.comparing.batch import today
from quickbloom.server_app.launch.flower_run import CPU_ENVIRONMENT

CLIENTS, ROWS, FEATURES, CLASSES = 1000, 64, 32, 10
PER_ROUND, STEPS, BATCH = 100, 15, 32
OWN = ("engine", "plain-optim", "plain-grad", "engine-maml", "engine-protonet")
JOBS = ("maml", "protonet")
"""Few-shot jobs: names of sides end with them."""
LABELS = {
    "engine": "quickbloom, the engine",
    "plain-optim": "PyTorch loop, torch.optim",
    "plain-grad": "PyTorch loop, autograd.grad",
    "jax": "JAX, jit(vmap(scan))",
    "jax-given": "the same, batches given",
    "fedjax": "FedJAX, for_each_client, jit",
    "torchopt": "TorchOpt",
    "pfl": "pfl-research",
    "engine-maml": "exact MAML: quickbloom",
    "jax-maml": "exact MAML: JAX, jit(vmap(grad))",
    "engine-protonet": "ProtoNet: quickbloom",
    "jax-protonet": "ProtoNet: JAX, jit(vmap(grad))",
}


def engine_of(side: str) -> str:
    """Return the side of this project that does the same job."""
    return next((f"engine-{job}" for job in JOBS if side.endswith(f"-{job}")), "engine")


def main() -> None:
    claim = "on one core the engine adapts more clients per second than any other library, to the same loss"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=claim,
        epilog="Example: python -m benchmarks.peers --peer-python ~/jax/bin/python --peer-python ~/torch-peers/bin/python",
    )
    parser.add_argument("--repetitions", type=int, default=7, metavar="N", help="at least 5; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="in a repetition; default: %(default)s")
    parser.add_argument("--peer-python", action="append", default=[], metavar="PATH", help="Python with other libraries")
    arguments = parser.parse_args()
    if arguments.repetitions < 5:
        parser.error("--repetitions must be at least 5")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.npz"
        work = workload(arguments.rounds)
        np.savez(path, **work)  # type: ignore[arg-type]
        workers = [Worker(sys.executable, path, OWN)]
        try:
            workers += [Worker(python, path, [s for s in SIDES if s not in OWN]) for python in arguments.peer_python]
            result = compare(work, path, workers, arguments.repetitions)
        finally:
            for worker in workers:
                worker.end()
    result = {"schema": 1, "benchmark": "peers", "claim": claim, **result, "goals": []}
    result |= {"machine": machine(), "commit": commit(), "date": today()}
    sides = result["sides"]
    for name, side in sides.items():
        if name == "plain-optim":
            goal(result, f"engine over {name}: at least 25 times", side["times"]["median"], met=side["times"]["median"] >= 25)
        elif name != engine_of(name):
            goal(result, f"engine over {name}: above 1", side["times"]["median"], met=side["times"]["median"] > 1)
    share = result["peak"]["share"]
    goal(result, "engine: at least 40 % of the peak of one large product", share, met=share >= 0.4)
    finish(result, table(result))


class Worker:
    """A process of one Python with the sides that it can compute."""

    def __init__(self, python: str, path: Path, names: Any) -> None:
        environment = {**os.environ, **CPU_ENVIRONMENT, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        command = [python, str(ROOT / "benchmarks" / "peer_worker.py"), str(path), *names]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.report: dict[str, dict[str, Any]] = self._answer()

    def time(self, name: str) -> dict[str, float]:
        assert self._process.stdin
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        taken: dict[str, float] = self._answer()
        return taken

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a side's process ended early; what it said stands above")
        return json.loads(line)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(work: dict[str, np.ndarray], path: Path, workers: list[Worker], repetitions: int) -> dict[str, Any]:
    """Check the losses, then time all sides in turn."""
    able: dict[str, Worker] = {}
    missing: dict[str, str] = {}
    for worker in workers:
        for name, facts in worker.report.items():
            if "missing" in facts:
                missing.setdefault(name, facts["missing"])
            else:
                able.setdefault(name, worker)
    ends = {name: dict(np.load(f"{path}.{name}.npz")) for name in able}
    for name in list(able):
        if (own := engine_of(name)) != "engine" and (apart := difference(ends[name], ends[own])) > 1e-4:
            raise SystemExit(f"{name} and {own} end at different numbers, {apart:.2g} of their length apart")
    losses = {name: loss(work, ends[name]) for name in able if engine_of(name) == "engine"}
    before = loss(work, work)
    if len({f"{value:.4f}" for value in losses.values()}) > 1 or not losses["engine"] < before:
        raise SystemExit(f"the sides end at different losses, there is nothing to compare: {losses}")
    say(f"{len(losses)} sides: loss {before:.4f} -> {losses['engine']:.4f}; {len(able) - len(losses)} few-shot sides agree")
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in able}
    peak = []
    for number in range(1, repetitions + 1):
        for name, worker in able.items():
            taken[name].append(worker.time(name))
        peak.append(flops_per_second())
        say(f"repetition {number}/{repetitions}")
    clients = len(work["clients"]) * PER_ROUND
    walls = {name: np.array([t["wall"] for t in times]) for name, times in taken.items()}
    cpus = {name: np.array([t["cpu"] for t in times]) for name, times in taken.items()}
    sides = {
        name: {
            "clients_per_second": spread(list(clients / walls[name])),
            "clients_per_cpu_second": spread(list(clients / cpus[name])),
            "times": spread(list(walls[name] / walls[engine_of(name)])),
            "cpu_times": spread(list(cpus[name] / cpus[engine_of(name)])),
            "first": able[name].report[name]["first"],
            "versions": able[name].report[name]["versions"],
            "loss": loss(work, ends[name]),
        }
        for name in able
    }
    shares = clients * flops() / cpus["engine"] / np.array(peak)
    return {
        "repetitions": repetitions,
        "rounds": len(work["clients"]),
        "sides": sides,
        "missing": {name: why for name, why in missing.items() if name not in able},
        "loss": {"before": before, "after": losses["engine"]},
        "peak": {"gigaflops": float(np.median(peak)) / 1e9, "share": float(np.median(shares))},
    }


def workload(rounds: int) -> dict[str, np.ndarray]:
    """Return clients whose labels follow one linear rule, each with its own shift; the batches of every round; the start."""
    rng = generator(0, "peers")
    rule = rng.standard_normal((FEATURES, CLASSES))
    x = rng.standard_normal((CLIENTS, ROWS, FEATURES)) + 0.5 * rng.standard_normal((CLIENTS, 1, FEATURES))
    y = (x @ rule + rng.gumbel(size=(CLIENTS, ROWS, CLASSES))).argmax(axis=-1)
    clients = np.stack([rng.choice(CLIENTS, PER_ROUND, replace=False) for _ in range(rounds)])
    rows = [[shuffled_epochs(ROWS, STEPS, BATCH, generator(0, "peers", r, int(k))) for k in c] for r, c in enumerate(clients)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = perceptron((FEATURES, 64, 64, CLASSES))
    start = {name: value.detach().numpy() for name, value in model.named_parameters()}
    assert tuple(start) == NAMES
    return {"x": x.astype(np.float32), "y": y, "clients": clients, "rows": np.array(rows), **start}


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Return the length of the difference over that of the second."""
    apart, whole = (
        np.concatenate([values.ravel() for values in part])
        for part in ([one[n] - other[n] for n in NAMES], [other[n] for n in NAMES])
    )
    return float(np.linalg.norm(apart) / np.linalg.norm(whole))


def loss(work: dict[str, np.ndarray], theta: dict[str, np.ndarray]) -> float:
    """Return the mean cross-entropy over all rows of all clients."""
    h = torch.from_numpy(work["x"]).double()
    for i, layer in enumerate(("1", "3", "5")):
        h = F.linear(
            h.relu() if i else h, *(torch.from_numpy(theta[f"{layer}.{part}"]).double() for part in ("weight", "bias"))
        )
    return float(F.cross_entropy(h.flatten(0, 1), torch.from_numpy(work["y"]).flatten()))


def flops() -> float:
    """Return the floating-point operations of one client's matrix products: forward, and backward to weights and inputs."""
    first, rest = FEATURES * 64, 64 * 64 + 64 * CLASSES
    return float(STEPS * BATCH * 2 * (2 * first + 3 * rest))


def flops_per_second(size: int = 1024) -> float:
    """Return the speed of one thread in one large product: the best of five."""
    torch.set_num_threads(1)
    a, b, c = (torch.randn(size, size) for _ in range(3))
    best = 0.0
    for _ in range(5):
        started = time.process_time()
        torch.mm(a, b, out=c)
        best = max(best, 2 * size**3 / (time.process_time() - started))
    return best


def table(result: dict[str, Any]) -> str:
    """Return clients per second and speed-ups, as a Markdown table, fastest first."""
    lines = ["| | clients per second (quartiles) | engine is faster, times (quartiles) | in CPU time | first repetition, s |"]
    lines.append("|---|---:|---:|---:|---:|")
    sides = sorted(result["sides"].items(), key=lambda item: -item[1]["clients_per_second"]["median"])
    for name, side in sides:
        rate, times = side["clients_per_second"], side["times"]
        what = f"{LABELS.get(name, name)} {side['versions'].get(name, '')}".strip()
        lines.append(
            f"| {what} | {rate['median']:,.0f} ({rate['quartile1']:,.0f}-{rate['quartile3']:,.0f}) | "
            f"{times['median']:.2f} ({times['quartile1']:.2f}-{times['quartile3']:.2f}) | {side['cpu_times']['median']:.2f} | "
            f"{side['first']:.1f} |"
        )
    peak = result["peak"]
    lines += [
        "",
        f"One large product reaches {peak['gigaflops']:.0f} GFLOP/s here, the engine {100 * peak['share']:.0f} % of that.",
    ]
    lines += [f"Not measured: {name} ({why})." for name, why in result["missing"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
