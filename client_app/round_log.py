"""A node's log lines about each round, for its own user: tasks, seconds, bytes and scores. Nothing of it is sent."""

from logging import INFO

from quickbloom.client_app.node import Node
from quickbloom.common.algorithms import Algorithm
from quickbloom.common.engine.round import evaluate
from quickbloom.common.flower.names import log
from quickbloom.common.formatting import size
from quickbloom.common.maths.params import Params
from quickbloom.common.metric import Metric

_MOST_NAMED = 3
_MOST_SCORED = 16
"""Most tasks to score after a training round; scoring hundreds would take longer than the round."""


def tell(node: Node, what: str, task_ids: list[str], scores: str, seconds: float, received: int, sent: int) -> None:
    """Log one line: "Round 7, training: ward-7; accuracy 41.2 % -> 83.3 % on ..; 0.8 s, 12 kB in, 12 kB out"."""
    if node.show_rounds:
        named = ", ".join(task_ids[:_MOST_NAMED]) + (f" and {len(task_ids) - _MOST_NAMED} more" * (len(task_ids) > _MOST_NAMED))
        log(INFO, "%s: %s; %s%.1f s, %s in, %s out", what, named, scores and f"{scores}; ", seconds, size(received), size(sent))


def own_scores(node: Node, algorithm: Algorithm, meta: Params, task_ids: list[str]) -> str:
    """Return the mean score of these tasks on their test parts, before and after adapting; "" if not shown."""
    if not node.show_rounds:
        return ""
    found = [node.dataset.test_draws(task_id) for task_id in task_ids[:_MOST_SCORED]]
    draws = [task for task in found if all(len(draw.support.x) and len(draw.test.x) for draw in task)]
    if not draws:
        return ""
    _, metrics = evaluate(algorithm, meta, draws, [algorithm.options.inner_lr], node.run.first_steps, node.chunk_size_scoring)
    return in_words(node.dataset.spec.metric, metrics[:, 0, 0].mean(), metrics[:, 0, -1].mean())


def in_words(metric: Metric, before: float, after: float) -> str:
    return f"{metric.name} {metric.change(before, after, '->')} on its own test part"
