"""Gain from mapping over tasks: the engine against a plain per-task PyTorch loop, in one process with one thread.

A perceptron 32-64-64-10, batches of 32 or, as in few-shot learning, 10 examples. "SGD": 15 inner
steps as in Reptile and FedAvg; the loop copies the module and runs torch.optim.SGD on the same
minibatches. "MAML": 5 inner steps, exact; the loop goes through them with create_graph=True.
"conv4": SGD on images of 28 x 28 pixels with 32 filters, 5 steps. All are computed by compiled
kernels and, for comparison, "in torch" as on a machine without a compiler. MAML is also measured
there with torch.compile, after compiling.

Both sides also compute every task's query loss and the mean over tasks, from the same task data to
the same result, which is checked first. Repetitions alternate between the two sides, and ratios are
taken within a repetition, so that other work on the machine affects both alike. Memory is the
growth of a fresh process's peak over one round of exact MAML.
"""

import argparse
import copy
import gc
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.runner import commit, finish, goal, machine, say
from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.config.run import RunConfig
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.kernels.build import library
from quickbloom.common.maths.kernels.compiler import SWITCH
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.models.conv4 import Conv4, Conv4Options
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.randomness import generator
from quickbloom.server_app.comparing.batch import today

FEATURES, CLASSES, LR = 32, 10, 0.1
IMAGE = (1, 28, 28)
CHUNKS = (8, 16, 32, 50)
MEMORY = ((128, 32), (1024, 32), (1024, 1024))
"""Pairs (tasks, chunk-size) whose peak memory is measured."""
TOLERANCE, ROUGH = 1e-5, 0.1
"""Allowed differences of two sides; the second is for conv4 in single precision, where rounding errors grow in every step."""
Side = Callable[[], tuple[Params, list[float]]]


def main() -> None:
    claim = "one node computes 100 tasks many times as fast as a plain per-task PyTorch loop, with the same result"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=claim, epilog="Example: python -m benchmarks.engine --repetitions 31"
    )
    parser.add_argument("--repetitions", type=int, default=15, metavar="N", help="at least 7; default: %(default)s")
    repetitions = parser.parse_args().repetitions
    if repetitions < 7:
        parser.error("--repetitions must be at least 7")
    torch.set_num_threads(1)
    if library(torch.float32) is None:
        raise SystemExit("there are no kernels here: nothing to measure")
    cases = [compare("reptile", 15, 100, 32, plain_sgd, repetitions)]
    cases += [compare("maml", 5, tasks, batch, plain_maml, repetitions) for tasks, batch in ((100, 32), (32, 32), (32, 10))]
    cases.append(compare("reptile", 5, 32, 10, plain_sgd, repetitions, images=True))
    memory = [{"tasks": tasks, "chunk": chunk, "megabytes": peak(tasks, chunk)} for tasks, chunk in MEMORY]
    result = {"schema": 1, "benchmark": "engine", "claim": claim, "cases": cases, "memory": memory, "goals": []}
    result["machine"] = machine()
    result |= {"versions": {"torch": torch.__version__}, "commit": commit(), "date": today()}
    for case in cases:
        ratio = case["engine"][str(RunConfig().chunk_size)]["ratio"]["median"]
        least = 8 if case["algorithm"] == "maml" else 3 if case["images"] else 25
        text = f"{case['case']}: at least {least} times as fast as the plain loop, default chunk-size"
        goal(result, text, ratio, met=ratio >= least)
    few, many, _ = (entry["megabytes"] for entry in memory)
    goal(
        result,
        "peak memory of 1024 tasks in chunks of 32 over that of 128 tasks: at most 1.5",
        many / few,
        met=many <= 1.5 * few,
    )
    lines = [f"| {entry['tasks']} | {entry['chunk']} | {entry['megabytes']:.0f} |" for entry in memory]
    finish(result, "\n".join([table(cases), "", "| tasks | chunk-size | MB |", "|---:|---:|---:|", *lines]))


