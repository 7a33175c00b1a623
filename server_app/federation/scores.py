"""Scores of held-out tasks, and the choice of the rate and number of steps of adaptation by them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from quickbloom.common.metric import LOSS, Metric


@dataclass(frozen=True)
class Scores:
    """Held-out tasks after 0..K steps: `losses` and `metrics` [tasks, learning rates, steps + 1] for `task_ids` and `lrs`.

    `second`: as in the reply of a node, if all of them sent one.
    """

    task_ids: list[str]
    lrs: list[float]
    losses: np.ndarray[Any, Any]
    metrics: np.ndarray[Any, Any]
    second: np.ndarray[Any, Any] | None = None

    @property
    def steps(self) -> int:
        """K."""
        return int(self.metrics.shape[2]) - 1

    def known(self, metric: Metric) -> "Scores":
        """Return these without tasks whose rows cannot have such a score, as the AUROC of rows of one class.

        Of an error NaN is the score of a model that diverged, which stays.
        """
        if not metric.bounded or not self.task_ids:
            return self
        return self._where(~np.isnan(self.metrics).any(axis=(1, 2)))

    def of(self, task_ids: Collection[str]) -> "Scores":
        """Return those of some tasks."""
        return self._where(np.isin(self.task_ids, list(task_ids)))

    def _where(self, kept: np.ndarray[Any, Any]) -> "Scores":
        if kept.all():
            return self
        ids = [task_id for task_id, known in zip(self.task_ids, kept, strict=True) if known]
        second = None if self.second is None else self.second[kept]
        return Scores(ids, self.lrs, self.losses[kept], self.metrics[kept], second)

    def joined(self, other: "Scores") -> "Scores":
        """Return these tasks and the `other` ones, in the order of their ids."""
        ids = self.task_ids + other.task_ids
        order = sorted(range(len(ids)), key=ids.__getitem__)
        losses, metrics = np.concatenate([self.losses, other.losses]), np.concatenate([self.metrics, other.metrics])
        both = self.second is not None and other.second is not None
        second = np.concatenate([self.second, other.second])[order] if both else None
        return Scores([ids[i] for i in order], self.lrs, losses[order], metrics[order], second)


def gains_at_the_end(scores: Scores, metric: Metric, lr: float, step: int) -> bool:
    """Return whether the chosen `step` is the last one, and better than half as many steps at the same rate.

    Not than the step before: of a share of few rows a single step often changes nothing.
    """
    curve = scores.metrics[:, scores.lrs.index(lr)].mean(axis=0)
    return step == scores.steps and metric.is_better(curve[step], curve[step // 2])


def best_rate(scores: Scores, metric: Metric) -> tuple[float, int]:
    """Return (learning rate, steps >= 1) with the best mean metric; ties go to the lower loss, then to fewer steps."""
    means, losses = scores.metrics.mean(axis=0), scores.losses.mean(axis=0)
    candidates = [(i, step) for step in range(1, means.shape[1]) for i in range(len(scores.lrs))]
    best = min(candidates, key=lambda c: (metric.cost(means[c]), LOSS.cost(losses[c])))
    return scores.lrs[best[0]], best[1]
