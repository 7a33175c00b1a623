"""The memory of this machine, or of the control group that this process lies in: a container, or a service with MemoryMax."""

import ctypes
import math
import sys
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def total() -> float:
    """Return the bytes that this process and those beside it may take; inf where that is not known."""
    machine = number(PROC / "meminfo", "MemTotal:", math.inf) * 1024
    return min([machine, *(limit for limit, _ in _groups())])


def free() -> float:
    """Return the bytes that are free for this process; inf where that is not known."""
    machine = number(PROC / "meminfo", "MemAvailable:", math.inf) * 1024
    return min([machine, *(max(0.0, limit - used) for limit, used in _groups())])


def held() -> dict[str, int]:
    """Return the bytes in memory of this process: `resident` now, and `peak`, its most so far; {} where there is no /proc.

    The peak is not that of `getrusage`, in which a process has what its parent had before it.
    """
    try:
        lines = (PROC / "self" / "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    known = {name: line for line in lines for name in (line.partition(":")[0],) if name in _HELD}
    return {_HELD[name]: int(known[name].split()[1]) * 1024 for name in _HELD if name in known}


_HELD = {"VmRSS": "resident", "VmHWM": "peak"}


def return_freed() -> None:
    """Return to the system what this process has freed and kept, so that growth afterwards is seen; glibc alone can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _groups() -> Iterator[tuple[float, float]]:
    """Yield (limit, used bytes) of every group with a limit that this process lies in.

    The file cache does not count as used, since the kernel frees it on demand.
    """
    for folder, limit, used, cache in _folders():
        try:
            most, taken = ((folder / name).read_text(encoding="utf-8").strip() for name in (limit, used))
        except OSError:
            continue
        if most.isdigit():
            yield float(most), float(taken) - number(folder / "memory.stat", cache, 0.0)


def _folders() -> Iterator[tuple[Path, str, str, str]]:
    """Yield the folder of each group of this process, and the names in it of the limit, of what is used, and of the cache."""
    try:
        lines = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    two = ("memory.max", "memory.current", "inactive_file")
    one = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    found = {(CGROUP, two), (CGROUP / "memory", one)}  # a container sees its own group there
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        root, names = (CGROUP, two) if hierarchy == "0" else (CGROUP / "memory", one)
        if hierarchy == "0" or "memory" in controllers.split(","):
            group = root / path.lstrip("/")
            found |= {(folder, names) for folder in (group, *group.parents) if folder.is_relative_to(root)}
    for folder, names in sorted(found):
        yield folder, *names


def number(file: Path, name: str, unknown: float) -> float:
    """Return the number after `name` in a file with one name and number per line; `unknown` if there is none."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return unknown
    return next((float(line[1]) for line in lines if line and line[0] == name), unknown)
