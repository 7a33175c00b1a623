"""Networks on the kernels as functions with gradients: their outputs, and the end of a descent, for many tasks at once.

All have a leading task axis, which `torch.func.vmap` extends. `Outputs` can be differentiated twice, and `Descent` once, which
is the second derivative of the loss. There is no third.
"""

from collections.abc import Sequence
from ctypes import c_double
from typing import Any

import torch
from torch import Tensor, nn

from quickbloom.common.maths.kernels.network import BATCH, Network
from quickbloom.common.maths.kernels.opaque import WithoutGradient
from quickbloom.common.maths.kernels.train import (
    Arrays,
    Round,
    Summed,
    apart,
    call,
    in_parts,
    known_in_part,
    layout_of,
    parts_of,
    pointer,
    together,
    train,
)
from quickbloom.common.maths.params import Params

_Mapped = tuple[tuple[Tensor, ...], tuple[int, ...]]
_IMAGES, _ROWS = 64, 1024
"""Images and rows whose outputs are computed together: more would need memory, and gain nothing."""


def applied(module: nn.Module, params: Params, x: Tensor) -> Tensor | None:
    """Return the outputs [n, ...] of `module` with `params` for `x` [n, ...]; None if the kernels cannot compute them.

    Works under `vmap` and `grad`. Outputs can be differentiated twice, by the parameters alone.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.compiler.is_exporting() or is_differentiated(x):
        return None
    network = known_in_part(module)
    if network is None or not network.takes_inputs(params, x, 1, x.shape[0]):
        return None
    # Inside torch.func one call takes longer than the products of a small perceptron.
    if not network.blocks[0].is_convolution and torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    return Outputs.apply(network, x[None], *[params[name][None] for name in network.names])[0]  # type: ignore[no-untyped-call, no-any-return]


def is_differentiated(x: Tensor) -> bool:
    """Return whether a derivative may be taken with respect to `x`, also from outside of a `vmap`."""
    inside = torch._C._functorch
    while not x.requires_grad and (inside.is_batchedtensor(x) or inside.is_gradtrackingtensor(x)):
        x = inside.get_unwrapped(x)
    return x.requires_grad


class _Last(WithoutGradient):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "the kernels have no third derivative: set `uses_kernels` of the learner to False, or QUICKBLOOM_KERNELS=0"
        )


class _OfNetwork(torch.autograd.Function):
    """A function of a network and tensors, which its derivative needs again."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.network, *tensors = inputs
        ctx.save_for_backward(*tensors)


class Outputs(_OfNetwork):
    """f(theta): the network's outputs [tasks, n, outputs] for `x` [tasks, n, ...].

    Arguments: the network, `x`, and the parameters [tasks, ...] in the order of the network's names. There is no gradient with
    respect to `x`.
    """

    @staticmethod
    def forward(network: Network, x: Tensor, *theta: Tensor) -> Tensor:
        return outputs(network, x, theta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *theta = ctx.saved_tensors
        return None, None, *_Pull.apply(ctx.network, x, *gradients, *theta)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], network: Network, *tensors: Tensor) -> tuple[Tensor, int]:
        (found,), (dim,) = _mapped(Outputs, info, in_dims[1:], network, tensors)
        return found, dim


class _Pull(_OfNetwork):
    """The gradient of <d, f(theta)> with respect to theta. Arguments: network, `x`, d [tasks, n, outputs], theta."""

    @staticmethod
    def forward(network: Network, x: Tensor, d: Tensor, *theta: Tensor) -> tuple[Tensor, ...]:
        return pull(network, x, d, theta)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        x, d, *theta = ctx.saved_tensors
        return None, None, *_Along.apply(ctx.network, x, d, *theta, *v)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], network: Network, *tensors: Tensor) -> _Mapped:
        return _mapped(_Pull, info, in_dims[1:], network, tensors)


class _Along(_Last):
    """The derivatives along v of f(theta), and of the gradient of <d, f(theta)>. Arguments: network, `x`, d, theta, v."""

    @staticmethod
    def forward(network: Network, x: Tensor, d: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        return along(network, x, d, tensors[:count], tensors[count:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], network: Network, *tensors: Tensor) -> _Mapped:
        return _mapped(_Along, info, in_dims[1:], network, tensors)


class Descent(_OfNetwork):
    """phi_k: the parameters after one step on each of the batches, phi_{s+1} = phi_s - a * grad L_s(phi_s).

    Arguments: the network, `lr` [tasks], `x`, `y`, `weight` as in `Train`, then the parameters [tasks, ...] in the order of the
    network's names. After these may follow as many rates a of the same shapes, one for each number, which are used in place of
    `lr`; there is a gradient with respect to them as well.
    """

    @staticmethod
    def forward(network: Network, lr: Tensor, x: Tensor, y: Tensor, weight: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        start, rates = tensors[: len(network.names)], tensors[len(network.names) :]
        return walk(network, x, y, weight, start, rates) if rates else train("descent", network, None, lr, x, y, weight, *start)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        found = _Through.apply(ctx.network, *ctx.saved_tensors, *v)  # type: ignore[no-untyped-call]
        return None, None, None, None, None, *found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], network: Network, *tensors: Tensor) -> _Mapped:
        return _mapped(Descent, info, in_dims[1:], network, tensors)


