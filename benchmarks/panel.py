"""Tables on which defaults for own data are chosen: public ones cut into users, and generated ones whose structure is known.

`panel(seed)` makes them anew from a seed, so that a default is never tuned on one draw of them. The command runs the default
on each and compares it with the baselines of the same run:

    python -m benchmarks.panel --seeds 3
    python -m benchmarks.panel --seeds 1 --advise
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import quickbloom
from quickbloom.common.config.key_value import assignment, scalar, split_assignment
from quickbloom.common.frames import as_file
from quickbloom.common.metric import named
from quickbloom.server_app.advising.carry_out import advise_on

Columns = dict[str, Any]
"""A table by columns."""


@dataclass(frozen=True)
class PanelTable:
    """One table of the panel. `task`, `target`: its columns; `time`: the column that orders a user's rows, "": none."""

    name: str
    columns: Columns
    task: str
    target: str
    time: str = ""


def panel(seed: int) -> list[PanelTable]:
    """Return all tables. Those that are generated depend on `seed`."""
    return [make(np.random.default_rng([seed, place])) for place, make in enumerate(_TABLES)]


def _diabetes(rng: np.random.Generator) -> PanelTable:
    """Progression of diabetes (scikit-learn): 442 patients; a user is a practice of one sex and age group."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes(as_frame=True, scaled=False).frame
    groups = [f"{'MF'[int(sex) - 1]}-{int(age // 10)}" for sex, age in zip(data["sex"], data["age"], strict=True)]
    columns = {name: data[name].to_numpy() for name in data.columns if name != "sex"}
    return PanelTable("diabetes", {"practice": groups, **columns}, "practice", "target")


def _breast_cancer(rng: np.random.Generator) -> PanelTable:
    """Tumours (scikit-learn): 569 patients; 12 clinics whose instruments have gains and offsets of their own."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    clinic = rng.integers(0, 12, len(data.target))
    gain = rng.lognormal(0, 0.2, (12, data.data.shape[1]))
    names = [str(name).replace(" ", "_") for name in data.feature_names]
    columns = dict(zip(names, (data.data * gain[clinic]).T, strict=True))
    classes = ["malignant" if label == 0 else "benign" for label in data.target]
    return PanelTable(
        "breast_cancer", {"clinic": [f"c{c}" for c in clinic], **columns, "diagnosis": classes}, "clinic", "diagnosis"
    )


def _wine(rng: np.random.Generator) -> PanelTable:
    """Wines (scikit-learn): 178 of three growers; eight laboratories with unlike shares of the growers."""
    from sklearn.datasets import load_wine

    data = load_wine()
    shares = rng.dirichlet(np.ones(8), size=3)
    laboratory = [f"l{rng.choice(8, p=shares[label])}" for label in data.target]
    names = [str(name).replace("/", "_") for name in data.feature_names]
    columns = dict(zip(names, data.data.T, strict=True))
    return PanelTable(
        "wine", {"laboratory": laboratory, **columns, "grower": [f"g{k}" for k in data.target]}, "laboratory", "grower"
    )


def _users(rng: np.random.Generator, number: int, least: int, most: int) -> np.ndarray[Any, Any]:
    return np.repeat(np.arange(number), rng.integers(least, most + 1, number))


def _numbered(x: np.ndarray[Any, Any]) -> Columns:
    return {f"x{place}": column for place, column in enumerate(x.T)}


def _random_intercepts(rng: np.random.Generator) -> PanelTable:
    """Regression: one slope for all, a level for each user, few rows each."""
    user = _users(rng, 60, 5, 20)
    x = rng.normal(size=(len(user), 5))
    y = x @ np.array([1.0, -0.5, 0.3, 0, 0]) + 2 * rng.normal(size=60)[user] + rng.normal(size=len(user))
    return PanelTable("random_intercepts", {"user": user, **_numbered(x), "y": y + 50}, "user", "y")


