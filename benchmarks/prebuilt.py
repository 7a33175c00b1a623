"""Speed of the libraries in `quickbloom-kernels`, against the kernels compiled for this very processor and against none.

A round of one node, one thread, goes through the ways in turn. Times are those of the processor, and ratios are taken within a
repetition, so that other work on the machine hardly counts. Needs a C++ compiler and zig, which builds the libraries anew.
"""

import argparse
import ctypes
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.engine import ROUGH, Side, build, spread, task, without_kernels
from benchmarks.runner import commit, finish, goal, machine, say
from benchmarks.written_out import TOLERANCE, in_turn
from kernels.build_wheels import libraries
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.maths.kernels import build as kernels
from quickbloom.common.maths.kernels import prebuilt, train
from quickbloom.common.randomness import generator
from quickbloom.server_app.comparing.batch import today

CASES = (("SGD", 15, 100, 32, False), ("SGD", 15, 100, 10, False), ("conv4, SGD", 5, 32, 10, True))
"""Name, steps, tasks, examples of a step, and whether the model is conv4 on images or a perceptron 32-64-64-10."""
CHUNK = 128


def main() -> None:
    claim = "kernels that were compiled elsewhere are as fast as those compiled for this processor"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prebuilt", description=claim, epilog="Example: python -m benchmarks.prebuilt"
    )
    parser.add_argument("--repetitions", type=int, default=15, metavar="N", help="at least 5; default: %(default)s")
    repetitions = parser.parse_args().repetitions
    if repetitions < 5:
        parser.error("--repetitions must be at least 5")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ways = loaded(Path(folder))
        points = [measure(*case, ways, repetitions) for case in CASES]
    result: dict[str, Any] = {"schema": 1, "benchmark": "prebuilt", "claim": claim, "points": points, "goals": []}
    result |= {"machine": machine(), "versions": {"torch": torch.__version__}, "commit": commit(), "date": today()}
    best = list(ways)[1]
    for point in points:
        ratio = point["ratio"][best]["median"]
        goal(result, f"{point['case']}: {best} at least 0.95 times as fast as compiled here", ratio, met=ratio >= 0.95)
    finish(result, table(points))


def loaded(folder: Path) -> dict[str, ctypes.CDLL]:
    """Return the library compiled here, then those of the distribution that this processor can run, the best one first."""
    with patch.object(prebuilt, "installed", lambda: None):
        compiled = kernels.load(torch.float32)
    if compiled.library is None:
        raise SystemExit(f"there is nothing to compare with: {compiled.detail}")
    found = {"compiled": compiled.library}
    built = libraries(platform.machine())
    for level, needed in prebuilt.LEVELS[platform.machine()].items():
        if needed <= prebuilt.processor():
            file = folder / prebuilt.file_name("float32", level)
            file.write_bytes(built[file.name])
            found[level] = ctypes.CDLL(str(file))
    return found


def measure(
    name: str, steps: int, num_tasks: int, examples: int, images: bool, libraries: dict[str, ctypes.CDLL], repetitions: int
) -> dict[str, Any]:
    """Return the milliseconds of every way, and how many times as fast as the kernels compiled here each is."""
    algorithm = build("reptile", steps, examples, images=images)
    meta, tasks = algorithm.init(), [task(k, examples, images=images) for k in range(num_tasks)]

    def side() -> Any:
        done = run_round(algorithm, meta, [TaskWork(one, generator(0, k)) for k, one in enumerate(tasks)], CHUNK)
        return done.gradient, done.losses

    ways: dict[str, Callable[[], Any]] = {way: partial(using, library, side) for way, library in libraries.items()}
    ways["in torch"] = without_kernels(side)
    seconds = in_turn(ways, repetitions, tolerance=ROUGH if images else TOLERANCE, clock=time.process_time)
    case = f"{name}, {steps} steps, {num_tasks} tasks, {examples} examples"
    ratio = {way: spread(list(np.divide(seconds["compiled"], values))) for way, values in seconds.items()}
    say(f"{case}: " + ", ".join(f"{way} {values['median']:.2f}" for way, values in ratio.items()))
    medians = {way: 1000 * statistics.median(values) for way, values in seconds.items()}
    return {"case": case, "repetitions": repetitions, "milliseconds": medians, "ratio": ratio}


def using(library: ctypes.CDLL, side: Side) -> Any:
    """Return what `side` computes with this library in place of the machine's."""
    train.layout_of.cache_clear()  # the number of lanes is part of it
    with patch.object(train, "library", lambda dtype: library):
        return side()


def table(points: list[dict[str, Any]]) -> str:
    """Return milliseconds a round, and the speed relative to the kernels compiled here, as a Markdown table."""
    ways = list(points[0]["milliseconds"])
    lines = [f"| case | {' | '.join(f'{way}, ms' for way in ways)} | {' | '.join(f'{way}, times' for way in ways[1:])} |"]
    lines.append(f"|---|{'---:|' * (2 * len(ways) - 1)}")
    for point in points:
        told = [f"{point['milliseconds'][way]:.1f}" for way in ways]
        for way in ways[1:]:
            ratio = point["ratio"][way]
            told.append(f"{ratio['median']:.2f} ({ratio['quartile1']:.2f}-{ratio['quartile3']:.2f})")
        lines.append(f"| {point['case']} | {' | '.join(told)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
