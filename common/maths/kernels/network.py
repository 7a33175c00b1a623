"""Networks that the kernels support, and the memory layout of their parameters.

Supported are sequences of convolution blocks (Conv2d; optionally a normalisation without running
state; optionally ReLU and, after it, MaxPool2d(2)), Flatten, and Linear layers with ReLU between
them. These are the models `mlp`, `sine`, `linear` and `conv4` of any size, whole or without their last layer.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quickbloom.common.maths.params import Params

NONE, BATCH, GROUP = 0, 1, 2
INTEGERS = (
    *("side", "stride", "pad", "height", "width", "inputs", "outputs", "padded", "out_height", "out_width"),
    *("norm", "group", "relu", "pool", "next_height", "next_width"),
)
MOST_LAYERS = 16


def structure(real: Any) -> type[ctypes.Structure]:
    """Return the ctypes form of `Layer` in the C++ source, for one number type."""
    fields = [*((name, ctypes.c_int32) for name in INTEGERS), ("epsilon", real)]
    return type("Layer", (ctypes.Structure,), {"_fields_": fields})


@dataclass(eq=False)
class Block:
    """A product with weights and the operations up to the next one, with the names of its parameters."""

    names: list[str]
    inputs: int
    outputs: int
    side: int = 1
    stride: int = 1
    pad: int = 0
    norm: int = NONE
    groups: int = 1
    epsilon: float = 0.0
    relu: bool = False
    pool: bool = False
    ceil: bool = False
    is_convolution: bool = False


@dataclass(frozen=True, eq=False)
class Network:
    """A module as the kernels see it; `shapes` are those of its parameters, by name."""

    blocks: tuple[Block, ...]
    shapes: dict[str, torch.Size]
    dtype: torch.dtype

    @property
    def is_whole(self) -> bool:
        """True if the network ends with a linear layer, whose outputs a loss can be of."""
        return not (self.blocks[-1].is_convolution or self.blocks[-1].relu)

    @property
    def names(self) -> list[str]:
        """Names of the parameters in the order of the layers: weight, bias, then gamma and beta of a normalisation."""
        return [name for block in self.blocks for name in block.names]

    def named(self, values: Sequence[Tensor]) -> Params:
        """Return parameters in the order of `names` as a dictionary."""
        return dict(zip(self.names, values, strict=True))

    def takes(self, params: Params, x: Tensor, y: Tensor, first: int, size: int) -> bool:
        """Return whether a loss satisfies the kernels, which do not validate.

        `first`: number of axes of `x` and `y` before those of one example; `size`: examples in a
        batch.
        """
        target = (self.blocks[-1].outputs,) if y.is_floating_point() else ()
        labels = tuple(y.shape[first:]) == target and (y.is_floating_point() or y.dtype == torch.int64)
        return labels and self.takes_inputs(params, x, first, size)

    def takes_inputs(self, params: Params, x: Tensor, first: int, size: int) -> bool:
        """Return whether the outputs for `x` can be computed; see `takes`."""
        shape, block = tuple(x.shape[first:]), self.blocks[0]
        images = block.is_convolution
        fits = (len(shape) == 3 and shape[0] == block.inputs) if images else math.prod(shape) == block.inputs
        if size < (2 if any(block.norm for block in self.blocks) else 1):
            return False  # left to torch, which refuses to normalise a single number
        same = params.keys() == self.shapes.keys() and all(value.shape == self.shapes[name] for name, value in params.items())
        return fits and same and all(value.dtype == self.dtype for value in (x, *params.values()))


def read_network(module: nn.Module) -> Network | None:
    """Return the module as a list of layers, also one without its last layer; None if the kernels do not support it."""
    reader = _Reader()
    parameters = dict(module.named_parameters())
    if type(module) is not nn.Sequential or not all(reader.read(*entry) for entry in _leaves(module)):
        return None
    if not (reader.flattened and 0 < len(reader.blocks) <= MOST_LAYERS):
        return None
    shapes = {name: value.shape for name, value in parameters.items()}
    network = Network(tuple(reader.blocks), shapes, next(iter(parameters.values())).dtype)
    # There are fewer names if two layers share a weight.
    return network if sorted(network.names) == sorted(shapes) else None


def is_changed(module: nn.Module) -> bool:
    """Return whether a hook or an overridden `forward` changes what some module inside computes."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in module.modules()
    )


