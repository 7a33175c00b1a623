"""What a model predicts for the test rows of many tasks during adaptation: as `engine.round.evaluate`, but outputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm
from quickbloom.common.baselines.scoring import Outputs
from quickbloom.common.engine.chunking import AutoChunks, at_once, chunks, pieces, rows_at_once
from quickbloom.common.engine.mapping import over_tasks
from quickbloom.common.engine.round import path_of, stack, stack_params
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.params import Params

Numbers = np.ndarray[Any, Any]


def predict_tests(
    algorithm: Algorithm,
    meta: Params,
    draws: Sequence[TaskData],
    lr: float,
    steps: int,
    chunk_size: int | AutoChunks,
    kept: Sequence[Params] | None = None,
) -> list[Outputs]:
    """Return the outputs for the test part of every draw, before adaptation to its support and after `steps` steps.

    `kept`: the state of every draw's task on its node; None: the tasks are new.
    """
    knows = type(algorithm).deviation is not Algorithm.deviation

    def outputs(theta: Params, own: Params | None, support: Batch, x: Tensor) -> tuple[Tensor, ...]:
        before = None
        for phi in path_of(algorithm, theta, own, support, lr, steps):
            before = algorithm.predict(phi, x) if before is None else before
        deviation = algorithm.deviation(phi, x)
        assert before is not None  # a path has at least its beginning
        return (before, algorithm.predict(phi, x), *([] if deviation is None else [deviation]))

    found = _mapped(outputs, algorithm, meta, draws, chunk_size, kept)
    return [Outputs(parts[0], parts[1], parts[2][:, 0] if knows else None) for parts in found]


def predict_path(
    algorithm: Algorithm,
    meta: Params,
    draws: Sequence[TaskData],
    lrs: Sequence[float],
    steps: int,
    chunk_size: int | AutoChunks,
    kept: Sequence[Params] | None = None,
) -> list[Numbers]:
    """Return the outputs for every draw's test part, with every rate after 0..steps steps: [rates, steps + 1, n, outputs].

    `kept`: the state of every draw's task on its node; None: the tasks are new.
    """
    of_rates = []
    for lr in lrs:

        def outputs(theta: Params, own: Params | None, support: Batch, x: Tensor, lr: float = lr) -> tuple[Tensor, ...]:
            return tuple(algorithm.predict(phi, x) for phi in path_of(algorithm, theta, own, support, lr, steps))

        of_rates.append([np.stack(parts) for parts in _mapped(outputs, algorithm, meta, draws, chunk_size, kept)])
    return [np.stack(of_draw) for of_draw in zip(*of_rates, strict=True)]


def _mapped(
    outputs: Any,
    algorithm: Algorithm,
    meta: Params,
    draws: Sequence[TaskData],
    chunk_size: int | AutoChunks,
    kept: Sequence[Params] | None = None,
) -> list[list[Numbers]]:
    """Return what `outputs` of (meta, kept, support, test inputs) returns for every draw, as float64 and without padding."""
    device = algorithm.learner.device
    found: list[list[Numbers]] = [[] for _ in draws]
    sizes = [(len(draw.support.x), len(draw.test.x)) for draw in draws]
    with torch.no_grad():
        mapped = over_tasks(algorithm.learner, outputs, (None, None if kept is None else 0, 0, 0))
        every = chunks(sizes, at_once(algorithm.learner, chunk_size), exact=algorithm.learner.mixes_examples)
        rows, most = [sum(size) for size in sizes], rows_at_once(draws[0].support.x) if draws else 0
        for positions in (piece for chunk in every for piece in pieces(chunk, rows, most)):
            support = stack([draws[i].support for i in positions], device)
            test = stack([draws[i].test for i in positions], device)
            own = None if kept is None else stack_params([kept[i] for i in positions], device)
            parts = [part.double().cpu().numpy() for part in mapped(meta, own, support, test.x)]
            for place, i in enumerate(positions):
                found[i] = [part[place, : sizes[i][1]] for part in parts]
    return found
