"""Some rounds of training on made-up tasks by the engine and the outer optimizer, for comparison with a plain loop."""

from collections.abc import Sequence

import numpy as np
import torch

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.params import Params
from quickbloom.server_app.federation.outer import OuterOptimizer

ROUNDS = ((0, 1, 2), (0, 2), (1, 2), (0, 1))
"""The tasks of every round, of three in all: some miss a round."""
SIZES = ((6, 5), (4, 8), (9, 3))
"""Support and query examples of the tasks."""


def tasks(kind: str) -> list[TaskData]:
    """Three tasks with 3 inputs and 3 classes or targets; of classes the second task has two, the last of them rarely."""
    source = torch.Generator().manual_seed(3)

    def batch(size: int, task: int) -> Batch:
        x, y = (torch.randn(size, 3, generator=source, dtype=torch.float64) for _ in range(2))
        classes = torch.arange(size) % (3 if task != 1 else 2)
        return Batch.of(x + task / 2, classes if kind == "classification" else y)

    return [TaskData(batch(s, t), batch(q, t), batch(5, t)) for t, (s, q) in enumerate(SIZES)]


def draw(number: int, task: int) -> np.random.Generator:
    return np.random.default_rng([number, task])


def whole(task: TaskData) -> Batch:
    """Support and query as one batch."""
    return Batch(*(torch.cat(parts) for parts in zip(task.support, task.query, strict=True)))


def batches(algorithm: Algorithm, data: Sequence[TaskData], number: int, task: int) -> list[Batch]:
    """The minibatches that a task draws in round `number`."""
    examples = whole(data[task])
    rows = algorithm.minibatch_indices(len(examples.x), draw(number, task))
    assert rows is not None
    return [Batch(*(part[torch.from_numpy(some)] for part in examples)) for some in rows]


def trained(algorithm: Algorithm, data: Sequence[TaskData]) -> tuple[Params, dict[int, Params]]:
    """The meta-parameters after all `ROUNDS`, and what every task then keeps."""
    outer = OuterOptimizer(algorithm.options, algorithm.init(), len(ROUNDS), algorithm.server_state())
    kept: dict[int, Params] = {}
    for number, chosen in enumerate(ROUNDS, 1):
        work = [TaskWork(data[task], draw(number, task), kept.get(task)) for task in chosen]
        result = run_round(algorithm, outer.meta, work, chunk_size=8)
        outer.take_in(algorithm, algorithm.with_zero_head(result.gradient), number, len(chosen) / len(data))
        kept |= dict(zip(chosen, result.kept, strict=True))
    return outer.meta, kept
