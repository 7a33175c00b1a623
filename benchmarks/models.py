"""The engine against a plain loop over tasks, for every kind of model and algorithm: never slower than the obvious.

The obvious is what one would write: a copy of the module for every task, autograd, one task after the other. Both sides compute
the mean contribution of the same tasks, which is checked first. "engine" is what a node does; "mapped" and "one by one" are
without kernels: all tasks at once by torch.func.vmap, unless their convolutions are large, and one after the other in place.
Inner steps: 5 on all examples; `protonet` has none. Few-shot tasks have 10 examples to adapt to and 10 to measure on.

Repetitions take all ways in turn in one process with one thread, and ratios of CPU time within a repetition, so that other work
on the machine affects all alike.

    python -m benchmarks.models
    python -m benchmarks.models --only "mlp 64" "conv4 32" --algorithms fomaml maml
"""

import argparse
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_loops import CLASSES, LR, PLAIN, PULL, STEPS
from benchmarks.runner import commit, finish, goal, machine, say
from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.config.run import RunConfig
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.flower import message_assembly
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.kernels.build import library
from quickbloom.common.maths.kernels.compiler import SWITCH
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.models import MODELS, build_model
from quickbloom.common.randomness import generator
from quickbloom.server_app.comparing.batch import today

TOKENS = 80
LEAST, LEAST_FEW_SHOT, TOLERANCE = 0.97, 10.0, 1e-6
Side = Callable[[], Params]


@dataclass(frozen=True)
class Case:
    """A model. `examples`: of support, and as many of query; `few`: whether the goal for few-shot shapes holds."""

    label: str
    model: str
    options: dict[str, Any]
    shape: tuple[int, ...]
    tasks: int
    examples: int = 10
    few: bool = False


IMAGE = (1, 28, 28)
CASES = (
    *(Case(f"mlp {width}", "mlp", {"hidden": f"{width},{width}"}, (32,), 32, few=width <= 256) for width in (16, 64, 256)),
    *(Case(f"mlp {width}", "mlp", {"hidden": f"{width},{width}"}, (32,), 8) for width in (1024, 2048)),
    Case("conv4 32", "conv4", {"filters": 32}, IMAGE, 16, few=True),
    Case("conv4 64", "conv4", {"filters": 64}, IMAGE, 8, few=True),
    Case("resnet", "resnet", {}, IMAGE, 6),
    Case("cnn", "cnn", {}, IMAGE, 8),
    Case("lstm", "lstm", {}, (20,), 16),
    Case("ResNet-18", "resnet18", {}, (3, 32, 32), 3),
    Case("transformer", "encoder", {}, (16,), 3),
)


def main() -> None:
    claim = "a node's round is never slower than a plain loop over its tasks, whatever the model and the algorithm"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=claim)
    parser.add_argument("--repetitions", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="MODEL", default=[case.label for case in CASES], help="default: all")
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", default=list(PLAIN), help="default: all that are here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    message_assembly.keep()  # for all sides, as `quickbloom run` does
    chosen = [case for case in CASES if case.label in given.only]
    cells = [measured(case, name, given.repetitions) for case in chosen for name in given.algorithms]
    text = table(cells)
    if len(cells) < len(CASES) * len(PLAIN) or given.repetitions < 7:
        print(text)
        return
    result: dict[str, Any] = {"schema": 1, "benchmark": "models", "claim": claim, "cells": cells, "goals": []}
    result |= {"machine": machine(), "versions": {"torch": torch.__version__}, "commit": commit(), "date": today()}
    for few, least in ((False, LEAST), (True, LEAST_FEW_SHOT)):
        under = [cell for cell in cells if (cell["few"] or not few) and cell["engine"]["median"] < least]
        worst = min(cell["engine"]["median"] for cell in cells if cell["few"] or not few)
        what = "few-shot shapes of mlp and conv4" if few else "every model and algorithm"
        told = ", ".join(f"{cell['model']} {cell['algorithm']} {cell['engine']['median']:.2f}" for cell in under)
        goal(
            result,
            f"{what}: at least {least:g} times a plain loop{f' (under it: {told})' if told else ''}",
            worst,
            met=not under,
        )
    finish(result, text)


