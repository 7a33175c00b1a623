"""Prediction of a file's rows with personal models."""

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quickbloom.client_app.offline.files import fits_together, for_files
from quickbloom.client_app.offline.predictions import Predictions, Score, in_words, intervals, own_columns
from quickbloom.client_app.offline.rows import Rows, Source, Sources, rows_of
from quickbloom.common.datasets.own.remarks import on_doubtful_numbers
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.errors import DataError
from quickbloom.common.formatting import counted
from quickbloom.common.frames import as_file
from quickbloom.common.metric import named
from quickbloom.common.personal.drift import outside
from quickbloom.common.personal.model import Personal

_CHUNK = 1024


def predict(model: str | Path, data: Any, trust: Collection[str] = (), encoder: str = "") -> Predictions:
    """Predict the rows of a file with a personal model, or with the models of a folder, each for the rows of its own task.

    `data`: a file, a pandas or polars DataFrame, or arrays by column. In data without the task
    column all rows belong to the task of the only model. If they hold targets, each model is
    scored: on the test part of the data that it was adapted to, as in the server's per_task.csv,
    or on all rows of other data. `trust`, `encoder`: see `adapt`. Raises DataError or ConfigError.
    """
    models = for_files(Path(model).expanduser(), trust, encoder)
    with as_file(data) as path:
        found = _predict_all(models, Sources(str(path)))
    return replace(found, index=data.index) if hasattr(data, "to_csv") else found


def _predict_all(models: list[Personal], sources: Sources) -> Predictions:
    rows: list[dict[str, Any]] = []
    scores: list[Score] = []
    drifted: list[str] = []
    mixing: list[str] = []
    for one in models:
        with fits_together(f"the personal model of '{one.task}'"):
            source = sources.of(one)
            if found := rows_of(one, source.table, alone=len(models) == 1):
                rows += _listed(found, source)
                scores += _scores(found)
                drifted += _outside(found)
                mixing += _on_mixing(one)
    table, column = sources.first.table, models[0].card["columns"]["task-column"]
    if not rows:
        raise DataError(
            f"the data '{table.path}' hold no row of the task '{models[0].task}': leave the column `{column}` out to predict "
            "all rows"
        )
    remarks = [*table.remarks, *on_doubtful_numbers(table, models[0].schema), *drifted, *mixing]
    if left := table.rows - len(rows):
        remarks.append(
            f"{left} of {counted(table.rows, 'row')} name no task, or one without a model here (`{column}`): they are not "
            "predicted"
        )
    return Predictions(sorted(rows, key=lambda row: int(row["row"])), scores, remarks)


def _on_mixing(model: Personal) -> list[str]:
    """Return a remark on a model whose prediction for a row depends on which rows are predicted beside it."""
    if not model.mixes:
        return []
    if model.algorithm.learner.has_statistics(dict(model.tensors)):
        return [f"the model of {model.task} moves by the rows that are predicted together (`{model.algorithm.name}.refine`)"]
    asked = model.algorithm.learner.transductive
    why = "as its run asked (`transductive`)" if asked else "since an earlier version made it: adapt it anew"
    return [f"the model of {model.task} normalises rows by those that are predicted together, {why}"]


def _outside(rows: Rows) -> list[str]:
    """Return a remark on rows outside what the model adapted to, if that is more than a few in some column."""
    model = rows.model
    shown = model.card.get("seen") or {}
    found = outside(shown, model.preparation, model.schema, rows.table, model.own_options, rows.at, rows.inputs)
    if not found:
        return []
    number = int(np.any(list(found.values()), axis=0).sum())
    columns = ", ".join(
        f"`{name}` in {int(which.sum())}" for name, which in sorted(found.items(), key=lambda one: -one[1].sum())
    )
    return [
        f"{number} of {counted(len(rows.at), 'row')} of {model.task} lie outside what its model adapted to ({columns}): "
        "numbers beyond its range by more than a deviation, or categories that it has not seen, so its score does not hold for "
        "them"
    ]


def _listed(rows: Rows, source: Source) -> list[dict[str, Any]]:
    """Return the rows with their predictions, as in `Predictions.rows`."""
    model, preparation = rows.model, rows.model.preparation
    outputs = _outputs(rows)
    offered = model.algorithm.predictable(dict(model.tensors))
    said = in_words(outputs, model.classes, preparation, offered, model.temperature)
    if (deviations := model.deviations(rows.x)) is not None:
        said = [{**one, **ends} for one, ends in zip(said, intervals(outputs, deviations, preparation), strict=True)]
    options = model.own_options
    own_names = own_columns(source.cells, options.task_column, model.schema.target, model.classes)
    return [
        {"row": int(row) + 1}
        | {new: source.cells[name][row] for name, new in own_names.items()}
        | {"task": model.task, "part": part, "target": rows.texts[i], **said[i]}
        for i, (row, part) in enumerate(zip(rows.at, rows.part_of_each, strict=True))
    ]


def _outputs(rows: Rows) -> torch.Tensor:
    """Return the model's outputs [n, ...], computed in chunks.

    A model that mixes the examples of a batch gets each part separately, as in a run.
    """
    x, parts = rows.x, rows.part_of_each
    mixes = rows.model.mixes
    groups = [np.flatnonzero([part == one for part in parts]) for one in sorted(set(parts))] if mixes else [np.arange(len(x))]
    chunks = [torch.from_numpy(group[at : at + _CHUNK]) for group in groups for at in range(0, len(group), _CHUNK)]
    found = [rows.model.outputs(x[chunk]) for chunk in chunks]
    result = torch.empty(len(x), *found[0].shape[1:])
    for chunk, outputs in zip(chunks, found, strict=True):
        result[chunk] = outputs
    return result


def _scores(rows: Rows) -> list[Score]:
    """Return the score of the model on those of its rows that may tell something, if there are any."""
    if rows.parts and rows.model.card["adapted"].get("whole"):
        return _score_of_card(rows.model)
    tested = np.array([part == "test" for part in rows.part_of_each])
    chosen = ~np.isnan(rows.y) & (tested if rows.parts else True)
    return [_score(rows, chosen, "test" if rows.parts else "all")] if chosen.any() else []


def _score_of_card(model: Personal) -> list[Score]:
    """Return the score by cross-validation, if there is one: on rows that a model adapted to no other says anything."""
    found = model.card["score"]
    if not found["folds"]:
        return []
    value = found[found["kept"]]
    value = math.nan if value is None else float(value)
    return [Score(model.task, found["name"], value, found["test"], "cross-validation", _rmse(model, value))]


def _score(rows: Rows, chosen: Array, part: str) -> Score:
    """Return the score, computed by the same function as in a run so that the numbers agree."""
    model = rows.model
    metric = named(model.card["score"]["name"])
    with torch.no_grad():
        value = float(model.algorithm.score(dict(model.tensors), rows.labelled(chosen))[1])
    return Score(model.task, metric.name, value, int(chosen.sum()), part, _rmse(model, value))


def _rmse(model: Personal, value: float) -> float | None:
    target = model.preparation.target
    return math.sqrt(value) * target.deviation if target and math.isfinite(value) else None
