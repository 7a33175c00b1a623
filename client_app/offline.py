"""Offline use: adapt a checkpoint to one's own file, and predict with the personal model. For Python and the command.

    from quickbloom.client_app.offline import adapt, predict
    (mine,) = adapt("runs/r/checkpoints", "ward.csv", "mine")
    predict("mine", "new-patients.csv").rows

A checkpoint and a personal model describe their own model, classes and columns, so none of these
has to be given again.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors import SafetensorError

from quickbloom.client_app.personal_models import META, path_of
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import left_out_in_words
from quickbloom.common.datasets.own import Own, OwnOptions, task_of_file
from quickbloom.common.datasets.own.columns import Schema, make_inputs, usable
from quickbloom.common.datasets.own.dataset import reading_of
from quickbloom.common.datasets.own.image_arrays import choose_images, require_same_scale
from quickbloom.common.datasets.own.parquet_file import Unusable
from quickbloom.common.datasets.own.preparation import Preparation
from quickbloom.common.datasets.own.remarks import on_doubtful_numbers
from quickbloom.common.datasets.own.tables import PIXELS, Table, read_table
from quickbloom.common.datasets.own.target import UnknownClassError, read_target
from quickbloom.common.datasets.own.text import Array, Text, as_text, names
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError, DataError, in_one_line
from quickbloom.common.formatting import counted
from quickbloom.common.frames import frame, typed
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.params import mismatch
from quickbloom.common.metric import named
from quickbloom.common.personal import checkpoint, facts
from quickbloom.common.personal import model as personal_model
from quickbloom.common.personal import trust as trusted
from quickbloom.common.personal.cross_validation import FOLDS
from quickbloom.common.personal.model import SUFFIX, Origin, Personal
from quickbloom.common.spreadsheets import write_csv

_CHUNK = 1024
_INTERVAL, _HALF_WIDTH = ("lower_90", "upper_90"), 1.6448536
"""Columns of a prediction's interval, which holds 90 % of a normal distribution: so many deviations to each side."""
_ADDED = ("task", "part", "target", "prediction")
"""Columns that predictions have after those of the file, whatever the data; "row" stands before them."""


def adapt(
    checkpoint_path: str | Path,
    data: str | Path,
    output: str | Path,
    task: str = "",
    target: str = "",
    say: Callable[[str], None] = lambda sentence: None,
    trust: Collection[str] = (),
    folds: int = FOLDS,
    time: str = "",
) -> list[Personal]:
    """Adapt a checkpoint to every task of one's own file, write a personal model for each, and return the models.

    `checkpoint_path`: a checkpoint, a run directory, or a node's `state-dir`. `data`: as for
    `quickbloom run --data`; its columns are those of the run unless `task`, `target` and `time` name
    others. `output`: a folder, or a file that ends in .safetensors if the data have one task.
    `say`: called with sentences on unusable tasks and possible mistakes. `trust`: user models, as
    "module:factory", that may be imported if the checkpoint names them.

    A model adapts to all rows of its task that have a target, one of each class being enough. What
    that is worth is estimated by cross-validation in at most `folds` folds (0: not at all), if there
    are at least four different rows; with a column of time each fold is scored by a model of the rows
    before it. A model that adapting makes worse by it stays the shared one.
    Raises DataError or ConfigError.
    """
    if folds < 0 or folds == 1:
        raise ConfigError(f"`--folds` must be 2 or more, or 0 for a model without a score, got {folds}")
    found = _load(Path(checkpoint_path).expanduser(), say)
    what = f"the checkpoint '{found.path}'"
    facts.check(found.facts, facts.CheckpointFacts, what)
    settings = trusted.of_a_model(found.facts["config"], trust, what)
    config, spec = parse_run_config(settings).resolved(), personal_model.spec_of(found.facts)
    if config.dataset != "own":
        raise DataError(
            f"the checkpoint was trained on the data set `{config.dataset}`, and no file fits it: train with --data"
        )
    options = config.table("own").model_copy(update={"path": str(data), "leave_out": ""})
    # As on a device that takes part, a named column must exist.
    named = {"task_column": task, "target_column": target, "time_column": time}
    named["task_name"] = "" if task else task_of_file(str(data))
    given = {key: name for key, name in named.items() if name or (task and key == "task_name")}
    with fits_together(what):
        own = Own(_own_options(options.model_copy(update=given)), Path(), spec.schema, whole=True)
    if own.spec.input_shape != spec.input_shape:
        raise DataError(
            f"the data '{data}' have inputs of shape {own.spec.input_shape}, the checkpoint needs {spec.input_shape}"
        )
    facts.check_size(config, spec, found.tensors, what)
    algorithm = build_algorithm(config, spec)
    if reason := mismatch(found.meta, algorithm.init()):
        raise DataError(f"the checkpoint '{found.path}' does not fit its own settings: {reason}")
    chosen = found.facts.get("adapt") or {"lr": algorithm.options.inner_lr, "steps": config.adapt_steps}
    run, lineage = str(found.facts.get("run", found.path)), str(found.facts.get("lineage", ""))
    origin = Origin(int(found.facts["round"]), lineage, run, float(chosen["lr"]), int(chosen["steps"]))
    if own.left_out:
        say(left_out_in_words(own.left_out))
    for remark in own.remarks:
        say(f"Remark: {remark}")
    models = [
        personal_model.adapt_to_all(algorithm, found.meta, own, info.task_id, config, origin, folds) for info in own.tasks()
    ]
    _write(models, Path(output).expanduser())
    return models