class _Through(_Last):
    """The gradient through a `Descent`. Arguments: those of `Descent`, then the gradient with respect to its end."""

    @staticmethod
    def forward(network: Network, lr: Tensor, x: Tensor, y: Tensor, weight: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(network.names)
        return through(network, lr, x, y, weight, tensors[:count], tensors[count:-count], tensors[-count:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], network: Network, *tensors: Tensor) -> _Mapped:
        return _mapped(_Through, info, in_dims[1:], network, tensors)


class Product(_Last):
    """H v: the Hessian of a loss at theta times v. Arguments: the network, `x`, `y`, `weight` of one step, theta, v."""

    @staticmethod
    def forward(network: Network, x: Tensor, y: Tensor, weight: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(network.names)
        return product(network, x, y, weight, tensors[:count], tensors[count:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], network: Network, *tensors: Tensor) -> _Mapped:
        return _mapped(Product, info, in_dims[1:], network, tensors)


def _mapped(
    function: Any, info: Any, in_dims: Sequence[int | None], network: Network, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    found = function.apply(network, *together(info.batch_size, tensors, in_dims))
    return apart(info.batch_size, found if isinstance(found, tuple) else (found,))


# The same on plain CPU tensors.


def sum_of_pulls(
    round: Round, inputs: Sequence[Tensor], slopes: Sequence[Tensor], losses: Tensor, beside: Tensor
) -> tuple[Summed, Tensor]:
    """Return the sum over tasks of weight times the gradient of <d, f(theta)>, and the factor of each task [tasks].

    `inputs` and `slopes` d: those of support and query, [tasks, n, ...] and [tasks, n, outputs]. theta is the round's start.
    `losses` [tasks]: of a task whose loss is not finite nothing counts. `beside` [tasks], float64: squares of what belongs to a
    task's contribution as well, for the norm by which it is clipped; the factor of a task says how much of that counts.
    """
    forms = [Form(round.network, x, round.start[0].dtype) for x in inputs]
    layout, tasks = forms[0].layout, len(round.weights)
    theta = layout.pack([value[None] for value in round.start], to_change=True)
    given = [form.padded(d) for form, d in zip(forms, slopes, strict=True)]
    parts = parts_of(tasks)
    total = torch.zeros(len(parts), layout.size, dtype=torch.float64)
    norms, factors = torch.empty(tasks, dtype=torch.float64), torch.empty(tasks, dtype=torch.float64)
    losses = losses.to(theta.dtype).contiguous()

    def some(part: slice) -> None:
        weights, sums = pointer(round.weights[part]), pointer(total[parts.index(part)])
        own = map(pointer, (losses[part], norms[part], given[0][part], given[1][part], beside[part], factors[part]))
        support, query = (form.inputs[part] for form in forms)
        call(
            "sum_of_pulls", forms[0].layers, support, query.reference, pointer(theta), weights, c_double(round.clip), sums, *own
        )

    in_parts(tasks, some)
    found = layout.unpack(total.sum(dim=0, keepdim=True), [value[None] for value in round.start])
    return Summed([value[0] for value in found], losses, norms), factors


def outputs(network: Network, x: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """Return the network's outputs [tasks, n, outputs], see `Outputs`; `theta` [1, ...] is one for all tasks."""
    most = _IMAGES if network.blocks[0].is_convolution else _ROWS
    if x.shape[1] > most and all(block.norm != BATCH for block in network.blocks):
        return torch.cat([outputs(network, some, theta) for some in torch.split(x, most, dim=1)], dim=1)
    form = Form(network, x, theta[0].dtype)
    packed, found = form.layout.pack(theta, to_change=False), form.empty()

    shared = int(len(packed) == 1)

    def some(part: slice) -> None:
        own = packed if shared else packed[part]
        call("outputs", form.layers, form.inputs[part], pointer(own), shared, pointer(found[part]), None, None)

    in_parts(len(x), some)
    return form.flat(found)


def pull(network: Network, x: Tensor, d: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradient of <d, f(theta)> with respect to theta."""
    form = Form(network, x, theta[0].dtype)
    packed, found, given = form.layout.pack(theta, to_change=False), form.empty(), form.padded(d)
    gradients = torch.empty_like(packed)

    def some(part: slice) -> None:
        own = map(pointer, (found[part], given[part], gradients[part]))
        call("outputs", form.layers, form.inputs[part], pointer(packed[part]), 0, *own)

    in_parts(len(packed), some)
    return tuple(form.layout.unpack(gradients, theta))


def along(network: Network, x: Tensor, d: Tensor, theta: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the derivatives along v of f(theta), and of the gradient of <d, f(theta)> with respect to theta."""
    form = Form(network, x, theta[0].dtype)
    packed, moves = form.layout.pack(theta, to_change=False), form.layout.pack(v, to_change=False)
    given, of_outputs, of_gradient = form.padded(d), form.empty(), torch.empty_like(packed)

    def some(part: slice) -> None:
        own = (packed[part], given[part], moves[part], of_outputs[part], of_gradient[part])
        call("outputs_along", form.layers, form.inputs[part], *map(pointer, own))

    in_parts(len(packed), some)
    return form.flat(of_outputs), *form.layout.unpack(of_gradient, theta)


def product(
    network: Network, x: Tensor, y: Tensor, weight: Tensor, theta: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return H v, see `Product`."""
    layout, layers = layout_of(network, tuple(x.shape[3:]), theta[0].dtype)
    packed, moves = layout.pack(theta, to_change=False), layout.pack(v, to_change=False)
    batches, found = Arrays.of(packed.dtype, None, x, y, weight), torch.empty_like(packed)

    def some(part: slice) -> None:
        call("product", layers, batches[part], pointer(packed[part]), pointer(moves[part]), pointer(found[part]))

    in_parts(len(packed), some)
    return tuple(layout.unpack(found, theta))


def walk(
    network: Network, x: Tensor, y: Tensor, weight: Tensor, start: Sequence[Tensor], rates: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the end of a descent at a rate for each number."""
    layout, layers = layout_of(network, tuple(x.shape[3:]), start[0].dtype)
    theta, each = layout.pack(start, to_change=True), layout.pack(rates, to_change=False)
    batches = Arrays.of(theta.dtype, None, x, y, weight)

    def some(part: slice) -> None:
        call("walk", layers, batches[part], pointer(theta[part]), pointer(each[part]))

    in_parts(len(theta), some)
    return tuple(layout.unpack(theta, start))


def through(
    network: Network,
    lr: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    start: Sequence[Tensor],
    rates: Sequence[Tensor],
    v: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Return the gradient with respect to the start of a descent, and to its `rates` if there are any, from that of its end."""
    layout, layers = layout_of(network, tuple(x.shape[3:]), start[0].dtype)
    theta, moved = layout.pack(start, to_change=False), layout.pack(v, to_change=True)
    each = layout.pack(rates, to_change=False) if rates else None
    of_rates, alike = torch.zeros_like(theta) if rates else None, lr.to(theta.dtype).contiguous()
    batches = Arrays.of(theta.dtype, None, x, y, weight)

    def some(part: slice) -> None:
        own = [None if values is None else values[part] for values in (theta, alike, each, moved, of_rates)]
        call("through", layers, batches[part], *map(pointer, own))

    in_parts(len(theta), some)
    return (*layout.unpack(moved, start), *(() if of_rates is None else layout.unpack(of_rates, start)))


class Form:
    """The inputs of a network, and the memory of its outputs, as the kernels have them: channels last and padded."""

    def __init__(self, network: Network, x: Tensor, dtype: torch.dtype) -> None:
        self.layout, self.layers = layout_of(network, tuple(x.shape[2:]), dtype)
        last, self._channels = self.layout.layers[-1], network.blocks[-1].outputs
        self._last, self._like, self._size = (last["next_height"], last["next_width"], last["padded"]), x, tuple(x.shape[:2])
        nothing = x.new_zeros(1, 1, x.shape[1], dtype=dtype).expand(x.shape[0], 1, -1)  # there are neither labels nor weights
        one_step = x[:, None]
        self.inputs = Arrays(one_step if one_step[0, 0].is_contiguous() else one_step.contiguous(), nothing, nothing, None)
        self._dtype = dtype

    def empty(self) -> Tensor:
        """Return memory for outputs [tasks, n, height, width, padded]."""
        return torch.empty(*self._size, *self._last, dtype=self._dtype)

    def flat(self, values: Tensor) -> Tensor:
        """Return outputs [tasks, n, outputs] in the order of torch, where channels come first."""
        return values[..., : self._channels].permute(0, 1, 4, 2, 3).flatten(2).contiguous()

    def padded(self, values: Tensor) -> Tensor:
        """Return the inverse of `flat`, with zeros where it left something out."""
        found = torch.zeros(*self._size, *self._last, dtype=self._dtype)
        height, width, _ = self._last
        found[..., : self._channels] = torch.unflatten(values, 2, (self._channels, height, width)).permute(0, 1, 3, 4, 2)
        return found
