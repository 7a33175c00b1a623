"""The installed ClientApp, imported before a message arrives, for workers whose run brings the same code.

`common.flower.workers` lets the fork server import this module and with it the installed ClientApp;
this import is a large part of the cost of a small model's message. A worker uses it if the run's
bundle has exactly the same files, by their SHA-256. Otherwise it drops the imported modules, and
Flower imports the bundle's. Flower unpacks the bundle for every message; here it is unpacked once.
"""

import errno
import functools
import hashlib
import importlib
import io
import posixpath
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from logging import DEBUG
from pathlib import Path
from typing import Any

from quickbloom.common.flower import names as flower
from quickbloom.common.flower.names import log
from quickbloom.common.system.package import folders

PACKAGES = ("quickbloom", "client_app", "common")
"""Folders of a bundle that a node imports from."""
_MANIFEST = ".info/CONTENT"
_COMPLETE = ".quickbloom-complete"
"""File in the directory of a completely unpacked bundle, with the bundle's SHA-256."""


def installed_files() -> dict[str, str]:
    """Return the SHA-256 of every installed Python file of PACKAGES, by its path in a bundle."""
    return {
        f"{name}/{file.relative_to(folder).as_posix()}": hashlib.sha256(file.read_bytes()).hexdigest()
        for name, folder in folders(PACKAGES).items()
        for file in sorted(folder.rglob("*.py"))
        # An installed package also holds the other folders, and files that are not bundled with any of them.
        if name != "quickbloom" or file.parent == folder
    }


def bundled_files(bundle: bytes) -> dict[str, str]:
    """Return the SHA-256 of all files of PACKAGES in a bundle, by its manifest, whose lines are path, SHA-256 and size.

    {} without a readable manifest; a file that is not in it has the hash "".
    """
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            names = [posixpath.normpath(name) for name in archive.namelist() if not name.endswith("/")]
            lines = archive.read(_MANIFEST).decode().splitlines()
    except (KeyError, UnicodeDecodeError, zipfile.BadZipFile):
        return {}
    hashes = {path: digest for path, digest, _ in (line.rsplit(",", 2) for line in lines if line.count(",") >= 2)}
    return {name: hashes.get(name, "") for name in names if name.split("/")[0] in PACKAGES}


def imported() -> list[str]:
    """Return the names of all imported modules of this package."""
    return [name for name in sys.modules if name.split(".")[0] == "quickbloom"]


def forget(names: Iterable[str]) -> None:
    """Drop modules, so that the next import of each finds the first one on the path."""
    for name in names:
        sys.modules.pop(name, None)


def adopt(names: Iterable[str], directory: Path) -> None:
    """Use these modules as those of the bundle in `directory`: later imports come from there.

    A module that is imported already keeps its `__file__`, where it is installed.
    """
    for name in names:
        module = sys.modules[name]
        if hasattr(module, "__path__"):
            below = name.split(".")[1:]
            # As `quickbloom/__init__.py` sets it if the other folders lie beside its own.
            module.__path__ = [str(directory.joinpath(*below))] if below else [str(directory / name), str(directory)]
            if module.__spec__ is not None:
                module.__spec__.submodule_search_locations = list(module.__path__)


def unpacked(install: Callable[..., Path], bundle: bytes, apps: Path) -> Path:
    """Return the directory of a bundle below `apps`, which appears there once it is complete on the disk.

    `install` is Flower's `install_from_fab`, which takes any existing directory for a complete one.
    A directory from which another process may import is never changed.
    """
    digest = hashlib.sha256(bundle).hexdigest()
    for mark in apps.glob(f"*.{digest[:8]}/{_COMPLETE}"):
        if _is(mark, digest):
            return mark.parent
    try:
        apps.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=apps.parent, prefix="unpacking-") as folder:
            fresh = install(bundle, Path(folder), skip_prompt=True)
            (fresh / _COMPLETE).write_text(digest, encoding="utf-8")
            # The second name is for a directory under the first one that another process has not filled, or is filling.
            for name in (fresh.name, f"whole-{digest}.{digest[:8]}"):
                if moved := _moved(fresh, apps / name, digest):
                    return moved
    except OSError:  # Flower reports what is wrong
        pass
    return install(bundle, skip_prompt=True)


def _moved(fresh: Path, directory: Path, digest: str) -> Path | None:
    """Return `directory` once it holds the content of `fresh`; None if it holds something else."""
    try:
        fresh.rename(directory)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return directory if _is(directory / _COMPLETE, digest) else None  # another process that shares `apps` was faster
    return directory


def _is(mark: Path, digest: str) -> bool:
    try:
        return mark.read_text(encoding="utf-8") == digest
    except (OSError, ValueError):
        return False


def prepare(install: Callable[..., Path], apps: Path, ours: Mapping[str, str], names: Iterable[str]) -> Callable[..., Path]:
    """Return Flower's `install_from_fab`, which then also adopts or drops the modules `names`, made from the files `ours`.

    `apps`: the directory in which Flower unpacks bundles, each in a directory whose name ends in
    the first digits of its SHA-256.
    """

    @functools.wraps(install)
    def install_and_settle(bundle: bytes, **_: Any) -> Path:
        directory = unpacked(install, bundle, apps)
        if ours and bundled_files(bundle) == ours:
            adopt(names, directory)
        else:
            log(DEBUG, "The run brings other code than is installed here: it is imported for every message")
            forget(names)
        return directory

    return install_and_settle


def worker() -> None:
    """Let Flower's worker in this process use the imported app."""
    try:
        apps = flower.get("get_flwr_home")() / flower.get("APP_DIR")
    except flower.MissingNameError as error:  # the app is unpacked and imported for every message, as Flower does
        log(DEBUG, "%s", error)
        return
    client: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    client.install_from_fab = prepare(client.install_from_fab, apps, FILES, _NAMES)


def _import_app() -> dict[str, str]:
    try:
        importlib.import_module("quickbloom.client_app.app")
        return installed_files()
    except Exception as error:  # whatever is wrong with this installation, the run's bundle may work
        log(DEBUG, "The app that is installed here cannot be imported: %s", error)
        return {}


FILES = _import_app()
"""Files that a bundle must consist of for the imported modules to be its own; empty: they never are."""
_NAMES = imported()  # now, because a worker that iterates over all modules would copy all their memory
