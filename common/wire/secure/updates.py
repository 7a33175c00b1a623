"""What a node contributes to a secure sum as one row of numbers, and what the server reads from the sum.

the meta-gradient times its weight, tensor by tensor in the order of their names | weight | losses | tasks | within
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
    """The sum over all nodes. `gradient`: mean over tasks, as of one node that hosts them all; zero where `weight` is.

    `losses`: sum over the `tasks` that contributed; `within`: how many of them did not have to be clipped.
    """

    gradient: Params
    weight: float
    losses: float
    tasks: int
    within: float


def length(like: Params) -> int:
    """How many numbers the row has for a model with these tensors."""
    return sum(value.numel() for value in like.values()) + _COUNTS


def to_row(gradient: Params, weight: float, losses: Sequence[float], within: float) -> Numbers:
    """A node's row. `losses`: of every task, NaN for one that did not contribute.

    Raises SecureError for a weight that would be clipped: the mean would be wrong by as much, and nobody could see it.
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
    """The sum of rows for a model with the tensors of `like`."""
    names = sorted(like)
    weight, losses, tasks, within = (float(number) for number in row[-_COUNTS:])
    means = torch.from_numpy(row[:-_COUNTS] / max(weight, 1e-300))
    parts = torch.split(means, [like[name].numel() for name in names])
    gradient = {name: part.view(like[name].shape).to(like[name].dtype) for name, part in zip(names, parts, strict=True)}
    return Totals({name: gradient[name] for name in like}, weight, losses, round(tasks), within)
