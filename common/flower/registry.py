"""Which patches of Flower (`common.flower.patches`) may be applied to the installed one, and their application.

A patch replaces parts of Flower that Flower does not promise. Each has its own guard: the source
code of its target, and of the target's callers, must be one that the patch was tested with.
Otherwise Flower's own code runs, and one line says so. The environment variable
QUICKBLOOM_FLOWER_PATCHES=0 turns all patches off.

The guard reads files and imports nothing of Flower, so it costs milliseconds. A patch names its
functions as text; they are imported when it is applied. For another release, `python -m
quickbloom.common.flower.registry` prints the hashes of the installed Flower, for
`common.flower.accepted`.
"""

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

from quickbloom.common.flower.names import MissingNameError
from quickbloom.common.flower.patches import PATCHES, Patch

SWITCH = "QUICKBLOOM_FLOWER_PATCHES"
"""Environment variable: 0 turns all patches off."""

BY_NAME: Mapping[str, Patch] = {patch.name: patch for patch in PATCHES}


def turned_off() -> bool:
    """Return whether the user has turned all patches off."""
    return os.environ.get(SWITCH, "1") == "0"


def needless(patch: Patch) -> str:
    """Return why this Flower does not need the patch; "" if it does."""
    if patch.needless_with and exists(patch.needless_with[0]):
        return patch.needless_with[1]
    return ""


def why_not(name: str) -> str:
    """Return why the patch `name` is not applied here; "" if it may be."""
    patch = BY_NAME[name]
    if turned_off():
        return f"{SWITCH}=0 turns all patches off"
    if reason := needless(patch):
        return reason
    if patch.forks and "forkserver" not in multiprocessing.get_all_start_methods():
        return "this system has no fork server"
    return mismatch(patch)


def mismatch(patch: Patch) -> str:
    """Return in words the first source of a patch that differs from the tested ones; "" if none does."""
    accepted = importlib.import_module("quickbloom.common.flower.accepted").ACCEPTED
    for source in patch.sources:
        found = fingerprint(source)
        if found is None and source.endswith("?"):
            continue
        if found is None:
            return f"Flower {version()} has no `{_dotted(source)}`"
        if found not in accepted[_first(source)]:
            return f"`{_dotted(source)}` of Flower {version()} is not one that this was tested with"
    return ""


def allowed(*names: str) -> list[str]:
    """Return those patches of `names` that may be applied here; log one line for each that a mismatch keeps off."""
    fine = []
    for name in names:
        if reason := why_not(name):
            if not turned_off() and not needless(BY_NAME[name]):
                getLogger("flwr").log(WARNING, "%s", off_line(name, reason))
        else:
            fine.append(name)
    return fine


def off_line(name: str, reason: str) -> str:
    """Return the line that tells a user that a patch is off."""
    return f"The patch `{name}` is off ({reason}): Flower's own way instead, without: {BY_NAME[name].gain}"


def apply(*names: str) -> list[str]:
    """Apply those patches of `names` that may be applied to this process, and return their names."""
    done = []
    for name in allowed(*names):
        try:
            function(BY_NAME[name].apply)()
        except MissingNameError as error:
            getLogger("flwr").log(WARNING, "%s", off_line(name, str(error)))
        else:
            done.append(name)
    return done


def exists(module: str) -> bool:
    """Return whether a module is installed, without importing it."""
    return _file(module) is not None


def function(path: str) -> Callable[..., Any]:
    """Return the function "module:name"."""
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def version() -> str:
    """Return the release of the installed Flower."""
    return importlib.metadata.version("flwr")


def fingerprint(source: str) -> str | None:
    """Return the first digits of the SHA-256 of the source code of "module:Name"; None if this Flower does not have it."""
    for place in source.rstrip("?").split("|"):
        module, _, name = place.partition(":")
        if (text := _text(module, name)) is not None:
            return hashlib.sha256(text.encode()).hexdigest()[:12]
    return None


def _text(module: str, name: str) -> str | None:
    file = _file(module)
    if file is None:
        return None
    tree, lines = _parsed(file)
    node: Any = tree
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", None) == part), None)
        if node is None:
            return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "".join(lines[first - 1 : node.end_lineno])


@functools.lru_cache(maxsize=32)
def _parsed(file: Path) -> tuple[ast.Module, list[str]]:
    text = file.read_text(encoding="utf-8")
    return ast.parse(text), text.splitlines(keepends=True)


def _file(module: str) -> Path | None:
    """Return the file of a module of an installed package, without importing it."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        base = Path(root, *parts)
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


def _first(source: str) -> str:
    return source.rstrip("?").split("|")[0]


def _dotted(source: str) -> str:
    return _first(source).replace(":", ".")


def sources(patches: Iterable[Patch] = PATCHES) -> list[str]:
    """Return all sources of some patches, each once, sorted."""
    return sorted({source for patch in patches for source in patch.sources})


if __name__ == "__main__":
    for source in sources():
        print(f"{_first(source)}: {fingerprint(source)}")
