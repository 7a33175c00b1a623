"""What is said where an extra is not installed."""

import sys
import tomllib
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest

from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.system.extras import needs


class Blocker(MetaPathFinder):
    """As if a package were not installed."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


@pytest.mark.parametrize("load", [True, False])
@pytest.mark.parametrize("absent", ["blocked", "none", "nowhere"])
def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, load: bool, absent: str) -> None:
    name = "quickbloom_has_no_such_package" if absent == "nowhere" else "colorsys"
    if absent == "none":
        monkeypatch.setitem(sys.modules, name, None)
    else:
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "meta_path", [Blocker(name), *sys.meta_path] if absent == "blocked" else sys.meta_path)
    with pytest.raises(
        DataError, match=rf"^a report needs {name}, which is not installed: run pip install 'quickbloom\[report\]', or"
    ):
        needs("report", name, "a report", instead=", or not", error=DataError, load=load)


def test_a_package_that_is_there_is_returned() -> None:
    assert needs("report", "colorsys", "it") is sys.modules["colorsys"]
    assert needs("report", "colorsys", "it", load=False) is None


def test_a_package_goes_by_the_name_that_pip_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn", "sklearn.datasets"):  # whichever another test has imported
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="needs scikit-learn, which"):
        needs("datasets", "sklearn.datasets", "it")


def test_every_extra_that_is_named_is_one() -> None:
    root = Path(__file__).resolve().parents[3]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [file for folder in ("common", "server_app", "client_app") for file in (root / folder).rglob("*.py")]
    named = {text.split('"')[0] for file in sources for text in file.read_text().split('needs("')[1:]}
    assert named >= {"simulation", "datasets", "report", "export", "privacy"}
    assert named <= extras.keys()
