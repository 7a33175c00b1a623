"""Is one better, or was it luck? Paired tests between the rows of a comparison, over seeds and over users.

All rows of a seed have the same test tasks, so two rows are compared by their differences. Over seeds a pair is the mean score
of the same seed; over users it is the score of the same user, the mean over the seeds in which it was tested. The test is
Wilcoxon's signed-rank test (1945) with its exact distribution, in which equal differences share their ranks; p values of one
family are corrected as Holm (1979) does. The effect is the matched-pairs rank biserial correlation (Kerby 2014): the part of
the ranks for the first less the part for the second, in -1..1. Ranks are averaged as in Demsar (2006).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np

from quickbloom.common.formatting import counted
from quickbloom.common.metric import Metric, named

LEVEL, POWER = 0.05, 0.8
"""What a p value must be below, and how surely a difference as large as the one seen is to be found."""
_EXACT = 200
"""Most pairs for the exact distribution; beyond it the normal one is as good."""
_MOST_SEEDS = 10_000

Values = Mapping[Any, float]
"""Scores by what is paired: a seed, or a user."""


Numbers = Sequence[float] | np.ndarray[Any, Any]


def signed_rank(differences: Numbers) -> tuple[float, float]:
    """Return (two-sided p value, matched-pairs rank biserial correlation) of paired differences; zeros are left out.

    (1.0, 0.0) where none is left. Exact up to 200 differences: all signs are equally likely, so that the sums of ranks are
    counted; beyond, the normal distribution with the variance of the ranks that there are.
    """
    values = np.array([value for value in differences if value != 0], dtype=np.float64)
    if not len(values):
        return 1.0, 0.0
    doubled = np.rint(2 * midranks(np.abs(values))).astype(np.int64)  # whole numbers, also for shared ranks
    plus, total = int(doubled[values > 0].sum()), int(doubled.sum())
    effect = (2 * plus - total) / total
    if len(values) > _EXACT:
        spread = math.sqrt(float((doubled.astype(np.float64) ** 2).sum()) / 4)
        return min(1.0, 2 * NormalDist().cdf(-abs(plus - total / 2) / spread)), effect
    chance = np.zeros(total + 1)
    chance[0] = 1.0
    for rank in doubled:
        moved = np.zeros_like(chance)
        moved[rank:] = chance[: total + 1 - rank]
        chance = (chance + moved) / 2
    tail = chance[: min(plus, total - plus) + 1].sum()
    return min(1.0, 2 * float(tail)), effect


def midranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return ranks from 1, the lowest first; equal values share the mean of theirs: float64, same shape [n]."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[places])


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number, in the same order (Holm 1979)."""
    corrected, highest = [0.0] * len(values), 0.0
    for place, at in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
        highest = max(highest, min(1.0, (len(values) - place) * values[at]))
        corrected[at] = highest
    return corrected


def seeds_needed(differences: Numbers, tests: int) -> int | None:
    """Return how many seeds would settle a difference as large and as steady as this one; None: not to be told, or never.

    For a paired test at level 0.05 / `tests` (Holm's strictest) with power 0.8: ((z_level + z_power) * sd / mean)^2, times
    pi / 3 for what Wilcoxon's test loses on normal differences, and z_level^2 / 2 because the deviation is estimated
    (Guenther 1981); at least so many that all seeds on one side are enough.
    """
    values = np.array(differences, dtype=np.float64)
    if len(values) < 2 or not values.mean():
        return None
    level = LEVEL / max(tests, 1)
    least = math.ceil(math.log2(2 / level))  # 2 / 2^n is the lowest p value of n seeds
    of_level, of_power = NormalDist().inv_cdf(1 - level / 2), NormalDist().inv_cdf(POWER)
    spread = float(values.std(ddof=1)) / float(values.mean())
    number = math.ceil(((of_level + of_power) * spread) ** 2 * math.pi / 3 + of_level**2 / 2)
    return max(least, number) if number <= _MOST_SEEDS else None


def compared(scores: Mapping[str, Mapping[int, Values]], means: Mapping[str, Values], metric: Metric) -> dict[str, Any]:
    """Return "paired" of comparison.json: the best row, and every pair of rows.

    `scores`: by row and seed, of each test user; `means`: by row, of each seed. "difference" is by how much the first of a pair
    is better, whichever way the metric counts. "holm" corrects the tests of the best against each other row, and "holm_all"
    those of all pairs. Rows without a score are left out.
    """
    known = [name for name in means if means[name]]
    best = min(known, key=lambda name: metric.cost(float(np.mean(list(means[name].values())))), default=None)
    users = {name: of_users(scores.get(name, {})) for name in known}
    ordered = sorted(known, key=lambda name: name != best)
    pairs = [_pair(a, b, means, users, metric, len(known) - 1) for a, b in combinations(ordered, 2)]
    for over in ("seeds", "users"):
        for key, family in (("holm", [pair for pair in pairs if pair["first"] == best]), ("holm_all", pairs)):
            tested = [pair for pair in family if pair[over]["pairs"]]
            for pair, p in zip(tested, holm([pair[over]["p"] for pair in tested]), strict=True):
                pair[over][key] = p
    return {"metric": metric.name, "best": best, "level": LEVEL, "ranks": mean_ranks(scores, metric), "pairs": pairs}


