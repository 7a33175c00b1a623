"""Where the code of this package lies: its four folders side by side, or three of them inside `quickbloom` once installed."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

FOLDERS = ("quickbloom", "common", "server_app", "client_app")
"""The folders of a source tree and of a Flower bundle."""


def folders(names: Iterable[str] = FOLDERS) -> dict[str, Path]:
    """The folder of each of these packages."""
    return {name: _folder(name if name == "quickbloom" else f"quickbloom.{name}") for name in names}


def _folder(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin).resolve().parent


def not_sources(name: str) -> tuple[str, ...]:
    """Patterns of what is not copied with the folder `name`: what Python compiled, and in `quickbloom` the other folders."""
    return ("__pycache__", "app_template", *(FOLDERS if name == "quickbloom" else ()))
