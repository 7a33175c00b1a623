"""Foreign episodes, from files or arrays: a support set and queries of a user whom no training saw.

Arrays `support_x`, `support_y`, `query_x` and `query_y`. `.._y` [n] are the labels, whole numbers or texts, and `.._x` [n, ...]
the inputs; or [episodes, n] and [episodes, n, ...] for many episodes of one size. Inputs are what the model reads, or images
of whole numbers 0 to 255, [n, height, width] or [n, channels, height, width], which are read as the run read its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.errors import ConfigError, DataError, in_one_line

ARRAYS = ("support_x", "support_y", "query_x", "query_y")
"""Names of the arrays."""
MOST = 255
"""Largest whole number in an image."""


@dataclass(frozen=True)
class ForeignEpisode:
    """One episode as it was given. `name`: where it is from, for people; labels are texts."""

    name: str
    support_x: Array
    support_y: list[str]
    query_x: Array
    query_y: list[str]

    @property
    def labels(self) -> list[str]:
        """The labels of the support, each once: by size if all are whole numbers, else by spelling."""
        held = set(self.support_y)
        whole = all(label.removeprefix("-").isdecimal() for label in held)
        return sorted(held, key=(lambda label: (int(label), label)) if whole else None)


def read_episodes(source: Any) -> list[ForeignEpisode]:
    """Return the episodes of `source`: the path of an .npz file, its arrays by name, or a list of these.

    Raises DataError for what is no such file, arrays whose shapes or types do not fit, labels that are absent in the support,
    and numbers that are not finite; ConfigError for any other source.
    """
    if isinstance(source, str | Path):
        return _of_arrays(_read(Path(source).expanduser()), f"'{source}'")
    if isinstance(source, Mapping):
        return _of_arrays(source, "the arrays")
    if not isinstance(source, Sequence) or not source:
        raise ConfigError(
            f"episodes must be the path of an .npz file, its arrays by name, or a list of these, got {type(source).__name__}"
        )
    return [episode for one in source for episode in read_episodes(one)]


def _read(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise DataError(f"the file of episodes '{path}' does not exist")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name in ARRAYS}
    except Exception as error:  # NumPy and zipfile raise a dozen types for other files
        raise DataError(
            f"the file of episodes '{path}' must be an .npz archive with the arrays {', '.join(ARRAYS)}, without objects, and "
            f"cannot be read ({in_one_line(error)})"
        ) from error


def _of_arrays(given: Mapping[str, Any], where: str) -> list[ForeignEpisode]:
    if missing := [name for name in ARRAYS if name not in given]:
        raise DataError(
            f"{where}: the array `{missing[0]}` is missing, expected {', '.join(ARRAYS)}, got "
            f"{', '.join(given) or 'none of these'}"
        )
    arrays = {name: np.asarray(given[name]) for name in ARRAYS}
    many = arrays["support_y"].ndim == 2
    lead = 2 if many else 1
    for part in ("support", "query"):
        x, y = arrays[f"{part}_x"], arrays[f"{part}_y"]
        if y.ndim != lead or x.ndim < lead or x.shape[:lead] != y.shape or not y.size:
            axes = "[episodes, n]" if many else "[n], or [episodes, n] like the support's"
            raise DataError(
                f"{where}: `{part}_y` must have the shape {axes} with n above 0, and `{part}_x` the same first axes, got "
                f"{y.shape} and {x.shape}"
            )
        if x.dtype.kind not in "buif":
            raise DataError(f"{where}: `{part}_x` must hold numbers, got {x.dtype}")
        if y.dtype.kind not in "iuU":
            raise DataError(f"{where}: `{part}_y` must hold labels, whole numbers or texts, got {y.dtype}")
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise DataError(f"{where}: `{part}_x` holds NaN or infinite values: remove them")
    if not many:
        return [_checked(where, *(arrays[name] for name in ARRAYS))]
    if len(arrays["support_y"]) != len(arrays["query_y"]):
        raise DataError(
            f"{where}: support and query must be of equally many episodes, got {len(arrays['support_y'])} and "
            f"{len(arrays['query_y'])}"
        )
    each = zip(*(arrays[name] for name in ARRAYS), strict=True)
    return [_checked(f"{where}, episode {number}", *parts) for number, parts in enumerate(each)]


def _checked(name: str, support_x: Array, support_y: Array, query_x: Array, query_y: Array) -> ForeignEpisode:
    episode = ForeignEpisode(name, support_x, [str(y) for y in support_y], query_x, [str(y) for y in query_y])
    if absent := sorted(set(episode.query_y) - set(episode.support_y)):
        raise DataError(
            f"{name}: every label of `query_y` must be in `support_y`, '{absent[0]}' is not: a class without an example "
            "cannot be recognised",
            absent[0],
        )
    if len(episode.labels) < 2:
        raise DataError(f"{name}: `support_y` must hold two labels or more, got '{episode.labels[0]}' alone")
    return episode


def inputs_of(x: Array, config: RunConfig, spec: DataSpec, where: str) -> Tensor:
    """Return given inputs [n, ...] as the model of a run reads them: float32, or int64 token ids. Raises DataError."""
    shape = tuple(spec.input_shape)
    if len(shape) == 3 and shape[0] == 1 and x.shape[1:] == shape[1:]:
        x = x[:, None]
    if x.shape[1:] != shape:
        raise DataError(f"{where}: an input must have the shape {shape} as in training, got {x.shape[1:]}")
    if spec.tokens:
        if x.dtype.kind not in "iu" or x.min() < 0 or x.max() >= spec.tokens:
            raise DataError(f"{where}: inputs must be token ids, whole numbers from 0 to {spec.tokens - 1}, got {x.dtype}")
        return torch.from_numpy(x.astype(np.int64))
    if x.dtype.kind in "iu" and len(shape) == 3:
        if x.min() < 0 or x.max() > MOST:
            raise DataError(f"{where}: images of whole numbers must hold 0 to {MOST}, got {x.min()} to {x.max()}")
        x = x.astype(np.uint8)
        read = DATASETS[config.dataset].as_read(config.table(config.dataset), x)
        return torch.from_numpy(np.ascontiguousarray(read)).float() / 255
    return torch.from_numpy(x.astype(np.float32))
