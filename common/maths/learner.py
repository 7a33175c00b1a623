"""A torch module seen as pure functions of its parameters: what the algorithms work on."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.params import Params


class Learner:
    """A model and its loss, as pure functions of named parameters.

    Losses are means over the examples of positive weight. Works under `torch.func.vmap` and to any order of differentiation.
    """

    def __init__(self, module: nn.Module, kind: str, outputs: int = 0) -> None:
        """`outputs`: classes or targets of the data; only an algorithm that builds its own classifier asks for them."""
        if running := [name for name, _ in module.named_buffers()]:
            raise ConfigError(
                f"`model` keeps running state in the buffer `{running[0]}`, which cannot be averaged over tasks: use group "
                "norm, or batch norm with track_running_stats=False"
            )
        self.module = module
        self.structure_on: torch.device | None = None
        """Where to compute, for a module that is only a structure: its parameters then have shapes and no numbers."""
        self.kind = kind
        self.outputs = outputs
        self.last_layer: str | None = None
        """The layer that runs last, once somebody has watched; until then the one that was made last counts as it."""
        # BatchNorm without running state takes its statistics over the batch: then padding would change the result.
        self.mixes_examples = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())

    def initial(self) -> Params:
        """The module's own parameters: a copy."""
        return {name: value.detach().clone() for name, value in self.module.named_parameters()}

    @property
    def device(self) -> torch.device:
        """Where the module's parameters are, or would be."""
        return self.structure_on or next(self.module.parameters()).device

    def to(self, device: torch.device) -> None:
        """Compute on this device."""
        if self.structure_on is None:
            self.module.to(device)
        else:
            self.structure_on = device

    def drop_numbers(self) -> None:
        """Keep the structure of the module alone, which is all that is needed where parameters come from elsewhere."""
        self.structure_on = self.device
        self.module.to("meta")

    @property
    def dtype(self) -> torch.dtype:
        """Of the module's parameters."""
        return next(self.module.parameters()).dtype

    def head(self, setting: str, names: str) -> list[str]:
        """The parameters of the head. `names`: "auto" for those of `last_layer`, else their beginnings with commas between.

        Raises ConfigError, which names `setting`, if that is none or all of the model's parameters.
        """
        parameters = [name for name, _ in self.module.named_parameters()]
        starts = tuple(part.strip() for part in names.split(",") if part.strip())
        if names == "auto":
            layers = [name for name, module in self.module.named_modules() if list(module.parameters(recurse=False))]
            last = layers[-1] if self.last_layer is None else self.last_layer
            starts = (f"{last}." if last else "",)
        head = [name for name in parameters if name.startswith(starts)]
        if not 0 < len(head) < len(parameters):
            raise ConfigError(
                f"`{setting}` must name some but not all parameters of the model by how they begin ({', '.join(parameters)}), "
                f"got '{names}' for {len(head)} of {len(parameters)}"
            )
        return head

    def apply(self, params: Params, x: Tensor) -> Tensor:
        """Model outputs [n, outputs] for the inputs `x` [n, ...]."""
        result: Tensor = functional_call(self.module, params, (x,))
        return result

    def _losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Loss per example [n]: cross-entropy, or the squared error averaged over the outputs."""
        return cross_entropy(outputs, y) if self.kind == "classification" else (outputs - y).square().mean(dim=-1)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Weighted mean loss over the batch; a scalar."""
        return mean_over_examples(self._losses(self.apply(params, batch.x), batch.y), batch.weight)

    def score(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, accuracy) over the batch, or (loss, mean squared error) for regression; two scalars."""
        outputs = self.apply(params, batch.x)
        losses = self._losses(outputs, batch.y)
        metrics = losses if self.kind == "regression" else hits(outputs, batch.y)
        return mean_over_examples(losses, batch.weight), mean_over_examples(metrics, batch.weight)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per example [n] of `logits` [n, classes] and class indices `y` [n]."""
    # F.cross_entropy by its definition: under vmap that function falls apart into slower pieces.
    # Shifted first, or the difference of two large logits would lose all its digits.
    logits = logits - logits.detach().amax(dim=-1, keepdim=True)
    return logits.logsumexp(dim=-1) - logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def hits(logits: Tensor, y: Tensor) -> Tensor:
    """1 per example [n] whose largest logit is that of its class, else 0; 0 as well where one of its logits is not finite."""
    # Of NaNs the first counts as the largest: a model that diverged would seem to know class 0.
    right = (logits.argmax(dim=-1) == y) & logits.isfinite().all(dim=-1)
    return right.to(logits.dtype)


def mean_over_examples(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of one value per example; a scalar."""
    # where() and not a product alone: an infinite loss on a padded row must not become NaN.
    return (torch.where(weight > 0, values, 0.0) * weight).sum() / weight.sum()
