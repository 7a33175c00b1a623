"""What a GPU makes of a node's round: the engine's ways beside a plain loop over the tasks, within six minutes.

Nothing is built: it takes a Python with torch and this project. Every way computes the mean contribution of the same tasks. It
is compared with the loop's first, in double precision, since normalisations of few examples magnify rounding; "bf16", which is
`inner-dtype = bfloat16`, must be finite. "graph" replays a captured round (CUDA graphs), which the engine does not do: it shows
what that would bring. Medians of repetitions that take all ways in turn, each waiting for the device. Compiling takes a minute,
so that one job alone is compiled. A job that does not fit into the rest of the time is left out, and named.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --tasks 2 --repetitions 2     # a try without a GPU, of no use as a measurement
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.models import CASES, Case, built, difference, task
from benchmarks.plain_loops import PLAIN
from benchmarks.runner import commit, finish, goal, machine, say
from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.engine.compiling import mapped
from quickbloom.common.engine.round import TaskWork, run_round, stack
from quickbloom.common.maths.batch import Batch, Episode, Minibatches, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.models.mlp import perceptron
from quickbloom.common.randomness import generator
from quickbloom.server_app.comparing.batch import today

SAME = 1e-6
"""Allowed difference from the loop over the contribution's length, in double precision."""
FACTOR = 20.0
"""How many times as fast as the loop the engine is to be."""
Side = Callable[[], Params]


@dataclass(frozen=True)
class Work:
    """One job: `tasks` at once, with `algorithm` on the model of `case`. `compiled`: also by torch.compile."""

    case: Case
    algorithm: str
    tasks: int
    compiled: bool = False

    @property
    def label(self) -> str:
        return f"{self.case.label}, {self.algorithm}, {self.tasks} tasks"


def main() -> None:
    claim = "on a GPU the engine computes a round of conv4 at least 20 times as fast as a plain loop over the tasks"
    commands = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=claim)
    commands.add_argument("--device", default="cuda", metavar="NAME", help="default: %(default)s")
    commands.add_argument("--tasks", type=int, default=32, metavar="N", help="of conv4; default: %(default)s")
    commands.add_argument("--repetitions", type=int, default=7, metavar="N", help="default: %(default)s")
    commands.add_argument("--budget", type=float, default=330.0, metavar="SECONDS", help="default: %(default)s")
    given = commands.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "`--device` must be a device that torch finds, got cuda without a GPU: choose cpu to try the script out"
        )
    ends = time.monotonic() + given.budget
    sections, left_out = [], []
    for work in jobs(given.tasks):
        if time.monotonic() > ends:
            left_out.append(work.label)
            continue
        sections.append(measured(work, device, given.repetitions, ends))
        say(line(sections[-1]))
    clients = clients_a_second(device, 1000 if device.type == "cuda" else 50, given.repetitions)
    say(f"fedavg on a perceptron: {clients['per_second']:,.0f} clients a second")
    result: dict[str, Any] = {"schema": 1, "benchmark": "gpu", "claim": claim, "device": name_of(device), "sections": sections}
    result |= {"clients": clients, "left_out": left_out, "goals": [], "machine": machine()}
    result |= {"versions": {"torch": torch.__version__}, "commit": commit(), "date": today()}
    if device.type != "cuda":  # a try leaves no result
        return
    for section in sections:
        if section["model"].startswith("conv4"):
            best = max(one["times"] for way, one in section["ways"].items() if way in ("engine", "compiled"))
            goal(result, f"{section['job']}: at least {FACTOR:g} times the loop", best, met=best >= FACTOR)
    finish(result, "\n".join(line(section) for section in sections))


