"""Who may import whom: server_app -> common <- client_app, and inside `common` algorithms, data sets and models are apart."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "server_app", "client_app")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it; `from a import b` counts as a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def offenders(folder: str, *forbidden: str, but: tuple[str, ...] = ()) -> list[str]:
    """Files under `folder` that import one of the packages `forbidden`, with what they import."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, folder
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        if str(path.relative_to(ROOT)) not in but
        for name in imports(path)
        if any(name == package or name.startswith(f"{package}.") for package in forbidden)
    ]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("common", ("server_app", "client_app")),
        ("server_app", ("client_app",)),
        ("client_app", ("server_app",)),
        (
            "common/algorithms",
            (
                "quickbloom.common.datasets",
                "quickbloom.common.models",
                "quickbloom.common.config.run",
                "quickbloom.common.wire.messages",
            ),
        ),
        (
            "common/datasets",
            (
                "quickbloom.common.algorithms",
                "quickbloom.common.models",
                "quickbloom.common.config.run",
                "quickbloom.common.wire.messages",
            ),
        ),
        (
            "common/models",
            (
                "quickbloom.common.algorithms",
                "quickbloom.common.datasets",
                "quickbloom.common.config.run",
                "quickbloom.common.wire.messages",
            ),
        ),
    ],
)
def test_packages_keep_apart(folder: str, forbidden: tuple[str, ...]) -> None:
    assert offenders(folder, *forbidden) == []


def test_only_the_wire_and_the_door_to_flower_know_flower_in_common() -> None:
    knowing = [
        f"common/{path}.py"
        for path in (
            "wire/messages",
            "wire/arrays",
            "wire/packing",
            "wire/checks",
            "wire/secure/messages",
            "flower/upload_deadline",
        )
    ]
    assert offenders("common", "flwr", "flwr_datasets", but=tuple(knowing)) == []
    assert any(name.startswith("flwr") for name in imports(ROOT / "common" / "wire" / "messages.py"))


@pytest.mark.parametrize("folder", PACKAGES)
def test_what_flower_does_not_promise_is_reached_through_one_door(folder: str) -> None:
    public = {"flwr", "flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
    modules = {
        name
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if name.split(".")[0] == "flwr"
    }
    assert modules <= public


@pytest.mark.parametrize("package", PACKAGES)
def test_no_test_code_is_imported(package: str) -> None:
    assert offenders(package, "tests", "loopback", "pytest", "hypothesis") == []


def test_imports_inside_functions_and_of_names_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text("from quickbloom.common import datasets\ndef f():\n    import flwr.app\n    from . import x\n")
    assert set(imports(path)) == {"quickbloom.common", "quickbloom.common.datasets", "flwr.app", ".", "..x"}


def test_a_folder_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no_such_folder"):
        offenders("no_such_folder", "flwr")
