"""Gain of the gradient written out for perceptrons, where there are no kernels: without a compiler, and for larger models.

A round of one node with first-order algorithms, three ways: by the kernels, by the gradient written
out in torch (`common/maths/perceptron.py`), and by autograd mapped over tasks, which does the work
of the second if it is taken out. Models of more than 1 MB have no kernels either way. All ways end
with the same numbers, which is checked first. Repetitions go through the ways in turn, and ratios
are taken within a repetition. One process, one thread.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.engine import CLASSES, FEATURES, LR, distance, spread, task, without_kernels
from benchmarks.runner import commit, finish, machine, say
from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.maths import fast_paths
from quickbloom.common.maths.kernels.build import library
from quickbloom.common.maths.learner import Learner
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.randomness import generator
from quickbloom.server_app.comparing.batch import today

CASES = (
    ("reptile", 64, 15, 100, 32),
    ("reptile", 64, 15, 8, 32),
    ("reptile", 64, 15, 1, 32),
    ("reptile", 64, 15, 100, 10),
    ("fomaml", 64, 5, 100, 10),
    ("heads", 64, 10, 100, 10),
    ("reptile", 512, 15, 32, 32),
)
"""Algorithm, units of both hidden layers, inner steps, tasks, examples of a step."""
CHUNK = 128
TOLERANCE = 1e-3
"""Allowed difference of two ways: in single precision, steps on ten examples and wide models magnify rounding."""


def main() -> None:
    claim = "without kernels, the gradient written out makes a round faster than autograd does"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.written_out", description=claim, epilog="Example: python -m benchmarks.written_out"
    )
    parser.add_argument("--repetitions", type=int, default=15, metavar="N", help="at least 5; default: %(default)s")
    repetitions = parser.parse_args().repetitions
    if repetitions < 5:
        parser.error("--repetitions must be at least 5")
    torch.set_num_threads(1)
    if library(torch.float32) is None:
        raise SystemExit("there are no kernels here: nothing to compare with")
    points = [measure(*case, repetitions) for case in CASES]
    result: dict[str, Any] = {"schema": 1, "benchmark": "written_out", "claim": claim, "points": points, "goals": []}
    result |= {"machine": machine(), "versions": {"torch": torch.__version__}, "commit": commit(), "date": today()}
    finish(result, table(points))


def measure(name: str, width: int, steps: int, num_tasks: int, examples: int, repetitions: int) -> dict[str, Any]:
    """Return the tasks per second of every way, and the ratio of the times of autograd and of the gradient written out."""
    options = ALGORITHMS[name].Options.model_validate({"inner_lr": LR, "inner_steps": steps})
    if "batch_size" in type(options).model_fields:
        options = options.model_copy(update={"batch_size": examples})
    algorithm = ALGORITHMS[name](options, Learner(perceptron((FEATURES, width, width, CLASSES)), "classification", CLASSES))
    meta, tasks = algorithm.init(), [task(k, examples) for k in range(num_tasks)]

    def kernels() -> Any:
        done = run_round(algorithm, meta, [TaskWork(one, generator(0, k)) for k, one in enumerate(tasks)], CHUNK)
        return done.gradient, done.losses

    def autograd() -> Any:
        with patch.object(fast_paths, "layer_names", lambda module: None):
            return kernels()

    ways = {"kernels": kernels, "written out": without_kernels(kernels), "autograd": without_kernels(autograd)}
    seconds = in_turn(ways, repetitions)
    medians = {way: num_tasks / statistics.median(values) for way, values in seconds.items()}
    ratio = spread(list(np.divide(seconds["autograd"], seconds["written out"])))
    case = f"{name}, {FEATURES}-{width}-{width}-{CLASSES}, {steps} steps, {num_tasks} tasks, {examples} examples"
    say(f"{case}: {ratio['median']:.2f}")
    return {"case": case, "repetitions": repetitions, "tasks_per_second": medians, "ratio": ratio}


def in_turn(
    ways: dict[str, Callable[[], Any]],
    repetitions: int,
    *,
    tolerance: float = TOLERANCE,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of every way in every repetition by `clock`, after checking that they agree."""
    expected, *others = (way() for way in ways.values())  # also warms up
    apart = max(distance(expected, other) for other in others)
    if apart > tolerance:
        raise SystemExit(f"two ways differ by {apart:.2g}, more than {tolerance:g}: there is nothing to compare")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions):
        for name, way in list(ways.items())[:: 1 if repetition % 2 else -1]:
            gc.collect()
            started = clock()
            way()
            seconds[name].append(clock() - started)
    return seconds


def table(points: list[dict[str, Any]]) -> str:
    """Return tasks per second and the gain over autograd, as a Markdown table."""
    lines = ["| case | kernels, tasks/s | written out | autograd | written out over autograd (quartiles) |"]
    lines.append("|---|---:|---:|---:|---:|")
    for point in points:
        ratio, speeds = point["ratio"], point["tasks_per_second"]
        told = " | ".join(f"{speeds[way]:,.0f}" for way in ("kernels", "written out", "autograd"))
        quartiles = f"{ratio['median']:.2f} ({ratio['quartile1']:.2f}-{ratio['quartile3']:.2f})"
        lines.append(f"| {point['case']} | {told} | {quartiles} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