@dataclass(frozen=True)
class Score:
    """Score of a model on `examples` rows of its task. `part`: "test", or "all" if the file is another one.

    A model that adapted to all rows of this very file has the part "cross-validation", and the score of its card.
    `value`: accuracy in 0..1, or the mse in standardised units, as in per_task.csv; `rmse`: its
    root in the unit of the target.
    """

    task: str
    name: str
    value: float
    examples: int
    part: str
    rmse: float | None = None


@dataclass(frozen=True)
class Predictions:
    """Predictions for the rows of a file.

    `rows`: one dictionary for each row that belongs to a model, in the file's order; `scores`: one
    per model with targets. `remarks`: ambiguous readings of the file, and rows that are left out.

    The keys: "row" (counted from 1), the file's own columns, "task", "part" (support, query or test,
    if these are the data that the model was adapted to), "target", "prediction", and for classes
    "probability", that of the predicted class, and "probability_A" for each class A that the model can
    predict; for numbers, of a model that knows how uncertain it is, the ends of the interval "lower_90" and
    "upper_90". Predictions are "" if the model's outputs are not finite. A column of the file that is
    called like another key is "input.NAME" here.
    """

    rows: list[dict[str, Any]]
    scores: list[Score]
    remarks: Sequence[str] = ()

    @cached_property
    def columns(self) -> list[str]:
        """The keys of all rows, in order. Models of other classes have other keys."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    @cached_property
    def table(self) -> Any:
        """The rows as a pandas.DataFrame, or without pandas a NumPy array for each column. What is a number is one there."""
        return frame({name: typed([str(row.get(name) or "") for row in self.rows]) for name in self.columns})

    def without(self) -> list[int]:
        """Return the numbers of the rows without a prediction."""
        return [int(row["row"]) for row in self.rows if not row["prediction"]]

    def write_csv(self, file: TextIO) -> None:
        """Write the rows as CSV with a header."""
        write_csv(file, self.columns or ["row", *_ADDED], self.rows, end="\n")


def predict(model: str | Path, data: str | Path, trust: Collection[str] = ()) -> Predictions:
    """Predict the rows of a file with a personal model, or with the models of a folder, each for the rows of its own task.

    In a file without the task column all rows belong to the task of the only model. If the file
    holds targets, each model is scored: on the test part of the data that it was adapted to, as in
    the server's per_task.csv, or on all rows of other data. `trust`: see `adapt`. Raises DataError
    or ConfigError.
    """
    models = _models(Path(model).expanduser(), trust)
    for one in models:
        if (name := one.card["config"].get("dataset")) != "own":
            raise DataError(f"the personal model of '{one.task}' is for the data set `{name}`, and no file fits it")
    tables: dict[tuple[int, str, tuple[str, ...]], Table] = {}
    cells: dict[tuple[int, str, tuple[str, ...]], dict[str, list[str]]] = {}
    rows: list[dict[str, Any]] = []
    scores: list[Score] = []
    for one in models:
        options, agreed = OwnOptions.model_validate(one.card["columns"]), Schema.from_json(one.card["schema"])
        key = (options.image_side, options.features, tuple(agreed.features))
        with fits_together(f"the personal model of '{one.task}'"):
            if key not in tables:
                tables[key] = read_table(str(data), options.image_side)
                choose_images(tables[key], options.features, agreed.features)
                cells[key] = _cells(tables[key])
            found, score = _predict(one, tables[key], cells[key], alone=len(models) == 1)
        rows += found
        scores += score
    first = next(iter(tables.values()))
    total, column = first.rows, models[0].card["columns"]["task-column"]
    if not rows:
        raise DataError(
            f"the data '{data}' hold no row of the task '{models[0].task}': leave the column `{column}` out to predict all rows"
        )
    remarks = [*first.remarks, *on_doubtful_numbers(first, Schema.from_json(models[0].card["schema"]))]
    if left := total - len(rows):
        remarks.append(
            f"{left} of {counted(total, 'row')} name no task, or one without a model here (`{column}`): they are not predicted"
        )
    return Predictions(sorted(rows, key=lambda row: int(row["row"])), scores, remarks)


@contextmanager
def fits_together(what: str) -> Iterator[None]:
    """Turn errors from contradictory facts of a file into DataError. `what`: "the checkpoint 'a'"."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{what} cannot be used: its facts contradict each other ({in_one_line(error)})") from error


