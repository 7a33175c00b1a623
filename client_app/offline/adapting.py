"""A checkpoint becomes a personal model for every task of one's own file."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from quickbloom.client_app.offline.starting_point import Say, StartingPoint
from quickbloom.client_app.personal_models import path_of
from quickbloom.common.datasets.base import left_out_in_words
from quickbloom.common.datasets.own import Own
from quickbloom.common.errors import ConfigError, DataError, in_one_line
from quickbloom.common.frames import as_file
from quickbloom.common.personal import model as personal_model
from quickbloom.common.personal.carried import packed
from quickbloom.common.personal.checkpoint import ENCODER
from quickbloom.common.personal.cross_validation import FOLDS
from quickbloom.common.personal.model import SUFFIX, Personal, adapt_to_all

_MOST_CARRY = 10
"""Personal models that each carry the encoder; more take the space of as many copies."""


def adapt(
    checkpoint_path: str | Path,
    data: Any,
    output: str | Path,
    task: str = "",
    target: str = "",
    say: Say = lambda sentence: None,
    trust: Collection[str] = (),
    folds: int = FOLDS,
    time: str = "",
    own_rows: bool = True,
    encoder: str = "",
) -> list[Personal]:
    """Adapt a checkpoint to every task of one's own file, write a personal model for each, and return the models.

    `checkpoint_path`: a checkpoint, a run directory, or a node's `state-dir`. `data`: as for
    `quickbloom run --data`, a pandas or polars DataFrame, or arrays by column; its columns are those of the run unless
    `task`, `target` and `time` name others, and without the task column all rows are one task, called as the file
    (`frame`, `arrays`).
    `output`: a folder, or a file that ends in .safetensors if the data have one task.
    `say`: called with sentences on unusable tasks and possible mistakes. `trust`: user models, as
    "module:factory", that may be imported if the checkpoint names them.

    A model adapts to all rows of its task that have a target, one of each class being enough. What
    that is worth is estimated by cross-validation in at most `folds` folds (0: not at all), if there
    are at least four different rows; with a column of time each fold is scored by a model of the rows before it. A
    model that adapting makes worse by it stays the shared one, and where ridge or a constant on these rows alone is
    better by more than a standard error, that is the personal model, unless `own_rows` is false.
    With `protonet` and `ridge` the rows may have classes that training never saw: see `StartingPoint.own_of`.
    `encoder`: where the encoder is on this machine, if the run has one, the checkpoint does not carry it, and it is elsewhere.
    A task that no model can be made of is said, and left out. Raises DataError, also if that is every task, or ConfigError.
    """
    if folds < 0 or folds == 1:
        raise ConfigError(f"`--folds` must be 2 or more, or 0 for a model without a score, got {folds}")
    start = StartingPoint.load(checkpoint_path, trust, say)
    with as_file(data) as path:
        own = start.own(str(path), task, target, time, encoder)
    if own.left_out:
        say(left_out_in_words(own.left_out))
    for remark in [*own.remarks, *_on_new_classes(start.new_classes(own))]:
        say(f"Remark: {remark}")
    models = _with_encoder(_adapted(start, own, folds, say, own_rows=own_rows), own, say)
    _write(models, Path(output).expanduser())
    return models


def _on_new_classes(new: list[str]) -> list[str]:
    if not new:
        return []
    said, them = (f"classes {', '.join(new)}", "them") if len(new) > 1 else (f"class {new[0]}", "it")
    return [f"training never saw the {said}: what the model knows of {them} is from the rows of this file alone"]


def _adapted(start: StartingPoint, own: Own, folds: int, say: Say, *, own_rows: bool) -> list[Personal]:
    """Return a model for every task that one can be made of, and say of which none. Raises DataError if that is every task."""
    models, failed = [], []
    for info in own.tasks():
        try:
            own_of_task = start.own_of(own, info.task_id)
            algorithm, meta = start.model_for(own_of_task.classes)
            origin, config = start.origin(), start.config
            models.append(adapt_to_all(algorithm, meta, own_of_task, info.task_id, config, origin, folds, own_rows=own_rows))
        except DataError as error:
            failed.append(error)
    for one in failed if models else failed[:-1]:
        say(f"No model: {one}")
    if not models:
        raise failed[-1]
    return models


def _with_encoder(models: list[Personal], own: Own, say: Say) -> list[Personal]:
    """Return the models with their encoder in them, if it is small, and they are few."""
    files = {name.removeprefix(ENCODER): value for name, value in packed(own.options, own.schema).items()}
    if not files or len(models) <= _MOST_CARRY:
        return [replace(model, encoder=files) for model in models] if files else models
    say(
        f"The {len(models)} personal models do not carry the encoder, each for itself: on another device name it with "
        "`--encoder`"
    )
    return models


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
