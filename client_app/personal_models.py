"""A node's personal models, in the folder `personal` of its `state-dir`: one file per task, never sent.

Beside the folder is `meta.safetensors`, the model that they were adapted from, a checkpoint for
`quickbloom-edge adapt`. A new model replaces an old one atomically; if it cannot be written, the
old one stays.
"""

import math
from collections.abc import Mapping, Sequence
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from quickbloom.client_app.node import Node
from quickbloom.client_app.task_state import KeptState, as_name
from quickbloom.common.datasets.own import Own
from quickbloom.common.datasets.own.preparation import Preparation
from quickbloom.common.errors import ConfigError, DataError, in_one_line
from quickbloom.common.flower.names import log
from quickbloom.common.formatting import counted
from quickbloom.common.metric import MSE, RMSE, Metric, named
from quickbloom.common.personal import checkpoint
from quickbloom.common.personal.carried import packed
from quickbloom.common.personal.cross_validation import AFTER, BEFORE, CONSTANT, OWN, as_told
from quickbloom.common.personal.model import SUFFIX, Origin, Personal, adapt, description, is_worse, save
from quickbloom.common.wire.messages import KeepRequest

FOLDER, META = "personal", "meta.safetensors"


def keep_all(node: Node, request: KeepRequest, store: KeptState) -> int:
    """Adapt the model of `request` to every task of the node, keep the results, and return their number.

    Raises ConfigError if `state-dir` cannot be written; existing files stay.
    """
    if not node.state_dir:
        return 0
    algorithm, meta = node.algorithm_for(request.meta)
    fresh, count = algorithm.fresh(), 0
    origin = Origin(request.round, request.lineage, request.run, request.lr, request.steps)
    directory = Path(node.state_dir).expanduser()
    facts = {
        **description(node.run, node.dataset.spec, algorithm.learner.digest),
        "round": request.round,
        "lineage": request.lineage,
    }
    facts |= {"run": request.run, "adapt": {"lr": request.lr, "steps": request.steps}}
    try:
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        tensors = {f"meta/{n}": v for n, v in request.meta.items()} | _encoder_of(node)
        checkpoint.write(directory / META, tensors, facts, wait=True)
        for task in node.tasks:
            if not task.num_support or not task.num_test:
                continue
            kept = store.load(task.task_id, fresh)
            kept = None if kept is None else {name: value.to(node.device) for name, value in kept.items()}
            try:
                personal = adapt(algorithm, meta, kept, node.dataset, task.task_id, node.run, origin)
            except DataError as error:
                log(WARNING, "%s", error)
                continue
            save(personal, path_of(directory / FOLDER, task.task_id))
            log(INFO, "%s", in_words(personal))
            count += 1
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the personal model cannot be written to the node setting `state-dir` '{directory}' ({in_one_line(error)}): free "
            "some space there; the old one stays"
        ) from None
    return count


def _encoder_of(node: Node) -> dict[str, Tensor]:
    """Return the small encoder for the checkpoint of this node; its personal models find it where it is."""
    dataset = node.dataset
    return packed(dataset.options, dataset.schema) if isinstance(dataset, Own) else {}


def path_of(folder: Path, task_id: str) -> Path:
    """Return the file of a task's personal model."""
    return folder / f"{as_name(task_id)}{SUFFIX}"


def in_words(personal: Personal) -> str:
    """Return one line for a person.

    Example: "Personal model of ward-7 (round 100): accuracy 41.2 % before, 83.3 % after 10 steps,
    ..".
    """
    if personal.card["adapted"].get("whole"):
        return _of_all_rows(personal)
    found = personal.card["score"]
    metric, scores = named(found["name"]), (found["before"], found["after"])
    unit = in_unit(scores, personal) if metric is MSE else ""
    before, after = map(metric.score, scores)
    steps = counted(personal.card["adapted"]["steps"], "step")
    worse = f"; adapting made it worse: {_MAY_HELP}"
    return (
        f"{_begin(personal)}: {metric.name} {before} before, {after} after {steps}, on "
        f"{counted(found['test'], 'test example')} of its own{unit}{worse if is_worse(*scores, metric) else ''}"
    )


_WITHIN = ", but not by more than chance may explain: the run's model stays"
_MAY_HELP = "more rows of this task, or more tasks in training, may help"


def _begin(personal: Personal) -> str:
    return f"Personal model of {personal.task} (round {personal.card['run']['round']})"


