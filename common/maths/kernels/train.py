"""Calls of the kernels from torch: every task's descent, gradient or loss, and the sum of a whole round.

`Train` gets the arrays that `torch.func.vmap` has stacked; there is no gradient through it.
`Round` computes a round in one call, so that a task's numbers never leave the cache. Writing them
out, copying, squaring, weighting and summing them would cost as much as training a small model.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from quickbloom.common.maths.kernels.build import library
from quickbloom.common.maths.kernels.network import Layout, Network, is_changed, lay_out, read_network, structure
from quickbloom.common.maths.kernels.opaque import WithoutGradient

What = Literal["descent", "gradient", "loss"]
MOST = 2**20
"""Largest model in bytes of parameters: one that fits a core's cache. At 4.4 MB the kernels were slower than a plain loop."""
REAL = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


def known(module: nn.Module) -> Network | None:
    """Return the module as the kernels see it; None if they cannot train it or do not exist on this machine.

    A module on the "meta" device counts as on the CPU. A large model is not supported: the kernels
    gain speed by keeping the model in the cache, and need a second copy of it.
    """
    network = known_in_part(module)
    return network if network is not None and network.is_whole else None


def known_in_part(module: nn.Module) -> Network | None:
    """Like `known`, also for a model without its last layer, of which only the outputs can be computed."""
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
"""The network read from a module, and the parts of the module at that time."""