def peak(tasks: int, chunk: int) -> float:
    """Return the megabytes by which a fresh process's peak memory grows in one round of exact MAML; batches of 32."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return float(pool.apply(_growth, (tasks, chunk)))


def _growth(tasks: int, chunk: int) -> float:
    torch.set_num_threads(1)
    algorithm = build("maml", 5, 32)
    work = [TaskWork(task(k, 32), generator(0, k)) for k in range(tasks)]
    run_round(algorithm, algorithm.init(), work[:2], chunk)  # loads and allocates everything that is needed once
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak; Linux only
    before = _status("VmRSS")
    run_round(algorithm, algorithm.init(), work, chunk)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """Return the kilobytes of this process that Linux reports as `name`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def build(name: str, steps: int, batch: int, *, images: bool = False) -> Algorithm:
    """Return the algorithm on a perceptron with 64 and 64 hidden units, or for images on conv4 with 32 filters."""
    options = ALGORITHMS[name].Options.model_validate({"inner_lr": LR, "inner_steps": steps})
    options = options.model_copy(update={"batch_size": batch}) if name == "reptile" else options
    module = Conv4.build(Conv4Options(filters=32), IMAGE, CLASSES) if images else perceptron((FEATURES, 64, 64, CLASSES))
    return ALGORITHMS[name](options, Learner(module, "classification", CLASSES))


def compare(
    name: str, steps: int, num_tasks: int, batch: int, plain: Callable[..., Any], repetitions: int, *, images: bool = False
) -> dict[str, Any]:
    """Check that both sides agree, then time them in turn: the plain loop, then the engine with every chunk size."""
    case = f"{'SGD' if name == 'reptile' else 'exact MAML'}, {steps} steps, {num_tasks} tasks, {batch} examples"
    case = f"conv4, {case}" if images else case
    algorithm = build(name, steps, batch, images=images)
    module = algorithm.learner.module
    tasks = [task(k, batch, images=images) for k in range(num_tasks)]
    meta = algorithm.init()

    def engine(chunk: int, *, compile: bool = False) -> Side:
        def side() -> tuple[Params, list[float]]:
            work = [TaskWork(t, generator(0, k)) for k, t in enumerate(tasks)]
            round_result = run_round(algorithm, meta, work, chunk, compile=compile)
            return round_result.gradient, round_result.losses

        return side

    sides: dict[str, Side] = {"plain": lambda: plain(algorithm, module, tasks)}
    sides |= {str(chunk): engine(chunk) for chunk in sorted({*CHUNKS, RunConfig().chunk_size})}
    sides["in torch"] = without_kernels(engine(RunConfig().chunk_size))
    if name == "maml":
        sides["compiled"] = without_kernels(engine(RunConfig().chunk_size, compile=True))
    expected, *others = (side() for side in sides.values())  # also warms up
    apart = max(distance(expected, other) for other in others)
    if images and apart < ROUGH:  # batch norm over few examples amplifies rounding: check in double precision
        apart = in_double_precision(name, steps, batch, num_tasks, plain)
    if apart > TOLERANCE:
        raise SystemExit(f"{case}: the two sides differ by {apart:.2g}, more than {TOLERANCE:g}: there is nothing to compare")
    wall: dict[str, list[float]] = {key: [] for key in sides}
    cpu: dict[str, list[float]] = {key: [] for key in sides}
    for number in range(1, repetitions + 1):
        for key, side in sides.items():
            gc.collect()
            started = time.perf_counter(), time.process_time()
            side()
            wall[key].append(time.perf_counter() - started[0])
            cpu[key].append(time.process_time() - started[1])
        say(f"{case}: repetition {number}/{repetitions}")
    facts = {
        "case": case,
        "algorithm": name,
        "images": images,
        "tasks": num_tasks,
        "inner_steps": steps,
        "batch": batch,
        "difference": apart,
        "repetitions": repetitions,
    }
    timed = {
        key: {
            "seconds": spread(wall[key]),
            "ratio": spread(list(np.divide(wall["plain"], wall[key]))),
            "cpu_ratio": spread(list(np.divide(cpu["plain"], cpu[key]))),
        }
        for key in sides
    }
    return {**facts, "plain": timed.pop("plain")["seconds"], "engine": timed}


def without_kernels(side: Side) -> Side:
    """Return `side` run without kernels, as on a machine without a compiler."""

    def torch_alone() -> tuple[Params, list[float]]:
        os.environ[SWITCH] = "0"
        library.cache_clear()
        try:
            return side()
        finally:
            del os.environ[SWITCH]
            library.cache_clear()
            library(torch.float32)  # loaded again for the next side

    return torch_alone


