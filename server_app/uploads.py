"""How long the server waits for a reply that a node has announced and not yet delivered.

A SuperNode tells the SuperLink of a reply before it uploads the contents. If it dies in between, Flower's grid goes on asking
for them until the SuperLink forgets the upload after three minutes (Flower 1.39), one such reply after the other, and fetches
no other reply meanwhile: found by `python -m benchmarks.chaos`, where two nodes held a round of 15 s up for 405.
"""

import inspect
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from flwr.serverapp import Grid

LEAST = 3.0
"""Seconds that every upload is given, also after the deadline: those before it in a look may have used the time up."""

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


@contextmanager
def awaited_until(deadline: float) -> Iterator[None]:
    """Within this, unfinished uploads are given up at `deadline` (of `time.monotonic`), where `bound` was called before."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def bound(grid: Grid) -> None:
    """Have `grid` obey `awaited_until`. Does nothing for one that fetches in another way, as another release of Flower may."""
    module: Any = sys.modules[type(grid).__module__]
    theirs = getattr(module, "pull_objects", None)
    if callable(theirs) and "max_time" in inspect.signature(theirs).parameters:
        module.pull_objects = _Bounded(theirs)


class _Bounded:
    """Flower's function with a limit; its signature shows no `max_time`, so it is not wrapped again."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __call__(self, *positional: Any, **named: Any) -> Any:
        left = _deadline.get() - time.monotonic()
        limit = {} if math.isinf(left) else {"max_time": max(left, LEAST)}
        return self._theirs(*positional, **{**named, **limit})