def _random_slopes(rng: np.random.Generator) -> PanelTable:
    """Regression: slopes of each user's own around those of all."""
    user = _users(rng, 80, 8, 50)
    x = rng.normal(size=(len(user), 4))
    slopes = np.array([1.0, 0.5, 0, 0]) + 0.7 * rng.normal(size=(80, 4))
    y = (x * slopes[user]).sum(1) + 0.7 * rng.normal(size=len(user))
    return PanelTable("random_slopes", {"user": user, **_numbered(x), "y": y}, "user", "y")


def _pooled(rng: np.random.Generator) -> PanelTable:
    """Classes: one rule for all users, nothing to personalise; half of the columns are noise."""
    user = _users(rng, 30, 10, 40)
    x = rng.normal(size=(len(user), 10)) + 0.5 * rng.normal(size=(30, 10))[user]
    chance = 1 / (1 + np.exp(-(x[:, :5] @ np.array([1.2, -1, 0.8, 0.6, -0.4]) - 0.5)))
    y = np.where(rng.random(len(user)) < chance, "yes", "no")
    return PanelTable("pooled", {"user": user, **_numbered(x), "y": y}, "user", "y")


def _own_vocabularies(rng: np.random.Generator) -> PanelTable:
    """Classes: what a word means differs from user to user."""
    user = _users(rng, 50, 20, 60)
    word = rng.integers(0, 8, len(user))
    meaning = rng.integers(0, 3, (50, 8))
    x = rng.normal(size=(len(user), 3))
    noisy = rng.random(len(user)) < 0.1
    label = np.where(noisy, rng.integers(0, 3, len(user)), meaning[user, word])
    return PanelTable(
        "own_vocabularies",
        {"user": user, "word": [f"w{w}" for w in word], **_numbered(x), "y": [f"k{k}" for k in label]},
        "user",
        "y",
    )


def _drift(rng: np.random.Generator) -> PanelTable:
    """Regression in time: a user's level walks at random, and the inputs say little of it."""
    user = _users(rng, 40, 30, 60)
    day = np.concatenate([np.arange(number) for number in np.bincount(user)])
    steps = 0.5 * rng.normal(size=len(user))
    walk = np.concatenate([np.cumsum(steps[user == one]) for one in range(40)])
    x = rng.normal(size=(len(user), 4))
    y = 20 + 3 * rng.normal(size=40)[user] + walk + 0.3 * x[:, 0] + 0.3 * rng.normal(size=len(user))
    return PanelTable("drift", {"user": user, "day": day, **_numbered(x), "y": y}, "user", "y", "day")


def _nothing(rng: np.random.Generator) -> PanelTable:
    """Regression: nothing but a user's mean can be predicted."""
    user = _users(rng, 40, 10, 40)
    x = rng.normal(size=(len(user), 12))
    return PanelTable(
        "nothing", {"user": user, **_numbered(x), "y": 3 * rng.normal(size=40)[user] + rng.normal(size=len(user))}, "user", "y"
    )


def _uneven(rng: np.random.Generator) -> PanelTable:
    """Classes: 8 % are ill, by one rule with a threshold of each hospital's own."""
    user = _users(rng, 24, 60, 150)
    x = rng.normal(size=(len(user), 8))
    threshold = 3.2 + 0.5 * rng.normal(size=24)
    score = x[:, :3].sum(1) * 1.2 + 0.7 * rng.normal(size=len(user))
    return PanelTable(
        "uneven", {"hospital": user, **_numbered(x), "ill": np.where(score > threshold[user], "ill", "well")}, "hospital", "ill"
    )


def _curved(rng: np.random.Generator) -> PanelTable:
    """Regression: a curved rule that all share, shifted and stretched by each user."""
    user = _users(rng, 60, 15, 40)
    x = rng.uniform(-2, 2, (len(user), 3))
    shape = np.sin(2 * x[:, 0]) * x[:, 1] + x[:, 2] ** 2
    y = rng.lognormal(0, 0.3, 60)[user] * shape + rng.normal(size=60)[user] + 0.2 * rng.normal(size=len(user))
    return PanelTable("curved", {"user": user, **_numbered(x), "y": y}, "user", "y")


