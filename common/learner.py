"""A torch module seen as pure functions of its parameters: what the algorithms work on."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.batch import Batch
from common.errors import ConfigError
from common.params import Params


class Learner:
    """A model and its loss, as pure functions of named parameters.

    Losses are means over the examples of positive weight. Works under `torch.func.vmap` and to any order of differentiation.
    """

    def __init__(self, module: nn.Module, kind: str) -> None:
        if running := [name for name, _ in module.named_buffers()]:
            raise ConfigError(
                f"`model` keeps running state in the buffer `{running[0]}`, which cannot be averaged over tasks: use group "
                "norm, or batch norm with track_running_stats=False"
            )
        self.module = module
        self.kind = kind
        # BatchNorm without running state takes its statistics over the batch: then padding would change the result.
        self.mixes_examples = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())

    def initial(self) -> Params:
        """The module's own parameters: a copy."""
        return {name: value.detach().clone() for name, value in self.module.named_parameters()}

    def apply(self, params: Params, x: Tensor) -> Tensor:
        """Model outputs [n, outputs] for the inputs `x` [n, ...]."""
        result: Tensor = functional_call(self.module, params, (x,))
        return result

    def _losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Loss per example [n]: cross-entropy, or the squared error averaged over the outputs."""
        if self.kind == "classification":
            # F.cross_entropy by its definition: under vmap that function falls apart into slower pieces.
            # Shifted first, or the difference of two large logits would lose all its digits.
            outputs = outputs - outputs.detach().amax(dim=-1, keepdim=True)
            return outputs.logsumexp(dim=-1) - outputs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return (outputs - y).square().mean(dim=-1)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Weighted mean loss over the batch; a scalar."""
        return _mean(self._losses(self.apply(params, batch.x), batch.y), batch.weight)

    def score(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, accuracy) over the batch, or (loss, mean squared error) for regression; two scalars."""
        outputs = self.apply(params, batch.x)
        losses = self._losses(outputs, batch.y)
        hits = losses if self.kind == "regression" else (outputs.argmax(dim=-1) == batch.y).to(losses.dtype)
        return _mean(losses, batch.weight), _mean(hits, batch.weight)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    # where() and not a product alone: an infinite loss on a padded row must not become NaN.
    return (torch.where(weight > 0, values, 0.0) * weight).sum() / weight.sum()