def _leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    # Not `named_children`, which skips a module that occurs a second time.
    for name, child in module._modules.items():
        if child is None:
            continue
        if type(child) is nn.Sequential:
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}.", child


@dataclass
class _Reader:
    """Reads one module after the other; `read` returns False for one that is not supported at its position."""

    blocks: list[Block] = field(default_factory=list)
    flattened: bool = False

    def read(self, prefix: str, module: nn.Module) -> bool:
        reads = {
            nn.Identity: lambda prefix, module: True,
            nn.Flatten: self._flatten,
            nn.Linear: self._linear,
            nn.Conv2d: self._convolution,
            nn.BatchNorm2d: self._batch_norm,
            nn.GroupNorm: self._group_norm,
            nn.ReLU: self._relu,
            nn.MaxPool2d: self._pool,
        }.get(type(module))
        return reads is not None and bool(reads(prefix, module))

    def _open(self) -> Block | None:
        """Return the last block if it is a convolution that further layers can still extend, else None."""
        last = self.blocks[-1] if self.blocks else None
        return last if last is not None and last.is_convolution and not self.flattened and not last.pool else None

    def _flatten(self, prefix: str, module: Any) -> bool:
        fits = not self.flattened and (module.start_dim, module.end_dim) == (1, -1)
        self.flattened = True
        return fits

    def _linear(self, prefix: str, module: Any) -> bool:
        ready = self.flattened and (not self.blocks or self.blocks[-1].is_convolution or self.blocks[-1].relu)
        self.blocks.append(Block([f"{prefix}weight", f"{prefix}bias"], module.in_features, module.out_features))
        return ready and module.bias is not None

    def _convolution(self, prefix: str, module: Any) -> bool:
        side, stride, pad = module.kernel_size[0], module.stride[0], module.padding
        self.blocks.append(
            Block([f"{prefix}weight", f"{prefix}bias"], module.in_channels, module.out_channels, is_convolution=True)
        )
        if isinstance(pad, str) or self.flattened or module.bias is None:
            return False
        block = self.blocks[-1]
        block.side, block.stride, block.pad = side, stride, pad[0]
        square = module.kernel_size == (side, side) and module.stride == (stride, stride) and pad == (pad[0], pad[0])
        return bool(square) and module.dilation == (1, 1) and module.groups == 1 and module.padding_mode == "zeros"

    def _norm(self, prefix: str, norm: int, groups: int, epsilon: float, module: Any) -> bool:
        block = self._open()
        if block is None or block.norm or block.relu or module.weight is None or module.bias is None or epsilon <= 0:
            return False
        block.norm, block.groups, block.epsilon = norm, groups, epsilon
        block.names += [f"{prefix}weight", f"{prefix}bias"]
        return True

    def _batch_norm(self, prefix: str, module: Any) -> bool:
        return module.track_running_stats is False and self._norm(prefix, BATCH, 1, module.eps, module)

    def _group_norm(self, prefix: str, module: Any) -> bool:
        return self._norm(prefix, GROUP, module.num_groups, module.eps, module)

    def _relu(self, prefix: str, module: Any) -> bool:
        block = self._open() or (self.blocks[-1] if self.blocks and self.flattened else None)
        if block is None or block.relu or (block.is_convolution and self.flattened):
            return False
        block.relu = True
        return True

    def _pool(self, prefix: str, module: Any) -> bool:
        block = self._open()
        plain = all(value in (2, (2, 2)) for value in (module.kernel_size, module.stride)) and module.padding in (0, (0, 0))
        # The kernel passes no gradient through a zero, which is correct only after ReLU.
        if block is None or not block.relu or not plain or module.dilation not in (1, (1, 1)) or module.return_indices:
            return False
        block.pool, block.ceil = True, module.ceil_mode
        return True