def _redundant(rng: np.random.Generator) -> PanelTable:
    """Regression: two nearly equal columns, whose difference is what counts, with a user's own weights."""
    user = _users(rng, 40, 20, 40)
    first = rng.normal(size=len(user))
    second = first + 0.05 * rng.normal(size=len(user))
    weights = 1 + 0.5 * rng.normal(size=40)
    y = weights[user] * (first - second) * 20 + first + 0.05 * rng.normal(size=len(user))
    return PanelTable("redundant", {"user": user, "a": first, "b": second, "y": y}, "user", "y")


_TABLES: tuple[Callable[[np.random.Generator], PanelTable], ...] = (
    _diabetes,
    _breast_cancer,
    _wine,
    _random_intercepts,
    _random_slopes,
    _pooled,
    _own_vocabularies,
    _drift,
    _nothing,
    _uneven,
    _curved,
    _redundant,
)


def main() -> None:
    """Print for every table whether the default run beats the best baseline, by the metric that the run chose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the tables, each with a split of its own")
    parser.add_argument("--tables", default="", help="names with commas between them; by default all")
    parser.add_argument("--advise", action="store_true", help="try `quickbloom advise` in place of the default run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs; repeat")
    asked = parser.parse_args()
    given = {key: scalar(value) for key, value in map(split_assignment, asked.set)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, asked.seeds + 1):
            for table in panel(seed):
                if asked.tables and table.name not in asked.tables.split(","):
                    continue
                about = advised if asked.advise else line
                print(about(table, seed, given, Path(folder) / f"{table.name}-{seed}"), flush=True)


def line(table: PanelTable, seed: int, settings: Columns, output: Path) -> str:
    """Return what came out of the default run on one table."""
    settings = {"test-tasks": 0.3, **settings}
    started = time.monotonic()
    ran = quickbloom.run(
        data=table.columns,
        task=table.task,
        target=table.target,
        time=table.time or None,
        seed=seed,
        output=output,
        progress=False,
        settings=settings,
    )
    found = ran.summary["baselines"]
    metric = named(found["metric"])
    scores = found["scores"][metric.name]
    model, best = scores["after"]["mean"], scores[found["best"]]["mean"]
    gain, half = found["gain"], math.inf if found["ci95"] is None else found["ci95"]
    said = "better" if gain > half else "worse" if gain < -half else "within"
    return (
        f"{seed} {table.name:18} {metric.name:17} model {metric.number(model):>8}  {found['best']:13} "
        f"{metric.number(best):>8}  gain {metric.scale * gain:8.3g} ± {metric.scale * half:<8.3g} {said:6} "
        f"{time.monotonic() - started:5.1f} s"
    )


def advised(table: PanelTable, seed: int, settings: Columns, output: Path) -> str:
    """Return what `quickbloom advise` says of one table, and whether nothing that it tried is better for certain."""
    started = time.monotonic()
    texts = [assignment(key, value) for key, value in settings.items()]
    with as_file(table.columns) as path:
        found = advise_on(str(path), table.task, table.target, table.time or None, output, seed=seed, assignments=texts)
    metric = named(found["metric"])
    row = next(one for one in found["candidates"] if one["name"] == found["take"])
    behind, half = row["behind"]["mean"], row["behind"]["half"]
    said = "best" if behind <= 0 else "within" if half is not None and behind <= half else "WRONG"
    return (
        f"{seed} {table.name:18} {metric.name:17} {found['kind']:9} {row['name']:15} {metric.number(row['telling']):>8}  "
        f"behind {metric.scale * behind:8.3g} ± {metric.scale * (half or math.inf):<8.3g} {said:6} "
        f"{time.monotonic() - started:5.1f} s"
    )


if __name__ == "__main__":
    main()