def measured(case: Case, name: str, repetitions: int) -> dict[str, Any]:
    """Return how many times as fast as the plain loop every way is. Raises SystemExit if they do not compute the same."""
    sides = sides_of(case, name, case.tasks)

    def computed(key: str) -> tuple[Params, float]:
        with kernels_off() if key in ("mapped", "one by one") else nullcontext():
            gc.collect()
            before = time.process_time()
            return sides[key](), time.process_time() - before

    # In double precision, since normalisations of few examples magnify rounding.
    expected, *others = (side() for side in sides_of(case, name, 2, torch.float64).values())
    apart = max(difference(other, expected) for other in others)
    if apart > TOLERANCE:
        raise SystemExit(f"{case.label}, {name}: the sides differ by {apart:.2g} of the contribution's length")
    for key in sides:
        computed(key)  # warms up
    seconds: dict[str, list[float]] = {key: [] for key in sides}
    for repetition in range(repetitions):
        for key in list(sides)[:: 1 if repetition % 2 else -1]:
            seconds[key].append(computed(key)[1])
    cell: dict[str, Any] = {"model": case.label, "algorithm": name, "few": case.few, "tasks": case.tasks, "difference": apart}
    cell["plain_ms"] = 1e3 * statistics.median(seconds["plain"]) / case.tasks
    for key in ("engine", "mapped", "one by one"):
        ratios = sorted(one / other for one, other in zip(seconds["plain"], seconds[key], strict=True))
        cell[key] = {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
    say(
        "  ".join(
            [f"{case.label}, {name}:", *(f"{key} {cell[key]['median']:.2f}" for key in ("engine", "mapped", "one by one"))]
        )
    )
    return cell


def sides_of(case: Case, name: str, number: int, dtype: torch.dtype = torch.float32) -> dict[str, Side]:
    """Return every way to compute the mean contribution of so many tasks; the second of them also without kernels."""
    algorithm = built(case, name, dtype)
    meta = algorithm.init()
    tasks = [task(case, k, dtype) for k in range(number)]

    def engine() -> Params:
        work = [TaskWork(one, generator(0, k)) for k, one in enumerate(tasks)]
        return run_round(algorithm, meta, work, RunConfig().chunk_size).gradient

    def one_by_one() -> Params:
        algorithm.learner.maps = False
        try:
            return engine()
        finally:
            algorithm.learner.maps = True

    def plain() -> Params:
        total = {name: torch.zeros_like(value) for name, value in meta.items()}
        for one in tasks:
            for name, value in PLAIN[algorithm.name](algorithm, one).items():
                total[name] += value
        return {name: value / len(tasks) for name, value in total.items()}

    return {"plain": plain, "engine": engine, "mapped": engine, "one by one": one_by_one}


@contextmanager
def kernels_off() -> Iterator[None]:
    """Within this context, compute in torch as on a machine without a compiler."""
    os.environ[SWITCH] = "0"
    library.cache_clear()
    try:
        yield
    finally:
        del os.environ[SWITCH]
        library.cache_clear()
        library(torch.float32)  # loaded again for what comes after


def built(case: Case, name: str, dtype: torch.dtype) -> Algorithm:
    """Return the algorithm on the model of a case."""
    chosen = ALGORITHMS[name]
    values = {"inner_lr": LR, "inner_steps": STEPS, "local_steps": STEPS, "batch_size": 0, "strength": PULL, "temperature": 8.0}
    options = chosen.Options.model_validate({key: value for key, value in values.items() if key in chosen.Options.model_fields})
    outputs = chosen.model_outputs(options, CLASSES)
    if case.model in MODELS:
        kind = MODELS[case.model].Options
        module = build_model(case.model, kind.model_validate(case.options), case.shape, outputs, 0, TOKENS)
    else:
        torch.manual_seed(0)
        module = {"resnet18": resnet18, "encoder": encoder}[case.model](outputs)
    return chosen(options, Learner(module.to(dtype), "classification", CLASSES))


def resnet18(outputs: int) -> nn.Module:
    """Return ResNet-18 with group norm for small images (Hsieh et al. 2020): 11 million numbers."""

    def block(before: int, after: int, stride: int) -> nn.Module:
        return Block(before, after, stride)

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()]
    for before, after, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [block(before, after, stride), block(after, after, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, outputs))


class Block(nn.Module):
    """Two 3x3 convolutions and a skip connection."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, after) for _ in range(2))
        same = before == after and stride == 1
        self.skip: nn.Module = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(inner)) + self.skip(x))


class encoder(nn.Module):  # noqa: N801 - made like the functions beside it
    """A transformer of six layers of width 384 (Vaswani et al. 2017), with attention in plain products: 11 million numbers."""

    def __init__(self, outputs: int, width: int = 384, layers: int = 6) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, width), nn.Parameter(0.02 * torch.randn(512, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        states = self.tokens(x) + self.places[: x.shape[-1]]
        for layer in self.layers:
            states = layer(states)
        return self.head(states.mean(dim=-2))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention of twelve heads, then two layers with four times the width between them; each normalised before and added."""

    def __init__(self, width: int, heads: int = 12) -> None:
        super().__init__()
        self.heads, self.asked, self.given = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        split = self.asked(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).movedim((-3, -2), (0, 2))
        query, key, value = split.unbind()
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        x = x + self.given((weights @ value).movedim(1, 2).flatten(-2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))  # type: ignore[no-any-return]


def task(case: Case, number: int, dtype: torch.dtype) -> TaskData:
    """Return random examples of ten classes."""
    draw = torch.Generator().manual_seed(number)

    def batch() -> Batch:
        size = (case.examples, *case.shape)
        whole = case.model in ("lstm", "encoder")
        x = torch.randint(1, TOKENS, size, generator=draw) if whole else torch.randn(size, generator=draw, dtype=dtype)
        return Batch.of(x, torch.arange(case.examples) % CLASSES)

    support, query = batch(), batch()
    return TaskData(support, query, query)


def difference(one: Params, other: Params) -> float:
    """Return the length of the difference over that of the second."""
    apart = torch.cat([(one[name] - other[name]).flatten() for name in other])
    return float(apart.norm() / torch.cat([value.flatten() for value in other.values()]).norm())


def table(cells: list[dict[str, Any]]) -> str:
    """Return how many times as fast as the plain loop every way is, as a Markdown table."""
    lines = ["| model | algorithm | plain loop, ms a task | engine, times (least to most) | mapped | one by one |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for cell in cells:
        engine = cell["engine"]
        times = f"{engine['median']:.2f} ({engine['least']:.2f}-{engine['most']:.2f})"
        others = f"{cell['mapped']['median']:.2f} | {cell['one by one']['median']:.2f}"
        lines.append(f"| {cell['model']} | {cell['algorithm']} | {cell['plain_ms']:.1f} | {times} | {others} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