class Train(WithoutGradient):
    """The kernels as a function of many tasks at once, which `vmap` extends to more tasks.

    Arguments: `lr` [tasks], `x` [tasks, steps, n, ...], `y` [tasks, steps, n] int64 or [tasks,
    steps, n, outputs], `weight` [tasks, steps, n] and the parameters [tasks, ...] in the order of
    the network's names. If `rows` [tasks, steps, n] is not None, the second axis of `x` and `y` has
    size 1 and `rows` index their third axis.

    Returns the parameters after the last step ("descent"), or the gradients on the only batch and
    the losses [tasks] ("gradient"), or the losses alone ("loss").
    """

    @staticmethod
    def forward(what: What, network: Network, rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        return train(what, network, rows, *tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], what: What, network: Network, *tensors: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        end = Train.apply(what, network, *together(info.batch_size, tensors, in_dims[2:]))  # type: ignore[no-untyped-call]
        return apart(info.batch_size, end)


def together(size: int, tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> list[Tensor | None]:
    """Return tensors [tasks, ...] that `vmap` has stacked along `dims` with `size` * tasks in their first axis."""

    def one(value: Tensor | None, dim: int | None) -> Tensor | None:
        if value is None:
            return None
        return (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)

    return [one(value, dim) for value, dim in zip(tensors, dims, strict=True)]


def apart(size: int, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return the results for `together` as `vmap` wants them: tensors [size, tasks, ...], and where their first axis is."""
    return tuple(torch.unflatten(value, 0, (size, -1)) for value in tensors), (0,) * len(tensors)


def train(
    what: What, network: Network, rows: Tensor | None, lr: Tensor, x: Tensor, y: Tensor, weight: Tensor, *start: Tensor
) -> tuple[Tensor, ...]:
    """Compute `Train` on plain CPU tensors. Raises IndexError for rows out of range, which the kernels would follow."""
    layout, layers = layout_of(network, tuple(x.shape[3:]), start[0].dtype)
    theta = layout.pack(start, to_change=what == "descent")
    batches = Arrays.of(theta.dtype, rows, x, y, weight)
    rates = lr.to(theta.dtype).contiguous() if what == "descent" else None
    gradients = torch.empty_like(theta) if what == "gradient" else None
    losses = None if what == "descent" else theta.new_empty(len(theta))

    def some(part: slice) -> None:
        own = [None if values is None else values[part] for values in (theta, rates, gradients, losses)]
        call("train", layers, batches[part], *map(pointer, own))

    in_parts(len(theta), some)
    values = [] if what == "loss" else layout.unpack(theta if gradients is None else gradients, start)
    return tuple(values) if losses is None else (*values, losses)


class Summed(NamedTuple):
    """A sum over tasks.

    `total`: float64, in the order of the network's names, for the rates once more. `losses` [tasks]: query losses. `norms`
    [tasks]: float64 norms of the tasks' contributions; NaN for a task with a number that is not
    finite, which is left out of the sum.
    """

    total: list[Tensor]
    losses: Tensor
    norms: Tensor


Kind = Literal["difference", "query", "through"]
_KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Round:
    """What a round's tasks have in common: all begin at `start`, in the order of the network's names.

    `weights` [tasks] are float64. A task's contribution is scaled down to the norm `clip`, unless that is 0.
    """

    network: Network
    start: Sequence[Tensor]
    weights: Tensor
    clip: float

    def sum_up(
        self,
        kind: Kind,
        lr: float,
        batches: tuple[Tensor | None, Tensor, Tensor, Tensor],
        query: tuple[Tensor, Tensor, Tensor],
        rates: Sequence[Tensor] = (),
    ) -> Summed:
        """Return the sum over tasks of weight times contribution, with phi the end of a task's descent from `start`.

        `kind`: of contributions. "difference": start - phi; "query": the gradient of the query loss at phi; "through": that
        with respect to the start, and to the `rates` if there are any, which all tasks share and take in place of `lr`.
        `batches` (rows, x, y, weight as in `Train`): there is one step on each. `query` (x, y, weight) is as in `Train`, with a
        single step. Raises IndexError as `train` does.
        """
        layout, _ = self._layout(query[0])
        each = layout.pack([value[None] for value in rates], to_change=False) if rates else None
        inner = Arrays.of(self.start[0].dtype, *batches)
        further = (_KINDS.index(kind), ctypes.c_double(lr), pointer(each))
        return self._summed("sum_up", inner, query, further, 1 + bool(rates))

    def sum_of_meta_steps(
        self,
        support: tuple[Tensor, ...],
        query: tuple[Tensor, Tensor, Tensor],
        steps: int,
        alpha: float,
        beta: float,
        *,
        exact: bool,
    ) -> Summed:
        """Return the sum of start - w after so many local meta-steps of Per-FedAvg, with Hessians if `exact`; see `sum_up`."""
        inner = Arrays.of(self.start[0].dtype, None, *support)
        further = (steps, int(exact), ctypes.c_double(alpha), ctypes.c_double(beta))
        return self._summed("sum_of_meta_steps", inner, query, further, 1)

    def _layout(self, x: Tensor) -> "tuple[Layout, ctypes.Array[Any]]":
        return layout_of(self.network, tuple(x.shape[3:]), self.start[0].dtype)

    def _summed(
        self, function: str, inner: "Arrays", query: tuple[Tensor, Tensor, Tensor], further: tuple[Any, ...], copies: int
    ) -> Summed:
        """Call a function of the kernels, with `further` arguments. `copies`: how often the sum has the network's size."""
        layout, layers = self._layout(query[0])
        theta = layout.pack([value[None] for value in self.start], to_change=True)
        scored, tasks = Arrays.of(theta.dtype, None, *query), len(self.weights)
        parts = parts_of(tasks)
        total = torch.zeros(len(parts), copies, layout.size, dtype=torch.float64)
        losses, norms = theta.new_empty(tasks), torch.empty(tasks, dtype=torch.float64)

        def some(part: slice) -> None:
            own = [pointer(values) for values in (self.weights[part], total[parts.index(part)], losses[part], norms[part])]
            shared = (pointer(theta), own[0], ctypes.c_double(self.clip), *own[1:])
            call(function, layers, inner[part], scored[part].reference, *shared, *further)

        in_parts(tasks, some)
        like = [value[None] for value in self.start]
        every = total.sum(dim=0)
        values = [value[0] for copy in every for value in layout.unpack(copy[None], like)]
        return Summed(values, losses, norms)


def in_parts(tasks: int, some: Callable[[slice], None]) -> None:
    """Run `some` on the tasks, one part of them per thread."""
    parts = parts_of(tasks)
    if len(parts) == 1:
        some(parts[0])
    else:
        with ThreadPoolExecutor(len(parts)) as pool:  # the kernels release Python's lock
            list(pool.map(some, parts))


def _in_one_piece(values: Tensor) -> Tensor:
    """Return `values` with every step's part contiguous; tasks and steps may have any strides, 0 included."""
    return values if values[0, 0].is_contiguous() else values.contiguous()


class Steps(ctypes.Structure):
    """Ctypes form of `Steps` in the C++ source: an array with axes [tasks, steps, ...]."""

    _fields_ = [("numbers", ctypes.c_void_p), ("task", ctypes.c_long), ("step", ctypes.c_long)]

    @classmethod
    def of(cls, values: Tensor | None) -> "Steps":
        if values is None:
            return cls(None, 0, 0)
        size = values.element_size()
        # The stride of a single step is arbitrary.
        return cls(values.data_ptr(), values.stride(0) * size, values.stride(1) * size * (values.shape[1] > 1))


class Batches(ctypes.Structure):
    """Ctypes form of `Batches` in the C++ source."""

    _fields_ = [("steps", ctypes.c_int32), ("examples", ctypes.c_int32)]
    _fields_ += [(name, Steps) for name in ("x", "y", "share", "rows")]


@dataclass(frozen=True)
class Arrays:
    """The batches of tasks, kept alive while the kernels read them. Indexing selects tasks."""

    x: Tensor
    y: Tensor
    share: Tensor
    rows: Tensor | None

    @classmethod
    def of(cls, dtype: torch.dtype, rows: Tensor | None, x: Tensor, y: Tensor, weight: Tensor) -> "Arrays":
        """Return the arrays in the form that the kernels read. Raises IndexError for rows out of range."""
        if rows is not None:
            rows = rows.long()
            if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < x.shape[2]):
                raise IndexError(f"rows of a batch must be 0..{x.shape[2] - 1}, got {int(rows.min())}..{int(rows.max())}")
        every = weight if weight.stride(1) else weight[:, :1]  # the same examples in every step
        share = (every / every.sum(dim=-1, keepdim=True)).to(dtype).expand(weight.shape)
        y = y if y.dtype == torch.int64 else y.to(dtype)
        return cls(_in_one_piece(x), _in_one_piece(y), _in_one_piece(share), None if rows is None else _in_one_piece(rows))

    def __getitem__(self, part: slice) -> "Arrays":
        rows = None if self.rows is None else self.rows[part]
        return Arrays(self.x[part], self.y[part], self.share[part], rows)

    @property
    def reference(self) -> Any:
        steps = (Steps.of(values) for values in (self.x, self.y, self.share, self.rows))
        return ctypes.byref(Batches(*self.share.shape[1:], *steps))


def pointer(values: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if values is None else values.data_ptr())


def call(function: str, layers: "ctypes.Array[Any]", batches: Arrays, *rest: Any) -> None:
    kernels = library(batches.share.dtype)
    assert kernels is not None
    tasks, classes = len(batches.share), int(batches.y.dtype == torch.int64)
    if kernels[function](layers, len(layers), tasks, classes, batches.reference, *rest):
        raise MemoryError("no memory for a round's activations")


@lru_cache(maxsize=64)
def layout_of(network: Network, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Layout, "ctypes.Array[Any]"]:
    kernels = library(dtype)
    assert kernels is not None
    layout = lay_out(network, shape, kernels.lanes())
    kind = structure(REAL[dtype])
    filled = [kind(**layer, epsilon=block.epsilon) for layer, block in zip(layout.layers, network.blocks, strict=True)]
    return layout, (kind * len(filled))(*filled)


def parts_of(tasks: int) -> list[slice]:
    """Return slices that divide the tasks among the threads."""
    size = -(-tasks // max(1, min(torch.get_num_threads(), tasks)))
    return [slice(i, i + size) for i in range(0, tasks, size)]
