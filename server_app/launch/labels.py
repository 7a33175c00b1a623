"""Whether users' classes mean the same for all, or are each user's own, told by their data behind a frozen encoder.

Names do not tell: `cmd0` of one user may be another command than `cmd0` of the next. So two things are looked at, in training
rows alone: whether users have the same classes at all, and, if they do, whether a class of one user lies nearest, among all
classes of another, to the class of the same name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.own import Own, is_encoded
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.formatting import counted
from quickbloom.common.randomness import generator

MOST_TASKS = 30
"""Users that are compared, each with each."""
_OVERLAP = 0.5
"""Share of the classes of two users together that both have, below which classes are each user's own."""
_ABOVE_CHANCE = 0.25
"""Of the way from chance to certainty, below which classes of one name lie no nearer than others."""


@dataclass(frozen=True)
class Labels:
    """What was found. `own`: each user has classes of their own; `why`: in words, as the part of a sentence."""

    own: bool
    why: str


def look_at(own: Own, task_ids: Sequence[str], config: RunConfig) -> Labels | None:
    """Return what the support and query rows of these tasks say of their classes; None if that cannot be told.

    It takes classes, a frozen encoder, and two users or more.
    """
    if own.kind != "classification" or not is_encoded(own.spec) or len(task_ids) < 2:
        return None
    some = generator(config.seed, "labels").permutation(sorted(task_ids))[:MOST_TASKS]
    centred = _centred({str(task_id): _means(own, str(task_id)) for task_id in some})
    return of_means(list(centred.values()))


def of_means(users: Sequence[dict[int, Array]]) -> Labels:
    """Return the same for class means by class, of two users or more."""
    pairs = list(permutations(users, 2))
    overlap = float(np.mean([len(one.keys() & other.keys()) / len(one.keys() | other.keys()) for one, other in pairs]))
    who = counted(len(users), "user")
    if overlap < _OVERLAP:
        return Labels(True, f"two users share {100 * overlap:.0f} % of their classes on average, of {who} compared")
    hits = [_nearest(mean, other) == label for one, other in pairs for label, mean in one.items() if label in other]
    chances = [1 / len(other) for one, other in pairs for label in one if label in other]
    hit, chance = float(np.mean(hits)), float(np.mean(chances))
    told = f"a class lies nearest to another user's class of its name in {100 * hit:.0f} % of cases"
    return Labels(hit - chance < _ABOVE_CHANCE * (1 - chance), f"{told} (by chance {100 * chance:.0f} %), of {who} compared")


def _means(own: Own, task_id: str) -> dict[int, Array]:
    """Return the mean input of every class in the support and query rows of a task."""
    rows = np.concatenate(own.rows[task_id][:2])
    batch = own.batch(own.preparation_by(rows), rows)
    x, y = batch.x.double().numpy(), batch.y.numpy()
    return {int(label): x[y == label].mean(axis=0) for label in np.unique(y)}


def _centred(users: dict[str, dict[int, Array]]) -> dict[str, dict[int, Array]]:
    """Return the means less the mean of all, which says what all examples have in common."""
    middle = np.mean([mean for user in users.values() for mean in user.values()], axis=0)
    return {name: {label: mean - middle for label, mean in user.items()} for name, user in users.items()}


def _nearest(mean: Array, user: dict[int, Array]) -> int:
    """Return the class of a user with the nearest mean."""
    return min(user, key=lambda label: float(np.square(user[label] - mean).sum()))