def of_users(by_seed: Mapping[int, Values]) -> dict[Any, float]:
    """Return the mean score of every user over the seeds in which it was tested."""
    found: dict[Any, list[float]] = {}
    for values in by_seed.values():
        for user, value in values.items():
            found.setdefault(user, []).append(value)
    return {user: float(np.mean(values)) for user, values in found.items()}


def mean_ranks(scores: Mapping[str, Mapping[int, Values]], metric: Metric) -> dict[str, float]:
    """Return the mean rank of every row over the seeds and users that all have; 1 is the best, equal scores share ranks."""
    flat = {
        name: {(seed, user): value for seed, of_seed in seeds.items() for user, value in of_seed.items()}
        for name, seeds in scores.items()
    }
    flat = {name: values for name, values in flat.items() if values}
    shared = sorted(set.intersection(*map(set, flat.values()))) if flat else []
    if not shared:
        return {}
    costs = np.array([[metric.cost(values[place]) for values in flat.values()] for place in shared])
    return dict(zip(flat, np.mean([midranks(row) for row in costs], axis=0).tolist(), strict=True))


def _pair(
    first: str, second: str, means: Mapping[str, Values], users: Mapping[str, Values], metric: Metric, tests: int
) -> dict[str, Any]:
    seeds = _differences(means[first], means[second], metric)
    return {
        "first": first,
        "second": second,
        "seeds": _test(seeds),
        "users": _test(_differences(users[first], users[second], metric)),
        "seeds_needed": seeds_needed(seeds, tests),
    }


def _differences(first: Values, second: Values, metric: Metric) -> list[float]:
    """By how much the first is better, of everything that both have."""
    sign = 1 if metric.higher_is_better else -1
    # Scores have seven digits: what differs less is equal, and rounding makes no ranks.
    return [round(sign * (first[key] - second[key]), 7) for key in first if key in second]


def _test(differences: Sequence[float]) -> dict[str, Any]:
    p, effect = signed_rank(differences)
    found: dict[str, Any] = {"pairs": len(differences), "difference": None, "sd": None, "p": p, "effect": effect}
    if differences:
        found["difference"] = float(np.mean(differences))
    if len(differences) > 1:
        found["sd"] = float(np.std(differences, ddof=1))
    return found | {"holm": None, "holm_all": None}


# ---- in words


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of cells): the best row beside each other one; ([], []) where nothing is paired."""
    found = result["paired"]
    pairs = [pair for pair in found["pairs"] if pair["first"] == found["best"]]
    if not pairs:
        return [], []
    metric = named(found["metric"])
    headings = [
        f"{found['best']} beside",
        "better by",
        "p, seeds",
        "effect, seeds",
        "p, users",
        "effect, users",
        "seeds needed",
    ]
    rows = []
    for pair in pairs:
        seeds, users = pair["seeds"], pair["users"]
        difference = "-" if seeds["difference"] is None else metric.number(seeds["difference"], seeds["sd"])
        tested = [cell for part in (seeds, users) for cell in _tested(part)]
        rows.append([pair["second"], difference, *tested, str(pair["seeds_needed"] or "-")])
    return headings, rows


def _tested(part: Mapping[str, Any]) -> list[str]:
    return [f"{part['holm']:.2g}", f"{part['effect']:+.2f}"] if part["pairs"] else ["-", "-"]


def caption(result: Mapping[str, Any]) -> list[str]:
    """What the tests say, in plain sentences; [] where nothing is paired."""
    found = result["paired"]
    pairs = [pair for pair in found["pairs"] if pair["first"] == found["best"]]
    if not pairs:
        return []
    best, number = found["best"], max(pair["seeds"]["pairs"] for pair in pairs)
    users = max(pair["users"]["pairs"] for pair in pairs)
    said = [
        f"Tests: {best}, the best by the mean, against each other row. Better by: mean and deviation of the differences over "
        f"{counted(number, 'seed')}. p: Wilcoxon's signed-rank test over these, and over {counted(users, 'test user')}, each "
        f"the mean of its seeds, with Holm's correction for {counted(len(pairs), 'test')}. Effect: matched-pairs rank biserial "
        "correlation, 1 if it is always better. Users of one seed share a model, so the test over seeds is the one that speaks "
        "for training anew. Seeds needed: for p below 0.05 in four of five experiments, if differences are like those seen."
    ]
    if 2 / 2**number * len(pairs) > LEVEL:
        said.append(
            f"{counted(number, 'seed')} cannot settle anything here, whatever the scores: p is at least {2 / 2**number:.2g}."
        )
    clear = [pair["second"] for pair in pairs if _is_clear(pair["seeds"])]
    if clear:
        said.append(f"{best} is better than {', '.join(clear)}: p below {LEVEL:g} over seeds.")
    for pair in pairs:
        if pair["second"] not in clear:
            said.append(_open(best, pair, number))
    return said


def _is_clear(part: Mapping[str, Any]) -> bool:
    return part["holm"] is not None and part["holm"] < LEVEL and part["effect"] > 0


def _open(best: str, pair: Mapping[str, Any], seeds: int) -> str:
    """Why a difference is not settled, and what would settle it."""
    of_users = ", though over these users it is better" if _is_clear(pair["users"]) else ""
    said = f"Whether {best} is better than {pair['second']} is not settled by {counted(seeds, 'seed')}{of_users}"
    if pair["seeds_needed"] is None:
        return f"{said}: {'two seeds are the fewest that can tell' if seeds < 2 else 'they differ by too little'}."
    return f"{said}: if the difference is what it seems, about {pair['seeds_needed']} seeds would settle it."
