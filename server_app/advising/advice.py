"""The advice that follows from trials: what to take, what a user gains, from how many rows, who loses, what it costs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quickbloom.common.baselines.scoring import BASELINES
from quickbloom.common.maths.intervals import half_width
from quickbloom.common.metric import Metric
from quickbloom.server_app.advising.trials import Trial
from quickbloom.server_app.reporting.against_baselines import in_words

OWN_ROWS = ("constant", "last", "nearest", "prototypes", "own")
"""Baselines that need no federation."""
ONE_MODEL = ("global", "global_offset")
_HARDLY = 0.005
"""Difference that does not count: of a score in 0..1 as it is, of an error as a part of it."""
_SIMPLEST_FIRST = (*OWN_ROWS, *ONE_MODEL)


def advise(trials: Sequence[Trial], *, few: bool) -> dict[str, Any]:
    """Return the content of advice.json. `few`: every user was held out once, so that the choice has seen all of them."""
    metric = trials[0].metric
    best = min(trials, key=lambda one: metric.cost(one.mean("choosing")))
    own, one = (_best_of(best, names, metric) for names in (OWN_ROWS, ONE_MODEL))
    ranking = _ranking(trials, metric)
    chosen = _simplest(ranking, metric)
    gains = {name: _gain(best, other, metric) for name, other in (("own rows", own), ("one model", one)) if other}
    return {
        "schema": 1,
        "metric": metric.name,
        "few_users": few,
        "take": chosen,
        "kind": _kind(chosen),
        "candidates": ranking,
        "model": {"algorithm": best.candidate.algorithm, "model": best.candidate.model, "rounds": best.rounds},
        "own_rows": own,
        "one_model": one,
        "gains": gains,
        "shots": _shots(best, metric),
        "losers": _losers(best, own, metric) if own else [],
        "users": {"chose": _users(best, "choosing"), "told": _users(best, "telling")},
        "cost": _cost(best),
    }


def decision(found: Mapping[str, Any], metric: Metric) -> str:
    """Return the advice in one sentence."""
    take, gain = found["take"], found["gains"].get("own rows")
    if found["kind"] == "own rows":
        return f"Do not federate: {in_words(take, metric)} does as well as everything that was tried, on the users that decided"
    if found["kind"] == "one model":
        return f"Federate, but do not personalise: {in_words(take, metric)} does as well as every personal model that was tried"
    model = found["model"]
    said = f"Take `{model['algorithm']}` with `model={model['model']}`"
    return said if gain is None or gain["mean"] is None else said + _beside_own(gain, metric)


def _beside_own(gain: Mapping[str, Any], metric: Metric) -> str:
    """Return what a user gains over own data alone, as the end of the sentence on what to take."""
    mean, half = gain["mean"], gain["half"]
    amount = metric.score(abs(mean), half)
    if not mean:
        return "; on average it does as well as own data alone"
    if half is None:
        side = "gained" if mean > 0 else "lost"
        return f"; the one user that was scored {side} {amount} over own data alone, which says little of others"
    if abs(mean) <= half:
        return f"; over own data alone its {'gain' if mean > 0 else 'loss'} is not certain ({amount})"
    return f": a user {'gains' if mean > 0 else 'loses'} {amount} over own data alone"


def _simplest(ranking: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    """Return the simplest of those that hardly differ from the best on the choosing users.

    Own rows are simpler than one model for all, and that is simpler than a trained one.
    """
    best = metric.cost(ranking[0]["choosing"])
    margin = _HARDLY * (1.0 if metric.bounded else abs(best))
    close = [row["name"] for row in ranking if metric.cost(row["choosing"]) <= best + margin]
    return next((name for name in _SIMPLEST_FIRST if name in close), ranking[0]["name"])


def _kind(name: str) -> str:
    return "own rows" if name in OWN_ROWS else "one model" if name in ONE_MODEL else "model"


def _ranking(trials: Sequence[Trial], metric: Metric) -> list[dict[str, Any]]:
    """Return what was tried, the best on the choosing users first; of equal ones the simplest.

    "behind": by how much it is worse than what is best on the users that the advice is told of, over these.
    """
    first = trials[0]
    tried = [(name, 0, first, name) for name in _SIMPLEST_FIRST if name in first.scores["choosing"]]
    tried += [(one.candidate.name, one.rounds, one, "after") for one in trials]
    by_user = {name: trial.scores["telling"].get(contender, {}) for name, _, trial, contender in tried}
    best = min(tried, key=lambda one: metric.cost(one[2].mean("telling", one[3])))[0]
    rows = [
        {
            "name": name,
            "rounds": rounds,
            "choosing": trial.mean("choosing", contender),
            "telling": trial.mean("telling", contender),
            "behind": _mean_gain(by_user[best], by_user[name], metric),
        }
        for name, rounds, trial, contender in tried
    ]
    return sorted(rows, key=lambda row: metric.cost(row["choosing"]))


def _best_of(trial: Trial, names: Sequence[str], metric: Metric) -> str | None:
    known = [name for name in names if name in BASELINES and math.isfinite(trial.mean("choosing", name))]
    return min(known, key=lambda name: metric.cost(trial.mean("choosing", name))) if known else None


def _pairs(mine: Mapping[str, float], theirs: Mapping[str, float], metric: Metric) -> dict[str, float]:
    """Return by how much the first is better, for each user that both have a score for."""
    sign = 1 if metric.higher_is_better else -1
    return {task: sign * (mine[task] - theirs[task]) for task in mine if task in theirs}


def _gain(trial: Trial, other: str, metric: Metric) -> dict[str, Any]:
    return _mean_gain(trial.scores["telling"].get("after", {}), trial.scores["telling"].get(other, {}), metric)


def _mean_gain(mine: Mapping[str, float], theirs: Mapping[str, float], metric: Metric) -> dict[str, Any]:
    """Return the mean of the paired differences over users, half of its 95 % interval (None for one user), and their number.

    The mean is None where one of the two diverged.
    """
    pairs = np.array(list(_pairs(mine, theirs, metric).values()))
    if not len(pairs) or not np.isfinite(pairs).all():
        return {"mean": None, "half": None, "users": len(pairs)}
    half = float(half_width(pairs[:, None])[0])
    return {"mean": float(pairs.mean()), "half": half if math.isfinite(half) else None, "users": len(pairs)}


def _losers(trial: Trial, own: str, metric: Metric) -> list[dict[str, Any]]:
    """Return the users for whom the model is worse than own rows alone, the worst first; one that diverged is worse."""
    model, alone = (trial.scores["telling"].get(name, {}) for name in ("after", own))
    worse = {task: metric.cost(model[task]) - metric.cost(alone[task]) for task in model if task in alone}
    lost = sorted((task for task in worse if worse[task] > 0), key=lambda task: -worse[task])
    return [{"task": task, "model": model[task], "own": alone[task]} for task in lost]


def _shots(trial: Trial, metric: Metric) -> list[dict[str, float]]:
    """Return the mean score by the number of support rows, as far as all runs have it and none diverged there."""
    curves = [_curve(run["shots"], metric) for run in trial.runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [{"shots": shots, "score": float(np.mean([curve[shots] for curve in curves]))} for shots in shared]


def _curve(shots: Mapping[str, Any] | None, metric: Metric) -> dict[int, float]:
    """Return the mean score of a run by the number of support rows."""
    if not shots or metric.name not in shots:
        return {}
    pairs = zip(shots["shots"], shots[metric.name]["mean"], strict=True)
    return {number: score for number, score in pairs if score is not None and math.isfinite(score)}


def _users(trial: Trial, part: str) -> int:
    return len(trial.scores[part].get("after", {}))


def _cost(trial: Trial) -> dict[str, float]:
    """Return rounds, seconds of the run here, and bytes of a node that takes part in all of it, both ways."""
    run = trial.runs[0]  # of one node, which has the messages of every node
    return {
        "rounds": trial.rounds,
        "seconds": float(run["seconds"]["total"]),
        "bytes_per_node": run["bytes"]["up"] + run["bytes"]["down"],
    }
