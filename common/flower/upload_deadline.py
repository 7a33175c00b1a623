"""Deadline for a reply that a node has announced and not yet delivered.

A SuperNode announces a reply to the SuperLink before it uploads the contents. If it dies in
between, Flower's grid keeps asking for them until the SuperLink forgets the upload after three
minutes (Flower 1.39), one such reply after the other, and fetches no other reply meanwhile. `python
-m benchmarks.chaos` found this: two nodes held a round of 15 s up for 405 s.
"""

import importlib
import inspect
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from flwr.serverapp import Grid

from quickbloom.common.flower import registry

GRACE = 3.0
"""Seconds for all uploads together that are under way at the deadline."""
_PAUSE = 1.0
"""Largest number of seconds between two requests for the same contents; Flower's own pauses grow to ten, without a limit."""

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


@contextmanager
def awaited_until(deadline: float) -> Iterator[None]:
    """Within this context, give up contents that are missing at `deadline` (of `time.monotonic`), but no complete ones.

    A reply given up on is returned as error MESSAGE_UNAVAILABLE. Needs `limit_uploads`.
    """
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def limit_uploads(grid: Grid) -> None:
    """Make all grids of this class, in this process, obey `awaited_until`.

    The patch `upload-deadline` of `common.flower.registry`. It does not change a grid that fetches
    in another way.
    """
    if type(grid).__module__.startswith("flwr.") and not registry.allowed("upload-deadline"):
        return
    _limit(sys.modules.get(type(grid).__module__))


def limit_flowers_grid() -> None:
    """As `limit_uploads` for Flower's own grid."""
    _limit(importlib.import_module("flwr.superlink.grid.http_grid"))


def _limit(module: Any) -> None:
    theirs = getattr(module, "pull_objects", None)
    if callable(theirs) and {"max_time", "backoff_cap"} <= inspect.signature(theirs).parameters.keys():
        module.pull_objects = Limited(theirs)


class Limited:
    """Flower's function with a limit; its signature shows no `max_time`, so it is not wrapped again."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __call__(self, *positional: Any, **named: Any) -> Any:
        deadline = _deadline.get()
        if deadline < math.inf:
            named |= {"max_time": max(deadline - time.monotonic(), 0.0), "backoff_cap": _PAUSE}
        return self._theirs(*positional, **named)
