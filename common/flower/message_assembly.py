"""Receives large messages with less memory: assembled part by part, with freed memory returned to the system.

Flower keeps every piece of a message until the message is complete, which takes twice its size.
Here pieces are freed once their array is complete. glibc keeps freed memory between other blocks,
unless large blocks are mapped by themselves.

These are the patches `assembly-by-parts` and `worker-memory` of `common.flower.registry`; the
caller asks their guards. This file imports nothing of this package, since workers run it by its
path: their app brings its own.
"""

import ctypes
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

LARGE = 2**25
"""Size of a message in bytes from which a worker saves memory rather than time while it computes."""
# Numbers of glibc's mallopt, and bytes: of blocks that are mapped by themselves, and of free memory at the end of the heap.
_TRIM, _MAP, _ARENAS = -1, -3, -8
_SPARING, _COMPUTING, _KEEPING = (
    {_ARENAS: 1, _MAP: 2**20, _TRIM: 2**22},
    {_MAP: 2**25, _TRIM: 2**26},
    {_MAP: 2**30, _TRIM: 2**30},
)


def spare() -> None:
    """Let this process assemble messages part by part."""
    pulling: Any = importlib.import_module("flwr.supercore.inflatable.inflatable_utils")
    grid: Any = importlib.import_module("flwr.superlink.grid.http_grid")
    whole = pulling.inflate_object_from_contents
    if getattr(whole, "by_parts", False):
        return
    pulling.inflate_object_from_contents = grid.inflate_object_from_contents = _by_parts(whole, pulling)


def _by_parts(whole: Callable[..., Any], pulling: Any) -> Callable[..., Any]:
    def inflate(
        object_id: str, contents: dict[str, bytes], *, keep_object_contents: bool = False, objects: dict[str, Any] | None = None
    ) -> Any:
        if objects is not None:  # Flower's own function recurses by this name
            return whole(object_id, contents, keep_object_contents=keep_object_contents, objects=objects)
        done: dict[str, Any] = {}
        heads = {key: pulling.get_object_head_values_from_object_content(content) for key, content in contents.items()}
        arrays = {key: children for key, (kind, children, _) in heads.items() if kind == "Array"}
        # Arrays with the same numbers share their pieces.
        uses = Counter(piece for children in arrays.values() for piece in set(children))
        for key, children in arrays.items():
            whole(key, contents, keep_object_contents=keep_object_contents, objects=done)
            for piece in set(children):
                uses[piece] -= 1
                if not uses[piece]:
                    del done[piece]
        return whole(object_id, contents, keep_object_contents=keep_object_contents, objects=done)

    inflate.by_parts = True  # type: ignore[attr-defined]
    return inflate


def give_back() -> None:
    """Let this process, which lives for one message, return the memory that it frees while the message arrives.

    For a small message glibc's defaults stay: computing is faster with freed memory kept.
    """
    if _is_chosen():
        return
    tune(_SPARING)
    client: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    pull = client.pull_task_input

    def pull_and_tune(*args: Any) -> Any:
        task = pull(*args)
        records = task[0].content.array_records.values() if task[0].has_content() else ()
        if sum(len(array.data) for record in records for array in record.values()) < LARGE:
            tune(_COMPUTING)
        return task

    client.pull_task_input = pull_and_tune


def keep() -> None:
    """Let this process, which computes a whole run, keep the memory that it frees.

    glibc would return large blocks to the system, and map and clear them again in the next step: one step of a MiniLM with an
    adapter took 5 % longer.
    """
    if not _is_chosen():
        tune(_KEEPING)


def _is_chosen() -> bool:
    """Return whether the user has set options of malloc."""
    return any(name.startswith("MALLOC_") for name in os.environ)


def tune(options: dict[int, int]) -> None:
    """Set options of glibc's malloc; do nothing with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for name, value in options.items():
            mallopt(name, value)
