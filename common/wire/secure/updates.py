"""A node's contribution to a secure sum as one row of numbers, and the reading of the summed rows.

weighted meta-gradient, tensor by tensor in the order of their names | weight | losses | tasks | within
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quickbloom.common.maths.params import Params
from quickbloom.common.wire.secure.masks import LARGEST
from quickbloom.common.wire.secure.protocol import SecureError

_COUNTS = 4

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Totals:
    """The sum over all nodes.

    `gradient`: mean over tasks, as if one node hosted them all; zero if `weight` is. `losses`: sum
    over the `tasks` that contributed; `within`: number of those that did not need clipping.
    """

    gradient: Params
    weight: float
    losses: float
    tasks: int
    within: float


def length(like: Params) -> int:
    """Return the length of a row for a model with these tensors."""
    return sum(value.numel() for value in like.values()) + _COUNTS


def to_row(gradient: Params, weight: float, losses: Sequence[float], within: float) -> Numbers:
    """Return a node's row. `losses`: one per task, NaN for a task that did not contribute.

    Raises SecureError for a weight that would be clipped: the mean would be wrong, and nobody could
    notice.
    """
    if weight > LARGEST:
        raise SecureError(
            f"the tasks of this node weigh {weight:.10g} together, and in a secure sum a node can have at most {LARGEST:.10g}: "
            "spread them over more nodes"
        )
    parts = [gradient[name].detach().cpu().double().flatten().numpy() * weight for name in sorted(gradient)]
    finite = [loss for loss in losses if np.isfinite(loss)]
    return np.concatenate([*parts, [weight, sum(finite), len(finite), within]]).astype(np.float64)


def from_row(row: np.ndarray[Any, Any], like: Params) -> Totals:
    """Return the totals in a sum of rows, for a model with the tensors of `like`."""
    names = sorted(like)
    weight, losses, tasks, within = (float(number) for number in row[-_COUNTS:])
    means = torch.from_numpy(row[:-_COUNTS] / max(weight, 1e-300))
    parts = torch.split(means, [like[name].numel() for name in names])
    gradient = {name: part.view(like[name].shape).to(like[name].dtype) for name, part in zip(names, parts, strict=True)}
    return Totals({name: gradient[name] for name in like}, weight, losses, round(tasks), within)
