"""The command that repeats a run: the plain one, or the user's file where the run needs a part that only it registers."""

import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.gaussian import Gaussian
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.comparing.batch import Setup
from quickbloom.server_app.comparing.plan import Plan
from quickbloom.server_app.reporting.run_record import RunFacts
from quickbloom.server_app.runs.directory import RunDirectory


class Mine(Gaussian):
    name = "mine"


def commands(dataset: str, folder: Path) -> list[list[str]]:
    """Of one run of a comparison, of the comparison, and of the report of a run."""
    RunDirectory(folder).write_json("config.json", {"algorithm": "fomaml", "dataset": dataset, "rounds": 2, "seed": 0})
    setup = Setup("fomaml", dataset, 2, in_process=True)
    plan = Plan(("fedavg", "fomaml"), (0,), dataset, 2, (0.1,), (), False)
    return [setup.command(0), shlex.split(plan.command()), shlex.split(RunFacts.read(folder).command())]


@pytest.fixture(autouse=True)
def main(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program that runs, at first a notebook, which is no file; it has registered a data set."""
    monkeypatch.setitem(DATASETS, "mine", Mine)
    monkeypatch.setitem(sys.modules, "__main__", program := ModuleType("__main__"))
    return program


def test_a_registered_part_that_a_run_does_not_use_changes_nothing(tmp_path: Path) -> None:
    assert [words[:2] for words in commands("gaussian", tmp_path)] == [
        ["quickbloom", "run"],
        ["quickbloom", "compare"],
        ["quickbloom", "run"],
    ]


def test_a_run_with_an_own_part_is_repeated_by_its_file(main: ModuleType, tmp_path: Path) -> None:
    main.__file__ = "mine.py"
    assert {tuple(words[:2]) for words in commands("mine", tmp_path)} == {("python", "mine.py")}


def test_settings_of_an_own_part_need_its_file_too(main: ModuleType) -> None:
    """As of the other algorithm in a comparison, whose settings every run gets."""
    main.__file__ = "mine.py"
    assert Setup("fomaml", "gaussian", 2, ("mine.clients=9",)).command(0)[:2] == ["python", "mine.py"]


def test_an_own_part_of_a_notebook_is_refused_where_a_process_of_its_own_must_know_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'^`dataset = "mine"` must come from a file, for every run is a process of its own$'):
        commands("mine", tmp_path)
