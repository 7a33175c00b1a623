"""What a personal model goes by: how much its score falls when a column of the file is shuffled (permutation importance).

Breiman 2001, "Random Forests", Section 10. All inputs of a column are shuffled together, such as those of its categories. The
same shuffles of the shared model's rows say which columns moved the personal model away from it.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quickbloom.client_app.offline.files import fits_together, for_files
from quickbloom.client_app.offline.rows import Rows, Sources, rows_of
from quickbloom.client_app.offline.starting_point import StartingPoint
from quickbloom.common.algorithms import Algorithm
from quickbloom.common.datasets.own.dates import cyclic
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.formatting import counted
from quickbloom.common.frames import as_file
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.params import Params
from quickbloom.common.metric import ACCURACY, RMSE
from quickbloom.common.personal.cross_validation import ends_of_path
from quickbloom.common.personal.model import Personal, no_rows
from quickbloom.common.randomness import generator

REPEATS = 10


@dataclass(frozen=True)
class Importance:
    """Importance of one column of the file: the mean over the shuffles, and their standard deviation (`.._spread`).

    `fall`: how much worse the personal model is when the column is shuffled; `shared`: the same of the shared model;
    `moved`: `fall` less `shared`, each shuffle by itself. In 0..1 for an accuracy, or in the unit of the target. None
    without a checkpoint.
    """

    column: str
    fall: float
    fall_spread: float
    shared: float | None = None
    shared_spread: float | None = None
    moved: float | None = None
    moved_spread: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What the personal model of a task goes by; `columns`: the most important first.

    `metric`: "accuracy", or "rmse" in the unit of the target; `score` and `shared_score`: of the personal and the shared model
    on the `rows` as they are. `adapted_to`: the model adapted to these very rows, and seems more certain than it is.
    """

    task: str
    metric: str
    score: float
    shared_score: float | None
    rows: int
    repeats: int
    adapted_to: bool
    columns: list[Importance]

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, dictionaries and numbers."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield a table for a person."""
        metric = ACCURACY if self.metric == ACCURACY.name else RMSE
        shared = "" if self.shared_score is None else f", {metric.score(self.shared_score)} of the shared model"
        which = " that it was adapted to" if self.adapted_to else ""
        unit = "" if metric is ACCURACY else " (in the unit of the target)"
        yield (
            f"{self.task}: {metric.name} {metric.score(self.score)}{shared}{unit} on {counted(self.rows, 'row')}{which}; worse "
            f"by, when a column is shuffled ({counted(self.repeats, 'time')}, ± standard deviation):"
        )
        head = ["column", self.task, *(["shared model", "moved"] if shared else [])]
        table = [head, *(self._cells(one, metric.score) for one in self.columns)]
        widths = [max(len(row[place]) for row in table) for place in range(len(head))]
        for row in table:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    def _cells(self, one: Importance, score: Any) -> list[str]:
        pairs = [(one.fall, one.fall_spread), (one.shared, one.shared_spread), (one.moved, one.moved_spread)]
        return [one.column, *(score(value, half) for value, half in pairs if value is not None)]


def explain(
    model: str | Path,
    data: Any,
    checkpoint: str | Path | None = None,
    trust: Collection[str] = (),
    repeats: int = REPEATS,
    seed: int = 0,
    encoder: str = "",
) -> list[Explanation]:
    """Return what a personal model, or each of a folder with rows in the data, goes by: permutation importance by column.

    `data`: as for `predict`, with targets: the rows that it would be scored on, or all that the model was adapted to.
    `checkpoint`: the one that the model was adapted from, to say which columns moved it away from the shared model.
    `repeats`: shuffles of each column, 2 or more, drawn from `seed`. `encoder`: see `adapt`. Raises DataError or ConfigError.
    """
    if repeats < 2:
        raise ConfigError(f"`repeats` must be 2 or more, got {repeats}")
    models = for_files(Path(model).expanduser(), trust, encoder)
    start = None if checkpoint is None else StartingPoint.load(checkpoint, trust, lambda sentence: None)
    found = []
    with as_file(data) as path:
        sources = Sources(str(path))
        for one in models:
            shared = None if start is None else _shared(one, start)
            with fits_together(f"the personal model of '{one.task}'"):
                rows = rows_of(one, sources.of(one).table, alone=len(models) == 1)
                if rows is not None and (chosen := _chosen(rows)).sum() > 1:
                    found.append(_explained(rows, chosen, shared, repeats, seed))
    if not found:
        raise DataError(
            f"the data '{path}' hold no two rows of one task with a target (`{models[0].schema.target}`), without which "
            "nothing can be explained: add the column, or predict without `--explain`"
        )
    return found


