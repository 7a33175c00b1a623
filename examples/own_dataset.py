"""A data set of one's own in one file: half-moons, turned by another angle on every device.

Each task has points on two interleaved half circles and tells the two apart. The whole picture is turned
by an angle of the task's own, so one model for all devices can not fit.

    python examples/own_dataset.py run --dataset moons --algorithm fomaml
"""

from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.base import DataSpec, FixedSplitDataset
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.options import Options
from quickbloom.common.randomness import generator


class MoonsOptions(Options):
    clients: int = Field(60, ge=3, le=10_000, description="number of tasks")
    rows: int = Field(20, ge=4, le=10_000, description="points of each part of a task: support, query and test")
    noise: float = Field(0.1, ge=0, description="standard deviation of the noise on both coordinates")
    data_seed: int = Field(0, ge=0, description="seed of the data, apart from the seed of the run")


class Moons(FixedSplitDataset):
    """Points [n, 2] on two half circles, turned by the task's angle; the class says on which one a point lies."""

    name = "moons"
    Options = MoonsOptions
    model = "mlp"
    inner_lr = 0.1

    def __init__(self, options: MoonsOptions, data_dir: Path) -> None:
        self._data = {f"device-{k:03d}": task(options, k) for k in range(options.clients)}

    @property
    def spec(self) -> DataSpec:
        return DataSpec("classification", input_shape=(2,), outputs=2)


def task(options: MoonsOptions, index: int) -> TaskData:
    """Return the three parts of a task; `index` says which one."""
    rng = generator(options.data_seed, "moons", index)
    angle = rng.uniform(0, 2 * np.pi)
    return TaskData(*(points(options, angle, rng) for _ in ("support", "query", "test")))


def points(options: MoonsOptions, angle: float, rng: np.random.Generator) -> Batch:
    """Return `rows` points of both classes in turn, turned by `angle` (radians)."""
    y = np.arange(options.rows) % 2
    along = rng.uniform(0, np.pi, size=options.rows)
    # The second half circle is the first one upside down, moved so that they interleave.
    x = np.stack([np.cos(along), np.sin(along) - 0.25], axis=1) * np.where(y, -1, 1)[:, None]
    x += (y - 0.5)[:, None] * [1.0, 0.0] + options.noise * rng.standard_normal(x.shape)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return Batch.of(torch.from_numpy((x @ turn.T).astype(np.float32)), torch.from_numpy(y.astype(np.int64)))


DATASETS[Moons.name] = Moons


if __name__ == "__main__":
    from quickbloom.server_app.cli.main import main

    main()
