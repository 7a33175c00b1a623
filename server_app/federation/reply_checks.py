"""Checks a reply beyond its form: it must fit the model, the settings and the roll call.

A node that sends another reply is faulty or hostile. The reply is dropped and named; after three of
them the node is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.datasets.base import DataSpec, TaskInfo
from quickbloom.common.maths.params import Params, mismatch, norm
from quickbloom.common.metric import Metric
from quickbloom.common.wire.compression import CodingError, decode
from quickbloom.common.wire.messages import EvaluateReply, TrainReply, WireError

ROUNDING = 1e-6
_ALWAYS_KNOWN = ("accuracy", "balanced_accuracy")
OF_CLIPPED = 1e-3
"""Factor by which a mean of clipped meta-gradients may exceed the clipping norm, so that float32 rounding of honest sums does
not decide whether a reply is accepted."""


def decoded(reply: TrainReply, kind: str, model: Params) -> TrainReply:
    """Return the reply with its decoded meta-gradient. Raises WireError if it was not encoded, or wrongly."""
    try:
        return replace(reply, gradient=decode(reply.gradient, kind, model))
    except CodingError as error:
        raise WireError(str(error)) from None


def check_update(reply: TrainReply, model: Params, most_weight: float, max_norm: float, *, rounding: float = ROUNDING) -> None:
    """Raise WireError unless the meta-gradient has the keys, shapes and dtypes of `model`, and weight and norm are in bounds.

    `most_weight`: largest weight of the requested tasks; `max_norm`: of the meta-gradient over all
    tensors, 0: any, with a relative `rounding`.
    """
    if reason := mismatch(reply.gradient, model):
        raise WireError(reason)
    if reply.weight > most_weight * (1 + ROUNDING):
        raise WireError(f"`weight` is {reply.weight:g}, but the tasks asked for can have at most {most_weight:g}")
    if max_norm and (length := norm(reply.gradient)) > max_norm * (1 + rounding):
        raise WireError(f"its meta-gradient has norm {length:.6g}, above the {max_norm:g} that is allowed")


def most_weight(algorithm: Algorithm, tasks: Sequence[TaskInfo], losses: Sequence[float], *, alike: bool = False) -> float:
    """Return the largest weight of these tasks together, by the counts of the roll call; tasks without a loss weigh nothing.

    `alike`: every task weighs 1, as under privacy.
    """
    taking_part = [task for task, loss in zip(tasks, losses, strict=True) if math.isfinite(loss)]
    return sum(1.0 if alike else algorithm.weight(task.num_support + task.num_query) for task in taking_part)


def check_scores(reply: EvaluateReply, spec: DataSpec, metric: Metric) -> None:
    """Raise WireError unless bounded scores lie in [0, 1]. An error may be any number from 0, infinity and NaN.

    NaN is a score that the rows of a task cannot have, which accuracies always can.
    """
    inside = (reply.metrics >= 0) & (reply.metrics <= 1 + ROUNDING)
    unknown = np.isnan(reply.metrics) & (metric.name not in _ALWAYS_KNOWN)
    if metric.bounded and not (inside | unknown).all():
        raise WireError(f"`scores` must be a {metric.title} from 0 to 1")
    if reply.second is not None and spec.kind == "classification" and not (reply.second <= 1 + ROUNDING).all():
        raise WireError("`second` must be accuracies from 0 to 1")
