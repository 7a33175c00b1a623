"""FedRoD (Chen, Chao 2022, "On Bridging Generic and Personalized Federated Learning for Image Classification", Algorithm 1).

One model with two heads on the same features. The generic one learns the balanced softmax loss, which makes up for
the task's own shares of the classes; it and the body travel. The personal head stays on the node and is trained by the usual
loss of the sum of both heads' outputs, without a gradient to features or generic head. For a linear last
layer that sum is one model whose last layer is the sum of the two, which is what a task predicts with. g = theta - phi_k of
body and generic head, weighted by the number of examples.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad

from quickbloom.common.algorithms.base import AlgorithmOptions
from quickbloom.common.algorithms.local_sgd import AveragedOptions, KeepsState
from quickbloom.common.maths.batch import Batch, Episode, Minibatches
from quickbloom.common.maths.inner_loop import Loss, built_on, descend, slope
from quickbloom.common.maths.learner import Learner, cross_entropy, mean_over_examples
from quickbloom.common.maths.linear_head import LinearHead
from quickbloom.common.maths.params import Params, add, split, subtract
from quickbloom.common.maths.prototypes import members_of


class FedRod(KeepsState):
    """g = theta - phi_k by balanced softmax; a personal head, added to the generic one, is kept on the node."""

    name = "fedrod"
    Options: ClassVar[type[AlgorithmOptions]] = AveragedOptions
    kinds = ("classification",)
    first_order = False

    def __init__(self, options: Any, learner: Learner) -> None:
        super().__init__(options, learner)
        head = LinearHead(learner, self.name, "adds a personal layer to")
        self._head = head.weight, head.bias

    def fresh(self) -> Params:
        """Return a personal head of zeros, with which a new task predicts as the generic model does."""
        return split(self.learner.zeros(), self._head)[0]

    def weight(self, num_examples: int) -> float:
        return float(num_examples)

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        balanced, lr = self._balanced(episode), self.options.inner_lr
        generic, personal = meta, kept
        for batch in minibatches.batches(episode):
            of_head = slope(self._of_both(generic), personal, batch)
            generic = add(generic, grad(balanced)(generic, batch), -lr)
            personal = add(personal, of_head, -lr)
        # The query examples were trained on as well, so this is a training loss.
        return subtract(meta, generic), self._of_both(generic)(personal, episode.query), personal

    def _balanced(self, episode: Episode) -> Loss:
        """Return the cross-entropy of outputs to which the logarithm of the task's number of examples per class is added."""
        counts = sum(members_of(batch, self.learner.outputs).sum(dim=0) for batch in episode)
        assert isinstance(counts, Tensor)
        shift = torch.where(counts > 0, counts.clamp(min=1).log(), -1e30)

        def loss(params: Params, batch: Batch) -> Tensor:
            return mean_over_examples(cross_entropy(self.learner.apply(params, batch.x) + shift, batch.y), batch.weight)

        return loss

    def _of_both(self, generic: Params) -> Loss:
        """Return the loss of the sum of both heads, as a function of the personal one."""
        return built_on(self.learner.mean_loss, lambda personal, batch: self.learner.loss(_sum(generic, personal), batch))

    def adaptation_path(self, meta: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the generic model, then with a personal head after 1, .. `steps` steps."""
        return self.personal_path(meta, self.fresh(), support, lr, steps)

    def personal_path(self, meta: Params, kept: Params, support: Batch, lr: float | Tensor, steps: int) -> Iterator[Params]:
        """Yield the model with both heads, of which the personal one takes the steps."""
        path = descend(self._of_both(meta), kept, iter([support] * steps), lr)
        return (_sum(meta, personal) for personal in path)


def _sum(generic: Params, personal: Params) -> Params:
    return {**generic, **{name: generic[name] + value for name, value in personal.items()}}
