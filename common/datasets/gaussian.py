"""Shifted Gaussians: the data of Flower's federated meta-learning tutorial, generated.

All clients follow the same rule, so there is nothing to personalise: this is a plumbing test, not a
benchmark. The Bayes-optimal rule reaches 67.3 % on fresh examples; a higher score means that
examples were tested that had been trained on.
"""

from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator

from quickbloom.common.datasets.base import DataSpec, FixedSplitDataset, generator
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.options import Options

FEATURES = 32
CLASSES = 10
SHIFT = 2.0
MIN_ROWS, MAX_ROWS = 50, 149


class GaussianOptions(Options):
    """Settings of the data set `gaussian`."""

    clients: int = Field(30, ge=1, le=100_000, description="number of tasks")
    rows: int = Field(0, ge=0, le=100_000, description="rows of every client; 0: between 50 and 149, drawn for each")
    # 0.02 is one row of the smallest client (50 rows), so that no part is empty.
    support_fraction: float = Field(0.4, ge=0.02, le=0.96, description="share of a client's rows in its support part")
    query_fraction: float = Field(
        0.4, ge=0.02, le=0.96, description="share of a client's rows in its query part; the rest is test"
    )
    data_seed: int = Field(0, ge=0, description="seed of the data, apart from the seed of the run")

    @model_validator(mode="after")
    def _leave_test_rows(self) -> "GaussianOptions":
        total = self.support_fraction + self.query_fraction
        if total > 0.98 + 1e-9:
            raise ValueError(
                f"`support-fraction` + `query-fraction` must be at most 0.98, which leaves test rows, got {total:g}: lower one"
            )
        return self


class Gaussian(FixedSplitDataset):
    """50..149 rows per client (`rows`) of 32 features ~ N(0, 1); the feature of the true class (0..9) gets +2."""

    name = "gaussian"
    Options = GaussianOptions
    model = "mlp"
    inner_lr = 0.1

    def __init__(self, options: GaussianOptions, data_dir: Path) -> None:
        self._data = {f"client-{k:03d}": _client(k, options) for k in range(options.clients)}

    @property
    def spec(self) -> DataSpec:
        return DataSpec("classification", (FEATURES,), CLASSES)


def _client(index: int, options: GaussianOptions) -> TaskData:
    rng = generator(options.data_seed, "gaussian", index)
    rows = int(rng.integers(MIN_ROWS, MAX_ROWS + 1))
    rows = options.rows or rows
    labels = rng.integers(0, CLASSES, size=rows)
    features = rng.standard_normal((rows, FEATURES))
    features[np.arange(rows), labels] += SHIFT
    x, y = torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)
    # Rows are independent draws, so they need no shuffling.
    query_from = int(rows * options.support_fraction)
    test_from = query_from + int(rows * options.query_fraction)
    return TaskData(
        support=Batch.of(x[:query_from], y[:query_from]),
        query=Batch.of(x[query_from:test_from], y[query_from:test_from]),
        test=Batch.of(x[test_from:], y[test_from:]),
    )