_Scored = tuple[Algorithm, Params]
"""An algorithm with personal parameters. That of a model from the own rows alone is another than that of the shared model."""


def _shared(model: Personal, start: StartingPoint) -> _Scored:
    """Return the shared model that a personal model was adapted from. Raises DataError for the checkpoint of another."""
    origin, held = model.card["run"], start.found.facts
    if (origin["round"], origin["lineage"]) != (held["round"], held.get("lineage", "")):
        raise DataError(
            f"the checkpoint '{start.found.path}' (round {held['round']}) is not what the personal model of '{model.task}' was "
            f"adapted from (round {origin['round']} of the run '{origin['directory']}'): name that one, or leave "
            "`--checkpoint` out"
        )
    algorithm, meta = start.model_for(model.classes)
    return algorithm, ends_of_path(algorithm, meta, None, no_rows(model), 0.0, 0)[0]


def _chosen(rows: Rows) -> Array:
    """Return which rows to explain by, bool [n]: those with a target; of a model with a test part of its own that part."""
    known: Array = ~np.isnan(rows.y)
    if rows.parts and not rows.model.card["adapted"].get("whole"):
        known &= np.array([part == "test" for part in rows.part_of_each])
    return known


def _explained(rows: Rows, chosen: Array, shared: _Scored | None, repeats: int, seed: int) -> Explanation:
    model, batch = rows.model, rows.labelled(chosen)
    if model.preparation.images:
        raise DataError(f"the inputs of '{rows.table.path}' are images, which have no columns: predict without `--explain`")
    if shared is not None:  # normalised by the user's rows, as the personal model is
        shared = shared[0], shared[0].settled(shared[1], batch)
    both = [(model.algorithm, dict(model.tensors))] + ([] if shared is None else [shared])
    as_it_is = np.array([_score(model, one, batch) for one in both])
    sign = 1 if model.classes else -1
    found = []
    for column, places in _places(rows).items():
        shuffled = [_shuffled(batch, places, generator(seed, "explain", model.task, column, time)) for time in range(repeats)]
        falls = sign * (as_it_is - [[_score(model, one, other) for one in both] for other in shuffled])
        series = [falls[:, 0]] + ([] if shared is None else [falls[:, 1], falls[:, 0] - falls[:, 1]])
        found.append(Importance(column, *(float(value) for each in series for value in (each.mean(), each.std(ddof=1)))))
    metric, least = (ACCURACY if model.classes else RMSE).name, lambda one: -one.fall if math.isfinite(one.fall) else math.inf
    of_shared = None if shared is None else float(as_it_is[1])
    known = bool(rows.parts) and bool(model.card["adapted"].get("whole"))
    return Explanation(
        model.task, metric, float(as_it_is[0]), of_shared, int(chosen.sum()), repeats, known, sorted(found, key=least)
    )


def _places(rows: Rows) -> dict[str, Array]:
    """Return which inputs each column of the file became: its categories, and the sines of a date, are one column."""
    schema = rows.model.schema
    origin = {part: name for name in schema.cyclic for part in cyclic(name, schema.features[name], np.zeros(0))}
    found: dict[str, list[int]] = {}
    at = 0
    for name in rows.model.preparation.features:
        column = rows.inputs[name]
        width = 1 if isinstance(column, np.ndarray) else column.size
        found.setdefault(origin.get(name, name), []).extend(range(at, at + width))
        at += width
    return {name: np.array(places) for name, places in found.items()}


def _shuffled(batch: Batch, places: Array, draw: np.random.Generator) -> Batch:
    x = batch.x.clone()
    x[:, places] = batch.x[torch.from_numpy(draw.permutation(len(x)))][:, places]
    return Batch(x, batch.y, batch.weight)


def _score(model: Personal, scored: _Scored, batch: Batch) -> float:
    """Return the accuracy, or the rmse in the unit of the target of `model`."""
    algorithm, tensors = scored
    with torch.no_grad():
        value = float(algorithm.score(tensors, batch)[1])
    target = model.preparation.target
    return math.sqrt(value) * target.deviation if target else value
