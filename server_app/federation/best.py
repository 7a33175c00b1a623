"""Which model a run ends with: the setting `keep`, and the best model so far by the validation tasks."""

import numpy as np

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.keep import wants_best
from quickbloom.common.config.run import RunConfig
from quickbloom.common.metric import Metric
from quickbloom.server_app.events.channel import Warn
from quickbloom.server_app.federation.scores import Scores, best_rate
from quickbloom.server_app.messaging.population import Population


def keeps_best(config: RunConfig, population: Population, algorithm: Algorithm, warn: Warn) -> bool:
    """Return whether the run ends with its best model. `warn`: is told if the settings ask for it and it cannot be."""
    if not wants_best(config, population.spec):
        return False
    reason = _why_not(config, population, algorithm)
    if reason and config.keep == "best":
        warn(f'`keep` is "best", and the model of the last round is kept all the same, because {reason}')
    return not reason


def _why_not(config: RunConfig, population: Population, algorithm: Algorithm) -> str:
    if not population.splits["validation"]:
        return "there are no validation tasks to choose by"
    if not config.evaluate_every:
        return "`evaluate-every` is 0, so that no round but the last is scored"
    if algorithm.fresh() or not algorithm.starts_from_meta:
        return f"with `{config.algorithm}` tasks keep a part of it on their nodes, which cannot be brought back"
    return ""


class BestSoFar:
    """The evaluation of the validation tasks with the best scores so far; of equal ones the lowest loss decides.

    `round`: of this evaluation, 0 before the first round, None as long as there is none; `scores`: its scores.
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self.round: int | None = None
        self.scores: Scores | None = None

    def take(self, server_round: int, scores: Scores | None) -> bool:
        """Take in the scores after a round; return whether they are the best so far."""
        if scores is None or not np.isfinite(score_of(scores, self._metric)):
            return False
        if self.scores is not None and not is_better(scores, self.scores, self._metric):
            return False
        self.round, self.scores = server_round, scores
        return True


def score_of(scores: Scores, metric: Metric) -> float:
    """Return the mean score at the best rate and number of steps; NaN without a task."""
    if not scores.task_ids:
        return float("nan")
    return _at_best(scores, metric)[0]


def _at_best(scores: Scores, metric: Metric) -> tuple[float, float]:
    """Return the mean score and the mean loss at the best rate and number of steps."""
    lr, step = best_rate(scores, metric)
    at = slice(None), scores.lrs.index(lr), step
    return float(scores.metrics[at].mean()), float(scores.losses[at].mean())


def is_better(scores: Scores, than: Scores, metric: Metric) -> bool:
    """Return whether `scores` are strictly better, each at its own best rate and steps; of equal ones the lower loss is.

    Only tasks that both have count, else a round would look well whose difficult tasks were away. Of two without a task in
    common the one with more tasks is better.
    """
    both = set(scores.task_ids) & set(than.task_ids)
    if not both:
        return len(scores.task_ids) > len(than.task_ids)
    (new, new_loss), (old, old_loss) = (_at_best(one.of(both), metric) for one in (scores, than))
    return (metric.cost(new), new_loss) < (metric.cost(old), old_loss)
