"""A torch module as pure functions of its parameters."""

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
        """Raise ConfigError if the module keeps running state.

        `outputs`: classes or targets of the data; needed only by an algorithm that builds its own
        classifier.
        """
        if running := [name for name, _ in module.named_buffers()]:
            raise ConfigError(
                f"`model` keeps running state in the buffer `{running[0]}`, which cannot be averaged over tasks: use group "
                "norm, or batch norm with track_running_stats=False"
            )
        self.module = module
        self.structure_on: torch.device | None = None
        """Device to compute on, for a module on the "meta" device, whose parameters have shapes but no numbers."""
        self.kind = kind
        self.outputs = outputs
        self.last_layer: str | None = None
        """The layer that runs last, once a forward pass was observed. Until then the layer made last counts as it."""
        # BatchNorm without running state uses batch statistics, which padding would change.
        self.mixes_examples = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())

    def initial(self) -> Params:
        """Return a copy of the module's own parameters."""
        return {name: value.detach().clone() for name, value in self.module.named_parameters()}

    @property
    def device(self) -> torch.device:
        """The device of the module's parameters, or the one to compute on if they have no numbers."""
        return self.structure_on or next(self.module.parameters()).device

    def to(self, device: torch.device) -> None:
        """Move the computation to `device`."""
        if self.structure_on is None:
            self.module.to(device)
        else:
            self.structure_on = device

    def drop_numbers(self) -> None:
        """Keep the structure of the module alone, which suffices if the parameters come from elsewhere."""
        self.structure_on = self.device
        self.module.to("meta")

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the module's parameters."""
        return next(self.module.parameters()).dtype

    def last(self) -> str:
        """Return the name of the layer with parameters that runs last, or before that is known was made last."""
        layers = [name for name, module in self.module.named_modules() if list(module.parameters(recurse=False))]
        return layers[-1] if self.last_layer is None else self.last_layer

    def head(self, setting: str, names: str) -> list[str]:
        """Return the names of the head's parameters.

        `names`: comma-separated name prefixes, or "auto" for the parameters of `last_layer`. Raises
        ConfigError, which names `setting`, if that is none or all of the model's parameters.
        """
        parameters = [name for name, _ in self.module.named_parameters()]
        starts = tuple(part.strip() for part in names.split(",") if part.strip())
        if names == "auto":
            last = self.last()
            starts = (f"{last}." if last else "",)
        head = [name for name in parameters if name.startswith(starts)]
        if not 0 < len(head) < len(parameters):
            raise ConfigError(
                f"`{setting}` must name some but not all parameters by how their names begin ({', '.join(parameters)}), got "
                f"'{names}', which fits {len(head)} of {len(parameters)}"
            )
        return head

    def apply(self, params: Params, x: Tensor) -> Tensor:
        """Return the model's outputs [n, outputs] for the inputs `x` [n, ...]."""
        result: Tensor = functional_call(self.module, params, (x,))
        return result

    def _losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the loss per example [n]: cross-entropy, or the squared error averaged over the outputs."""
        return cross_entropy(outputs, y) if self.kind == "classification" else (outputs - y).square().mean(dim=-1)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the weighted mean loss over the batch; a scalar."""
        return mean_over_examples(self._losses(self.apply(params, batch.x), batch.y), batch.weight)

    def score(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (loss, accuracy) over the batch, or (loss, mean squared error) for regression; two scalars."""
        outputs = self.apply(params, batch.x)
        losses = self._losses(outputs, batch.y)
        metrics = losses if self.kind == "regression" else hits(outputs, batch.y)
        return mean_over_examples(losses, batch.weight), mean_over_examples(metrics, batch.weight)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy per example [n] of `logits` [n, classes] and class indices `y` [n]."""
    # Written out, because vmap splits F.cross_entropy into slower pieces.
    # Shifted first, because the difference of two large logits would lose all its digits.
    logits = logits - logits.detach().amax(dim=-1, keepdim=True)
    return logits.logsumexp(dim=-1) - logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def hits(logits: Tensor, y: Tensor) -> Tensor:
    """Return 1 per example [n] whose largest logit is that of its class, else 0; 0 also if a logit is not finite."""
    # argmax of NaNs is the first: a diverged model would seem to predict class 0.
    right = (logits.argmax(dim=-1) == y) & logits.isfinite().all(dim=-1)
    return right.to(logits.dtype)


def mean_over_examples(values: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean of one value per example; a scalar."""
    # where(), because a product alone would turn an infinite loss on a padded row into NaN.
    return (torch.where(weight > 0, values, 0.0) * weight).sum() / weight.sum()
