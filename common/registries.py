"""The form of all three registries: a list of names, each of a file that holds a class of this name."""

from importlib import import_module
from typing import Any


def load(package: str, *names: str) -> dict[str, Any]:
    """Return the class with `name = "NAME"` of the module `package`.NAME, for each of `names`, in this order.

    A dash in a name is an underscore in that of its module.

    Raises ImportError if a module has no such class.
    """
    return {name: _find(f"{package}.{name.replace('-', '_')}", name) for name in names}


def _find(module: str, name: str) -> Any:
    for kind in vars(import_module(module)).values():
        if isinstance(kind, type) and vars(kind).get("name") == name:
            return kind
    raise ImportError(f'{module} must define a class with `name = "{name}"`, and has none: the file and the class share a name')


def is_users(kind: type) -> bool:
    """Return whether a class comes from user code, which exists only in the process that imported it."""
    return not kind.__module__.startswith("quickbloom.common.")