@dataclass(frozen=True)
class Layout:
    """Memory layout of a network for inputs of one shape: the layers for the kernels, and the place of every parameter."""

    network: Network
    layers: list[dict[str, int]]

    @property
    def size(self) -> int:
        """Numbers that hold one task's parameters, padding included."""
        return sum((_weights(layer) + 1 + 2 * bool(layer["norm"])) * layer["padded"] for layer in self.layers)

    def pack(self, params: Sequence[Tensor], *, to_change: bool) -> Tensor:
        """Return parameters [tasks, ...] in the order of `network.names` as one array [tasks, size].

        The output of `unpack` is not copied again, unless `to_change`.
        """
        if not to_change and (whole := self._unpacked_from(params)) is not None:
            return whole
        if len(params[0]) > 1 and not any(value.stride(0) for value in params):  # all tasks share one start
            return self.pack([value[:1] for value in params], to_change=True).repeat(len(params[0]), 1)
        packed = params[0].new_zeros(len(params[0]), self.size)
        for view, value in zip(self._views(packed), params, strict=True):
            view.copy_(value.detach().reshape(view.shape))
        return packed

    def _unpacked_from(self, params: Sequence[Tensor]) -> Tensor | None:
        """Return the array that `params` are views of, if it has this layout, else None."""
        first, shape = params[0], (len(params[0]), self.size)
        start = first.storage_offset()
        if first.untyped_storage().nbytes() < (start + math.prod(shape)) * first.element_size():
            return None
        whole = first.as_strided(shape, (self.size, 1), start)
        for view, value in zip(self._views(whole), params, strict=True):
            alike = view.reshape(value.shape)
            if (alike.data_ptr(), alike.stride()) != (value.data_ptr(), value.stride()):
                return None
        return whole

    def unpack(self, packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters in `packed` [tasks, size] in the shapes of `like`: the inverse of `pack`."""
        return [view.reshape(values.shape) for view, values in zip(self._views(packed), like, strict=True)]

    def _views(self, packed: Tensor) -> list[Tensor]:
        """Return every parameter [tasks, ...] as a view into `packed`."""
        views, at = [], 0
        channels, size = None, (1, 1)  # output of the layer before; its padding channels follow the real ones
        for block, layer in zip(self.network.blocks, self.layers, strict=True):
            count, padded = _weights(layer), layer["padded"]
            weight = packed[:, at : at + count * padded].view(-1, count, padded)[..., : block.outputs]
            rows = (block.side, block.side) if block.is_convolution else size
            # Inputs are [height, width, channels] in the kernels and [channels, height, width] in torch.
            views.append(torch.unflatten(weight, 1, (*rows, -1))[:, :, :, :channels].permute(0, 4, 3, 1, 2))
            at += count * padded
            for _ in block.names[1:]:
                views.append(packed[:, at : at + block.outputs])
                at += padded
            channels, size = block.outputs, (layer["next_height"], layer["next_width"])
        return views


def _weights(layer: dict[str, int]) -> int:
    return layer["side"] ** 2 * layer["inputs"]


def lay_out(network: Network, shape: Sequence[int], lanes: int) -> Layout:
    """Return the layout for inputs of `shape`, with vectors of `lanes` numbers."""
    images = network.blocks[0].is_convolution
    inputs, height, width = shape if images else (math.prod(shape), 1, 1)
    layers = []
    for block in network.blocks:
        if not block.is_convolution:
            inputs, height, width = inputs * height * width, 1, 1
        layer = _layer(block, inputs, height, width, lanes)
        layers.append(layer)
        inputs, height, width = layer["padded"], layer["next_height"], layer["next_width"]
    return Layout(network, layers)


def _layer(block: Block, inputs: int, height: int, width: int, lanes: int) -> dict[str, int]:
    padded = -(-block.outputs // lanes) * lanes
    out = [(extent + 2 * block.pad - block.side) // block.stride + 1 for extent in (height, width)]
    after = [(extent + block.ceil) // 2 if block.pool else extent for extent in out]
    group = block.outputs // block.groups if block.norm == GROUP else 1
    product = {"side": block.side, "stride": block.stride, "pad": block.pad, "height": height, "width": width, "inputs": inputs}
    shape = {"outputs": block.outputs, "padded": padded, "out_height": out[0], "out_width": out[1]}
    then = {"norm": block.norm, "group": group, "relu": int(block.relu), "pool": int(block.pool)}
    return {**product, **shape, **then, "next_height": after[0], "next_width": after[1]}
