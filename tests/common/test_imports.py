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


def test_only_the_wire_and_the_warm_workers_know_flower_in_common() -> None:
    wire = (
        "common/wire/messages.py",
        "common/wire/arrays.py",
        "common/wire/packing.py",
        "common/wire/checks.py",
        "common/wire/secure/messages.py",
    )
    assert (
        offenders("common", "flwr", "flwr_datasets", but=(*wire, "common/flower/workers.py", "common/flower/preloaded_app.py"))
        == []
    )
    assert any(name.startswith("flwr") for name in imports(ROOT / "common" / "wire.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_test_code_is_imported(package: str) -> None:
    assert offenders(package, "tests", "loopback", "pytest", "hypothesis") == []


def test_imports_inside_functions_and_of_names_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text("from common import datasets\ndef f():\n    import flwr.app\n    from . import x\n")
    assert set(imports(path)) == {"common", "quickbloom.common.datasets", "flwr.app", ".", "..x"}


def test_a_folder_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no_such_folder"):
        offenders("no_such_folder", "flwr")
