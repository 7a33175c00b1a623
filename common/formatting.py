"""Numbers and names as people read them, the same in the terminal and in reports. Scores: see `common.metric`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def size(count: float) -> str:
    """Bytes with a unit: 12_345 -> "12.3 kB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def counted(number: int, thing: str) -> str:
    """1 step, 2 steps."""
    return f"{number} {thing}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """8072 -> "2 h 15 min", 75 -> "1 min 15 s", 12.34 -> "12.3 s"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def data_name(config: Mapping[str, Any]) -> str:
    """What the data of a run with these settings are called: of a user's own the file, without the folder that it lies in."""
    if config.get("dataset") == "hub":
        return f"hub:{Path(str(config.get('hub.name', ''))).name}"
    if config.get("dataset") != "own":
        return str(config.get("dataset"))
    # Without a file in the settings every node has one of its own.
    return Path(str(config.get("own.path", ""))).name or "the nodes' own data"
