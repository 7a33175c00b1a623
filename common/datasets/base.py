"""Base class of the data sets: a list of tasks, and for each task a way to draw support, query and test examples.

A data set knows no algorithm and no model. A new one is a file with a subclass of `Dataset`, and
one line in `DATASETS`: docs/own-dataset.md.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from quickbloom.common.errors import DataError, as_told
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.metric import Metric, of_kind
from quickbloom.common.options import Options
from quickbloom.common.randomness import generator

Kind = Literal["classification", "regression"]
SPLITS = ("train", "validation", "test")
_MOST_NAMED = 5
"""Most tasks to name per reason, and most reasons."""


@dataclass(frozen=True)
class TaskInfo:
    """A node's description of one task for the server: counts, never an example.

    `group`: tasks of one group always land in the same split (two drawers of one alphabet, say); by
    default each task is its own group. `split`: one of `SPLITS` as published by the data set's
    authors, or "" to let the server choose by seed.
    """

    task_id: str
    num_support: int
    num_query: int
    num_test: int
    group: str = ""
    split: str = ""


@dataclass(frozen=True)
class DataSpec:
    """Form of a data set's examples. `outputs`: number of classes, or of regression targets.

    `tokens`: number of token ids if the inputs are int64 ids 0..tokens-1; 0: the inputs are numbers.
    `schema`: JSON of everything else that all nodes must agree on, such as columns and class labels;
    "": nothing.
    """

    kind: Kind
    input_shape: tuple[int, ...]
    outputs: int
    tokens: int = 0
    schema: str = ""

    @property
    def metric(self) -> Metric:
        """What is measured on such data."""
        return of_kind(self.kind)


def left_out_in_words(left_out: Mapping[str, str]) -> str:
    """Return one sentence on unusable tasks, by reason: "3 tasks are left out: A and B (too few rows); C (..)"."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in sorted(left_out.items()):
        by_reason.setdefault(reason, []).append(name)
    told = [f"{_listed(names)} ({as_told(reason)})" for reason, names in list(by_reason.items())[:_MOST_NAMED]]
    rest = sum(len(names) for names in list(by_reason.values())[_MOST_NAMED:])
    count = "1 task is" if len(left_out) == 1 else f"{len(left_out)} tasks are"
    return f"{count} left out: {'; '.join(told)}" + (f" and {rest} more" if rest else "")


def _listed(names: list[str]) -> str:
    shown = [as_told(name, 60) for name in names[:_MOST_NAMED]]
    if len(names) > _MOST_NAMED:
        return f"{', '.join(shown)} and {len(names) - _MOST_NAMED} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


