"""Imports user code: a model "module:factory", data "module:function".

The directory in which the command was started is searched last. A user's `client_app.py` or
`common.py` must not hide this project's packages or any library.
"""

import os
import sys
from contextlib import suppress
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType

FOLDER = "QUICKBLOOM_MODULES"
"""Environment variable with the directory in which a command was started, for processes that run elsewhere."""


def import_own(name: str) -> ModuleType:
    """Return the user's module `name`. Raises whatever importing it raises."""
    add_folder()
    return import_module(name)


def add_folder() -> None:
    """Add the user's directory to the end of the import path."""
    with suppress(FileNotFoundError):  # the current directory was removed
        folder = os.environ.get(FOLDER) or str(Path.cwd())
        if folder not in sys.path:
            sys.path.append(folder)
            invalidate_caches()
