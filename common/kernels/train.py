"""The kernels called from torch: every task's descent, or the gradient or the loss of one batch each.

They take what `torch.func.vmap` has stacked, as ordinary arrays; there is no gradient through them.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from common.kernels.build import library
from common.kernels.network import Layout, Network, is_changed, lay_out, read_network, structure

What = Literal["descent", "gradient", "loss"]
MOST = 2**20
"""Bytes of a model's parameters: what stays in a core's cache. With 4.4 MB the kernels were slower than a plain loop."""
REAL = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


def known(module: nn.Module) -> Network | None:
    """The module as the kernels see it, if they know it and there are kernels for it here.

    One that is only a structure counts as being on the CPU. A large one is none of theirs: what they gain is that a model stays
    in the cache, and they need another copy of it.
    """
    theta = next(module.parameters(), None)
    if theta is None or theta.device.type not in ("cpu", "meta") or theta.dtype not in REAL or is_changed(module):
        return None
    parts = tuple((name, type(part), id(part)) for name, part in module.named_modules(remove_duplicate=False))
    read = _READ.get(module)
    if read is None or read[0] != parts:
        large = sum(value.nbytes for value in module.parameters()) > MOST
        read = _READ[module] = parts, None if large else read_network(module)
    return read[1] if read[1] is not None and library(theta.dtype) is not None else None


_READ: "WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Network | None]]" = WeakKeyDictionary()
"""What was read of a module, and of which parts it consisted then."""


class Train(torch.autograd.Function):
    """Many tasks at once; `vmap` over it makes more of them.

    `lr` [tasks], `x` [tasks, steps, n, ...], `y` [tasks, steps, n] int64 or [tasks, steps, n, outputs], `weight` [tasks,
    steps, n] and the parameters [tasks, ...] in the order of the network's names. With `rows` [tasks, steps, n] instead of None
    the second axis of `x` and `y` is 1, and their third one the examples that rows are of. Returns the parameters after the
    last step, or their gradients on the only batch and the losses [tasks], or the losses alone.
    """

    @staticmethod
    def forward(what: What, network: Network, rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        return train(what, network, rows, *tensors)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Any:
        raise NotImplementedError("there is no gradient through what first-order algorithms compute: use `descend`")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], what: What, network: Network, *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size

        def together(value: Tensor | None, dim: int | None) -> Tensor | None:
            if value is None:
                return None
            return (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)

        end = Train.apply(what, network, *map(together, tensors, in_dims[2:]))  # type: ignore[no-untyped-call]
        return tuple(value.unflatten(0, (size, -1)) for value in end), (0,) * len(end)


def train(
    what: What, network: Network, rows: Tensor | None, lr: Tensor, x: Tensor, y: Tensor, weight: Tensor, *start: Tensor
) -> tuple[Tensor, ...]:
    """As `Train`, on plain tensors on the CPU. Raises IndexError for rows that are none, which the kernels would follow."""
    if rows is not None:
        rows = rows.long()
        if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < x.shape[2]):
            raise IndexError(f"rows of a batch must be 0..{x.shape[2] - 1}, got {int(rows.min())}..{int(rows.max())}")
    layout, layers = _layout(network, tuple(x.shape[3:]), start[0].dtype)
    theta = layout.pack(start, to_change=what == "descent")
    every = weight if weight.stride(1) else weight[:, :1]  # the same examples in every step
    share = (every / every.sum(dim=-1, keepdim=True)).to(theta.dtype).expand(weight.shape)
    y = y if y.dtype == torch.int64 else y.to(theta.dtype)
    steps = [None if values is None else _in_one_piece(values) for values in (x, y, share, rows)]
    rates = lr.to(theta.dtype).contiguous() if what == "descent" else None
    gradients = torch.empty_like(theta) if what == "gradient" else None
    losses = None if what == "descent" else theta.new_empty(len(theta))

    def some(part: slice) -> None:
        own = [
            [None if values is None else values[part] for values in all] for all in (steps, [theta, rates, gradients, losses])
        ]
        _call(layers, *own)

    parts = _parts(len(theta), torch.get_num_threads())
    if len(parts) == 1:
        some(parts[0])
    else:
        with ThreadPoolExecutor(len(parts)) as pool:  # the kernels let go of Python's lock
            list(pool.map(some, parts))
    values = [] if what == "loss" else layout.unpack(theta if gradients is None else gradients, start)
    return tuple(values) if losses is None else (*values, losses)


def _in_one_piece(values: Tensor) -> Tensor:
    """Every step's part, that is; steps and tasks may lie anywhere, several of them in the same place."""
    return values if values[0, 0].is_contiguous() else values.contiguous()


class Steps(ctypes.Structure):
    """`Steps` of the C++ source: an array with axes [tasks, steps, ...]."""

    _fields_ = [("numbers", ctypes.c_void_p), ("task", ctypes.c_long), ("step", ctypes.c_long)]

    @classmethod
    def of(cls, values: Tensor | None) -> "Steps":
        if values is None:
            return cls(None, 0, 0)
        size = values.element_size()
        # With a single step the stride may be anything.
        return cls(values.data_ptr(), values.stride(0) * size, values.stride(1) * size * (values.shape[1] > 1))


def _call(layers: "ctypes.Array[Any]", steps: list[Tensor | None], results: list[Tensor | None]) -> None:
    _, y, share, _ = steps
    theta = results[0]
    assert y is not None
    assert share is not None
    assert theta is not None
    kernels = library(theta.dtype)
    assert kernels is not None
    arrays = [ctypes.byref(Steps.of(values)) for values in steps]
    pointers = [ctypes.c_void_p(None if values is None else values.data_ptr()) for values in results]
    if kernels.train(layers, len(layers), *share.shape, int(y.dtype == torch.int64), *arrays, *pointers):
        raise MemoryError("no memory for a round's activations")


@lru_cache(maxsize=64)
def _layout(network: Network, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Layout, "ctypes.Array[Any]"]:
    kernels = library(dtype)
    assert kernels is not None
    layout = lay_out(network, shape, kernels.lanes())
    kind = structure(REAL[dtype])
    filled = [kind(**layer, epsilon=block.epsilon) for layer, block in zip(layout.layers, network.blocks, strict=True)]
    return layout, (kind * len(filled))(*filled)


def _parts(tasks: int, threads: int) -> list[slice]:
    """Tasks in as many parts as there are threads."""
    size = -(-tasks // max(1, min(threads, tasks)))
    return [slice(i, i + size) for i in range(0, tasks, size)]
