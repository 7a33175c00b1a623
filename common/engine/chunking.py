"""Number of tasks that a node computes at once: fixed, or derived from the free memory while it computes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.overrides import TorchFunctionMode

from quickbloom.common.maths.fast_paths import has_kernels
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import LARGE
from quickbloom.common.system import at_once as limited
from quickbloom.common.system import memory

MOST = 128
"""Most tasks at once; more are not faster."""
FIRST = 8
"""Tasks at once before their memory is known."""
SHARE = 0.25
"""Share of the free memory to use, since other nodes may compute on this machine."""
SCORED_AT_ONCE = 2**21
"""Most numbers in the inputs of the tasks that are scored at once, padding and rates included: 2,675 images of 28 x 28. A
convolutional network needs some hundred times their memory, and users may have thousands of examples each."""

TRAINED_AT_ONCE = 2**23
"""Most trained numbers of the tasks that are computed at once on a CPU. Large models gain nothing from company: 16 tasks of a
ResNet-18 took 50 s and 5.1 GB at once, 42 s and .7 GB one by one (`fomaml`, 5 steps of 10 examples)."""

CONVOLVED_AT_ONCE = 10_000_000
"""Most multiplications in convolutions, in the forward pass of a task's inner step, for which several take it at once
on a CPU. vmap makes one grouped convolution of theirs, which spares calls and multiplies slowly. To a plain loop (`fomaml`,
10 examples) `cnn` of 4 and 8 filters is 1.8 and 1.4 times as fast mapped and about 1.0 one by one, of 16 filters alike (1.2 and
1.1), and of 32 filters 1.0 and 1.2."""


def is_alone(learner: Learner, x: torch.Tensor, rows: int) -> bool:
    """Return whether a task with `rows` examples like those in `x` [n, ...] in a step is computed faster by itself.

    For algorithms that then move its parameters in place. It depends on nothing but the model and the task, so that numbers
    do not depend on which tasks a node has.
    """
    if learner.device.type != "cpu" or has_kernels(learner):
        return False
    return rows * convolved(learner, x) > CONVOLVED_AT_ONCE


def convolved(learner: Learner, x: torch.Tensor) -> int:
    """Return the number of multiplications in the convolutions of one example's forward pass.

    0 for a model that cannot be tried on two examples: training tells what is wrong with it.
    """
    found = _CONVOLVED.setdefault(learner, {})
    shape = tuple(x.shape[1:])
    if shape not in found:
        counter = _Convolutions()
        # Two examples, since batch norm may need more than one; zeros, since a node may not have the model's numbers yet.
        with suppress(Exception), torch.random.fork_rng(devices=[]), torch.no_grad(), counter:
            learner.apply(learner.zeros(), x[:1].expand(2, *shape))
        found[shape] = counter.multiplications
    return found[shape]


class _Convolutions(TorchFunctionMode):
    """Counts the multiplications that convolutions take for an example. (torch's own counter loads the compiler: a second.)"""

    multiplications = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        weight: Any = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
        if function in _SUMS_OVER_INPUTS:
            self.multiplications += result[0, 0].numel() * weight.numel()
        elif function in _SPREADS_INPUTS:
            self.multiplications += args[0][0, 0].numel() * weight.numel()
        return result


_SUMS_OVER_INPUTS = (torch.conv1d, torch.conv2d, torch.conv3d)
_SPREADS_INPUTS = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_CONVOLVED: WeakKeyDictionary[Learner, dict[tuple[int, ...], int]] = WeakKeyDictionary()


def at_once(learner: Learner, chunk_size: "int | AutoChunks") -> "int | AutoChunks":
    """Return the number of tasks to compute at once for a model: `chunk_size`, but fewer on a CPU for a large model.

    One task of such a model fills the processor, and many take much memory. A worker that follows a killed one has a limit of
    its own (`common.system.at_once`).
    """
    if limit := limited.limit():
        chunk_size = min(limit, chunk_size) if isinstance(chunk_size, int) else limit
    if learner.device.type != "cpu":
        return chunk_size
    constants = sum(value.nbytes for value in learner.constants.values())
    trained = sum(value.numel() for value in learner.trained.values())
    most = 1 if constants >= LARGE else max(1, TRAINED_AT_ONCE // max(1, trained))
    # `AutoChunks` would first try FIRST tasks at once, which may be too many.
    return min(most, chunk_size) if isinstance(chunk_size, int) else most if most < FIRST else chunk_size


def chunks(sizes: Sequence[Any], chunk_size: "int | AutoChunks", *, exact: bool, each: int = 1) -> Iterator[list[int]]:
    """Yield positions of tasks to map together: at most `chunk_size`, of similar size, or of equal size if `exact`.

    `each`: how often every task is computed at the same time, at several rates.
    """
    for chunk in _chunks(sizes, chunk_size, exact=exact):
        limited.note(len(chunk) * each)
        yield chunk


def _chunks(sizes: Sequence[Any], chunk_size: "int | AutoChunks", *, exact: bool) -> Iterator[list[int]]:
    if isinstance(chunk_size, AutoChunks):
        yield from chunk_size.chunks(sizes, exact=exact)
        return
    for members in _groups(sizes, exact=exact):
        # Even chunks: 100 tasks with room for 64 become 2 x 50, since a small chunk takes nearly as long as a full one.
        size = -(-len(members) // -(-len(members) // chunk_size))
        yield from (members[i : i + size] for i in range(0, len(members), size))


def rows_at_once(x: torch.Tensor) -> int:
    """Return how many examples like those in `x` [n, ...] may be scored at once: `SCORED_AT_ONCE`."""
    return max(1, SCORED_AT_ONCE // max(1, x[:1].numel()))


def pieces(positions: Sequence[int], rows: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield a chunk in even parts of at most `most` rows, where each task has as many as the largest, or of one task.

    `rows`: examples of every task.
    """
    room = max(1, most // max(1, *(rows[i] for i in positions)))
    size = -(-len(positions) // -(-len(positions) // room))
    yield from (list(positions[i : i + size]) for i in range(0, len(positions), size))


class AutoChunks:
    """Chunk sizes for `chunk-size = 0`: the memory of a small first chunk tells how many tasks fit.

    Use one object for each kind of work. Memory is measured on Linux and on CUDA. If no growth can
    be measured, tasks are assumed to need none and `MOST` are computed at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.per_task: float | None = None
        """Bytes, once known."""

    def chunks(self, sizes: Sequence[Any], *, exact: bool) -> Iterator[list[int]]:
        """Yield positions as the function `chunks` does. Memory is measured while the caller computes the first chunk."""
        left = list(range(len(sizes)))
        if left and self.per_task is None:
            first = _groups(sizes, exact=exact)[-1][-FIRST:]  # the largest tasks
            before = _mark(self._device)
            yield first
            self.per_task = max(0.0, _peak(self._device) - before) / len(first)
            left = sorted(set(left) - set(first))
        if left:
            for positions in _chunks([sizes[i] for i in left], self.size(), exact=exact):
                yield [left[i] for i in positions]

    def size(self) -> int:
        """Return the number of tasks that fit into the free memory's share now: 1 to `MOST`."""
        room = SHARE * _free(self._device)
        return MOST if not self.per_task else max(1, min(MOST, int(room / self.per_task)))


def _groups(sizes: Sequence[Any], *, exact: bool) -> list[list[int]]:
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    key: Callable[[int], Any] = (lambda i: sizes[i]) if exact else (lambda i: None)
    return [list(group) for _, group in groupby(order, key)]


def _mark(device: torch.device) -> float:
    """Return the bytes in use, and reset the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    memory.return_freed()  # else a chunk that takes kept memory would seem to need none
    try:
        (memory.PROC / "self" / "clear_refs").write_text("5", encoding="utf-8")
    except OSError:  # not Linux, or not permitted
        return float("inf")
    return _bytes("VmRSS", float("inf"))


def _peak(device: torch.device) -> float:
    """Return the largest number of bytes in use since `_mark`."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _bytes("VmHWM", 0.0)


def _free(device: torch.device) -> float:
    """Return the free bytes of the device, or of the machine and the container of this process."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return memory.free()


def _bytes(name: str, unknown: float) -> float:
    """Return a number of this process's status, in bytes."""
    return memory.number(memory.PROC / "self" / "status", f"{name}:", unknown / 1024) * 1024
