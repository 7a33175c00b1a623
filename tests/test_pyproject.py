"""What Flower and uv read in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from quickbloom import __version__

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s\[<>=;]", requirement, maxsplit=1)[0] for requirement in requirements}


def test_every_dependency_is_overridden_so_that_flwr_run_resolves_nothing() -> None:
    extras = [requirement for extra in PROJECT["project"]["optional-dependencies"].values() for requirement in extra]
    wanted = _names(PROJECT["project"]["dependencies"] + extras)
    overridden = PROJECT["tool"]["uv"]["override-dependencies"]
    assert _names(overridden) == wanted
    assert all(line.endswith("; python_version < '0'") for line in overridden)


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == __version__
    (kernels,) = PROJECT["project"]["optional-dependencies"]["fast"]
    assert kernels.split(" ; ")[0] == f"quickbloom-kernels=={__version__}"


def test_no_flower_federations_are_shipped_because_flwr_run_would_rewrite_the_file() -> None:
    assert "federations" not in PROJECT["tool"]["flwr"]
