"""The command that starts a run again."""

import sys

from quickbloom.common.config.parts import REGISTRIES
from quickbloom.common.errors import ConfigError
from quickbloom.common.registries import is_users


def program() -> list[str]:
    """Return the words before `run` or `compare`: "quickbloom", or "python FILE" if FILE registers parts of its own.

    Raises ConfigError for a part that no file registers.
    """
    own = [f'{key} = "{name}"' for key, registry in REGISTRIES.items() for name, part in registry.items() if is_users(part)]
    if not own:
        return ["quickbloom"]
    file = getattr(sys.modules["__main__"], "__file__", None)
    if not file:
        raise ConfigError(f"`{own[0]}` must come from a file, for every run is a process of its own")
    return ["python", str(file)]
