"""Per-FedAvg (Fallah, Mokhtari, Ozdaglar 2020, "Personalized Federated Learning with Theoretical Guarantees", Algorithm 1).

A task takes tau local meta-steps on the MAML objective of one inner step, and sends theta - w_tau:

    w <- w - beta (I - alpha H(w)) v,    v = grad L_Q(w - alpha grad L_S(w)),    H = Hessian of L_S

`variant = "fo"` drops H; `"hf"` (Hessian-free) multiplies H with v without forming it. Here that product is exact; the paper
approximates it with a difference of two gradients. The paper draws three independent batches for every local step; here all
steps of a round share one draw of support and query.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions
from quickbloom.common.maths.batch import Episode, Minibatches
from quickbloom.common.maths.inner_loop import gradient_and_hessian, slope
from quickbloom.common.maths.params import Params, add, subtract


class PerFedAvgOptions(AlgorithmOptions):
    variant: Literal["fo", "hf"] = Field("hf", description="fo: first order; hf: with the Hessian-vector product")
    local_steps: int = Field(5, ge=1, le=10_000, description="local meta-steps of a task in a round (tau)")
    local_lr: float = Field(0.0, ge=0, description="learning rate of the local meta-steps (beta); 0: the same as `inner-lr`")
    outer_optimizer: Literal["sgd", "adam"] = Field("sgd", description="the server's optimizer")
    outer_lr: float = Field(1.0, gt=0, description="learning rate of the server; 1 replaces the model by the mean")


class PerFedAvg(Algorithm):
    """g = theta - w_tau after tau local meta-steps."""

    name = "perfedavg"
    Options: ClassVar[type[AlgorithmOptions]] = PerFedAvgOptions

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        w, beta = meta, self.options.local_lr or self.options.inner_lr
        for _ in range(self.options.local_steps):
            w = add(w, self.local_meta_gradient(w, episode), -beta)
        adapted = add(w, slope(self.learner.mean_loss, w, episode.support), -self.options.inner_lr)
        return subtract(meta, w), self.learner.loss(adapted, episode.query)

    def local_meta_gradient(self, w: Params, episode: Episode) -> Params:
        """Return (I - alpha H(w)) v, or v alone if `variant` is "fo"."""
        alpha = self.options.inner_lr
        gradient, times_hessian = gradient_and_hessian(lambda w: self.learner.loss(w, episode.support), w)
        v: Params = slope(self.learner.mean_loss, add(w, gradient, -alpha), episode.query)
        return v if self.options.variant == "fo" else add(v, times_hessian(v), -alpha)
