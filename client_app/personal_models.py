"""A node's personal models, in the folder `personal` of its `state-dir`: one file per task, never sent.

Beside the folder is `meta.safetensors`, the model that they were adapted from, a checkpoint for
`quickbloom-edge adapt`. A new model replaces an old one atomically; if it cannot be written, the
old one stays.
"""

import math
from collections.abc import Sequence
from logging import INFO, WARNING
from pathlib import Path

from safetensors import SafetensorError

from quickbloom.client_app.node import Node
from quickbloom.client_app.task_state import KeptState, as_name
from quickbloom.common.datasets.own.preparation import Preparation
from quickbloom.common.errors import ConfigError, DataError, in_one_line
from quickbloom.common.flower.names import log
from quickbloom.common.formatting import counted
from quickbloom.common.metric import MSE, RMSE, Metric, named
from quickbloom.common.personal import checkpoint
from quickbloom.common.personal.model import SUFFIX, Origin, Personal, adapt, description, save
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
    facts = {**description(node.run, node.dataset.spec), "round": request.round, "lineage": request.lineage}
    facts |= {"run": request.run, "adapt": {"lr": request.lr, "steps": request.steps}}
    try:
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        checkpoint.write(directory / META, {f"meta/{n}": v for n, v in request.meta.items()}, facts, wait=True)
        for task in node.tasks:
            if not task.num_support or not task.num_test:
                continue
            kept = store.load(task.task_id, fresh) or fresh
            kept = {name: value.to(node.device) for name, value in kept.items()}
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


def path_of(folder: Path, task_id: str) -> Path:
    """Return the file of a task's personal model."""
    return folder / f"{as_name(task_id)}{SUFFIX}"


def in_words(personal: Personal) -> str:
    """Return one line for a person.

    Example: "Personal model of ward-7 (round 100): accuracy 41.2 % before, 83.3 % after 10 steps,
    ..".
    """
    found = personal.card["score"]
    metric, scores = named(found["name"]), (found["before"], found["after"])
    unit = in_unit(scores, personal) if metric is MSE else ""
    before, after = map(metric.score, scores)
    steps = counted(personal.card["adapted"]["steps"], "step")
    worse = "; adapting made it worse: more rows of this task, or more tasks in training, may help"
    return (
        f"Personal model of {personal.task} (round {personal.card['run']['round']}): {metric.name} {before} before, {after} "
        f"after {steps}, on {counted(found['test'], 'test example')} of its own{unit}"
        f"{worse if _is_worse(*scores, metric) else ''}"
    )


def in_unit(errors: Sequence[float | None], personal: Personal) -> str:
    """Return mean squared errors as their roots in the unit of the target.

    Example: "; rmse 41.2 -> 8.3 in the unit of the target"; "" for classes.
    """
    target = Preparation.from_json(personal.card.get("preparation", {})).target
    if target is None:
        return ""
    roots = [RMSE.score(None if error is None else math.sqrt(error) * target.deviation) for error in errors]
    return f"; rmse {' -> '.join(roots)} in the unit of the target"


def _is_worse(before: float | None, after: float | None, metric: Metric) -> bool:
    if before is None or after is None:
        return after is None
    return metric.is_better(before, after)
