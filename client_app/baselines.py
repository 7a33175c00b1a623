"""A node's part in the baselines: sums for one linear model of all tasks, and its test tasks' scores by model and baselines."""

from math import prod

import numpy as np
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from quickbloom.client_app import secure
from quickbloom.client_app.asked import Asked
from quickbloom.client_app.node import Node
from quickbloom.client_app.task_state import KeptState
from quickbloom.common.algorithms import Algorithm
from quickbloom.common.baselines.global_ridge import MOST_FEATURES, Sums
from quickbloom.common.baselines.scoring import Outputs, rows_of, scores_of_draw
from quickbloom.common.datasets.own import Own
from quickbloom.common.engine.predicting import predict_tests
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.baselines import ScoresReply, ScoresRequest, SumsReply, SumsRequest
from quickbloom.common.wire.checks import WireError

Numbers = NDArray[np.float64]


def sums(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the sums over this node's training rows that were asked for: no row is told."""
    request = SumsRequest.from_records(message.content)
    secure.check_open(node)
    spec = node.dataset.spec
    if not _shows_sums(node) or spec.tokens or prod(spec.input_shape) > MOST_FEATURES:
        raise WireError("no sums are sent in this run")
    draws = [node.dataset.test_draws(task_id)[0] for task_id in node.check_hosted(request.task_ids)]
    batches = [part for draw in draws for part in (draw.support, draw.query)]
    x = np.concatenate([rows_of(batch.x) for batch in batches])
    return SumsReply(Sums.of(x, np.concatenate([_targets(batch, spec.outputs) for batch in batches]))).to_records()


def scores(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the scores of test tasks by the model of the request, before and after adaptation, and by the baselines.

    Of training tasks, as seen users, if the request says so.
    """
    spec = node.dataset.spec
    classes = spec.kind == "classification"
    request = ScoresRequest.from_records(message.content, prod(spec.input_shape), spec.outputs, classes=classes)
    message.content.clear()  # to free memory: it has been read
    if request.shared is not None and not _shows_sums(node):
        raise WireError("no sums are sent in this run, so no model of them comes back")
    algorithm, meta = node.algorithm_for(request.meta)
    node.check_hosted(request.task_ids)
    tried = (node.run.first_steps, *node.run.more_steps)
    asked = Asked(node, state, request.lineage)
    if request.seen:
        asked.to_score_seen(request.as_evaluation(tried), algorithm.options.inner_lr, again=True)
        draws = [[node.dataset.seen_draw(task_id)] for task_id in request.task_ids]
        predicted = _of_seen(
            node, algorithm, meta, request, [draw for (draw,) in draws], KeptState(state, node.state_dir, request.lineage)
        )
    else:
        asked.to_score(request.as_evaluation(tried), algorithm.options.inner_lr)
        draws = [node.dataset.test_draws(task_id) for task_id in request.task_ids]
        every = [draw for task in draws for draw in task]
        predicted = predict_tests(algorithm, meta, every, request.lr, request.steps, node.chunk_size_scoring)
    outputs, found = iter(predicted), []
    for task_id, task in zip(request.task_ids, draws, strict=True):
        unit = node.dataset.target_deviation(task_id) if isinstance(node.dataset, Own) else 1.0
        ordered = isinstance(node.dataset, Own) and node.dataset.is_ordered
        number = spec.outputs if classes else 0
        rows = [scores_of_draw(draw, next(outputs), request.shared, number, unit, ordered=ordered) for draw in task]
        found.append(_mean(np.stack(rows)))
    return ScoresReply(np.stack(found)).to_records()


def _of_seen(
    node: Node, algorithm: Algorithm, meta: Params, request: ScoresRequest, draws: list[TaskData], store: KeptState
) -> list[Outputs]:
    """Return the outputs of training tasks, each from what it has in `store`; one that never trained is as a new task."""
    fresh = algorithm.fresh()
    kept = [store.load(task_id, fresh) for task_id in request.task_ids]
    found: dict[int, Outputs] = {}
    for has_state in (False, True):
        places = [place for place, state in enumerate(kept) if (state is not None) == has_state]
        states = [state for state in kept if state is not None] if has_state else None
        some = [draws[place] for place in places]
        made = predict_tests(algorithm, meta, some, request.lr, request.steps, node.chunk_size_scoring, states) if some else []
        found.update(zip(places, made, strict=True))
    return [found[place] for place in range(len(draws))]


def _shows_sums(node: Node) -> bool:
    return node.run.shows_sums_of_nodes and not node.least_in_sum


def _mean(draws: Numbers) -> Numbers:
    """Return the mean over the draws [draws, ...] that are known; NaN where none is."""
    known = ~np.isnan(draws)
    number = known.sum(axis=0)
    found: Numbers = np.where(number > 0, np.where(known, draws, 0.0).sum(axis=0) / np.maximum(number, 1), np.nan)
    return found


def _targets(batch: Batch, outputs: int) -> Numbers:
    """Return what is to be predicted as [n, outputs]: numbers, or 1 for the class and 0 for the others."""
    y = batch.y.cpu()
    found: Numbers = y.double().numpy() if y.is_floating_point() else np.eye(outputs)[y.numpy()]
    return found
