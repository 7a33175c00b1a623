"""Functions that autograd treats as opaque."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class WithoutGradient(torch.autograd.Function):
    """A function that autograd treats as opaque; a subclass has `forward`, and `vmap` for many tasks at once."""

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Any:
        raise NotImplementedError("there is no gradient through what first-order algorithms compute: use `descend`")
