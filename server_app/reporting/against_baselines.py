"""What the trained model is worth beside the baselines: the content of "baselines" in summary.json, and one sentence on it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from quickbloom.common import scores
from quickbloom.common.baselines.scoring import BASELINES, CONTENDERS, IN_WORDS, TITLES
from quickbloom.common.formatting import counted
from quickbloom.common.maths.intervals import half_width
from quickbloom.common.metric import RMSE, Metric, named
from quickbloom.server_app.federation.baselines import TaskScores

Numbers = np.ndarray[Any, Any]
_ALMOST_ALL = 0.5
"""Share of the tasks for which a baseline must be known to be compared."""


def against_baselines(found: TaskScores, names: Sequence[str], metric: Metric) -> dict[str, Any] | None:
    """Return means over tasks by score and contender, the best baseline by `metric`, and the gain over it; None: no task.

    "gain" is the mean of paired differences over tasks, above 0 where the trained model is better, "ci95" half of its interval.
    """
    if not found.task_ids:
        return None
    if metric.is_loss and RMSE.name in names:
        metric = RMSE  # in the unit of the target, which people can judge
    table = {
        name: {
            contender: _described(found.values[:, place, column], named(name))
            for place, contender in enumerate(CONTENDERS)
            if not np.isnan(found.values[:, place, column]).all()
        }
        for column, name in enumerate(names)
    }
    by_metric = {one: found.values[:, CONTENDERS.index(one), names.index(metric.name)] for one in CONTENDERS}
    best = _best(by_metric, metric)
    content: dict[str, Any] = {"tasks": len(found.task_ids), "metric": metric.name, "scores": table, "best": best}
    if best is None:
        return content
    pairs = by_metric["after"] - by_metric[best]
    known = pairs[~np.isnan(pairs)] * (1 if metric.higher_is_better else -1)
    if not len(known):
        return content
    scored = np.isfinite(found.values[:, CONTENDERS.index("constant")]).any(axis=1)
    diverged = int((np.isnan(found.values[:, CONTENDERS.index("after")]).all(axis=1) & scored).sum())
    gain, half = float(known.mean()), float(half_width(known[:, None])[0])
    return {**content, "gain": gain, "ci95": half, "pairs": len(known), "diverged": diverged}


def rows_of(found: TaskScores, kind: str) -> dict[str, dict[str, float]]:
    """Return for every task the cells of per_task.csv: "accuracy_own" and the like; NaN is left out."""
    return {
        task_id: {
            f"{name}_{contender}": float(of_task[place, column])
            for column, name in enumerate(scores.names(kind))
            for place, contender in enumerate(CONTENDERS)
            if not np.isnan(of_task[place, column])
        }
        for task_id, of_task in zip(found.task_ids, found.values, strict=True)
    }


def verdict(content: dict[str, Any] | None) -> str:
    """Return one sentence: whether the trained model beats the best baseline; "" if nothing is known."""
    if not content or content.get("gain") is None:
        return ""
    metric, best = named(content["metric"]), content["best"]
    score = metric.score(content["scores"][metric.name][best]["mean"])
    gain, half = content["gain"], content["ci95"]
    said = f"the best baseline is {in_words(best, metric)}, {score}"
    if content["diverged"]:
        of_all = f"{content['diverged']} of {counted(content['tasks'], 'task')}"
        return f"{said}: the trained model predicts nothing usable on {of_all}, so use the baseline in its place"
    by = metric.score(abs(gain))
    if half is None or not np.isfinite(half):
        worse = "better" if gain > 0 else "worse" if gain < 0 else "no better"
        return f"{said}: the trained model is {worse}{f' by {by}' if gain else ''} on one task, which says little of others"
    over = f"{by} {metric.margin(half)} over {counted(content['pairs'], 'task')}"
    if gain > half:
        return f"{said}: the trained model is better by {over}"
    if gain < -half:
        return f"{said}: it beats the trained model by {over}, so use it in place of this model"
    return f"{said}: the trained model does not beat it for certain ({'better' if gain > 0 else 'worse'} by {over})"


def in_words(baseline: str, metric: Metric) -> str:
    """Return what a baseline is, in a sentence."""
    if baseline == "constant":
        return "the user's most frequent class" if metric.kind == "classification" else "the user's own mean"
    return IN_WORDS[baseline]


def title_of(contender: str, metric: Metric) -> str:
    """Return what a row of a table is about: the model, or a baseline."""
    if contender == "constant":
        return "own majority class" if metric.kind == "classification" else "own mean"
    return TITLES.get(contender, f"model, {contender}")


def _described(values: Numbers, metric: Metric) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    ordered = np.sort(known) if metric.higher_is_better else -np.sort(-known)
    parts = {"mean": known.mean(), "ci95": half_width(known[:, None])[0], "worst10": ordered[: max(1, len(known) // 10)].mean()}
    # Seven significant digits: a target may be of 1e-9.
    return {**{name: float(f"{part:.7g}") for name, part in parts.items()}, "tasks": len(known)}


def _best(by_contender: dict[str, Numbers], metric: Metric) -> str | None:
    """Return the baseline with the best mean over the tasks; None if none is known for most of them."""
    known = {
        one: values for one, values in by_contender.items() if one in BASELINES and (~np.isnan(values)).mean() > _ALMOST_ALL
    }
    return min(known, key=lambda one: metric.cost(float(np.nanmean(known[one])))) if known else None