def _cells(table: Table) -> dict[str, list[str]]:
    """Return the cells of a file's own columns as text, without pixels and what cannot be used."""
    found = {"file": list(table.files)} if table.files else {}
    for name, column in table.items():
        if not isinstance(column, Unusable) and column.ndim == 1:
            text = column if isinstance(column, Text) else as_text(column)
            found[name] = [cell or "" for cell in text.cells()]
    return found


def _own_columns(cells: Mapping[str, list[str]], task: str, target: str, classes: Sequence[str]) -> dict[str, str]:
    """Return the names of a file's own columns in the table of predictions, by their names in the file.

    `task` and `target`: the columns that stand there as "task" and "target", and are not repeated if that is their name.
    """
    taken = {"row", *_ADDED, *_INTERVAL, "probability", *map(_probability_of, classes)}
    same = {name for name, meant in (("task", task), ("target", target)) if name == meant}
    found: dict[str, str] = {}
    for name in cells:
        new = name
        while new in taken or (new != name and new in cells):
            new = f"input.{new}"
        if name not in same:
            found[name] = new
    return found


def _probability_of(label: str) -> str:
    return f"probability_{label}"


def _predict(
    model: Personal, table: Table, cells: Mapping[str, list[str]], *, alone: bool
) -> tuple[list[dict[str, Any]], list[Score]]:
    card = model.card
    options = OwnOptions.model_validate({**card["columns"], "path": table.path}).cleaned()
    preparation, schema = Preparation.from_json(card["preparation"]), Schema.from_json(card["schema"])
    rows = _rows_of(model.task, table, options, alone=alone)
    if not len(rows):
        return [], []
    inputs = make_inputs(table, schema, reading_of(options), rows)
    if isinstance(pixels := inputs.get(PIXELS), np.ndarray) and preparation.images:
        require_same_scale(pixels, preparation.brightest, table.path)
    x = torch.from_numpy(preparation.encode(inputs))
    if list(x.shape[1:]) != list(card["spec"][1]):
        raise DataError(
            f"the inputs of '{table.path}' have the shape {tuple(x.shape[1:])}, the model needs {tuple(card['spec'][1])}"
        )
    y, texts = _targets(table, schema, preparation, rows, options)
    parts = _parts(model, options, card)
    outputs = _outputs(model, x, [parts.get(int(row), "") for row in rows])
    said = _in_words(outputs, schema.classes, preparation, model.algorithm.predictable(dict(model.tensors)))
    if (deviations := model.deviations(x)) is not None:
        said = [{**one, **ends} for one, ends in zip(said, _intervals(outputs, deviations, preparation), strict=True)]
    own_names = _own_columns(cells, options.task_column, schema.target, schema.classes)
    listed = [
        {"row": int(row) + 1}
        | {new: cells[name][row] for name, new in own_names.items()}
        | {"task": model.task, "part": parts.get(int(row), ""), "target": texts[i], **said[i]}
        for i, row in enumerate(rows)
    ]
    if parts and card["adapted"].get("whole"):
        return listed, _score_of_card(model)
    tested = np.array([parts.get(int(row)) == "test" for row in rows])
    chosen = ~np.isnan(y) & (tested if parts else True)
    return listed, [_score(model, x, y, chosen, "test" if parts else "all")] if chosen.any() else []


