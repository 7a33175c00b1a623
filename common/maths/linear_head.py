"""A model as features and a linear head, and the head that fits some examples best in closed form.

For models whose last layer is a `torch.nn.Linear`: outputs = features @ W.T + b. With an augmented feature of ones, head and
intercept are one matrix A [features + 1, outputs].
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch_norm import names_of, without_statistics
from quickbloom.common.maths.embedding import Embedding
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params

STRETCH = 10.0
"""Logarithms that are learned beside a head are stored over this: the server's steps are of one size for all parameters, and
these have to move by factors."""


class LinearHead:
    """The last layer of a model and what lies before it. A model that is one linear layer has its inputs as features."""

    def __init__(self, learner: Learner, algorithm: str, does: str = "solves for", *, body: bool = False) -> None:
        """Raise ConfigError, which says what `algorithm` `does` with the last layer, if that is no linear layer with a bias.

        `body`: also if nothing before it is trained.
        """
        self._learner = learner
        name = learner.last()
        layer = learner.module.get_submodule(name)
        is_last = learner.ran[-1:] in ([], [name]) and all(value.requires_grad for value in layer.parameters())
        if type(layer) is not nn.Linear or layer.bias is None or not is_last:
            frozen = "" if is_last else ", of which not all is trained"
            raise ConfigError(
                f'`algorithm = "{algorithm}"` {does} the last layer of the model, which must be a torch.nn.Linear '
                f"with a bias, got {type(layer).__name__}{frozen}: choose another `model` or `algorithm`"
            )
        dot = "." if name else ""
        self.weight, self.bias = f"{name}{dot}weight", f"{name}{dot}bias"
        self.size, self.outputs = layer.in_features + 1, layer.out_features
        self._body: nn.Module = nn.Identity()
        if name:
            # Constants are shared, since those of a pretrained model take most of its memory.
            self._body = deepcopy(learner.module, {id(value): value for value in _constants(learner.module)})
            parent, _, last = name.rpartition(".")
            setattr(self._body.get_submodule(parent), last, nn.Identity())
        self._names = [name for name, value in self._body.named_parameters() if value.requires_grad]
        self._statistics = names_of(without_statistics(self._body))
        self.is_all = not self._names
        """Whether the model has nothing to learn before its head."""
        if body and self.is_all:
            raise ConfigError(
                f'`algorithm = "{algorithm}"` {does} the last layer of the model, and nothing before it is trained: choose '
                "another `model` or `algorithm`"
            )

    def features(self, params: Params, x: Tensor) -> Tensor:
        """Return the inputs of the last layer for `x` [n, ...], and a column of ones: [n, features + 1]."""
        body = {name: params[name] for name in self._names}
        body |= {name: params[name] for name in self._statistics if name in params}
        if self._learner.dropout:  # the copy is in training when the model is
            for name, part in self._body.named_modules():
                part.training = self._learner.module.get_submodule(name).training
        found = self._learner.run(self._body, body, x)
        return torch.cat([found, found.new_ones(found.shape[0], 1)], dim=1)

    @property
    def embedding(self) -> Embedding:
        """What makes the features."""
        return Embedding(self._learner, self._body, self._names, self.features, ones=True)

    def matrix(self, params: Params) -> Tensor:
        """Return the head as A [features + 1, outputs]: the intercept is the last row."""
        return torch.cat([params[self.weight].T, params[self.bias].unsqueeze(0)])

    def zeroed(self, params: Params) -> Params:
        """Return `params` with a head of zeros."""
        return self.replaced(params, torch.zeros_like(self.matrix(params)))

    def replaced(self, params: Params, matrix: Tensor) -> Params:
        """Return `params` with the head A."""
        return {**params, self.weight: matrix[:-1].T.contiguous(), self.bias: matrix[-1]}


def _constants(module: nn.Module) -> list[Tensor]:
    return [*(value for value in module.parameters() if not value.requires_grad), *module.buffers()]


def shrunk_fit(features: Tensor, targets: Tensor, weight: Tensor, precision: Tensor) -> Tensor:
    """Return argmin over A of sum_i weight_i ||targets_i - features_i A||^2 + sum_j precision_j ||A_j||^2, in float64.

    `features` [n, d], `targets` [n, outputs], `weight` [n] (0: left out), `precision` [d], all positive. Solves the smaller of
    the two systems that are equal by Woodbury's identity, n x n or d x d. Without rows A is 0. Differentiable, also under vmap.
    """
    roots = weight.double().sqrt().unsqueeze(-1)
    scale = precision.double().rsqrt()
    rows, wanted = features.double() * scale * roots, targets.double() * roots
    n, d = rows.shape[-2:]
    ones = torch.eye(min(n, d), dtype=torch.float64, device=rows.device)
    by_rows = n < d
    found = rows.mT @ solved(rows @ rows.mT + ones, wanted) if by_rows else solved(rows.mT @ rows + ones, rows.mT @ wanted)
    return scale.unsqueeze(-1) * found


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Return X with matrix @ X = right, for a symmetric positive definite matrix; NaN where numbers are not finite."""
    # The plain function raises for all tasks where one has diverged.
    factor, info = torch.linalg.cholesky_ex(matrix)
    factor = torch.where((info == 0)[..., None, None], factor, torch.nan)
    return torch.cholesky_solve(right, factor)
