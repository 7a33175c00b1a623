"""Plain SGD on a perceptron with its gradient written out, for all tasks of a batch at once, where there are no kernels.

The numbers equal those of `inner_loop.descend`, the definition, up to rounding. Nothing is
recorded, a step allocates nothing, and the product that forms a weight's gradient also subtracts it
from the weight (`baddbmm_`).

It is used where there is neither `quickbloom-kernels` nor a C++ compiler, on a GPU, in half
precision and for models of more than 1 MB. A round is 1.3 (models of 1 MB) to 3.6 times (few tasks)
as fast as with autograd: `python -m benchmarks.written_out`, docs/performance.md.

One layer of one task, for rows h of examples: a = W h + b, out = relu(a). With d the gradient of
the loss with respect to a (at the top softmax minus one-hot, weighted): dW = d^T h, db = sum of d,
and d W is the gradient with respect to h (Rumelhart, Hinton, Williams 1986).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.kernels.opaque import WithoutGradient
from quickbloom.common.maths.params import Params

Layers = list[tuple[Tensor, Tensor]]
"""(weight [tasks, outputs, inputs], bias [tasks, 1, outputs]) of every layer."""

TOGETHER = 40
"""Tasks computed at once on a CPU, few enough for their parameters and activations to stay in its cache."""


def descend_perceptron(names: list[str], start: Params, batches: Batch, lr: float) -> Params:
    """Return phi_k after one step on each of `batches` [steps, examples, ...]; `names` come from `layer_names`.

    Works under `vmap`; there is no gradient through it.
    """
    end = _Descent.apply(lr, *batches, *(start[name] for name in names))  # type: ignore[no-untyped-call]
    return dict(zip(names, end, strict=True))


def layer_names(module: nn.Module) -> list[str] | None:
    """Return the parameter names of a perceptron (Flatten, then Linear with ReLU between) in order; None for other modules."""
    if type(module) is not nn.Sequential or not module or type(module[0]) is not nn.Flatten or module[0].start_dim != 1:
        return None
    kinds = [nn.ReLU if i % 2 else nn.Linear for i in range(len(module) - 1)]
    plain = len(module) % 2 == 0 and all(type(layer) is kind for layer, kind in zip(list(module)[1:], kinds, strict=True))
    if not plain or any(layer.bias is None for layer in list(module)[1::2]) or _is_hooked(module):
        return None
    names = [name for name, _ in module.named_parameters()]
    return names if len(names) == len(module) else None  # fewer where two layers share a weight


def _is_hooked(module: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())


class _Descent(WithoutGradient):
    """One task's descent, which `vmap` maps over tasks as a whole and not operation by operation."""

    @staticmethod
    def forward(lr: float, x: Tensor, y: Tensor, weight: Tensor, *start: Tensor) -> tuple[Tensor, ...]:
        end = descend_together(lr, x[None], y[None], weight[None], [value[None] for value in start])
        return tuple(value[0] for value in end)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], lr: float, *tensors: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        x, y, weight, *start = (
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip(tensors, in_dims[1:], strict=True)
        )
        end = descend_together(lr, x, y, weight, start)
        return tuple(end), (0,) * len(end)


def descend_together(lr: float, x: Tensor, y: Tensor, weight: Tensor, start: Sequence[Tensor]) -> list[Tensor]:
    """Return every task's parameters after a step of rate `lr` on each of its batches.

    `x` [tasks, steps, n, ...]; `y` [tasks, steps, n] int64 class indices, or [tasks, steps, n,
    outputs]; `weight` [tasks, steps, n]; `start`: weight [tasks, outputs, inputs] and bias [tasks,
    outputs] of one layer after the other.
    """
    end = [value.clone(memory_format=torch.contiguous_format) for value in start]
    steps = x.shape[1]
    if not any(values.stride(1) for values in (y, weight)):  # all steps share their examples: compute once
        y, weight = y[:, :1], weight[:, :1]
    weight = weight / weight.sum(dim=-1, keepdim=True)
    x = x.flatten(3) if x.ndim > 3 else x.unsqueeze(3)
    size = TOGETHER if x.device.type == "cpu" else len(x)
    for i in range(0, len(x), size):
        part = slice(i, i + size)
        layers = [(w[part], b[part].unsqueeze(1)) for w, b in zip(end[::2], end[1::2], strict=True)]
        a, b, softmax = _slope(y[part], weight[part].unsqueeze(2), end[-1].shape[-1])
        _descend(layers, lr, x[part], a.expand(-1, steps, -1, -1), b.expand(-1, steps, -1, -1), softmax)
    return end


def _slope(y: Tensor, share: Tensor, outputs: int) -> tuple[Tensor, Tensor, bool]:
    """Return (a, b, softmax) such that the gradient with respect to the outputs z [tasks, outputs, n] is a z + b.

    If `softmax`, it is a softmax(z) + b. `share` [tasks, steps, 1, n]: weights that add up to 1.
    """
    if y.is_floating_point():
        share = share * (2 / outputs)
        return share, -y.mT * share, False
    nothing = share.new_zeros(*share.shape[:2], outputs, share.shape[-1])
    return share, nothing.scatter_(2, y.unsqueeze(2), -share), True


def _descend(layers: Layers, lr: float, x: Tensor, a: Tensor, b: Tensor, softmax: bool) -> None:
    """Take every step in place, for `x` [tasks, steps, n, inputs]; the other arguments are from `_slope`."""
    tasks, _, n, _ = x.shape
    # Buffers for every layer's outputs and their gradients.
    hidden = [x.new_empty(tasks, n, bias.shape[2]) for _, bias in layers[:-1]]
    deltas = [torch.empty_like(values) for values in hidden]
    ones = x.new_ones(tasks, 1, n)
    for now, factor, offset in zip(x.unbind(1), a.unbind(1), b.unbind(1), strict=True):
        outputs = _forward(layers, now, hidden)
        outputs = torch.softmax(outputs, dim=1) if softmax else outputs
        delta = torch.addcmul(offset, outputs, factor)
        _backward(layers, [now, *hidden], delta.mT, deltas, ones, lr)


def _forward(layers: Layers, x: Tensor, hidden: Sequence[Tensor]) -> Tensor:
    """Fill `hidden` with the outputs of all layers but the last; return those of the last: [tasks, outputs, n]."""
    for (weight, bias), after in zip(layers[:-1], hidden, strict=True):
        x = torch.baddbmm(bias, x, weight.mT, out=after).relu_()
    weight, bias = layers[-1]
    # Examples last: products with few columns are several times slower than products with few rows.
    return torch.baddbmm(bias.mT, weight, x.mT)


def _backward(
    layers: Layers, inputs: Sequence[Tensor], delta: Tensor, deltas: Sequence[Tensor], ones: Tensor, lr: float
) -> None:
    """Propagate the gradient `delta` [tasks, n, outputs] from the last layer to the first, and take the step."""
    for (weight, bias), before, below in zip(reversed(layers), reversed(inputs), [*reversed(deltas), None], strict=True):
        if below is not None:  # with the weights before their step
            torch.bmm(delta, weight, out=below)
            torch.ops.aten.threshold_backward.grad_input(below, before, 0, grad_input=below)  # times relu'
        weight.baddbmm_(delta.mT, before, alpha=-lr)
        bias.baddbmm_(ones, delta, alpha=-lr)
        if below is not None:
            delta = below
