"""Scaling of a node's round with the tasks, the width of the model, the inner steps, and the examples of a step.

From a common point (100 tasks, a perceptron 32-64-64-10, 15 SGD steps of 32 examples) one size at a
time is changed. The round is timed against the plain per-task PyTorch loop of benchmarks/engine.py,
which ends with the same numbers. Both sides take turns, and ratios are taken within a repetition.
One process, one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.engine import CLASSES, FEATURES, LR, distance, plain_sgd, task
from benchmarks.runner import commit, finish, machine, say
from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.maths.kernels.build import library
from quickbloom.common.maths.learner import Learner
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.randomness import generator
from quickbloom.server_app.comparing.batch import today

COMMON = {"tasks": 100, "width": 64, "steps": 15, "examples": 32}
SIZES = {"tasks": (1, 10, 1000), "width": (16, 256, 1024), "steps": (1, 5, 50), "examples": (5, 10, 100)}
CHUNK = 128
TOLERANCE = 1e-4
"""Allowed difference of the two sides; wide models add up many numbers in single precision."""
LONG = 20.0
"""Seconds of a plain round beyond which a point is measured only three times."""


def main() -> None:
    claim = "the engine's lead over a plain loop, by tasks, width of the model, steps and examples"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=claim, epilog="Example: python -m benchmarks.scaling --repetitions 9"
    )
    parser.add_argument("--repetitions", type=int, default=7, metavar="N", help="at least 5; default: %(default)s")
    repetitions = parser.parse_args().repetitions
    if repetitions < 5:
        parser.error("--repetitions must be at least 5")
    torch.set_num_threads(1)
    if library(torch.float32) is None:
        raise SystemExit("there are no kernels here: nothing to measure")
    points = [COMMON, *({**COMMON, name: size} for name, sizes in SIZES.items() for size in sizes)]
    sides = [measure(point, repetitions) for point in points]
    result: dict[str, Any] = {"schema": 1, "benchmark": "scaling", "claim": claim, "points": sides, "goals": []}
    result |= {"machine": machine(), "versions": {"torch": torch.__version__}, "commit": commit(), "date": today()}
    finish(result, table(sides))


def measure(point: dict[str, int], repetitions: int) -> dict[str, Any]:
    """Return milliseconds per round for one task, of both sides, and the engine's speed-up."""
    options = ALGORITHMS["reptile"].Options.model_validate({"inner_lr": LR, "inner_steps": point["steps"]})
    options = options.model_copy(update={"batch_size": point["examples"]})
    module = perceptron((FEATURES, point["width"], point["width"], CLASSES))
    algorithm = ALGORITHMS["reptile"](options, Learner(module, "classification", CLASSES))
    tasks, meta = [task(k, point["examples"]) for k in range(point["tasks"])], algorithm.init()

    def engine() -> tuple[Any, Any]:
        found = run_round(algorithm, meta, [TaskWork(t, generator(0, k)) for k, t in enumerate(tasks)], CHUNK)
        return found.gradient, found.losses

    sides: tuple[Callable[[], Any], ...] = (lambda: plain_sgd(algorithm, module, tasks), engine)
    started = time.perf_counter()
    expected, found = (side() for side in sides)  # also warms up
    if (apart := distance(expected, found)) > TOLERANCE:
        raise SystemExit(f"{point}: the two sides differ by {apart:.2g}: there is nothing to compare")
    if time.perf_counter() - started > LONG:
        repetitions = 3
    seconds: list[list[float]] = []
    for _ in range(repetitions):
        seconds.append([])
        for side in sides:
            started = time.perf_counter()
            side()
            seconds[-1].append(time.perf_counter() - started)
    plain, ours = (1000 * statistics.median(column) / point["tasks"] for column in zip(*seconds, strict=True))
    ratios = sorted(slow / fast for slow, fast in seconds)
    say(f"{point}: {statistics.median(ratios):.1f} times")
    milliseconds = {"plain": plain, "engine": ours}
    return {
        **point,
        "milliseconds_per_task": milliseconds,
        "ratio": statistics.median(ratios),
        "range": [ratios[0], ratios[-1]],
    }


def table(points: list[dict[str, Any]]) -> str:
    lines = ["| tasks | width | steps | examples | plain loop, ms a task | engine, ms a task | times as fast (range) |"]
    lines.append("|---:|---:|---:|---:|---:|---:|---:|")
    for point in points:
        sizes = " | ".join(f"{point[name]:,}" for name in COMMON)
        plain, ours = point["milliseconds_per_task"].values()
        low, high = point["range"]
        lines.append(f"| {sizes} | {plain:.2f} | {ours:.3f} | {point['ratio']:.1f} ({low:.1f}-{high:.1f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
