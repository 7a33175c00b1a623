"""The three registries have one form: a name for each file, and in the file a class of this name."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from quickbloom.common import registries
from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.algorithms.base import Algorithm
from quickbloom.common.algorithms.fomaml import FoMaml
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.base import Dataset
from quickbloom.common.datasets.gaussian import Gaussian, GaussianOptions
from quickbloom.common.errors import ConfigError
from quickbloom.common.models import MODELS
from quickbloom.common.models.base import Model
from quickbloom.server_app.launch.prepare import settle

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("room", "base", "registry"),
    [("algorithms", Algorithm, ALGORITHMS), ("datasets", Dataset, DATASETS), ("models", Model, MODELS)],
)
def test_a_part_lies_in_the_file_of_its_name(room: str, base: type, registry: Mapping[str, type]) -> None:
    for name, kind in registry.items():
        assert issubclass(kind, base)
        assert vars(kind)["name"] == name
        assert kind.__module__.startswith(f"quickbloom.common.{room}.{name.replace('-', '_')}")
        assert not registries.is_users(kind)
        place = ROOT / "common" / room / name.replace("-", "_")
        assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def test_a_file_without_a_class_of_its_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("somewhere.mine")
    module.Other = type("Other", (), {"name": "other"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somewhere", ModuleType("somewhere"))
    monkeypatch.setitem(sys.modules, "somewhere.mine", module)
    with pytest.raises(ImportError, match=r'somewhere.mine must define a class with `name = "mine"`, and has none'):
        registries.load("somewhere", "mine")


class MoreOptions(GaussianOptions):
    """Settings of a data set that a test registers."""


class Mine(Gaussian):
    name = "mine"
    Options = MoreOptions


def test_what_is_registered_after_a_first_run_has_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    parse_run_config({"dataset": "gaussian"})  # as in a notebook
    monkeypatch.setitem(DATASETS, "mine", Mine)
    config = parse_run_config({"dataset": "mine", "mine.clients": 7})
    options = config.table("mine")
    assert isinstance(options, MoreOptions)
    assert options.clients == 7


class Step(FoMaml):
    name = "step"


@pytest.mark.parametrize(
    ("key", "registry", "part"), [("dataset", DATASETS, Mine), ("algorithm", ALGORITHMS, Step)], ids=["data set", "algorithm"]
)
def test_a_part_of_this_process_alone_is_refused_where_others_must_know_it(
    key: str, registry: dict[str, type], part: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = vars(part)["name"]
    monkeypatch.setitem(registry, name, part)
    settings = {"dataset": "gaussian", "output-dir": str(tmp_path / "run"), key: name}
    with pytest.raises(ConfigError, match=f'`{key} = "{name}"` is known to this process alone: .* put it into common/{key}s'):
        settle(dict(settings), None, 2, "simulation")
    assert settle(dict(settings), None, 1, "in-process").runtime == "in-process"
