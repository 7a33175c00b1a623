"""Handwritten digits by writer: 60 writers, ten digits, each written twice; one task per writer, 10-way 1-shot.

Source: UCI "UJI Pen Characters (Version 2)" (Prat, Castro, Llorens, Marzal, Vilar 2008), rendered
from the pen strokes. Cosine nearest neighbour on pixels: 79.3 % with the writer's own support, 40.8
% with another writer's.

There are only two repetitions, so the test part *is* the query part (repetition 1). Still nothing
is scored that was trained on: training tasks are never scored, and a held-out task learns only from
its support.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from quickbloom.common.datasets.base import DataSpec, FixedSplitDataset, read_npz, require_below
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.options import Options

FILE = "uji_digits_by_writer_28.npz"
WRITERS, WAYS, REPETITIONS, SIDE = 60, 10, 2, 28
ROWS = WRITERS * WAYS * REPETITIONS


class UjiOptions(Options):
    """Settings of the data set `uji`."""

    augment: bool = Field(False, description="warp each training draw by one small random rotation, scale and shift")


class Uji(FixedSplitDataset):
    """60 writers; images [1, 28, 28] with ink 1 on paper 0; one support and one query image per digit."""

    name = "uji"
    needs_files = True
    Options = UjiOptions
    model = "conv4"
    inner_lr = 0.3

    def __init__(self, options: UjiOptions, data_dir: Path) -> None:
        self._augment = options.augment
        images = torch.from_numpy(_read(data_dir / FILE)).float().div_(255).unsqueeze(3)
        digits = torch.arange(WAYS)
        self._data: dict[str, TaskData] = {}
        for writer, (first, second) in enumerate(images):
            query = Batch.of(second, digits)
            self._data[f"writer-{writer:02d}"] = TaskData(Batch.of(first, digits), query, query)

    @classmethod
    def tests_seen(cls, options: Any) -> bool:
        return False  # a writer's two images of a digit are support and query, of which the query is also the test part

    @property
    def spec(self) -> DataSpec:
        return DataSpec("classification", (1, SIDE, SIDE), WAYS)

    def train_draw(self, task_id: str, rng: np.random.Generator) -> TaskData:
        draw = self.redraw(task_id, rng)
        if self._augment:
            draw = _same_hand(draw, rng)
        # Redrawing moves images between support and query; the test part must not share images with the support.
        return replace(draw, test=draw.query)


def _read(path: Path) -> np.ndarray[Any, Any]:
    """Return the images as [writer, repetition, digit, 28, 28]. Raises DataError unless each place is filled exactly once."""
    byte = np.dtype(np.uint8)
    index_arrays = {"writer": WRITERS, "repetition": REPETITIONS, "label": WAYS}
    arrays = read_npz(path, {"images": (byte, (ROWS, SIDE, SIDE)), **dict.fromkeys(index_arrays, (byte, (ROWS,)))})
    for name, limit in index_arrays.items():
        require_below(path, name, arrays[name], limit)
    place = np.ravel_multi_index([arrays[name] for name in index_arrays], tuple(index_arrays.values()))
    counts = np.bincount(place, minlength=ROWS)
    if (counts != 1).any():
        writer, repetition, digit = np.unravel_index(int(np.argmax(counts != 1)), tuple(index_arrays.values()))
        raise DataError(
            f"'{path}' must hold every digit of every writer once per repetition, got {counts[np.argmax(counts != 1)]} "
            f"images of digit {digit} by writer {writer} in repetition {repetition}: fetch the file again"
        )
    ordered = np.empty_like(arrays["images"])
    ordered[place] = arrays["images"]
    return ordered.reshape(WRITERS, REPETITIONS, WAYS, SIDE, SIDE)


def _same_hand(draw: TaskData, rng: np.random.Generator) -> TaskData:
    """Apply one random rotation (15 degrees), scale (10 %) and shift (1.4 pixels) to the whole draw, which is of one writer."""
    angle, scale = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.9, 1.1)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    right, down = rng.uniform(-0.1, 0.1, size=2)
    theta = torch.tensor([[[cos, -sin, right], [sin, cos, down]]], dtype=torch.float32)

    def warp(batch: Batch) -> Batch:
        grid = functional.affine_grid(theta.expand(len(batch.x), -1, -1), list(batch.x.shape), align_corners=False)
        return batch._replace(x=functional.grid_sample(batch.x, grid, align_corners=False))

    return replace(draw, support=warp(draw.support), query=warp(draw.query))
