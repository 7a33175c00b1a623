"""Scores of tasks for every rate and every step of adaptation: what the engine computes by itself, and what it does not.

A held-out task (an unseen user) adapts the model on its support. A training task (a seen user) adapts what it keeps on the
node, or the model if it keeps nothing, on all that it trained on. Both are scored on their own test part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from quickbloom.client_app.node import Node
from quickbloom.client_app.task_state import KeptState
from quickbloom.common import scores
from quickbloom.common.algorithms import Algorithm
from quickbloom.common.datasets.own import Own
from quickbloom.common.engine.predicting import predict_path
from quickbloom.common.engine.round import evaluate
from quickbloom.common.maths.batch import TaskData
from quickbloom.common.maths.calibration import softmax
from quickbloom.common.maths.params import Params
from quickbloom.common.metric import Metric, named
from quickbloom.common.wire.checks import WireError
from quickbloom.common.wire.messages import LARGEST_LOSS, EvaluateReply, EvaluateRequest

Numbers = np.ndarray[Any, Any]
_MOST_OUTPUTS = 2**24
"""Numbers that are held at once, 128 MiB: 160 steps of adaptation with six rates have a thousand for every row and class."""


def score_unseen(node: Node, algorithm: Algorithm, meta: Params, request: EvaluateRequest) -> EvaluateReply:
    """Return the scores of held-out tasks."""
    draws = [
        [replace(draw, support=draw.support.first(request.shots)) for draw in node.dataset.test_draws(task_id)]
        for task_id in request.task_ids
    ]
    return _score(node, algorithm, meta, request, draws)


def score_seen(node: Node, algorithm: Algorithm, meta: Params, request: EvaluateRequest, store: KeptState) -> EvaluateReply:
    """Return the scores of training tasks. `store`: what they keep; one that never trained adapts as a held-out one."""
    fresh = algorithm.fresh()
    kept = [store.load(task_id, fresh) for task_id in request.task_ids]
    found: dict[int, tuple[Any, ...]] = {}
    for has_state in (False, True):
        places = [place for place, state in enumerate(kept) if (state is not None) == has_state]
        if not places:
            continue
        some = replace(request, task_ids=[request.task_ids[place] for place in places])
        draws = [[node.dataset.seen_draw(task_id)] for task_id in some.task_ids]
        states = [state for state in kept if state is not None] if has_state else None
        part = _score(node, algorithm, meta, some, draws, states)
        second = [None] * len(places) if part.second is None else part.second
        found.update(zip(places, zip(part.losses, part.metrics, second, strict=True), strict=True))
    losses, metrics, more = zip(*(found[place] for place in range(len(kept))), strict=True)
    return EvaluateReply(np.stack(losses), np.stack(metrics), None if more[0] is None else np.stack(more))


def _score(
    node: Node,
    algorithm: Algorithm,
    meta: Params,
    request: EvaluateRequest,
    tasks: Sequence[Sequence[TaskData]],
    kept: Sequence[Params] | None = None,
) -> EvaluateReply:
    """Return the scores of these draws of the tasks that were asked for, each from what it has `kept`."""
    own = node.dataset.spec.metric
    metric = named(request.metric) if request.metric else own
    losses, metrics = evaluate(algorithm, meta, tasks, request.lrs, request.steps, node.chunk_size_scoring, kept)
    if metric != own:
        metrics = measure(node, algorithm, meta, request, tasks, metric, metrics, kept)
    if not isinstance(node.dataset, Own) or len(request.lrs) > 1 or request.shots:
        return EvaluateReply(losses, metrics)
    second = named(metric.second or own.name)
    more = measure(node, algorithm, meta, request, tasks, second, metrics if metric == own else None, kept)
    return EvaluateReply(losses, metrics, more)


def measure(
    node: Node,
    algorithm: Algorithm,
    meta: Params,
    request: EvaluateRequest,
    tasks: Sequence[Sequence[TaskData]],
    metric: Metric,
    by_first: Numbers | None,
    kept: Sequence[Params] | None = None,
) -> Numbers:
    """Return the scores [tasks, rates, steps + 1] by `metric`, the mean over the draws of a task.

    `by_first`: the accuracies or mean squared errors, if they are known already; `kept`: the state of every task, if they
    have one.
    """
    spec = node.dataset.spec
    if metric.kind not in (None, spec.kind):
        raise WireError(f"`metric` is {metric.name}, which is for {metric.kind}, and the data are for {spec.kind}")
    lrs, steps, chunk = request.lrs, request.steps, node.chunk_size_scoring
    if metric == spec.metric:
        return by_first if by_first is not None else evaluate(algorithm, meta, tasks, lrs, steps, chunk, kept)[1]
    if metric.name == "balanced_accuracy":
        alike = [[_alike(draw) for draw in task] for task in tasks]
        return evaluate(algorithm, meta, alike, lrs, steps, chunk, kept)[1]
    units = _units(node, request)
    if metric.name == "rmse" and by_first is not None:
        return _at_most(np.sqrt(by_first) * np.array(units)[:, None, None])
    classes = spec.kind == "classification"
    found: list[Numbers] = []
    for some in _pieces(tasks, len(lrs) * (steps + 1) * spec.outputs):
        draws = [draw for task in some for draw in task]
        states = None if kept is None else _of_draws(kept[len(found) :], some)
        paths = iter(predict_path(algorithm, meta, draws, lrs, steps, chunk, states))
        for task in some:
            of_draws, unit = [], units[len(found)]
            for draw in task:
                outputs, y = next(paths), draw.test.y.cpu().numpy()
                of_draws.append([[_score_of(one, y, metric, unit, classes=classes) for one in rate] for rate in outputs])
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


def _of_draws(kept: Sequence[Params], tasks: Sequence[Sequence[TaskData]]) -> list[Params]:
    """Return the state of every draw's task."""
    return [state for state, task in zip(kept, tasks, strict=False) for _ in task]


def _score_of(outputs: Numbers, y: Numbers, metric: Metric, unit: float, *, classes: bool) -> float:
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


def _units(node: Node, request: EvaluateRequest) -> list[float]:
    own = node.dataset
    return [own.target_deviation(one, seen=request.seen) if isinstance(own, Own) else 1.0 for one in request.task_ids]


def _alike(draw: TaskData) -> TaskData:
    return TaskData(draw.support, draw.query, draw.test.classes_alike())


def _at_most(values: Numbers) -> Numbers:
    """Return the values, infinite where they are too large for a reply: one diverged task must not invalidate the whole."""
    return np.where(values > LARGEST_LOSS, np.inf, values)
