"""A user's own model: it is built like any other, and whatever is wrong with it is one sentence about `model`."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.models import build_model
from quickbloom.common.options import Options

MODELS = """
import torch
from torch import nn

torch.manual_seed(5)
number = 3

def small(input_shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, outputs))

class Net(nn.Linear):
    def __init__(self, input_shape, outputs):
        super().__init__(input_shape[0], outputs)

def broken(input_shape, outputs):
    raise ValueError("first line\\nsecond line")

def text(input_shape, outputs):
    return "a model"

def none(input_shape):
    return None
"""

Build = Callable[[str], nn.Module]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Builds "own_models_under_test:..." for inputs of shape (4,) and 3 outputs."""
    (tmp_path / "own_models_under_test.py").write_text(MODELS)
    (tmp_path / "own_broken_module.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name: build_model(name, Options(), (4,), 3, seed=1)


@pytest.mark.parametrize("factory", ["small", "Net"])
def test_a_function_or_a_class_builds_the_model_from_the_shapes(build: Build, factory: str) -> None:
    assert build(f"own_models_under_test:{factory}")(torch.zeros(2, 4)).shape == (2, 3)


def test_initial_values_depend_on_the_seed_alone(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    # A module that sets the seed when it is imported: the first time it is imported, the second time it is not.
    monkeypatch.delitem(sys.modules, "own_models_under_test", raising=False)
    before = torch.random.get_rng_state()
    one, other = (build("own_models_under_test:small").state_dict() for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_no_such_module:small", "must name a module that can be imported.*ModuleNotFoundError: No module named 'own_no_"),
        ("own_broken_module:small", "must name a module that can be imported.*No module named 'not_there_at_all'"),
        ("own_models_under_test:nothing", "must name a function .*, got nothing of that name"),
        ("own_models_under_test:number", "must name a function .*, got a int"),
        ("own_models_under_test:broken", r"with \(4,\) and 3, but it raised ValueError: first line second line"),
        ("own_models_under_test:text", "must return a torch.nn.Module .*, got a str"),
        ("own_models_under_test:none", "must return a torch.nn.Module .*, but it raised TypeError: none"),
    ],
)
def test_every_failure_is_one_sentence_that_names_the_setting(build: Build, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build(name)
    assert f'`model = "{name}"`' in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["my_models:small", "my_package.models:Net"])
def test_settings_take_it_and_it_has_an_empty_table(name: str) -> None:
    config = parse_run_config({"model": name}).resolved()
    assert (config.model, config.table(config.model)) == (name, Options())
    assert parse_run_config(config.flat()).model == name


@pytest.mark.parametrize("name", [":", "a:", ":b", "a:b:c", "a/b:c", "a..b:c", "a:b.c", "a:b()", "a b:c"])
def test_settings_refuse_what_names_no_function(name: str) -> None:
    with pytest.raises(ConfigError, match=r'`model` must be "module:factory" .*, got '):
        parse_run_config({"model": name})
