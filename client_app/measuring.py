"""What a run is scored by, if that is not what the engine computes by itself: for every rate and every step of adaptation."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from quickbloom.client_app.node import Node
from quickbloom.common import scores
from quickbloom.common.algorithms import Algorithm
from quickbloom.common.datasets.own import Own
from quickbloom.common.engine.predicting import predict_path
from quickbloom.common.engine.round import evaluate
from quickbloom.common.maths.batch import TaskData
from quickbloom.common.maths.calibration import softmax
from quickbloom.common.maths.params import Params
from quickbloom.common.metric import Metric
from quickbloom.common.wire.checks import WireError
from quickbloom.common.wire.messages import LARGEST_LOSS, EvaluateRequest

Numbers = np.ndarray[Any, Any]
_MOST_OUTPUTS = 2**24
"""Numbers that are held at once, 128 MiB: 160 steps of adaptation with six rates have a thousand for every row and class."""


def measure(
    node: Node,
    algorithm: Algorithm,
    meta: Params,
    request: EvaluateRequest,
    tasks: Sequence[Sequence[TaskData]],
    metric: Metric,
    by_first: Numbers | None,
) -> Numbers:
    """Return the scores [tasks, rates, steps + 1] by `metric`, the mean over the draws of a task.

    `by_first`: the accuracies or mean squared errors, if they are known already.
    """
    spec = node.dataset.spec
    if metric.kind not in (None, spec.kind):
        raise WireError(f"`metric` is {metric.name}, which is for {metric.kind}, and the data are for {spec.kind}")
    lrs, steps, chunk = request.lrs, request.steps, node.chunk_size_scoring
    if metric == spec.metric:
        return by_first if by_first is not None else evaluate(algorithm, meta, tasks, lrs, steps, chunk)[1]
    if metric.name == "balanced_accuracy":
        alike = [[_alike(draw) for draw in task] for task in tasks]
        return evaluate(algorithm, meta, alike, lrs, steps, chunk)[1]
    units = _units(node, request.task_ids)
    if metric.name == "rmse" and by_first is not None:
        return _at_most(np.sqrt(by_first) * np.array(units)[:, None, None])
    classes = spec.kind == "classification"
    found: list[Numbers] = []
    for some in _pieces(tasks, len(lrs) * (steps + 1) * spec.outputs):
        paths = iter(predict_path(algorithm, meta, [draw for task in some for draw in task], lrs, steps, chunk))
        for task in some:
            of_draws, unit = [], units[len(found)]
            for draw in task:
                outputs, y = next(paths), draw.test.y.cpu().numpy()
                of_draws.append([[_score(one, y, metric, unit, classes=classes) for one in rate] for rate in outputs])
            found.append(np.mean(of_draws, axis=0))
    return _at_most(np.array(found))


def _pieces(tasks: Sequence[Sequence[TaskData]], numbers: int) -> Iterator[list[Sequence[TaskData]]]:
    """Yield the tasks in order, as many at once as have `_MOST_OUTPUTS` outputs, but at least one; `numbers`: of a test row."""
    some: list[Sequence[TaskData]] = []
    held = 0
    for task in tasks:
        size = numbers * sum(len(draw.test.x) for draw in task)
        if some and held + size > _MOST_OUTPUTS:
            yield some
            some, held = [], 0
        some.append(task)
        held += size
    if some:
        yield some


def _score(outputs: Numbers, y: Numbers, metric: Metric, unit: float, *, classes: bool) -> float:
    """Return one score of outputs [n, outputs]; infinity for an error of what is not finite, 0 for a share.

    NaN if the rows cannot have it, whatever is predicted.
    """
    if metric.name == "auroc" and len(np.unique(y)) < 2:
        return np.nan
    if not np.isfinite(outputs if not classes else softmax(outputs)).all():
        return 0.0 if metric.higher_is_better else np.inf
    if classes:
        return scores.of_classes(y, softmax(outputs))[metric.name]
    return scores.of_numbers(y[:, 0].astype(np.float64), outputs[:, 0], None, unit)[metric.name]


def _units(node: Node, task_ids: Sequence[str]) -> list[float]:
    own = node.dataset
    return [own.target_deviation(task_id) if isinstance(own, Own) else 1.0 for task_id in task_ids]


def _alike(draw: TaskData) -> TaskData:
    return TaskData(draw.support, draw.query, draw.test.classes_alike())


def _at_most(values: Numbers) -> Numbers:
    """Return the values, infinite where they are too large for a reply: one diverged task must not invalidate the whole."""
    return np.where(values > LARGEST_LOSS, np.inf, values)
