"""Modules of the user's own: a model "module:factory", data "module:function".

They are looked for last, in the directory that the command was started in: a user's `client_app.py` or `common.py` must not
stand in the way of this project's packages, nor of any library.
"""

import os
import sys
from contextlib import suppress
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType

FOLDER = "QUICKBLOOM_MODULES"
"""Environment variable with the directory that a command was started in, for processes that run elsewhere."""


def import_own(name: str) -> ModuleType:
    """The user's module `name`. Raises whatever that raises."""
    add_folder()
    return import_module(name)


def add_folder() -> None:
    """Let imports look into the user's directory when they have looked everywhere else."""
    with suppress(FileNotFoundError):  # a directory that was removed
        folder = os.environ.get(FOLDER) or str(Path.cwd())
        if folder not in sys.path:
            sys.path.append(folder)
            invalidate_caches()
