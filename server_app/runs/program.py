"""The command that starts a run again."""

import sys
from collections.abc import Mapping
from typing import Any

from quickbloom.common.errors import ConfigError


def program(own: Mapping[str, type[Any]]) -> list[str]:
    """Return the words before `run` or `compare`: "quickbloom", or "python FILE" for a run with parts that FILE registers.

    `own`: those parts by their setting (`common.config.parts.own_parts`). Raises ConfigError for a part that no file
    registers.
    """
    if not own:
        return ["quickbloom"]
    file = getattr(sys.modules["__main__"], "__file__", None)
    if not file:
        key, part = next(iter(own.items()))
        raise ConfigError(f'`{key} = "{part.name}"` must come from a file, for every run is a process of its own')
    return ["python", str(file)]
