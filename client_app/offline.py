"""Offline use: adapt a checkpoint to one's own file, and predict with the personal model. For Python and the command.

    from quickbloom.client_app.offline import adapt, predict
    (mine,) = adapt("runs/r/checkpoints", "ward.csv", "mine")
    predict("mine", "new-patients.csv").rows

A checkpoint and a personal model describe their own model, classes and columns, so none of these
has to be given again.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from quickbloom.common.datasets.own.preparation import Preparation
from quickbloom.common.datasets.own.remarks import on_doubtful_numbers
from quickbloom.common.datasets.own.tables import PIXELS, Table, read_table
from quickbloom.common.datasets.own.target import UnknownClassError, read_target
from quickbloom.common.datasets.own.text import Array, as_text, names
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError, DataError, in_one_line
from quickbloom.common.formatting import counted
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.params import mismatch
from quickbloom.common.metric import named
from quickbloom.common.personal import checkpoint, facts
from quickbloom.common.personal import model as personal_model
from quickbloom.common.personal import trust as trusted
from quickbloom.common.personal.model import SUFFIX, Origin, Personal
from quickbloom.common.spreadsheets import write_csv

_CHUNK = 1024


def adapt(
    checkpoint_path: str | Path,
    data: str | Path,
    output: str | Path,
    task: str = "",
    target: str = "",
    say: Callable[[str], None] = lambda sentence: None,
    trust: Collection[str] = (),
) -> list[Personal]:
    """Adapt a checkpoint to every task of one's own file, write a personal model for each, and return the models.

    `checkpoint_path`: a checkpoint, a run directory, or a node's `state-dir`. `data`: as for
    `quickbloom run --data`; its columns are those of the run unless `task` and `target` name
    others. `output`: a folder, or a file that ends in .safetensors if the data have one task.
    `say`: called with sentences on unusable tasks and possible mistakes. `trust`: user models, as
    "module:factory", that may be imported if the checkpoint names them.

    Each task is cut into support, query and test part as in a run. It adapts on the support part
    alone and is scored on the test part. Raises DataError or ConfigError.
    """
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
    named = {"task_column": task, "target_column": target, "task_name": "" if task else task_of_file(str(data))}
    given = {key: name for key, name in named.items() if name or (task and key == "task_name")}
    with fits_together(what):
        own = Own(_own_options(options.model_copy(update=given)), Path(), spec.schema)
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
        personal_model.adapt(algorithm, found.meta, algorithm.fresh(), own, info.task_id, config, origin)
        for info in own.tasks()
    ]
    _write(models, Path(output).expanduser())
    return models


@dataclass(frozen=True)
class Score:
    """Score of a model on `examples` rows of its task. `part`: "test", or "all" if the file is another one.

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

    The keys: "row" (counted from 1), "task", "part" (support, query or test, if these are the data
    that the model was adapted to), "target", "prediction", and "probability" of the predicted
    class. The last two are "" if the model's outputs are not finite.
    """

    rows: list[dict[str, Any]]
    scores: list[Score]
    remarks: Sequence[str] = ()

    def without(self) -> list[int]:
        """Return the numbers of the rows without a prediction."""
        return [int(row["row"]) for row in self.rows if not row["prediction"]]

    def write_csv(self, file: TextIO) -> None:
        """Write the rows as CSV with a header."""
        columns = list(self.rows[0]) if self.rows else ["row", "task", "part", "target", "prediction"]
        write_csv(file, columns, self.rows, end="\n")


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
    rows: list[dict[str, Any]] = []
    scores: list[Score] = []
    for one in models:
        options, agreed = OwnOptions.model_validate(one.card["columns"]), Schema.from_json(one.card["schema"])
        key = (options.image_side, options.features, tuple(agreed.features))
        with fits_together(f"the personal model of '{one.task}'"):
            if key not in tables:
                tables[key] = read_table(str(data), options.image_side)
                choose_images(tables[key], options.features, agreed.features)
            found, score = _predict(one, tables[key], alone=len(models) == 1)
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


def _predict(model: Personal, table: Table, *, alone: bool) -> tuple[list[dict[str, Any]], list[Score]]:
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
    said = _in_words(outputs, schema.classes, preparation)
    listed = [
        {"row": int(row) + 1, "task": model.task, "part": parts.get(int(row), ""), "target": texts[i], **said[i]}
        for i, row in enumerate(rows)
    ]
    tested = np.array([parts.get(int(row)) == "test" for row in rows])
    chosen = ~np.isnan(y) & (tested if parts else True)
    return listed, [_score(model, x, y, chosen, "test" if parts else "all")] if chosen.any() else []


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
    target = Preparation.from_json(model.card["preparation"]).target
    rmse = math.sqrt(value) * target.deviation if target and math.isfinite(value) else None
    return Score(model.task, metric.name, value, int(chosen.sum()), part, rmse)


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
        own = Own(options, Path(), card["schema"])
        if model.task not in own.rows or personal_model.digest(own.test_draws(model.task)[0]) != card["data"]:
            return {}
    except DataError:  # another file, for example one without targets
        return {}
    return own.part_of_rows(model.task)


def _in_words(outputs: torch.Tensor, classes: list[str], preparation: Preparation) -> list[dict[str, Any]]:
    """Return predictions: a class and its probability, or a number in the target's unit; "" if outputs are not finite."""
    finite = outputs.isfinite().all(dim=1)
    if not classes:
        values = outputs[:, 0].double().numpy()
        values = preparation.target.undo(values) if preparation.target else values
        digits = _digits(preparation)
        return [{"prediction": f"{value:.{digits}g}" if known else ""} for value, known in zip(values, finite, strict=True)]
    probabilities = torch.softmax(outputs.double(), dim=1)
    best = outputs.argmax(dim=1)  # ties go to the first, as in the score
    return [
        {"prediction": classes[int(label)], "probability": f"{float(probabilities[i, label]):.6f}"}
        if finite[i]
        else {"prediction": "", "probability": ""}
        for i, label in enumerate(best)
    ]


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