def _of_all_rows(personal: Personal) -> str:
    """Return the line of a model that adapted to all rows of its task, with its score by cross-validation, if it has one."""
    adapted, found = personal.card["adapted"], personal.card["score"]
    begin = f"{_begin(personal)} from {counted(adapted['support'], 'row')}"
    steps = counted(adapted["tried"], "step")
    forward = bool(personal.card.get("columns", {}).get("time-column"))
    if not found["folds"]:
        why = _TOO_FEW_IN_ORDER if forward else _TOO_FEW
        return f"{begin}: adapted in {steps}, not scored{why if found['asked'] else ''}"
    metric = named(found["name"])
    ends = {found["kept"]: _interval(found, metric)}
    before, after, own, constant = (metric.score(found.get(name)) for name in (BEFORE, AFTER, OWN, CONSTANT))
    guess = "the mean of its own targets" if metric is MSE else "its most frequent class alone"
    held_out = f"cross-validated on {counted(found['test'], 'row')} in {counted(found['folds'], 'fold')}"
    held_out += _FORWARD if forward else ""
    told = [f"{metric.name} {before} before{ends.get(BEFORE, '')}", f"{after} after {steps}{ends.get(AFTER, '')}"]
    if found.get(OWN) is not None:
        told.append(f"{own} by {_RIDGE}{ends.get(OWN, '')}")
    told.append(f"{constant} by {guess}{ends.get(CONSTANT, '')}")
    return f"{begin}: {', '.join(told)}; {held_out}{_in_unit_of_all(found, personal)}{_verdict(found, metric, guess)}"


_RIDGE = "ridge on its own rows alone"


def _interval(found: Mapping[str, Any], metric: Metric) -> str:
    """Return the interval of the model that is kept: " (95 % interval 66.4 to 86.9 %)", or "" if there is none."""
    ends = found.get("interval", {}).get(found["kept"])
    return "" if ends is None else f" (95 % interval {metric.number(ends[0])} to {metric.score(ends[1])})"


_TOO_FEW = ": that takes four different rows, of classes with at least two"
_TOO_FEW_IN_ORDER = ": that takes six rows of different moments"
_FORWARD = ", each by a model of the rows before it"


def _verdict(found: Mapping[str, Any], metric: Metric, guess: str) -> str:
    """Return what is to be said of the scores of a cross-validation, or ""."""
    said = ""
    if found["kept"] in (OWN, CONSTANT):
        return f"; {_RIDGE if found['kept'] == OWN else guess} does better, and is the personal model"
    if found["kept"] == "before":
        said = f"; adapting made it worse, so the shared model stays as it was: {_MAY_HELP}"
    elif is_worse(found["before"], found["after"], metric):
        said = f"; adapting made it worse: {_MAY_HELP}"
    score, constant, own = found[found["kept"]], found["constant"], found.get("own")
    if own is not None and _beats(own, score, metric) and _beats(own, constant, metric):
        return f"{said}; {_RIDGE} does better{_WITHIN if found.get('own_rows') else ''}"
    alike = score is None or (constant is not None and metric.reaches(constant, score))
    return f"{said}; {guess} does as well" if alike else said


def _beats(score: float, than: float | None, metric: Metric) -> bool:
    """Return whether a score is better than another; None: that of a model that diverged."""
    return than is None or metric.is_better(as_told(score), as_told(than))


def in_unit(errors: Sequence[float | None], personal: Personal) -> str:
    """Return mean squared errors as their roots in the unit of the target.

    Example: "; rmse 41.2 -> 8.3 in the unit of the target"; "" for classes.
    """
    roots = _roots(errors, personal)
    return f"; rmse {' -> '.join(roots)} in the unit of the target" if roots else ""


def _in_unit_of_all(found: Mapping[str, Any], personal: Personal) -> str:
    """Return the same for the scores of a cross-validation, with those of ridge and of the mean."""
    roots = _roots([found.get(name) for name in ("before", "after", "own", "constant")], personal)
    if not roots:
        return ""
    own = "" if found.get("own") is None else f", {roots[2]} by ridge"
    return f"; rmse {' -> '.join(roots[:2])}{own}, {roots[3]} by the mean, in the unit of the target"


def _roots(errors: Sequence[float | None], personal: Personal) -> list[str]:
    target = Preparation.from_json(personal.card.get("preparation", {})).target
    if target is None:
        return []
    return [RMSE.score(None if error is None else math.sqrt(error) * target.deviation) for error in errors]
