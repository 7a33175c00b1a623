"""pyproject.toml declares exactly the settings that the models define: Flower overrides no key that is not declared."""

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.parts import table_types
from quickbloom.common.config.run import NodeConfig, RunConfig, parse_run_config
from quickbloom.common.config.write_toml import HEADER, main, render
from quickbloom.common.datasets import DATASETS
from quickbloom.common.models import MODELS

PYPROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def declared() -> dict[str, Any]:
    return flatten(tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"])


def test_declared_settings_equal_the_defaults_exactly() -> None:
    defaults = parse_run_config({}).flat()
    assert declared() == defaults
    # == takes 1, 1.0 and True for equal.
    assert {key: type(value) for key, value in declared().items()} == {key: type(value) for key, value in defaults.items()}


def test_the_file_holds_what_render_writes() -> None:
    assert render() in PYPROJECT.read_text()


def test_declared_settings_parse_to_the_defaults() -> None:
    assert parse_run_config(declared()).flat() == parse_run_config({}).flat()


def test_table_names_are_unique_and_clash_with_no_setting_of_the_run() -> None:
    names = Counter(["privacy", *ALGORITHMS, *DATASETS, *MODELS])
    assert [name for name, count in names.items() if count > 1] == []
    assert names.keys() & {field.alias for field in RunConfig.model_fields.values()} == set()
    assert names.keys() == table_types().keys()
    assert not any("." in name for name in names)


@pytest.mark.parametrize("model", [RunConfig, NodeConfig, *table_types().values()], ids=lambda model: model.__name__)
def test_every_setting_has_a_description_in_one_line(model: Any) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description, name
        assert not field.is_required(), name


def test_writing_replaces_the_section_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[project]\nx = 1\n\n{HEADER}\nold = 1\n\n[tool.ruff]\ny = 2\n")
    monkeypatch.chdir(tmp_path)
    main()
    written = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    assert (written["project"], written["tool"]["ruff"]) == ({"x": 1}, {"y": 2})
    assert flatten(written["tool"]["flwr"]["app"]["config"]) == parse_run_config({}).flat()


def test_writing_without_the_section_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\nx = 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="has no section"):
        main()
    assert (tmp_path / "pyproject.toml").read_text() == "[project]\nx = 1\n"
