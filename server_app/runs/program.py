"""The command that starts a run again."""

import sys

from quickbloom.common.algorithms import ALGORITHMS, is_own_algorithm
from quickbloom.common.errors import ConfigError


def program() -> list[str]:
    """What a user types before `run` or `compare`: "quickbloom", or "python FILE" where FILE brings an algorithm of its own.

    Raises ConfigError for an algorithm that no file brings.
    """
    own = [name for name, algorithm in ALGORITHMS.items() if is_own_algorithm(algorithm)]
    if not own:
        return ["quickbloom"]
    file = getattr(sys.modules["__main__"], "__file__", None)
    if not file:
        raise ConfigError(f'`algorithm = "{own[0]}"` must come from a file, for every run is a process of its own')
    return ["python", str(file)]
