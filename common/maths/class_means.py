"""The mean features of every class over all tasks, as meta-parameters: what tasks tell of theirs, and what becomes of it.

A task tells sums and counts, so that a class that it lacks pulls no mean: C_j = sum over tasks of the features of j / sum over
tasks of the examples of j. A mean over tasks has the same quotient. A class that nobody showed in a round keeps its mean.
"""

import torch
from torch import Tensor

from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.maths.prototypes import members_of

MEANS, KNOWN = "class_means", "class_known"
"""Names of the tensors: means [classes, features], and whether a class has one, 1 or 0 [classes]. What a task tells has the
same names: sums of features, and numbers of examples."""


def unknown(learner: Learner, size: int) -> Params:
    """Return the means of `size` features before any is known."""
    means = torch.zeros(learner.outputs, size, dtype=learner.dtype, device=learner.device)
    return {MEANS: means, KNOWN: means.new_zeros(learner.outputs)}


def sums_of(features: Tensor, batch: Batch, classes: int) -> Params:
    """Return what a task tells of its features [n, size]."""
    members = members_of(batch, classes)
    return {MEANS: members.T @ features, KNOWN: members.sum(dim=0)}


def renewed(before: Params, sums: Params) -> Params:
    """Return the means after a round. `sums`: the mean over tasks of what they told."""
    counts = sums[KNOWN]
    seen = counts > 0
    # Divided where there is something to divide by, however few of the tasks have the class.
    means = sums[MEANS] / torch.where(seen, counts, 1.0).unsqueeze(-1)
    return {
        MEANS: torch.where(seen.unsqueeze(-1), means, before[MEANS]),
        KNOWN: torch.where(seen, torch.ones_like(counts), before[KNOWN]),
    }


def distance_to_own(features: Tensor, batch: Batch, known: Params) -> Tensor:
    """Return the mean over the examples of the squared distance per feature to the mean of their class; a scalar.

    Examples of a class without a mean count as 0.
    """
    gaps = (features - known[MEANS][batch.y]).square().mean(dim=-1)
    weight = batch.weight * known[KNOWN][batch.y]
    return (torch.where(weight > 0, gaps, 0.0) * weight).sum() / batch.weight.sum()
