"""Sine waves: few-shot regression of Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning" (2017), section 5.1, generated.

y = A sin(x - phase), with A ~ U[0.1, 5], phase ~ U[0, pi], x ~ U[-5, 5] and no noise. The paper
draws a new wave for every training episode; here a task is a device with a fixed wave, unless
`fresh-tasks` is true.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field

from quickbloom.common.datasets.base import Dataset, DataSpec, TaskInfo, generator
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.options import Options

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, np.pi)
DOMAIN = (-5.0, 5.0)


class SinusoidOptions(Options):
    """Settings of the data set `sinusoid`."""

    clients: int = Field(200, ge=1, le=100_000, description="number of tasks, each with its own wave")
    shots: int = Field(10, ge=1, le=10_000, description="support points per draw")
    query_shots: int = Field(10, ge=1, le=10_000, description="query points per draw")
    test_points: int = Field(100, ge=1, le=10_000, description="points on which a held-out task is scored")
    fresh_tasks: bool = Field(False, description="draw a new wave for every training episode, as in the paper")
    data_seed: int = Field(0, ge=0, description="seed of the waves and of the test draws, apart from the seed of the run")


class Wave(NamedTuple):
    """One task: y = amplitude * sin(x - phase)."""

    amplitude: float
    phase: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Wave":
        return cls(float(rng.uniform(*AMPLITUDE)), float(rng.uniform(*PHASE)))

    def sample(self, count: int, rng: np.random.Generator) -> Batch:
        x = rng.uniform(*DOMAIN, size=(count, 1)).astype(np.float32)
        y = self.amplitude * np.sin(x - self.phase)
        return Batch.of(torch.from_numpy(x), torch.from_numpy(y.astype(np.float32)))


class Sinusoid(Dataset):
    """An endless supply of points from each of `clients` sine waves; x and y have shape [n, 1]."""

    name = "sinusoid"
    Options = SinusoidOptions
    model = "sine"
    inner_lr = 0.01

    def __init__(self, options: SinusoidOptions, data_dir: Path) -> None:
        self._options = options
        self._waves = {
            f"client-{k:03d}": Wave.draw(generator(options.data_seed, "sinusoid", "wave", k)) for k in range(options.clients)
        }

    @classmethod
    def tests_seen(cls, options: SinusoidOptions) -> bool:
        return not options.fresh_tasks  # else training is on other waves than those of the clients

    @property
    def spec(self) -> DataSpec:
        return DataSpec("regression", (1,), 1)

    def tasks(self) -> list[TaskInfo]:
        options = self._options
        return [TaskInfo(name, options.shots, options.query_shots, options.test_points) for name in self._waves]

    def wave(self, task_id: str) -> Wave:
        """Return the true wave of a task, for plots and tests."""
        return self._waves[task_id]

    def train_draw(self, task_id: str, rng: np.random.Generator) -> TaskData:
        wave = self._waves[task_id]
        return self._draw(Wave.draw(rng) if self._options.fresh_tasks else wave, rng)

    def test_draws(self, task_id: str) -> list[TaskData]:
        return [self._draw(self._waves[task_id], generator(self._options.data_seed, "sinusoid", "test", task_id))]

    def _draw(self, wave: Wave, rng: np.random.Generator) -> TaskData:
        counts = (self._options.shots, self._options.query_shots, self._options.test_points)
        support, query, test = (wave.sample(count, rng) for count in counts)
        return TaskData(support, query, test)
