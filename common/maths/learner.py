"""A torch module as pure functions of its parameters."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from quickbloom.common.errors import ConfigError
from quickbloom.common.maths import batch_norm
from quickbloom.common.maths.batch import Batch, in_one_piece
from quickbloom.common.maths.inner_loop import Loss, MeanLoss, is_differentiated_twice
from quickbloom.common.maths.kernels.derivatives import applied
from quickbloom.common.maths.params import Params


class Learner:
    """A model and its loss, as pure functions of named parameters.

    Parameters with `requires_grad` are what is trained. All others, and all buffers, are constants: they stay in the module,
    which all tasks share, and nothing moves them. The module computes in evaluation mode, so dropout is off (but see
    `training`) and batch norm takes its running statistics where it has them. Losses are means over the examples of positive
    weight. Works under `torch.func.vmap` and to any order of differentiation.
    """

    def __init__(self, module: nn.Module, kind: str, outputs: int = 0) -> None:
        """Put `module` into evaluation mode.

        `outputs`: classes or targets of the data; needed only by an algorithm that builds its own
        classifier.
        """
        self.module = module.eval()
        self.structure_on: torch.device | None = None
        """Device to compute on, if what is trained is on the "meta" device, where it has shapes but no numbers."""
        self.kind = kind
        self.outputs = outputs
        self.ran: list[str] = []
        """The layers with parameters in the order in which they last ran, once a forward pass was observed."""
        self.maps = True
        """False for a model that `torch.func.vmap` cannot map, whose tasks are computed one after the other."""
        self.plain_attention = False
        """True for a model whose attention must do without fused kernels inside torch.func and
        where a derivative is differentiated again, for which these lack a rule."""
        self.reduced: torch.dtype | None = None
        """A shorter number type to compute matrix products in, as torch's autocast does; parameters keep theirs."""
        self.dropout = False
        """True if dropout is on in training, see `keep_dropout`."""
        self.uses_kernels = True
        """False if derivatives may be taken that the kernels lack: third ones, forward ones, and those by the inputs."""
        self.remarks = _in_evaluation_mode(module)
        """What a person should know of how the model is computed, one sentence each."""
        self._digest: str | None = None
        parameters = [id(value) for _, value in module.named_parameters(remove_duplicate=False)]
        self._shares = len(set(parameters)) < len(parameters)
        """Whether a parameter has two names in the module: looked for once, and not at every call."""
        self._batch_norms = batch_norm.without_statistics(module)
        self._statistics = batch_norm.names_of(self._batch_norms)
        # Batch norm without running statistics uses those of the batch, which padding would change.
        self.mixes_examples = bool(self._batch_norms)
        """True if examples are normalised by their batch, where parameters come without `statistics`."""
        self.transductive = False
        """True if examples to predict are normalised by their own batch all the same, and not by their task's support set."""

    def keep_dropout(self) -> None:
        """Let dropout be on inside `training`."""
        self.dropout = True
        self.remarks = [remark for remark in self.remarks if remark != _DROPOUT_OFF]

    @contextmanager
    def training(self, seed: int) -> Iterator[None]:
        """Compute inside as in usual training, where dropout is kept: with the random numbers of `seed`.

        Batch norm keeps its running statistics. Torch's own random state is the same afterwards.
        """
        if not self.dropout:
            yield
            return
        device = self.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            try:
                self.module.train()
                for layer in self.module.modules():
                    if isinstance(layer, nn.modules.batchnorm._NormBase):
                        layer.eval()
                yield
            finally:
                self.module.eval()

    @property
    def ends_with_its_last_layer(self) -> bool:
        """Whether the outputs are those of the layer that runs last, as they are: it is the end of nothing but sequences.

        Any other module may use its last layer in another way. False also if two layers share a parameter.
        """
        name, part = "", self.module
        while type(part) is nn.Sequential and len(part):
            key = list(part._modules)[-1]
            name, part = f"{name}.{key}" if name else key, part[-1]
        return not self._shares and name == self.last() and self.ran[-1:] in ([], [name])

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The module's parameters that are trained, by name."""
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    @property
    def constants(self) -> Params:
        """The module's tensors that are not trained, by name: frozen parameters and buffers."""
        frozen = {name: value.detach() for name, value in self.module.named_parameters() if not value.requires_grad}
        return {**frozen, **dict(self.module.named_buffers())}

    def freeze(self, keep: Collection[str]) -> None:
        """Train the parameters in `keep` alone."""
        for name, value in self.module.named_parameters():
            value.requires_grad_(name in keep)
        self._digest = None

    @property
    def digest(self) -> str:
        """SHA-256 of all constants and their names, in hexadecimal; "" for a model without any.

        Of a buffer of fractions that is no part of the module's state (`persistent=False`) only name and form count: code
        computes it, such as the angles of positions, and its last digit may differ from one processor to the next.
        """
        if self._digest is None:
            self._digest = self._computed_digest()
        return self._digest

    def _computed_digest(self) -> str:
        constants, total = self.constants, hashlib.sha256()
        computed = _not_persistent(self.module)
        for name in sorted(constants):
            value = constants[name]
            total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            if not (name in computed and value.is_floating_point()):
                total.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest() if constants else ""

    def initial(self) -> Params:
        """Return a copy of the module's own parameters that are trained."""
        return {name: value.detach().clone() for name, value in self.trained.items()}

    def zeros(self) -> Params:
        """Return zeros in the shapes of what is trained, on the device to compute on."""
        return {name: torch.zeros(value.shape, dtype=value.dtype, device=self.device) for name, value in self.trained.items()}

    @property
    def device(self) -> torch.device:
        """The device of the module's parameters, or the one to compute on if they have no numbers."""
        return self.structure_on or self._any_trained.device

    def to(self, device: torch.device) -> None:
        """Move the computation to `device`."""
        if self.structure_on is None:
            self.module.to(device)
            return
        self.structure_on = device
        self._change(lambda value, trained: value if trained else value.to(device))

    def drop_numbers(self) -> None:
        """Keep only shapes of what is trained, which suffices if its numbers come from elsewhere. Constants stay."""
        self.structure_on = self.device
        self._change(lambda value, trained: value.to("meta") if trained else value)

    def _change(self, change: Callable[[Tensor, bool], Tensor]) -> None:
        """Replace every tensor of the module by `change` of it and of whether it is trained. Shared ones stay shared."""
        made: dict[int, Any] = {}
        for module in self.module.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    if id(value) not in made:
                        made[id(value)] = nn.Parameter(change(value.detach(), value.requires_grad), value.requires_grad)
                    module._parameters[name] = made[id(value)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = made.setdefault(id(buffer), change(buffer, False))

    @property
    def dtype(self) -> torch.dtype:
        """The number type of what is trained."""
        return self._any_trained.dtype

    @property
    def _any_trained(self) -> Tensor:
        for value in self.module.parameters():
            if value.requires_grad:
                return value
        return next(self.module.parameters())

    def last(self) -> str:
        """Return the name of the layer that runs last of those that are trained, or before that is known was made last."""
        layers = self.ran or [name for name, _ in self.module.named_modules()]
        return [name for name in layers if is_trained(self.module.get_submodule(name))][-1]

    def head(self, setting: str, names: str) -> list[str]:
        """Return the names of the head's parameters.

        `names`: comma-separated name prefixes, or "auto" for the parameters of `last()`. Raises
        ConfigError, which names `setting`, if that is none or all of the model's parameters.
        """
        parameters = list(self.trained)
        starts = tuple(part.strip() for part in names.split(",") if part.strip())
        if names == "auto":
            last = self.last()
            starts = (f"{last}." if last else "",)
        head = [name for name in parameters if name.startswith(starts)]
        if not 0 < len(head) < len(parameters):
            raise ConfigError(
                f"`{setting}` must name some but not all parameters by how their names begin ({_listed(parameters)}), got "
                f"'{names}', which fits {len(head)} of {len(parameters)}"
            )
        return head

    def statistics(self, params: Params, x: Tensor) -> Params:
        """Return the statistics of batch norm on the inputs `x` [n, ...], to be used beside `params` for other inputs.

        {} for a model without such layers, for no inputs, and if `params` lack a parameter that is trained.
        """
        names = self.trained
        if not self.mixes_examples or not x.shape[0] or not params.keys() >= names.keys():
            return {}
        own = {name: params[name] for name in names}
        return batch_norm.recorded(self._batch_norms, lambda: self.apply(own, x), self.dtype)

    def has_statistics(self, params: Params) -> bool:
        """Return whether no output depends on the others of its batch, if the model is computed with `params`."""
        return not self._statistics or all(name in params for name in self._statistics)

    def shapes_of_statistics(self) -> Params:
        """Return zeros in the shapes of all statistics of batch norm, by name; {} for a model without such layers."""
        return batch_norm.shapes_of(self._batch_norms, self.dtype)

    def apply(self, params: Params, x: Tensor) -> Tensor:
        """Return the model's outputs [n, outputs] for the inputs `x` [n, ...].

        `params` are those that are trained, and `statistics` of other inputs to normalise these by.
        """
        return self.run(self.module, params, x)

    def run(self, module: nn.Module, params: Params, x: Tensor) -> Tensor:
        """Return the outputs of `module`, the model or a copy without its last layer, computed as the model is."""
        if self.plain_attention and is_differentiated_twice():
            with sdpa_kernel(SDPBackend.MATH):
                return self._in_pieces(module, params, x)
        return self._in_pieces(module, params, x)

    def _in_pieces(self, module: nn.Module, params: Params, x: Tensor) -> Tensor:
        # A compiler, or an export, follows one way for any number of examples.
        whole = torch.compiler.is_compiling() or not self.has_statistics(params)
        if whole or x.shape[0] <= (most := in_one_piece(x.shape[1:])):
            return self._at_once(module, params, x)
        # Without a gradient, only the outputs of all examples are ever in memory together.
        return torch.cat([self._at_once(module, params, some) for some in torch.split(x, most)])

    def _at_once(self, module: nn.Module, params: Params, x: Tensor) -> Tensor:
        if self.reduced is None:
            if self.uses_kernels and (found := applied(module, params, x)) is not None:
                return found
            result: Tensor = functional_call(module, params, (x,), tie_weights=self._shares)
            return result
        # Without its cache, which knows nothing of tensors under torch.func.
        with torch.autocast(x.device.type, self.reduced, cache_enabled=False):
            result = functional_call(module, params, (x,), tie_weights=self._shares)
        return result.to(self.dtype)  # losses and closed forms are computed in full

    def _losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the loss per example [n]: cross-entropy, or the squared error averaged over the outputs."""
        return cross_entropy(outputs, y) if self.kind == "classification" else (outputs - y).square().mean(dim=-1)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Return the weighted mean loss over the batch; a scalar."""
        return self.loss_of(self.apply(params, batch.x), batch)

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the weighted mean loss of the outputs [n, outputs] for a batch; a scalar."""
        return mean_over_examples(self._losses(outputs, batch.y), batch.weight)

    @property
    def mean_loss(self) -> Loss:
        """`loss`, whose gradient over many examples is taken in pieces unless an example's output depends on the others."""
        pieces = not self.mixes_examples and type(self).loss is Learner.loss
        return MeanLoss(self.loss) if pieces else self.loss

    def score(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (loss, accuracy) over the batch, or (loss, mean squared error) for regression; two scalars."""
        return self.score_of(self.apply(params, batch.x), batch)

    def score_of(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the `score` of the outputs [n, outputs] for a batch; of many batches with a leading axis of theirs."""
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
    """Return the weighted mean of one value per example, over the last axis: a scalar, or one for each of many batches."""
    # where(), because a product alone would turn an infinite loss on a padded row into NaN.
    return (torch.where(weight > 0, values, 0.0) * weight).sum(dim=-1) / weight.sum(dim=-1)


def is_trained(module: nn.Module) -> bool:
    """Return whether a layer has parameters of its own that are trained."""
    return any(value.requires_grad for value in module.parameters(recurse=False))


_DROPOUT_OFF = (
    "The model's dropout is off, in training too, since all tasks of a node share one computation without random draws; "
    "`dropout = true` keeps it on, one task after the other"
)


def _in_evaluation_mode(module: nn.Module) -> list[str]:
    """Return a sentence on each kind of layer that does something else in evaluation mode than in usual training."""
    modules, found = list(module.modules()), []
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in modules):
        found.append(_DROPOUT_OFF)
    if any(isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None for m in modules):
        found.append("The model's batch norm takes its running statistics as they are, and they are never updated")
    return found


def _not_persistent(module: nn.Module) -> set[str]:
    """Return the names of buffers that are no part of the module's state."""
    return {
        f"{prefix}{'.' if prefix else ''}{name}"
        for prefix, one in module.named_modules()
        for name in one._non_persistent_buffers_set
    }


def _listed(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
