"""How many tasks a node computes at once: a fixed number, or what its free memory allows, found while it computes."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

MOST = 128
"""Tasks at once, at the most: more are not faster."""
FIRST = 8
"""Tasks at once as long as nothing is known about their memory."""
SHARE = 0.25
"""Part of the free memory that is taken: other nodes may compute beside this one."""

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def chunks(sizes: Sequence[Any], chunk_size: "int | AutoChunks", *, exact: bool) -> Iterator[list[int]]:
    """Positions of tasks to map together: at most `chunk_size`, similar sizes together, equal sizes only if `exact`."""
    if isinstance(chunk_size, AutoChunks):
        yield from chunk_size.chunks(sizes, exact=exact)
        return
    for members in _groups(sizes, exact=exact):
        # Even chunks: 100 tasks with room for 64 are two times 50, since a small chunk costs nearly as much time as a full one.
        size = -(-len(members) // -(-len(members) // chunk_size))
        yield from (members[i : i + size] for i in range(0, len(members), size))


class AutoChunks:
    """`chunk-size = 0`: the first chunk is small, and what it takes tells how many tasks fit. One for each kind of work.

    Memory is known on Linux and on CUDA. Elsewhere, and on Linux as far as the process had memory to spare, it is taken for
    free: then it is the default number of tasks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.per_task: float | None = None
        """Bytes, once known."""

    def chunks(self, sizes: Sequence[Any], *, exact: bool) -> Iterator[list[int]]:
        """As the function of this name. Memory is read while the caller computes what it was handed."""
        left = list(range(len(sizes)))
        if left and self.per_task is None:
            first = _groups(sizes, exact=exact)[-1][-FIRST:]  # the largest tasks
            before = _mark(self._device)
            yield first
            self.per_task = max(0.0, _peak(self._device) - before) / len(first)
            left = sorted(set(left) - set(first))
        if left:
            for positions in chunks([sizes[i] for i in left], self.size(), exact=exact):
                yield [left[i] for i in positions]

    def size(self) -> int:
        """Tasks that fit into the share of what is free now: 1 to `MOST`."""
        room = SHARE * _free(self._device)
        return MOST if not self.per_task else max(1, min(MOST, int(room / self.per_task)))


def _groups(sizes: Sequence[Any], *, exact: bool) -> list[list[int]]:
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    key: Callable[[int], Any] = (lambda i: sizes[i]) if exact else (lambda i: None)
    return [list(group) for _, group in groupby(order, key)]


def _mark(device: torch.device) -> float:
    """Bytes in use; from now on the peak counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    try:
        (_PROC / "self" / "clear_refs").write_text("5", encoding="utf-8")
    except OSError:  # no Linux, or not allowed to
        return float("inf")
    return _kilobytes(_PROC / "self" / "status", "VmRSS", float("inf")) * 1024


def _peak(device: torch.device) -> float:
    """Bytes in use at the most since the mark."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _kilobytes(_PROC / "self" / "status", "VmHWM", 0.0) * 1024


def _free(device: torch.device) -> float:
    """Bytes that can still be taken: of the device, or of the machine and of the container that this process is in."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = _kilobytes(_PROC / "meminfo", "MemAvailable", float("inf")) * 1024
    try:
        limit, used = ((_CGROUP / name).read_text(encoding="utf-8").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    # Files that were read count as used there, and are dropped for whoever needs memory.
    used_for_good = float(used) - _number(_CGROUP / "memory.stat", "inactive_file", 0.0)
    return free if limit == "max" else min(free, max(0.0, float(limit) - used_for_good))


def _kilobytes(file: Path, name: str, unknown: float) -> float:
    return _number(file, f"{name}:", unknown)


def _number(file: Path, name: str, unknown: float) -> float:
    """What stands behind `name` in a file of one name and number in every line."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return unknown
    return next((float(line[1]) for line in lines if line and line[0] == name), unknown)