def _score_of_card(model: Personal) -> list[Score]:
    """Return the score by cross-validation, if there is one: on rows that a model adapted to no other says anything."""
    found = model.card["score"]
    if not found["folds"]:
        return []
    value = found[found["kept"]]
    value = math.nan if value is None else float(value)
    return [Score(model.task, found["name"], value, found["test"], "cross-validation", _rmse(model, value))]


def _rmse(model: Personal, value: float) -> float | None:
    target = Preparation.from_json(model.card["preparation"]).target
    return math.sqrt(value) * target.deviation if target and math.isfinite(value) else None


def _outputs(model: Personal, x: torch.Tensor, parts: list[str]) -> torch.Tensor:
    """Return the model's outputs [n, ...], computed in chunks.

    A model that mixes the examples of a batch gets each part separately, as in a run.
    """
    mixes = model.algorithm.mixes_examples
    groups = [np.flatnonzero([part == one for part in parts]) for one in sorted(set(parts))] if mixes else [np.arange(len(x))]
    chunks = [torch.from_numpy(group[at : at + _CHUNK]) for group in groups for at in range(0, len(group), _CHUNK)]
    found = [model.outputs(x[chunk]) for chunk in chunks]
    result = torch.empty(len(x), *found[0].shape[1:])
    for chunk, outputs in zip(chunks, found, strict=True):
        result[chunk] = outputs
    return result


def _score(model: Personal, x: torch.Tensor, y: Array, chosen: Array, part: str) -> Score:
    """Return the score, computed by the same function as in a run so that the numbers agree."""
    metric = named(model.card["score"]["name"])
    classes = metric.kind == "classification"
    labels = torch.from_numpy(y[chosen].astype(np.int64 if classes else np.float32))
    batch = Batch.of(x[torch.from_numpy(chosen)], labels if classes else labels[:, None])
    with torch.no_grad():
        value = float(model.algorithm.score(dict(model.tensors), batch)[1])
    return Score(model.task, metric.name, value, int(chosen.sum()), part, _rmse(model, value))


def _rows_of(task: str, table: Table, options: OwnOptions, *, alone: bool) -> Array:
    """Return the positions of the task's rows; all rows if there is no task column and only one model."""
    if options.task_column not in table:
        if not alone:
            raise DataError(
                f"the data '{table.path}' have no column `{options.task_column}`, which says whose row it is: name the model "
                "of one task"
            )
        return np.arange(table.rows)
    tasks = names(usable(table, options.task_column), reading_of(options).extra_missing)
    return np.flatnonzero(tasks.codes == tasks.values.index(task)) if task in tasks.values else np.array([], dtype=np.int64)


def _targets(
    table: Table, schema: Schema, preparation: Preparation, rows: Array, options: OwnOptions
) -> tuple[Array, list[str]]:
    """Return (class positions or standardised numbers, NaN if unknown; the same as text) of the rows."""
    if schema.target not in table:
        return np.full(len(rows), np.nan), [""] * len(rows)
    try:
        found = read_target(table, schema.target, options, reading_of(options), schema)
    except UnknownClassError as error:
        raise DataError(
            f"the column `{schema.target}` of '{table.path}' holds the class '{error.label}', the model knows "
            f"{', '.join(schema.classes)}: mend it, or leave the column out to predict without scores",
            error.label,
        ) from None
    texts = ["" if text is None else text for text in as_text(usable(table, schema.target)).take(rows).cells()]
    values = found.values[rows]
    return preparation.target.apply(values) if preparation.target else values, texts


