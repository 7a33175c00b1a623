"""The command that starts a run again."""

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from quickbloom.common.config.parts import REGISTRIES
from quickbloom.common.errors import ConfigError
from quickbloom.common.registries import is_users


def named(settings: Mapping[str, Any], assignments: Iterable[str] = ()) -> set[str]:
    """Return the parts that a command names: those chosen, and those whose settings are given.

    `settings`: by key; `assignments`: more of them, as "key=value".
    """
    given = {**settings, **dict(text.split("=", 1) for text in assignments)}
    return {str(given[key]) for key in REGISTRIES if key in given} | {key.partition(".")[0] for key in given if "." in key}


def program(names: Collection[str]) -> list[str]:
    """Return the words before `run` or `compare`: "quickbloom", or "python FILE" if FILE registers one of these parts.

    Raises ConfigError for a part that no file registers.
    """
    own = [
        f'{key} = "{name}"'
        for key, registry in REGISTRIES.items()
        for name, part in registry.items()
        if name in names and is_users(part)
    ]
    if not own:
        return ["quickbloom"]
    file = getattr(sys.modules["__main__"], "__file__", None)
    if not file:
        raise ConfigError(f"`{own[0]}` must come from a file, for every run is a process of its own")
    return ["python", str(file)]