def jobs(tasks: int) -> list[Work]:
    """Return the jobs, the most important first."""
    cases = {case.label: case for case in CASES}
    conv4 = [Work(cases["conv4 64"], name, tasks) for name in ("maml", "protonet")]
    resnet = Work(cases["ResNet-18"], "fomaml", max(1, tasks // 4))
    return [Work(cases["conv4 64"], "fomaml", tasks, compiled=True), *conv4, resnet]


def measured(work: Work, device: torch.device, repetitions: int, ends: float) -> dict[str, Any]:
    """Return how many times as fast as the loop every way is; one that fails is named with its error."""
    ways, failures = {}, {}
    exact = sides(replace(work, tasks=min(2, work.tasks)), device, torch.float64)
    expected = exact["loop"]()
    for way, side in sides(work, device).items():
        try:
            finite = all(bool(value.isfinite().all()) for value in side().values())  # compiles and captures, too
            apart = difference(exact[way](), expected) if way in exact and way != "compiled" else 0.0
        except Exception as error:  # a way that this device or torch does not have
            failures[way] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        if apart > SAME or not finite:
            failures[way] = f"differs from the loop by {apart:.2g} of the contribution's length" if finite else "is not finite"
            continue
        ways[way] = side
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repetitions):
        if seconds["loop"] and time.monotonic() > ends:
            break
        for way, side in ways.items():
            wait(device)
            started = time.perf_counter()
            side()
            wait(device)
            seconds[way].append(time.perf_counter() - started)
    loop = seconds["loop"]
    of_ways = {
        way: {
            "ms": 1e3 * statistics.median(taken),
            "times": statistics.median(one / other for one, other in zip(loop, taken, strict=True)),
        }
        for way, taken in seconds.items()
    }
    facts = {"job": work.label, "model": work.case.label, "algorithm": work.algorithm, "tasks": work.tasks}
    return {**facts, "repetitions": len(loop), "ways": of_ways, "failures": failures}


def sides(work: Work, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Side]:
    """Return every way to compute the mean contribution: the loop first. There is no bfloat16 in double precision."""
    algorithm = built(work.case, work.algorithm, dtype)
    algorithm.learner.to(device)
    meta = {name: value.to(device) for name, value in algorithm.init().items()}
    tasks = [on(device, task(work.case, k, dtype)) for k in range(work.tasks)]

    def loop() -> Params:
        total = {name: torch.zeros_like(value) for name, value in meta.items()}
        for one in tasks:
            for name, value in PLAIN[work.algorithm](algorithm, one).items():
                total[name] += value
        return {name: (value / len(tasks)).cpu() for name, value in total.items()}

    def engine(*, compile: bool = False) -> Params:
        found = run_round(algorithm, meta, drawn(tasks), len(tasks), compile=compile)
        return {name: value.cpu() for name, value in found.gradient.items()}

    def reduced() -> Params:
        algorithm.learner.reduced = torch.bfloat16
        try:
            return engine()
        finally:
            algorithm.learner.reduced = None

    found: dict[str, Side] = {"loop": loop, "engine": engine}
    if dtype == torch.float32:
        found["bf16"] = reduced
    if device.type == "cuda":
        found["graph"] = captured(algorithm, meta, tasks)
    if work.compiled:
        found["compiled"] = lambda: engine(compile=True)
    return found


def captured(algorithm: Algorithm, meta: Params, tasks: list[TaskData]) -> Side:
    """Return a side that captures a round of fixed arrays when it is first called, and replays it."""
    made: list[Side] = []

    def side() -> Params:
        if not made:
            made.append(_capture(algorithm, meta, tasks))
        return made[0]()

    return side


def _capture(algorithm: Algorithm, meta: Params, tasks: list[TaskData]) -> Side:
    device = algorithm.learner.device
    episode = Episode(stack([one.support for one in tasks], device), stack([one.query for one in tasks], device))
    empty = torch.zeros(len(tasks), 0, 0, device=device)
    contribute = mapped(algorithm)

    def once() -> Params:
        gradients, _, _ = contribute(meta, {}, episode, Minibatches(empty.long(), empty))
        return {name: value.mean(dim=0) for name, value in gradients.items()}

    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # what is prepared at the first calls must not be captured
            once()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = once()

    def replay() -> Params:
        graph.replay()
        return {name: value.cpu() for name, value in held.items()}

    return replay


def clients_a_second(device: torch.device, clients: int, repetitions: int) -> dict[str, float]:
    """Return how many clients of `fedavg` a node trains in a second: 64 rows, 15 steps of 32, a perceptron 32-64-64-10."""
    options = ALGORITHMS["fedavg"].Options.model_validate({"inner_lr": 0.05, "inner_steps": 15, "batch_size": 32})
    algorithm = ALGORITHMS["fedavg"](options, Learner(perceptron((32, 64, 64, 10)), "classification", 10))
    algorithm.learner.to(device)
    meta = {name: value.to(device) for name, value in algorithm.init().items()}
    shape = replace(CASES[0], shape=(32,), examples=32)
    tasks = [on(device, task(shape, k, torch.float32)) for k in range(clients)]
    taken = []
    for _ in range(1 + repetitions):
        wait(device)
        started = time.perf_counter()
        run_round(algorithm, meta, drawn(tasks), clients)
        wait(device)
        taken.append(time.perf_counter() - started)
    return {"clients": clients, "per_second": clients / statistics.median(taken[1:])}


def drawn(tasks: list[TaskData]) -> list[TaskWork]:
    return [TaskWork(one, generator(0, k)) for k, one in enumerate(tasks)]


def on(device: torch.device, data: TaskData) -> TaskData:
    """Return a task's examples on the device."""
    return TaskData(*(Batch(*(values.to(device) for values in part)) for part in (data.support, data.query, data.test)))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def line(section: dict[str, Any]) -> str:
    """Return a section in one line."""
    ways = ", ".join(f"{way} {one['ms']:.1f} ms ({one['times']:.1f} times)" for way, one in section["ways"].items())
    failed = "".join(f"; {way}: {why}" for way, why in section["failures"].items())
    return f"{section['job']}: {ways}{failed}"


if __name__ == "__main__":
    main()
