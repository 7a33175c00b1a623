"""Reptile (Nichol, Achiam, Schulman 2018, "On First-Order Meta-Learning Algorithms", Algorithm 2, batched version).

theta <- theta + epsilon * mean over tasks of (phi_k - theta), with epsilon falling linearly to 0. That is SGD
with rate epsilon on g = theta - phi_k, so the server needs no special case. `inner_lr` is the paper's inner
step size, `outer_lr` its epsilon. All tasks have equal weight, whatever their number of examples. The paper's
inner loop is Adam with beta1 = 0; here it is plain SGD, since optimizer state would have to travel from task
to task.
"""

from typing import ClassVar, Literal

from pydantic import Field

from quickbloom.common.algorithms.base import AlgorithmOptions, ZeroHeadOptions
from quickbloom.common.algorithms.local_sgd import LocalSgd, LocalSgdOptions


class ReptileOptions(LocalSgdOptions, ZeroHeadOptions):
    outer_optimizer: Literal["sgd", "adam"] = Field("sgd", description="the server's optimizer")
    outer_lr: float = Field(1.0, gt=0, description="epsilon: how far the server moves towards the mean of the adapted tasks")
    outer_decay: bool = Field(True, description="let epsilon fall linearly to 0 over the rounds, as in the paper")


class Reptile(LocalSgd):
    """k SGD steps on minibatches of support and query; g = theta - phi_k."""

    name = "reptile"
    Options: ClassVar[type[AlgorithmOptions]] = ReptileOptions
    plain_steps = False