def _parts(model: Personal, options: OwnOptions, card: Any) -> dict[int, str]:
    """Return the part of every row if the model was adapted to this file; {} for any other file."""
    try:
        own = Own(options, Path(), card["schema"], whole=bool(card["adapted"].get("whole")))
        if model.task not in own.rows or personal_model.digest(own.test_draws(model.task)[0]) != card["data"]:
            return {}
    except DataError:  # another file, for example one without targets
        return {}
    return own.part_of_rows(model.task)


def _in_words(
    outputs: torch.Tensor, classes: list[str], preparation: Preparation, offered: torch.Tensor | None
) -> list[dict[str, Any]]:
    """Return predictions: a class and probabilities, or a number in the target's unit; "" if outputs are not finite.

    `offered`: which classes the model can predict; None: all.
    """
    finite = outputs.isfinite().all(dim=1)
    if not classes:
        values = outputs[:, 0].double().numpy()
        values = preparation.target.undo(values) if preparation.target else values
        digits = _digits(preparation)
        return [{"prediction": f"{value:.{digits}g}" if known else ""} for value, known in zip(values, finite, strict=True)]
    probabilities = torch.softmax(outputs.double(), dim=1).tolist()
    best = outputs.argmax(dim=1).tolist()  # ties go to the first, as in the score
    kept = [place for place in range(len(classes)) if offered is None or offered[place]]
    nothing = dict.fromkeys(("prediction", "probability", *(_probability_of(classes[place]) for place in kept)), "")
    return [
        {"prediction": classes[label], "probability": f"{shares[label]:.6f}"}
        | {_probability_of(classes[place]): f"{shares[place]:.9g}" for place in kept}
        if known
        else nothing
        for label, shares, known in zip(best, probabilities, finite.tolist(), strict=True)
    ]


def _intervals(outputs: torch.Tensor, deviations: torch.Tensor, preparation: Preparation) -> list[dict[str, str]]:
    """Return the ends of each prediction's central interval, in the target's unit; "" if they are not finite."""
    digits, ends = _digits(preparation), []
    for sign in (-1, 1):
        values = (outputs + sign * _HALF_WIDTH * deviations)[:, 0].double().numpy()
        values = preparation.target.undo(values) if preparation.target else values
        ends.append([f"{value:.{digits}g}" if math.isfinite(value) else "" for value in values])
    return [dict(zip(_INTERVAL, pair, strict=True)) for pair in zip(*ends, strict=True)]


def _digits(preparation: Preparation) -> int:
    """Return the digits of a prediction: more for numbers that are large beside their spread, such as 1,000,000,000.5."""
    target = preparation.target
    ratio = abs(target.mean) / target.deviation if target else 1.0
    return min(17, 9 + math.ceil(math.log10(max(ratio, 1.0))))


def _own_options(options: Any) -> OwnOptions:
    assert isinstance(options, OwnOptions)
    return options


def _load(path: Path, say: Callable[[str], None]) -> checkpoint.Checkpoint:
    return checkpoint.load(path / META if (path / META).is_file() else path, say)


def one_model(path: str | Path, trust: Collection[str] = ()) -> Personal:
    """Return the personal model at `path`, a file or a folder that holds one. Raises DataError or ConfigError."""
    models = _models(Path(path), trust)
    if len(models) > 1:
        raise DataError(f"the folder '{path}' holds {len(models)} personal models: name the file of one")
    return models[0]


def _models(path: Path, trust: Collection[str]) -> list[Personal]:
    if not path.is_dir():
        return [personal_model.load(path, trust)]
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files:
        raise DataError(
            f"the folder '{path}' holds no personal model: name the output of `adapt`, or `personal` of a state-dir"
        )
    return [personal_model.load(file, trust) for file in files]


def _write(models: list[Personal], output: Path) -> None:
    single = output.suffix == SUFFIX
    if single and len(models) > 1:
        names = ", ".join(model.task for model in models[:5])
        raise ConfigError(f"`--output` must be a folder for the {len(models)} tasks {names}, got '{output}'")
    try:
        (output.parent if single else output).mkdir(parents=True, exist_ok=True)
        for model in models:
            personal_model.save(model, output if single else path_of(output, model.task))
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the personal model cannot be written to '{output}' ({in_one_line(error)}): free some space, or choose another "
            "`--output`; an old one stays"
        ) from None