class Dataset(ABC):
    """One family of tasks. Construction reads and checks the data; drawing from a task is then pure and cheap."""

    name: ClassVar[str]
    Options: ClassVar[type[Options]]
    model: ClassVar[str]
    """Model for `model = "auto"`; "auto" here means conv4 for images, else mlp."""
    algorithm: ClassVar[str] = "reptile"
    """Algorithm where none is named."""
    inner_lr: ClassVar[float]
    """Inner learning rate for `inner-lr = 0`: a step size that suits the scale of the inputs and of the loss."""
    needs_files: ClassVar[bool] = False
    """True if the data set reads files from QUICKBLOOM_DATA_DIR."""
    partition: ClassVar[str] = ""
    """How its one table is spread over simulated users where the run does not say; "": it has users of its own."""
    users: ClassVar[int] = 0
    """How many users these are."""
    left_out: Mapping[str, str] = MappingProxyType({})
    """Unusable tasks by name, each with the reason."""
    remarks: Sequence[str] = ()
    """Possible mistakes in the data, one sentence each."""

    @abstractmethod
    def __init__(self, options: Any, data_dir: Path) -> None:
        """Read the files from `data_dir`. Raises DataError with a sentence for the user."""

    @property
    @abstractmethod
    def spec(self) -> DataSpec:
        """The form that all tasks share."""

    @abstractmethod
    def tasks(self) -> list[TaskInfo]:
        """Return all tasks in a fixed order. A node hosts positions partition-id, partition-id + num-partitions, ..."""

    @abstractmethod
    def train_draw(self, task_id: str, rng: np.random.Generator) -> TaskData:
        """Return the episode of a training task in one round. `rng` derives from (seed, round, task)."""

    @abstractmethod
    def test_draws(self, task_id: str) -> list[TaskData]:
        """Return the draws on which a held-out task is scored, equal in every run whatever its seed."""

    @classmethod
    def tests_seen(cls, options: Any) -> bool:
        """Return whether a training task has test examples of its own, which no draw of it in training can hold."""
        return False

    def seen_draw(self, task_id: str) -> TaskData:
        """Return a training task as a seen user: `support` holds what it trains on, and `test` its own test part.

        Only where `tests_seen`. The query part is empty.
        """
        (draw,) = self.test_draws(task_id)
        return all_to_support(draw)

    def preparation(self, task_id: str) -> Mapping[str, Any]:
        """Return as JSON how raw examples of this task become inputs, for its personal model; {} if they are inputs already."""
        return {}

    @classmethod
    def as_read(cls, options: Any, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return foreign images, u8 [n, channels, height, width], changed as the data set changes its own; by itself not."""
        return images


class FixedSplitDataset(Dataset):
    """A data set whose tasks have a fixed support / query / test split (a real user's own examples).

    In training, support and query are redrawn in every round from their union, with the same number
    of examples of each class (`resample`). The test part never changes.
    """

    resample: bool = True
    _data: dict[str, TaskData]

    @classmethod
    def tests_seen(cls, options: Any) -> bool:
        return True

    def tasks(self) -> list[TaskInfo]:
        return list(self._infos)

    def train_draw(self, task_id: str, rng: np.random.Generator) -> TaskData:
        return self.redraw(task_id, rng) if self.resample else self._data[task_id]

    def test_draws(self, task_id: str) -> list[TaskData]:
        return [self._data[task_id]]

    def redraw(self, task_id: str, rng: np.random.Generator) -> TaskData:
        """Return a task with support and query redrawn from their union."""
        return self.pool(task_id).draw(rng)

    def pool(self, task_id: str) -> "Pool":
        """Return the examples of a task of which support and query are drawn."""
        if task_id not in self._pools:
            pool = self._pools[task_id] = Pool.of(self._data[task_id])
            self._data[task_id] = pool.data  # so that no example is in memory twice
        return self._pools[task_id]

    @cached_property
    def _infos(self) -> list[TaskInfo]:
        return [TaskInfo(name, len(data.support.x), len(data.query.x), len(data.test.x)) for name, data in self._data.items()]

    @cached_property
    def _pools(self) -> "dict[str, Pool]":
        return {}


def all_to_support(draw: TaskData) -> TaskData:
    """Return the draw with its query examples behind those of the support, and none in the query part."""
    support = Batch(*(torch.cat(parts) for parts in zip(draw.support, draw.query, strict=True)))
    return TaskData(support, Batch(*(values[:0] for values in draw.query)), draw.test)


@dataclass(frozen=True)
class Pool:
    """A task whose support and query are redrawn from their union, with fixed numbers of examples per class in both.

    Everything that is the same for all draws is computed once, since a round may draw thousands of
    tasks.
    """

    data: TaskData
    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]
    """The union, of which the support and query of `data` are views. Arrays, because tensors take twice the time."""
    by_class: np.ndarray[Any, Any]
    """Positions in the union, class by class."""
    classes: np.ndarray[Any, Any]
    """The classes at these positions, ascending."""
    in_support: np.ndarray[Any, Any]
    """True for the positions that go to the support, once the members of every class are shuffled."""

    @classmethod
    def of(cls, data: TaskData) -> "Pool":
        union = Batch(*(torch.cat([support, query]) for support, query in zip(data.support, data.query, strict=True)))
        n = len(data.support.x)
        y = union.y.numpy() if union.y.dtype == torch.int64 else np.zeros(len(union.y), dtype=np.int64)
        sizes, kept = np.bincount(y), np.bincount(y[:n], minlength=y.max(initial=0) + 1)
        rank = np.arange(len(y)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        by_class = y.argsort(kind="stable")
        views = TaskData(Batch(*(part[:n] for part in union)), Batch(*(part[n:] for part in union)), data.test)
        return cls(views, union.x.numpy(), union.y.numpy(), by_class, y[by_class], rank < np.repeat(kept, sizes))

    def draw(self, rng: np.random.Generator) -> TaskData:
        """Return a new draw: the support gets the first members of every class in random order.

        Each part keeps the order of the union.
        """
        # Adding a number in [0, 1) shuffles within each class and keeps the classes apart.
        shuffled = (self.classes + rng.random(len(self.classes))[self.by_class]).argsort()
        chosen = np.zeros(len(shuffled), dtype=bool)
        chosen[self.by_class[shuffled]] = self.in_support
        support, query = self.data.support, self.data.query
        rows, n = np.concatenate([chosen.nonzero()[0], (~chosen).nonzero()[0]]), support.x.shape[0]
        x, y = self.x.take(rows, axis=0), self.y.take(rows, axis=0)
        # All examples of a task are real, so their weights are equal in any order.
        return TaskData(
            Batch(torch.from_numpy(x[:n]), torch.from_numpy(y[:n]), support.weight),
            Batch(torch.from_numpy(x[n:]), torch.from_numpy(y[n:]), query.weight),
            self.data.test,
        )


def resolve_data_dir(setting: str) -> Path:
    """Return the folder of data files: `data-dir`, else QUICKBLOOM_DATA_DIR, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quickbloom"
    return Path(setting or os.environ.get("QUICKBLOOM_DATA_DIR") or cache).expanduser()


def require_file(path: Path) -> None:
    """Raise DataError, with ways to mend it, unless the data file `path` exists."""
    if not path.is_file():
        raise DataError(
            f"the data file '{path}' does not exist: put it there, or point `data-dir` or the environment variable "
            "QUICKBLOOM_DATA_DIR at the folder that holds it"
        )


def read_npz(path: Path, expected: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the named arrays of an `.npz` after checking dtype and shape; -1 in a shape allows any size.

    Nothing is unpickled. Raises DataError for a missing, empty, damaged or different file.
    """
    require_file(path)
    try:
        # Opened here, because np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = sorted(set(expected) - set(archive.files))
            if missing:
                raise DataError(f"the data file '{path}' lacks the array `{missing[0]}`: it holds {sorted(archive.files)}")
            arrays = {name: archive[name] for name in expected}
    except DataError:
        raise
    except Exception as error:  # NumPy and zipfile raise a dozen types for damaged archives
        raise DataError(f"the data file '{path}' is not a readable .npz archive ({error}): fetch it again") from error
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if array.dtype != dtype:
            raise DataError(f"array `{name}` in '{path}' must have dtype {dtype}, got {array.dtype}")
        if array.ndim != len(shape) or any(want not in (-1, have) for want, have in zip(shape, array.shape, strict=True)):
            raise DataError(f"array `{name}` in '{path}' must have shape {shape} (-1: any), got {array.shape}")
        if np.issubdtype(dtype, np.floating) and not np.isfinite(array).all():
            raise DataError(f"array `{name}` in '{path}' holds NaN or infinite values: remove them")
    return arrays


def require_below(path: Path, name: str, array: np.ndarray[Any, Any], limit: int) -> None:
    """Raise DataError unless all values of the array `name`, read from `path`, are in 0..limit-1."""
    wrong = array[(array < 0) | (array >= limit)]
    if wrong.size:
        raise DataError(f"array `{name}` in '{path}' must hold values 0..{limit - 1}, got {wrong[0]}: fetch the file again")


__all__ = [
    "SPLITS",
    "DataSpec",
    "Dataset",
    "FixedSplitDataset",
    "Kind",
    "Pool",
    "TaskInfo",
    "all_to_support",
    "generator",
    "read_npz",
    "require_below",
    "require_file",
    "resolve_data_dir",
]
