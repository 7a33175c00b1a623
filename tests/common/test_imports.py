"""Who may import whom: a room imports the rooms that stand before it, the server and the nodes never each other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.datasets import DATASETS
from quickbloom.common.models import MODELS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "server_app", "client_app")
ORDER = (
    ("common",),  # the modules that lie in no room
    ("common.system",),
    ("common.maths", "common.models", "common.flower", "common.encoders"),
    ("common.algorithms", "common.datasets", "common.baselines"),
    ("common.config", "common.wire"),
    ("common.engine",),
    ("common.personal",),
    ("client_app",),
    ("server_app.events",),
    ("server_app.messaging",),
    ("server_app.federation",),
    ("server_app.runs",),
    ("server_app.reporting",),
    ("server_app",),  # the modules that lie in no room
    ("server_app.launch",),
    ("server_app.comparing", "server_app.advising", "server_app.deployment"),
    ("server_app.ray_cluster",),
    ("server_app.cli",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
MODULE = re.compile(r"quickbloom(\.[a-z_]\w*)+")
BESIDE = {("common.models", "common.maths")}
"""Rooms of one rank of which the first may import the second."""


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it, and those that stand in its strings, for `importlib` and processes.

    `from a import b` counts as a and a.b. Prose names modules without the first name, so a string that has it is code.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (found[0] for found in MODULE.finditer(node.value))


def room_of(module: str) -> str:
    """ "quickbloom.common.maths.params" -> "common.maths"; a module that lies in no room belongs to its package."""
    parts = module.split(".")[1:]
    room = ".".join(parts[:2])
    return room if room in RANK else parts[0]


def trespasses(path: Path, module: str) -> list[str]:
    """The imports of a file that its room may not have."""
    room = room_of(module)
    ours = [name for name in imports(path) if name.split(".")[0] == "quickbloom" and name.count(".")]
    rooms = {name: room_of(name) for name in ours if room_of(name) in RANK}
    return [
        f"{module} imports {name}"
        for name, other in rooms.items()
        # The server finds the ClientApp by its name, as Flower does.
        if other != room and (room, other) not in BESIDE and (RANK[other] >= RANK[room] or _across(room, other))
    ]


def _across(room: str, other: str) -> bool:
    return {room.split(".")[0], other.split(".")[0]} == {"server_app", "client_app"}


def modules() -> list[tuple[Path, str]]:
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    assert len(files) > 100
    names = (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__") for path in files)
    return [(path, f"quickbloom.{name}") for path, name in zip(files, names, strict=True)]


BY_NAME = {
    "quickbloom.server_app.messaging.in_process_grid imports quickbloom.client_app.app",
    "quickbloom.common.flower.preloaded_app imports quickbloom.client_app.app",
}
"""Found by name when they are needed, as Flower finds them: the same ClientApp as everywhere."""


def test_a_room_imports_only_what_stands_before_it() -> None:
    found = {trespass for path, module in modules() for trespass in trespasses(path, module)}
    assert found - BY_NAME == set()
    assert found >= BY_NAME  # else the exception is to go


def test_flower_is_known_to_its_own_rooms_and_to_what_is_written_for_it() -> None:
    may = ("quickbloom.common.flower", "quickbloom.common.wire", "quickbloom.server_app", "quickbloom.client_app")
    knows = {module for path, module in modules() for name in imports(path) if name.split(".")[0] in ("flwr", "flwr_datasets")}
    assert [module for module in knows if not module.startswith(may)] == []
    assert "quickbloom.common.wire.arrays" in knows


def test_no_room_has_more_modules_than_can_be_overseen() -> None:
    """Entries of a registry do not count: each has a file of its name, and there may be any number of them."""
    entries = {f"{name.replace('-', '_')}.py" for registry in (ALGORITHMS, DATASETS, MODELS) for name in registry}
    folders = {path.parent for path, _ in modules()}
    sizes = {folder: len([path for path in folder.glob("*.py") if path.name not in entries]) - 1 for folder in folders}
    assert {str(folder.relative_to(ROOT)): size for folder, size in sizes.items() if size > 17} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_test_code_is_imported(package: str) -> None:
    tests = {"tests", "pytest", "hypothesis", *(path.stem for path in (ROOT / "tests").glob("*.py"))} - {"loopback"}
    for path in (ROOT / package).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & tests, path


@pytest.mark.parametrize(
    ("text", "trespass"),
    [
        ("from quickbloom.common.wire import messages", True),
        ("def f():\n    import quickbloom.server_app.app", True),
        ("import importlib\nimportlib.import_module('quickbloom.common.engine.build')", True),
        ("COMMAND = 'from quickbloom.common.personal.model import load; load()'", True),
        ("from quickbloom.common.errors import ConfigError", False),
        ("from quickbloom.common.maths import params", False),
        ("from quickbloom import __version__", False),
    ],
)
def test_imports_in_functions_and_in_strings_are_seen(tmp_path: Path, text: str, trespass: bool) -> None:
    path = tmp_path / "sample.py"
    path.write_text(text)
    assert bool(trespasses(path, "quickbloom.common.algorithms.sample")) == trespass
