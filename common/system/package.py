"""Location of this package's code: four folders side by side in a source tree, three inside `quickbloom` once installed."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

FOLDERS = ("quickbloom", "common", "server_app", "client_app")
"""The folders of a source tree and of a Flower bundle."""


def folders(names: Iterable[str] = FOLDERS) -> dict[str, Path]:
    """Return the folder of each of these packages."""
    return {name: _folder(name if name == "quickbloom" else f"quickbloom.{name}") for name in names}


def _folder(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin).resolve().parent


def not_sources(name: str) -> tuple[str, ...]:
    """Return patterns of files not to copy with the folder `name`: compiled Python, and in `quickbloom` the other folders."""
    return ("__pycache__", "app_template", *(FOLDERS if name == "quickbloom" else ()))