def in_double_precision(name: str, steps: int, batch: int, num_tasks: int, plain: Callable[..., Any]) -> float:
    """Return the distance of the plain loop and the engine on images of float64."""
    algorithm = build(name, steps, batch, images=True)
    algorithm.learner.module.double()
    tasks = [task(k, batch, images=True) for k in range(num_tasks)]
    tasks = [TaskData(*(Batch.of(part.x.double(), part.y) for part in (t.support, t.query, t.test))) for t in tasks]
    expected = plain(algorithm, algorithm.learner.module, tasks)

    def side() -> tuple[Params, list[float]]:
        work = [TaskWork(t, generator(0, k)) for k, t in enumerate(tasks)]
        found = run_round(algorithm, algorithm.init(), work, RunConfig().chunk_size)
        return found.gradient, found.losses

    return max(distance(expected, result) for result in (side(), without_kernels(side)()))


def plain_sgd(algorithm: Algorithm, module: nn.Module, tasks: list[TaskData]) -> tuple[Params, list[float]]:
    """Return the mean of theta - phi_k and the query losses, with a copy of the module and an optimizer for every task."""
    total = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    losses = []
    for k, data in enumerate(tasks):
        x, y = torch.cat([data.support.x, data.query.x]), torch.cat([data.support.y, data.query.y])
        indices = algorithm.minibatch_indices(len(x), generator(0, k))
        assert indices is not None
        model = copy.deepcopy(module)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for rows in torch.from_numpy(indices):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            losses.append(F.cross_entropy(model(data.query.x), data.query.y).item())
            for (name, before), after in zip(module.named_parameters(), model.parameters(), strict=True):
                total[name] += (before - after) / len(tasks)
    return total, losses


def plain_maml(algorithm: Algorithm, module: nn.Module, tasks: list[TaskData]) -> tuple[Params, list[float]]:
    """Return the mean of the gradients at theta of the query loss at phi_k, and those losses."""
    theta = dict(module.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    losses = []
    for data in tasks:
        phi: dict[str, Tensor] = dict(theta)
        for _ in range(algorithm.options.inner_steps):
            loss = F.cross_entropy(functional_call(module, phi, (data.support.x,)), data.support.y)
            gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {name: value - LR * g for (name, value), g in zip(phi.items(), gradients, strict=True)}
        loss = F.cross_entropy(functional_call(module, phi, (data.query.x,)), data.query.y)
        for name, g in zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True):
            total[name] += g / len(tasks)
        losses.append(loss.item())
    return total, losses


def task(index: int, batch: int, *, images: bool = False) -> TaskData:
    """Return a task of a random linear rule with `batch` support and `batch` query examples."""
    rng = generator(0, "engine", index)
    shape = IMAGE if images else (FEATURES,)
    x = torch.from_numpy(rng.standard_normal((2 * batch, *shape)).astype(np.float32))
    y = torch.from_numpy((x.flatten(1).numpy() @ rng.standard_normal((math.prod(shape), CLASSES))).argmax(axis=1))
    support, query = Batch.of(x[:batch], y[:batch]), Batch.of(x[batch:], y[batch:])
    return TaskData(support, query, query)


def distance(one: tuple[Params, list[float]], other: tuple[Params, list[float]]) -> float:
    """Return the largest absolute difference of any entry of the gradients and of any loss."""
    entries = [float((one[0][name] - other[0][name]).abs().max()) for name in one[0]]
    return max([*entries, *(abs(a - b) for a, b in zip(one[1], other[1], strict=True))])


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "quartile1": float(low), "quartile3": float(high)}


def table(cases: list[dict[str, Any]]) -> str:
    """Return milliseconds per round and speed-ups, for every chunk size, as a Markdown table."""
    lines = ["| case | chunk-size | plain loop, ms | engine, ms | times as fast (quartiles) | in CPU time |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for case in cases:
        for chunk, side in case["engine"].items():
            ratio, default = side["ratio"], " (default)" * (chunk == str(RunConfig().chunk_size))
            times = f"{1000 * case['plain']['median']:.0f} | {1000 * side['seconds']['median']:.1f}"
            quartiles = f"{ratio['median']:.1f} ({ratio['quartile1']:.1f}-{ratio['quartile3']:.1f})"
            lines.append(f"| {case['case']} | {chunk}{default} | {times} | {quartiles} | {side['cpu_ratio']['median']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
