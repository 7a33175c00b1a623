"""iMAML (Rajeswaran, Finn, Kakade, Levine 2019, "Meta-Learning with Implicit Gradients", Algorithms 1 and 2).

The inner problem is phi = argmin L_S(phi) + lambda / 2 ||phi - theta||^2, solved approximately by proximal
gradient steps. At its solution the meta-gradient does not depend on the path there: it is (I + H / lambda)^-1
grad L_Q(phi), with H = Hessian of L_S at phi (their Lemma 1). Conjugate gradient with Hessian-vector products
solves this system.

If along some direction the loss is concave by more than lambda, the matrix is not positive definite and the
solution is not the gradient of any function. `damping` is therefore added to lambda in the matrix, not in the
inner problem. With larger damping g approaches that of first-order MAML at the same phi.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions, InnerLoopOptions
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.fast_paths import gradient_and_loss, gradient_and_product
from quickbloom.common.maths.inner_loop import descend_towards, endpoint_towards
from quickbloom.common.maths.params import Params, add, dot, subtract


class ImamlOptions(InnerLoopOptions):
    inner_steps: int = Field(10, ge=1, le=10_000, description="steps towards the solution of the inner problem in training")
    strength: float = Field(0.3, gt=0, description="how strongly personal parameters are drawn to the starting point (lambda)")
    damping: float = Field(10.0, ge=0, description="added to lambda in the implicit gradient alone; 0: exactly the paper's")
    cg_steps: int = Field(5, ge=1, le=1000, description="steps of conjugate gradient")


class Imaml(Algorithm):
    """g = (I + H / lambda)^-1 grad L_Q(phi), the implicit gradient."""

    name = "imaml"
    Options: ClassVar[type[AlgorithmOptions]] = ImamlOptions

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        batches = iter([episode.support] * self.options.inner_steps)
        phi = endpoint_towards(self.learner.mean_loss, meta, meta, batches, self.options.inner_lr, self.options.strength)
        gradient, loss = gradient_and_loss(self.learner, phi, episode.query)
        _, times_hessian = gradient_and_product(self.learner, phi, episode.support)

        def matrix(p: Params) -> Params:
            return add(p, times_hessian(p), 1 / (self.options.strength + self.options.damping))

        return conjugate_gradient(matrix, gradient, self.options.cg_steps), loss

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the proximal gradient steps towards the solution of the inner problem, in training and at evaluation."""
        return descend_towards(self.learner.mean_loss, meta, meta, iter([support] * steps), lr, self.options.strength)


def conjugate_gradient(matrix: Callable[[Params], Params], b: Params, steps: int) -> Params:
    """Return an approximate solution x of matrix(x) = b after `steps` steps from x = 0.

    In exact arithmetic the solution is exact after as many steps as b has numbers. `matrix` must be
    symmetric. Along a direction of non-positive curvature there is no minimum, and x does not move.
    """
    x = {name: torch.zeros_like(value) for name, value in b.items()}
    residual = direction = b
    norm = dot(residual, residual)
    for _ in range(steps):
        image = matrix(direction)
        curvature = dot(direction, image)
        size = torch.where(curvature > 0, norm / curvature, 0.0)
        x = add(x, direction, size)
        residual = subtract(residual, {name: size * value for name, value in image.items()})
        before, norm = norm, dot(residual, residual)
        # A zero residual means that x is the solution; 0 / 0 must not turn it into NaN.
        direction = add(residual, direction, torch.where(before > 0, norm / before, 0.0))
    return x
